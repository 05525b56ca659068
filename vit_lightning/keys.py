"""Declaring and checking keys of the configuration, the errors that a user sees, and how a task was called."""

import math
import re
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

LARGEST = {int: 2**63 - 1, float: 1e30}  # torch's limits; a float may be multiplied before it is converted to 32 bits


class InputError(ValueError):
    """A mistake that the user can fix; the message is one line that names the key or file, and says what to do."""

    def __init__(self, message: str) -> None:
        message = message.rpartition("InputError: ")[2]  # a loader worker's error comes with its traceback
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))  # a value may contain line breaks


class MachineError(InputError):
    """A fault of the machine, which would affect any configuration, such as a full disk or a process that died."""


def key(
    default: Any,
    text: str,
    choices: Collection[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a key of the configuration.

    Args:
        default: the default value; a list is copied for every instance.
        text: its meaning, in one sentence.
        choices: the values it may take, or the :class:`~vit_lightning.register.Registry` of parts to choose from.
        low: smallest value, or smallest element of a list.
        high: largest value.
        above: a value that it must exceed.
        below: a value that it must stay below.
    """
    metadata = dict(text=text, choices=choices, low=low, high=high, above=above, below=below)
    if isinstance(default, type | list):
        factory = default if isinstance(default, type) else lambda: list(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_values(section: Any) -> None:
    """Check every key of a section against its declaration.

    Raises:
        InputError: if a value is out of range or not among the choices.
    """
    for declared in fields(section):
        if not declared.metadata:
            continue  # a nested section checks itself
        value = getattr(section, declared.name)
        for item in value if isinstance(value, list) else [value]:
            nested = item is not value and isinstance(item, list | dict)  # OmegaConf accepts lists among numbers
            problem = "must be a list of single values" if nested else problem_of(declared, item)
            if problem:
                raise InputError(f"{section.prefix}{declared.name}={value} {problem}")


def default_of(declared: Field) -> Any:
    """The default value of a key."""
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def problem_of(declared: Field, value: Any) -> str | None:
    """What is wrong with a value of a key, if anything."""
    range_ = declared.metadata
    choices = range_["choices"]
    if choices != () and value not in choices and not (value is None and declared.default is None):
        return f"is not known; choose one of {getattr(choices, 'choices', None) or ', '.join(choices) or 'none'}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "must be finite"
    largest = LARGEST[type(value)]
    if abs(value) > largest:
        return f"must be at most {largest}"
    low, high, above, below = (range_[name] for name in ("low", "high", "above", "below"))
    reached = (low is None or value >= low) and (above is None or value > above)
    if reached and (high is None or value <= high) and (below is None or value < below):
        return None
    if low is not None and high is not None:
        return f"must be between {low} and {high}"
    wanted = [f"at least {low}"] if low is not None else []
    wanted += [f"greater than {above}"] if above is not None else []
    wanted += [f"less than {below}"] if below is not None else []
    return f"must be {' and '.join(wanted)}"


@dataclass(frozen=True, slots=True)
class Invocation:
    """How a task was called: by a command line or from Python.

    Attributes:
        command: the command, in a form that can be typed again.
        overrides: settings of the command line, as in ``["model.layers=4", "seed=1"]``; ``None`` if called from Python.
        compose: returns the checked configuration for other settings; ``None`` if called from Python.
        build: builds an object, for the run's directory, from its ``_target_`` and arguments, which must come from the
            command line or ``conf/``, never from a file of a run; ``None`` if called from Python.
    """

    command: str
    overrides: list[str] | None = None
    compose: Callable[[list[str]], Any] | None = None
    build: Callable[[dict[str, Any], Path], Any] | None = None

    @property
    def keys(self) -> set[str]:
        """The keys and groups that the command line sets."""
        return {item.lstrip("+~").partition("=")[0].partition("@")[0] for item in self.overrides or ()}


def as_list(value: Any) -> list[str]:
    """One or more names as a list."""
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item]


def from_python() -> Invocation:
    """The invocation of a task by a program or notebook."""
    return Invocation(shlex.join(["python", *sys.argv]))


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten ``{"model": {"layers": 8}}`` to ``{"model.layers": 8}``: keys as they are typed."""
    flat = {}
    for name, value in config.items():
        flat.update(
            {f"{name}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def sections(schema: type) -> dict[str, type]:
    """The sections of a configuration by name: ``model``, ``data`` … and their classes."""
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(schema)}  # X | None has two types
    return {
        name: kind for name, kinds in types.items() for kind in kinds if isinstance(kind, type) and is_dataclass(kind)
    }
