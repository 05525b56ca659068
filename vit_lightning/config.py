"""The schema of the configuration: every key with its type, default, meaning and checks.

Plain dataclasses: they are built from ``conf/`` by :mod:`vit_lightning.cli`, or directly in Python
(``ModelConfig(layers=4)``). A value that cannot work raises :class:`InputError`, whose message names the
key as it is typed on the command line. Nothing here imports torch, so that a mistake is reported at once.
"""

import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args


class InputError(ValueError):
    """A mistake that the user can fix: one line that names the key or file, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))  # a value may hold line breaks


class MachineError(InputError):
    """A fault of the machine, which any other configuration would meet too: a full disk, a process that died."""


def _at_least(low: float, **values: float | None) -> None:
    for key, value in values.items():
        if value is not None and not low <= value < math.inf:
            raise InputError(f"{_dotted(key)}={value} must be at least {low}" + (" and finite" * (value == math.inf)))


def _fraction(**values: float) -> None:
    for key, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{_dotted(key)}={value} must be at least 0 and less than 1")


def _probability(**values: float | None) -> None:
    for key, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{_dotted(key)}={value} is a probability: it must lie between 0 and 1")


def _seed(**values: int) -> None:
    for key, value in values.items():
        if not 0 <= value < 2**32:
            raise InputError(f"{_dotted(key)}={value} must lie between 0 and {2**32 - 1}")


def _one_of(*choices: str, **values: str) -> None:
    for key, value in values.items():
        if value not in choices:
            raise InputError(f"{_dotted(key)}={value} is not known; choose one of {', '.join(choices)}")


def _named(checkpoint: str | None) -> None:
    if checkpoint == "":
        raise InputError("checkpoint= names no network; set it to pretrained, a run's directory or a file")


def _dotted(key: str) -> str:
    """``model__layers`` -> ``model.layers``: keyword arguments cannot hold a dot."""
    return key.replace("__", ".")


@dataclass(slots=True)
class ModelConfig:
    """The Vision Transformer (``model.…``).

    Attributes:
        block: ``prenorm`` or ``blog`` (the tutorial's own block; see :mod:`vit_lightning.model.vit`).
        image_size: side of the square images the network sees, in pixels.
        patch_embed: ``unfold`` (a linear map of each patch) or ``conv`` (a convolutional stem).
        patch_size: side of a patch, in pixels; divides ``image_size``; for ``conv`` a power of two.
        stem_depth: residual convolutions after each stage of the convolutional stem but the last: one number for all
            stages, or a list with one for each.
        stem_se: whether each residual convolution is followed by squeeze-and-excitation.
        position: ``learned`` (a vector for each token) or ``rotary`` (queries and keys turned by their place).
        pool: what the head reads: ``cls`` (a class token), ``mean`` or ``attention`` (a learned mean) of the patches.
        registers: learned tokens that only the blocks use.
        channels: channels of an image; ``None`` follows the data.
        num_classes: number of classes; ``None`` follows the data.
        embed_dim: width of a token; a multiple of ``heads``.
        layers: number of transformer blocks.
        heads: attention heads of a block.
        mlp_dim: hidden width of a block's feed-forward.
        dropout: dropout probability inside the blocks.
        drop_path: probability that an image leaves out a residual branch of the last block; linear in depth from 0 in
            the first.
        layer_scale: initial factor of the residual branches' learned scales; ``None`` for no scales.
        zero_init: whether the residual branches begin at zero.
        mlp_head_units: hidden widths of the classification head; empty for a linear head.
        head_dropout: dropout probability inside the head.
    """

    block: str = "prenorm"
    image_size: int = 72
    patch_embed: str = "unfold"
    patch_size: int = 6
    stem_depth: Any = 0  # OmegaConf has no "int or list of int"
    stem_se: bool = False
    position: str = "learned"
    pool: str = "cls"
    registers: int = 0
    channels: int | None = None
    num_classes: int | None = None
    embed_dim: int = 64
    layers: int = 8
    heads: int = 4
    mlp_dim: int = 128
    dropout: float = 0.1
    drop_path: float = 0.0
    layer_scale: float | None = None
    zero_init: bool = False
    mlp_head_units: list[int] = field(default_factory=lambda: [2048, 1024])
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        _one_of("prenorm", "blog", model__block=self.block)
        _one_of("unfold", "conv", model__patch_embed=self.patch_embed)
        _one_of("learned", "rotary", model__position=self.position)
        _one_of("cls", "mean", "attention", model__pool=self.pool)
        _at_least(0, model__registers=self.registers, model__layer_scale=self.layer_scale)
        _at_least(1, model__image_size=self.image_size, model__patch_size=self.patch_size)
        _at_least(1, model__channels=self.channels, model__num_classes=self.num_classes)
        _at_least(1, model__embed_dim=self.embed_dim, model__layers=self.layers, model__heads=self.heads)
        _at_least(1, model__mlp_dim=self.mlp_dim)
        _fraction(model__dropout=self.dropout, model__drop_path=self.drop_path, model__head_dropout=self.head_dropout)
        for units in self.mlp_head_units:
            _at_least(1, model__mlp_head_units=units)
        if self.embed_dim % self.heads:
            raise InputError(
                f"model.embed_dim={self.embed_dim} is not divisible by model.heads={self.heads}; "
                f"model.embed_dim={-(-self.embed_dim // self.heads) * self.heads} would be"
            )
        if self.position == "rotary" and self.embed_dim // self.heads % 4:
            raise InputError(
                f"model.position=rotary needs heads of a width that 4 divides, and model.embed_dim={self.embed_dim} / "
                f"model.heads={self.heads} is {self.embed_dim // self.heads}"
            )
        if self.block == "blog" and (self.drop_path or self.layer_scale is not None or self.zero_init):
            raise InputError("model.drop_path, layer_scale and zero_init belong to model.block=prenorm; leave them out")
        if self.patch_embed == "conv":
            stages = self.patch_size.bit_length() - 1
            if self.patch_size < 2 or self.patch_size != 2**stages or self.embed_dim % 2 ** (stages - 1):
                raise InputError(
                    f"model.patch_embed=conv halves the image and doubles the width stage by stage: "
                    f"model.patch_size={self.patch_size} must be a power of two from 2, and half of it must divide "
                    f"model.embed_dim={self.embed_dim}"
                )
        self._check_stem_depth()
        if self.image_size % self.patch_size:
            divisors = [n for n in range(1, self.image_size + 1) if self.image_size % n == 0]
            nearest = sorted(sorted(divisors, key=lambda n: abs(n - self.patch_size))[:2])
            raise InputError(
                f"model.image_size={self.image_size} is not divisible by model.patch_size={self.patch_size}; "
                f"model.patch_size={' or '.join(map(str, nearest))} would divide it"
            )

    def _check_stem_depth(self) -> None:
        stages = max(0, self.patch_size.bit_length() - 2)
        depths = self.stem_depth if isinstance(self.stem_depth, list) else [self.stem_depth]
        whole = all(isinstance(depth, int) and not isinstance(depth, bool) and depth >= 0 for depth in depths)
        if not whole or (isinstance(self.stem_depth, list) and len(depths) != stages):
            raise InputError(
                f"model.stem_depth={self.stem_depth} must be a number of at least 0, or a list of {stages} such "
                f"numbers for model.patch_size={self.patch_size}"
            )


@dataclass(slots=True)
class DataConfig:
    """Where images come from and how they are split and batched (``data.…``).

    Attributes:
        source: ``cifar100``, ``cifar10``, ``digits`` or ``image_folder``.
        root: directory of the data set: downloads are kept here, ``image_folder`` reads ``train/<class>/*`` and
            ``test/<class>/*`` here. Relative to where the command is started, like every path.
        cache_dir: directory of the decoded images (uint8 arrays, memory-mapped on the next start).
        stored_size: side at which ``image_folder`` keeps its images, in pixels (shorter side resized, centre
            cropped); ``None`` keeps images that all have one square size of up to 256 pixels as they are, and
            others at ``model.image_size``.
        split: ``blog`` (validation and test are 70 % and 30 % of the test images) or ``standard`` (validation is
            held out of the training images, class by class; test is all the test images).
        val_fraction: share of the training images held out by ``split=standard``.
        split_seed: seed of either split; not tied to ``seed``, so that all runs validate on the same images.
        batch_size: training images a step, of all devices together.
        eval_batch_size: images a step in validation and test; changes nothing but speed and memory.
        workers: processes that read batches; 0 reads in the training process, the fastest where images fit in memory.
    """

    source: str = "cifar100"
    root: str = "data"
    cache_dir: str = "data/cache"
    stored_size: int | None = None
    split: str = "blog"
    val_fraction: float = 0.1
    split_seed: int = 42
    batch_size: int = 32
    eval_batch_size: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        _one_of("cifar100", "cifar10", "digits", "image_folder", data__source=self.source)
        _one_of("blog", "standard", data__split=self.split)
        _at_least(1, data__stored_size=self.stored_size)
        _at_least(1, data__batch_size=self.batch_size, data__eval_batch_size=self.eval_batch_size)
        _at_least(0, data__workers=self.workers)
        _seed(data__split_seed=self.split_seed)
        if not 0 < self.val_fraction < 1:
            raise InputError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.stored_size is not None and self.source != "image_folder":
            raise InputError(f"data.stored_size belongs to data.source=image_folder; leave it out for {self.source}")


@dataclass(slots=True)
class AugmentConfig:
    """Random transforms of the training images (``augment.…``), drawn for each image of a batch.

    Attributes:
        crop: largest shift either way along each axis, in whole pixels of the source; reflected at the border.
        policy: ``none``, ``trivial`` (TrivialAugment), ``rand`` (RandAugment) or ``auto`` (AutoAugment's policy for
            CIFAR-10): random changes of colour and shape.
        rotation: largest angle of a rotation either way, in degrees; uniform.
        flip: probability of a horizontal flip.
        shift: largest shift either way along each axis of the image before its rotation, as a fraction of its side;
            uniform; black outside.
        erase: probability that a random rectangle of an image is erased.
        mixup: a and b of the Beta distribution that MixUp's share of an image is drawn from; 0 for no MixUp.
        cutmix: the same for CutMix. With both, each image draws one of them.
        mix_prob: probability that an image is mixed, where ``mixup`` or ``cutmix`` is set.
        until: share of the run after which ``policy``, ``erase``, ``mixup`` and ``cutmix`` are switched off.
    """

    crop: int = 0
    policy: str = "none"
    rotation: float = 7.0
    flip: float = 0.5
    shift: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _one_of("none", "trivial", "rand", "auto", augment__policy=self.policy)
        if not 0 <= self.rotation <= 180:
            raise InputError(f"augment.rotation={self.rotation} must lie between 0 and 180 degrees")
        _probability(augment__flip=self.flip, augment__erase=self.erase, augment__mix_prob=self.mix_prob)
        _probability(augment__until=self.until)
        _at_least(0, augment__crop=self.crop, augment__mixup=self.mixup, augment__cutmix=self.cutmix)
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 0.01:  # of which float32 makes no numbers any more
                raise InputError(f"augment.{name}={getattr(self, name)} must be 0, for none, or at least 0.01")
        _fraction(augment__shift=self.shift)


@dataclass(slots=True)
class OptimConfig:
    """The loss, the optimizer, its schedule and the average of the weights (``optim.…``).

    Attributes:
        name: ``adamw``, or ``muon`` for the matrices of the blocks and of a convolutional stem and AdamW for the rest.
        lr: AdamW's peak learning rate.
        muon_lr: Muon's, before its scaling by a matrix's shape.
        ns_steps: Newton-Schulz iterations by which Muon makes an update orthogonal.
        weight_decay: decoupled weight decay.
        betas: AdamW's two averaging coefficients.
        decay_all: whether norms, biases, the class token and the position embedding decay too.
        schedule: ``constant``, or ``cosine`` or ``linear`` down to zero at the end of the run.
        warmup: share of the run over which the learning rate first rises linearly from zero.
        clock: what the schedule goes by: ``steps`` of all epochs, or ``time``, so that a run is whole after
            ``trainer.max_time`` on any machine (and no longer repeats bit for bit).
        small_size: side of the training images, in pixels, over the first ``small_share`` of the run, which goes faster
            with them; ``None`` for ``model.image_size`` throughout.
        small_share: that share; of the new length where a run is taken beyond its end.
        label_smoothing: share of a label that is spread over all classes, in training.
        ema: decay of an exponential moving average of the weights, which is then what is validated, tested and kept;
            it warms up over the first steps. 0 for none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    ns_steps: int = 5
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    decay_all: bool = False
    schedule: str = "constant"
    warmup: float = 0.0
    clock: str = "steps"
    small_size: int | None = None
    small_share: float = 0.5
    label_smoothing: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        _one_of("adamw", "muon", optim__name=self.name)
        _one_of("constant", "cosine", "linear", optim__schedule=self.schedule)
        _one_of("steps", "time", optim__clock=self.clock)
        _at_least(0, optim__lr=self.lr, optim__muon_lr=self.muon_lr, optim__weight_decay=self.weight_decay)
        _at_least(1, optim__small_size=self.small_size, optim__ns_steps=self.ns_steps)
        _probability(optim__small_share=self.small_share)
        _fraction(optim__warmup=self.warmup, optim__label_smoothing=self.label_smoothing, optim__ema=self.ema)
        if len(self.betas) != 2:
            raise InputError(f"optim.betas={self.betas} must be two numbers, as in optim.betas=[0.9,0.999]")
        for beta in self.betas:
            _fraction(optim__betas=beta)


@dataclass(slots=True)
class TrainerConfig:
    """Arguments of :class:`lightning.Trainer`, under its own names (``trainer.…``).

    Attributes:
        accelerator: ``auto`` (whatever is there), ``cpu``, ``gpu`` or ``mps``.
        strategy: ``auto`` (one device), ``ddp`` (a copy of the network on each) or ``fsdp`` (each holds a part of it).
        devices: of this machine, a process each; -1 for all GPUs. ``torchrun`` tells them, and those of other machines,
            by itself.
        precision: ``32-true``, ``16-mixed`` (GPU), ``bf16-mixed`` (GPU and CPU) or ``auto``: mixed where the processor
            has instructions for it, 32-true elsewhere; the run's ``config.yaml`` says which.
        max_epochs: passes over the training images.
        max_time: longest time to train, as ``DD:HH:MM:SS``; ``None`` for no limit.
        gradient_clip_val: largest norm of all gradients together; ``None`` for no clipping.
        limit_train_batches: batches of an epoch: a number (int) or a share (float) of them.
        limit_val_batches: the same for validation.
        limit_test_batches: the same for the test.
        check_val_every_n_epoch: epochs from one validation to the next.
        log_every_n_steps: steps between two points of the curves that have one a step.
        deterministic: whether only kernels are used that repeat a run bit for bit.
        enable_progress_bar: whether a terminal shows a progress bar; the line for each epoch is printed in any case.
    """

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    max_epochs: int = 100
    max_time: str | None = None
    gradient_clip_val: float | None = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    check_val_every_n_epoch: int = 1
    log_every_n_steps: int = 50
    deterministic: bool = True
    enable_progress_bar: bool = True

    def __post_init__(self) -> None:
        _one_of("auto", "cpu", "gpu", "mps", trainer__accelerator=self.accelerator)
        _one_of("auto", "ddp", "fsdp", trainer__strategy=self.strategy)
        _one_of("32-true", "16-mixed", "bf16-mixed", "auto", trainer__precision=self.precision)
        if self.devices < 1 and self.devices != -1:
            raise InputError(f"trainer.devices={self.devices} must be at least 1, or -1 for all GPUs")
        if self.strategy == "auto" and self.devices != 1:
            raise InputError(f"trainer.devices={self.devices} needs trainer=ddp or trainer=fsdp")
        _at_least(1, trainer__max_epochs=self.max_epochs)
        _at_least(0, trainer__gradient_clip_val=self.gradient_clip_val)
        if self.max_time is not None and not re.fullmatch(r"\d{1,6}(:\d\d){3}", self.max_time):
            raise InputError(
                f"trainer.max_time={self.max_time} must be written as days:hours:minutes:seconds, 00:01:00:00"
            )
        if self.max_time is not None and not any(map(int, self.max_time.split(":"))):
            raise InputError(
                f"trainer.max_time={self.max_time} leaves no time to train; set more, as in 00:01:00:00 for an hour, "
                "or leave it out for no limit"
            )
        _at_least(1, trainer__check_val_every_n_epoch=self.check_val_every_n_epoch)
        _at_least(1, trainer__log_every_n_steps=self.log_every_n_steps)
        if self.check_val_every_n_epoch > self.max_epochs:
            raise InputError(
                f"trainer.check_val_every_n_epoch={self.check_val_every_n_epoch} exceeds "
                f"trainer.max_epochs={self.max_epochs}: the run would never be validated"
            )
        for name in ("train", "val", "test"):
            limit = getattr(self, f"limit_{name}_batches")
            if not limit > 0 or (isinstance(limit, float) and limit > 1):  # nan is not above 0 either
                raise InputError(
                    f"trainer.limit_{name}_batches={limit} must be a whole number of batches from 1 "
                    "or a share above 0 and up to 1.0"
                )


@dataclass(slots=True)
class DashboardConfig:
    """What TensorBoard shows beside the curves (``dashboard.…``).

    Attributes:
        text: the configuration, the command and the network's parts.
        batch: a training batch as the network sees it.
        patches: an image beside its patches.
        positions: how alike the learned positions are.
        attention: where the network looks in some validation images: the rollout, and each head of the last block.
        mistakes: the most confident ones on the validation images.
        confusion: which classes are taken for which; for CIFAR-100 also between superclasses.
        per_class: accuracy of each class.
        reliability: accuracy against confidence.
    """

    text: bool = True
    batch: bool = True
    patches: bool = True
    positions: bool = True
    attention: bool = True
    mistakes: bool = True
    confusion: bool = True
    per_class: bool = True
    reliability: bool = True


@dataclass(slots=True)
class BenchmarkConfig:
    """How long ``vit_lightning.benchmark`` measures (``benchmark.…``).

    Attributes:
        rounds: times that every contestant is measured, one after the other.
        steps: training steps of a measurement.
        warmup: steps before each measurement that are not counted; more than loader workers prefetch.
    """

    rounds: int = 9
    steps: int = 20
    warmup: int = 10

    def __post_init__(self) -> None:
        _at_least(1, benchmark__rounds=self.rounds, benchmark__steps=self.steps, benchmark__warmup=self.warmup)


@dataclass(slots=True)
class Config:
    """A whole run.

    Attributes:
        seed: seed of everything random in the run except the split: one seed gives one result, bit for bit,
            on one machine.
        target_acc: training stops when ``val/acc`` has reached this and ``val/acc5`` reached ``target_acc5``, both in
            [0, 1]; ``None`` for no target.
        target_acc5: likewise.
        checkpoint: a trained network to start from: ``pretrained``, the directory of a run, or a file. ``model.…`` must
            name its shape; positions are resized to ``model.image_size``, and for other classes the head is new.
        test: whether the best checkpoint is evaluated on the test images in the end; ``false`` for runs that are
            compared with each other, so that the test images choose nothing.
        resume: directory of a run, to go on with it where it was interrupted, with its own configuration, or beyond its
            end with more of what ended it: ``trainer.max_epochs``, ``trainer.max_time`` or a target.
        compile: whether ``torch.compile`` compiles the network first, for seconds to minutes; checkpoints stay as
            they are. Where there is no compiler, a message says so and the run goes on without.
        save_minutes: from one checkpoint to the next within an epoch; ``None`` for checkpoints at its end alone.
        debug: whether a mistake shows where in the code it was noticed.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    dashboard: DashboardConfig = field(default_factory=DashboardConfig)
    seed: int = 0
    target_acc: float | None = None
    target_acc5: float | None = None
    checkpoint: str | None = None
    test: bool = True
    resume: str | None = None
    compile: bool = False
    save_minutes: float | None = 5.0
    debug: bool = False

    def __post_init__(self) -> None:
        _at_least(0, save_minutes=self.save_minutes)
        _probability(target_acc=self.target_acc, target_acc5=self.target_acc5)
        _seed(seed=self.seed)
        _named(self.checkpoint)
        small, model = self.optim.small_size, self.model
        if small is not None and (small % model.patch_size or small > model.image_size):
            raise InputError(
                f"optim.small_size={small} must be a multiple of model.patch_size={model.patch_size} and at most "
                f"model.image_size={model.image_size}"
            )
        several = self.trainer.strategy != "auto"
        if several and self.optim.clock == "time":
            raise InputError("optim.clock=time is for one device: clocks of several differ; use optim.clock=steps")
        self.check_processes(self.trainer.devices)
        if self.trainer.strategy == "fsdp" and (self.optim.ema or self.optim.name != "adamw"):
            raise InputError("trainer.strategy=fsdp takes optim.name=adamw and optim.ema=0; trainer=ddp takes them all")
        if self.optim.clock == "time" and self.trainer.max_time is None:
            raise InputError("optim.clock=time needs an end: set trainer.max_time, as in trainer.max_time=00:00:30:00")

    def check_processes(self, processes: int) -> None:
        """Refuse batches that cannot be divided among so many processes.

        Raises:
            InputError: if so.
        """
        if processes > 1 and self.data.eval_batch_size < 2 * processes:
            raise InputError(
                f"data.eval_batch_size={self.data.eval_batch_size} is too small for {processes} processes; "
                f"data.eval_batch_size={2 * processes} would do"
            )
        if processes > 1 and self.data.batch_size % processes:
            fitting = self.data.batch_size // processes * processes or processes
            raise InputError(
                f"data.batch_size={self.data.batch_size} cannot be divided among {processes} processes; "
                f"data.batch_size={fitting} could"
            )


@dataclass(slots=True)
class BenchmarkRun(Config):
    """A run's configuration, and how long to measure it."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


@dataclass(slots=True)
class SearchConfig:
    """How ``vit_lightning.search`` goes about (``search.…``).

    Attributes:
        study: name of the study; its trials lie in ``outputs/search/<study>/``.
        storage: URL of the database that holds it; ``None`` for ``study.db`` beside its trials.
        trials: that are to come to their end or be pruned, by all processes and starts together.
        timeout: seconds after which a process begins no further trial; ``None`` for no limit.
        sampler: ``tpe`` (Bergstra et al., 2011) or ``random``.
        prune: whether a trial ends once its best ``val/acc`` so far is below the median of the others' at its epoch.
        startup: trials that come to their end before one is pruned.
        warmup: epochs of a trial before it may be pruned.
        heartbeat: seconds between a process's signs of life; a trial without one for twice as long is taken up anew.
        seed: of the sampler; ``None`` for another one in each process.
    """

    study: str = "study"
    storage: str | None = None
    trials: int = 20
    timeout: float | None = None
    sampler: str = "tpe"
    prune: bool = True
    startup: int = 5
    warmup: int = 1
    heartbeat: int = 60
    seed: int | None = None

    def __post_init__(self) -> None:
        _one_of("tpe", "random", search__sampler=self.sampler)
        _at_least(1, search__trials=self.trials, search__heartbeat=self.heartbeat)
        _at_least(0, search__timeout=self.timeout, search__startup=self.startup, search__warmup=self.warmup)
        if not re.fullmatch(r"[\w.-]+", self.study):
            raise InputError(f"search.study={self.study} names a directory: letters, digits, dots and dashes will do")


@dataclass(slots=True)
class SearchRun(Config):
    """A run's configuration, the space to search for better values in, and how.

    Attributes:
        space: by key of the configuration, its domain: ``{choices: [a, b]}``, or ``{low: 1, high: 4}`` with ``step`` or
            ``log: true``; whole numbers if all are.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    space: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.trainer.strategy != "auto":
            raise InputError(f"trainer.strategy={self.trainer.strategy} is for single runs; a search's have one device")
        if not self.space:
            raise InputError("space= is empty; choose one, as in space=recipe, or write one into conf/space/")
        for key, domain in self.space.items():
            part, _, name = key.rpartition(".")
            if not hasattr(getattr(self, part, None) if part else self, name):
                raise InputError(f"space: {key} is not a key of the configuration; --help lists them")
            _domain(key, domain)


def _domain(key: str, domain: Any) -> None:
    """Refuse what is no domain of a search space."""
    kinds = "{choices: [a, b]} or {low: 1, high: 4} with step or log"
    if not isinstance(domain, dict) or not (domain.keys() == {"choices"} or {"low", "high"} <= domain.keys()):
        raise InputError(f"space: {key} must have {kinds}, not {domain}")
    if "choices" in domain:
        if not isinstance(domain["choices"], list) or not domain["choices"]:
            raise InputError(f"space: the choices of {key} must be a list of one or more, not {domain['choices']}")
        return
    for name in domain.keys() - {"low", "high", "step", "log"}:
        raise InputError(f"space: {key} has {name}, which is not known; {kinds}")
    numbers = [domain["low"], domain["high"], domain.get("step", 1)]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or numbers[2] <= 0:
        raise InputError(f"space: low, high and step of {key} must be numbers, and step above 0, not {domain}")
    if not domain["low"] < domain["high"]:
        raise InputError(f"space: of {key}, low={domain['low']} must be below high={domain['high']}")
    if domain.get("log") and (domain["low"] <= 0 or domain.get("step")):
        raise InputError(f"space: {key} on a log scale begins above 0 and has no step")


@dataclass(slots=True)
class EvaluateConfig:
    """What ``vit_lightning.evaluate`` counts.

    Attributes:
        checkpoint: ``pretrained``, a run's directory (its best checkpoint), or a ``.ckpt`` or ``.safetensors`` file.
        data: the images; ``None`` for those that the network was trained on.
        split: ``train``, ``val`` or ``test``.
        tta: whether the probabilities of an image and its mirror image are averaged (test-time augmentation).
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
        debug: whether a mistake shows where in the code it was noticed.
    """

    checkpoint: str = "pretrained"
    data: DataConfig | None = None
    split: str = "test"
    tta: bool = False
    accelerator: str = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        _one_of("train", "val", "test", split=self.split)
        _one_of("auto", "cpu", "gpu", "mps", accelerator=self.accelerator)
        _named(self.checkpoint)


@dataclass(slots=True)
class PredictConfig:
    """What ``vit_lightning.predict`` names the content of.

    Attributes:
        checkpoint: ``pretrained``, a run's directory (its best checkpoint), or a ``.ckpt`` or ``.safetensors`` file.
        images: files, directories (all pictures below them) or globs: one, or a list of them.
        top: classes that are given for each image, the likeliest first.
        attention: whether a picture shows where the network looked in each of the first 24 images.
        tta: whether the probabilities of an image and its mirror image are averaged (test-time augmentation).
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
        debug: whether a mistake shows where in the code it was noticed.
    """

    checkpoint: str = "pretrained"
    images: Any = field(default_factory=list)  # OmegaConf knows no "str or list of str"
    top: int = 5
    attention: bool = False
    tta: bool = False
    accelerator: str = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        _at_least(1, top=self.top)
        _one_of("auto", "cpu", "gpu", "mps", accelerator=self.accelerator)
        self.images = [str(item) for item in (self.images if isinstance(self.images, list) else [self.images]) if item]
        if not self.images:
            raise InputError("images= is empty; name files, directories or globs, as in images=photos")
        _named(self.checkpoint)


@dataclass(slots=True)
class ExportConfig:
    """What ``vit_lightning.export`` writes.

    Attributes:
        checkpoint: ``pretrained``, a run's directory (its best checkpoint), or a ``.ckpt`` or ``.safetensors`` file.
        format: ``onnx`` or ``torch_export``, or ``safetensors`` for the weights alone, at half precision.
        data: with ``safetensors``, what the network was trained on, where its run read the same images elsewhere.
        licence: with ``safetensors``, a note on what the weights may be used for.
        seconds: how long each latency and throughput is measured.
        debug: whether a mistake shows where in the code it was noticed.
    """

    checkpoint: str = "pretrained"
    format: str = "onnx"
    data: DataConfig | None = None
    licence: str = ""
    seconds: float = 1.0
    debug: bool = False

    def __post_init__(self) -> None:
        _one_of("onnx", "torch_export", "safetensors", format=self.format)
        _at_least(0, seconds=self.seconds)
        _named(self.checkpoint)


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, slots=True)
class Invocation:
    """How a task was called: by a command line or from Python.

    Attributes:
        command: as it can be typed again.
        overrides: settings of the command line, as in ``["model.layers=4", "seed=1"]``; ``None`` if called from Python.
        compose: the checked configuration that other settings give; ``None`` if called from Python.
    """

    command: str
    overrides: list[str] | None = None
    compose: Callable[[list[str]], Any] | None = None

    @property
    def keys(self) -> set[str]:
        """The keys and groups that the command line sets."""
        return {item.lstrip("+~").partition("=")[0].partition("@")[0] for item in self.overrides or ()}


def from_python() -> Invocation:
    """The invocation of a task that a program or notebook calls."""
    return Invocation(shlex.join(["python", *sys.argv]))


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """``{"model": {"layers": 8}}`` to ``{"model.layers": 8}``: keys as they are typed."""
    flat = {}
    for key, value in config.items():
        flat.update(
            {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def sections(schema: type) -> dict[str, type]:
    """The parts of a configuration: ``model``, ``data`` … and their schemas."""
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(schema)}  # of X | None, both
    return {
        name: kind for name, kinds in types.items() for kind in kinds if isinstance(kind, type) and is_dataclass(kind)
    }
