"""``python -m vit_lightning``: what there is to run."""

import sys

COMMANDS = """\
A small Vision Transformer as a PyTorch Lightning experiment project.

  python -m vit_lightning.train       train, test the best checkpoint, leave a record
  python -m vit_lightning.evaluate    count what a trained network gets right, class by class
  python -m vit_lightning.predict     name what pictures show
  python -m vit_lightning.export      write a network into one ONNX or torch.export file
  python -m vit_lightning.search      search for better hyper-parameters with Optuna
  python -m vit_lightning.sweep       what the runs of a sweep came to
  python -m vit_lightning.benchmark   measure the speed beside other libraries

Each takes --help."""


def main() -> None:
    """Print the commands; anything but ``--help`` is a mistake."""
    if set(sys.argv[1:]) <= {"--help", "-h"}:
        print(COMMANDS)
    else:
        sys.exit(f"error: {' '.join(sys.argv[1:])} is no option; python -m vit_lightning --help lists the commands")


if __name__ == "__main__":
    main()
