"""Which run a directory holds: a new one, one to go on with, or one that came to its end."""

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

from vit_lightning.config import Config
from vit_lightning.files import unwritable
from vit_lightning.keys import InputError, Invocation, MachineError, flatten, sections
from vit_lightning.runs.checkpoints import newest_sound
from vit_lightning.terminal import is_first, relative

# What may be otherwise when a run goes on: where it runs, and what changes none of its numbers.
FREE = (
    *("trainer.accelerator", "trainer.strategy", "trainer.devices"),
    *("trainer.enable_progress_bar", "save_minutes", "debug"),
)
LIMITS = ("trainer.max_epochs", "trainer.max_time", "target_acc", "target_acc5")  # what may be more when it goes on


@dataclass(slots=True)
class Run:
    """A run as it stands.

    Attributes:
        config: its configuration.
        folder: its directory.
        checkpoint: what it goes on from; ``None`` from the start.
        step: optimizer steps before that; ``None`` for a run that is new.
        result: its best ``val/acc``, if it came to its end.
    """

    config: Config
    folder: Path
    checkpoint: Path | None = None
    step: int | None = None
    result: float | None = None


@contextlib.contextmanager
def hold(config: Config, run_dir: Path, invocation: Invocation) -> Iterator[Run]:
    """The run that is asked for, whose directory no other process can write to from before it is looked at.

    Args:
        config: as asked for; ``config.resume`` may name the run's directory.
        run_dir: new, or that of the same run, started earlier.
        invocation: tells which keys were set on the command line.

    Raises:
        InputError: if there is no such run, it cannot go on, or another process writes to it.
        MachineError: if its directory cannot be written.
    """
    if config.resume is not None:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra made it for a new run; one that is not empty is kept
        run_dir = Path(config.resume).expanduser()
        if not (run_dir / "config.yaml").exists():
            raise InputError(f"resume={config.resume} holds no run; name a run's directory, outputs/…")
    lock = FileLock(run_dir / ".lock")
    try:
        try:
            if is_first():
                lock.acquire(timeout=0)
            run = find_run(config, run_dir, invocation)
        except Timeout as error:
            raise InputError(
                f"{relative(run_dir)} is being written by another process; wait for it or stop it"
            ) from error
        except OSError as error:
            raise MachineError(unwritable(error, run_dir)) from error
        yield run
    finally:
        if lock.is_locked:
            if not (run_dir / "config.yaml").exists():  # nothing came of it
                (run_dir / ".lock").unlink(missing_ok=True)
            lock.release()


def find_run(config: Config, run_dir: Path, invocation: Invocation) -> Run:
    """The run in ``run_dir``, which holds none yet, or the one that ``config`` asks for.

    Raises:
        InputError: if it is another one, or cannot go on.
    """
    if config.resume is not None:
        return resumed(config, run_dir, invocation)
    if not (run_dir / "config.yaml").exists():
        return Run(config, run_dir)
    if not same_run(config, saved_config(run_dir)):
        cure = "choose a new hydra.run.dir, or in a sweep hydra.sweep.dir, or leave it out"
        raise InputError(f"{relative(run_dir)} holds another run; {cure}")
    if (run_dir / "summary.json").exists():
        return Run(config, run_dir, result=json.loads((run_dir / "summary.json").read_text())["metrics"]["val/acc"])
    return Run(config, run_dir, *sound_checkpoint(run_dir))


