"""What a run says about itself: ledger, progress, TensorBoard, W&B, plots. A leaf: it knows recipes
and errors only.
"""
