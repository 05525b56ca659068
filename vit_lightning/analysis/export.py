"""Export a trained network to one file: ``python -m vit_lightning.export checkpoint=…``."""

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vit_lightning.analysis.card import write_card
from vit_lightning.analysis.graph import measure_speed, photographs, to_onnx, to_torch_export, trace
from vit_lightning.config import ModelConfig
from vit_lightning.files import write_atomic
from vit_lightning.keys import InputError, Invocation
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.foreign import TIMM, rename
from vit_lightning.recipe.weights import load_classifier, publish, read_record
from vit_lightning.schemas import ExportConfig
from vit_lightning.terminal import print_files, print_table

TOLERANCE = 1e-4  # largest allowed difference between logits
BATCHES = (1, 64)  # batch sizes of the speed measurement
FORMATS = {"onnx": ("model.onnx", to_onnx), "torch_export": ("model.pt2", to_torch_export)}


def export(config: ExportConfig, run_dir: Path, invocation: Invocation | None = None) -> float:
    """Export a checkpoint, compare its output with PyTorch's, and if they agree write it with a model card.

    A graph maps ``images`` (B, C, h, w), uint8, of any number and size, to ``logits`` (B, classes); it crops, resizes
    and normalises them as the classifier does. Its metadata has ``class_names`` and ``config`` as JSON.

    Returns:
        The largest absolute difference between its logits and PyTorch's (for safetensors, between probabilities).

    Raises:
        InputError: if there is no such checkpoint, a library is missing, or the export differs from PyTorch.
    """
    classifier = load_classifier(config.checkpoint)
    record, licence = read_record(config.checkpoint)
    if config.data is not None:
        classifier.hparams["data"] = asdict(config.data)
    licence = config.licence or licence
    if config.format == "safetensors":
        difference, path = export_weights(classifier, record, licence, run_dir)
    elif config.format == "timm":
        difference, path = export_timm(classifier, run_dir)
    else:
        difference, path = export_graph(config, classifier, run_dir)
    write_card(classifier, record, licence, path)
    return difference


def export_graph(config: ExportConfig, classifier: ViTClassifier, run_dir: Path) -> tuple[float, Path]:
    """Write the graph as ``config.format`` if its logits agree with PyTorch's, and measure its speed.

    Returns:
        The largest absolute difference between its logits and PyTorch's, and its file.

    Raises:
        InputError: if they differ.
    """
    metadata = {
        "class_names": json.dumps(classifier.hparams["class_names"]),
        "config": json.dumps(classifier.hparams["model"]),
    }
    pytorch = torch.inference_mode()(classifier)
    name, convert = FORMATS[config.format]
    content, exported = convert(trace(classifier), metadata)
    images = photographs(classifier.net.channels)
    expected, logits = pytorch(images), exported(images)
    difference = (logits - expected).abs().max().item()
    if not difference <= TOLERANCE or not torch.equal(logits.argmax(dim=1), expected.argmax(dim=1)):
        raise InputError(f"format={config.format}: logits differ from PyTorch's by {difference:.1e}; not written")
    write_atomic(run_dir / name, content)

    rows = []
    for label, run in (("PyTorch", pytorch), (config.format, exported)):
        seconds = [measure_speed(run, images[:batch], config.seconds) for batch in BATCHES]
        cells = [(f"{1000 * each:,.2f}", f"{batch / each:,.0f}") for batch, each in zip(BATCHES, seconds, strict=True)]
        rows.append((label, *chain(*cells)))
    columns = (f"{unit} at {batch}" for batch in BATCHES for unit in ("ms", "images/s"))
    print_table("speed on the CPU, by batch size", ("", *columns), rows)
    print(f"logits within {difference:.1e} of PyTorch's and top-1 the same on {len(images)} photographs")
    print_files([run_dir / name])
    return difference, run_dir / name


