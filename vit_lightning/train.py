"""Train a Vision Transformer, test its best checkpoint and leave a record: ``python -m vit_lightning.train``."""

from vit_lightning.cli import run_command
from vit_lightning.config import Config


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.runs.fit:train", Config)


if __name__ == "__main__":
    main()
