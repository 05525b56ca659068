"""Texts of the commands: ``--help``, the table of keys, and one-line error messages, which name the key or file."""

import difflib
import errno
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

from vit_lightning.guard import FULL, fault_of
from vit_lightning.keys import InputError, default_of, sections
from vit_lightning.schemas import CONF, SCHEMAS, SearchRun, options_of

COLUMN = 26  # column at which explanations begin in --help
BARE_PATH = {
    "predict": "images",
    "evaluate": "checkpoint",
    "export": "checkpoint",
    "train": "data.root",
    "shard": "data.root",
}
# Names of keys in Lightning, timm, Hugging Face and lightning-hydra-template, and their equivalents here; of several,
# the first that the command has is meant.
ALIASES: dict[str, tuple[str, ...]] = {
    name: tuple(meant)
    for names, *meant in (
        ("depth num_layers num_hidden_layers n_layers n_layer num_blocks", "model.layers"),
        ("num_heads num_attention_heads n_heads n_head nhead", "model.heads"),
        ("hidden_size hidden_dim dim width d_model n_embd", "model.embed_dim"),
        ("mlp_ratio intermediate_size dim_feedforward", "model.mlp_dim"),
        ("img_size input_size resolution", "model.image_size"),
        ("patch", "model.patch_size"),
        ("in_chans in_channels num_channels", "model.channels"),
        ("nb_classes num_labels", "model.num_classes"),
        ("drop drop_rate dropout_rate hidden_dropout_prob", "model.dropout"),
        ("drop_path_rate stochastic_depth", "model.drop_path"),
        ("global_pool pooling", "model.pool"),
        ("learning_rate base_lr", "optim.lr"),
        ("wd decay", "optim.weight_decay"),
        ("opt optimizer", "optim.name"),
        ("scheduler lr_scheduler lr_scheduler_type sched", "optim.schedule"),
        ("warmup_epochs warmup_steps warmup_ratio", "optim.warmup"),
        ("adam_betas opt_betas", "optim.betas"),
        ("smoothing label_smoothing_factor", "optim.label_smoothing"),
        ("model_ema model_ema_decay ema_decay", "optim.ema"),
        ("layer_decay_rate llrd", "optim.layer_decay"),
        ("mixup_alpha", "augment.mixup"),
        ("cutmix_alpha", "augment.cutmix"),
        ("random_resized_crop rrc crop_scale resize_scale", "augment.scale"),
        ("reprob random_erasing", "augment.erase"),
        ("aa auto_augment autoaugment randaugment rand_augment", "augment.policy"),
        ("hflip random_flip", "augment.flip"),
        ("epochs num_epochs num_train_epochs n_epochs epoch max_epoch", "trainer.max_epochs"),
        ("gpus num_gpus n_gpus", "trainer.devices"),
        ("gpu device", "accelerator", "trainer.accelerator"),
        ("amp fp16 bf16 use_amp", "trainer.precision"),
        ("clip_grad max_grad_norm gradient_clip grad_clip", "trainer.gradient_clip_val"),
        ("gradient_accumulation_steps accum_iter grad_accum_steps", "trainer.accumulate_grad_batches"),
        ("bs train_batch_size per_device_train_batch_size", "data.batch_size"),
        ("val_batch_size test_batch_size per_device_eval_batch_size", "data.eval_batch_size"),
        ("num_workers dataloader_num_workers n_workers", "data.workers"),
        ("data_dir data_path dataset_path train_dir", "data.root"),
        ("val_split val_size valid_size", "data.val_fraction"),
        ("dataset dataset_name", "data"),
        ("ckpt_path resume_from_checkpoint resume_from resume_path", "resume", "checkpoint"),
        ("init_from initial_checkpoint weights pretrained model_path ckpt finetune", "checkpoint"),
        ("image input image_path img", "images"),
        ("top_k topk", "top"),
        ("random_seed random_state manual_seed seed_everything", "seed"),
        ("compile_model torch_compile torchcompile", "compile"),
        ("output_dir out_dir log_dir save_dir output", "hydra.run.dir"),
        ("n_trials num_trials", "search.trials"),
        ("early_stopping early_stop", "callbacks=early_stopping"),
        ("patience", "callbacks=early_stopping callbacks.early_stopping.patience"),
    )
    for name in names.split()
}


