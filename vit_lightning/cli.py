"""From a command line to a :class:`~vit_lightning.config.Config`: Hydra on one side, plain dataclasses on the other.

A mistake in the command line ends in one line on standard error and exit code 1.
"""

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from vit_lightning.config import BenchmarkRun, Config, EvaluateConfig, ExportConfig, InputError, PredictConfig

CONF = Path(__file__).parent.parent / "conf"
SCHEMAS: dict[str, type] = {  # by primary file in conf/
    "config": Config,
    "benchmark": BenchmarkRun,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
}
SchemaT = TypeVar("SchemaT")


def run_command(task: Callable[[SchemaT, Path], float], schema: type[SchemaT]) -> None:
    """Compose the configuration from ``conf/`` and the command line, and run ``task`` on it, or a sweep of tasks.

    Args:
        task: takes the checked configuration and the run's new directory; what it returns is what a sweeper
            maximises or minimises.
        schema: class of the configuration, one of ``SCHEMAS``, whose names are those of the primary files in ``conf/``.
    """
    [name] = [name for name, known in SCHEMAS.items() if known is schema]
    register_schemas()
    started = failed = 0

    def job(cfg: DictConfig) -> float:
        nonlocal started, failed
        started += 1
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        try:
            return task(to_config(cfg, schema), run_dir)
        except Exception as error:
            mistake = isinstance(error, InputError | OmegaConfBaseException)
            if mistake:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()  # only if it came before the first file
            if mistake and hydra_config.mode is RunMode.RUN:
                sys.exit(one_line(error, schema))
            if hydra_config.mode is RunMode.MULTIRUN:  # the other jobs still run
                failed += 1
                text = one_line(error, schema) if mistake else traceback.format_exc()
                print(f"job {hydra_config.job.num} ({hydra_config.job.override_dirname}): {text}", file=sys.stderr)
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through instead of printing its own report
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if failed:
            sys.exit(f"error: {failed} of {started} jobs failed, as said above")
        if not started:  # the command line could not be composed, or the run's directory not made
            sys.exit(one_line(error, schema))
        raise


def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the name that the files in ``conf/`` begin with."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"base_{name}", schema)
    for group, section in sections(Config).items():
        store.store("base_config", section, group=group)


def sections(schema: type) -> dict[str, type]:
    """The parts of a configuration: ``model``, ``data`` … and their schemas."""
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(schema)}  # of X | None, both
    return {
        name: kind for name, kinds in types.items() for kind in kinds if isinstance(kind, type) and is_dataclass(kind)
    }


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


def overrides() -> list[str]:
    """What the command line, or a sweep for this job of it, set: ``["model.layers=4", "seed=1"]``."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def relative(path: Path) -> str:
    """The path as a person would type it from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def one_line(error: Exception, schema: type) -> str:
    """What went wrong, naming the key as it was typed and what would be right."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.filename:  # Hydra's MissingConfigException is one too, without a file
        cure = "choose another hydra.run.dir, or in a sweep hydra.sweep.dir"
        return f"error: {error.filename} cannot be written ({error.strerror}); {cure}"
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
    if group in known and dot:  # its names alone: the group that all share would make any two of them alike
        near = [f"{group}.{match}" for match in difflib.get_close_matches(name, known[group], n=1)]
        more = f" ({group}. has {', '.join(known[group])})"
    else:
        keys = [f"{group}.{name}" for group, names in known.items() for name in names]
        keys += [field.name for field in fields(schema)] + ["experiment", "ablation"]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        more = "" if near else "; --help lists the keys"
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} is not a key{hint}{more}"
