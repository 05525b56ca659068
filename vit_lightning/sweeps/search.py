"""Search for better hyper-parameters with Optuna."""

import json
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from filelock import FileLock
from matplotlib.axes import Axes

from vit_lightning.analysis.figures import shorten
from vit_lightning.config import Config
from vit_lightning.files import save_figure
from vit_lightning.keys import InputError, Invocation, MachineError
from vit_lightning.recipe.metrics import mode_of
from vit_lightning.runs.fit import train
from vit_lightning.schemas import SearchConfig, SearchRun
from vit_lightning.terminal import format_metric, label_of, print_files, print_table, warn_instead

try:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise InputError(f'vit_lightning.search needs {error.name}: pip install -e ".[search]"') from error

BEST = 5  # number of trials listed
FEW = 10  # with fewer trials, importances mean little
COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


def search(config: SearchRun, run_dir: Path, invocation: Invocation) -> float:
    """Train one trial after another, with values proposed by the study, until trials or time are used up.

    Trials are in ``run_dir``, the study in its storage. Any number of processes may work on one study at once. A
    restarted search continues its study, and a trial whose process died continues where it stopped.

    Returns:
        The best value of ``config.monitor``.

    Raises:
        InputError: if the storage cannot be opened, its study has other settings, or no trial finished.
        MachineError: if a trial cannot be written, or one of its processes dies; the next trial would fail too.
    """
    assert invocation.overrides is not None
    assert invocation.compose is not None
    overrides, compose = invocation.overrides, invocation.compose
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial ends the search with its own message
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    base = [item for item in overrides if not item.lstrip("+~").startswith(("search.", "space"))]
    study = open_study(config, base, run_dir)

    def objective(trial: optuna.Trial) -> float:
        study.sampler = build_sampler(config.search, trial.number)
        directory = trial.user_attrs.get("directory", f"trial-{trial.number:04}")
        trial.set_user_attr("directory", directory)  # a trial that replaces a dead one inherits its directory
        values = typed({key: suggest(trial, key, domain) for key, domain in config.space.items()})
        print(f"trial {trial.number}: {' '.join(values)}", flush=True)
        done = study.get_trials(deepcopy=False, states=(COMPLETE, PRUNED))
        earlier = next((each for each in done if each.params == trial.params), None)
        if earlier is not None:
            print(f"trial {trial.number}: already tried as trial {earlier.number}", flush=True)
            if earlier.state is PRUNED or earlier.value is None:
                raise optuna.TrialPruned
            return earlier.value

        def report(epoch: int, value: float) -> None:
            trial.report(value, epoch)
            if trial.should_prune():
                print(f"trial {trial.number}: pruned after epoch {epoch}", flush=True)
                raise optuna.TrialPruned

        (run_dir / directory).mkdir(parents=True, exist_ok=True)
        try:
            own = ["test=false", *base, *values]
            command = shlex.join(["python", "-m", "vit_lightning.train", *own])
            run = compose([*overrides, *values])
            trial_config = Config(**{field.name: getattr(run, field.name) for field in fields(Config)})
            return train(trial_config, run_dir / directory, report, Invocation(command, own))
        except MachineError:
            raise
        except InputError as error:  # this combination of values is invalid
            print(f"trial {trial.number}: {error}", flush=True)
            raise optuna.TrialPruned from error

    try_values(study, objective, config, run_dir)
    if not study.get_trials(deepcopy=False, states=(COMPLETE,)):
        raise InputError("search: no trial finished; increase search.timeout or change the space")
    show(study, config.monitor, base, run_dir)
    return study.best_value


def try_values(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], config: SearchRun, run_dir: Path
) -> None:
    """Run trials until there are enough, or time is used up.

    Raises:
        MachineError: if the study cannot be written.
    """
    if len(study.get_trials(deepcopy=False, states=(COMPLETE, PRUNED))) >= config.search.trials:
        return
    enough = optuna.study.MaxTrialsCallback(config.search.trials, states=(COMPLETE, PRUNED))
    try:
        study.optimize(objective, timeout=config.search.timeout, callbacks=[enough])
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        [reason, *_] = str(error.__cause__ or error).splitlines()
        raise MachineError(f"the study in {run_dir} cannot be written ({reason}); free disk space") from error