# Arguments of lightning.Trainer that a run sets itself, with the reason and what to use instead.
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
    """The text of ``--help``: the command, its groups and their options, and every key of its schema."""
    lines = text.strip().splitlines()
    groups = groups_of(name)
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
    """All keys of all commands, as a Markdown table."""
    commands: dict[tuple[str, str], list[str]] = {}  # the commands that have a key with this meaning
    for name, schema in SCHEMAS.items():
        for group, section in {**sections(schema), "": schema}.items():
            for field in (field for field in fields(section) if field.metadata):
                key = f"{group}.{key_default(field)}".removeprefix(".").replace("|", "\\|")
                commands.setdefault((key, field.metadata["text"]), []).append(name)
    rows = [f"| `{key}` | {text} | {', '.join(names)} |" for (key, text), names in commands.items()]
    return "\n".join(["| key and default | meaning | commands |", "|---|---|---|", *rows])


def print_keys() -> None:
    """Print the table of all keys."""
    print(key_table())


def _key_lines(declared: Any, prefix: str) -> list[str]:
    """Lines of ``--help`` for some keys."""
    return [line for field in declared for line in _wrapped(f"{prefix}{key_default(field)}", field.metadata["text"])]


def key_default(field: Field) -> str:
    """Format a key as ``layers=8`` or, with choices, ``pool=cls|mean|attention``, the default first."""
    default = default_of(field)
    others = [choice for choice in field.metadata["choices"] if choice != default]
    shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return f"{field.name}={'|'.join([shown, *others])}"


def _wrapped(left: str, right: str) -> list[str]:
    body = textwrap.wrap(right, 80 - COLUMN, break_on_hyphens=False)
    head = f"  {left}"
    if len(head) >= COLUMN:
        broken = textwrap.wrap(head.replace("|", "| "), 80, subsequent_indent="    ", break_on_hyphens=False)
        return [*(line.replace("| ", "|") for line in broken), *(" " * COLUMN + line for line in body)]
    return [f"{head:<{COLUMN}}{body[0]}", *(" " * COLUMN + line for line in body[1:])]


def is_mistake(error: Exception) -> bool:
    """Whether an error is reported in one line instead of a traceback."""
    return isinstance(error, InputError | OmegaConfBaseException) or fault_of(error) is not None


def one_line(error: Exception, schema: type, run_dir: Path | None = None) -> str:
    """Describe what went wrong, naming the key as it was typed or the file, and what to do.

    Args:
        error: one that :func:`is_mistake` accepts, or one of Hydra's own.
        schema: the schema of the command's configuration.
        run_dir: directory of the run; ``None`` if Hydra has not created it yet.
    """
    if isinstance(error, InputError):
        return f"error: {error}"
    fault = None if isinstance(error, MissingConfigException) else fault_of(error)  # also an OSError
    if fault is not None and isinstance(error, OSError) and error.filename and error.errno != errno.EMFILE:
        file = Path(str(error.filename))
        if run_dir is None or file.is_relative_to(run_dir):
            hint = f"{'free disk space or ' * (error.errno in FULL)}choose another hydra.run.dir"
            return f"error: {file} cannot be written ({error.strerror}); {hint}, or in a sweep hydra.sweep.dir"
    if fault is not None:
        return f"error: {fault}"
    for group, value in (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument):
        if (CONF / group).is_dir() and value in ("", "null", "true", "false"):
            more = "; traceback=true shows where a mistake is found" if group == "debug" else ""
            return f"error: {group}={value} is not an option; choose one of {', '.join(options_of(group))}{more}"
    return f"error: {_hydra_message(error, schema)}"