def resumed(config: Config, folder: Path, invocation: Invocation) -> Run:
    """The interrupted run in ``folder``: its own configuration, and of ``FREE`` and ``LIMITS`` what is set now.

    With a higher limit it may also go on where it came to its end.

    Raises:
        InputError: if the run is over, or ``config`` sets what it has otherwise.
    """
    saved = saved_config(folder)
    given = follow_saved(replace(config, resume=None), saved)
    ours, theirs = flatten(asdict(given)), flatten(asdict(saved))
    keys = keys_set(ours, invocation)
    other = sorted(key for key in keys - {*FREE, *LIMITS} if ours[key] != theirs[key])
    if other:
        own = ", ".join(f"{key}={theirs[key]}" for key in other)
        raise InputError(f"resume=… goes on with the run's own configuration, {own}; leave {', '.join(other)} out")
    for key, amount in (("trainer.max_epochs", int), ("trainer.max_time", seconds)):
        if key in keys and amount(ours[key]) < amount(theirs[key]):
            raise InputError(f"{key}={ours[key]} is less than the run's {theirs[key]}; give more, or leave it out")
    if (folder / "summary.json").exists():
        epochs = saved.trainer.max_epochs
        whole = json.loads((folder / "summary.json").read_text())["epochs"] == epochs
        ended_by = [key for key in LIMITS if (key == "trainer.max_epochs") == whole and theirs[key] is not None]
        if not any(key in keys and ours[key] != theirs[key] for key in ended_by):
            ends = " and ".join(f"{key}={theirs[key]}" for key in ended_by)
            cure = f"trainer.max_epochs={2 * epochs}" if whole else "more of it"
            raise InputError(
                f"resume={config.resume} is a run that came to its end by {ends}; {cure} would go on with it"
            )
    checkpoint, step = sound_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"resume={config.resume} holds no checkpoints/last.ckpt; start the run anew")
    now: dict[str, Any] = {key: ours[key] for key in (*FREE, *LIMITS) if key in keys}
    trainer = {key.removeprefix("trainer."): value for key, value in now.items() if key.startswith("trainer.")}
    others = {key: value for key, value in now.items() if not key.startswith("trainer.")}
    config = replace(saved, trainer=replace(saved.trainer, **trainer), **others)
    return Run(config, folder, checkpoint, step)


def seconds(time: str | None) -> float:
    """``trainer.max_time``, days:hours:minutes:seconds, as a number; infinite without limit."""
    if time is None:
        return math.inf
    days, hours, minutes, rest = map(int, time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def keys_set(ours: dict[str, Any], invocation: Invocation) -> set[str]:
    """The keys that the command line sets, by name or by choosing a file of a group.

    A file of ``model`` and the like sets its whole group; one of ``trainer`` what may be otherwise when a run goes on.
    Beyond that it sets, as those do that reach across groups (``experiment``), what is not as it is by default; so
    does, without a command line, the caller.

    Args:
        ours: by key, the values that come of it.
        invocation: the command line.
    """
    default = flatten(asdict(Config()))
    changed = {key for key in ours if ours[key] != default[key]}
    if invocation.overrides is None:
        return changed
    typed = invocation.keys
    keys = typed & ours.keys()
    for group in typed - ours.keys():
        part = {key for key in ours if key.startswith(f"{group}.")}
        keys |= part & {*FREE, *changed} if group == "trainer" else part or changed
    return keys


def sound_checkpoint(run_dir: Path) -> tuple[Path | None, int]:
    """The newest checkpoint of a run that is whole, and the steps before it; damaged ones are named on standard error.

    Raises:
        InputError: if there are checkpoints, and all are damaged.
    """
    checkpoint, step, wrong = newest_sound(run_dir / "checkpoints")
    if wrong and checkpoint is None:
        raise InputError(f"{'; '.join(wrong)}; there is no other, so start the run anew in another directory")
    for message in wrong:
        print(f"{message}; going on from {relative(checkpoint or run_dir)}", file=sys.stderr)
    if wrong and is_first():  # else the next save would put it in the place of the sound one
        (run_dir / "checkpoints" / "last.ckpt").replace(run_dir / "checkpoints" / "last-damaged.ckpt")
    return checkpoint, step


def saved_config(run_dir: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
        InputError: if its file cannot be read, is damaged, or of another version.
    """
    path = run_dir / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text())
        parts = {name: part(**saved.pop(name)) for name, part in sections(Config).items()}
        return Config(**parts, **saved)
    except OSError as error:
        raise InputError(f"{relative(path)} cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{relative(path)} is not the configuration of a run of this version ({reason})") from error


def same_run(config: Config, saved: Config) -> bool:
    """Whether ``config`` asks for the run of ``saved``."""
    return follow_saved(replace(config, save_minutes=saved.save_minutes, debug=saved.debug), saved) == saved


def follow_saved(config: Config, saved: Config) -> Config:
    """``config`` with the classes and channels of ``saved`` where it leaves them to the data."""
    followed = {key: getattr(saved.model, key) for key in ("num_classes", "channels") if not getattr(config.model, key)}
    return replace(config, model=replace(config.model, **followed))
