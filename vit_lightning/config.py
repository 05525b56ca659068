"""The configuration of a run: every key with its type, default, range and meaning, declared once.

Error messages, ``--help``, the table of keys in ``conf/README.md`` and the property tests are generated from the
declarations here. The sections are plain dataclasses: :mod:`vit_lightning.cli` builds them from ``conf/`` and the
command line; Python code builds them directly (``ModelConfig(layers=4)``). Nothing here imports torch, so that
mistakes are reported immediately.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from vit_lightning import register
from vit_lightning.keys import InputError, as_list, check_values, key
from vit_lightning.trainer_config import ACCELERATORS, DashboardConfig, TrainerConfig

__all__ = ["ACCELERATORS", "DashboardConfig", "TrainerConfig"]  # declared in trainer_config.py

SEED = 2**32 - 1  # the largest seed that NumPy accepts
IMPORTS = "Your own modules or .py files, which register parts: one, or a list."
FOREIGN = ("timm:", "hf:")  # prefixes of the names of other libraries' networks
TOP5_ABOVE = 10  # top-5 is measured above this number of classes; otherwise it covers half of them or more
TRACEBACK = "Show the traceback of a mistake."
MAY_CHANGE = {  # when a run is resumed, because these keys do not affect its results
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.enable_progress_bar"),
    *("trainer.profiler", "trainer.detect_anomaly", "trainer.inference_mode", "trainer.num_sanity_val_steps"),
    *("data.root", "data.cache_dir", "data.cache_gb", "data.eval_batch_size", "data.workers"),
    *("compile", "test", "save_minutes", "traceback", "imports"),
    *(f"dashboard.{field.name}" for field in fields(DashboardConfig)),
}
# The keys that may be raised when a run is resumed.
MAY_GROW = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "target_acc", "target_acc5")


@dataclass(slots=True)
class ModelConfig:
    """The Vision Transformer."""

    prefix: ClassVar[str] = "model."

    block: str = key("prenorm", "Transformer block; blog is the tutorial's own.", choices=register.block)
    image_size: int = key(72, "Side of the square images that the network sees, in pixels.", low=1)
    patch_embed: str = key("unfold", "Linear map of each patch, or a convolutional stem.", choices=register.patch_embed)
    patch_size: int = key(6, "Side of a patch, in pixels; divides image_size; a power of two for conv.", low=1)
    stem_depth: Any = key(0, "Residual convolutions per stage of the stem but the last: one number, or a list.", low=0)
    stem_se: bool = key(False, "Squeeze-and-excitation in each residual convolution of the stem.")
    position: str = key("learned", "Position embedding.", choices=("learned", "rotary"))
    pool: str = key("cls", "What the head reads: a class token, or the patches' mean, normalised after the "
                    "average with mean_norm, or learned mean.",
                    choices=register.pool)  # fmt: skip
    registers: int = key(0, "Learned tokens that only the blocks use.", low=0)
    channels: int | None = key(None, "Channels of an image; null follows the data.", low=1)
    num_classes: int | None = key(None, "Number of classes; null follows the data.", low=1)
    embed_dim: int = key(64, "Width of a token; a multiple of heads.", low=1)
    layers: int = key(8, "Number of transformer blocks.", low=1)
    heads: int = key(4, "Attention heads per block.", low=1)
    mlp_dim: int = key(128, "Hidden width of a block's feed-forward network.", low=1)
    dropout: float = key(0.1, "Dropout probability in the blocks.", low=0, below=1)
    drop_path: float = key(0.0, "Probability of skipping a branch of the last block; rises linearly with depth.",
                           low=0, below=1)  # fmt: skip
    layer_scale: float | None = key(None, "Initial value of LayerScale; null for none.", low=0)
    norm_eps: float = key(1e-6, "What layer norms add to the variance.", above=0)
    zero_init: bool = key(False, "Start the residual branches at zero.")
    mlp_head_units: list[int] = key([2048, 1024], "Hidden widths of the head; [] for a linear head.", low=1)
    head_dropout: float = key(0.5, "Dropout probability in the head.", low=0, below=1)
    options: dict[str, Any] = key(dict, "Settings of registered blocks, patch embeddings and pools, by their name.")

    def __post_init__(self) -> None:
        check_values(self)
        register.check_options(self.prefix, self.options, register.block, register.patch_embed, register.pool)
        if self.embed_dim % self.heads:
            nearest = -(-self.embed_dim // self.heads) * self.heads
            raise InputError(
                f"model.embed_dim={self.embed_dim} is not divisible by model.heads={self.heads}; "
                f"try model.embed_dim={nearest}"
            )
        if self.position == "rotary" and self.embed_dim // self.heads % 4:
            raise InputError(
                f"model.position=rotary needs a head width divisible by 4; model.embed_dim={self.embed_dim} / "
                f"model.heads={self.heads} is {self.embed_dim // self.heads}"
            )
        if self.block == "blog" and (self.drop_path or self.layer_scale is not None or self.zero_init):
            raise InputError("model.drop_path, layer_scale and zero_init need model.block=prenorm; remove them")
        self._check_stem()
        if self.image_size % self.patch_size:
            small = [n for n in range(1, math.isqrt(self.image_size) + 1) if self.image_size % n == 0]
            divisors = {*small, *(self.image_size // n for n in small)}
            closest = sorted(sorted(divisors, key=lambda n: abs(n - self.patch_size))[:2])
            raise InputError(
                f"model.image_size={self.image_size} is not divisible by model.patch_size={self.patch_size}; "
                f"try model.patch_size={' or '.join(map(str, closest))}"
            )

    def _check_stem(self) -> None:
        stages = self.patch_size.bit_length() - 1
        conv = self.patch_embed == "conv"
        if conv and (self.patch_size < 2 or self.patch_size != 2**stages or self.embed_dim % 2 ** (stages - 1)):
            raise InputError(
                f"model.patch_embed=conv halves the image and doubles the width at each stage: "
                f"model.patch_size={self.patch_size} must be a power of two from 2, and half of it must divide "
                f"model.embed_dim={self.embed_dim}"
            )
        depths = self.stem_depth if isinstance(self.stem_depth, list) else [self.stem_depth]
        fits = not isinstance(self.stem_depth, list) or not conv or len(depths) == stages - 1
        if not fits or not all(type(depth) is int for depth in depths):
            raise InputError(
                f"model.stem_depth={self.stem_depth} must be a whole number, or a list of {max(0, stages - 1)} of them "
                f"for model.patch_size={self.patch_size}"
            )


@dataclass(slots=True)
class DataConfig:
    """Where images come from, and how they are split and batched."""

    prefix: ClassVar[str] = "data."

    source: str = key("cifar100", "The data set.", choices=register.source)
    root: str = key("data", "Directory of downloads, or of image_folder's train/<class>/* and test/<class>/*; or "
                    "its CSV file; or npz's file; or stream's directory or s3://….")  # fmt: skip
    name: str | None = key(None, "Data set of torchvision or huggingface, such as Flowers102.")
    skip_unreadable: bool = key(False, "Leave out pictures that cannot be read, instead of naming them in an error.")
    cache_dir: str = key("data/cache", "Directory of the decoded images (uint8 arrays, memory-mapped).")
    cache_gb: float | None = key(None, "Maximum disk space in data.cache_dir for shards that source=stream downloads, "
                                 "in GB; null keeps all.", above=0)  # fmt: skip
    stored_size: int | None = key(None, "Side at which pictures are stored, in pixels; null keeps square images "
                                  "of one size up to 256, and stores others at model.image_size.", low=1)  # fmt: skip
    split: str = key("blog", "blog splits the test images 70/30 into validation and test; standard holds validation "
                     "images out of the training images, class by class.", choices=("blog", "standard"))  # fmt: skip
    val_fraction: float = key(0.1, "Share of the training images that split=standard holds out.", above=0, below=1)
    folds: int | None = key(None, "Number of parts of a cross-validation of the training images; needs split=standard.",
                            low=2)  # fmt: skip
    fold: int = key(0, "The part to validate on, from 0; -m data.fold=0,1,2,3,4 runs all of five.", low=0)
    split_seed: int = key(42, "Seed of the split, independent of seed.", low=0, high=SEED)
    batch_size: int = key(32, "Training images per step, over all devices.", low=1)
    eval_batch_size: int = key(256, "Images per step in validation and test.", low=1)
    sampler: str = key("shuffle", "shuffle uses each training image once per epoch; balanced draws as many with "
                       "replacement, each class equally often.", choices=("shuffle", "balanced"))  # fmt: skip
    workers: int = key(0, "Processes that load batches; 0 loads in the training process.", low=0)
    options: dict[str, Any] = key(dict, "Settings of registered sources, by their name.")

    def __post_init__(self) -> None:
        check_values(self)
        register.check_options(self.prefix, self.options, register.source)
        if self.folds is not None and self.split != "standard":
            raise InputError(f"data.folds={self.folds} needs data.split=standard")
        if self.fold >= (self.folds or 1):
            raise InputError(f"data.fold={self.fold} must be less than data.folds={self.folds}")
        if self.stored_size is not None and self.source in ("cifar100", "cifar10", "digits", "npz", "stream"):
            raise InputError(f"data.stored_size is for pictures of any size; remove it for data.source={self.source}")


@dataclass(slots=True)
class AugmentConfig:
    """Random transforms of the training images, drawn for each image."""

    prefix: ClassVar[str] = "augment."

    crop: int = key(0, "Largest shift along each axis, in whole source pixels; reflected at the border.", low=0)
    scale: float = key(1.0, "Smallest share of the image's area in a random resized crop; 1 for no such crop. A "
                       "data.stored_size above model.image_size gives it more pixels.", above=0, high=1)  # fmt: skip
    ratio: float = key(1.333, "Largest aspect ratio of such a crop, and 1 over the smallest.", low=1, high=10)
    policy: str = key("none", "TrivialAugment, RandAugment or AutoAugment (CIFAR-10's policy).",
                      choices=("none", "trivial", "rand", "auto"))  # fmt: skip
    policy_prob: float = key(1.0, "Probability that the policy changes an image.", low=0, high=1)
    magnitude: int = key(9, "Strength of policy=rand, of 30.", low=0, high=30)
    jitter: float = key(0.0, "Largest relative change of brightness, contrast and saturation.", low=0, high=1)
    rotation: float = key(7.0, "Largest rotation either way, in degrees.", low=0, high=180)
    flip: float = key(0.5, "Probability of a horizontal flip.", low=0, high=1)
    shift: float = key(0.0, "Largest shift along each axis before rotation, as a fraction of the side.", low=0, below=1)
    erase: float = key(0.0, "Probability of erasing a random rectangle.", low=0, high=1)
    mixup: float = key(0.0, "Both parameters of MixUp's Beta distribution; 0 for no MixUp.", low=0)
    cutmix: float = key(0.0, "The same for CutMix; with both, each image draws one of them.", low=0)
    mix_prob: float = key(1.0, "Probability that an image is mixed.", low=0, high=1)
    until: float = key(
        1.0, "Share of the run after which policy, jitter, erase, mixup and cutmix are off.", low=0, high=1
    )
    batch: list[str] = key([], "Registered transforms of a normalised batch, in this order.",
                           choices=register.augmentation)  # fmt: skip
    options: dict[str, Any] = key(dict, "Settings of registered transforms, by their name.")

    def __post_init__(self) -> None:
        check_values(self)
        register.check_options(self.prefix, self.options, register.augmentation)
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 0.01:  # float32 cannot sample from such a distribution
                raise InputError(f"augment.{name}={getattr(self, name)} must be 0 (off) or at least 0.01")


@dataclass(slots=True)
class OptimConfig:
    """The loss, the optimizer, its schedule and the average of the weights."""

    prefix: ClassVar[str] = "optim."

    name: str = key("adamw", "muon uses Muon for the matrices of blocks and stem, AdamW for the rest; or the name of "
                    "a class of torch.optim or timm.optim, such as SGD.", choices=register.optimizer)  # fmt: skip
    lr: float = key(1e-3, "AdamW's peak learning rate.", low=0)
    muon_lr: float = key(0.02, "Muon's peak learning rate, before scaling by a matrix's shape.", low=0)
    ns_steps: int = key(5, "Newton-Schulz iterations of Muon.", low=1)
    weight_decay: float = key(1e-4, "Decoupled weight decay.", low=0)
    betas: list[float] = key([0.9, 0.999], "AdamW's two averaging coefficients.", low=0, below=1)
    decay_all: bool = key(False, "Decay norms, biases, tokens and positions too.")
    schedule: str = key("constant", "Shape of the learning rate after the warm-up; cosine and linear end at min_lr.",
                        choices=register.schedule)  # fmt: skip
    min_lr: float = key(0.0, "What cosine and linear end at, as a share of the peak learning rate.", low=0, high=1)
    layer_decay: float = key(1.0, "Factor of the learning rate from each block to the one below it.", above=0, high=1)
    freeze: list[str] = key(
        [],
        "Parts of the network that are not trained: patch_embed, pos_embed, blocks.0 and so on; backbone is all "
        "but the head.",
    )
    warmup: float = key(0.0, "Share of the run in which the learning rate rises from zero.", low=0, below=1)
    clock: str = key("steps", "What the schedule follows; time ends it at trainer.max_time on any machine.",
                     choices=("steps", "time"))  # fmt: skip
    small_size: int | None = key(None, "Side of the training images in the first part of the run; null for full size.",
                                 low=1)  # fmt: skip
    small_share: float = key(0.5, "That part, as a share of the run.", low=0, high=1)
    loss: str = key("cross_entropy", "The loss in training; bce is binary cross-entropy of each class. val/loss is "
                    "always the cross-entropy.", choices=register.loss)  # fmt: skip
    class_weights: str = key("none", "Weights of the classes in the training loss: in inverse proportion to their "
                             "numbers of training images, or to the square roots of these.",
                             choices=("none", "balanced", "sqrt"))  # fmt: skip
    label_smoothing: float = key(0.0, "Share of a label spread over all classes.", low=0, below=1)
    ema: float = key(0.0, "Decay of the moving average of the weights that is validated and kept; 0 for none.",
                     low=0, below=1)  # fmt: skip
    options: dict[str, Any] = key(dict, "Settings of registered optimizers, schedules and losses, or arguments of an "
                                  "optimizer's class, by name, as in optim.options.SGD.momentum=0.9.")  # fmt: skip

    def __post_init__(self) -> None:
        check_values(self)
        register.check_options(self.prefix, self.options, register.schedule, register.loss, register.optimizer)
        if len(self.betas) != 2:
            raise InputError(f"optim.betas={self.betas} must be two numbers, as in optim.betas=[0.9,0.999]")


@dataclass(slots=True)
class Config:
    """A training run."""

    prefix: ClassVar[str] = ""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    dashboard: DashboardConfig = field(default_factory=DashboardConfig)
    seed: int = key(0, "Seed of everything random but the split.", low=0, high=SEED)
    target_acc: float | None = key(None, "Stop once val/acc has reached this and val/acc5 target_acc5.", low=0, high=1)
    target_acc5: float | None = key(None, "See target_acc.", low=0, high=1)
    monitor: str = key("val/acc", "The validation metric of the best epoch, which is kept and tested, and of a search: "
                       "val/loss, or val/f1 with metrics=[f1].")  # fmt: skip
    checkpoint: str | None = key(
        None,
        "Weights to start from: pretrained, a run's directory, a file, or those of "
        "another library: timm:NAME, timm:NAME:FILE, hf:NAME or hf:DIR.",
    )
    test: bool = key(True, "Evaluate the best checkpoint on the test images at the end.")
    resume: str | None = key(None, "Directory of a run to continue with its own configuration; more "
                             "trainer.max_epochs, trainer.max_time or a higher target extends it.")  # fmt: skip
    compile: bool = key(False, "Compile the network with torch.compile.")
    save_minutes: float | None = key(5.0, "Minutes between checkpoints within an epoch; null for none there.", low=0)
    callbacks: dict[str, Any] = key(dict, "Lightning callbacks by name: _target_, a class, and its arguments.")
    logger: dict[str, Any] = key(dict, "Lightning loggers, likewise; save_dir is the run's directory.")
    metrics: list[str] = key(
        [], "Metrics besides the loss, top-1 and, of more than ten classes, top-5.", choices=register.metric
    )
    imports: Any = key(list, IMPORTS)
    traceback: bool = key(False, TRACEBACK)

    def __post_init__(self) -> None:
        check_values(self)
        self.imports = as_list(self.imports)
        check_checkpoint(self.checkpoint)
        self._check_classes()
        small, model = self.optim.small_size, self.model
        if small is not None and (small % model.patch_size or small > model.image_size):
            raise InputError(
                f"optim.small_size={small} must be a multiple of model.patch_size={model.patch_size} and at most "
                f"model.image_size={model.image_size}"
            )
        if self.optim.clock == "time" and self.trainer.strategy != "auto":
            raise InputError("optim.clock=time needs a single device; with several use optim.clock=steps")
        self.check_processes(self.trainer.devices)
        if self.trainer.strategy == "fsdp" and (self.optim.ema or self.optim.name != "adamw"):
            raise InputError("trainer.strategy=fsdp needs optim.name=adamw and optim.ema=0; trainer=ddp takes them all")
        if self.optim.clock == "time" and self.trainer.max_time is None:
            raise InputError("optim.clock=time needs trainer.max_time, as in trainer.max_time=00:00:30:00")

    def _check_classes(self) -> None:
        """Check the monitored metric, and that small classes are favoured in only one way."""
        measured = [f"val/{name}" for name in ("loss", "acc", "acc5", *self.metrics)]
        if self.monitor not in measured:
            raise InputError(
                f"monitor={self.monitor} is not measured; choose one of {', '.join(measured)}, or add it to metrics"
            )
        if self.optim.class_weights != "none" and self.data.sampler != "shuffle":
            raise InputError(
                f"optim.class_weights={self.optim.class_weights} and data.sampler={self.data.sampler} would favour "
                "small classes twice; choose one of them"
            )

    def check_processes(self, processes: int) -> None:
        """Check that batches can be divided among the processes.

        Raises:
            InputError: if they cannot.
        """
        if processes > 1 and self.data.eval_batch_size < 2 * processes:
            raise InputError(
                f"data.eval_batch_size={self.data.eval_batch_size} is too small for {processes} processes; "
                f"try data.eval_batch_size={2 * processes}"
            )
        if processes > 1 and self.data.batch_size % processes:
            fitting = self.data.batch_size // processes * processes or processes
            raise InputError(
                f"data.batch_size={self.data.batch_size} cannot be divided among {processes} processes; "
                f"try data.batch_size={fitting}"
            )


def check_checkpoint(checkpoint: str | None) -> None:
    """Refuse an empty name.

    Raises:
        InputError: if it is empty.
    """
    if checkpoint == "":
        raise InputError("checkpoint= is empty; set it to pretrained, a run's directory or a file")
    if checkpoint in FOREIGN:
        raise InputError(
            f"checkpoint={checkpoint} lacks a name, as in {checkpoint}NAME; local weights are a file "
            "(timm:NAME:FILE) or a directory (timm:DIR, hf:DIR)"
        )


ConfigT = TypeVar("ConfigT", bound=Config)
