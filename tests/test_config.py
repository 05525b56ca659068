"""The schema: its checks, its agreement with conf/, and the one line that a mistake gets."""

import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import CONF, composed
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_lightning import cli
from vit_lightning.augment import mix, train_transform
from vit_lightning.classifier import ViTClassifier
from vit_lightning.config import AugmentConfig, BenchmarkRun, Config, InputError, ModelConfig, OptimConfig
from vit_lightning.optim import build_optimizer, build_schedule

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
    ("override", "message"),
    [
        ("model.heads=5", "model.embed_dim=64 is not divisible by model.heads=5; model.embed_dim=65 would be"),
        ("model.patch_size=7", "model.image_size=72 is not divisible by model.patch_size=7; model.patch_size=6 or 8"),
        ("model.layers=0", "model.layers=0 must be at least 1"),
        ("model.block=post", "model.block=post is not known; choose one of prenorm, blog"),
        ("model.dropout=1.0", "model.dropout=1.0 must be at least 0 and less than 1"),
        ("model.mlp_head_units=[8,0]", "model.mlp_head_units=0 must be at least 1"),
        ("model.pool=max", "model.pool=max is not known; choose one of cls, mean, attention"),
        ("model.patch_embed=conv", "model.patch_size=6 must be a power of two from 2"),
        ("model.position=rotary model.embed_dim=24", "model.position=rotary needs heads of a width that 4 divides"),
        ("model=blog model.zero_init=true", "belong to model.block=prenorm; leave them out"),
        ("model.drop_path=1", "model.drop_path=1.0 must be at least 0 and less than 1"),
        ("augment.policy=auto", "augment.policy=auto is not known; choose one of none, trivial, rand"),
        ("augment.erase=2", "augment.erase=2.0 is a probability: it must lie between 0 and 1"),
        ("augment.cutmix=-1", "augment.cutmix=-1.0 must be at least 0"),
        ("optim.name=lion", "optim.name=lion is not known; choose one of adamw, muon"),
        ("optim.label_smoothing=1", "optim.label_smoothing=1.0 must be at least 0 and less than 1"),
        ("optim.ema=1", "optim.ema=1.0 must be at least 0 and less than 1"),
        ("trainer.max_time=1h", "trainer.max_time=1h must be written as days:hours:minutes:seconds, 00:01:00:00"),
        ("optim.clock=epochs", "optim.clock=epochs is not known; choose one of steps, time"),
        ("optim.clock=time", "optim.clock=time needs an end: set trainer.max_time, as in trainer.max_time=00:00:30:00"),
        ("model.stem_depth=-1", "model.stem_depth=-1 must be at least 0"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1.0 must be at least 0"),
        ("target_acc=50", "target_acc=50.0 is a probability: it must lie between 0 and 1"),
        ("data.source=mnist", "data.source=mnist is not known; choose one of cifar100, cifar10, digits, image_folder"),
        ("data.split=half", "data.split=half is not known; choose one of blog, standard"),
        ("data.batch_size=0", "data.batch_size=0 must be at least 1"),
        ("data.val_fraction=1.0", "data.val_fraction=1.0 must lie between 0 and 1"),
        ("data.stored_size=64", "data.stored_size belongs to data.source=image_folder; leave it out for cifar100"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("data.split_seed=-1", "data.split_seed=-1 must lie between 0 and 4294967295"),
        ("data.split_seed=4294967296", "data.split_seed=4294967296 must lie between 0 and 4294967295"),
        ("augment.flip=1.5", "augment.flip=1.5 is a probability: it must lie between 0 and 1"),
        ("augment.rotation=-7", "augment.rotation=-7.0 must lie between 0 and 180 degrees"),
        ("optim.lr=-1", "optim.lr=-1.0 must be at least 0"),
        ("optim.lr=nan", "optim.lr=nan must be at least 0"),
        ("optim.lr=inf", "optim.lr=inf must be at least 0 and finite"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers, as in optim.betas=[0.9,0.999]"),
        ("optim.betas=[0.9,1.0]", "optim.betas=1.0 must be at least 0 and less than 1"),
        ("optim.schedule=step", "optim.schedule=step is not known; choose one of constant, cosine"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0 must be at least 1"),
        ("trainer.precision=half", "trainer.precision=half is not known; choose one of 32-true, 16-mixed, bf16-mixed"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0 must be a whole number of batches from 1"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5 must be a whole number of batches from 1"),
        ("trainer.limit_test_batches=nan", "trainer.limit_test_batches=nan must be a whole number of batches from 1"),
        ("trainer.check_val_every_n_epoch=101", "exceeds trainer.max_epochs=100: the run would never be validated"),
        ("seed=-1", "seed=-1 must lie between 0 and 4294967295"),
        ("+typo=1", "typo is not a key"),
        ("+model.layer=4", "model.layer is not a key; did you mean model.layers?"),
    ],
)
def test_an_impossible_value_names_its_key(override, message):
    with pytest.raises(InputError) as error:
        composed(*override.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.layerz=4"], "model.layerz is not a key; did you mean model.layers? (model. has block, image_size"),
        (["modle=vit"], "modle is not a key; did you mean model?"),
        (["trainer.epochs=3"], "trainer.epochs is not a key; did you mean trainer.max_epochs? ("),
        (["optim.learning_rate=1"], "optim.learning_rate is not a key (optim. has name, lr, "),
        (["model.width=4"], "model.width is not a key (model. has block, image_size"),
        (["layers=4"], "layers is not a key; did you mean model.layers?"),
        (["hydra.rundir=x"], "hydra.rundir is not a key; --cfg hydra lists Hydra's own"),
        (["wholly.unheard=3"], "wholly is not a key; --help lists the keys"),
        (["model.layers=abc"], "model.layers=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["model.layers=1.5"], "model.layers=1.5: Value '1.5' of type 'float' could not be converted to Integer"),
        (["seed=null"], "seed=null: field 'seed' is not Optional"),
        (["model=vitt"], "model=vitt is not known; choose one of blog, conv, conv_large, vit"),
        (["experiment=blogg"], "experiment=blogg is not known; choose one of ablation, best, blog, fast, good"),
        (["model=null"], "model=null names no option; choose one of blog, conv, conv_large, vit"),
        (["model="], "model= names no option; choose one of blog, conv, conv_large, vit"),
        (["model.layers"], "model.layers is not a setting that can be read; write model.layers=value"),
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
        (["+typo=1"], "typo is not a key"),
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
    config = run("--cfg", "job", "model.layers=3", cwd=tmp_path)
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
    "policy": ["none", "trivial", "rand"],
    "name": ["adamw", "muon"],
    "schedule": ["constant", "cosine", "linear"],
}
share = st.floats(0, 0.9)


def fields_of(part: type, wild: bool, **values: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Values of some fields of a part; wild ones may be any that the field's type allows."""
    values |= {field.name: st.sampled_from(CHOICES[field.name]) for field in fields(part) if field.name in CHOICES}
    if wild:
        anything = {
            int: st.integers(-3, 70),
            float: st.floats(-2, 2) | st.sampled_from([math.nan, math.inf]),
            str: st.text(max_size=5),
        }
        types = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(part)}
        values = {name: st.one_of(*[value] * 4, anything[types[name]]) for name, value in values.items()}
    return st.fixed_dictionaries({}, optional=values)


def settings_of(wild: bool) -> st.SearchStrategy[tuple[dict, dict, dict]]:
    model = fields_of(
        ModelConfig, wild, image_size=st.sampled_from([8, 12, 16]),
        patch_size=st.sampled_from([2, 3, 4]), stem_depth=st.integers(0, 2), registers=st.integers(0, 3),
        embed_dim=st.sampled_from([8, 12, 16, 24]), layers=st.integers(1, 3), heads=st.sampled_from([1, 2, 3, 4]),
        mlp_dim=st.integers(1, 9), dropout=share, drop_path=share, layer_scale=share, head_dropout=share,
    )  # fmt: skip
    augment = fields_of(
        AugmentConfig, wild, crop=st.integers(0, 3), rotation=st.floats(0, 180), flip=share, shift=share, erase=share,
        mixup=share, cutmix=share, mix_prob=share,
    )  # fmt: skip
    optim = fields_of(
        OptimConfig, wild, lr=share, muon_lr=share, weight_decay=share, warmup=share,
        label_smoothing=share, ema=share,
    )  # fmt: skip
    return st.tuples(model, augment, optim)


def takes_a_step(values: tuple[dict, dict, dict]) -> bool:
    """Whether the settings are taken; they then train a step, or else are refused with a message that names a key."""
    try:
        model, augment, optim = ModelConfig(**values[0]), AugmentConfig(**values[1]), OptimConfig(**values[2])
    except InputError as error:
        if not re.fullmatch(r".*\b(model|augment|optim)\.\w+.*", str(error)):
            raise AssertionError(f"{error} names no key, or in several lines") from error
        return False
    model = replace(model, num_classes=3, channels=3)
    classifier = ViTClassifier(asdict(model), asdict(optim), list("abc"), [0.5] * 3, [0.25] * 3).train()
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    x = train_transform(images, model.image_size, torch.full((3,), 0.5), torch.full((3,), 0.25), augment)
    if augment.mixup or augment.cutmix:
        x, labels = mix(x, labels, 3, augment)
    loss = F.cross_entropy(classifier(x), labels, label_smoothing=optim.label_smoothing)
    loss.backward()
    optimizer = build_optimizer(classifier.net, optim)
    build_schedule(optimizer, optim, steps=10)
    optimizer.step()
    assert loss.isfinite()
    return True


PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def test_settings_within_their_ranges_train_a_step_or_are_refused_together():
    taken = []

    @PROPERTY
    @given(settings_of(wild=False))
    def trial(values):
        taken.append(takes_a_step(values))

    trial()
    assert sum(taken) > 25
    assert not all(taken)


def test_wild_settings_are_refused_with_a_message_or_train_a_step():
    taken = []

    @PROPERTY
    @given(settings_of(wild=True))
    def trial(values):
        taken.append(takes_a_step(values))

    trial()
    assert 3 < sum(taken) < len(taken) - 10
