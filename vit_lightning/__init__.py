"""A small Vision Transformer as a PyTorch Lightning experiment project."""

from importlib.metadata import version

__version__ = version("vit-lightning")
