"""Embeddings of images, written as arrays and shown in TensorBoard's projector."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vit_lightning.files import write_atomic
from vit_lightning.recipe.augment import resize
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.terminal import print_files, relative, warn_instead

SHOWN = 5000  # maximum number of images in the projector, whose numbers are stored as text
SIDE = 32  # side of the projector's thumbnails, in pixels


def classify_and_embed(classifier: ViTClassifier, images: Tensor, tta: bool = False) -> tuple[Tensor, Tensor]:
    """Compute the class probabilities and the embeddings of stored images.

    An embedding is the pooled output of the network: what its head reads, before the hidden layers of the head. It
    therefore has D numbers whatever the head, and a head without hidden layers maps it linearly to the logits.

    Args:
        classifier: the classifier, in evaluation mode.
        images: (B, C, h, w), uint8.
        tta: as for :meth:`~vit_lightning.recipe.classifier.ViTClassifier.classify`; the embeddings do not depend on it.

    Returns:
        The probabilities (B, num_classes) and embeddings (B, D), float32, on the classifier's device.
    """
    pooled: list[Tensor] = []
    hook = classifier.net.head.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    try:
        probabilities = classifier.classify(images, tta)
    finally:
        hook.remove()
    return probabilities, pooled[0].float()  # with tta, the mirror images come second


def write_embeddings(
    folder: Path, embeddings: Tensor, columns: dict[str, list[str]], pictures: Callable[[Tensor], Tensor]
) -> None:
    """Write ``embeddings.npz``, and the files for TensorBoard's projector, with a thumbnail of each image.

    Args:
        folder: the directory to write to.
        embeddings: (n, D), float32, on the CPU.
        columns: other data for the n images, by name: ``files``, ``class`` and optionally ``labels``.
        pictures: a function that returns the images (k, C, h, w), uint8, at k positions.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"embeddings": embeddings.numpy(), **columns}
    np.savez_compressed(buffer, **arrays)
    write_atomic(folder / "embeddings.npz", buffer.getvalue())
    print_files([folder / "embeddings.npz"])
    with warn_instead("the projector"):
        count = min(SHOWN, len(embeddings))
        shown = torch.arange(count) * len(embeddings) // count  # spread out, because images may be sorted by class
        images = resize(pictures(shown).float() / 255, SIDE)
        if images.shape[1] != 3:
            images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        rows = [[clean(columns[name][i]) for name in columns] for i in shown.tolist()]
        with SummaryWriter(folder) as writer:
            writer.add_embedding(embeddings[shown], rows, images, tag="embeddings", metadata_header=list(columns))
        print(f"projector shows {count:,} of {len(embeddings):,} images: tensorboard --logdir {relative(folder)}")


def clean(text: str) -> str:
    """Make text a cell of a table of tab-separated values, in valid Unicode."""
    return re.sub(r"\s", " ", text).encode(errors="backslashreplace").decode()
