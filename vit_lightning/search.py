"""Search for better hyper-parameters with Optuna.

  python -m vit_lightning.search experiment=quickstart space=shape
  python -m vit_lightning.search experiment=fast search.timeout=36000

Each trial is a run in outputs/search/<study>/, judged by its best value of
monitor; test images are not used. Any number of processes may run the same
command: they share the study, and one that is started again continues it. At
the end: the best trials, history.png, importances.png and the command of the
best one.
pip install -e ".[search]" installs what it needs.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "search", "vit_lightning.sweeps.search:search", __doc__)


if __name__ == "__main__":
    main()
