"""The list of commands."""

import re
import subprocess
import sys
from pathlib import Path

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
    assert result.stderr == "error: train is no option; python -m vit_lightning --help lists the commands\n"
