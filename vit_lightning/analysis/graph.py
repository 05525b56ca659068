"""A trained classifier as one graph from uint8 images to logits, in several file formats."""

import contextlib
import io
import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier

Run = Callable[[Tensor], Tensor]  # maps uint8 images (B, C, h, w) to logits (B, classes)


def trace(classifier: ViTClassifier) -> ExportedProgram:
    """Trace the graph from uint8 images (B, C, h, w), with dynamic B, h and w, to logits (B, classes)."""
    axes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    example = torch.zeros(2, classifier.net.channels, 40, 48, dtype=torch.uint8)
    return torch.export.export(classifier, (example,), dynamic_shapes=(axes,))


def to_onnx(program: ExportedProgram, metadata: dict[str, str]) -> tuple[bytes, Run]:
    """Return the content of an ONNX file, and a function that runs it in ONNX Runtime on the CPU.

    Raises:
        InputError: if the required libraries are not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise InputError(f'format=onnx needs {error.name}: pip install -e ".[export]"') from error
    for name in ("onnxscript", "onnx_ir"):  # they log every node that they remove
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # hides the progress report
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    assert onnx is not None
    onnx.model.metadata_props.update(metadata)
    content = onnx.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torch_export(program: ExportedProgram, metadata: dict[str, str]) -> tuple[bytes, Run]:
    """Return the content of a ``torch.export`` file, and a function that runs it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def photographs(channels: int) -> Tensor:
    """Cut the two photographs included in scikit-learn into images (120, channels, 64, 64), uint8."""
    pieces = []
    for image in load_sample_images().images:  # (427, 640, 3)
        grid = image[:384].reshape(6, 64, 10, 64, 3).transpose(0, 2, 4, 1, 3).reshape(60, 3, 64, 64)
        pieces.append(grid if channels == 3 else grid.mean(axis=1, keepdims=True).astype(np.uint8))
    return torch.from_numpy(np.concatenate(pieces))


@torch.inference_mode()
def measure_speed(run: Run, images: Tensor, seconds: float) -> float:
    """Return the median time per call, in seconds, over at least three calls that take ``seconds`` in total."""
    times: list[float] = []
    run(images)
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
