"""The schema: its checks, its agreement with conf/, and the one line that a mistake gets."""

import math
import re
import subprocess
import sys
from dataclasses import Field, asdict, fields, replace
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

from vit_lightning import schemas
from vit_lightning.config import Config, ModelConfig
from vit_lightning.keys import InputError, sections
from vit_lightning.recipe.augment import mix, resize, train_transform
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.optim import build_optimizer, build_schedule, ema_update
from vit_lightning.schemas import BenchmarkRun

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml")
)  # model=vit, data=digits, experiment=blog …


def run(*arguments: str, cwd: Path, name: str = "train") -> subprocess.CompletedProcess:
    """A command, stopped before it would import torch."""
    guard = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'train.py';"
        f"runpy.run_module('vit_lightning.{name}', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run([sys.executable, "-c", guard, *arguments], cwd=cwd, capture_output=True, text=True)


def test_defaults_of_conf_and_schema_agree():
    assert composed("logger=none") == Config()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    composed(option, name="search" if option.startswith("space=") else "train")


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
        (["model.layerz=4"], "model.layerz is not a key; did you mean model.layers?"),
        (["modle=vit"], "modle is not a key; did you mean model?"),
        (["trainer.epochs=3"], "trainer.epochs is not a key; did you mean trainer.max_epochs?"),
        (["optim.learning_rate=1"], "optim.learning_rate is not a key; did you mean optim.lr?"),
        (["model.width=4"], "model.width is not a key; did you mean model.embed_dim?"),
        (["model.depth=4"], "did you mean model.layers?"),
        (["model.num_heads=4"], "did you mean model.heads?"),
        (["hidden_size=4"], "did you mean model.embed_dim?"),
        (["ckpt_path=x"], "ckpt_path is not a key; did you mean resume?"),
        (["trainer.gpus=2"], "did you mean trainer.devices?"),
        (["epochs=2"], "did you mean trainer.max_epochs?"),
        (["batch_size=2"], "did you mean data.batch_size?"),
        (["data.num_workers=2"], "did you mean data.workers?"),
        (
            ["trainer.enable_checkpointing=false"],
            "trainer.enable_checkpointing is not a key: a run always saves itself",
        ),
        (["patience=2"], "did you mean callbacks=early_stopping callbacks.early_stopping.patience?"),
        (["--epochs", "3"], "--epochs is not an option; write trainer.max_epochs=3"),
        (["--learning-rate=3"], "--learning-rate is not an option; write optim.lr=3"),
        (["+experiment=quickstart"], "experiment is a group; write experiment=quickstart"),
        (["photos/cats"], "photos/cats cannot be parsed as a setting; a path is written data.root=photos/cats"),
        (
            ["data=image_folder", "data.root=/nowhere"],
            "data.root=/nowhere is not a directory; it needs train/<class>",
        ),
        (["checkpoint=nowhere"], "checkpoint=nowhere does not exist; name a run's directory"),
        (["resume=nowhere"], "resume=nowhere does not exist; name a run's directory"),
        (["layers=4"], "layers is not a key; did you mean model.layers?"),
        (["wholly.unheard=3"], "wholly.unheard is not a key; --help lists the keys"),
        (["seed=null"], "seed=null: field 'seed' is not Optional"),
        (["model=vitt"], "model=vitt is not known; choose one of blog, conv, conv_deep, conv_large, vit"),
        (["checkpoint="], "checkpoint= is empty; set it to pretrained, a run's directory or a file"),
        (["experiment=blogg"], "experiment=blogg is not known; choose one of ablation, best, blog, fast, finetune"),
        (["model=null"], "model=null is not an option; choose one of blog, conv, conv_deep, conv_large, vit"),
        (["data.root=~/x"], "data.root=~/x cannot be parsed as a setting; quote the value: data.root='\"~/x\"'"),
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
    for arguments in (["--cfg", "job", "model.layers=3"], ["model.layers=3", "--cfg", "job"]):
        config = run(*arguments, cwd=tmp_path)
        assert config.returncode == 0, config.stderr
        assert "  layers: 3\n" in config.stdout


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_help_lists_every_key_and_option_in_80_columns(name, tmp_path):
    result = run("--help", cwd=tmp_path, name=name)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    schema = schemas.SCHEMAS[name]
    for section in (schema, *sections(schema).values()):
        for declared in fields(section):
            if declared.metadata:
                [first] = [n for n, line in enumerate(lines) if line.startswith(f"  {section.prefix}{declared.name}=")]
                shown = "".join(lines[first : first + 2])  # many choices take two lines
                assert all(choice in shown for choice in declared.metadata["choices"])
    words = set(re.findall(r"[\w]+", result.stdout))
    for option in OPTIONS if name == "train" else []:
        group, choice = option.split("=")
        assert choice in words or group == "space"


SCHEMAS = [*schemas.SCHEMAS.values(), *sections(BenchmarkRun).values(), sections(schemas.SCHEMAS["search"])["search"]]
KEYS = [(schema, declared) for schema in SCHEMAS for declared in fields(schema) if declared.metadata]


@pytest.mark.parametrize(("schema", "declared"), KEYS, ids=[f"{s.__name__}-{field.name}" for s, field in KEYS])
def test_every_key_says_what_it_means_and_refuses_what_is_out_of_range(schema, declared):
    bounds = declared.metadata
    assert bounds["text"].endswith(".")
    wrong: list[object] = ["neither"] if bounds["choices"] else []
    for name, step in (("low", -1), ("high", 1), ("above", 0), ("below", 0)):
        if bounds[name] is not None:
            wrong.append(bounds[name] + step)
    if isinstance(declared.default, float):
        wrong += [math.nan, math.inf]
    for value in wrong:
        given = [value] if str(declared.type).startswith("list") else value
        with pytest.raises(InputError, match=re.escape(f"{schema.prefix}{declared.name}={given} ")):
            schema(**{declared.name: given})


