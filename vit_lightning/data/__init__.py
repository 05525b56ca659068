"""Data sources, their cache, splits and batches."""
