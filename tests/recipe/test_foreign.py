"""Networks of timm and transformers, at random weights: converted, fine-tuned, and written for timm."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import transformers
from conftest import command, composed, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import nn

from vit_lightning.analysis.evaluate import evaluate
from vit_lightning.analysis.export import export, to_timm
from vit_lightning.analysis.predict import predict
from vit_lightning.config import Config, ModelConfig, OptimConfig
from vit_lightning.keys import InputError, Invocation
from vit_lightning.model.vit import ViT
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.foreign import from_hf, from_timm, read_foreign
from vit_lightning.recipe.weights import follow_weights, load_classifier, start_from
from vit_lightning.runs.fit import train

TIMM = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
HF = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, with no parameter at a value, such as zero, that hides a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny(**more) -> nn.Module:
    """A small network of timm that can be saved by name."""
    torch.manual_seed(1)
    return shaken(timm.create_model("vit_tiny_patch16_224", **{**TIMM, "num_classes": 3, **more}))


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """``timm:DIR`` of a network of three classes for images of 32 × 32."""
    timm.models.save_for_hf(tiny(), tmp_path / "tiny")
    return f"timm:{tmp_path / 'tiny'}"


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_classes=7),
        dict(num_classes=0),
        dict(num_classes=7, in_chans=1, qkv_bias=False, mlp_ratio=1.5),
        dict(num_classes=7, reg_tokens=3, init_values=0.1),
        dict(num_classes=0, reg_tokens=4, no_embed_class=True, init_values=0.1),  # DINOv2 with registers
        dict(num_classes=7, global_pool="avg"),
        dict(num_classes=7, global_pool="avg", class_token=False, reg_tokens=2, fc_norm=False),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_network_of_timm_keeps_its_output(settings):
    model = shaken(VisionTransformer(**TIMM, **settings))
    weights = from_timm(model)
    net = ViT(weights.model).eval()
    images = torch.randn(3, net.channels, 32, 32)
    if settings["num_classes"]:
        net.load_state_dict(weights.state)
        torch.testing.assert_close(net(images), model(images), atol=1e-4, rtol=0)
    else:
        net.load_state_dict(weights.state, strict=False)
        torch.testing.assert_close(net.pool(net.forward_features(images)), model(images), atol=1e-4, rtol=0)
    assert len(weights.class_names) == settings["num_classes"]


@pytest.mark.parametrize("norm_eps", [1e-12, 1e-2])
@torch.no_grad()
def test_a_classifier_of_transformers_keeps_its_logits(norm_eps):
    config = transformers.ViTConfig(**HF, intermediate_size=50, num_labels=7, layer_norm_eps=norm_eps)
    model = shaken(transformers.ViTForImageClassification(config))
    weights = from_hf(model)
    net = ViT(weights.model).eval()
    net.load_state_dict(weights.state)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(images), model(images).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
@torch.no_grad()
def test_a_headless_network_of_transformers_keeps_its_class_token(kind):
    config = getattr(transformers, f"{kind}Config")(**HF)
    more = {"add_pooling_layer": False} if kind == "ViT" else {}
    model = shaken(getattr(transformers, f"{kind}Model")(config, **more))
    weights = from_hf(model)
    net = ViT(weights.model).eval()
    net.load_state_dict(weights.state, strict=False)
    images = torch.randn(3, 3, 32, 32)
    expected = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(net.pool(net.forward_features(images)), expected, atol=1e-4, rtol=0)
    assert weights.class_names == []
    assert weights.model.registers == (4 if kind == "Dinov2WithRegisters" else 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(global_pool="map"), "global_pool=map"),
        (dict(qk_norm=True), "blocks.0.attn.k_norm"),
        (dict(pre_norm=True), "norm_pre"),
        (dict(pos_embed="none"), "no learned positions"),
        (dict(img_size=(32, 64)), "square image"),
        (dict(act_layer="quick_gelu"), "computes something else"),
        (dict(norm_layer="rmsnorm"), "computes something else"),
        (dict(mlp_layer=timm.layers.SwiGLU), "blocks.0.mlp"),
    ],
    ids=str,
)
def test_a_network_without_an_equivalent_is_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        from_timm(shaken(VisionTransformer(**{**TIMM, "num_classes": 3, **settings})))


@torch.no_grad()
def test_local_weights_classify_stored_images_as_their_library_does(tmp_path):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    model = tiny(num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "timm", model_config={"label_names": ["a", "b", "c"]})
    about = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    ours = load_classifier(f"timm:{tmp_path / 'timm'}")
    torch.testing.assert_close(ours(images), model((images / 255 - mean) / std), atol=1e-4, rtol=0)

    labels = dict(enumerate(["ant", "bee", "bee"]))
    config = transformers.ViTConfig(**HF, id2label=labels, label2id={"ant": 0, "bee": 1})
    model = shaken(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path / "hf")
    processor = transformers.ViTImageProcessor(size=32, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path / "hf")
    ours = load_classifier(f"hf:{tmp_path / 'hf'}")
    expected = model(**processor(list(images), return_tensors="pt")).logits
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)
    assert ours.hparams["class_names"] == ["ant", "bee (1)", "bee (2)"]


@torch.no_grad()
def test_a_file_holds_the_weights_of_the_named_architecture(tmp_path):
    model = shaken(timm.create_model("test_vit", num_classes=5))
    save_file(model.state_dict(), tmp_path / "five.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "five.pth")
    for name in ("five.safetensors", "five.pth"):
        net = load_classifier(f"timm:test_vit:{tmp_path / name}").net
        images = torch.randn(2, 3, 160, 160)
        torch.testing.assert_close(net(images), model(images), atol=1e-4, rtol=0)


def mistake(checkpoint: str) -> str:
    with pytest.raises(InputError) as caught:
        read_foreign(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "timm:nosuchnet cannot be read by timm (Unknown model (nosuchnet))" in mistake("timm:nosuchnet")
    for checkpoint in ("timm:test_vit", "hf:google/vit-base-patch16-224"):
        assert "check the name, the file and the connection to the hub" in mistake(checkpoint)
    assert "lost.pth is not a file" in mistake(f"timm:test_vit:{tmp_path}/lost.pth")
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit2", num_classes=2).state_dict(), path)
    assert "cannot be read by timm (" in mistake(f"timm:test_vit:{path}")
    path.write_bytes(b"damaged")
    assert "cannot be read by timm (" in mistake(f"timm:test_vit:{path}")
    assert "timm's ResNet has no equivalent" in mistake(f"timm:resnet10t:{resnet(tmp_path)}")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    assert "transformers' bert has no equivalent" in mistake(f"hf:{tmp_path / 'bert'}")
    for library, checkpoint in (("timm", "timm:test_vit"), ("transformers", "hf:x")):
        monkeypatch.setitem(sys.modules, library, None)
        assert mistake(checkpoint) == f'checkpoint={checkpoint} needs {library}: pip install -e ".[weights]"'


def resnet(folder: Path) -> Path:
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), folder / "resnet.safetensors")
    return folder / "resnet.safetensors"


def test_a_run_follows_the_weights_unless_a_key_contradicts_them(saved):
    def followed(*typed: str) -> Config:
        overrides = [f"checkpoint={saved}", *typed]
        return follow_weights(composed(*overrides), Invocation("", overrides))

    shape = dict(patch_embed="unfold", patch_size=8, layers=2, embed_dim=32, heads=2, mlp_dim=128, pool="cls")
    for typed in ([], ["experiment=finetune"], ["model.layers=2"]):  # a preset is no key that was typed
        model = asdict(followed(*typed).model)
        assert {key: model[key] for key in shape} == shape
        assert model["image_size"] == 32
        assert model["mlp_head_units"] == []
    kept = followed("model.image_size=40", "model.drop_path=0.3", "model.mlp_head_units=[9]").model
    assert (kept.image_size, kept.drop_path, kept.mlp_head_units) == (40, 0.3, [9])
    for typed, message in (
        ("model.layers=3", f"checkpoint={saved} has model.layers=2; remove model.layers"),
        ("model=conv", f"checkpoint={saved} has its own network; remove model="),
        ("model.image_size=42", "model.patch_size=8; try model.image_size=40"),
        ("model.image_size=37", "model.patch_size=8; try model.image_size=40"),  # not a multiple of the default either
    ):
        with pytest.raises(InputError, match=message.replace("=", "[=]")):
            followed(typed)
    with pytest.raises(InputError, match=r"has model\.layers=2"):  # from Python
        follow_weights(Config(checkpoint=saved, model=ModelConfig(layers=5)), Invocation(""))


def started(checkpoint: str, names: str, **more) -> ViTClassifier:
    """A classifier of these classes that starts from the weights."""
    model = replace(read_foreign(checkpoint).model, num_classes=len(names), **more)
    channels = model.channels or 3
    own = [0.3] * channels
    classifier = ViTClassifier(asdict(model), asdict(OptimConfig()), list(names), own, own).eval()
    start_from(classifier, checkpoint)
    return classifier


@torch.no_grad()
def test_positions_are_resized_as_timm_does(saved):
    model = tiny()
    model.set_input_size(img_size=48)
    images = torch.randn(2, 3, 48, 48)
    net = started(saved, "abc", image_size=48).net
    torch.testing.assert_close(net(images), model(images), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_run_takes_their_normalisation_and_for_other_classes_a_head_of_its_own(saved):
    theirs = read_foreign(saved)
    same, other, gray = started(saved, "abc"), started(saved, "abcd"), started(saved, "abc", channels=1)
    assert torch.equal(same.net.head[0].weight, theirs.state["head.0.weight"])
    assert other.net.head[0].out_features == 4
    torch.testing.assert_close(other.net.blocks[0].attn.qkv.weight, theirs.state["blocks.0.attn.qkv.weight"])
    assert same.hparams["mean"] == same.mean.tolist() == theirs.mean != [0.3] * 3
    images = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(gray(images), same(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=0)


def test_a_run_from_foreign_weights_is_evaluated_and_resumed_like_any_other(saved, tmp_path):
    write_folder(tmp_path / "images", {"bee": (9, 7), "ant": (9, 7), "cat": (9, 7)}, side=16)
    data = [f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}", "data.batch_size=9"]
    run, folder = ["experiment=finetune", f"checkpoint={saved}", *data, "trainer.max_epochs=1"], tmp_path / "run"
    train(composed(*run), folder, invocation=Invocation("", run), loggers=[])
    more = [f"resume={folder}", "trainer.max_epochs=2"]
    train(composed(*more), tmp_path / "new", invocation=Invocation("", more), loggers=[])
    classifier = load_classifier(str(folder))
    assert classifier.hparams["mean"] == read_foreign(saved).mean
    assert classifier.net.patch_size == 8
    record = json.loads((folder / "summary.json").read_text())
    assert record["epochs"] == 2
    acc = evaluate(composed(f"checkpoint={folder}", name="evaluate"), tmp_path)
    assert acc == pytest.approx(record["metrics"]["test/acc"])
    predict(composed(f"checkpoint={folder}", f"images={tmp_path / 'images/test/ant'}", name="predict"), tmp_path)


def library_network(kind: str, folder: Path) -> tuple[str, nn.Module]:
    """A network at random weights, saved as its library does it: what ``checkpoint`` is, and the network itself."""
    if kind == "dinov2_with_registers":
        model = shaken(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**HF)))
        model.save_pretrained(folder)
        return f"hf:{folder}", model
    torch.manual_seed(1)
    model = shaken(timm.create_model(kind, **TIMM, num_classes=3))
    timm.models.save_for_hf(model, folder, model_config={"label_names": ["ant", "bee", "cat"]})
    return f"timm:{folder}", model


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dinov2_with_registers", "deit_tiny_patch16_224")]


@pytest.mark.parametrize("kind", [*SLOW_KINDS, "vit_tiny_patch16_224"])
@torch.no_grad()
def test_a_run_that_learns_nothing_computes_what_the_library_does(kind, tmp_path):
    """From the command that trains to what is predicted, embedded and exported."""
    checkpoint, model = library_network(kind, tmp_path / "weights")
    write_folder(tmp_path / "images", {"ant": (4, 2), "bee": (4, 2), "cat": (4, 2)}, side=32)
    data = [f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}", "data.batch_size=4"]
    arguments = ["experiment=finetune", f"checkpoint={checkpoint}", *data]
    more = ["data.val_fraction=0.25", "optim.lr=0", "trainer.max_epochs=1", "dashboard=curves", "hydra.run.dir=run"]
    result = command("train", *arguments, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = [f"checkpoint={tmp_path / 'run'}", "embeddings=true"]
    predict(composed(*found, f"images={tmp_path / 'images/test'}", "top=3", name="predict"), tmp_path)
    content = np.load(tmp_path / "embeddings.npz")
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in content["files"]])
    theirs = read_foreign(checkpoint)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (theirs.mean, theirs.std))
    x = (pictures / 255 - mean) / std
    if kind == "dinov2_with_registers":
        expected = model(x).last_hidden_state[:, 0]
    else:
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        shares = model(x).softmax(dim=1)  # the classes are those of the weights, and so is the head
        for row, own in zip(json.loads((tmp_path / "predictions.json").read_text()), shares, strict=True):
            guesses = {guess["class"]: guess["probability"] for guess in row["predictions"]}
            assert [guesses[name] for name in ("ant", "bee", "cat")] == pytest.approx(own.tolist(), abs=1e-4)
    np.testing.assert_allclose(content["embeddings"], expected, atol=1e-4)
    (tmp_path / "split").mkdir()
    evaluate(composed(*found, name="evaluate"), tmp_path / "split")
    np.testing.assert_allclose(np.load(tmp_path / "split" / "embeddings.npz")["embeddings"], expected, atol=1e-4)
    (tmp_path / "timm").mkdir()
    export(composed(found[0], "format=timm", name="export"), tmp_path / "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pooled = back.forward_head(back.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpoint", ["saved", "pretrained"])
def test_a_linear_probe_trains_the_head_alone(checkpoint, request, tmp_path):
    checkpoint = request.getfixturevalue("saved") if checkpoint == "saved" else checkpoint
    write_folder(tmp_path / "images", {"ant": (5, 2), "bee": (5, 2)}, side=32)
    data = [f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}", "data.batch_size=4"]
    more = ["data.val_fraction=0.4", "trainer.max_epochs=1", "dashboard=curves"]
    run = ["experiment=linear_probe", f"checkpoint={checkpoint}", *data, *more]
    train(composed(*run), tmp_path / "run", invocation=Invocation("", run), loggers=[])
    trained = load_classifier(str(tmp_path / "run")).net
    if checkpoint == "pretrained":
        before = load_classifier(checkpoint).net.state_dict()
    else:
        before = read_foreign(checkpoint).state
    for name, value in trained.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name
    assert len(trained.head) == 1
    assert trained.head[0].bias.abs().max() > 0


def test_the_command_line_takes_the_names_of_other_libraries(tmp_path):
    result = command("train", "checkpoint=timm:nosuchnet", "model.image_size=224", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: checkpoint=timm:nosuchnet cannot be read by timm (Unknown model")
    assert len(result.stderr.splitlines()) == 1
    with pytest.raises(InputError, match="checkpoint=timm: lacks a name"):
        composed("checkpoint='timm:'")


def test_a_network_without_a_head_cannot_predict(tmp_path):
    timm.models.save_for_hf(tiny(num_classes=0), tmp_path / "headless")
    with pytest.raises(InputError, match="has no head"):
        load_classifier(f"timm:{tmp_path / 'headless'}")
    assert started(f"timm:{tmp_path / 'headless'}", "ab").net.head[0].out_features == 2


OURS = ModelConfig(
    **dict(image_size=16, patch_size=4, embed_dim=24, heads=2, layers=2, mlp_dim=50, mlp_head_units=[]),
    **dict(channels=3, num_classes=3, dropout=0.0),
)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(registers=3, layer_scale=0.1), dict(pool="mean", registers=2, channels=1), dict(pool="mean_norm")],
    ids=str,
)
@torch.no_grad()
def test_an_exported_network_has_the_same_logits_in_timm(settings, tmp_path):
    config = replace(OURS, **settings)
    mean, std = [0.2] * config.channels, [0.3] * config.channels
    classifier = ViTClassifier(asdict(config), asdict(OptimConfig()), list("abc"), mean, std)
    shaken(classifier)
    torch.save(
        {"hyper_parameters": dict(classifier.hparams), "state_dict": classifier.state_dict()}, tmp_path / "a.ckpt"
    )
    out = tmp_path / "out"
    out.mkdir()
    assert export(composed(f"checkpoint={tmp_path / 'a.ckpt'}", "format=timm", name="export"), out) <= 1e-4
    arguments, _ = to_timm(classifier)
    model = VisionTransformer(**arguments).eval()
    model.load_state_dict(load_file(out / "model.safetensors"))
    images = torch.randn(3, config.channels, 16, 16)
    torch.testing.assert_close(model(images), classifier.net(images), atol=1e-4, rtol=0)
    back = load_classifier(f"timm:{out}")  # with the names of the classes and the normalisation
    stored = torch.randint(256, (3, config.channels, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(back(stored), classifier(stored), atol=1e-4, rtol=0)
    assert back.hparams["class_names"] == list("abc")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            dict(patch_embed="conv"),
            "model.patch_embed=conv has no equivalent in timm; it needs model.patch_embed=unfold",
        ),
        (dict(position="rotary", embed_dim=32), "model.position=rotary"),
        (dict(block="blog"), "model.block=blog"),
        (dict(mlp_head_units=[8]), "model.mlp_head_units"),
        (dict(pool="attention"), "model.pool=attention"),
    ],
    ids=str,
)
def test_an_export_without_an_equivalent_in_timm_is_refused(settings, reason):
    config = replace(OURS, **settings)
    with pytest.raises(InputError, match=f"format=timm: {reason}"):
        to_timm(ViTClassifier(asdict(config), asdict(OptimConfig()), list("abc"), [0.2] * 3, [0.3] * 3))
