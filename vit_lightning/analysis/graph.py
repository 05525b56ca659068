"""A trained network as one graph from uint8 images to logits, and the files that hold it."""

import contextlib
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vit_lightning.config import InputError
from vit_lightning.recipe.classifier import ViTClassifier

Run = Callable[[Tensor], Tensor]  # uint8 images (B, C, h, w) to logits (B, classes)


class FromBytes(nn.Module):
    """A classifier's resize, normalisation and network. It always resizes: a graph knows no "where it is needed"."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: ViTClassifier) -> None:
        super().__init__()
        self.net = classifier.net
        self.size = classifier.net.image_size
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(classifier.hparams[name]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w), uint8, to logits (B, classes)."""
        x = (images / 255 - self.mean) / self.std
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return self.net(x)


def trace(classifier: ViTClassifier) -> ExportedProgram:
    """The graph from uint8 images (B, C, h, w), whose B, h and w are free, to logits (B, classes)."""
    axes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    example = torch.zeros(2, classifier.net.channels, 40, 48, dtype=torch.uint8)
    return torch.export.export(FromBytes(classifier).eval(), (example,), dynamic_shapes=(axes,))


def write_onnx(program: ExportedProgram, metadata: dict[str, str], path: Path) -> Run:
    """Write an ONNX file, and open it in ONNX Runtime on the CPU.

    Raises:
        InputError: if its libraries are not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise InputError(f'format=onnx needs {error.name}: pip install -e ".[export]"') from error
    for name in ("onnxscript", "onnx_ir"):  # which tell of every node that they remove
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # its report of progress
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    assert onnx is not None
    onnx.model.metadata_props.update(metadata)
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torch_export(program: ExportedProgram, metadata: dict[str, str], path: Path) -> Run:
    """Write a file of ``torch.export``, and open it again."""
    torch.export.save(program, path, extra_files=metadata)
    return torch.export.load(path).module()


def photographs(channels: int) -> Tensor:
    """Pieces of two photographs that scikit-learn carries: (120, channels, 64, 64), uint8."""
    pieces = []
    for image in load_sample_images().images:  # (427, 640, 3)
        grid = image[:384].reshape(6, 64, 10, 64, 3).transpose(0, 2, 4, 1, 3).reshape(60, 3, 64, 64)
        pieces.append(grid if channels == 3 else grid.mean(axis=1, keepdims=True).astype(np.uint8))
    return torch.from_numpy(np.concatenate(pieces))


@torch.inference_mode()
def measure_speed(run: Run, images: Tensor, seconds: float) -> float:
    """The median time of a call, in seconds, over calls that take ``seconds`` together, three at least."""
    times: list[float] = []
    run(images)
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
