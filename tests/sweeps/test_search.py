"""The search command: complete and killed studies on the digits, and invalid spaces."""

import contextlib
import importlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import optuna
import pytest
from conftest import command, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from optuna.trial import TrialState
from PIL import Image

from vit_lightning.config import Config, OptimConfig
from vit_lightning.keys import InputError, Invocation
from vit_lightning.schemas import SearchConfig, SearchRun
from vit_lightning.sweeps import search
from vit_lightning.sweeps.search import typed

TINY = ["data=digits", "model.image_size=8", "model.patch_size=2", "model.layers=1", "model.mlp_head_units=[]"]
SPACE = "{optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}, optim.weight_decay: {low: 0, high: 1, step: 0.1}}"
SHORT = [*TINY, "trainer.max_epochs=3", "data.batch_size=128", "~space", f"+space={SPACE}"]


def study_of(folder, name="study"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/outputs/search/{name}/study.db")


@pytest.mark.slow
def test_a_search_trains_its_trials_and_says_how_to_run_the_best_again(tmp_path):
    arguments = [*SHORT, "search.trials=3", "search.seed=0", "search.prune=false"]
    result = command("search", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    study = study_of(tmp_path)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    folder = tmp_path / "outputs" / "search" / "study"
    for trial in study.trials:
        summary = json.loads((folder / f"trial-{trial.number:04}" / "summary.json").read_text())
        assert summary["metrics"]["val/acc"] == pytest.approx(trial.value)
        assert "test/acc" not in summary["metrics"]
        values = [f"{key}={value}" for key, value in trial.params.items()]
        assert summary["overrides"][-len(values) :] == values
        assert summary["command"].endswith(" ".join(values))
        for key, value in trial.params.items():
            group, name = key.split(".")
            assert summary["config"][group][name] == pytest.approx(value)
        assert 1e-4 <= trial.params["optim.lr"] <= 1e-2
    *_, history, importances, again = result.stdout.splitlines()
    assert (history, importances) == ("outputs/search/study/history.png", "outputs/search/study/importances.png")
    for picture in (history, importances):
        Image.open(tmp_path / picture).verify()
    best = [f"{key}={value}" for key, value in study.best_params.items()]
    settings = [item for item in SHORT if "space" not in item]
    assert shlex.split(again) == ["python", "-m", "vit_lightning.train", *settings, *best]

    more = command("search", *[item.replace("trials=3", "trials=4") for item in arguments], cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("trial 3: ") == 1
    assert len(study_of(tmp_path).trials) == 4

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [str(Path(sys.executable).with_name("optuna-dashboard")), "sqlite:///outputs/search/study/study.db"]
    with subprocess.Popen([*program, "--port", port], cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        for _ in range(300):
            time.sleep(0.1)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies") as answer:
                [shown] = json.load(answer)["study_summaries"]
                break
        server.terminate()
    assert shown["study_name"] == "study"


def test_a_search_for_the_lowest_loss_finds_it(tmp_path):
    arguments = [*SHORT, "monitor=val/loss", "search.trials=3", "search.seed=0", "search.prune=false"]
    result = command("search", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    study = study_of(tmp_path)
    files = sorted((tmp_path / "outputs" / "search" / "study").glob("trial-*/summary.json"))
    losses = [json.loads(path.read_text())["metrics"]["val/loss"] for path in files]
    assert [trial.value for trial in study.trials] == pytest.approx(losses)
    assert study.best_value == min(losses) < max(losses)
    table = [line.split() for line in result.stdout.splitlines()]
    [header] = [number for number, cells in enumerate(table) if cells[:1] == ["trial"] and "val/loss" in cells]
    shown = [float(cells[-1]) for cells in table[header + 1 : header + 4]]
    assert shown == pytest.approx(sorted(losses), abs=1e-3)


@pytest.mark.slow
def test_a_dead_workers_trial_is_taken_up_where_it_stopped(tmp_path):
    arguments = [*SHORT, "search.trials=2", "search.heartbeat=1", "search.prune=false", "trainer.max_epochs=6"]
    killed = [sys.executable, "-m", "vit_lightning.search", *arguments]
    with subprocess.Popen(killed, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.split()[:1] == ["3/6"]:
                process.kill()
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.RUNNING]
    time.sleep(3)  # two heartbeats and more
    result = command("search", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "continuing outputs/search/study/trial-0000 from step " in result.stdout
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    dead, heir = study_of(tmp_path).trials[:2]
    assert heir.params == dead.params
    assert sorted(heir.intermediate_values)[-3:] == [4, 5, 6]
    assert len(heir.intermediate_values) < 6  # not from the start


def test_a_trial_that_promises_nothing_is_pruned(tmp_path):
    """The study has a trial that reached 90% in its first epoch."""
    folder = tmp_path / "outputs" / "search" / "study"
    folder.mkdir(parents=True)
    domain = optuna.distributions.FloatDistribution(1e-9, 2e-9)
    good = optuna.create_trial(
        value=0.9, params={"optim.lr": 1e-9}, distributions={"optim.lr": domain}, intermediate_values={1: 0.9, 2: 0.9}
    )
    study = optuna.create_study(study_name="study", storage=f"sqlite:///{folder}/study.db", direction="maximize")
    study.add_trial(good)
    overrides = sorted([*TINY, "trainer.max_epochs=3"])
    study.set_user_attr("settings", {"space": {"optim.lr": {"low": 1e-9, "high": 2e-9}}, "overrides": overrides})
    space = ["~space", "+space={optim.lr: {low: 1.0e-9, high: 2.0e-9}}"]
    settings = ["search.trials=2", "search.startup=1", "search.warmup=0"]
    result = command("search", *TINY, "trainer.max_epochs=3", *settings, *space, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trial 1: pruned after epoch 1" in result.stdout
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.COMPLETE, TrialState.PRUNED]


def test_values_that_do_not_go_together_end_their_trial_alone(tmp_path):
    space = ["~space", "+space={model.heads: {low: 5, high: 7, step: 2}}"]
    result = command("search", *TINY, "search.trials=3", *space, cwd=tmp_path)
    assert result.returncode == 1
    errors = result.stdout.count("model.embed_dim=64 is not divisible by model.heads=")
    repeated = result.stdout.count("already tried as trial")
    assert errors + repeated == 3
    assert repeated >= 1  # there are only two combinations
    assert result.stderr == "error: search: no trial finished; increase search.timeout or change the space\n"


def test_a_disk_that_takes_no_trial_ends_the_search(tmp_path):
    trial = tmp_path / "outputs" / "search" / "study" / "trial-0000"
    trial.mkdir(parents=True)
    (trial / "checkpoints").write_text("where the directory should be")
    result = command("search", *SHORT, "search.trials=3", cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert "trial-0000/checkpoints cannot be written (" in line
    assert [trial.state for trial in study_of(tmp_path).trials] == [TrialState.FAIL]


def test_a_search_ends_with_its_time(tmp_path):
    result = command("search", *SHORT, "search.trials=1000", "search.timeout=1", "search.prune=false", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 1 <= len(study_of(tmp_path).trials) <= 3


def test_a_study_that_is_not_ours_is_refused(tmp_path):
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path}/theirs.db", direction="minimize")
    result = command("search", *SHORT, "search.storage=sqlite:///theirs.db", cwd=tmp_path)
    assert result.returncode == 1
    assert "search.study=study in sqlite:///theirs.db has another space or other settings" in result.stderr


def test_a_combination_is_trained_once(tmp_path):
    space = ["~space", "+space={optim.name: {choices: [adamw]}}"]
    arguments = [*TINY, "trainer.max_epochs=1", "data.batch_size=512", *space, "search.trials=3"]
    result = command("search", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already tried as trial 0") == 2
    assert len({trial.value for trial in study_of(tmp_path).trials}) == 1
    assert [path.name for path in (tmp_path / "outputs/search/study").glob("trial-*")] == ["trial-0000"]
    assert not (tmp_path / "outputs/search/study/importances.png").exists()  # all values are the same


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_seed_gives_one_sequence_of_proposals_over_restarts(tmp_path, sampler, monkeypatch):
    """The values are those of one uninterrupted search, and no restart repeats the first ones."""
    monkeypatch.setattr(search, "train", lambda config, *args: min(0.9, 100 * config.optim.lr))
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2}}
    proposals = {}
    for name, starts in (("once", [6]), ("restarted", [2, 3, 6])):
        (tmp_path / name).mkdir()
        for trials in starts:
            settings = SearchConfig(study=name, trials=trials, sampler=sampler, seed=3, prune=False)
            config = SearchRun(search=settings, space=space)
            compose = lambda items: Config(optim=OptimConfig(lr=float(items[-1].partition("=")[2])))  # noqa: E731
            search.search(config, tmp_path / name, Invocation("search", [], compose))
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/{name}/study.db")
        proposals[name] = [trial.params["optim.lr"] for trial in study.trials]
    assert proposals["once"] == proposals["restarted"]
    assert len(set(proposals["once"])) == 6


VALUES = [
    "a=b",
    "run (1)",
    "null",
    "true",
    "1e3",
    "12",
    "",
    " ",
    "it's",
    'say "no"',
    "a,b",
    "[x]",
    "{y}",
    "C:\\x\\",
    "a\\'b",
]


@pytest.mark.parametrize("value", [*VALUES, "adamw", "a/b-c.d", "ü", None, True, 0.1, 1e-9, 3])
def test_typed_values_are_read_back_by_hydra(value):
    [override] = typed({"group.key": value})
    read = OverridesParser.create().parse_override(override).value()
    read = read.text if isinstance(read, QuotedString) else read
    assert type(read) is type(value)
    assert read == value


def test_a_missing_optuna_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "vit_lightning.sweeps.search")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"vit_lightning\.search needs optuna: pip install -e"):
        importlib.import_module("vit_lightning.sweeps.search")


def test_plain_values_are_typed_without_quotes():
    assert typed({"model.layer_scale": None, "optim.lr": 0.1, "optim.name": "muon"}) == [
        *("model.layer_scale=null", "optim.lr=0.1", "optim.name=muon")
    ]


@pytest.mark.slow
def test_two_workers_share_a_study(tmp_path):
    arguments = [sys.executable, "-m", "vit_lightning.search", *SHORT, "search.trials=4", "search.prune=false"]
    workers = [subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, stderr = worker.communicate()
        assert worker.returncode == 0, stderr
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert states.count(TrialState.COMPLETE) in (4, 5)  # the last two may have begun at once
    folders = sorted(path.name for path in (tmp_path / "outputs/search/study").glob("trial-*/summary.json"))
    assert len(folders) == len(states)


@pytest.mark.slow
def test_a_storage_of_something_else_is_refused(tmp_path):
    first = command("search", *SHORT, "search.trials=1", "search.prune=false", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    other = command("search", *SHORT, "search.trials=1", "model.dropout=0.2", cwd=tmp_path)
    assert other.returncode == 1
    assert "error: search.study=study in sqlite:///" in other.stderr
    assert "has another space or other settings; choose another name" in other.stderr
    (tmp_path / "notes.txt").write_text("no database at all" * 100)
    wrong = command("search", *SHORT, "search.storage=sqlite:///notes.txt", "search.study=b", cwd=tmp_path)
    assert wrong.returncode == 1
    [line] = wrong.stderr.splitlines()
    assert line.startswith("error: search.storage=sqlite:///notes.txt cannot be opened as the storage of a study (")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{optim.lrr: {low: 1, high: 2}}", "optim.lrr is not a key of the configuration"),
        ("{optim.lr: 3}", "optim.lr must have {choices: [a, b]} or {low: 1, high: 4} with step or log, not 3"),
        ("{optim.lr: {low: 1}}", "optim.lr must have {choices: "),
        ("{optim.lr: {low: 2, high: 1}}", "low=2 of optim.lr must be less than high=1"),
        ("{optim.lr: {low: 0, high: 1, log: true}}", "optim.lr on a log scale needs a positive low"),
        ("{optim.lr: {low: a, high: 1}}", "low, high and step of optim.lr must be numbers"),
        ("{optim.lr: {low: 0, high: 1, stop: 3}}", "optim.lr has stop, which is not known"),
        ("{model.layers: {choices: []}}", "the choices of model.layers must be a list of one or more"),
        ("{model.mlp_head_units: {choices: [[16], []]}}", "model.mlp_head_units has the choice [16]; choices are"),
        ("{model.layers: {choices: [{a: 1}]}}", "model.layers has the choice {'a': 1}; choices are numbers"),
        ("{optim.lr: {low: 0, high: 1, step: 0}}", "low, high and step of optim.lr must be numbers, and step positive"),
        ("{}", "space= is empty"),
    ],
)
def test_a_space_that_cannot_be_is_refused(space, message):
    with pytest.raises(InputError) as error:
        composed("~space", f"+space={space}", name="search")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "setting", ["search.sampler=tpee", "search.trials=0", "search.heartbeat=0", "search.study=a/b"]
)
def test_settings_of_the_search_are_checked(setting):
    with pytest.raises(InputError, match=setting.replace("=", ".")):
        composed(setting, name="search")
