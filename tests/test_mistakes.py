"""Mistakes that people make: each command answers at once with one line that names the key or file, and the cure."""

import importlib
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from PIL import Image
from safetensors.torch import save_file

TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"]

# Command, arguments, and what the line must hold. {run} is a run on digits, {folders} the folders of broken_folders.
CONFIGURATION = [
    ("train", "model.layerz=4", "model.layerz is not a key; did you mean model.layers?"),
    ("train", "+typo=1", "typo is not a key"),
    ("train", "+model.typo=1", "model.typo is not a key"),
    ("train", "lr=1", "lr is not a key; did you mean optim.lr?"),
    ("train", "+model._target_=os.system", "_target_ can only be set in callbacks and logger"),
    ("train", "model._target_=os.system", "_target_ can only be set in callbacks and logger"),
    ("train", "+hydra.callbacks.x={{_target_: os.system}}", "_target_ can only be set in callbacks and logger"),
    ("train", "model.layers=many", "model.layers=many: Value 'many' of type 'str' could not be converted to Integer"),
    ("train", "model.layers=null", "model.layers=null: field 'model.layers' is not Optional"),
    ("train", "model.layers=1.5", "model.layers=1.5: Value '1.5' of type 'float' could not be converted to Integer"),
    ("train", "model.stem_depth=-1", "model.stem_depth=-1 must be at least 0"),
    ("train", "model=conv model.stem_depth=[1]", "model.stem_depth=[1] must be a whole number, or a list of 2 of them"),
    ("train", "model.heads=5", "model.embed_dim=64 is not divisible by model.heads=5; try model.embed_dim=65"),
    ("train", "model.patch_size=5", "try model.patch_size=4 or 6"),
    ("train", "model.position=rotary model.heads=32", "model.position=rotary needs a head width divisible by 4"),
    ("train", "model.patch_embed=conv", "model.patch_size=6 must be a power of two"),
    ("train", "model=blog model.drop_path=0.1", "need model.block=prenorm; remove them"),
    ("train", "model=blog model.zero_init=true", "need model.block=prenorm; remove them"),
    ("train", "model.mlp_head_units=[0]", "model.mlp_head_units=[0] must be at least 1"),
    ("train", "model=vitt", "model=vitt is not known; choose one of blog, conv"),
    ("train", "model=", "model= is not an option; choose one of"),
    ("train", "experiment=bestt", "experiment=bestt is not known; choose one of"),
    ("train", "data=cifar1000", "data=cifar1000 is not known; choose one of cifar10, cifar100"),
    (
        "train",
        "data=digits data.stored_size=8",
        "data.stored_size is for pictures of any size; remove it for data.source=digits",
    ),
    ("train", "augment.rotation=200", "augment.rotation=200.0 must be between 0 and 180"),
    ("train", "augment.cutmix=0.001", "augment.cutmix=0.001 must be 0 (off) or at least 0.01"),
    ("train", "optim.lr=nan", "optim.lr=nan must be finite"),
    ("train", "optim.lr=inf", "optim.lr=inf must be finite"),
    ("train", "optim.betas=[0.9]", "must be two numbers, as in optim.betas=[0.9,0.999]"),
    ("train", "model.mlp_head_units=[[1]]", "model.mlp_head_units=[[1]] must be a list of single values"),
    ("train", "metrics=[[f1]]", "metrics=[['f1']] must be a list of single values"),
    ("train", "model.layer_scale=1e308", "model.layer_scale=1e+308 must be at most 1e+30"),
    ("train", "data.eval_batch_size=9223372036854775808", "must be at most 9223372036854775807"),
    ("train", "model.image_size=1000000007", "try model.patch_size=1 or 1000000007"),
    ("train", "optim.betas=[0.9,1.5]", "optim.betas=[0.9, 1.5] must be at least 0 and less than 1"),
    ("train", "data=[1]", "data=[1]: a group takes names; choose from cifar10, cifar100, digits"),
    ("search", "space=[1]", "space=[1]: a group takes names; choose from recipe, shape"),
    ("train", "optim.clock=time", "optim.clock=time needs trainer.max_time, as in trainer.max_time=00:00"),
    ("train", "optim.small_size=50", "optim.small_size=50 must be a multiple of model.patch_size=6 and at most"),
    ("train", "trainer.max_time=1h", "trainer.max_time=1h must be days:hours:minutes:seconds"),
    ("train", "trainer.max_time=00:00:00:00", "trainer.max_time=00:00:00:00 leaves no time to train; use"),
    ("train", "trainer.max_time=9999999:00:00:00", "must be days:hours:minutes:seconds"),
    ("train", "trainer.devices=2", "needs trainer=ddp or trainer=fsdp"),
    ("train", "trainer=ddp trainer.devices=3", "data.batch_size=32 cannot be divided among 3 processes"),
    ("train", "trainer.limit_test_batches=0", "trainer.limit_test_batches=0 must be a number of batches (at least 1)"),
    ("train", "trainer.limit_train_batches=1.5", "trainer.limit_train_batches=1.5 must be a number of batches"),
    ("train", "trainer.limit_test_batches=nan", "trainer.limit_test_batches=nan must be finite"),
    ("train", "trainer.check_val_every_n_epoch=200", "the run would never be validated"),
    ("train", "monitor=val/f1", "monitor=val/f1 is not measured; choose one of val/loss, val/acc, val/acc5, or add it"),
    (
        "train",
        "metrics=[f1] monitor=f1",
        "monitor=f1 is not measured; choose one of val/loss, val/acc, val/acc5, val/f1",
    ),
    ("search", "space=shape monitor=val/kappa", "monitor=val/kappa is not measured; choose one of val/loss"),
    (
        "train",
        "optim.class_weights=sqrt data.sampler=balanced",
        "optim.class_weights=sqrt and data.sampler=balanced would favour small classes twice; choose one of them",
    ),
    ("train", "target_acc=50", "target_acc=50.0 must be between 0 and 1"),
    ("train", "optim.lr", "optim.lr cannot be parsed as a setting; write optim.lr=value"),
    ("train", "checkpoint=a=b", "quote the value"),
    ("train", "hydra.run.dirr=x", "hydra.run.dirr is not a key; --cfg hydra lists Hydra's own"),
    ("evaluate", "checkpoint=", "checkpoint= is empty; set it to pretrained, a run's directory or a file"),
    ("evaluate", "checkpoint=''", "checkpoint= is empty; set it to pretrained, a run's directory or a file"),
    (
        "predict",
        "checkpoint='' images=x.png",
        "checkpoint= is empty; set it to pretrained, a run's directory or a file",
    ),
    ("export", "checkpoint=''", "checkpoint= is empty; set it to pretrained, a run's directory or a file"),
    ("evaluate", "checkpoint={run} batch=3", "batch is not a key"),
    ("predict", "checkpoint={run}", "images= is empty; name files, directories or globs"),
    ("search", "search.study=a/b", "search.study=a/b names a directory"),
    (
        "search",
        "+space.model.layerz={{low: 1, high: 2}}",
        "space.model.layerz is not a key; write a space of your own into conf/space/ and choose it, as in space=recipe",
    ),
    ("sweep", "", "the command is: python -m vit_lightning.sweep summary dir=DIRECTORY"),
    ("sweep", "summary dir=nowhere", "dir=nowhere has no summary.json"),
]
RUNS = [
    (
        "train",
        "data=digits model.channels=3",
        "model.channels=3, but data.source=digits has 1; leave model.channels out",
    ),
    ("train", "data=digits model.num_classes=3", "model.num_classes=3, but data.source=digits has 10"),
    (
        "train",
        "data=digits target_acc5=0.8",
        "target_acc5=0.8: top-5 is not measured for 10 classes, only for more than 10; set target_acc5=null",
    ),
    ("train", "data=digits monitor=val/acc5", "monitor=val/acc5: top-5 is not measured for 10 classes"),
    ("train", "data=digits data.batch_size=5000", "data.batch_size=5000 exceeds the 1293 training images"),
    ("train", "data=digits model.mlp_dim=9223372036854775807", "out of memory; reduce data.batch_size, model."),
    ("train", "data=digits model.layer_scale=1e30", "is nan at step 1"),
    ("train", "data=digits augment.crop=8", "augment.crop=8 must be less than the images' 8 pixels"),
    ("train", "data=digits data.val_fraction=0.0001", "data.val_fraction=0.0001 cannot be held out class by class"),
    (
        "train",
        "data=digits trainer.limit_val_batches=0.1",
        "0 of 1 batches; use trainer.limit_val_batches=1",
    ),
    ("train", "data=digits checkpoint=nowhere", "checkpoint=nowhere does not exist; name a run's directory"),
    (
        "train",
        "data=digits checkpoint={run} model.layers=3",
        "checkpoint={run} has model.patch_size=2, but this run has model.patch_size=6; set",
    ),
    ("train", "data=digits data.cache_dir=/proc/none", "data.cache_dir=/proc/none cannot be written"),
    ("train", "data=digits hydra.run.dir=/proc/none", "/proc/none cannot be written"),
    ("train", "data=digits hydra.run.dir={run}", "contains another run; choose a new hydra.run.dir"),
    ("train", "data=digits hydra.run.dir=/proc/self", "/proc/self cannot be written"),  # not even by root
    (
        "evaluate",
        "checkpoint={run} hydra.run.dir={folders}/taken",
        "taken/evaluation.json cannot be written (Is a directory)",
    ),
    (
        "predict",
        "checkpoint={run} hydra.run.dir={folders}/taken images={folders}/photo.png",
        "taken/predictions.json cannot be written (Is a directory); choose another hydra.run.dir",
    ),
    (
        "export",
        "checkpoint={run} format=safetensors hydra.run.dir={folders}/taken",
        "model.safetensors cannot be written",
    ),
    ("train", "resume=nowhere", "resume=nowhere does not exist; name a run's directory"),
    (
        "train",
        "resume={run}",
        "is already finished (trainer.max_epochs=6); to extend it, set trainer.max_epochs=12",
    ),
    ("train", "resume={run} optim.lr=1", "a resumed run keeps its configuration (optim.lr=0.003); remove optim.lr"),
    ("train", "resume={run} trainer.max_epochs=2", "trainer.max_epochs=2 is less than the run's 6"),
    ("train", "resume={folders}/damaged trainer.max_epochs=9", "there is no other checkpoint, so start a new run"),
    (
        "train",
        "resume={folders}/unsaved trainer.max_epochs=9",
        "checkpoints/last.ckpt to continue from; start a new run",
    ),
    ("train", "resume={folders}/evil trainer.max_epochs=9", "last.ckpt is not a checkpoint of this project"),
    (
        "train",
        "resume={folders}/edited trainer.max_epochs=9",
        "config.yaml has model.layerz, unknown to this version",
    ),
    ("evaluate", "checkpoint=nowhere", "checkpoint=nowhere does not exist"),
    ("evaluate", "checkpoint={folders}/damaged", "best.ckpt is corrupt (truncated or overwritten)"),
    ("evaluate", "checkpoint={folders}/foreign.ckpt", "contains no classifier of this project"),
    ("evaluate", "checkpoint={folders}/foreign.safetensors", "contains no classifier of this project"),
    ("evaluate", "checkpoint={folders}/no_json.safetensors", "no_json.safetensors contains no classifier"),
    ("evaluate", "checkpoint={folders}/photo.png", "photo.png is not a checkpoint"),
    ("evaluate", "checkpoint={run} data=image_folder data.root={folders}/good", "has a class a that the checkpoint"),
    ("predict", "checkpoint={run} images=nowhere.png", "images=nowhere.png does not exist; name pictures"),
    (
        "predict",
        "checkpoint={run} images={folders}/empty",
        "no picture could be read; images= takes files, directories",
    ),
    (
        "predict",
        "checkpoint={run} images={folders}/text/train/a/0.png",
        "no picture could be read; images= takes files",
    ),
    ("export", "checkpoint=nowhere", "checkpoint=nowhere does not exist"),
    ("search", "search.storage=nosuch://x", "search.storage=nosuch://x cannot be opened as the storage of a study"),
]
FOLDERS = [
    ("nowhere", "nowhere is not a directory"),
    ("photo.png", "photo.png is not a directory"),
    ("no_test", "data.split=blog cannot split 0 test image(s) 70/30; use data.split=standard"),
    ("one_class", "has training images of only one class; a classifier needs at least two"),
    ("empty_class", "train/b contains no pictures; add some or remove it"),
    ("new_class", "has test images of class c, but no training images of it"),
    ("no_classes", "has no class folder; put images into <class>/ below it"),
    ("truncated", "train/a/000.png cannot be read"),
    ("text", "train/a/0.png cannot be read (not an image); fix or remove them, or set data.skip_unreadable=true"),
    ("nothing", "train/a/000.png cannot be read"),
    ("huge", "train/a/000.png cannot be read"),
    ("one_test_image", "data.split=blog cannot split 1 test image"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits_run) -> Path:
    """What is wrong with each is in its name."""
    root = tmp_path_factory.mktemp("folders")
    names = [name for name, _ in FOLDERS[2:]] + ["good"]
    for name in names:
        write_folder(root / name, {"a": (6, 6), "b": (6, 6)})
    image = root / "{}" / "train" / "a" / "000.png"
    shutil.rmtree(root / "no_test" / "test")
    for split in ("train", "test"):
        shutil.rmtree(root / "one_class" / split / "b")
        (root / "no_classes" / split).rename(root / "no_classes" / "old")
        shutil.move(root / "no_classes" / "old" / "a", root / "no_classes" / split)
        shutil.rmtree(root / "no_classes" / "old")
    for path in (root / "empty_class" / "train" / "b").iterdir():
        path.unlink()
    shutil.copytree(root / "new_class" / "test" / "a", root / "new_class" / "test" / "c")
    whole = Path(str(image).format("truncated"))
    whole.write_bytes(whole.read_bytes()[:-60])
    (root / "text" / "train" / "a" / "0.png").write_text("not a picture")
    Path(str(image).format("nothing")).write_bytes(b"")
    Path(str(image).format("huge")).write_bytes(huge_png(whole))
    shutil.rmtree(root / "one_test_image" / "test" / "b")
    for path in list((root / "one_test_image" / "test" / "a").iterdir())[1:]:
        path.unlink()
    (root / "empty").mkdir()
    for name in ("evaluation.json", "predictions.json", "model.safetensors"):
        (root / "taken" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "photo.png")
    torch.save({"model": 1}, root / "foreign.ckpt")
    (root / "foreign.safetensors").write_bytes(b"no weights")
    save_file({"weight": torch.zeros(1)}, root / "no_json.safetensors", {"hparams": "{model:"})
    for name in ("damaged", "edited", "unsaved", "evil"):
        shutil.copytree(digits_run, root / name)
    shutil.rmtree(root / "unsaved" / "checkpoints")
    for path in (root / "evil" / "checkpoints").iterdir():
        torch.save({"state_dict": Malicious(root / "it-ran")}, path)
    for path in (root / "damaged" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    (root / "edited" / "config.yaml").write_text("model: {layerz: 3}\n")
    return root


class Malicious:
    """What touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def huge_png(small: Path) -> bytes:
    """A small file that claims to hold 40,000 × 40,000 pixels."""
    data = bytearray(small.read_bytes())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def said(capsys, monkeypatch, cwd: Path, name: str, *arguments: str) -> str:
    """The one line that a command ends with, within seconds; predict names each unreadable file in one before it."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module = importlib.import_module(f"vit_lightning.{name}")
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        module.main()
    assert time.monotonic() - start < 30
    assert isinstance(end.value.code, str)  # which Python prints, and exits with 1
    [line] = end.value.code.splitlines()
    assert line.startswith("error: ")
    before = capsys.readouterr().err.splitlines()
    assert len(before) == (name == "predict" and "no picture could be read" in line)
    for unreadable in before:
        assert unreadable.startswith("error: ")
        assert arguments[-1].removeprefix("images=") in unreadable
    return line


@pytest.mark.parametrize(("name", "arguments", "message"), CONFIGURATION + RUNS)
def test_a_mistake_costs_one_line(capsys, monkeypatch, tmp_path, digits_run, folders, name, arguments, message):
    known = {"run": digits_run, "folders": folders}
    line = said(capsys, monkeypatch, tmp_path, name, *(item.format(**known) for item in split(arguments)))
    assert message.format(**known) in line
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (folders / "it-ran").exists()


def split(arguments: str) -> list[str]:
    """At blanks outside of braces."""
    return [arguments] if "{{" in arguments else arguments.split()


@pytest.mark.parametrize(("folder", "message"), FOLDERS)
def test_a_folder_that_cannot_be_trained_on_is_said(capsys, monkeypatch, tmp_path, folders, folder, message):
    arguments = ["data=image_folder", f"data.root={folders / folder}", "data.batch_size=2", "data.split=blog"]
    assert message in said(capsys, monkeypatch, tmp_path, "train", *arguments)
    assert folder in ("one_test_image", "no_test") or not list(
        tmp_path.glob("data/cache/[!.]*")
    )  # which can be decoded


UNWRITABLE = "/out cannot be written (Permission denied); choose another hydra.run.dir"


@pytest.mark.parametrize(
    ("arguments", "unreadable", "message"),
    [
        (
            ["train", "data=image_folder", "data.root=images"],
            "images/train/a",
            "images/train/a cannot be read (Permission denied); fix its permissions",
        ),
        (["train", "data=digits", "hydra.run.dir=out"], "out", UNWRITABLE),
        (["evaluate", "checkpoint={run}", "hydra.run.dir=out"], "out", UNWRITABLE),
        (["predict", "checkpoint={run}", "images={folders}/photo.png", "hydra.run.dir=out"], "out", UNWRITABLE),
        (["export", "checkpoint={run}", "hydra.run.dir=out"], "out", UNWRITABLE),
    ],
)
def test_what_only_others_may_read_or_write_is_named(tmp_path, digits_run, folders, arguments, unreadable, message):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    bound = ["setpriv", *(f"--{kind}=-dac_override,-dac_read_search" for kind in ("bounding-set", "inh-caps"))]
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may read and write everywhere")
    name, *settings = (item.format(run=digits_run, folders=folders) for item in arguments)
    (tmp_path / "out" / "old").mkdir(parents=True)
    shutil.copytree(folders / "good", tmp_path / "images")
    (tmp_path / unreadable).chmod(0o500 if unreadable == "out" else 0)
    result = subprocess.run(
        [*bound * (os.geteuid() == 0), sys.executable, "-m", f"vit_lightning.{name}", *settings],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    (tmp_path / unreadable).chmod(0o755)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("debug", [False, True])
def test_a_process_ends_with_one_line_or_if_asked_with_a_traceback(tmp_path, debug):
    arguments = [sys.executable, "-m", "vit_lightning.train", "model.heads=5", *["traceback=true"] * debug]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == debug
    assert "try model.embed_dim=65" in result.stderr.splitlines()[-1]
    assert (len(result.stderr.splitlines()) == 1) != debug
