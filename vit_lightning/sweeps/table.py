"""What the runs of a sweep came to: ``python -m vit_lightning.sweep summary dir=outputs/multirun/…``.

Runs that differ in nothing but their seed are one row: the mean of their results and the standard deviation.
"""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from vit_lightning.analysis.figures import draw_sweep
from vit_lightning.config import InputError
from vit_lightning.terminal import print_files, print_table

COLUMNS = ("runs", "val/acc", "val/acc ±", "accuracies", "val/acc5", "samples", "seconds", "images/s", "parameters")


def summarise(directory: Path) -> list[dict[str, Any]]:
    """A row for each setting, the best ``val/acc`` first.

    Args:
        directory: of a sweep; every ``summary.json`` below it is a run.

    Returns:
        ``setting`` (the overrides that not all runs share, but for the seed) and ``COLUMNS``: means over the runs,
        ``accuracies``, the ``val/acc`` of each, in [0, 1], and ``val/acc ±``, their sample standard deviation, ``None``
        of a single run.

    Raises:
        InputError: if there is no run.
    """
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("**/summary.json"))]
    runs = [run for run in runs if "overrides" in run]  # summaries before there were sweeps had none
    if not runs:
        raise InputError(f"dir={directory} holds no summary.json of a run that came to its end")
    shared = set.intersection(*(set(run["overrides"]) for run in runs))
    settings = defaultdict(list)
    for run in runs:
        own = [item for item in run["overrides"] if item not in shared and not item.startswith("seed=")]
        settings[" ".join(own)].append(run)
    rows = []
    for setting, group in settings.items():
        accuracies = [run["metrics"]["val/acc"] for run in group]
        rows.append(
            {
                "setting": setting,
                "runs": len(group),
                "val/acc": statistics.mean(accuracies),
                "accuracies": accuracies,
                "val/acc ±": statistics.stdev(accuracies) if len(group) > 1 else None,
                "val/acc5": statistics.mean(run["metrics"]["val/acc5"] for run in group),
                "samples": statistics.mean(run["samples_seen"] for run in group),
                "seconds": statistics.mean(run["seconds"] for run in group),
                "images/s": statistics.mean(run["train/images_per_second"] for run in group),
                "parameters": group[0]["parameters"],
            }
        )
    return sorted(rows, key=lambda row: -row["val/acc"])


def show(directory: Path) -> None:
    """Print the table of a sweep, and write it beside its runs, with a picture.

    Raises:
        InputError: if there is no run.
    """
    rows = summarise(directory)
    cells = []
    for row in rows:
        spread = "" if row["val/acc ±"] is None else f"{row['val/acc ±']:.1%}"
        shares = [f"{row['val/acc']:.1%}", spread, f"{row['val/acc5']:.1%}"]
        cells.append((row["setting"], str(row["runs"]), *shares, f"{row['seconds']:,.0f}", f"{row['images/s']:,.0f}"))
    header = ("setting", "runs", "top-1", "±", "top-5", "seconds", "images/s")
    print_table("validation, the mean over runs that differ in their seed", header, cells)
    with (directory / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("setting", *COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draw_sweep(rows).savefig(directory / "summary.png")
    print_files(directory / name for name in ("summary.csv", "summary.png"))
