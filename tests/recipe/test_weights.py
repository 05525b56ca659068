"""Trained networks: opened from a run, published as safetensors, and used to start another run."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TRAINER, composed, write_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_lightning.config import DataConfig, ModelConfig, OptimConfig
from vit_lightning.data.superclasses import SUPERCLASSES
from vit_lightning.keys import InputError
from vit_lightning.model.layers import resize_positions
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import MAY_DIFFER, PRETRAINED, convert_channels, load_classifier, publish, start_from
from vit_lightning.runs.fit import train

CLASSES = sorted(name for names in SUPERCLASSES.values() for name in names)

MODEL = ModelConfig(
    image_size=8, patch_size=2, patch_embed="conv", channels=3, num_classes=4, embed_dim=8, layers=2, mlp_head_units=[]
)


def classifier(seed: int = 0, classes: str = "abcd", **model) -> ViTClassifier:
    torch.manual_seed(seed)
    config = replace(MODEL, **{"num_classes": len(classes), **model})
    mean, std = [0.5] * config.channels, [0.25] * config.channels
    module = ViTClassifier(asdict(config), asdict(OptimConfig()), list(classes), mean, std)
    images = torch.randn(8, config.channels, config.image_size, config.image_size)
    module.net.train()(images)  # changes the statistics of batch norms
    return module.eval()


def write_run(module: ViTClassifier, path: Path) -> None:
    trainer = L.Trainer(**TRAINER)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with a trained classifier."""
    write_run(classifier(), tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run"


def test_a_run_its_checkpoint_and_its_published_weights_give_the_same_classifier(run, tmp_path):
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    expected = classifier()(images)
    for checkpoint in (run, run / "checkpoints" / "best.ckpt"):
        loaded = load_classifier(str(checkpoint))
        assert not loaded.training
        assert torch.equal(loaded(images), expected)

    published = tmp_path / "weights.safetensors"
    publish(load_classifier(str(run)), {"seed": 3}, "as you like", published)
    assert {value.dtype for value in load_file(published).values()} == {torch.float16, torch.int64}
    loaded = load_classifier(str(published))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert loaded.hparams["class_names"] == list("abcd")
    torch.testing.assert_close(loaded(images), expected, rtol=1e-2, atol=1e-2)


def test_a_published_file_describes_itself(tmp_path):
    publish(classifier(), {"seed": 3, "metrics": {"val/acc": 0.5}}, "as you like", tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["record"])["metrics"] == {"val/acc": 0.5}
    assert metadata["licence"] == "as you like"
    assert json.loads(metadata["hparams"])["model"]["layers"] == 2


def test_the_pretrained_network_is_as_described():
    assert PRETRAINED.stat().st_size <= 10e6
    trained = load_classifier("pretrained")
    assert trained.hparams["class_names"] == CLASSES
    with safe_open(PRETRAINED, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["record"])
    assert record["parameters"] <= 4_000_000
    assert record["samples_seen"] <= 5_000_000
    assert (record["images"]["train"], record["images"]["val"]) == (49500, 500)
    assert record["metrics"]["val/acc"] > 0.7
    assert metadata["licence"]


def test_the_pretrained_network_recognises_a_flower():
    """On a photograph that is not in CIFAR-100."""
    from sklearn.datasets import load_sample_image

    trained = load_classifier("pretrained")
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533]
    guess = CLASSES[trained.classify(photograph).argmax()]
    assert guess in ("orchid", "poppy", "rose", "sunflower", "tulip")


