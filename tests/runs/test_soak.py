"""A run of many short epochs: memory, open files and speed stay as they are.

``python tests/runs/test_soak.py EPOCHS DIR`` is the long form; DIR then holds the run and ``soak.json``.
"""

import csv
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
from conftest import started

from vit_lightning.keys import from_python
from vit_lightning.provenance import provenance

pytestmark = pytest.mark.slow

RUN = [
    *("data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=2", "model.mlp_head_units=[16]"),
    *("optim=muon", "dashboard=curves", "data.batch_size=64", "test=false"),
    *("trainer.limit_train_batches=8", "trainer.limit_val_batches=1"),
]


def soak(epochs: int, folder: Path) -> dict:
    """Train for so many epochs in a process of its own and watch it from outside.

    Returns:
        The run's record, and for each fifth of it, after the first epochs, medians of resident memory in MB, of open
        files and of training images a second.
    """
    process, streams = started(
        "train", *RUN, f"trainer.max_epochs={epochs}", "hydra.run.dir=run", cwd=folder, out=folder
    )
    metrics, seen = folder / "run" / "metrics.csv", []
    while process.is_alive():
        if metrics.exists() and (epoch := metrics.read_text().count("\n") - 1) > 0:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            except (FileNotFoundError, ProcessLookupError, IndexError):  # it has just ended
                break
            seen.append((epoch, pages * 4096 / 1e6, files))
        time.sleep(0.1)
    process.join()
    assert process.exitcode == 0, streams[1].read_text()
    with metrics.open() as file:
        rows = [float(row["train/images_per_second"]) for row in csv.DictReader(file)]
    assert len(rows) == epochs
    parts = []
    for fifth in range(5):
        first, last = (5 + (epochs - 10) * (fifth + step) / 5 for step in (0, 1))  # nothing of the start and the end
        during = [sample for sample in seen if first <= sample[0] < last]
        parts.append(
            {
                "epochs": [round(first), round(last)],
                "memory_mb": statistics.median(sample[1] for sample in during),
                "open_files": statistics.median(sample[2] for sample in during),
                "images_per_second": statistics.median(rows[round(first) : round(last)]),
            }
        )
    return {"epochs": epochs, "steps": 8 * epochs, "parts": parts}


def test_memory_and_open_files_stay_as_they_are(tmp_path):
    _, early, *_, late = soak(60, tmp_path)["parts"]
    assert late["open_files"] <= early["open_files"]
    assert late["memory_mb"] < 1.02 * early["memory_mb"]


if __name__ == "__main__":
    home = Path(sys.argv[2])
    home.mkdir(parents=True, exist_ok=True)
    report = {**provenance(from_python()), **soak(int(sys.argv[1]), home)}
    (home / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["parts"], indent=2))
