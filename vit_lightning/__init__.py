"""A small Vision Transformer as a PyTorch Lightning experiment project."""
