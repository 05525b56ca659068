"""Summarise the runs of a sweep: ``python -m vit_lightning.sweep summary dir=outputs/multirun/…``."""

import sys
from pathlib import Path

from vit_lightning.guard import run

HELP = """\
Summarise the runs of a sweep, finished or not.

  python -m vit_lightning.sweep summary dir=outputs/multirun/…

Prints a row for each setting, the best validation accuracy first, with the mean and standard deviation over runs that
differ only in seed or fold, and writes the table to summary.csv and summary.png in that directory. A sweep does the
same at its end. Started again with hydra.sweep.dir set to its directory, a sweep runs only what has not finished."""


def main() -> None:
    """Run the command."""
    match sys.argv[1:]:
        case ["--help"] | ["-h"]:
            run("builtins:print", HELP)
        case ["summary", argument] if argument.startswith("dir="):
            run("vit_lightning.sweeps.table:show", Path(argument.removeprefix("dir=")).expanduser())
        case [*_, path] if path.startswith("dir=") or Path(path).is_dir():
            sys.exit(f"error: write python -m vit_lightning.sweep summary dir={path.removeprefix('dir=')}")
        case _:
            sys.exit("error: the command is: python -m vit_lightning.sweep summary dir=DIRECTORY")


if __name__ == "__main__":
    main()
