"""The table of a sweep. Runs that differ only in seed or fold are one row: the mean and standard deviation of each."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vit_lightning.analysis.figures import TRAIN, VAL, TitledFigure, shorten
from vit_lightning.files import SUMMARY, save_figure, write_csv
from vit_lightning.keys import InputError
from vit_lightning.terminal import print_files, print_table, relative, warn_instead

COLUMNS = ("runs", "val/acc", "val/acc ±", "accuracies", "val/acc5", "samples", "seconds", "images/s", "parameters")


def read_run(path: Path) -> dict[str, Any] | None:
    """What the table shows of a run's ``summary.json``; ``None``, with a warning, if the file is not one."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {
            "overrides": [str(item) for item in run["overrides"]],
            "val/acc": float(run["metrics"]["val/acc"]),
            "val/acc5": float(run["metrics"]["val/acc5"]),
            "samples": int(run["samples_seen"]),
            "seconds": float(run["seconds"]),
            "images/s": float(run["train/images_per_second"]),
            "parameters": int(run["parameters"]),
        }
    except (OSError, ValueError, LookupError, TypeError):
        print(f"warning: {relative(path)} is damaged or not the summary of a run; it is left out", file=sys.stderr)
        return None


def summarise(directory: Path) -> list[dict[str, Any]]:
    """A row for each setting, the best ``val/acc`` first.

    Args:
        directory: of a sweep; every ``summary.json`` below it is a run.

    Returns:
        ``setting`` (the overrides that not all runs share, except seed and fold) and ``COLUMNS``: means over the runs,
        ``accuracies``, the ``val/acc`` of each, in [0, 1], and ``val/acc ±``, their sample standard deviation, ``None``
        for a single run.

    Raises:
        InputError: if there is no run.
    """
    runs = [run for path in sorted(directory.rglob(SUMMARY)) if (run := read_run(path))]
    if not runs:
        raise InputError(f"dir={directory} has no summary.json of a finished run")
    shared = set.intersection(*(set(run["overrides"]) for run in runs))
    settings = defaultdict(list)
    for run in runs:
        own = [item for item in run["overrides"] if item not in shared and not item.startswith(("seed=", "data.fold="))]
        settings[" ".join(own)].append(run)
    rows = []
    for setting, group in settings.items():
        accuracies = [run["val/acc"] for run in group]
        averaged = ("val/acc", "val/acc5", "samples", "seconds", "images/s")
        means = {key: statistics.mean(run[key] for run in group) for key in averaged}
        rows.append(
            {
                "setting": setting,
                "runs": len(group),
                "accuracies": accuracies,
                "val/acc ±": statistics.stdev(accuracies) if len(group) > 1 else None,
                "parameters": group[0]["parameters"],
                **means,
            }
        )
    return sorted(rows, key=lambda row: -row["val/acc"])


def draw_sweep(rows: Sequence[Mapping[str, Any]], title: str = "Validation accuracy by setting") -> Figure:
    """Validation accuracy of each setting of a sweep: its runs, their mean and standard deviation; the best on top.

    A dotted line marks the mean of the setting ``base``, as in ``ablation=base``, where there is one.

    Args:
        rows: from :func:`summarise`.
        title: of the figure.
    """
    names = [shorten(row["setting"] or "all runs", 60) for row in rows]
    figure = TitledFigure(7 + 0.07 * max(map(len, names)), 1.6 + 0.3 * len(rows), title)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        runs = [100 * accuracy for accuracy in row["accuracies"]]
        axes.plot(runs, [place] * len(runs), "o", color=TRAIN, alpha=0.5, label="run" if place == 0 else None)
        mean, spread = 100 * row["val/acc"], 100 * (row["val/acc ±"] or 0)
        if len(runs) > 1:
            axes.errorbar(mean, place, xerr=spread, fmt="|", color=VAL, capsize=4, markersize=12)
        if row["setting"].partition("=")[2] == "base":
            axes.axvline(mean, color="black", linestyle=":", linewidth=1, label="base")
    if any(len(row["accuracies"]) > 1 for row in rows):
        axes.plot([], [], "|", color=VAL, markersize=12, label="mean and standard deviation")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.set(xlabel="validation top-1 (%)")
    figure.legend(loc="outside lower right", ncols=3)
    return figure


def show(directory: Path) -> None:
    """Print the table of a sweep, and write it to ``summary.csv`` and ``summary.png`` in the sweep's directory.

    Raises:
        InputError: if there is no run, or summary.csv cannot be written.
    """
    rows = summarise(directory)
    cells = []
    for row in rows:
        spread = "" if row["val/acc ±"] is None else f"{row['val/acc ±']:.1%}"
        shares = [f"{row['val/acc']:.1%}", spread, f"{row['val/acc5']:.1%}"]
        cells.append((row["setting"], str(row["runs"]), *shares, f"{row['seconds']:,.0f}", f"{row['images/s']:,.0f}"))
    header = ("setting", "runs", "top-1", "±", "top-5", "seconds", "images/s")
    print_table("validation, mean over the runs that differ only in seed or fold", header, cells)
    columns = ("setting", *COLUMNS)
    try:
        write_csv(directory / "summary.csv", [columns, *([row[name] for name in columns] for row in rows)])
    except OSError as error:
        raise InputError(f"dir={directory}: summary.csv cannot be written ({error.strerror or error})") from error
    print_files([directory / "summary.csv"])
    with warn_instead("the settings"):
        title = f"Validation accuracy by setting\n{relative(directory)}"
        save_figure(draw_sweep(rows, title), directory / "summary.png")
        print_files([directory / "summary.png"])
