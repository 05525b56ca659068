"""Trained networks: opening them, publishing them, and initialising another network from one."""

import json
import pickle
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vit_lightning import register
from vit_lightning.config import FOREIGN, Config, ModelConfig, OptimConfig
from vit_lightning.files import RunFiles, write_atomic
from vit_lightning.keys import InputError, Invocation
from vit_lightning.model.layers import resize_positions
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.foreign import read_foreign
from vit_lightning.terminal import is_first, relative

PRETRAINED = Path(__file__).parent.parent / "pretrained.safetensors"

# The keys of ModelConfig that may differ between a network and the one it starts from.
MAY_DIFFER = {
    *("image_size", "channels", "num_classes", "mlp_head_units"),  # converted
    *("zero_init", "dropout", "drop_path", "head_dropout"),  # not part of a trained network
}


def verify_checkpoint(path: Path) -> None:
    """Verify the CRC-32 checksums that ``torch.save`` wrote into a checkpoint.

    Checkpoints of earlier versions end with a line with a SHA-256, which is ignored here and by ``torch.load``.

    Raises:
        InputError: if the file is corrupt or not a checkpoint.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(2)
        if start and start != b"PK":
            raise InputError(f"{path} is not a checkpoint")
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except Exception as error:  # zipfile raises many types on arbitrary bytes
            raise InputError(f"{path} is corrupt (truncated or overwritten)") from error
    if damaged is not None:
        raise InputError(f"{path} is corrupt (checksum mismatch)")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it to the CPU, without executing code from it.

    Raises:
        InputError: if the file is corrupt, not a checkpoint, or contains objects other than tensors and plain values.
        OSError: if it cannot be read.
    """
    verify_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is not a checkpoint of this project: it contains more than weights") from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:  # another kind of zip file, or a corrupt header
        raise InputError(f"{path} is corrupt or not a checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint")
    return content


