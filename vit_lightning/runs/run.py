"""Find which run a directory contains: a new one, an interrupted one to continue, or a finished one."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from vit_lightning import register
from vit_lightning.config import MAY_CHANGE, MAY_GROW, Config
from vit_lightning.data.module import ImageData
from vit_lightning.files import RunFiles, cannot_write
from vit_lightning.keys import InputError, Invocation, MachineError, flatten, sections
from vit_lightning.recipe.weights import verify_checkpoint
from vit_lightning.runs.checkpoints import latest_valid
from vit_lightning.terminal import is_first, relative


@dataclass(slots=True)
class Run:
    """A run and its state.

    Attributes:
        config: its configuration.
        files: its files.
        checkpoint: path of the checkpoint that it continues from; ``None`` if it starts from the beginning.
        content: the content of that checkpoint.
        step: number of optimizer steps before the checkpoint; ``None`` for a new run.
        result: its best value of ``config.monitor``, if it is finished.
    """

    config: Config
    files: RunFiles
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    step: int | None = None
    result: float | None = None

    @property
    def folder(self) -> Path:
        """Its directory."""
        return self.files.folder


@contextlib.contextmanager
def lock_run(config: Config, run_dir: Path, invocation: Invocation) -> Iterator[Run]:
    """Find the run that a configuration asks for, and keep other processes from writing to its directory.

    Args:
        config: the configuration; ``config.resume`` may name the run's directory.
        run_dir: a new directory, or that of the same run, started earlier.
        invocation: the invocation, which tells which keys were set on the command line.

    Raises:
        InputError: if there is no such run, it cannot be continued, or another process is writing to it.
        MachineError: if its directory cannot be written.
    """
    if config.resume is not None:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # created by Hydra for a new run; rmdir intentionally fails if it is not empty
        run_dir = Path(config.resume).expanduser()
        if not RunFiles(run_dir).config.exists():
            raise InputError(f"resume={config.resume} is not the directory of a run, such as outputs/…")
    files = RunFiles(run_dir)
    lock = FileLock(files.lock)
    try:
        try:
            if is_first():
                lock.acquire(timeout=0)
            run = find_run(config, run_dir, invocation)
        except Timeout as error:
            raise InputError(f"{relative(run_dir)} is in use by another process; wait for it or stop it") from error
        except OSError as error:
            raise MachineError(cannot_write(error, run_dir)) from error
        yield run
    finally:
        if lock.is_locked:
            if not files.config.exists():  # the run has not started
                files.lock.unlink(missing_ok=True)
            lock.release()


def find_run(config: Config, run_dir: Path, invocation: Invocation) -> Run:
    """Find the run of ``config.resume``, or else the one in ``run_dir``, or a new one if there is none.

    Raises:
        InputError: if the directory contains another run, or one that cannot be continued.
    """
    files = RunFiles(run_dir)
    if config.resume is not None:
        return find_resumed(config, files, invocation)
    if not files.config.exists():
        return Run(config, files)
    saved = read_config(files)
    ours, theirs = (settings_of(each) for each in (follow_saved(config, saved), saved))
    if any(ours[key] != theirs[key] for key in theirs.keys() - MAY_CHANGE | {"test"}):
        hint = "choose a new hydra.run.dir (in a sweep hydra.sweep.dir) or remove that setting"
        raise InputError(f"{relative(run_dir)} contains another run; {hint}")
    if files.summary.exists():
        # A run without validation has no such metric.
        return Run(config, files, result=read_summary(files)["metrics"].get(config.monitor, math.nan))
    return find_checkpoint(config, saved, files)


def find_resumed(config: Config, files: RunFiles, invocation: Invocation) -> Run:
    """Find the run of ``config.resume``, with its own configuration updated by what ``config`` changes.

    Raises:
        InputError: if the run is finished, cannot be continued, or ``config`` sets a key that may not change.
    """
    saved = read_config(files)
    given = follow_saved(replace(config, resume=None), saved)
    ours, theirs = settings_of(given), settings_of(saved)
    typed = keys_set(ours, invocation)
    other = sorted(key for key in typed - MAY_CHANGE - set(MAY_GROW) if ours[key] != theirs[key])
    if other:
        own = ", ".join(f"{key}={theirs[key]}" for key in other)
        raise InputError(f"a resumed run keeps its configuration ({own}); remove {', '.join(other)}")
    if ours["callbacks"] != theirs["callbacks"]:  # callbacks named in a run's file are never built
        names = f"callbacks=[{','.join(saved.callbacks)}]"
        raise InputError(f"resume={config.resume} was trained with {names}; set them, with the same settings")
    for key, amount in (
        ("trainer.max_epochs", int),
        ("trainer.max_steps", lambda limit: limit or math.inf),
        ("trainer.max_time", seconds),
    ):
        if key in typed and amount(ours[key]) < amount(theirs[key]):
            raise InputError(f"{key}={ours[key]} is less than the run's {theirs[key]}; increase or remove it")
    if files.summary.exists():
        epochs = saved.trainer.max_epochs
        all_epochs = read_summary(files)["epochs"] == epochs
        ended_by: list[str] = [
            key for key in MAY_GROW if (key == "trainer.max_epochs") == all_epochs and theirs[key] is not None
        ]
        if not any(key in typed and ours[key] != theirs[key] for key in ended_by):
            ends = " and ".join(f"{key}={theirs[key]}" for key in ended_by) or "a callback ended it"
            hint = f"set trainer.max_epochs={2 * epochs}" if all_epochs else f"set a higher {' or '.join(ended_by)}"
            hint = f"to extend it, {hint}" if ended_by else f"start a new run from it with checkpoint={config.resume}"
            raise InputError(f"resume={config.resume} is already finished ({ends}); {hint}")
    values = {key: ours[key] for key in typed & {*MAY_CHANGE, *MAY_GROW}}
    parts: dict[str, Any] = {}
    for name in sections(Config):
        own_values = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        parts[name] = replace(getattr(saved, name), **own_values)
    parts |= {key: value for key, value in values.items() if "." not in key}
    run = find_checkpoint(replace(saved, **parts), saved, files)
    if run.checkpoint is None:
        raise InputError(f"resume={config.resume} has no {relative(files.last)} to continue from; start a new run")
    return run


def settings_of(config: Config) -> dict[str, Any]:
    """All keys, as they are typed, except the loggers, which may always change."""
    groups = {name: value for name, value in asdict(config).items() if name not in ("callbacks", "logger")}
    return {**flatten(groups), "callbacks": config.callbacks}


def seconds(time: str | None) -> float:
    """Convert ``trainer.max_time`` (days:hours:minutes:seconds) to seconds; infinite if there is no limit."""
    if time is None:
        return math.inf
    days, hours, minutes, rest = map(int, time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def keys_set(ours: dict[str, Any], invocation: Invocation) -> set[str]:
    """The keys that a command line sets, by name or with a file of a group.

    A file of a group sets the keys of that group, with these exceptions. ``data``: of the keys that may change, only
    those that differ from their default, so that the run keeps its directories. ``trainer``: only keys that may change
    or differ from their default. Another group (``experiment``) or a caller from Python sets all keys that differ from
    their default.
    """
    default = settings_of(Config())
    changed = {key for key in ours if ours[key] != default[key]}
    if invocation.overrides is None:
        return changed
    keys = invocation.keys & ours.keys()
    for group in invocation.keys - ours.keys():
        part = {key for key in ours if key.startswith(f"{group}.")}
        if group == "trainer":
            part &= MAY_CHANGE | changed
        elif group == "data":
            part -= MAY_CHANGE - changed
        keys |= part or changed
    return keys


def find_checkpoint(config: Config, saved: Config, files: RunFiles) -> Run:
    """Return a run that continues from its latest valid checkpoint; newer, corrupt ones are reported on stderr.

    Args:
        config: the configuration to continue with.
        saved: the configuration in the run's directory.
        files: the run's files.

    Raises:
        InputError: if all checkpoints are corrupt, they belong to another run, or the best weights are lost.
    """
    checkpoint, content, problems = latest_valid(files)
    if checkpoint is None:
        if problems:
            raise InputError(f"{'; '.join(problems)}; there is no other checkpoint, so start a new run")
        return Run(config, files, step=0)
    if is_first():
        for problem in problems:
            print(f"warning: {problem}; continuing from {relative(checkpoint)}", file=sys.stderr)
        if problems:  # otherwise, the next save would replace the valid one with it
            files.last.replace(files.damaged)
    check_same_config(saved, content, files, checkpoint)
    check_best(content, files, checkpoint)
    return Run(config, files, checkpoint, content, content["global_step"])


def check_same_config(saved: Config, content: dict[str, Any], files: RunFiles, checkpoint: Path) -> None:
    """Check that a run's ``config.yaml`` is the one that its checkpoint was trained with.

    Raises:
        InputError: if the file was edited, or the checkpoint belongs to another run.
    """
    ours, theirs = asdict(saved), content.get("hyper_parameters", {})
    try:
        trained = {
            name: asdict(section(**theirs[name])) for name, section in sections(Config).items() if theirs.get(name)
        }
    except TypeError as error:  # a key has since been renamed
        raise InputError(f"{relative(checkpoint)} is of another version; {version_hint(files)}") from error
    if "seed" in theirs:
        trained["seed"] = theirs["seed"]
    known = flatten({name: ours[name] for name in trained})
    for key, value in flatten(trained).items():
        if key not in MAY_CHANGE and known[key] != value:
            raise InputError(
                f"{relative(files.config)} has {key}={known[key]}, but {relative(checkpoint)} was trained with "
                f"{key}={value}; restore the original file or start a new run"
            )


def check_best(content: dict[str, Any], files: RunFiles, checkpoint: Path) -> None:
    """Check that the best weights so far exist, before continuing a run that will test them.

    Raises:
        InputError: if they do not.
    """
    rows = content.get("callbacks", {}).get("EpochRecorder", {}).get("rows", [])
    if not any("val/acc" in row for row in rows):
        return
    try:
        verify_checkpoint(files.best)
    except (InputError, OSError) as error:
        problem = f"{files.best} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{problem}, so the best weights of this run are lost; start a new run, from its latest weights "
            f"with checkpoint={relative(checkpoint)}"
        ) from error


def check_same_data(run: Run, data: ImageData) -> None:
    """Check that the images are those that the run started with.

    Raises:
        InputError: if the classes or the images' digest (if unknown, their mean or standard deviation) have changed.
    """
    assert run.content is not None
    theirs = run.content.get("hyper_parameters", {})
    assert data.arrays is not None
    now = data.arrays.digest
    before: dict[str, str] | None = run.content.get("callbacks", {}).get("Saver", {}).get("digest")
    changed = ["class names"] if theirs["class_names"] != data.class_names else []
    if before:
        changed += [f"{split} images" for split in before | now if now.get(split) != before.get(split)]
    else:
        for name, values in (("mean", data.mean.tolist()), ("std", data.std.tolist())):
            pairs = zip(theirs[name], values, strict=False)  # the last bit may differ between machines
            changed += [name] if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs) else []
    if changed:
        raise InputError(
            f"the data set changed since this run started ({', '.join(changed)}); restore it or start a new run"
        )


def read_config(files: RunFiles) -> Config:
    """Read the configuration of a run; keys that are newer than the run get their default.

    Raises:
        InputError: if the file cannot be read, is not a configuration, or has keys that this version does not know.
    """
    path = relative(files.config)
    try:
        saved = yaml.safe_load(files.config.read_text(encoding="utf-8"))
        saved.pop("debug", None)  # what traceback was called in earlier versions
        known = flatten(asdict(Config())).keys() | sections(Config).keys()
        unknown = sorted(key for key in flatten(saved).keys() - known if not key.startswith(("callbacks.", "logger.")))
        if unknown:
            raise InputError(f"{path} has {', '.join(unknown)}, unknown to this version; {version_hint(files)}")
        with register.needs(saved.get("imports", ())):
            parts = {name: section(**saved.pop(name, {})) for name, section in sections(Config).items()}
            return Config(**parts, **saved)
    except InputError as error:
        raise error if path in str(error) else InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not the configuration of a run; restore it or start a new run") from error


def read_summary(files: RunFiles) -> dict[str, Any]:
    """Read the record of a finished run.

    Raises:
        InputError: if it is corrupt.
    """
    try:
        summary = json.loads(files.summary.read_text(encoding="utf-8"))
        metrics = {name: float(value) for name, value in summary["metrics"].items()}
        return {"metrics": metrics, "epochs": int(summary["epochs"])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        name = relative(files.summary)
        raise InputError(f"{name} is damaged; delete it, and the run is tested again when it is resumed") from error


def version_hint(files: RunFiles) -> str:
    """What to do about a run from another version, with the commit that it was made with, if recorded."""
    _, content, _ = latest_valid(files)
    starts = content.get("callbacks", {}).get("EpochRecorder", {}).get("starts") or [{}]
    commit = str(starts[-1].get("git_commit") or "").partition("+")[0]
    made_with = f"the commit that made it (git checkout {commit[:12]})" if commit else "the version that made it"
    return f"continue the run with {made_with}, or start a new run"


def follow_saved(config: Config, saved: Config) -> Config:
    """Fill in the classes and channels that ``config`` leaves to the data from ``saved``."""
    followed = {key: getattr(saved.model, key) for key in ("num_classes", "channels") if not getattr(config.model, key)}
    return replace(config, model=replace(config.model, **followed))
