"""Trained networks: how they are found, opened and published, and how another network starts from one."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vit_lightning.config import ModelConfig
from vit_lightning.files import read_checkpoint
from vit_lightning.keys import InputError
from vit_lightning.model.layers import resize_positions
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.terminal import is_first

PRETRAINED = Path(__file__).parent.parent / "pretrained.safetensors"

# What two networks must share for the weights of one to fit the other; channels, positions and head are made to fit.
SHAPE = (
    *("block", "patch_embed", "patch_size", "stem_depth", "stem_se", "position", "pool", "registers"),
    *("embed_dim", "layers", "heads", "mlp_dim", "layer_scale"),
)


def load_classifier(checkpoint: str) -> ViTClassifier:
    """Open a trained classifier, in evaluation mode, on the CPU.

    Args:
        checkpoint: ``pretrained`` (the network in this package), the directory of a run (its best checkpoint), or a
            file: a ``.ckpt`` that a run left or a ``.safetensors`` of :func:`publish`.

    Raises:
        InputError: if there is no such file, or it holds no classifier of this project.
    """
    path = PRETRAINED if checkpoint == "pretrained" else Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    if not path.exists():
        raise InputError(f"checkpoint={checkpoint}: no file {path}; name a run's directory, a .ckpt or pretrained")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                hparams = json.loads(file.metadata()["hparams"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            classifier = ViTClassifier(**hparams)
            classifier.net.load_state_dict(state)  # copies into float32
        else:
            saved = read_checkpoint(path)
            classifier = ViTClassifier(**saved["hyper_parameters"])
            classifier.load_state_dict(saved["state_dict"])
    except InputError as error:
        raise InputError(f"checkpoint={checkpoint}: {error}") from error
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"checkpoint={checkpoint}: {path} holds no classifier of this project ({reason})") from error
    return classifier.eval()


def publish(classifier: ViTClassifier, record: dict[str, Any], licence: str, path: Path) -> None:
    """Write a classifier's weights at half precision, with what describes them, into one safetensors file.

    Args:
        classifier: its hyper-parameters (network, class names, normalisation) go along.
        record: the training run's ``summary.json``.
        licence: a note on what the weights may be used for.
        path: the file.
    """
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in classifier.net.state_dict().items()
    }
    hparams = json.dumps(dict(classifier.hparams))
    path.write_bytes(save(state, {"hparams": hparams, "record": json.dumps(record), "licence": licence}))


def start_from(classifier: ViTClassifier, checkpoint: str) -> None:
    """Give a classifier the weights of a trained one, and its head too where their classes are the same.

    Learned positions are resized to the network's tokens, as in Dosovitskiy et al., 2021
    (https://arxiv.org/abs/2010.11929, section 3.2), and a network of colour images takes gray ones, or the reverse.

    Args:
        classifier: the one to fill.
        checkpoint: as :func:`load_classifier` takes it.

    Raises:
        InputError: if the two networks are of different shapes.
    """
    trained = load_classifier(checkpoint)
    theirs, ours = (asdict(ModelConfig(**network.hparams["model"])) for network in (trained, classifier))
    for key in SHAPE:
        if theirs[key] != ours[key]:
            raise InputError(
                f"checkpoint={checkpoint} has model.{key}={theirs[key]}, this run {ours[key]}; "
                f"set model.{key}={theirs[key]}"
            )
    same_classes = trained.hparams["class_names"] == classifier.hparams["class_names"]
    its, own = trained.hparams["data"], classifier.hparams["data"]
    split = ("split", "val_fraction", "split_seed")
    seen = its and own and own["split"] == "standard" and any(its[key] != own[key] for key in split)
    if same_classes and seen and is_first():
        setting = " ".join(f"data.{key}={its[key]}" for key in split)
        print(
            f"checkpoint={checkpoint} was trained with {setting}; if its images are these, it has seen some that now "
            "validate, whose accuracy will look too good; the same settings here would leave them alone",
            file=sys.stderr,
        )
    state = trained.net.state_dict()
    first = next(name for name in state if name.startswith("patch_embed."))  # the weight of the first layer
    state[first] = convert_channels(state[first], theirs["channels"], ours["channels"])
    if "pos_embed" in state:
        side = ours["image_size"] // ours["patch_size"]
        state["pos_embed"] = resize_positions(state["pos_embed"], side, first=int(ours["pool"] == "cls"))
    if not same_classes or theirs["mlp_head_units"] != ours["mlp_head_units"]:
        new = classifier.net.state_dict()
        state = {name: (new if name.startswith("head.") else state)[name] for name in new}
    classifier.net.load_state_dict(state)


def convert_channels(weight: Tensor, before: int, after: int) -> Tensor:
    """Convert the weight of a first layer to images with another number of channels.

    The output for an image whose channels are equal, such as a gray image stored in colour, does not change.

    Args:
        weight: (out, before · k) of a linear layer, channel-major, or (out, before, h, w) of a convolution.
        before: number of channels so far.
        after: new number of channels.

    Returns:
        (out, after · k) or (out, after, h, w).
    """
    if before == after:
        return weight
    total = weight.flatten(1).unflatten(1, (before, -1)).sum(dim=1, keepdim=True)  # (out, 1, k)
    return (total / after).expand(-1, after, -1).reshape(len(weight), -1, *weight.shape[2:])