def damaged(path: Path) -> Path:
    path.write_bytes(b"no weights")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "does not exist"),
        ("empty", "does not exist"),
        ("bad.ckpt", "is not a checkpoint"),
        ("bad.safetensors", "contains no classifier"),
        ("no-json.safetensors", r"contains no classifier of this project \(Expecting property name"),
    ],
)
def test_an_invalid_checkpoint_is_an_error_of_one_line(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    damaged(tmp_path / "bad.ckpt")
    damaged(tmp_path / "bad.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "no-json.safetensors", {"hparams": "{model:"})
    with pytest.raises(InputError, match=f"checkpoint=.*{name}.*{message}") as error:
        load_classifier(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("value", "classes", "message"),
    [
        (math.nan, "abcd", "contains weights that are NaN or infinite"),
        (math.inf, "abcd", "contains weights that are NaN or infinite"),
        (0.0, "abc", "has 3 class names for a network of 4 classes"),
    ],
)
def test_invalid_weights_or_class_names_are_an_error(tmp_path, suffix, value, classes, message):
    module, path = classifier(), tmp_path / f"bad.{suffix}"
    module.hparams["class_names"] = list(classes)
    with torch.no_grad():
        module.net.blocks[1].mlp[0].weight[3, 2] = value
    if suffix == "safetensors":
        publish(module, {}, "", path)
    else:
        write_run(module, path)
    with pytest.raises(InputError, match=rf"checkpoint=.*bad\.{suffix}: .*bad\.{suffix} {message}"):
        load_classifier(str(path))


def test_publishing_keeps_the_previous_file_if_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    publish(classifier(), {"seed": 1}, "", path)
    before = path.read_bytes()

    def full_disk(file: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        publish(classifier(), {"seed": 2}, "", path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_start_with_the_same_classes_copies_the_head(run):
    other = classifier(seed=1)
    start_from(other, str(run))
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(other(images), classifier()(images))


@pytest.mark.parametrize(("split", "seen"), [("blog", True), ("standard", False)])
def test_start_from_a_network_that_has_seen_validation_images_warns(tmp_path, capsys, split, seen):
    trained, other = classifier(), classifier(seed=1)
    trained.hparams["data"] = asdict(DataConfig(split=split))
    other.hparams["data"] = asdict(DataConfig(split="standard"))
    publish(trained, {}, "", tmp_path / "trained.safetensors")
    start_from(other, str(tmp_path / "trained.safetensors"))
    err = capsys.readouterr().err
    assert ("trained with data.split=blog data.val_fraction=0.1 data.split_seed=42; if the images" in err) == seen
    assert bool(err) == seen


@pytest.mark.parametrize("classes", ["abc", "abce"])
def test_start_with_other_classes_keeps_the_new_head(run, classes):
    other = classifier(seed=1, classes=classes)
    head = other.net.head[-1].weight.clone()
    start_from(other, str(run))
    assert torch.equal(other.net.head[-1].weight, head)
    trained = classifier().net.state_dict()
    for name, value in other.net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, trained[name]), name


def test_start_with_larger_images_resizes_the_positions(run):
    larger = classifier(seed=1, image_size=12)
    start_from(larger, str(run))
    assert torch.equal(larger.net.pos_embed, resize_positions(classifier().net.pos_embed, 6, first=1))


@pytest.mark.parametrize("patch_embed", ["conv", "unfold"])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_start_converts_between_colour_and_gray(tmp_path, patch_embed, before, after):
    """A gray image has the same logits as a colour image with three equal channels."""
    trained = classifier(patch_embed=patch_embed, channels=before)
    publish(trained, {}, "", tmp_path / "trained.safetensors")
    other = classifier(seed=1, patch_embed=patch_embed, channels=after)
    start_from(other, str(tmp_path / "trained.safetensors"))
    gray = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    logits = trained(gray.expand(-1, before, -1, -1))
    torch.testing.assert_close(other(gray.expand(-1, after, -1, -1)), logits, rtol=1e-2, atol=1e-2)


def test_channels_are_converted_only_if_their_number_differs():
    weight = torch.randn(4, 27)
    assert convert_channels(weight, 3, 3) is weight
    with pytest.raises(RuntimeError):
        convert_channels(torch.randn(4, 26), 3, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": 3}, "has model.layers=2, but this run has model.layers=3; set model.layers=2"),
        ({"embed_dim": 16}, "has model.embed_dim=8, but this run has model.embed_dim=16; set model.embed_dim=8"),
        (
            {"patch_embed": "unfold"},
            "has model.patch_embed=conv, but this run has model.patch_embed=unfold; set model.patch_embed=conv",
        ),
    ],
)
def test_start_from_another_architecture_is_an_error(run, model, message):
    with pytest.raises(InputError, match=message):
        start_from(classifier(**model), str(run))


def test_the_finetune_preset_fits_the_pretrained_network():
    ours = composed("experiment=finetune").model
    trained = ModelConfig(**load_classifier("pretrained").hparams["model"])
    assert all(value == getattr(trained, key) for key, value in asdict(ours).items() if key not in MAY_DIFFER)


def test_finetuning_starts_with_the_trained_accuracy(tmp_path):
    """Two classes of images that differ in colour; the second run learns nothing more."""
    write_folder(tmp_path / "images", {"ant": (40, 20), "bee": (40, 20)})
    for image in (tmp_path / "images").glob("*/bee/*.png"):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(image)
    common = [
        *("data=image_folder", f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("model=conv", "model.image_size=8", "model.embed_dim=16", "model.heads=2", "model.patch_size=2"),
        *("model.layers=1", "data.batch_size=8", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
    ]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    train(composed(*common, "trainer.max_epochs=4", "optim.lr=0.01"), tmp_path / "first")
    start = f"checkpoint={tmp_path / 'first'}"
    accuracy = train(composed(*common, start, "trainer.max_epochs=1", "optim.lr=0"), tmp_path / "second")
    assert accuracy == 1.0
