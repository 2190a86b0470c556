"""Evaluation: benchmark files, pass@k, majority vote, judged answers."""
