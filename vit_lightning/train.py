"""Train a Vision Transformer and test its best checkpoint.

  python -m vit_lightning.train experiment=quickstart   one minute, no download
  python -m vit_lightning.train model.layers=4 optim.lr=3e-4
  python -m vit_lightning.train -m model.layers=2,4,8 seed=0,1
  python -m vit_lightning.train resume=outputs/...

A run writes its files to outputs/<date>/<time>/; tensorboard --logdir outputs
shows all runs. The jobs of a sweep (-m) are in outputs/multirun/<date>/<time>/,
with a table and a plot; started again with the same hydra.sweep.dir, a sweep
runs only the jobs that have not finished.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "train", "vit_lightning.runs.fit:train", __doc__)


if __name__ == "__main__":
    main()
