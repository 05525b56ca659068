"""Embeddings against other ways to compute them, and read as TensorBoard's projector reads them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import command, composed
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from vit_lightning.analysis import embeddings as embeddings_module
from vit_lightning.analysis.embeddings import classify_and_embed, write_embeddings
from vit_lightning.analysis.evaluate import evaluate
from vit_lightning.data.module import ImageData
from vit_lightning.recipe.weights import load_classifier


def projector(logdir: Path) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
    """What TensorBoard's page gets of one run: vectors (n, D), rows of metadata with their header, and thumbnails."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    apps = ProjectorPlugin(TBContext(data_provider=provider, logdir=str(logdir))).get_plugin_apps()

    def get(route: str, **query: str) -> bytes:
        response = Client(apps[route]).get("/", query_string=query)
        assert response.status_code == 200, response.text
        return response.data

    [run] = json.loads(get("/runs"))
    [info] = json.loads(get("/info", run=run))["embeddings"]
    query = dict(run=run, name=info["tensorName"])
    rows = [line.split("\t") for line in get("/metadata", **query).decode().splitlines()]
    vectors = np.frombuffer(get("/tensor", **query), np.float32).reshape(len(rows) - 1, -1)
    width, height = info["sprite"]["singleImageDim"]
    sprite = np.asarray(Image.open(io.BytesIO(get("/sprite_image", **query))))
    grid = sprite.reshape(sprite.shape[0] // height, height, sprite.shape[1] // width, width, 3)
    return vectors, rows, grid.swapaxes(1, 2).reshape(-1, height, width, 3)[: len(vectors)]


@pytest.mark.parametrize("tta", [False, True])
def test_embeddings_are_the_input_of_the_head(digits_run, tta):
    classifier = load_classifier(str(digits_run))
    images = torch.randint(256, (5, 1, 11, 8), dtype=torch.uint8)
    pooled: list[torch.Tensor] = []
    classifier.net.pool.register_forward_hook(lambda *call: pooled.append(call[-1]))
    probabilities, embeddings = classify_and_embed(classifier, images, tta)
    assert embeddings.shape == (5, 64)
    torch.testing.assert_close(embeddings, pooled[0])
    torch.testing.assert_close(probabilities, classifier.classify(images, tta))
    assert not classifier.net.head._forward_pre_hooks


@torch.no_grad()
def test_embeddings_are_the_features_of_timm(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
    ).eval()
    timm.models.save_for_hf(model, tmp_path)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    _, embeddings = classify_and_embed(load_classifier(f"timm:{tmp_path}"), images)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = model.forward_head(model.forward_features((images / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=0)


def test_pictures_of_ones_own_are_embedded(digits_run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(("a\tb.png", "c.png", "d.png")):
        Image.new("L", (20, 30), 80 * number).save(tmp_path / "pictures" / name)
    arguments = [f"checkpoint={digits_run}", f"images={tmp_path / 'pictures'}", "embeddings=true", "hydra.run.dir=out"]
    result = command("predict", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "projector shows 3 of 3 images: tensorboard --logdir out" in result.stdout
    content = np.load(tmp_path / "out" / "embeddings.npz")
    assert set(content) == {"embeddings", "class", "files"}
    assert (content["embeddings"].shape, content["embeddings"].dtype) == ((3, 64), np.float32)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["files"].tolist() == [row["file"] for row in rows]
    assert content["class"].tolist() == [row["predictions"][0]["class"] for row in rows]
    vectors, table, thumbnails = projector(tmp_path / "out")
    np.testing.assert_allclose(vectors, content["embeddings"], rtol=1e-6)
    assert table[0] == ["class", "files"]
    assert [Path(row[1]).name for row in table[1:]] == ["a b.png", "c.png", "d.png"]
    assert thumbnails.mean(axis=(1, 2, 3)).tolist() == [0, 80, 160]


def test_a_split_is_embedded_with_its_labels(digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(digits_run.parent)
    monkeypatch.setattr(embeddings_module, "SHOWN", 50)
    config = composed("checkpoint=run", "split=val", "tta=true", "embeddings=true", name="evaluate")
    acc = evaluate(config, tmp_path)
    content = np.load(tmp_path / "embeddings.npz")
    assert (content["labels"] == content["class"]).mean() == pytest.approx(acc)
    classifier = load_classifier("run")
    data = ImageData(composed("experiment=quickstart").data, 8)
    data.setup()
    images, labels = data.stored("val", torch.arange(len(data.indices["val"])))
    assert content["labels"].tolist() == [data.class_names[label] for label in labels]
    _, expected = classify_and_embed(classifier, images)
    np.testing.assert_allclose(content["embeddings"], expected, atol=1e-5)
    vectors, table, thumbnails = projector(tmp_path)
    shown = [number * len(labels) // 50 for number in range(50)]
    assert table == [["labels", "class", "files"], *([*(str(content[key][i]) for key in table[0])] for i in shown)]
    np.testing.assert_allclose(vectors, expected[shown], atol=1e-5)
    small = np.asarray(Image.fromarray(thumbnails[3]).convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), images[shown[3], 0].numpy().ravel())[0, 1] > 0.9


def test_a_projector_that_cannot_be_written_leaves_the_embeddings(tmp_path, capsys):
    (tmp_path / "00000").write_text("in the way")
    images = torch.zeros(2, 2, 4, 4, dtype=torch.uint8)
    write_embeddings(tmp_path, torch.eye(2), {"class": ["a", "b\udce9"], "files": ["0", "1"]}, images.__getitem__)
    assert "warning: cannot draw the projector" in capsys.readouterr().err
    assert np.load(tmp_path / "embeddings.npz")["class"].tolist() == ["a", "b\udce9"]
