"""Exported files, opened as someone else would."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import command, composed

from vit_lightning.analysis import export as export_module
from vit_lightning.analysis import graph
from vit_lightning.analysis.export import export
from vit_lightning.config import OptimConfig
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import load_classifier


def test_onnx_takes_bytes_of_any_number_and_size(digits_run):
    start = digits_run.parent
    result = command("export", "checkpoint=run", "seconds=0", "hydra.run.dir=onnx", cwd=start)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "images/s at 64" in result.stdout
    assert len(result.stdout.splitlines()) == 7, result.stdout  # the speeds, what was checked, the files
    assert {path.name for path in (start / "onnx").iterdir()} == {"model.onnx", "README.md"}
    session = onnxruntime.InferenceSession(start / "onnx" / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert json.loads(metadata["config"])["layers"] == 2
    [images], [logits] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, logits.name) == ("images", "tensor(uint8)", "logits")
    classifier = load_classifier(str(digits_run))
    for shape in ((1, 1, 8, 8), (5, 1, 8, 8), (3, 1, 20, 13), (2, 1, 12, 24), (2, 1, 24, 12)):
        batch = torch.randint(0, 256, shape, dtype=torch.uint8)
        [ours] = session.run(None, {"images": batch.numpy()})
        np.testing.assert_allclose(ours, classifier(batch).detach(), atol=1e-4)


def test_torch_export_does_too(digits_run, tmp_path):
    config = composed(f"checkpoint={digits_run}", "format=torch_export", "seconds=0", name="export")
    assert export(config, tmp_path) <= 1e-4
    extra = {"class_names": "", "config": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["class_names"]) == list("0123456789")
    classifier = load_classifier(str(digits_run))
    for shape in ((3, 1, 9, 11), (2, 1, 12, 24), (2, 1, 24, 12)):
        batch = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(program.module()(batch), classifier(batch), atol=1e-4, rtol=0)


SHAPES = {  # of networks, small
    "conv": ["model=conv", "model.stem_depth=1"],
    "rotary": ["model=vit", "model.position=rotary", "model.registers=2", "model.pool=attention"],
    "blog": ["model=blog"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("convert", [graph.to_onnx, graph.to_torch_export])
def test_networks_of_every_kind_can_be_exported(shape, convert):
    small = ["model.image_size=16", "model.patch_size=4", "model.layers=2", "model.embed_dim=32", "model.heads=2"]
    model = replace(composed(*SHAPES[shape], *small).model, channels=3, num_classes=7)
    torch.manual_seed(0)
    classifier = ViTClassifier(asdict(model), asdict(OptimConfig()), list("abcdefg"), [0.5] * 3, [0.25] * 3).eval()
    _, run = convert(graph.trace(classifier), {"class_names": "[]"})
    for size in ((20, 13), (16, 16), (20, 40), (40, 20)):
        batch = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
        torch.testing.assert_close(run(batch), classifier(batch), atol=1e-4, rtol=0)


def test_an_export_that_differs_is_not_written(digits_run, tmp_path, monkeypatch):
    def trace_wrongly(classifier: ViTClassifier) -> torch.export.ExportedProgram:
        changed = copy.deepcopy(classifier)
        with torch.no_grad():
            changed.net.head[-1].bias += 0.01
        return graph.trace(changed)

    monkeypatch.setattr(export_module, "trace", trace_wrongly)
    with pytest.raises(InputError, match=r"logits differ from PyTorch's by 1\.0e-02; not written"):
        export(composed(f"checkpoint={digits_run}", "format=torch_export", name="export"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refused_export_leaves_no_directory(tmp_path):
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    result = command("export", "checkpoint=other.ckpt", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: checkpoint=other.ckpt: other.ckpt is not a checkpoint\n"
    assert [path.name for path in tmp_path.iterdir()] == ["other.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export", "safetensors"])
def test_an_export_that_does_not_fit_on_the_disk_leaves_nothing_and_keeps_an_older_one(digits_run, form):
    """The limit on a file's size stands for a full disk."""
    folder = digits_run.parent / f"full-{form}"
    folder.mkdir()
    name = {"onnx": "model.onnx", "torch_export": "model.pt2", "safetensors": "model.safetensors"}[form]
    (folder / name).write_text("older")
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)); from vit_lightning import export; export.main()"
    )
    arguments = ["checkpoint=run", f"format={form}", "seconds=0", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=digits_run.parent, capture_output=True, text=True
    )
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {folder / name} cannot be written (File too large)")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "older"}


def test_an_unknown_format_is_said():
    with pytest.raises(InputError, match="format=onyx is not known; choose one of onnx, torch_export"):
        composed("format=onyx", name="export")


def test_photographs_are_photographs():
    colour, gray = graph.photographs(3), graph.photographs(1)
    assert colour.shape == (120, 3, 64, 64)
    assert gray.shape == (120, 1, 64, 64)
    assert colour.float().std(dim=(1, 2, 3)).median() > 10
    torch.testing.assert_close(gray.float(), colour.float().mean(dim=1, keepdim=True).floor())
