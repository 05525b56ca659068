"""Classify pictures: ``python -m vit_lightning.predict``."""

from vit_lightning.cli import run_command
from vit_lightning.config import PredictConfig


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.analysis.predict:predict", PredictConfig)


if __name__ == "__main__":
    main()
