"""Model cards, read by huggingface_hub; what they say is what the record says, and their code runs."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, composed
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from vit_lightning.analysis.card import write_card
from vit_lightning.analysis.export import export
from vit_lightning.config import ModelConfig, OptimConfig
from vit_lightning.keys import InputError
from vit_lightning.recipe.classifier import ViTClassifier
from vit_lightning.recipe.weights import load_classifier, read_record


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint of a network that timm has an equivalent of, without a record of its training."""
    config = ModelConfig(image_size=16, patch_size=4, mlp_head_units=[], channels=3, num_classes=12)
    names = ["a `b`", "| c |\nd", "é", *"efghijklm"]
    classifier = ViTClassifier(asdict(config), asdict(OptimConfig()), names, [0.5] * 3, [0.5] * 3)
    content = {"hyper_parameters": dict(classifier.hparams), "state_dict": classifier.state_dict()}
    torch.save(content, tmp_path / "plain.ckpt")
    return tmp_path / "plain.ckpt"


@pytest.mark.parametrize(
    "form", ["safetensors", "timm", *(pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "torch_export"))]
)
def test_the_code_of_a_card_loads_what_is_next_to_it(plain, tmp_path, monkeypatch, form):
    out = tmp_path / "out"
    out.mkdir()
    export(composed(f"checkpoint={plain}", f"format={form}", "seconds=0", name="export"), out)
    text = (out / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, object] = {}
    exec(code, names)
    size = 16
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    expected = load_classifier(str(plain))
    gray = torch.zeros(1, 3, size, size)  # which timm takes as it is
    shares = expected.net(gray).softmax(dim=1) if form == "timm" else expected.classify(black)
    torch.testing.assert_close(names["probabilities"], shares, atol=1e-3, rtol=0)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == ("timm" if form == "timm" else "vit_lightning")
    assert card.data.license == "unknown"
    assert card.data.eval_results is None
    assert card.text.count("There is no record of the run that trained this network") == 3
    assert "0.5" not in card.text  # nor any other number that looks measured
    assert "       1  | c | d\n       2  é\n" in text


def test_a_card_has_the_results_of_the_record(digits_run, tmp_path):
    result = command(
        *("export", f"checkpoint={digits_run}", "format=safetensors", "licence=cc-by-4.0", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "out/README.md"
    record = json.loads((digits_run / "summary.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == ["accuracy"]
    results = {each.metric_name: each for each in card.data.eval_results}
    assert results.keys() == {"cross-entropy", "top-1 accuracy"}  # of ten classes, no top-5
    assert results["top-1 accuracy"].metric_value == record["metrics"]["test/acc"]
    assert {each.dataset_split for each in results.values()} == {"test"}
    assert {each.dataset_name for each in results.values()} == {"digits"}
    for fact in (
        record["command"],
        f"seed: {record['seed']}",
        f"{record['images']['train']:,} training",
        record["date"],
    ):
        assert fact in card.text
    assert f"| test | {record['metrics']['test/loss']:.4f} | {record['metrics']['test/acc']:.4f} |" in card.text

    again = command(  # from the exported file, whose record and licence it keeps
        *("export", "checkpoint=out/model.safetensors", "format=torch_export", "seconds=0", "hydra.run.dir=again"),
        cwd=tmp_path,
    )
    assert (again.returncode, again.stderr) == (0, "")
    second = ModelCard.load(tmp_path / "again" / "README.md")
    assert second.data.license == "cc-by-4.0"
    assert [each.metric_value for each in second.data.eval_results] == [each.metric_value for each in results.values()]


def test_the_card_of_the_network_in_this_package_names_its_data_on_the_hub(tmp_path):
    record, licence = read_record("pretrained")
    write_card(load_classifier("pretrained"), record, licence, tmp_path / "model.safetensors")
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert header["datasets"] == ["uoft-cs/cifar100"]
    assert header["license"] == "other"
    _, results = model_index_to_eval_results(header["model-index"])
    values = {each.metric_name: (each.dataset_split, each.metric_value) for each in results}
    assert values["top-1 accuracy"] == ("validation", record["metrics"]["val/acc"])
    assert values["top-5 accuracy"] == ("validation", record["metrics"]["val/acc5"])


def test_a_readme_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    write_card(load_classifier("pretrained"), {}, "", tmp_path / "model.safetensors")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "delete it to write a new model card" in capsys.readouterr().out


def test_only_the_best_checkpoint_has_the_results_of_its_run(digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(digits_run)
    for checkpoint in (str(digits_run), "checkpoints/best.ckpt"):
        assert "test/acc" in read_record(checkpoint)[0]["metrics"]
    assert read_record("checkpoints/last.ckpt") == ({}, "")
    (tmp_path / "summary.json").write_text('{"metrics"')
    with pytest.raises(InputError, match=r"summary\.json is damaged; delete it to export without a record"):
        read_record(str(tmp_path))
