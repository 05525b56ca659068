"""What a trained network does: evaluation, prediction, export, attention and figures."""
