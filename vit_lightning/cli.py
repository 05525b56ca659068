"""From a command line to a :class:`~vit_lightning.config.Config`: Hydra on one side, plain dataclasses on the other.

A mistake in the command line ends in one line on standard error and exit code 1.
"""

import contextlib
import difflib
import errno
import importlib
import os
import re
import shlex
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from vit_lightning.config import (
    BenchmarkRun,
    Config,
    EvaluateConfig,
    ExportConfig,
    InputError,
    Invocation,
    PredictConfig,
    SearchRun,
    sections,
)
from vit_lightning.terminal import relative

CONF = Path(__file__).parent.parent / "conf"
SCHEMAS: dict[str, type] = {  # by primary file in conf/
    "config": Config,
    "benchmark": BenchmarkRun,
    "search": SearchRun,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
}
MISTAKES = (InputError, OmegaConfBaseException, OSError)  # the user's to mend: they end in one line, not a traceback
SchemaT = TypeVar("SchemaT")


def run_command(task: str, schema: type) -> None:
    """Compose the configuration from ``conf/`` and the command line, and run ``task`` on it, or a sweep of tasks.

    A job of a sweep that fails stops no other; what went wrong stays in its directory as ``error.txt``.

    Args:
        task: ``module:function``, imported when the configuration is checked, so that a mistake is reported at once; it
            takes the configuration and the run's directory, and returns what a sweeper maximises or minimises.
        schema: class of the configuration, one of ``SCHEMAS``, whose names are those of the primary files in ``conf/``.
    """
    [name] = [name for name, known in SCHEMAS.items() if known is schema]
    register_schemas()
    started = False
    typed = sys.argv[1:]

    def job(cfg: DictConfig) -> float:
        nonlocal started
        started = True
        sys.argv[1:] = typed
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        try:
            if not os.access(run_dir, os.W_OK):  # said now, not when the work is done
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
            (run_dir / "error.txt").unlink(missing_ok=True)  # of an earlier try
            config: Any = to_config(cfg, schema)
            strategy = config.trainer.strategy if isinstance(config, Config) else "auto"
            if hydra_config.mode is RunMode.MULTIRUN and strategy != "auto":
                with contextlib.suppress(OSError):
                    run_dir.rmdir()
                sys.exit(f"error: trainer.strategy={strategy} is for single runs; those of a sweep have one device")
            module, function = task.split(":")
            invocation = Invocation(
                _command_again(), list(hydra_config.overrides.task), lambda more: _composed(more, name, schema)
            )
            return getattr(importlib.import_module(module), function)(config, run_dir, invocation=invocation)
        except Exception as error:
            mistake = isinstance(error, MISTAKES)
            if hydra_config.mode is RunMode.MULTIRUN:  # the other jobs still run
                text = one_line(error, schema, run_dir) if mistake else traceback.format_exc().strip()
                print(f"job {hydra_config.job.num} ({hydra_config.job.override_dirname}): {text}", file=sys.stderr)
                with contextlib.suppress(OSError):  # of a directory that cannot be written
                    (run_dir / "error.txt").write_text(f"{' '.join(hydra_config.overrides.task)}\n{text}\n")
            elif mistake and "debug=true" not in typed:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()  # only if it came before the first file
                sys.exit(one_line(error, schema, run_dir))
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through instead of printing its own report
    start = time.time()
    SweepDirectory.path = None
    failed: list[str] = []
    try:
        first = next((i for i, item in enumerate(typed) if "=" in item and not item.startswith("-")), len(typed))
        sys.argv[1:] = [*typed[:first], *check_grid(typed, schema), *typed[first:]]  # settings must not lie apart
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if SweepDirectory.path is not None:
            errors = [path for path in SweepDirectory.path.rglob("error.txt") if path.stat().st_mtime >= start]
            failed = [f"  {relative(path.parent)}: {path.read_text().splitlines()[-1]}" for path in sorted(errors)]
        no_job = not started  # for want of a configuration, or of a directory for the run
        if not failed and (no_job or isinstance(error, MISTAKES)) and "debug=true" not in typed:
            sys.exit(one_line(error, schema))
        if not failed:
            raise
    finally:
        sys.argv[1:] = typed
    jobs = list(SweepDirectory.path.glob("*/")) if SweepDirectory.path is not None else []
    if SweepDirectory.path is not None and not jobs:
        sys.exit("error: the sweep has no job; a glob that fits no option gives none")
    if SweepDirectory.path is not None and any(SweepDirectory.path.rglob("summary.json")):
        from vit_lightning.sweeps.table import show

        show(SweepDirectory.path)
    if failed:
        sys.exit("\n".join([f"error: of the sweep's jobs {len(failed)} failed:", *failed]))


class SweepDirectory(Callback):
    """Where the jobs of a sweep land, as Hydra tells the process that starts them; ``None`` if there is no sweep."""

    path: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepDirectory.path = Path(config.hydra.sweep.dir)


