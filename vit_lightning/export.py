"""Export a trained network to one file from uint8 images to logits.

  python -m vit_lightning.export
  python -m vit_lightning.export checkpoint=outputs/... format=torch_export

The exported network is compared with PyTorch before it is kept, and the speed
of both is measured. model.onnx (needs pip install -e ".[export]"), model.pt2 or
model.safetensors is in outputs/export/<date>/<time>/, next to a model card for
the Hugging Face Hub, README.md. format=timm (needs pip install -e ".[weights]")
makes that a directory for timm's local-dir:.
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "export", "vit_lightning.analysis.export:export", __doc__)


if __name__ == "__main__":
    main()
