"""Parts that are chosen by name: blocks, data sets, optimizers and so on.

Built-in parts and those in a user's file (``imports=my_ideas.py``) are registered in the same way, with one decorator
per kind::

    from vit_lightning import register
    from vit_lightning.keys import key

    @register.block("parallel", ratio=key(2.0, "Width of the feed-forward branch, relative to D.", above=0))
    class ParallelBlock(nn.Module):
        def __init__(self, config, drop_path, ratio): ...
        def forward(self, x): ...

The block is then chosen with ``model.block=parallel model.options.parallel.ratio=4``. Nothing here imports torch.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

from vit_lightning.keys import InputError, default_of, key, problem_of

PartT = TypeVar("PartT", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., Any]]):
    """The parts of one kind by name, and a decorator that adds one.

    Args:
        key: the key of the configuration that chooses parts, such as ``model.block``.
        home: the module that registers the built-in parts, imported when the first of them is used.
        built_in: the names of the built-in parts, known before that.
        others: where classes are from, for a kind that also accepts names of classes, which begin with a capital.
    """

    def __init__(self, key: str, home: str, *built_in: str, others: str = "") -> None:
        self.key = key
        self.home = home
        self.others = others
        self._owners = dict.fromkeys(built_in, home)  # which module registers each part
        self._parts: dict[str, Callable[..., Any]] = {}
        self._settings: dict[str, dict[str, Field]] = {}

    def __call__(self, name: str, **settings: Any) -> Callable[[PartT], PartT]:
        """Return a decorator that registers a class or function.

        Args:
            name: its name in the configuration.
            settings: its own settings, each with a default or declared by :func:`~vit_lightning.keys.key`; the part
                receives them as keyword arguments.

        Raises:
            InputError: if another part has the same name.
        """

        def add(part: PartT) -> PartT:
            owner, module = self._owners.setdefault(name, part.__module__), part.__module__
            if owner != module and not (owner == self.home and module.startswith("vit_lightning.")):
                raise InputError(f"{self.key}={name} is registered already; choose another name")
            self._parts[name] = part
            self._settings[name] = {
                each: value if isinstance(value, Field) else key(value, "") for each, value in settings.items()
            }
            return part

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._parts:
            importlib.import_module(self.home)
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, name: object) -> bool:
        return name in self._owners or (bool(self.others) and isinstance(name, str) and name[:1].isupper())

    @property
    def choices(self) -> str:
        """The choices, as text for messages."""
        return ", ".join([*self._owners, *([self.others] if self.others else [])])

    def settings(self, name: str) -> dict[str, Field]:
        """The declared settings of a part, by name."""
        self[name]
        return self._settings[name]

    def build(self, name: str, options: dict[str, dict[str, Any]], *args: Any) -> Any:
        """Call a part with ``args``, and with its settings as keyword arguments.

        Args:
            name: name of the part.
            options: by part, the settings that differ from their defaults.
            args: the arguments common to all parts of the kind.
        """
        return self[name](*args, **self.arguments(name, options))

    def arguments(self, name: str, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The settings of a part: its defaults, updated from ``options``."""
        return {each: default_of(field) for each, field in self.settings(name).items()} | options.get(name, {})


block = Registry("model.block", "vit_lightning.model.vit", "prenorm", "blog")
patch_embed = Registry("model.patch_embed", "vit_lightning.model.stems", "unfold", "conv")
pool = Registry("model.pool", "vit_lightning.model.layers", "cls", "mean", "mean_norm", "attention")
source = Registry(
    *("data.source", "vit_lightning.data.sources", "cifar100", "cifar10", "digits", "image_folder"),
    *("npz", "torchvision", "huggingface", "stream"),
)
augmentation = Registry("augment.batch", "vit_lightning.recipe.augment")
optimizer = Registry(
    "optim.name", "vit_lightning.recipe.optim", "adamw", "muon", others="a class of torch.optim or timm.optim"
)
schedule = Registry("optim.schedule", "vit_lightning.recipe.optim", "constant", "cosine", "linear")
loss = Registry("optim.loss", "vit_lightning.recipe.optim", "cross_entropy", "bce")
metric = Registry("metrics", "vit_lightning.recipe.metrics", "balanced_acc", "f1")


LOADED: set[str] = set()  # the imports that load() has made, as named by the user


def check_options(prefix: str, options: dict[str, Any], *registries: Registry) -> None:
    """Check the settings of parts against their declarations.

    Args:
        prefix: prefix of the section that contains them, such as ``model.``.
        options: settings by part.
        registries: the kinds of parts chosen in the section.

    Raises:
        InputError: if a part or a setting is unknown, or a value has the wrong type or is out of range.
    """
    for name, values in options.items():
        registry = next((each for each in registries if name in each), None)
        if registry is None:
            raise InputError(f"{prefix}options.{name} is not a registered part; see imports=")
        if not isinstance(values, dict):
            raise InputError(
                f"{prefix}options.{name}={values} must be a mapping of settings, as in {prefix}options.{name}.x=1"
            )
        if name not in list(registry):
            continue  # a library's class checks its arguments itself
        declared = registry.settings(name)
        for each, value in values.items():
            typed = f"{prefix}options.{name}.{each}"
            if each not in declared:
                known = f"it has {', '.join(declared)}" if declared else "it has no settings"
                raise InputError(f"{typed} is not a setting of {name}; {known}")
            kind = type(default_of(declared[each]))
            fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
            if kind is not type(None) and (not fits or (isinstance(value, bool) and kind is not bool)):
                raise InputError(f"{typed}={value} must be of type {kind.__name__}")
            problem = problem_of(declared[each], value)
            if problem:
                raise InputError(f"{typed}={value} {problem}")


@contextlib.contextmanager
def needs(imports: Sequence[str]) -> Iterator[None]:
    """If a saved configuration cannot be read without its imports, name them in the error.

    They are never imported here: code must not run just because a file names it.

    Raises:
        InputError: if the configuration cannot be read.
    """
    try:
        yield
    except InputError as error:
        if set(imports) <= LOADED:
            raise
        raise InputError(f"{error}; it was made with your own parts: add imports=[{','.join(imports)}]") from error


def load(imports: list[str]) -> None:
    """Import the modules or ``.py`` files that register parts.

    Raises:
        InputError: if one cannot be found or imported.
    """
    for item in imports:
        path = Path(item).expanduser()
        try:
            if path.suffix == ".py":
                _load_file(path)
            else:
                if str(Path.cwd()) not in sys.path:  # an installed script does not search the working directory
                    sys.path.append(str(Path.cwd()))
                importlib.import_module(item)
            LOADED.add(item)
        except InputError as error:
            raise InputError(f"imports={item}: {error}") from error
        except Exception as error:  # the user's code may raise anything
            [reason, *_] = str(error).splitlines() or [""]
            raise InputError(
                f"imports={item} cannot be imported ({type(error).__name__}: {reason}); traceback=true shows where"
            ) from error


def _load_file(path: Path) -> None:
    """Import a file under its own name."""
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return
    if known is not None:
        raise InputError(f"a module named {path.stem} is loaded already; rename the file")
    if not path.is_file():
        raise InputError("there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
