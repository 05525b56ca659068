"""The table of a sweep. Runs that differ only in seed or fold form one row, with their mean and standard deviation."""

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
from vit_lightning.terminal import format_metric, label_of, print_files, print_table, relative, warn_instead

AVERAGED = ("samples", "seconds", "images/s")


def read_run(path: Path) -> dict[str, Any] | None:
    """Read what the table shows from a run's ``summary.json``; ``None``, with a warning, if the file is invalid."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: float(value) for name, value in run["metrics"].items() if name.startswith("val/")}
        monitor = run.get("config", {}).get("monitor", "val/acc")
        metrics[monitor]  # without validation, there is nothing to compare
        return {
            "overrides": [str(item) for item in run["overrides"]],
            "monitor": (monitor, run.get("mode", "max")),
            "metrics": metrics,
            "samples": int(run["samples_seen"]),
            "seconds": float(run["seconds"]),
            "images/s": float(run["train/images_per_second"]),
            "parameters": int(run["parameters"]),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        print(f"warning: {relative(path)} is damaged or not the summary of a run; it is left out", file=sys.stderr)
        return None


def summarise(directory: Path) -> list[dict[str, Any]]:
    """Return a row for each setting, the best first.

    Args:
        directory: directory of a sweep; every ``summary.json`` below it is a run.

    Returns:
        ``setting`` (the overrides that not all runs share, except seed and fold), ``runs`` (their number), ``monitor``
        (the metric that decides: that of the runs, or ``val/acc`` if they differ), ``values`` of it in each run, then
        each ``val/…`` metric that a run logged: its mean over the runs, and the monitored one's sample standard
        deviation as ``val/acc ±``. What the runs do not have is ``None``, as is the deviation of a single run.

    Raises:
        InputError: if there is no run.
    """
    runs = [run for path in sorted(directory.rglob(SUMMARY)) if (run := read_run(path))]
    if not runs:
        raise InputError(f"dir={directory} has no summary.json of a finished run")
    monitors = {run["monitor"] for run in runs}
    monitor, mode = monitors.pop() if len(monitors) == 1 else ("val/acc", "max")
    names = dict.fromkeys(sorted((name for run in runs for name in run["metrics"]), key="val/loss".__eq__))
    shared = set.intersection(*(set(run["overrides"]) for run in runs))
    settings = defaultdict(list)
    for run in runs:
        own = [item for item in run["overrides"] if item not in shared and not item.startswith(("seed=", "data.fold="))]
        settings[" ".join(own)].append(run)
    rows = []
    for setting, group in settings.items():
        values = [run["metrics"][monitor] for run in group]
        means = {}
        for name in dict.fromkeys([monitor, *names]):
            logged = [run["metrics"][name] for run in group if name in run["metrics"]]
            means[name] = statistics.mean(logged) if logged else None
            if name == monitor:
                means[f"{name} ±"] = statistics.stdev(values) if len(group) > 1 else None
        first = {"setting": setting, "runs": len(group), "monitor": monitor, "values": values}
        last = {key: statistics.mean(run[key] for run in group) for key in AVERAGED}
        rows.append({**first, **means, **last, "parameters": group[0]["parameters"]})
    return sorted(rows, key=lambda row: row[monitor], reverse=mode == "max")


def draw_sweep(rows: Sequence[Mapping[str, Any]], title: str = "Validation by setting") -> Figure:
    """Draw the monitored metric of each setting of a sweep: its runs, mean and standard deviation; the best on top.

    A dotted line marks the mean of the setting ``base``, as in ``ablation=base``, if there is one.

    Args:
        rows: from :func:`summarise`.
        title: of the figure.
    """
    names = [shorten(row["setting"] or "all runs", 60) for row in rows]
    figure = TitledFigure(7 + 0.07 * max(map(len, names)), 1.6 + 0.3 * len(rows), title)
    axes = figure.subplots()
    monitor = rows[0]["monitor"]
    percent = format_metric(monitor, 1).endswith("%")
    scale = 100 if percent else 1
    for place, row in enumerate(rows):
        runs = [scale * value for value in row["values"]]
        axes.plot(runs, [place] * len(runs), "o", color=TRAIN, alpha=0.5, label="run" if place == 0 else None)
        mean, spread = scale * row[monitor], scale * (row[f"{monitor} ±"] or 0)
        if len(runs) > 1:
            axes.errorbar(mean, place, xerr=spread, fmt="|", color=VAL, capsize=4, markersize=12)
        if row["setting"].partition("=")[2] == "base":
            axes.axvline(mean, color="black", linestyle=":", linewidth=1, label="base")
    if any(len(row["values"]) > 1 for row in rows):
        axes.plot([], [], "|", color=VAL, markersize=12, label="mean and standard deviation")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.set(xlabel=f"validation {label_of(monitor)}{' (%)' if percent else ''}")
    figure.legend(loc="outside lower right", ncols=3)
    return figure


def show(directory: Path) -> None:
    """Print the table of a sweep, and write it to ``summary.csv`` and ``summary.png`` in the sweep's directory.

    Raises:
        InputError: if there is no run, or summary.csv cannot be written.
    """
    rows = summarise(directory)
    measures = [name for name in rows[0] if name.startswith("val/")]
    cells = []
    for row in rows:
        texts = ("" if row[name] is None else format_metric(name.removesuffix(" ±"), row[name]) for name in measures)
        cells.append((row["setting"], str(row["runs"]), *texts, f"{row['seconds']:,.0f}", f"{row['images/s']:,.0f}"))
    labels = ("±" if name.endswith("±") else label_of(name) for name in measures)
    header = ("setting", "runs", *labels, "seconds", "images/s")
    print_table("validation, mean over the runs that differ only in seed or fold", header, cells)
    try:
        write_csv(directory / "summary.csv", [list(rows[0]), *(list(row.values()) for row in rows)])
    except OSError as error:
        raise InputError(f"dir={directory}: summary.csv cannot be written ({error.strerror or error})") from error
    print_files([directory / "summary.csv"])
    with warn_instead("the settings"):
        title = f"Validation {label_of(rows[0]['monitor'])} by setting\n{relative(directory)}"
        save_figure(draw_sweep(rows, title), directory / "summary.png")
        print_files([directory / "summary.png"])