def load_classifier(checkpoint: str) -> ViTClassifier:
    """Open a trained classifier, in evaluation mode, on the CPU.

    Args:
        checkpoint: ``pretrained`` (the network in this package), a run's directory (its best checkpoint), or a file: a
            ``.ckpt`` of a run or a ``.safetensors`` from :func:`publish`; or a network of another library, as
            described in :mod:`vit_lightning.recipe.foreign`.

    Raises:
        InputError: if the file does not exist, or contains no valid classifier of this project.
    """
    if checkpoint.startswith(FOREIGN):
        return load_foreign(checkpoint)
    path = PRETRAINED if checkpoint == "pretrained" else Path(checkpoint).expanduser()
    if path.is_dir():
        path = RunFiles(path).best
    if not path.exists():
        raise InputError(
            f"checkpoint={checkpoint}: {path} does not exist; name a run's directory, a file or pretrained"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                hparams = json.loads(file.metadata()["hparams"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            with register.needs(hparams.get("imports", ())):
                classifier = ViTClassifier(**hparams)
            classifier.net.load_state_dict(state)  # converts to float32
        else:
            saved = read_checkpoint(path)
            with register.needs(saved["hyper_parameters"].get("imports", ())):
                classifier = ViTClassifier(**saved["hyper_parameters"])
            classifier.load_state_dict(saved["state_dict"])
    except InputError as error:
        raise InputError(f"checkpoint={checkpoint}: {error}") from error
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"checkpoint={checkpoint}: {path} contains no classifier of this project ({reason})"
        ) from error
    names, classes = len(classifier.hparams["class_names"]), classifier.hparams["model"]["num_classes"]
    if names != classes:
        raise InputError(f"checkpoint={checkpoint}: {path} has {names} class names for a network of {classes} classes")
    if not all(value.isfinite().all() for value in classifier.net.state_dict().values()):
        raise InputError(f"checkpoint={checkpoint}: {path} contains weights that are NaN or infinite")
    return classifier.eval()


def load_foreign(checkpoint: str) -> ViTClassifier:
    """Open a classifier from timm or Hugging Face, as :func:`load_classifier` does."""
    weights = read_foreign(checkpoint)
    if not weights.class_names:
        raise InputError(f"checkpoint={checkpoint} has no head and so no classes; train one with vit_lightning.train")
    optim = asdict(OptimConfig())
    classifier = ViTClassifier(asdict(weights.model), optim, weights.class_names, weights.mean, weights.std)
    classifier.net.load_state_dict(weights.state)
    return classifier.eval()


def read_record(checkpoint: str) -> tuple[dict[str, Any], str]:
    """Read what is known about the training of a classifier; arguments as for :func:`load_classifier`.

    Returns:
        The ``summary.json`` of its run, or ``{}`` if there is none, as for a checkpoint other than the best; and the
        note on what its weights may be used for, if the file is from :func:`publish`.

    Raises:
        InputError: if the record is corrupt.
    """
    path = PRETRAINED if checkpoint == "pretrained" else Path(checkpoint).expanduser()
    if checkpoint.startswith(FOREIGN):
        return {}, ""
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        return json.loads(about.get("record", "{}")), about.get("licence", "")
    files = RunFiles(path if path.is_dir() else path.absolute().parent.parent)
    if not files.summary.exists() or not (path.is_dir() or files.best.absolute() == path.absolute()):
        return {}, ""
    try:
        record = json.loads(files.summary.read_text(encoding="utf-8"))
        return {**record, "metrics": {name: float(value) for name, value in record["metrics"].items()}}, ""
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{relative(files.summary)} is damaged; delete it to export without a record") from error


def publish(classifier: ViTClassifier, record: dict[str, Any], licence: str, path: Path) -> None:
    """Write a classifier to one safetensors file, at half precision.

    Args:
        classifier: the classifier; its hyper-parameters (network, class names, normalisation) are included.
        record: the training run's ``summary.json``.
        licence: a note on what the weights may be used for.
        path: the file, which is replaced atomically.
    """
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in classifier.net.state_dict().items()
    }
    hparams = json.dumps(dict(classifier.hparams))
    write_atomic(path, save(state, {"hparams": hparams, "record": json.dumps(record), "licence": licence}))


def follow_weights(config: Config, invocation: Invocation) -> Config:
    """Set a new run's network to that of its foreign weights; ``model.image_size`` and the head's widths may differ.

    Raises:
        InputError: if the weights cannot be read, or a key of ``model`` that was set contradicts them.
    """
    checkpoint = config.checkpoint
    if checkpoint is None or not checkpoint.startswith(FOREIGN) or config.resume is not None:
        return config
    theirs, ours, default = asdict(read_foreign(checkpoint).model), asdict(config.model), asdict(ModelConfig())
    typed = {key.removeprefix("model.") for key in invocation.keys}
    if invocation.overrides is None:  # called from Python
        typed = {key for key in ours if ours[key] != default[key]}
    if "model" in typed:
        raise InputError(f"checkpoint={checkpoint} has its own network; remove model=")
    kept = MAY_DIFFER - ({"image_size", "mlp_head_units"} - typed)
    for key in sorted(typed & theirs.keys() - kept):
        if ours[key] != theirs[key]:
            raise InputError(f"checkpoint={checkpoint} has model.{key}={theirs[key]}; remove model.{key}")
    side, patch_size = ours["image_size"], theirs["patch_size"]
    if "image_size" in kept and side % patch_size:
        fitting = max(1, round(side / patch_size)) * patch_size
        raise InputError(
            f"model.image_size={side} is not divisible by the patches of checkpoint={checkpoint}, "
            f"model.patch_size={patch_size}; try model.image_size={fitting}"
        )
    model = replace(config.model, **{key: value for key, value in theirs.items() if key not in kept})
    return replace(config, model=model)


def start_from(classifier: ViTClassifier, checkpoint: str) -> None:
    """Copy the weights of a trained classifier into another, including the head if their classes are the same.

    Learned positions are resized to the new network's number of patches, as in Dosovitskiy et al., 2021
    (https://arxiv.org/abs/2010.11929, section 3.2), and the first layer is converted between colour and gray images.

    Args:
        classifier: the classifier to initialise.
        checkpoint: as for :func:`load_classifier`.

    Raises:
        InputError: if the architectures of the two networks differ.
    """
    ours, class_names = asdict(ModelConfig(**classifier.hparams["model"])), classifier.hparams["class_names"]
    if checkpoint.startswith(FOREIGN):
        weights = read_foreign(checkpoint)
        theirs, state = asdict(weights.model), dict(weights.state)
        same_classes = weights.class_names in (class_names, [str(number) for number in range(len(class_names))])
        data = None
        normalise_as(classifier, weights.mean, weights.std)
        read_foreign.cache_clear()
    else:
        trained = load_classifier(checkpoint)
        theirs, state = asdict(ModelConfig(**trained.hparams["model"])), trained.net.state_dict()
        same_classes, data = trained.hparams["class_names"] == class_names, trained.hparams["data"]
    for key, value in theirs.items():
        if key not in MAY_DIFFER and value != ours[key]:
            raise InputError(
                f"checkpoint={checkpoint} has model.{key}={value}, but this run has model.{key}={ours[key]}; "
                f"set model.{key}={value}"
            )
    if same_classes and is_first():
        warn_of_seen_images(checkpoint, data, classifier.hparams["data"])
    first = next(name for name in state if name.startswith("patch_embed."))  # the weight of the first layer
    state[first] = convert_channels(state[first], theirs["channels"], ours["channels"])
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], classifier.net.side, classifier.net.first)
    if not same_classes or theirs["mlp_head_units"] != ours["mlp_head_units"]:
        new = classifier.net.state_dict()
        state = {name: (new if name.startswith("head.") else state)[name] for name in new}
    classifier.net.load_state_dict(state)


def normalise_as(classifier: ViTClassifier, *statistics: list[float]) -> None:
    """Replace a classifier's mean and standard deviation, averaged if the number of channels differs."""
    for name, values in zip(("mean", "std"), statistics, strict=True):
        own = classifier.get_buffer(name)
        new = values if len(values) == len(own) else [sum(values) / len(values)] * len(own)
        own.copy_(torch.tensor(new))
        classifier.hparams[name] = new


def warn_of_seen_images(checkpoint: str, theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> None:
    """Print a warning if held-out images were split differently when the checkpoint was trained."""
    keys = ("split", "val_fraction", "split_seed")
    if not theirs or not ours or ours["split"] != "standard" or all(theirs[key] == ours[key] for key in keys):
        return
    setting = " ".join(f"data.{key}={theirs[key]}" for key in keys)
    print(
        f"checkpoint={checkpoint} was trained with {setting}; if the images are the same, it has seen some of this "
        "run's validation images, and their accuracy will be too high; use the same settings to avoid this",
        file=sys.stderr,
    )


def convert_channels(weight: Tensor, before: int, after: int) -> Tensor:
    """Convert the weight of a first layer to images with another number of channels.

    The output for an image whose channels are equal, such as a gray image stored in colour, does not change.

    Args:
        weight: (out, before · k) of a linear layer, channel-major, or (out, before, h, w) of a convolution.
        before: old number of channels.
        after: new number of channels.

    Returns:
        (out, after · k) or (out, after, h, w).
    """
    if before == after:
        return weight
    total = weight.flatten(1).unflatten(1, (before, -1)).sum(dim=1, keepdim=True)  # (out, 1, k)
    return (total / after).expand(-1, after, -1).reshape(len(weight), -1, *weight.shape[2:])
