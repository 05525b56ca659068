"""From a command line to a :class:`~vit_lightning.config.Config`: Hydra on one side, plain dataclasses on the other.

A mistake in the command line ends in one line on standard error and exit code 1.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from vit_lightning.config import (
    AugmentConfig,
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    OptimConfig,
    TrainerConfig,
)

CONF = Path(__file__).parent.parent / "conf"
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "optim": OptimConfig,
    "trainer": TrainerConfig,
}


def run_command(task: Callable[[Config, Path], float]) -> None:
    """Compose the configuration from ``conf/`` and the command line, and run ``task`` on it, or a sweep of tasks.

    Args:
        task: takes the checked configuration and the run's new directory; what it returns is what a sweeper
            maximises or minimises.
    """
    register_schemas()

    def job(cfg: DictConfig) -> float:
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir)
        try:
            return task(to_config(cfg), run_dir)
        except InputError as error:
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # only if the mistake came before the first file
            if hydra_config.mode is RunMode.RUN:
                sys.exit(one_line(error))
            raise  # in a sweep the other jobs still run; Hydra names this one's overrides at the end

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through instead of printing its own report
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, InputError) as error:
        sys.exit(one_line(error))


def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the name that the files in ``conf/`` begin with."""
    store = ConfigStore.instance()
    store.store("base_config", Config)
    for group, schema in GROUPS.items():
        store.store("base_config", schema, group=group)


def to_config(cfg: DictConfig) -> Config:
    """The composed configuration as checked dataclasses.

    Raises:
        InputError: if a key is unknown (``+typo=1`` passes Hydra), a value impossible, or two do not go together.
    """
    for section, schema in [(None, Config), *GROUPS.items()]:
        known = [field.name for field in fields(schema)]
        for key in map(str, cfg if section is None else cfg[section]):
            if key not in known:
                raise InputError(_unknown_key(f"{section}.{key}" if section else key))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config


def one_line(error: Exception) -> str:
    """What went wrong, naming the key as it was typed and what would be right."""
    if isinstance(error, InputError):
        return f"error: {error}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, MissingConfigException) and (match := re.search(r"'(\w+)/([^']+)'", text[0])):
        group, name = match.groups()
        options = [option for option in cause.options or [] if option != "base_config"]
        message = f"{group}={name} is not known; choose one of {', '.join(options)}"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        message = _unknown_key(cause.full_key)
    elif isinstance(cause, ValidationError):
        value: Any = cause.value
        message = f"{cause.full_key}={'null' if value is None else value}: {text[0]}"
    else:
        message = "; ".join(line for line in text if "https://" not in line and "full_key" not in line)
    return f"error: {message}"


def _unknown_key(key: str) -> str:
    known = {group: [field.name for field in fields(schema)] for group, schema in GROUPS.items()}
    keys = [f"{group}.{name}" for group, names in known.items() for name in names]
    keys += [field.name for field in fields(Config)] + ["experiment"]
    group = key.partition(".")[0]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    inside = f" ({group}. has {', '.join(known[group])})" if group in known and "." in key else ""
    return f"{key} is not a key{hint}{inside}" + ("" if near or inside else "; --help lists the keys")