def check_grid(arguments: list[str], schema: type) -> list[str]:
    """Refuse what would fail every job of a sweep, or make two jobs one.

    Args:
        arguments: of the command.
        schema: of its configuration.

    Returns:
        Hydra's setting by which a job's directory is named after what the sweep varies, and after nothing else.

    Raises:
        InputError: if a key is unknown, a class path is set, or a list of values is empty or has a value twice.
    """
    given = [item for item in arguments if "=" in item and not item.startswith("-")]  # no options, as --cfg job
    try:
        settings = OverridesParser.create().parse_overrides(given)
    except OverrideParseException:
        return []  # Hydra will say so
    fixed: dict[str, bool] = {}  # of a key that is set twice the last counts
    for setting in settings:
        key, value = setting.key_or_group, setting.value()
        if re.search(r"(^|[^\w/-])_target_\s*[:=]", setting.input_line or ""):  # Hydra would call whatever it names
            raise InputError(f"{setting.input_line}: no setting takes a _target_, the path of a class; leave it out")
        if setting.is_add() and not key.startswith("hydra"):
            group, _, name = key.rpartition(".")
            part = sections(schema).get(group) if group else schema
            if part is None or name not in [field.name for field in fields(part)]:
                raise InputError(_unknown_key(key, schema))
        if isinstance(value, ChoiceSweep | RangeSweep):
            values = list(setting.sweep_string_iterator())
            twice = [item for number, item in enumerate(values) if item in values[:number]]
            if twice:
                raise InputError(f"{setting.input_line} has {twice[0]} twice; every job of a sweep is another")
            if not values:
                raise InputError(f"{setting.input_line} has no value; name some, as in {key}=1,2")
        fixed[key] = not setting.is_sweep_override()
    names = ",".join(key for key, is_fixed in fixed.items() if is_fixed)
    return [f"hydra.job.config.override_dirname.exclude_keys=[{names}]"]


def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the name that the files in ``conf/`` begin with."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"base_{name}", schema)
    for group, section in sections(Config).items():
        store.store("base_config", section, group=group)


def to_config(cfg: DictConfig, schema: type[SchemaT]) -> SchemaT:
    """The composed configuration as checked dataclasses.

    Raises:
        InputError: if a key is unknown (``+typo=1`` passes Hydra), a value impossible, or two do not go together.
    """
    for section, part in [(None, schema), *sections(schema).items()]:
        known = [field.name for field in fields(part)]
        for key in map(str, cfg if section is None else cfg[section] or ()):
            if key not in known:
                raise InputError(_unknown_key(f"{section}.{key}" if section else key, schema))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    return config


def _command_again() -> str:
    """The command of this process, or of this job of a sweep, as it can be typed again."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:
        return shlex.join(["python", "-m", f"vit_lightning.{hydra_config.job.name}", *hydra_config.overrides.task])
    main = sys.modules["__main__"].__spec__
    program = ["python", "-m", main.name] if main else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def _composed(overrides: list[str], name: str, schema: type[SchemaT]) -> SchemaT:
    """The checked configuration that other settings than the command line's give.

    Raises:
        InputError: if a key is unknown, or values do not go together.
    """
    try:
        return to_config(hydra.compose(name, overrides), schema)
    except InputError:
        raise
    except Exception as error:  # Hydra and OmegaConf have many
        raise InputError(one_line(error, schema).removeprefix("error: ")) from error


def one_line(error: Exception, schema: type, run_dir: Path | None = None) -> str:
    """What went wrong, naming the key as it was typed or the file, and what would be right.

    Args:
        error: one of ``MISTAKES``, or of Hydra's own.
        schema: of the command's configuration.
        run_dir: directory of the run; ``None`` where Hydra has not come so far as to make it.
    """
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and not isinstance(error, MissingConfigException):  # which is one by its class alone
        if not error.filename:
            return f"error: {error.strerror or error or type(error).__name__}"
        file = Path(str(error.filename))
        if run_dir is None or file.is_relative_to(run_dir):
            cure = "choose another hydra.run.dir, or in a sweep hydra.sweep.dir"
            return f"error: {file} cannot be written ({error.strerror}); {cure}"
        return f"error: {file} cannot be opened ({error.strerror}); mend its permissions, or name another"
    for group, value in (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument):
        if group in sections(schema) and value in ("", "null"):
            options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            return f"error: {group}={value} names no option; choose one of {', '.join(options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, MissingConfigException) and cause.options:
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        options = [option for option in cause.options if option != "base_config"]
        message = f"{group}={name} is not known; choose one of {', '.join(options)}"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        message = _unknown_key(cause.full_key, schema)
    elif isinstance(cause, ValidationError):
        given = "null" if cause.value is None else cause.value
        message = f"{cause.full_key}={given}: {text[0]}"
    elif isinstance(cause, InterpolationResolutionError):
        message = f"{cause.full_key}: {text[0]}"
    elif isinstance(cause, OverrideParseException):
        key, equals, value = cause.override.partition("=")
        cure = f"quote the value: {key}='\"{value}\"'" if equals else f"write {key}=value"
        message = f"{cause.override} is not a setting that can be read; {cure}"
    else:
        noise = re.compile(r"https://|full_key|onfig search path:|provider=")
        message = "; ".join(line for line in text if not noise.search(line))
    return f"error: {message}"


def _unknown_key(key: str, schema: type) -> str:
    known = {group: [field.name for field in fields(part)] for group, part in sections(schema).items()}
    group, dot, name = key.partition(".")
    if group == "hydra":
        return f"{key} is not a key; --cfg hydra lists Hydra's own"
    if group == "space" and dot and schema is SearchRun:
        return f"{key} is not a key; write a space of your own into conf/space/ and choose it, as in space=recipe"
    if group in known and dot:  # its names alone: the group that all share would make any two of them alike
        near = [f"{group}.{match}" for match in difflib.get_close_matches(name, known[group], n=1)]
        more = f" ({group}. has {', '.join(known[group])})"
    else:
        keys = [f"{group}.{name}" for group, names in known.items() for name in names]
        keys += [field.name for field in fields(schema)] + ["experiment", "ablation", "sweep"]
        near = [name for name in keys if name.endswith(f".{key}")][:1]
        near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        more = "" if near else "; --help lists the keys"
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} is not a key{hint}{more}"
