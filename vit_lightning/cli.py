"""From a command line to checked dataclasses and a task: the only module that knows Hydra and OmegaConf.

A mistake ends in one line on standard error and exit code 1, before torch is imported where possible.
"""

import contextlib
import difflib
import errno
import importlib
import json
import math
import os
import re
import shlex
import sys
import textwrap
import traceback
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import hydra
import yaml
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

CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir())
SCHEMAS: dict[str, type] = {  # by command, which is also the name of its file in conf/
    "train": Config,
    "benchmark": BenchmarkRun,
    "search": SearchRun,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
}
MISTAKES = (InputError, OmegaConfBaseException, OSError)  # end in one line instead of a traceback
COLUMN = 26  # of the explanations in --help
BARE_PATH = {"predict": "images", "evaluate": "checkpoint", "export": "checkpoint", "train": "data.root"}
ALIASES = {  # what users of Lightning, timm, Hugging Face and lightning-hydra-template type, and what it is here
    **dict.fromkeys(("depth", "num_layers", "num_hidden_layers", "n_layers", "n_layer"), "model.layers"),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead"), "model.heads"),
    **dict.fromkeys(("hidden_size", "hidden_dim", "dim", "width", "d_model", "n_embd"), "model.embed_dim"),
    **dict.fromkeys(("mlp_ratio", "intermediate_size", "dim_feedforward"), "model.mlp_dim"),
    **dict.fromkeys(("img_size", "input_size", "resolution"), "model.image_size"),
    **dict.fromkeys(("drop_rate", "dropout_rate", "hidden_dropout_prob"), "model.dropout"),
    **dict.fromkeys(("drop_path_rate", "stochastic_depth"), "model.drop_path"),
    **dict.fromkeys(("global_pool", "pooling"), "model.pool"),
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("opt", "optimizer"), "optim.name"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type", "sched"), "optim.schedule"),
    **dict.fromkeys(("warmup_epochs", "warmup_steps", "warmup_ratio"), "optim.warmup"),
    **dict.fromkeys(("smoothing", "label_smoothing_factor"), "optim.label_smoothing"),
    **dict.fromkeys(("model_ema", "model_ema_decay", "ema_decay"), "optim.ema"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "n_epochs"), "trainer.max_epochs"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus"), "trainer.devices"),
    **dict.fromkeys(("amp", "fp16", "bf16", "use_amp"), "trainer.precision"),
    **dict.fromkeys(("clip_grad", "max_grad_norm", "gradient_clip", "grad_clip"), "trainer.gradient_clip_val"),
    **dict.fromkeys(("bs", "train_batch_size", "per_device_train_batch_size"), "data.batch_size"),
    **dict.fromkeys(("val_batch_size", "test_batch_size", "per_device_eval_batch_size"), "data.eval_batch_size"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("data_dir", "data_path", "dataset_path", "train_dir"), "data.root"),
    **dict.fromkeys(("dataset", "dataset_name"), "data.source"),
    **dict.fromkeys(("ckpt_path", "resume_from_checkpoint", "resume_from", "resume_path"), "resume"),
    **dict.fromkeys(("init_from", "initial_checkpoint", "weights", "pretrained", "model_path"), "checkpoint"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed"), "seed"),
}
OPTIONS = {  # of Hydra's command line; anything else that begins with a dash is a mistake
    *("--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i", "--version"),
    *("--hydra-help", "--experimental-rerun"),
}


def run_command(name: str, task: str, text: str | None) -> None:
    """Compose the configuration from ``conf/`` and the command line, and run a task on it, or a sweep of tasks.

    A job of a sweep that fails does not stop the others: its message is in its directory as ``error.txt``.

    Args:
        name: of the command, one of ``SCHEMAS``.
        task: ``module:function``, imported once the configuration is checked. It takes the configuration, the run's
            directory and the :class:`~vit_lightning.config.Invocation`, and returns what a sweeper optimises.
        text: what ``--help`` says first.
    """
    schema = SCHEMAS[name]
    typed = sys.argv[1:]
    if {"--help", "-h"} & set(typed):
        print(help_text(name, text or ""))
        return
    for option in (item.partition("=")[0] for item in typed if re.match("--?[a-z]", item)):
        if option not in OPTIONS:
            hint = _hint(option.lstrip("-").replace("-", "_"), schema)
            sys.exit(f"error: {option} is not an option; settings are written key=value{hint or ', as in seed=1'}")
    register_schemas()
    started = False

    def job(cfg: DictConfig) -> float:
        nonlocal started
        started = True
        sys.argv[1:] = typed
        settings = HydraConfig.get()
        run_dir = Path(settings.runtime.output_dir)
        try:
            return _run_task(task, cfg, name, run_dir)
        except Exception as error:
            mistake = isinstance(error, MISTAKES)
            if settings.mode is RunMode.MULTIRUN:
                message = one_line(error, schema, run_dir) if mistake else traceback.format_exc().strip()
                print(f"job {settings.job.num} ({settings.job.override_dirname}): {message}", file=sys.stderr)
                with contextlib.suppress(OSError):  # a directory that cannot be written
                    (run_dir / "error.txt").write_text(f"{' '.join(settings.overrides.task)}\n{message}\n")
                return math.nan
            if mistake and "debug=true" not in typed:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()  # fails, as it should, if the run has written something
                sys.exit(one_line(error, schema, run_dir))
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises exceptions instead of printing its own report
    try:
        first = next((i for i, item in enumerate(typed) if "=" in item and not item.startswith("-")), len(typed))
        sys.argv[1:] = [*typed[:first], *check_overrides(typed, schema), *typed[first:]]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "debug=true" in typed or (started and not isinstance(error, MISTAKES)):
            raise
        sys.exit(one_line(error, schema))
    finally:
        sys.argv[1:] = typed


def _run_task(task: str, cfg: DictConfig, name: str, run_dir: Path) -> float:
    """Check the configuration, import the task and call it."""
    settings, schema = HydraConfig.get(), SCHEMAS[name]
    if not os.access(run_dir, os.W_OK):  # said now, not when the work is done
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
    (run_dir / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
    config = to_config(cfg, schema)
    check_paths(config)
    overrides = list(settings.overrides.task)
    program = ["python", "-m", f"vit_lightning.{name}"]
    if settings.mode is RunMode.MULTIRUN:
        if isinstance(config, Config) and config.trainer.strategy != "auto":
            raise InputError(f"trainer.strategy={config.trainer.strategy} is for single runs; a sweep uses one device")
        command = shlex.join([*program, *overrides])
    else:
        command = shlex.join([*program, *sys.argv[1:]])

    def compose(more: list[str]) -> Any:
        try:
            return to_config(hydra.compose(name, more), schema)
        except InputError:
            raise
        except Exception as error:  # Hydra and OmegaConf have many
            raise InputError(one_line(error, schema).removeprefix("error: ")) from error

    module, function = task.split(":")
    return getattr(importlib.import_module(module), function)(
        config, run_dir, invocation=Invocation(command, overrides, compose)
    )


class SweepEnd(Callback):
    """Prints the table of a sweep, and ends with exit code 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        if not any(directory.glob("*/")):
            sys.exit("error: the sweep has no jobs; a glob that matches no option gives none")
        if any(directory.rglob("summary.json")):
            try:
                importlib.import_module("vit_lightning.sweeps.table").show(directory)
            except InputError as error:  # the jobs have their results; only their table is missing
                print(f"error: {error}", file=sys.stderr)
        failed = [
            f"  {relative(path.parent)}: {path.read_text().splitlines()[-1]}"
            for path in sorted(directory.rglob("error.txt"))
        ]
        if failed:
            sys.exit("\n".join([f"error: {len(failed)} of the sweep's jobs failed:", *failed]))


def check_overrides(arguments: list[str], schema: type) -> list[str]:
    """Refuse settings that would fail every job of a sweep, or make two of its jobs the same.

    Args:
        arguments: of the command.
        schema: of its configuration.

    Returns:
        Hydra's setting that names the directory of a job after what the sweep varies.

    Raises:
        InputError: if a key is unknown, a class path is set, or a list of values is empty or repeats a value.
    """
    given = [item for item in arguments if "=" in item and not item.startswith("-")]  # no options, as --cfg job
    try:
        settings = OverridesParser.create().parse_overrides(given)
    except OverrideParseException:
        return []  # Hydra reports it
    fixed: dict[str, bool] = {}  # the last of a key that is set twice counts
    for setting in settings:
        name, value = setting.key_or_group, setting.value()
        if re.search(r"(^|[^\w/-])_target_\s*[:=]", setting.input_line or ""):  # Hydra would call whatever it names
            raise InputError(f"{setting.input_line}: _target_ cannot be set; remove it")
        if setting.is_add() and not name.startswith("hydra"):
            group, _, rest = name.rpartition(".")
            section = sections(schema).get(group) if group else schema
            if section is None or rest not in [field.name for field in fields(section)]:
                raise InputError(_unknown_key(name, schema))
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


def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the names that the files in ``conf/`` begin with."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(f"base_{name}", schema)
    for group, section in sections(Config).items():
        store.store("base_config", section, group=group)


def to_config(cfg: DictConfig, schema: type) -> Any:
    """The composed configuration as checked dataclasses.

    Raises:
        InputError: if a key is unknown (Hydra lets ``+typo=1`` pass), or a value or combination is not possible.
    """
    for section, part in [(None, schema), *sections(schema).items()]:
        known = [field.name for field in fields(part)]
        for name in map(str, cfg if section is None else cfg[section] or ()):
            if name not in known:
                raise InputError(_unknown_key(f"{section}.{name}" if section else name, schema))
    return OmegaConf.to_object(cfg)


def check_paths(config: Any) -> None:
    """Report a path that does not exist before torch is imported.

    Raises:
        InputError: if there is one.
    """
    resume = getattr(config, "resume", None)
    for name, path in (("checkpoint", config.checkpoint), ("resume", resume)):
        if path not in (None, "pretrained") and not Path(path).expanduser().exists():
            more = ", a .ckpt or .safetensors file, or pretrained" if name == "checkpoint" else ""
            raise InputError(f"{name}={path} does not exist; name a run's directory{more}")
    data = getattr(config, "data", None)
    if data is None or data.source != "image_folder" or resume is not None:
        return
    if not Path(data.root).expanduser().is_dir():
        raise InputError(f"data.root={data.root} is not a directory; it needs train/<class>/* and test/<class>/*")


# --- help ------------------------------------------------------------------------------------------------------------


def help_text(name: str, text: str) -> str:
    """The text of ``--help``: the command, its groups with their options, and every key of its schema."""
    lines = text.strip().splitlines()
    defaults = yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"]
    groups = [next(iter(item)) for item in defaults if isinstance(item, dict) and "hydra" not in next(iter(item))]
    if groups:
        lines += ["", "Groups (choose with group=option; a file each in conf/):", ""]
    for group in groups:
        lines += _wrapped(group, ", ".join(options_of(group)))
    lines += ["", "Keys (set with key=value; the default is shown):"]
    schema = SCHEMAS[name]
    own = [field for field in fields(schema) if field.metadata]
    for group, section in sections(schema).items():
        lines += ["", f"{section.__doc__}", "", *_key_lines(fields(section), f"{group}.")]
    lines += ["", *_key_lines(own, "")]
    lines += ["", "--cfg job prints the configuration; -m sweeps over comma-separated values."]
    return "\n".join(lines)


def key_table() -> str:
    """All keys of all commands as a table in Markdown."""
    commands: dict[tuple[str, str], list[str]] = {}  # by key and meaning
    for name, schema in SCHEMAS.items():
        for group, section in {**sections(schema), "": schema}.items():
            for field in (field for field in fields(section) if field.metadata):
                key = f"{group}.{key_default(field)}".removeprefix(".").replace("|", "\\|")
                commands.setdefault((key, field.metadata["text"]), []).append(name)
    rows = [f"| `{key}` | {text} | {', '.join(names)} |" for (key, text), names in commands.items()]
    return "\n".join(["| key and default | meaning | commands |", "|---|---|---|", *rows])


def _key_lines(declared: Any, prefix: str) -> list[str]:
    """Lines of ``--help`` for some keys."""
    return [line for field in declared for line in _wrapped(f"{prefix}{key_default(field)}", field.metadata["text"])]


def key_default(field: Field) -> str:
    """``layers=8``; with choices ``pool=cls|mean|attention``, the default first."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    others = [choice for choice in field.metadata["choices"] if choice != default]
    shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return f"{field.name}={'|'.join([shown, *others])}"


def options_of(group: str) -> list[str]:
    """The options of a group: its files in ``conf/``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _wrapped(left: str, right: str) -> list[str]:
    body = textwrap.wrap(right, 80 - COLUMN, break_on_hyphens=False)
    head = f"  {left}"
    if len(head) >= COLUMN:
        return [head, *(" " * COLUMN + line for line in body)]
    return [f"{head:<{COLUMN}}{body[0]}", *(" " * COLUMN + line for line in body[1:])]


# --- errors ----------------------------------------------------------------------------------------------------------


def one_line(error: Exception, schema: type, run_dir: Path | None = None) -> str:
    """What went wrong, naming the key as it was typed or the file, and what to do.

    Args:
        error: one of ``MISTAKES``, or of Hydra's own.
        schema: of the command's configuration.
        run_dir: directory of the run; ``None`` if Hydra has not made it yet.
    """
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and not isinstance(error, MissingConfigException):  # which is an OSError too
        if not error.filename:
            return f"error: {error.strerror or error or type(error).__name__}"
        file = Path(str(error.filename))
        if run_dir is None or file.is_relative_to(run_dir):
            hint = "choose another hydra.run.dir, or in a sweep hydra.sweep.dir"
            return f"error: {file} cannot be written ({error.strerror}); {hint}"
        return f"error: {file} cannot be opened ({error.strerror}); fix its permissions or name another file"
    for group, value in (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument):
        if group in sections(schema) and value in ("", "null"):
            return f"error: {group}={value} is not an option; choose one of {', '.join(options_of(group))}"
    return f"error: {_hydra_message(error, schema)}"


def _hydra_message(error: Exception, schema: type) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, MissingConfigException) and cause.options:
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        options = [option for option in cause.options if option != "base_config"]
        return f"{group}={name} is not known; choose one of {', '.join(options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return _unknown_key(cause.full_key, schema)
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}={'null' if cause.value is None else cause.value}: {text[0]}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {text[0]}"
    if isinstance(cause, OverrideParseException):
        name, equals, value = cause.override.partition("=")
        hint = f"quote the value: {name}='\"{value}\"'" if equals else f"write {name}=value"
        command = next(command for command, known in SCHEMAS.items() if known is schema)
        if not equals and command in BARE_PATH and (Path(name).exists() or "/" in name):
            hint = f"a path is written {BARE_PATH[command]}={name}"
        return f"{cause.override} cannot be parsed as a setting; {hint}"
    noise = re.compile(r"https://|full_key|onfig search path:|provider=")
    return "; ".join(line for line in text if not noise.search(line))


def _unknown_key(name: str, schema: type) -> str:
    known = {group: [field.name for field in fields(section)] for group, section in sections(schema).items()}
    group, dot, _ = name.partition(".")
    if group == "hydra":
        return f"{name} is not a key; --cfg hydra lists Hydra's own"
    if group == "space" and dot and schema is SearchRun:
        return f"{name} is not a key; write a space of your own into conf/space/ and choose it, as in space=recipe"
    if not dot and (CONF / name).is_dir():
        return f"{name} is a group; write {name}=option without +"
    hint = _hint(name, schema)
    more = f" ({group}. has {', '.join(known[group])})" if group in known and dot else ""
    return f"{name} is not a key{hint}{more}" if hint or more else f"{name} is not a key; --help lists the keys"


def _hint(name: str, schema: type) -> str:
    """The key that was probably meant, if there is one."""
    keys = [f"{group}.{field.name}" for group, part in sections(schema).items() for field in fields(part)]
    keys += [field.name for field in fields(schema)] + ["experiment", "ablation", "sweep"]
    group, _, rest = name.rpartition(".")
    if ALIASES.get(rest) in keys:
        return f"; did you mean {ALIASES[rest]}?"
    near = [key for key in keys if key.endswith(f".{name}")][:1]
    if not near and group in sections(schema):  # compared without the group, which makes any two of its keys similar
        names = [key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}.")]
        near = [f"{group}.{match}" for match in difflib.get_close_matches(rest, names, n=1, cutoff=0.75)]
    elif not near:
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