def open_study(config: SearchRun, base: list[str], run_dir: Path) -> optuna.Study:
    """Open the study in its storage, or create it.

    Raises:
        InputError: if the storage cannot be opened, or its study has other settings.
    """
    settings = config.search
    direction = optuna.study.StudyDirection[f"{mode_of(config.monitor).upper()}IMIZE"]
    url = settings.storage or f"sqlite:///{run_dir / 'study.db'}"
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}  # wait for other workers' writes
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=settings.startup, n_warmup_steps=settings.warmup)
        if settings.prune
        else optuna.pruners.NopPruner()
    )
    try:
        with FileLock(run_dir / ".study.lock"):  # if workers start at once, only one creates the tables
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=settings.heartbeat,
                grace_period=2 * settings.heartbeat,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            study = optuna.create_study(
                study_name=settings.study, storage=storage, pruner=pruner, direction=direction, load_if_exists=True
            )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, ValueError) as error:
        [reason, *_] = str(error).splitlines()
        raise InputError(f"search.storage={url} cannot be opened as the storage of a study ({reason})") from error
    started = study.user_attrs.get("settings")
    wanted = {"space": config.space, "overrides": sorted(base)}
    if started is None and not study.trials and study.direction == direction:
        study.set_user_attr("settings", wanted)
    elif started != json.loads(json.dumps(wanted)):
        raise InputError(
            f"search.study={settings.study} in {url} has another space or other settings; choose another name"
        )
    return study


def build_sampler(settings: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    """Build the sampler of a trial, seeded by the trial's number, so that no restart or worker repeats another's."""
    seed = settings.seed
    if seed is not None:
        seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[settings.sampler](seed=seed)


def suggest(trial: optuna.Trial, key: str, domain: dict[str, Any]) -> Any:
    """The value that the study proposes for a key; :class:`~vit_lightning.schemas.SearchRun` has checked its domain."""
    if "choices" in domain:
        return trial.suggest_categorical(key, domain["choices"])
    low, high, log, step = domain["low"], domain["high"], domain.get("log", False), domain.get("step")
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return trial.suggest_int(key, low, high, step=step or 1, log=log)
    return trial.suggest_float(key, low, high, step=step, log=log)


def typed(values: dict[str, Any]) -> list[str]:
    """Format values of keys as overrides; strings are quoted unless Hydra reads them unchanged."""
    overrides = []
    for key, value in values.items():
        text = "null" if value is None else str(value)
        plain = re.fullmatch(r"(?!(?:null|true|false|nan|inf)$)[a-z_][\w./-]*", text, re.IGNORECASE | re.ASCII)
        if isinstance(value, str) and not plain:
            # Hydra reads backslashes literally unless a quote follows them.
            text = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), text)
            text = f"'{text}'"
        overrides.append(f"{key}={text}")
    return overrides


def show(study: optuna.Study, monitor: str, base: list[str], run_dir: Path) -> None:
    """Print the best trials and the command of the best one; draw the history and the importance of each key."""
    trials = study.get_trials(deepcopy=False, states=(COMPLETE,))
    values = {trial.number: trial.value or 0.0 for trial in trials}  # a complete trial always has a value
    best = sorted(trials, key=lambda trial: values[trial.number], reverse=mode_of(monitor) == "max")[:BEST]
    keys = list(study.best_params)
    rows = [
        (str(t.number), *(str(t.params[key]) for key in keys), format_metric(monitor, values[t.number])) for t in best
    ]
    pruned = len(study.get_trials(deepcopy=False, states=(PRUNED,)))
    print_table(f"{len(trials)} trials finished, {pruned} pruned", ("trial", *keys, monitor), rows)
    plots = optuna.visualization.matplotlib
    target = f"validation {label_of(monitor)}"
    draw(
        plots.plot_optimization_history, study, target, f"{target} of each trial".capitalize(), run_dir / "history.png"
    )
    if len(set(values.values())) > 1:
        note = f" (means little: fewer than {FEW} finished trials)" if len(trials) < FEW else ""
        draw(plots.plot_param_importances, study, target, f"Importance of each key{note}", run_dir / "importances.png")
    print(shlex.join(["python", "-m", "vit_lightning.train", *base, *typed(study.best_params)]))


def draw(plot: Callable[..., Axes], study: optuna.Study, target: str, title: str, path: Path) -> None:
    """Save one of Optuna's figures, which are drawn with pyplot in a global style, and print its path."""
    with warn_instead(path.stem), plt.rc_context():
        plt.switch_backend("Agg")  # does not open a window
        axes = plot(study, target_name=target)
        figure = plt.gcf()
        plt.close()
        axes.set_title("")  # removes Optuna's title
        figure.set_layout_engine("constrained")
        figure.suptitle(f"{title}\n{shorten(study.study_name, 56)}", parse_math=False)
        save_figure(figure, path)
        print_files([path])
