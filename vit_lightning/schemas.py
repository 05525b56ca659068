"""The configurations of the commands besides ``train``, and the list of all of them."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vit_lightning.config import ACCELERATORS, IMPORTS, SEED, TRACEBACK, Config, DataConfig, check_checkpoint
from vit_lightning.keys import InputError, as_list, check_values, key


@dataclass(slots=True)
class BenchmarkConfig:
    """How the speed is measured."""

    prefix: ClassVar[str] = "benchmark."

    rounds: int = key(9, "Times that each contestant is measured, in turn.", low=1)
    steps: int = key(20, "Training steps per measurement.", low=1)
    warmup: int = key(10, "Steps before each measurement; more than loader workers prefetch.", low=1)

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(slots=True)
class BenchmarkRun(Config):
    """A benchmark."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


@dataclass(slots=True)
class SearchConfig:
    """How hyper-parameters are searched."""

    prefix: ClassVar[str] = "search."

    study: str = key("study", "Name of the study; its trials are in outputs/search/<study>/.")
    storage: str | None = key(None, "URL of the study's database; null for study.db next to its trials.")
    trials: int = key(20, "Trials to finish or prune, across all processes and restarts.", low=1)
    timeout: float | None = key(None, "Seconds after which a process starts no new trial; null for no limit.", low=0)
    sampler: str = key("tpe", "How values are proposed.", choices=("tpe", "random"))
    prune: bool = key(True, "End a trial whose best value is worse than the median of the others at its epoch.")
    startup: int = key(5, "Trials that finish before one is pruned.", low=0)
    warmup: int = key(1, "Epochs of a trial before it may be pruned.", low=0)
    heartbeat: int = key(60, "Seconds between heartbeats of a process; after twice as long without one, another "
                         "process takes over its trial.", low=1)  # fmt: skip
    seed: int | None = key(None, "Seed of the sampler; null for a random one.", low=0, high=SEED)

    def __post_init__(self) -> None:
        check_values(self)
        if not re.fullmatch(r"[\w.-]+", self.study):
            raise InputError(f"search.study={self.study} names a directory: use letters, digits, dots and dashes")


@dataclass(slots=True)
class SearchRun(Config):
    """A search: the configuration of its runs, and the space to search."""

    search: SearchConfig = field(default_factory=SearchConfig)
    space: dict[str, Any] = key(dict, "By key: {choices: [a, b]}, or {low: 1, high: 4} with step or log: true.")

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.trainer.strategy != "auto":
            raise InputError(f"trainer.strategy={self.trainer.strategy} is for single runs; a search uses one device")
        if not self.space:
            raise InputError("space= is empty; choose one, as in space=recipe, or write one into conf/space/")
        for name, domain in self.space.items():
            group, _, rest = name.rpartition(".")
            if ".options." in name:  # registered parts check their own settings
                pass
            elif not hasattr(getattr(self, group, None) if group else self, rest):
                raise InputError(f"space: {name} is not a key of the configuration; --help lists them")
            _check_domain(name, domain)


def _check_domain(name: str, domain: Any) -> None:
    """Refuse an invalid domain of a search space."""
    kinds = "{choices: [a, b]} or {low: 1, high: 4} with step or log"
    if not isinstance(domain, dict) or not (domain.keys() == {"choices"} or {"low", "high"} <= domain.keys()):
        raise InputError(f"space: {name} must have {kinds}, not {domain}")
    if "choices" in domain:
        choices = domain["choices"]
        if not isinstance(choices, list) or not choices:
            raise InputError(f"space: the choices of {name} must be a list of one or more, not {choices}")
        for choice in choices:
            if not isinstance(choice, str | int | float | None):
                raise InputError(
                    f"space: {name} has the choice {choice}; choices are numbers, strings, booleans or null"
                )
        return
    for extra in domain.keys() - {"low", "high", "step", "log"}:
        raise InputError(f"space: {name} has {extra}, which is not known; use {kinds}")
    numbers = [domain["low"], domain["high"], domain.get("step", 1)]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or numbers[2] <= 0:
        raise InputError(f"space: low, high and step of {name} must be numbers, and step positive, not {domain}")
    if not domain["low"] < domain["high"]:
        raise InputError(f"space: low={domain['low']} of {name} must be less than high={domain['high']}")
    if domain.get("log") and (domain["low"] <= 0 or domain.get("step")):
        raise InputError(f"space: {name} on a log scale needs a positive low and no step")


