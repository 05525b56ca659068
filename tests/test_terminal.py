"""What the commands print, to a terminal and to a file."""

import re

from vit_lightning.terminal import print_table

ROWS = [("a word", "1"), (), ("x" * 100, "1,234")]


def test_in_a_file_a_row_is_a_line(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as under Jupyter
    print_table("title", ("name", "number"), ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert [line.split() for line in lines[1:]] == [["name", "number"], ["a", "word", "1"], ["x" * 100, "1,234"]]
    assert len({len(line) for line in lines[1:]}) == 1  # numbers end in one column


def test_a_name_is_no_markup(capsys):
    print_table("title", ("name",), [("[bold] :cat: [/x].png",)])
    assert "[bold] :cat: [/x].png" in capsys.readouterr().out


def test_on_a_terminal_it_has_rules_and_fits(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    print_table("title", ("name", "number"), ROWS)
    out = capsys.readouterr().out
    assert "│ a word" in out
    assert "├───" in out
    assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in out.splitlines()) <= 60
