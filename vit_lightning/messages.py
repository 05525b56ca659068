"""What the commands say: ``--help``, the table of keys, and the one line of a mistake, which names the key or file."""

import difflib
import json
import re
import sys
import textwrap
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from vit_lightning.keys import InputError, default_of, sections
from vit_lightning.schemas import CONF, SCHEMAS, SearchRun, options_of

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


# Arguments of lightning.Trainer that a run sets itself: why, and what to use instead.
TRAINERS_OWN = {
    "enable_checkpointing": "a run always saves itself; save_minutes=null leaves out checkpoints within an epoch",
    "val_check_interval": "a run is validated and saved at the end of an epoch; for shorter epochs use "
    "trainer.limit_train_batches=0.25",
    "enable_model_summary": "a run prints its layers itself",
    "limit_predict_batches": "predict takes the images that it is given",
    "default_root_dir": "use hydra.run.dir",
    "use_distributed_sampler": "every process gets its share of the images anyway",
    "reload_dataloaders_every_n_epochs": "the images of a run do not change",
    "num_nodes": "use torchrun --nnodes",
    "barebones": "use python -m vit_lightning.benchmark to measure the speed",
    "plugins": "use trainer.precision and trainer.strategy",
    "callbacks": "use the group callbacks, as in callbacks=early_stopping",
    "logger": "use the group logger, as in logger=csv",
    "enable_autolog_hparams": "hyper-parameters are always logged",
    "model_registry": "it needs Lightning's cloud",
}


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
    default = default_of(field)
    others = [choice for choice in field.metadata["choices"] if choice != default]
    shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return f"{field.name}={'|'.join([shown, *others])}"


def _wrapped(left: str, right: str) -> list[str]:
    body = textwrap.wrap(right, 80 - COLUMN, break_on_hyphens=False)
    head = f"  {left}"
    if len(head) >= COLUMN:
        return [head, *(" " * COLUMN + line for line in body)]
    return [f"{head:<{COLUMN}}{body[0]}", *(" " * COLUMN + line for line in body[1:])]


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
        if (CONF / group).is_dir() and value in ("", "null", "true", "false"):
            more = "; traceback=true shows where a mistake is found" if group == "debug" else ""
            return f"error: {group}={value} is not an option; choose one of {', '.join(options_of(group))}{more}"
    return f"error: {_hydra_message(error, schema)}"


def _hydra_message(error: Exception, schema: type) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, MissingConfigException) and cause.options:
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        options = [option for option in cause.options if option != "base_config"]
        return f"{group}={name} is not known; choose one of {', '.join(options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return unknown_key(cause.full_key, schema)
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


def unknown_key(name: str, schema: type) -> str:
    known = {group: [field.name for field in fields(section)] for group, section in sections(schema).items()}
    group, dot, _ = name.partition(".")
    if group == "trainer" and name.removeprefix("trainer.") in TRAINERS_OWN:
        return f"{name} is not a key: {TRAINERS_OWN[name.removeprefix('trainer.')]}"
    if group == "hydra":
        return f"{name} is not a key; --cfg hydra lists Hydra's own"
    if group == "space" and dot and schema is SearchRun:
        return f"{name} is not a key; write a space of your own into conf/space/ and choose it, as in space=recipe"
    if not dot and (CONF / name).is_dir():
        return f"{name} is a group; write {name}=option without +"
    hint = hint_for(name, schema)
    more = f" ({group}. has {', '.join(known[group])})" if group in known and dot else ""
    return f"{name} is not a key{hint}{more}" if hint or more else f"{name} is not a key; --help lists the keys"


def hint_for(name: str, schema: type) -> str:
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
