"""Which run a directory holds: a new one, one to go on with, or one that came to its end."""

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from vit_lightning.cli import sections
from vit_lightning.config import Config, InputError, flatten
from vit_lightning.terminal import relative

# Where a run runs, which may be elsewhere when it goes on.
PLACEMENT = ("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes")


@dataclass(slots=True)
class Run:
    """A run as it stands.

    Attributes:
        config: its configuration.
        folder: its directory.
        checkpoint: what it goes on from; ``None`` from the start.
        result: its best ``val/acc``, if it came to its end.
    """

    config: Config
    folder: Path
    checkpoint: Path | None = None
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
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    return Run(config, run_dir, checkpoint if checkpoint.exists() else None)


def resumed(config: Config) -> Run:
    """The interrupted run in the directory ``config.resume``: its own configuration, ``PLACEMENT`` as it is given now.

    Raises:
        InputError: if there is none, or the run is over, or ``config`` has other settings.
    """
    assert config.resume is not None
    given = replace(config, resume=None)
    ours, default = flatten(asdict(given)), flatten(asdict(Config()))
    changed = [key for key in ours if ours[key] != default[key] and key not in PLACEMENT]
    if changed:
        raise InputError(f"resume=… goes on with the run's own configuration; leave {', '.join(changed)} out")
    folder = Path(config.resume).expanduser()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        raise InputError(f"resume={config.resume} holds no checkpoints/last.ckpt; name a run's directory, outputs/…")
    if (folder / "summary.json").exists():
        raise InputError(f"resume={config.resume} is a run that came to its end; there is nothing left to do")
    saved = saved_config(folder)
    moved = {key.removeprefix("trainer."): ours[key] for key in PLACEMENT}
    return Run(replace(saved, trainer=replace(saved.trainer, **moved)), folder, checkpoint)


def saved_config(run_dir: Path) -> Config:
    """The configuration that a run was started with."""
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    parts = {name: part(**saved.pop(name)) for name, part in sections(Config).items()}
    return Config(**parts, **saved)


def same_run(config: Config, saved: Config) -> bool:
    """Whether ``config`` asks for the run of ``saved``, in which classes and channels follow the data."""
    followed = {key: getattr(saved.model, key) for key in ("num_classes", "channels") if not getattr(config.model, key)}
    return replace(config, model=replace(config.model, **followed)) == saved
