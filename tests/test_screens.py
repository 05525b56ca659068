"""What a person sees on a terminal of 80 and of 120 columns while a run trains: every screen is kept and read."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pyte
import pytest
from conftest import command

SMALL = [
    *("experiment=quickstart", "model.image_size=8", "model.patch_size=2", "model.layers=2", "dashboard=curves"),
    *("trainer.max_epochs=12", "data.batch_size=16", "hydra.run.dir=run"),
]


def screens(arguments: list[str], columns: int, lines: int, cwd: Path) -> list[list[str]]:
    """The screens that a command leaves on a terminal, one each time that it has written, and the last one."""
    screen = pyte.HistoryScreen(columns, lines, history=1000)
    stream = pyte.ByteStream(screen)
    primary, secondary = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": str(lines), "TERM": "xterm-256color"}
    process = subprocess.Popen(arguments, cwd=cwd, env=env, stdin=secondary, stdout=secondary, stderr=secondary)
    os.close(secondary)
    kept = []
    while True:
        try:
            content = os.read(primary, 65536)
        except OSError:  # closed by the process's end
            break
        stream.feed(content)
        kept.append([line.rstrip() for line in screen.display])
    assert process.wait() == 0, "\n".join(kept[-1])
    above = ["".join(line[x].data for x in range(columns)).rstrip() for line in screen.history.top]
    return [*kept, [*above, *(line.rstrip() for line in screen.display)]]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_every_epoch_leaves_one_line_and_the_bar_none(start, columns, lines):
    arguments = [sys.executable, "-m", "vit_lightning.train", *SMALL[:-1], f"hydra.run.dir={columns}"]
    *during, last = screens(arguments, columns, lines, start)
    rows = [line.split() for line in last if re.match(r" *\d+/12 ", line)]
    assert [row[0] for row in rows] == [f"{epoch}/12" for epoch in range(1, 13)]
    assert all(len(row) == 8 for row in rows)  # loss, top-1, loss, top-1, speed, time and its unit
    assert sum("train loss" in line for line in last) == 1
    assert not [line for line in last if "━━━━━" in line and not set(line) <= set("┏━┳┓┡╇┩┗┻┛┃ │─┬┐└┴┘├┼┤╵╷")]
    bars = [line for screen in during for line in screen if re.match(r"epoch \d+/12 ", line)]
    assert bars
    assert {line.split()[1] for line in bars} <= {f"{epoch}/12" for epoch in range(1, 13)}
    for screen in during:  # never two bars, nor one above a line
        places = [number for number, line in enumerate(screen) if re.match(r"(epoch|validation|test) .*━", line)]
        assert len(places) <= 1
        assert not places or not any(screen[places[0] + 1 :])


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "export", "search", "benchmark"])
def test_help_fits_80_columns(name, tmp_path):
    assert max(map(len, command(name, "--help", cwd=tmp_path).stdout.splitlines())) <= 80
