"""Export a trained network to one file that other programs can run: ``python -m vit_lightning.export``."""

from vit_lightning.cli import run_command
from vit_lightning.config import ExportConfig


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.analysis.export:export", ExportConfig)


if __name__ == "__main__":
    main()
