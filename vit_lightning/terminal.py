"""Output of the commands: ruled tables on a terminal, plain columns in a file or a pipe."""

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.box import HEAVY_HEAD  # rich.table is imported where a table is printed
from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")

LABELS = {"acc": "top-1", "acc5": "top-5", "balanced_acc": "balanced"}


def escape_unencodable() -> None:
    """Print characters missing from the terminal's encoding, and names that are not valid Unicode, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not getattr(rank_zero_only, "rank", 0)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a title and a table below it.

    Args:
        title: a single line.
        header: names of the columns.
        rows: each as long as ``header``, or empty for a rule.
        left: number of leading columns of words, aligned left and wrapped on a narrow terminal; the others are numbers.
    """
    terminal = sys.stdout.isatty()
    width = None if terminal else 10_000  # outside a terminal, every row fits on one line
    console = Console(force_terminal=terminal, width=width, markup=False, emoji=False)  # [x] in a name is not a style
    table = Table(box=HEAVY_HEAD if terminal else None, pad_edge=terminal)
    for number, name in enumerate(header):
        if number < left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    with console.capture() as text:  # a Console exits silently if its pipe is closed
        console.print(table)
    print(title)
    print(text.get(), end="")


def label_of(metric: str) -> str:
    """The label of a metric in tables: ``val/acc`` is top-1, and a registered metric has its own name."""
    name = metric.rpartition("/")[2]
    return LABELS.get(name, name)


def format_metric(metric: str, value: float) -> str:
    """Format the value of a metric; accuracies in percent."""
    return f"{value:.1%}" if metric.endswith(("acc", "acc5")) else f"{value:.3f}"


def with_bar(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Iterate over items, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def print_files(files: Iterable[Path]) -> None:
    """Print the paths of files, one per line, as a person would type them from here."""
    for file in files:
        print(relative(file))


def relative(path: Path) -> str:
    """The path as a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):  # the path is elsewhere, or the working directory was deleted
        return str(path)


@contextlib.contextmanager
def warn_instead(name: str) -> Iterator[None]:
    """Report on stderr that a picture could not be drawn, whatever the reason, and continue."""
    try:
        yield
    except Exception as error:
        [reason, *_] = str(error).splitlines() or [""]
        print(f"warning: cannot draw {name} ({type(error).__name__}: {reason})", file=sys.stderr)
