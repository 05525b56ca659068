"""Checks of a command's arguments that Hydra does not make, or reports less clearly."""

import re
from dataclasses import fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import OverrideParseException

from vit_lightning.keys import InputError, sections
from vit_lightning.messages import keys_meant, keys_of, unknown_key
from vit_lightning.schemas import CONF, options_of

OPTIONS = {  # Hydra's options; no other argument may begin with a dash
    *("--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i", "--version"),
    *("--hydra-help", "--experimental-rerun"),
}
OPEN = re.compile(r"\+*(\w+\.options|callbacks|logger)\.")  # keys that the schema does not declare


def added(arguments: list[str]) -> list[str]:
    """Convert settings to Hydra's syntax, where undeclared keys begin with a plus."""
    return [f"++{item}" if OPEN.match(item) and item[0] not in "+~" else item for item in arguments]


def check_options(typed: list[str], schema: type) -> None:
    """Refuse options that Hydra does not have.

    Raises:
        InputError: if there is one.
    """
    for number, item in enumerate(typed):
        option, equals, value = item.partition("=")
        if not re.match("--?[A-Za-z]", item):
            continue
        if option not in OPTIONS:
            meant = " or ".join(keys_meant(option.lstrip("-").replace("-", "_"), schema))
            value = value if equals else next((each for each in typed[number + 1 :] if each[0] != "-"), "value")
            hint = f"write {meant}={value}" if meant else "settings are written key=value, as in seed=1"
            raise InputError(f"{option} is not an option; {hint}")
        if option in ("--cfg", "-c") and not {value, *typed[number + 1 : number + 2]} & {"job", "hydra", "all"}:
            raise InputError(f"{option} needs an argument; write {option} job")


def check_overrides(arguments: list[str], schema: type) -> list[str]:
    """Refuse settings that would fail every job of a sweep, or make two of its jobs the same.

    Args:
        arguments: the command's arguments.
        schema: the schema of its configuration.

    Returns:
        The Hydra setting that names a job's directory after what the sweep varies.

    Raises:
        InputError: if a setting is invalid, or a list of values is empty or repeats a value.
    """
    given = [item for item in arguments if ("=" in item and item[0] != "-") or item[0] == "~"]  # leaves out --cfg job
    try:
        settings = OverridesParser.create().parse_overrides(given)
    except OverrideParseException:
        return []  # Hydra reports it
    chosen = {setting.key_or_group for setting in settings}
    fixed: dict[str, bool] = {}  # if a key is set twice, the last one counts
    for setting in settings:
        check_setting(setting, schema, chosen)
        name, value = setting.key_or_group, setting.value()
        if isinstance(value, IntervalSweep) and "hydra/sweeper" not in " ".join(arguments):
            raise InputError(
                f"{setting.input_line}: a sweep needs values, as in {name}=1,2; python -m vit_lightning.search takes "
                "an interval as space"
            )
        if isinstance(value, ChoiceSweep | RangeSweep):
            values = list(setting.sweep_string_iterator())
            twice = [item for number, item in enumerate(values) if item in values[:number]]
            if twice:
                raise InputError(f"{setting.input_line} has {twice[0]} twice; the jobs of a sweep must differ")
            if not values:
                raise InputError(f"{setting.input_line} has no value; give some, as in {name}=1,2")
        fixed[name] = not setting.is_sweep_override()
    names = ",".join(name for name, is_fixed in fixed.items() if is_fixed)
    return [f"hydra.job.config.override_dirname.exclude_keys=[{names}]"]


def check_setting(setting: Override, schema: type, chosen: set[str]) -> None:
    """Refuse an invalid setting that Hydra would accept, or report less clearly.

    Args:
        setting: the setting.
        schema: the schema of the configuration.
        chosen: all keys and groups that are set.

    Raises:
        InputError: if a key is unknown, missing, removed or in a section that is ``null``, or a class path is set.
    """
    line, name, parts = setting.input_line or "", setting.key_or_group, sections(schema)
    group, dot, _ = name.partition(".")
    if not name:
        raise InputError(f"{line} has no key; settings are written key=value")
    if re.search(r"(^|[^\w/-])_target_\s*[:=]", line) and not name.startswith(("callbacks", "logger")):
        # Hydra would call whatever _target_ names.
        raise InputError(f"{line}: _target_ can only be set in callbacks and logger; remove it")
    if setting.is_delete() and name in keys_of(schema) and not (CONF / name).is_dir():  # a group can be left out
        raise InputError(f"{line}: a key cannot be removed; set it, as in {name}=value")
    value = [] if setting.is_delete() or setting.is_sweep_override() else setting.value()
    if (CONF / name).is_dir() and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise InputError(f"{line}: a group takes names; choose from {', '.join(options_of(name))}")
    absent = {each.name for each in fields(schema) if each.name in parts and each.default is None} - chosen
    if dot and group in absent:
        raise InputError(f"{line} needs {group}= as well; choose one of {', '.join(options_of(group))}")
    if not setting.is_add() or name.startswith("hydra") or OPEN.match(name):
        return
    if (CONF / name).is_dir() and not OPEN.match(f"{name}.") and name != "space":
        raise InputError(f"{name} is a group; write {line.lstrip('+')}")
    section, _, key = name.rpartition(".")
    part = parts.get(section) if section else schema
    if part is None or key not in [each.name for each in fields(part)]:
        raise InputError(unknown_key(name, schema))
