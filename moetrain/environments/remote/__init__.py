"""What runs in another interpreter than the trainer's, and imports nothing of moetrain."""
