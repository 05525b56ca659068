"""The network, in pure PyTorch."""