def _hydra_message(error: Exception, schema: type) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, MissingConfigException) and cause.options:
        missing = str(cause.missing_cfg_file)
        for group, _, name in (item.partition("=") for item in sys.argv[1:]):
            if "/" in name and missing == f"{group}/{name}":
                stem = Path(name).stem
                return (
                    f"{group}={name} is not known: an option is a file in conf/{group}/; move yours to "
                    f"DIR/{group}/{stem}.yaml and write --config-dir DIR {group}={stem}"
                )
        group, _, name = missing.rpartition("/")
        options = [option for option in cause.options if option != "base_config"]
        return f"{group}={name} is not known; choose one of {', '.join(options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        typed = (argument.lstrip("+~").partition("=")[0] for argument in sys.argv[1:])
        return unknown_key(next((key for key in typed if key.startswith(f"{cause.full_key}.")), cause.full_key), schema)
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}={'null' if cause.value is None else cause.value}: {text[0]}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {text[0]}"
    if isinstance(cause, OverrideParseException):
        return f"{cause.override} cannot be parsed as a setting; {_parse_hint(cause.override, schema)}"
    noise = re.compile(r"https://|full_key|onfig search path:|provider=")
    return "; ".join(line for line in text if not noise.search(line))


def _parse_hint(argument: str, schema: type) -> str:
    """Suggest how to write an argument as a setting."""
    name, equals, value = argument.partition("=")
    if equals:
        return f"quote the value: {name}='\"{value}\"'"
    command = next(command for command, known in SCHEMAS.items() if known is schema)
    if "experiment" in groups_of(command) and name in options_of("experiment"):
        return f"write experiment={name}"
    looks_like_path = Path(name).exists() or "/" in name
    if command in BARE_PATH and (looks_like_path or (command != "train" and name not in keys_of(schema))):
        return f"a path is written {BARE_PATH[command]}={name}"
    return f"write {name}=value"


def unknown_key(name: str, schema: type) -> str:
    """Say that a key is unknown, and which one was probably meant."""
    group, dot, rest = name.partition(".")
    if group == "trainer" and rest.partition(".")[0] in TRAINERS_OWN:
        return f"{name} is not a key: {TRAINERS_OWN[rest.partition('.')[0]]}"
    if group == "hydra":
        return f"{name} is not a key; --cfg hydra lists Hydra's own"
    if group == "space" and dot and schema is SearchRun:
        return f"{name} is not a key; write a space of your own into conf/space/ and choose it, as in space=recipe"
    meant = keys_meant(name, schema)
    if meant:
        return f"{name} is not a key; did you mean {' or '.join(meant)}?"
    if dot and group in sections(schema):
        names = ", ".join(field.name for field in fields(sections(schema)[group]))
        return f"{name} is not a key ({group}. has {names})"
    return f"{name} is not a key; --help lists the keys"


def groups_of(command: str) -> list[str]:
    """The groups that a command chooses options from."""
    defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [next(iter(item)) for item in defaults if isinstance(item, dict) and "hydra" not in next(iter(item))]


def keys_of(schema: type) -> list[str]:
    """All keys of a command."""
    keys = [f"{group}.{field.name}" for group, part in sections(schema).items() for field in fields(part)]
    return keys + [field.name for field in fields(schema) if field.name not in sections(schema)]


def keys_meant(name: str, schema: type) -> list[str]:
    """The keys probably meant by a name: one, two that share an ending, or none."""
    keys, parts = keys_of(schema), sections(schema)
    command = next(command for command, known in SCHEMAS.items() if known is schema)
    group, _, rest = name.rpartition(".")
    for key in ALIASES.get(rest, ()):
        if key in keys or key.partition("=")[0].partition(".")[0] in {*groups_of(command), "hydra"}:
            return [key]
    ends = [key for key in keys if key.endswith(f".{rest}") or (group and key == rest)]
    if ends:
        return ends if len(ends) < 3 else []
    # Names are compared without the group, which would make any two of its keys similar.
    near = [key for key in keys if group not in parts or key.startswith(f"{group}.")]
    names = [key.rpartition(".")[2] for key in near] + (groups_of(command) if not group else [])
    matches = difflib.get_close_matches(rest, names, n=3, cutoff=0.8)
    match = next(
        (match for match in matches if abs(len(match) - len(rest)) < 2 or group), None
    )  # otherwise, train would match trainer
    close = [key for key in [*near, *groups_of(command)] if match and key.rpartition(".")[2] == match]
    return close if len(close) < 3 else []
