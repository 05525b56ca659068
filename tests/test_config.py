"""The schema: its checks, its agreement with conf/, and the one line that a mistake gets."""

import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import CONF, composed
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Timer
from torch.optim.swa_utils import AveragedModel

from vit_lightning import cli
from vit_lightning.config import (
    AugmentConfig,
    BenchmarkRun,
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
)
from vit_lightning.recipe.augment import mix, resize, train_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.optim import build_optimizer, build_schedule, ema_update

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml")
)  # model=vit, data=digits, experiment=blog …


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The train command, stopped before it would import torch."""
    guard = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'train.py';"
        "runpy.run_module('vit_lightning.train', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run([sys.executable, "-c", guard, *arguments], cwd=cwd, capture_output=True, text=True)


def test_defaults_of_conf_and_schema_agree():
    assert composed() == Config()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    composed(option, name="search" if option.startswith("space=") else "config")


def test_every_option_is_in_the_help():
    for option in OPTIONS:
        group, name = option.split("=")
        text = (CONF / ("search.yaml" if group == "space" else "config.yaml")).read_text()
        [described] = re.findall(rf"^ +{group} +(.*\n(?: {{20}}.*\n)*)", text, re.M)
        assert name in re.findall(r"\w+", described), option


def test_the_models_are_the_specs():
    spec = dict(image_size=72, patch_size=6, embed_dim=64, layers=8, heads=4, mlp_dim=128, dropout=0.1)
    assert composed("model=vit").model == ModelConfig(**spec, mlp_head_units=[2048, 1024], head_dropout=0.5)
    assert composed("model=blog").model == ModelConfig(**spec, block="blog")


def test_the_blog_experiment_is_the_spec_to_the_letter():
    config = composed("experiment=blog")
    assert config.model.block == "blog"
    assert (config.data.source, config.data.split, config.data.split_seed) == ("cifar100", "blog", 42)
    assert (config.data.batch_size, config.trainer.max_epochs) == (32, 100)
    assert (config.augment.rotation, config.augment.flip, config.augment.shift) == (7.0, 0.5, 0.0)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.decay_all) == (1e-3, 1e-4, True)
    assert (config.optim.schedule, config.optim.warmup) == ("constant", 0.0)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "ablation").glob("*.yaml")))
def test_an_ablation_changes_its_experiment(name):
    base = composed("experiment=ablation")
    assert (composed("experiment=ablation", f"ablation={name}") == base) == (name == "base")


def test_an_experiments_choice_can_be_overridden():
    config = composed("experiment=blog", "data=image_folder", "trainer.max_epochs=3", "model.layers=2")
    assert (config.data.source, config.trainer.max_epochs, config.model.layers) == ("image_folder", 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.layerz=4"], "model.layerz is not a key; did you mean model.layers? (model. has block, image_size"),
        (["modle=vit"], "modle is not a key; did you mean model?"),
        (["trainer.epochs=3"], "trainer.epochs is not a key; did you mean trainer.max_epochs? ("),
        (["optim.learning_rate=1"], "optim.learning_rate is not a key (optim. has name, lr, "),
        (["model.width=4"], "model.width is not a key (model. has block, image_size"),
        (["layers=4"], "layers is not a key; did you mean model.layers?"),
        (["wholly.unheard=3"], "wholly is not a key; --help lists the keys"),
        (["seed=null"], "seed=null: field 'seed' is not Optional"),
        (["model=vitt"], "model=vitt is not known; choose one of blog, conv, conv_deep, conv_large, vit"),
        (["checkpoint="], "checkpoint= names no network; set it to pretrained, a run's directory or a file"),
        (["experiment=blogg"], "experiment=blogg is not known; choose one of ablation, best, blog, fast, finetune"),
        (["model=null"], "model=null names no option; choose one of blog, conv, conv_deep, conv_large, vit"),
        (["data.root=~/x"], "data.root=~/x is not a setting that can be read; quote the value: data.root='\"~/x\"'"),
        (["model.layers=${foo}"], "model.layers: Interpolation key 'foo' not found"),
        (["hydra/launcher=foo"], "hydra/launcher=foo is not known; choose one of basic"),
        (["hydra.run.dir=/proc/none"], "/proc/none cannot be written (No such file or directory); choose another"),
        (["-m", "hydra.sweep.dir=/proc/none", "seed=0"], "choose another hydra.run.dir, or in a sweep hydra.sweep.dir"),
        (["model.layers=2,4"], "To sweep over it, add --multirun to your command line"),
        (["--cfg", "job", "model.layers=2,4"], "To sweep over it, add --multirun to your command line"),
        (["--config-name", "foo"], "error: Cannot find primary config 'foo'. Check"),
        (["--config-dir", "/nowhere"], "error: Additional config directory '/nowhere' not found"),
        (["model.heads=5"], "model.embed_dim=64 is not divisible by model.heads=5"),
        (["-m", "model.layerz=2,4"], "model.layerz is not a key"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_without_torch(tmp_path, arguments, message):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert {path.name for path in tmp_path.rglob("*.*") if path.is_file()} <= {"multirun.yaml"}


def test_help_and_cfg_need_no_torch(tmp_path):
    text = run("--help", cwd=tmp_path)
    assert text.returncode == 0, text.stderr
    for group in cli.sections(Config):
        assert f"\n  {group} " in text.stdout
    assert "$" not in text.stdout
    for arguments in (["--cfg", "job", "model.layers=3"], ["model.layers=3", "--cfg", "job"]):
        config = run(*arguments, cwd=tmp_path)
        assert config.returncode == 0, config.stderr
        assert "  layers: 3\n" in config.stdout


@pytest.mark.parametrize("schema", [Config, *cli.sections(BenchmarkRun).values()])
def test_every_key_is_documented(schema):
    for field in fields(schema):
        if field.name not in cli.sections(BenchmarkRun):
            assert re.search(rf"^ +{field.name}: ", schema.__doc__, re.M), field.name


CHOICES = {
    "block": ["prenorm", "prenorm", "blog"],
    "patch_embed": ["unfold", "conv"],
    "position": ["learned", "rotary"],
    "pool": ["cls", "mean", "attention"],
    "source": ["cifar100", "cifar10", "digits", "image_folder"],
    "split": ["blog", "standard"],
    "policy": ["none", "trivial", "rand", "auto"],
    "name": ["adamw", "muon"],
    "schedule": ["constant", "cosine", "linear"],
    "clock": ["steps", "steps", "time"],
    "accelerator": ["auto", "cpu"],
    "strategy": ["auto", "auto", "auto", "ddp", "fsdp"],
    "precision": ["32-true", "bf16-mixed", "auto"],
}
PARTS = {"model": ModelConfig, "data": DataConfig, "augment": AugmentConfig, "optim": OptimConfig}
PARTS["trainer"] = TrainerConfig
share = st.floats(0, 0.9)
flag = st.booleans()
batches = st.integers(1, 9) | st.floats(0.1, 1)
limits = {f"limit_{name}_batches": batches for name in ("train", "val", "test")}
VALUES = {
    "model": dict(
        image_size=st.sampled_from([8, 12, 16]), patch_size=st.sampled_from([2, 3, 4]),
        stem_depth=st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=1), stem_se=flag,
        registers=st.integers(0, 3), embed_dim=st.sampled_from([8, 12, 16, 24]), layers=st.integers(1, 3),
        heads=st.sampled_from([1, 2, 3, 4]), mlp_dim=st.integers(1, 9), dropout=share, drop_path=share,
        layer_scale=share, zero_init=flag, mlp_head_units=st.lists(st.integers(1, 9), max_size=2), head_dropout=share,
    ),
    "data": dict(
        root=st.text(max_size=5), cache_dir=st.text(max_size=5), stored_size=st.none() | st.none() | st.integers(1, 64),
        val_fraction=st.floats(0.1, 0.9), split_seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 8),
        eval_batch_size=st.integers(1, 8), workers=st.integers(0, 2),
    ),
    "augment": dict(
        crop=st.integers(0, 3), rotation=st.floats(0, 180), flip=share, shift=share, erase=share, mixup=share,
        cutmix=share, mix_prob=share, until=share,
    ),
    "optim": dict(
        lr=share, muon_lr=share, ns_steps=st.integers(1, 6), weight_decay=share,
        betas=st.lists(share, min_size=2, max_size=2), decay_all=flag, warmup=share,
        small_size=st.none() | st.sampled_from([4, 6, 8]), small_share=share, label_smoothing=share,
        ema=st.just(0.0) | share,
    ),
    "trainer": dict(
        devices=st.sampled_from([1, 1, 1, 2]), max_epochs=st.integers(1, 9), gradient_clip_val=st.none() | share,
        max_time=st.none() | st.sampled_from(["00:00:00:01", "00:12:00:00", "365:00:00:00"]), **limits,
        check_val_every_n_epoch=st.integers(1, 2), log_every_n_steps=st.integers(1, 99), deterministic=flag,
        enable_progress_bar=flag,
    ),
    "": dict(
        seed=st.integers(0, 2**32 - 1), target_acc=st.none() | share, target_acc5=st.none() | share, test=flag,
        save_minutes=st.none() | share, debug=flag,
    ),
}  # fmt: skip
ANYTHING = {
    int: st.integers(-3, 70),
    float: st.floats(-2, 2) | st.sampled_from([math.nan, math.inf]),
    str: st.text(max_size=5) | st.sampled_from(["00:00:00:00", "1:00:00", "9999999999:00:00:00"]),
    bool: flag,
    Any: st.integers(-3, 3) | st.lists(st.integers(-1, 3), max_size=3) | st.text(max_size=2),
    list[int]: st.lists(st.integers(-1, 9), max_size=3),
    list[float]: st.lists(st.floats(-1, 2), max_size=3),
}


def fields_of(part: type, values: dict[str, st.SearchStrategy], wild: bool) -> st.SearchStrategy[dict]:
    """Values of some fields of a part; wild ones may be any that the field's type allows."""
    types = {field.name: field.type for field in fields(part)}
    values = values | {name: st.sampled_from(CHOICES[name]) for name in types if name in CHOICES}
    if wild:
        for name, value in values.items():
            kind = types[name] if types[name] in ANYTHING else get_args(types[name])[0]  # of int | None, int
            values[name] = st.one_of(*[value] * 20, ANYTHING[kind])
    return st.fixed_dictionaries({}, optional=values)


