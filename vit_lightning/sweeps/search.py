"""Search for better hyper-parameters with Optuna: ``python -m vit_lightning.search experiment=… space=…``."""

import json
import shlex
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_lightning.config import Config, InputError, Invocation, SearchRun

if TYPE_CHECKING:
    from optuna import Study, Trial

BEST = 5  # trials that are listed


def search(config: SearchRun, run_dir: Path, invocation: Invocation) -> float:
    """Train one trial after the other, each with values that the study proposes, until trials or time are used up.

    Trials lie in ``run_dir``, the study in its storage. Any number of processes may work on one study at once; one that
    is started again goes on with it, and a trial whose process died is taken up where it stopped.

    Returns:
        The best ``val/acc``, in [0, 1].

    Raises:
        InputError: if the storage cannot be opened, or holds the study with other settings.
        MachineError: if a trial cannot be written, or a process of it dies: the next one would fare no better.
    """
    optuna = import_optuna()
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    from vit_lightning.config import MachineError
    from vit_lightning.runs.fit import train

    assert invocation.overrides is not None
    assert invocation.compose is not None
    overrides, compose = invocation.overrides, invocation.compose
    base = [item for item in overrides if not item.lstrip("+~").startswith(("search.", "space"))]
    study = open_study(config, base, run_dir)
    counted = (TrialState.COMPLETE, TrialState.PRUNED)

    def objective(trial: "Trial") -> float:
        directory = trial.user_attrs.get("directory", f"trial-{trial.number:04}")
        trial.set_user_attr("directory", directory)  # which a trial that takes up a dead one's work inherits
        values = typed({key: suggest(trial, key, domain) for key, domain in config.space.items()})
        print(f"trial {trial.number}: {' '.join(values)}", flush=True)

        def report(epoch: int, acc: float) -> None:
            trial.report(acc, epoch)
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
        except InputError as error:  # values that do not go together
            print(f"trial {trial.number}: {error}", flush=True)
            raise optuna.TrialPruned from error

    if len(study.get_trials(deepcopy=False, states=counted)) < config.search.trials:
        enough = MaxTrialsCallback(config.search.trials, states=counted)
        study.optimize(objective, timeout=config.search.timeout, callbacks=[enough])
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise InputError("search: not one trial came to its end; widen search.timeout or the space")
    show(study, base, run_dir)
    return study.best_value


def import_optuna() -> Any:
    """Optuna, quiet about what every trial does and what it holds for experimental.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(f'vit_lightning.search needs {error.name}: pip install -e ".[search]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails ends the search, which says why
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(config: SearchRun, base: list[str], run_dir: Path) -> "Study":
    """Open the study in its storage, or begin it.

    Raises:
        InputError: if the storage cannot be opened, or the study there has other settings.
    """
    optuna = import_optuna()
    from filelock import FileLock
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    settings = config.search
    url = settings.storage or f"sqlite:///{run_dir / 'study.db'}"
    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}  # for another worker's write
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=settings.startup, n_warmup_steps=settings.warmup)
        if settings.prune
        else optuna.pruners.NopPruner()
    )
    try:
        with FileLock(run_dir / ".study.lock"):  # of two first starts at once, one makes the tables
            storage = RDBStorage(
                url,
                engine_kwargs=wait,
                heartbeat_interval=settings.heartbeat,
                grace_period=2 * settings.heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
            study = optuna.create_study(
                study_name=settings.study,
                storage=storage,
                sampler=samplers[settings.sampler](seed=settings.seed),
                pruner=pruner,
                direction="maximize",
                load_if_exists=True,
            )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, ValueError) as error:
        [reason, *_] = str(error).splitlines()
        raise InputError(f"search.storage={url} cannot be opened as the storage of a study ({reason})") from error
    started = study.user_attrs.get("settings")
    wanted = {"space": config.space, "overrides": sorted(base)}
    if started is None and not study.trials and study.direction == optuna.study.StudyDirection.MAXIMIZE:
        study.set_user_attr("settings", wanted)
    elif started != json.loads(json.dumps(wanted)):
        raise InputError(
            f"search.study={settings.study} in {url} has another space or other settings; give it another name"
        )
    return study


def suggest(trial: "Trial", key: str, domain: dict[str, Any]) -> Any:
    """The study's value for one key of the space, whose domain :class:`~vit_lightning.config.SearchRun` has checked."""
    if "choices" in domain:
        return trial.suggest_categorical(key, domain["choices"])
    low, high, log, step = domain["low"], domain["high"], domain.get("log", False), domain.get("step")
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return trial.suggest_int(key, low, high, step=step or 1, log=log)
    return trial.suggest_float(key, low, high, step=step, log=log)


def typed(values: dict[str, Any]) -> list[str]:
    """Values of keys as they are typed on a command line."""
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def show(study: "Study", base: list[str], run_dir: Path) -> None:
    """Print the best trials and how to run the best one again; draw the history, and what mattered."""
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    from vit_lightning.analysis.figures import draw_search
    from vit_lightning.terminal import print_files, print_table

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    history = {trial.number: trial.value or 0.0 for trial in trials}  # which always have one
    best = sorted(trials, key=lambda trial: -history[trial.number])[:BEST]
    keys = list(study.best_params)
    rows = [(str(t.number), *(str(t.params[key]) for key in keys), f"{history[t.number]:.1%}") for t in best]
    pruned = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    print_table(f"trials that came to their end: {len(trials)}; pruned: {pruned}", ("trial", *keys, "val/acc"), rows)
    importances = get_param_importances(study) if len(set(history.values())) > 1 else {}
    draw_search(history, importances).savefig(run_dir / "search.png")
    print_files([run_dir / "search.png"])
    print(shlex.join(["python", "-m", "vit_lightning.train", *base, *typed(study.best_params)]))
