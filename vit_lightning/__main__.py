"""``python -m vit_lightning``: the commands."""

import sys

from vit_lightning.guard import run

COMMANDS = """\
A small Vision Transformer as a PyTorch Lightning experiment project.

  python -m vit_lightning.train       train, test the best checkpoint, write a record
  python -m vit_lightning.evaluate    evaluate a trained network, class by class
  python -m vit_lightning.predict     classify pictures
  python -m vit_lightning.export      write a network to one ONNX or torch.export file
  python -m vit_lightning.shard       write images as shards, for data=stream
  python -m vit_lightning.search      search for better hyper-parameters with Optuna
  python -m vit_lightning.sweep       summarise the runs of a sweep
  python -m vit_lightning.benchmark   measure the speed next to other libraries
  python -m vit_lightning keys        print the table of all keys (Markdown)

Each takes --help."""


def main() -> None:
    """Print the commands or the keys; anything else is a mistake."""
    arguments = sys.argv[1:]
    if arguments == ["keys"]:
        run("vit_lightning.messages:print_keys")
    elif set(arguments) <= {"--help", "-h"}:
        run("builtins:print", COMMANDS)
    else:
        sys.exit(f"error: unknown argument {' '.join(arguments)}; python -m vit_lightning --help lists the commands")


if __name__ == "__main__":
    main()
