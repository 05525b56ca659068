"""Classify pictures.

  python -m vit_lightning.predict images=photos
  python -m vit_lightning.predict checkpoint=outputs/... images=cat.png
  python -m vit_lightning.predict 'images=[cat.png,new/*.jpg]' attention=true
  python -m vit_lightning.predict images=photos embeddings=true

The central square of a picture is used. predictions.json, predictions.csv and,
if asked for, attention.png and embeddings.npz, with the files of TensorBoard's
projector, are in outputs/predict/<date>/<time>/.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "predict", "vit_lightning.analysis.predict:predict", __doc__)


if __name__ == "__main__":
    main()
