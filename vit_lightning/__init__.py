"""A small Vision Transformer as a PyTorch Lightning experiment project."""

__version__ = "0.1.0"
