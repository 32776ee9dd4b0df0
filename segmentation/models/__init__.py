"""Segmentation models: backbones, decoders, classifiers, and the published systems."""
