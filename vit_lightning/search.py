"""Search for better hyper-parameters with Optuna: ``python -m vit_lightning.search``."""

from vit_lightning.cli import run_command
from vit_lightning.config import SearchRun


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.sweeps.search:search", SearchRun)


if __name__ == "__main__":
    main()