def export_weights(
    classifier: ViTClassifier, record: dict[str, Any], licence: str, run_dir: Path
) -> tuple[float, Path]:
    """Write the weights at half precision, with the run's record.

    Returns:
        The largest absolute difference of a probability due to half precision, on some photographs, and the file.
    """
    path = run_dir / "model.safetensors"
    publish(classifier, record, licence, path)
    images = photographs(classifier.net.channels)
    expected, half = classifier.classify(images), load_classifier(str(path)).classify(images)
    difference = (half - expected).abs().max().item()
    same = (half.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
    print(f"probabilities within {difference:.1e} of the checkpoint's and top-1 the same on {same:.1%} of photographs")
    print_files([path])
    return difference, path


def to_timm(classifier: ViTClassifier) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a network to timm: the arguments of ``timm.models.VisionTransformer``, and its state dict.

    Raises:
        InputError: if timm has no equivalent.
    """
    config = ModelConfig(**classifier.hparams["model"])
    needed = {"block": "prenorm", "patch_embed": "unfold", "position": "learned", "mlp_head_units": []}
    for key, value in needed.items():
        if (own := getattr(config, key)) != value:
            raise InputError(f"format=timm: model.{key}={own} has no equivalent in timm; it needs model.{key}={value}")
    if config.pool not in ("cls", "mean", "mean_norm"):
        raise InputError(f"format=timm: model.pool={config.pool} has no equivalent in timm; it needs cls or mean")
    first, D, P = classifier.net.first, config.embed_dim, config.patch_size
    arguments = dict(
        img_size=config.image_size,
        patch_size=P,
        in_chans=config.channels,
        num_classes=config.num_classes,
        global_pool="token" if config.pool == "cls" else "avg",
        fc_norm=config.pool == "mean_norm",
        embed_dim=D,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=(config.mlp_dim + 0.5) / D,  # timm multiplies and rounds down
        init_values=config.layer_scale,
        class_token=bool(first),
        reg_tokens=config.registers,
    )
    state = rename(classifier.net.state_dict(), tuple((ours, theirs) for theirs, ours in TIMM))
    positions = state["pos_embed"]
    unmoved = positions.new_zeros(1, config.registers, D)  # in timm, registers have positions
    state["pos_embed"] = torch.cat([positions[:, :first], unmoved, positions[:, first:]], dim=1)
    if config.registers:
        state["reg_token"] = state.pop("registers")
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unflatten(1, (-1, P, P))
    return arguments, {name: value.contiguous() for name, value in state.items()}


def export_timm(classifier: ViTClassifier, run_dir: Path) -> tuple[float, Path]:
    """Write a directory for ``timm.create_model("local-dir:…", pretrained=True)``, if timm's logits agree with ours.

    Returns:
        The largest absolute difference between timm's logits and ours, on some photographs, and ``config.json``.

    Raises:
        InputError: if timm is not installed, has no equivalent network, or its logits differ.
    """
    arguments, state = to_timm(classifier)
    try:
        import timm
    except ImportError as error:
        raise InputError(f'format=timm needs {error.name}: pip install -e ".[weights]"') from error
    about = {
        "num_classes": arguments["num_classes"],
        "input_size": [arguments["in_chans"], *2 * [arguments["img_size"]]],
        "mean": classifier.hparams["mean"],
        "std": classifier.hparams["std"],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "label_names": classifier.hparams["class_names"],
        **{"first_conv": "patch_embed.proj", "classifier": "head"},
    }
    settings = {"architecture": "vit_base_patch16_224", "model_args": arguments, "pretrained_cfg": about}
    paths = [run_dir / "model.safetensors", run_dir / "config.json"]
    write_atomic(paths[0], save(state))
    write_atomic(paths[1], json.dumps({**settings, "num_classes": about["num_classes"]}, indent=2))
    model = timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()
    images = photographs(classifier.net.channels)
    with torch.inference_mode():
        difference = (model(classifier.normalise(images)) - classifier(images)).abs().max().item()
    if not difference <= TOLERANCE:
        for path in paths:
            path.unlink()
        raise InputError(f"format=timm: logits differ from PyTorch's by {difference:.1e}; not written")
    print(f"timm's logits within {difference:.1e} of PyTorch's on {len(images)} photographs")
    print_files(paths)
    return difference, paths[1]
