"""A training run: its directory, callbacks, checkpoints and dashboard."""