PARTS = {name: section for name, section in sections(Config).items() if name != "dashboard"}
small, share = st.integers(1, 3), st.floats(0, 0.9)
OWN = {  # values that the declarations allow, where a network is to stay small or most would not go together
    "model": dict(
        image_size=st.sampled_from([8, 12, 16]), patch_size=st.sampled_from([2, 3, 4]), block=st.just("prenorm"),
        options=st.just({}),
        stem_depth=st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=1), layers=small,
        channels=st.none(),
        embed_dim=st.sampled_from([8, 12, 16, 24]), heads=st.sampled_from([1, 2, 3, 4]), num_classes=st.none(),
    ),
    "data": dict(
        options=st.just({}), folds=st.none(), fold=st.just(0), stored_size=st.none(),
        batch_size=st.integers(2, 8), eval_batch_size=st.integers(4, 8),
    ),
    "augment": dict(
        options=st.just({}), crop=st.integers(0, 3), mixup=st.just(0.0) | st.floats(0.1, 1),
        cutmix=st.just(0.0) | share, batch=st.just([]),
    ),
    "optim": dict(
        betas=st.lists(share, min_size=2, max_size=2), small_size=st.none() | st.sampled_from([4, 6, 8]),
        clock=st.just("steps"), options=st.just({}), freeze=st.just([]), ema=st.just(0.0) | share,
    ),
    "trainer": dict(
        devices=st.just(1), max_epochs=st.integers(2, 9), check_val_every_n_epoch=st.integers(1, 2),
        max_time=st.none() | st.sampled_from(["00:00:00:01", "365:00:00:00"]), strategy=st.just("auto"),
        accelerator=st.just("cpu"),
        **{f"limit_{name}_batches": st.integers(1, 9) | st.floats(0.1, 1) for name in ("train", "val", "test")},
    ),
    "": dict(imports=st.just([]), resume=st.none(), checkpoint=st.none()),
}  # fmt: skip
LISTS = (list[int], list[float], list[str], dict[str, Any])
WILD = {
    int: st.integers(-3, 70),
    float: st.floats(-2, 2) | st.sampled_from([math.nan, math.inf]),
    str: st.text(max_size=5) | st.sampled_from(["00:00:00:00", "1:00:00", "9999999999:00:00:00"]),
    bool: st.booleans(),
    list[int]: st.lists(st.integers(-1, 9), max_size=3),
    list[str]: st.lists(st.text(max_size=3), max_size=2),
    dict[str, Any]: st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
    list[float]: st.lists(st.floats(-1, 2), max_size=3),
    Any: st.integers(-3, 3) | st.lists(st.integers(-1, 3), max_size=3) | st.text(max_size=2),
}


def values_of(declared: Field) -> st.SearchStrategy:
    """Values that the declaration of a key allows."""
    bounds = declared.metadata
    kind = get_args(declared.type)[0] if type(None) in get_args(declared.type) else declared.type
    low, high = bounds["low"] or 0, 0.9 if bounds["below"] or bounds["high"] is None else bounds["high"]
    if bounds["choices"]:
        values: st.SearchStrategy = st.sampled_from(list(bounds["choices"]))
        values = st.lists(values, unique=True) if kind == list[str] else values
    elif kind is bool:
        values = st.booleans()
    elif kind is int:
        values = st.integers(low, bounds["high"] or low + 8)
    elif kind is float:
        values = st.floats(max(low, 0.1 * (bounds["above"] is not None)), high)
    elif kind == list[int]:
        values = st.lists(st.integers(low, 9), max_size=2)
    else:
        values = st.text(max_size=5)
    return values | st.none() if type(None) in get_args(declared.type) else values


def fields_of(part: type, own: dict[str, st.SearchStrategy], wild: bool) -> st.SearchStrategy[dict]:
    """Values of some keys of a section; wild ones may be anything of the type that OmegaConf lets pass."""
    values = {field.name: own.get(field.name, values_of(field)) for field in fields(part) if field.metadata}
    if wild:
        for field in fields(part):
            if field.metadata:
                kind = get_args(field.type)[0] if get_args(field.type) and field.type not in LISTS else field.type
                values[field.name] = st.one_of(*[values[field.name]] * 20, WILD.get(kind, st.text(max_size=5)))
    return st.fixed_dictionaries({}, optional=values)


def settings_of(wild: bool) -> st.SearchStrategy[dict[str, dict]]:
    """Values of the sections of a configuration, and under "" those of its own keys."""
    return st.fixed_dictionaries({name: fields_of(PARTS.get(name, Config), own, wild) for name, own in OWN.items()})


def takes_a_step(values: dict[str, dict]) -> bool:
    """Whether the settings are taken; they then train a step, or else are refused with a message that names a key."""
    try:
        config = Config(**{name: part(**values[name]) for name, part in PARTS.items()}, **values[""])
    except InputError as error:
        key = r"(model|data|augment|optim|trainer)\.\w+|(seed|target_acc5?|save_minutes|checkpoint|monitor)="
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


@pytest.mark.parametrize("wild", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_whole_configuration_trains_a_step_or_is_refused_with_a_message(wild):
    """Of settings within their ranges some do not go together; wild ones leave the ranges too."""
    taken = []

    @PROPERTY
    @given(settings_of(wild))
    def trial(values):
        taken.append(takes_a_step(values))

    trial()
    assert 10 < sum(taken) < len(taken) - 10
