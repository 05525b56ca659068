"""Measure the speed of this project next to other libraries: ``python -m vit_lightning.benchmark``."""

from vit_lightning.cli import run_command
from vit_lightning.config import BenchmarkRun


def main() -> None:
    """Run the command."""
    run_command("vit_lightning.benchmarks.benchmark:benchmark", BenchmarkRun)


if __name__ == "__main__":
    main()
