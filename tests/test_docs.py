"""What the guides say: links lead somewhere, the Python examples run, and numbers are those of the records."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
GUIDES = [path for path in ROOT.glob("*/README.md") if path.parent.name != "data"] + [ROOT / "README.md"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(guide):
    targets = re.findall(r"\]\(([^)\s]+)\)", guide.read_text(encoding="utf-8"))
    assert targets or guide.parent != ROOT
    for target in targets:
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (guide.parent / path).resolve() if path else guide
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines)) <= 100


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval")
def test_the_examples_in_python_run(tmp_path, monkeypatch, capsys):
    """All of them, one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (30, 20), 128).save("photo.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "vit_lightning" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert 0 < names["accuracy"] <= 1
    assert names["probabilities"].shape == (8, 10)
    assert names["features"].shape == (8, 1, 64)
    assert (tmp_path / "outputs" / "used" / "model.pt2").exists()


def record(name: str) -> dict:
    return json.loads((ROOT / "outputs" / "published" / name / "summary.json").read_text())


def test_the_results_table_is_that_of_the_records():
    table = {row[0].strip(): row[1:] for row in
             (line.strip("|").split("|") for line in (ROOT / "README.md").read_text().splitlines())
             if len(row) == 6}  # fmt: skip
    fast = [record(f"fast/seed-{seed}")["metrics"] for seed in range(3)]
    for key, place in (("val/acc", 0), ("val/acc5", 1)):
        values = sorted(100 * metrics[key] for metrics in fast)
        shown = table["`experiment=fast`, three seeds"][3].split("/")[place]
        assert f"{values[0]:.1f}–{values[-1]:.1f}" in shown
    good = record("good")["metrics"]
    shown = table["`experiment=good`"]
    assert shown[3].strip() == f"{100 * good['val/acc']:.1f} / {good['val/acc5']:.1%}"
    assert shown[4].strip() == f"{100 * good['test/acc']:.1f} / {good['test/acc5']:.1%}"
    tested = json.loads((ROOT / "outputs" / "published" / "best" / "evaluation.json").read_text())
    assert table["`experiment=best` ²"][4].strip() == f"{100 * tested['acc']:.1f} / {tested['acc5']:.1%}"
