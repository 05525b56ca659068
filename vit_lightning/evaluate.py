"""Evaluate a trained network: accuracy, calibration, worst classes, confusions.

  python -m vit_lightning.evaluate
  python -m vit_lightning.evaluate checkpoint=outputs/... split=val tta=true
  python -m vit_lightning.evaluate data=image_folder data.root=photos
  python -m vit_lightning.evaluate split=val embeddings=true

Without data=, the images that the network was trained on are used. Reports and
figures are in outputs/evaluate/<date>/<time>/.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "evaluate", "vit_lightning.analysis.evaluate:evaluate", __doc__)


if __name__ == "__main__":
    main()
