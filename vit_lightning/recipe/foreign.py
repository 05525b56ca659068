"""Vision Transformers of timm and Hugging Face as networks of this project, and the way back to timm.

``checkpoint=timm:NAME`` and ``hf:NAME`` are downloaded from the Hugging Face Hub; ``timm:NAME:FILE`` (weights of the
architecture NAME), ``timm:DIR`` and ``hf:DIR`` are read from disk. ViT, DeiT, DINO and DINOv2, with and without
registers, can be converted; a random image is used to check that the converted network gives the same output.
"""

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_lightning.config import ModelConfig
from vit_lightning.keys import InputError
from vit_lightning.model.vit import ViT

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and standard deviation
TOLERANCE = 1e-4  # largest difference from the library's output, relative to its largest value if that exceeds 1

TIMM = (  # names of parts in timm, and here
    *(("patch_embed.proj.", "patch_embed."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.3."), ("ls", "scale")),
    *(("fc_norm.", "pool.norm."), ("head.", "head.0.")),
)
HF = (  # patterns of names in transformers, and the names in timm
    (r"^(vit\.)?(embeddings\.)?", ""),
    (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^position_embeddings$", "pos_embed"),
    (r"^register_tokens$", "reg_token"),
    (r"^(layers|encoder\.layer)\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


@dataclass(frozen=True, slots=True)
class ForeignWeights:
    """A network of another library, converted to this project's form."""

    model: ModelConfig  # configuration of the same network here, with one class if it has no head
    state: dict[str, Tensor]  # with ViT's names; without a head if the network has none
    class_names: list[str]  # numbers if the classes have no names; empty if there is no head
    mean: list[float]  # mean of each channel, for normalising images in [0, 1]
    std: list[float]


@functools.lru_cache(maxsize=1)  # a run needs the shape first, and the weights once its data is open
def read_foreign(checkpoint: str) -> ForeignWeights:
    """Read the network named ``timm:…`` or ``hf:…``.

    Raises:
        InputError: if the library is missing, has no such network or cannot download it, a file does not fit, or the
            network has no equivalent here.
    """
    kind, _, name = checkpoint.partition(":")
    library, local = {"timm": ("timm", "timm:NAME:FILE"), "hf": ("transformers", "hf:DIRECTORY")}[kind]
    for reporter in ("huggingface_hub", "timm"):  # they log every attempt to connect
        logging.getLogger(reporter).setLevel(logging.ERROR)
    try:
        return {"timm": read_timm, "hf": read_hf}[kind](name)
    except InputError as error:
        raise InputError(f"checkpoint={checkpoint}: {error}") from error
    except ImportError as error:
        raise InputError(f'checkpoint={checkpoint} needs {error.name}: pip install -e ".[weights]"') from error
    except Exception as error:  # the libraries raise many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        raise InputError(
            f"checkpoint={checkpoint} cannot be read by {library} ({reason.rstrip('.')}); check the name, the file and "
            f"the connection to the hub; local weights are written {local}"
        ) from error


def read_timm(name: str) -> ForeignWeights:
    """Read ``NAME``, ``NAME:FILE`` or a directory with timm."""
    import timm

    name, _, file = name.partition(":")
    path = Path(file or name).expanduser()
    if not file:
        return from_timm(timm.create_model(f"local-dir:{path}" if path.is_dir() else name, pretrained=True))
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    classes = len(timm.models.load_state_dict(str(path)).get("head.weight", ()))
    model = timm.create_model(name, num_classes=classes)
    timm.models.load_checkpoint(model, str(path), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    return from_timm(model)


def from_timm(model: Any) -> ForeignWeights:
    """Convert a ``timm.models.VisionTransformer``.

    Raises:
        InputError: if it has no equivalent here.
    """
    import timm

    if type(model) is not timm.models.VisionTransformer:
        raise InputError(f"timm's {type(model).__name__} has no equivalent in this project")
    about: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names, subset = about.get("label_names"), timm.data.infer_imagenet_subset(model)
    if not names and subset is not None:
        names = timm.data.ImageNetInfo(subset).label_descriptions()
    pools = {"token": "cls", "avg": "mean" if isinstance(model.fc_norm, nn.Identity) else "mean_norm"}
    pool = pools.get(model.global_pool)
    if pool is None or (model.pool_include_prefix and pool != "cls"):
        raise InputError(f"timm's global_pool={model.global_pool} has no equivalent in this project")
    block: Any = model.blocks[0]
    positioned = 0 if model.no_embed_class else model.num_prefix_tokens
    config, state = convert(model.state_dict(), block.attn.num_heads, block.norm1.eps, pool, positioned)
    statistics = [list(about.get(key, usual)) for key, usual in zip(("mean", "std"), IMAGENET, strict=True)]
    return checked(model, config, state, list(names or ()), *statistics)


def read_hf(name: str) -> ForeignWeights:
    """Read a model from the Hub, or a directory, with transformers."""
    import transformers

    place = str(path) if (path := Path(name).expanduser()).is_dir() else name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(place)
    kind = config.model_type
    if kind not in ("vit", "dinov2", "dinov2_with_registers"):
        raise InputError(f"transformers' {kind} has no equivalent in this project")
    # The head of a DINOv2 classifier reads the class token and the patches' mean, so only the network below it is used.
    headed = kind == "vit" and "ForImageClassification" in str(config.architectures)
    auto = transformers.AutoModelForImageClassification if headed else transformers.AutoModel
    more = {"add_pooling_layer": False} if kind == "vit" and not headed else {}
    model, report = auto.from_pretrained(place, output_loading_info=True, dtype=torch.float32, **more)
    if report["missing_keys"]:
        raise InputError(f"its weights lack {min(report['missing_keys'])}")
    try:
        about, _ = transformers.ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:  # it has no image processor
        about = {}
    return from_hf(model, about.get("image_mean"), about.get("image_std"))


def from_hf(model: Any, mean: list[float] | None = None, std: list[float] | None = None) -> ForeignWeights:
    """Convert a ViT, with or without a head, or a DINOv2 from transformers.

    The mean and standard deviation of the images default to 0.5 for ViT and to ImageNet's for DINOv2.

    Raises:
        InputError: if it has no equivalent here.
    """
    config, state = model.config, {}
    for name, value in model.state_dict().items():
        for pattern, timm_name in HF:
            name = re.sub(pattern, timm_name, name)
        state[name] = value
    state.pop("mask_token", None)  # for pretraining only
    for name in [name for name in state if ".attention.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    names = [config.id2label[number] for number in range(len(state.get("head.weight", ())))]
    usual = ([0.5] * 3, [0.5] * 3) if config.model_type == "vit" else IMAGENET
    shape, state = convert(state, config.num_attention_heads, config.layer_norm_eps, "cls", positioned=1)
    return checked(model, shape, state, names, list(mean or usual[0]), list(std or usual[1]))


def convert(
    theirs: Mapping[str, Tensor], heads: int, eps: float, pool: str, positioned: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert a state dict with timm's names to a configuration and weights of this project.

    Registers precede the patches in timm and follow them here, which does not affect attention. A class token that is
    not pooled becomes a register. The positions of the first ``positioned`` of these tokens are added to them.

    Raises:
        InputError: if the network has no square patches, or no learned position for each patch of a square image.
    """
    state = rename(theirs, TIMM)
    weight = state.get("patch_embed.weight", torch.empty(0))
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise InputError("it has no linear map of square patches")
    D, channels, patch_size, _ = weight.shape
    positions = state.pop("pos_embed", torch.empty(1, 0, D))
    side = math.isqrt(max(0, positions.shape[1] - positioned))
    if not side or side**2 + positioned != positions.shape[1]:
        raise InputError("it has no learned positions of a square image")
    prefix = [state.pop(name) for name in ("cls_token", "reg_token") if name in state]
    tokens = torch.cat([positions[:, :0], *prefix], dim=1)  # (1, number of tokens before the patches, D)
    tokens[:, :positioned] += positions[:, :positioned]
    first = int(pool == "cls")
    own = {"cls_token": tokens[:, :first], "registers": tokens[:, first:]}
    state |= {name: value for name, value in own.items() if value.shape[1]}
    state["pos_embed"] = torch.cat([positions.new_zeros(1, first, D), positions[:, positioned:]], dim=1)
    state["patch_embed.weight"] = weight.flatten(1)
    shape: dict[str, Any] = dict(pool=pool, channels=channels, embed_dim=D, heads=heads, norm_eps=eps)
    shape |= dict(image_size=side * patch_size, patch_size=patch_size, registers=tokens.shape[1] - first)
    shape |= dict(layers=sum(name.endswith(".norm1.weight") for name in state))
    widths = [len(state.get(name, [None])) for name in ("blocks.0.mlp.0.weight", "head.0.weight")]
    shape |= dict(mlp_dim=widths[0], num_classes=widths[1], dropout=0.0, mlp_head_units=[], head_dropout=0.0)
    shape |= dict(layer_scale=1.0 if "blocks.0.scale1.gamma" in state else None)
    return ModelConfig(**shape), state


def rename(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Rename parts of a network: the first of each pair, at the start of a name or after a dot, becomes the second."""
    result = {}
    for name, value in state.items():
        old, new = next((pair for pair in names if f".{pair[0]}" in f".{name}"), ("", ""))
        result[name.replace(old, new, 1)] = value
    return result


@torch.no_grad()
def checked(
    model: nn.Module, config: ModelConfig, state: dict[str, Tensor], names: list[str], *statistics: list[float]
) -> ForeignWeights:
    """Compare a converted network with the original, and name its classes uniquely.

    Raises:
        InputError: if its parts, or its logits (without a head, its pooled features), differ.
    """
    net = ViT(config).eval()
    own = {name: value for name, value in net.state_dict().items() if "head.0.weight" in state or "head." not in name}
    missing = {name for name in own.keys() - state.keys() if not name.endswith(".bias")}
    if different := sorted(missing | (state.keys() - own.keys())):
        raise InputError(f"it differs from the networks of this project in {different[0]}")
    state = {name: state[name] if name in state else torch.zeros_like(own[name]) for name in own}
    if not all(value.isfinite().all() for value in state.values()):
        raise InputError("its weights are NaN or infinite")
    net.load_state_dict(state, strict=False)
    images = torch.randn(1, net.channels, net.image_size, net.image_size, generator=torch.Generator().manual_seed(0))
    theirs: Any = model.eval()(images)
    headed = "head.0.weight" in state
    if not isinstance(theirs, Tensor):  # an output of transformers
        theirs = theirs.logits if headed else theirs.last_hidden_state[:, 0]
    ours = net(images) if headed else net.pool(net.forward_features(images))
    if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1):
        raise InputError("it computes something else than the networks of this project, such as another activation")
    if headed and (len(names) != config.num_classes or names == [f"LABEL_{number}" for number in range(len(names))]):
        names = [str(number) for number in range(ours.shape[1])]
    count = Counter(names)
    names = [name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return ForeignWeights(config, state, names, *statistics)
