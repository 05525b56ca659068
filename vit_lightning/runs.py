"""Which run a directory holds: a new one, one to go on with, or one that came to its end."""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from vit_lightning.cli import overrides, sections
from vit_lightning.config import Config, InputError, flatten
from vit_lightning.saving import newest_sound
from vit_lightning.terminal import relative

# What may be otherwise when a run goes on: where it runs, and what changes none of its numbers.
FREE = (
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    *("trainer.enable_progress_bar", "save_minutes", "debug"),
)


@dataclass(slots=True)
class Run:
    """A run as it stands.

    Attributes:
        config: its configuration.
        folder: its directory.
        checkpoint: what it goes on from; ``None`` from the start.
        step: optimizer steps before that.
        result: its best ``val/acc``, if it came to its end.
    """

    config: Config
    folder: Path
    checkpoint: Path | None = None
    step: int = 0
    result: float | None = None


def find_run(config: Config, run_dir: Path) -> Run:
    """The run that is asked for.

    Args:
        config: as asked for; ``config.resume`` may name the run's directory.
        run_dir: new, or that of the same run, started earlier.

    Raises:
        InputError: if ``config.resume`` names none that can go on, or ``run_dir`` holds another run.
    """
    if config.resume is not None:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra made it for a new run; one that is not empty is kept
        return resumed(config)
    if not (run_dir / "config.yaml").exists():
        return Run(config, run_dir)
    if not same_run(config, saved_config(run_dir)):
        cure = "choose a new hydra.run.dir, or in a sweep hydra.sweep.dir, or leave it out"
        raise InputError(f"{relative(run_dir)} holds another run; {cure}")
    if (run_dir / "summary.json").exists():
        return Run(config, run_dir, result=json.loads((run_dir / "summary.json").read_text())["metrics"]["val/acc"])
    return Run(config, run_dir, *sound_checkpoint(run_dir))


def resumed(config: Config) -> Run:
    """The interrupted run in the directory ``config.resume``: its own configuration, ``FREE`` as it is given now.

    It may also go on for more ``trainer.max_epochs``, even if it came to its end.

    Raises:
        InputError: if there is none, or the run is over, or ``config`` has other settings.
    """
    assert config.resume is not None
    given = replace(config, resume=None)
    ours, default = flatten(asdict(given)), flatten(asdict(Config()))
    changed = {key for key in ours if ours[key] != default[key]} - {*FREE, "trainer.max_epochs"}
    if changed:
        raise InputError(f"resume=… goes on with the run's own configuration; leave {', '.join(sorted(changed))} out")
    folder = Path(config.resume).expanduser()
    if not (folder / "config.yaml").exists():
        raise InputError(f"resume={config.resume} holds no run; name a run's directory, outputs/…")
    saved = saved_config(folder)
    epochs, more = saved.trainer.max_epochs, config.trainer.max_epochs
    if more == default["trainer.max_epochs"] and f"trainer.max_epochs={more}" not in overrides():  # not given
        more = epochs
    elif more < epochs:
        raise InputError(f"trainer.max_epochs={more} is less than the run's {epochs}; give more, or leave it out")
    if (folder / "summary.json").exists() and more == epochs:
        raise InputError(
            f"resume={config.resume} is a run that came to its end; trainer.max_epochs={2 * epochs} would go on with it"
        )
    checkpoint, step = sound_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"resume={config.resume} holds no checkpoints/last.ckpt; start the run anew")
    free: dict[str, Any] = {key: ours[key] for key in FREE}
    trainer = {key.removeprefix("trainer."): value for key, value in free.items() if key.startswith("trainer.")}
    others = {key: value for key, value in free.items() if not key.startswith("trainer.")}
    config = replace(saved, trainer=replace(saved.trainer, **trainer, max_epochs=more), **others)
    return Run(config, folder, checkpoint, step)


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
    return checkpoint, step


def saved_config(run_dir: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
        InputError: if its file is damaged, or of another version.
    """
    path = run_dir / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text())
        parts = {name: part(**saved.pop(name)) for name, part in sections(Config).items()}
        return Config(**parts, **saved)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{relative(path)} is not the configuration of a run of this version ({reason})") from error


def hold(run_dir: Path) -> FileLock:
    """Keep other processes from writing to a run's directory for as long as this one lives, or releases the lock.

    Raises:
        InputError: if another one does so already.
    """
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{relative(run_dir)} is being written by another process; wait for it or stop it") from error
    return lock


def same_run(config: Config, saved: Config) -> bool:
    """Whether ``config`` asks for the run of ``saved``, in which classes and channels follow the data."""
    config = replace(config, save_minutes=saved.save_minutes, debug=saved.debug)
    followed = {key: getattr(saved.model, key) for key in ("num_classes", "channels") if not getattr(config.model, key)}
    return replace(config, model=replace(config.model, **followed)) == saved
