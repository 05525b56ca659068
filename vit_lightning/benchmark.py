"""Measure the speed of this project next to a plain script and other libraries.

  python -m vit_lightning.benchmark data=image_folder data.root=data/cifar100
  python -m vit_lightning.benchmark benchmark.rounds=3 model.layers=4

Each contestant has a process of its own and is measured once per round, in
turn. Libraries that are not installed are left out: pip install -e ".[bench]"
adds them. benchmark.json and benchmark.png are in outputs/<date>/<time>/.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "benchmark", "vit_lightning.benchmarks.benchmark:benchmark", __doc__)


if __name__ == "__main__":
    main()
