"""Evaluate a trained network, class by class: ``python -m vit_lightning.evaluate``."""

from vit_lightning.cli import run_command
from vit_lightning.config import EvaluateConfig


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.analysis.evaluate:evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
