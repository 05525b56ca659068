"""The list of commands, two of them at once, and the dashboard that they print how to open."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONF, command, started

import vit_lightning

MODULE = [sys.executable, "-m", "vit_lightning"]


def test_every_command_is_listed(tmp_path):
    result = subprocess.run([*MODULE, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    commands = {
        path.stem
        for path in Path(vit_lightning.__path__[0]).glob("*.py")
        if path.stem != "__main__" and '__name__ == "__main__"' in path.read_text()
    }
    assert set(re.findall(r"python -m vit_lightning\.(\w+)", result.stdout)) == commands


def test_anything_else_is_a_mistake(tmp_path):
    result = subprocess.run([*MODULE, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: unknown argument train; python -m vit_lightning --help lists the commands\n"


def test_the_table_of_keys_is_that_of_the_schema(tmp_path):
    result = subprocess.run([*MODULE, "keys"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout in (CONF / "README.md").read_text(), "run python -m vit_lightning keys"
    assert "| `model.layers=8` | Number of transformer blocks. | train, benchmark, search |" in result.stdout


def test_a_shell_completes_groups_and_keys(tmp_path):
    for line, expected in (("vit-train model.la", "model.layers="), ("vit-train model=", "model=conv_large")):
        words = command("train", "-sc", "query=bash", cwd=tmp_path, env={**os.environ, "COMP_LINE": line})
        assert expected in words.stdout.split()


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_two_that_are_started_together_get_two_directories(digits_run, tmp_path, name):
    run = [f"checkpoint={digits_run}", "data=digits"]
    arguments = {
        "train": ["experiment=quickstart", "trainer.max_epochs=1", "model.layers=1", "dashboard=curves"],
        "evaluate": run,
        "predict": [run[0], f"images={digits_run / 'patches.png'}"],
    }[name]
    processes = []
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        processes.append(started(name, *arguments, cwd=digits_run.parent, out=tmp_path / number)[0])
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "0" / "err").read_text()
    last = "curves.png" if name == "train" else "predictions.csv"
    written = [
        {line.split()[-1] for line in (tmp_path / number / "out").read_text().splitlines() if line.endswith(last)}
        for number in ("0", "1")
    ]
    assert len(written[0] | written[1]) == 2
    for path in written[0] | written[1]:
        assert (digits_run.parent / path).exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_this_machine_sees_the_dashboard(tmp_path):
    from tensorboard.program import TensorBoard

    board = TensorBoard()
    options = ["--logdir", str(tmp_path), "--port", "0", "--load_fast", "false", "--reload_interval", "0"]
    board.configure(argv=[None, *options])
    server = board._make_server()
    try:
        assert server.server_address[0] in ("127.0.0.1", "::1")
    finally:
        server.server_close()