TRAINED = "Trained network: pretrained, a run's directory (its best checkpoint), a file, timm:NAME or hf:NAME."
TTA = "Average the probabilities of an image and its mirror image (test-time augmentation)."
EMBEDDINGS = "Write what the head reads of each image to embeddings.npz, and show it in TensorBoard's projector."


@dataclass(slots=True)
class EvaluateConfig:
    """An evaluation."""

    prefix: ClassVar[str] = ""

    checkpoint: str = key("pretrained", TRAINED)
    data: DataConfig | None = None  # null means the images that the network was trained on
    split: str = key("test", "The images to count.", choices=("train", "val", "test"))
    tta: bool = key(False, TTA)
    embeddings: bool = key(False, EMBEDDINGS)
    accelerator: str = key("auto", "Device.", choices=ACCELERATORS)
    imports: Any = key(list, IMPORTS)
    traceback: bool = key(False, TRACEBACK)

    def __post_init__(self) -> None:
        check_values(self)
        self.imports = as_list(self.imports)
        check_checkpoint(self.checkpoint)


@dataclass(slots=True)
class PredictConfig:
    """A prediction."""

    prefix: ClassVar[str] = ""

    checkpoint: str = key("pretrained", TRAINED)
    images: Any = key(list, "Files, directories (all pictures below them) or globs: one, or a list.")
    top: int = key(5, "Classes to report for each image.", low=1)
    attention: bool = key(False, "Draw where the network looks in the first 24 images.")
    tta: bool = key(False, TTA)
    embeddings: bool = key(False, EMBEDDINGS)
    accelerator: str = key("auto", "Device.", choices=ACCELERATORS)
    imports: Any = key(list, IMPORTS)
    traceback: bool = key(False, TRACEBACK)

    def __post_init__(self) -> None:
        check_values(self)
        self.imports = as_list(self.imports)
        self.images = as_list(self.images)
        if not self.images:
            raise InputError("images= is empty; name files, directories or globs, as in images=photos")
        check_checkpoint(self.checkpoint)


@dataclass(slots=True)
class ExportConfig:
    """An export."""

    prefix: ClassVar[str] = ""

    checkpoint: str = key("pretrained", TRAINED)
    format: str = key("onnx", "safetensors writes the weights alone, at half precision; timm writes what timm opens.",
                      choices=("onnx", "torch_export", "safetensors", "timm"))  # fmt: skip
    data: DataConfig | None = None  # the training data, if the record differs
    licence: str = key("", "What the weights may be used for: a note, or a licence identifier of the Hugging Face Hub, "
                       "such as mit.")  # fmt: skip
    seconds: float = key(1.0, "How long each speed is measured.", low=0)
    imports: Any = key(list, IMPORTS)
    traceback: bool = key(False, TRACEBACK)

    def __post_init__(self) -> None:
        check_values(self)
        self.imports = as_list(self.imports)
        check_checkpoint(self.checkpoint)


@dataclass(slots=True)
class ShardConfig:
    """Images as shards."""

    prefix: ClassVar[str] = ""

    data: DataConfig = field(default_factory=DataConfig)
    output: str = key("shards", "Directory to write; new or empty.")
    shard_mb: int = key(64, "Size of a shard, in MB.", low=1, high=2000)
    imports: Any = key(list, IMPORTS)
    traceback: bool = key(False, TRACEBACK)

    def __post_init__(self) -> None:
        check_values(self)
        self.imports = as_list(self.imports)


CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir())
SCHEMAS: dict[str, type] = {  # keyed by command, which also names its file in conf/
    "train": Config,
    "benchmark": BenchmarkRun,
    "search": SearchRun,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "shard": ShardConfig,
}


def options_of(group: str) -> list[str]:
    """The options of a group: its files in ``conf/``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
