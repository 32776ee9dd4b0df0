"""Training and evaluation of segmentation models."""