def settings_of(wild: bool) -> st.SearchStrategy[dict[str, dict]]:
    """Values of the parts of a configuration, and under "" those of its own fields."""
    return st.fixed_dictionaries(
        {name: fields_of(PARTS.get(name, Config), values, wild) for name, values in VALUES.items()}
    )


def takes_a_step(values: dict[str, dict]) -> bool:
    """Whether the settings are taken; they then train a step, or else are refused with a message that names a key."""
    try:
        config = Config(**{name: part(**values[name]) for name, part in PARTS.items()}, **values[""])
    except InputError as error:
        key = r"(model|data|augment|optim|trainer)\.\w+|(seed|target_acc5?|save_minutes)="
        if not re.fullmatch(rf".*\b({key}).*", str(error)):
            raise AssertionError(f"{error} names no key, or in several lines") from error
        return False
    model, optim = replace(config.model, num_classes=3, channels=3), config.optim
    torch.manual_seed(config.seed)
    classifier = ViTClassifier(asdict(model), asdict(optim), list("abc"), [0.5] * 3, [0.25] * 3).train()
    average = AveragedModel(classifier.net, multi_avg_fn=ema_update(optim.ema), use_buffers=True) if optim.ema else None
    side = max(8, config.augment.crop + 1)  # ImageData refuses a crop that is no less than the images
    images, labels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    x = train_transform(images, model.image_size, torch.full((3,), 0.5), torch.full((3,), 0.25), config.augment)
    if config.augment.mixup or config.augment.cutmix:
        x, labels = mix(x, labels, 3, config.augment)
    if optim.small_size is not None and optim.small_share > 0:
        x = resize(x, optim.small_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        loss = F.cross_entropy(classifier(x), labels, label_smoothing=optim.label_smoothing)
    loss.backward()
    optimizer = build_optimizer(classifier.net, optim)
    build_schedule(optimizer, optim, steps=10, elapsed=(lambda: 0.5) if optim.clock == "time" else None)
    if config.trainer.gradient_clip_val:
        torch.nn.utils.clip_grad_norm_(classifier.net.parameters(), config.trainer.gradient_clip_val)
    optimizer.step()
    if average is not None:
        average.update_parameters(classifier.net)
    if config.trainer.max_time is not None:
        assert Timer(config.trainer.max_time).time_remaining() > 0
    assert loss.isfinite()
    return True


PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("wild", [False, True])
def test_a_whole_configuration_trains_a_step_or_is_refused_with_a_message(wild):
    """Of settings within their ranges some do not go together; wild ones leave the ranges too."""
    taken = []

    @PROPERTY
    @given(settings_of(wild))
    def trial(values):
        taken.append(takes_a_step(values))

    trial()
    assert 10 < sum(taken) < len(taken) - 10
