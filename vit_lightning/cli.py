"""Turn a command line into checked dataclasses, and run a task. Only this, ``arguments`` and ``messages`` use Hydra.

A mistake ends in one line on standard error and exit code 1, before torch is imported where possible.
"""

import contextlib
import errno
import glob
import hashlib
import inspect
import logging
import math
import os
import re
import shlex
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vit_lightning import guard, register
from vit_lightning.arguments import added, check_options, check_overrides
from vit_lightning.config import FOREIGN, Config
from vit_lightning.files import ERROR, SUMMARY, RunFiles, remove_empty, write_atomic
from vit_lightning.keys import InputError, Invocation, as_list, sections
from vit_lightning.messages import help_text, is_mistake, one_line, unknown_key
from vit_lightning.schemas import CONF, SCHEMAS
from vit_lightning.terminal import escape_unencodable, relative

NAME_BYTES = 200  # maximum length of a job's directory name; most file systems allow 255
FAILED: dict[Path, str] = {}  # messages of the sweep's jobs that failed in this process, by directory


def run_command(name: str, task: str, text: str | None) -> None:
    """Compose the configuration from ``conf/`` and the command line, and run a task on it, or a sweep of tasks.

    A failed job of a sweep does not stop the others; its message is written to ``error.txt`` in its directory.

    Args:
        name: the command, one of ``SCHEMAS``.
        task: ``module:function``, imported once the configuration is checked. It takes the configuration, the run's
            directory and the :class:`~vit_lightning.keys.Invocation`, and returns what a sweeper optimises.
        text: the beginning of ``--help``.
    """
    escape_unencodable()
    schema = SCHEMAS[name]
    typed = added(sys.argv[1:])
    if {"--help", "-h"} & set(typed):
        print_help(name, text or "", typed)
        return
    check_options(typed, schema)
    register_schemas()
    started = False
    FAILED.clear()

    def job(cfg: DictConfig) -> float:
        nonlocal started
        started = True
        sys.argv[1:] = typed
        settings = HydraConfig.get()
        run_dir = Path(settings.runtime.output_dir)
        try:
            return _run_task(task, cfg, name, run_dir)
        except Exception as error:
            line = one_line(error, schema, run_dir) if is_mistake(error) else None
            if settings.mode is RunMode.MULTIRUN:
                report_failure(settings, run_dir, line or traceback.format_exc().strip())
                return math.nan
            if line and "traceback=true" not in typed:
                remove_empty(run_dir)
                sys.exit(line)
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises exceptions instead of printing its own report
    try:
        flags = [item for item in typed if item in ("-m", "--multirun")]  # argparse refuses flags between two settings
        rest = [item for item in typed if item not in flags]
        first = next(
            (i for i, item in enumerate(rest) if item[:1] == "~" or ("=" in item and item[:1] != "-")), len(rest)
        )
        sys.argv[1:] = [*flags, *rest[:first], *check_overrides(typed, schema), *rest[first:]]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
    except Exception as error:
        if "traceback=true" in typed or (started and not is_mistake(error)):
            raise
        sys.exit(one_line(error, schema))
    finally:
        sys.argv[1:] = typed


def print_help(name: str, text: str, typed: list[str]) -> None:
    """Print ``--help``, with the parts that ``imports=`` registers."""
    chosen = next((item.removeprefix("imports=") for item in typed if item.startswith("imports=")), "")
    register.load(chosen.strip("[]").split(",") if chosen else [])
    print(help_text(name, text))


def report_failure(settings: Any, run_dir: Path, message: str) -> None:
    """Print why a job of a sweep failed, and write it into the job's directory."""
    print(f"job {settings.job.num} ({settings.job.override_dirname}): {message}", file=sys.stderr)
    FAILED[run_dir.resolve()] = message
    with contextlib.suppress(OSError):  # the directory may not be writable
        text = f"{' '.join(settings.overrides.task)}\n{message}\n"
        write_atomic(run_dir / ERROR, text.encode("utf-8", "backslashreplace"))


def _run_task(task: str, cfg: DictConfig, name: str, run_dir: Path) -> float:
    """Check the configuration, import the task and call it."""
    settings, schema = HydraConfig.get(), SCHEMAS[name]
    if not os.access(run_dir, os.W_OK):  # reported before the work, not after it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
    if settings.job.chdir:
        raise InputError("hydra.job.chdir=true is not supported; paths are relative to where the command is typed")
    (run_dir / ERROR).unlink(missing_ok=True)  # from an earlier attempt
    config = to_config(cfg, schema)
    check_paths(config)
    overrides = list(settings.overrides.task)
    program = ["python", "-m", f"vit_lightning.{name}"]
    if settings.mode is RunMode.MULTIRUN:
        if isinstance(config, Config) and config.trainer.strategy != "auto":
            with contextlib.suppress(OSError):
                run_dir.rmdir()
            # Every job would fail for this reason, so the sweep ends.
            sys.exit(f"error: trainer.strategy={config.trainer.strategy} is for single runs; a sweep uses one device")
        command = shlex.join([*program, *overrides])
    else:
        command = shlex.join([*program, *sys.argv[1:]])

    def compose(more: list[str]) -> Any:
        try:
            return to_config(hydra.compose(name, added(more)), schema)
        except InputError:
            raise
        except Exception as error:  # Hydra and OmegaConf raise many types
            raise InputError(one_line(error, schema).removeprefix("error: ")) from error

    return guard.load(task)(config, run_dir, invocation=Invocation(command, overrides, compose, build_object))


