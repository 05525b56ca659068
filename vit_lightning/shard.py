"""Write images as shards, which data=stream reads as it needs them.

  python -m vit_lightning.shard data.root=photos output=shards
  python -m vit_lightning.train data=stream data.root=shards

Any data set is read and split as in training; the training images are shuffled.
Pictures of differing sizes are kept at data.stored_size, or else 224. The
directory may be moved to an object store: data.root=s3://bucket/shards.
Needs pip install -e ".[stream]".
"""

from vit_lightning.guard import run


def main() -> None:
    """Run the command."""
    run("vit_lightning.cli:run_command", "shard", "vit_lightning.data.shard:shard", __doc__)


if __name__ == "__main__":
    main()