def build_object(settings: dict[str, Any], run_dir: Path) -> Any:
    """Build a callback or logger; ``save_dir`` and ``dirpath`` default to the run's own.

    Raises:
        InputError: if its class cannot be imported, or does not take the arguments.
    """
    target = str(settings.get("_target_"))
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what is raised below
    try:
        takes = inspect.signature(hydra.utils.get_object(target)).parameters
        places = {"save_dir": str(run_dir), "dirpath": str(run_dir / "checkpoints")}
        return hydra.utils.instantiate({**{name: places[name] for name in places if name in takes}, **settings})
    except Exception as error:  # the class may raise anything
        cause = error.__cause__ or error
        [reason, *_] = str(cause).splitlines() or [""]
        raise InputError(f"_target_={target} cannot be built ({type(cause).__name__}: {reason})") from error


class SweepEnd(Callback):
    """Prints the table of a sweep, and ends with exit code 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        if not any(directory.glob("*/")):
            sys.exit("error: the sweep has no jobs: its glob matches no option")
        if any(directory.rglob(SUMMARY)):
            try:
                guard.load("vit_lightning.sweeps.table:show")(directory)
            except InputError as error:  # the jobs finished; only their table is missing
                print(f"error: {error}", file=sys.stderr)
        # Failures in a launcher's processes are known from files; failures in this process, also without a file.
        failed = {path.parent: path.read_text(encoding="utf-8") for path in directory.resolve().rglob(ERROR)} | FAILED
        if failed:
            lines = [f"  {relative(path)}: {text.splitlines()[-1]}" for path, text in sorted(failed.items())]
            sys.exit("\n".join([f"error: {len(failed)} of the sweep's jobs failed:", *lines]))


def job_dir(varied: str) -> str:
    """Name the directory of a job after what the sweep varies, as a single name that file systems accept.

    A changed name ends with a hash of the original, so that no two jobs share a directory.
    """
    safe = re.sub(r"[/\\\0\n]", "_", varied).encode("utf-8", "surrogateescape")
    if safe == varied.encode("utf-8", "surrogateescape") and len(safe) <= NAME_BYTES:
        return varied or "job"
    digest = hashlib.sha256(varied.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{safe[: NAME_BYTES - 11].decode('utf-8', 'ignore')}-{digest}"


OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)


def register_schemas() -> None:
    """Register the dataclasses with Hydra, under the names that the files in ``conf/`` begin with."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"base_{name}", schema)
    for group, section in sections(Config).items():
        store.store("base_config", section, group=group)


def to_config(cfg: DictConfig, schema: type) -> Any:
    """Convert the composed configuration to checked dataclasses.

    Raises:
        InputError: if a key is unknown (Hydra accepts ``+typo=1``), or a value or combination is invalid.
    """
    imports = cfg.get("imports")
    register.load(as_list(OmegaConf.to_object(imports) if OmegaConf.is_list(imports) else imports))
    for section, part in [(None, schema), *sections(schema).items()]:
        known = [field.name for field in fields(part)]
        for name in map(str, cfg if section is None else cfg[section] or ()):
            if name not in known:
                raise InputError(unknown_key(f"{section}.{name}" if section else name, schema))
    if (
        str(cfg.get("checkpoint")).startswith(FOREIGN)
        and "model" in cfg
        and cfg.model.image_size % cfg.model.patch_size
    ):
        cfg.model.update(patch_embed="unfold", patch_size=1)  # placeholders: the weights' own are not known yet
    return OmegaConf.to_object(cfg)


def check_paths(config: Any) -> None:
    """Report a path that does not exist before torch is imported.

    Raises:
        InputError: if there is one.
    """
    resume = getattr(config, "resume", None)
    for name, path in (("checkpoint", getattr(config, "checkpoint", None)), ("resume", resume)):
        if path not in (None, "pretrained") and not path.startswith(FOREIGN) and not Path(path).expanduser().exists():
            more = ", a .ckpt or .safetensors file, or pretrained" if name == "checkpoint" else ""
            raise InputError(f"{name}={path} does not exist; name a run's directory{more}")
    if resume is not None and not RunFiles(Path(resume).expanduser()).config.exists():
        raise InputError(f"resume={resume} is not the directory of a run, such as outputs/…")
    images = [Path(name).expanduser() for name in getattr(config, "images", ())]
    if images and not any(path.exists() or glob.glob(str(path), recursive=True) for path in images):  # noqa: PTH207
        raise InputError(f"images={','.join(map(str, images))} does not exist; name pictures, directories or globs")
    data = getattr(config, "data", None)
    if data is None or data.source != "image_folder" or resume is not None:
        return
    root = Path(data.root).expanduser()
    if not root.is_dir() and not (root.is_file() and root.suffix.lower() == ".csv"):
        raise InputError(
            f"data.root={data.root} is not a directory; it needs train/<class>/* and test/<class>/*, or <class>/* "
            "alone; or name a CSV file"
        )
