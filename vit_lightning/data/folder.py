"""Pictures in one folder per class, or listed in a CSV file."""

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_lightning import register
from vit_lightning.config import DataConfig
from vit_lightning.data.cache import PARTS, ImageSet, Source
from vit_lightning.data.images import decode_all, fingerprint, image_size, is_hidden, is_picture, visible_files
from vit_lightning.keys import InputError
from vit_lightning.terminal import is_first, with_bar

PART_NAMES = {  # names of directories, and values of a CSV file's split column
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_OWN_SIZE = 256  # pixels; larger images are stored at the network's size, to save disk space
LAYOUTS = "data.root needs train/<class>/* and test/<class>/* (or val/), <class>/* alone, or is a CSV file"

Listing = dict[str, dict[str, list[Path]]]  # files by part and class


@register.source("image_folder")
def image_folder(config: DataConfig, network_size: int) -> Source:
    """Pictures in ``data.root``, in one of these layouts; class indices follow the sorted names.

    - ``train/<class>/*``, with ``val/``, ``test/`` or both, as in ImageNet. Whichever is missing is held out of the
      training images, except that with ``val/`` alone there are no test images.
    - ``<class>/*``: validation and test images are held out, class by class.
    - ``val/`` or ``test/`` alone, for an evaluation.
    - a CSV file with the columns ``path`` (relative to the file), ``label`` and optionally ``split``.

    Pictures in subfolders of a class belong to it. Hidden files and folders are skipped.
    """
    root = Path(config.root).expanduser()
    is_list = root.suffix.lower() == ".csv" and not root.is_dir()
    try:
        listing, others = read_csv(root) if is_list else read_tree(root)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); fix its permissions") from error
    check_classes(root, listing)
    class_names = sorted({name for classes in listing.values() for name in classes})
    index = {name: number for number, name in enumerate(class_names)}
    paths = {part: [path for name in sorted(c) for path in c[name]] for part, c in listing.items()}
    labels = {part: np.array([index[name] for name in sorted(c) for _ in c[name]]) for part, c in listing.items()}
    base = root.parent if is_list else root
    every = [path for part in paths.values() for path in part]
    # With a CSV file, the labels do not follow from the files' names.
    counts = {part: {name: len(files) for name, files in classes.items()} for part, classes in listing.items()}
    labelled = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()

    def decode() -> ImageSet:
        report_others(f"data.root={config.root}", base, others)
        side = config.stored_size
        if side is None:
            sizes = set(with_bar(map(image_size, every), "Reading image sizes", len(every))) - {None}
            width, height = next(iter(sizes), None) or (0, 1)
            side = width if len(sizes) == 1 and width == height <= MAX_OWN_SIZE else None
        keep = side or network_size
        return ImageSet(
            class_names=[as_text(name) for name in class_names],
            shape=(3, keep, keep),
            labels=labels,
            images={
                part: with_bar(decode_all(files, keep), f"Decoding {part} images", len(files))
                for part, files in paths.items()
            },
            fits_any_size=side is not None,
            paths={part: [as_text(os.path.relpath(file, base)) for file in files] for part, files in paths.items()},
        )

    return Source(lambda: fingerprint(base, every) + labelled, decode)


def as_text(name: str) -> str:
    r"""Make a file's name printable: bytes that are not UTF-8 are escaped, as in ``caf\xe9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_tree(root: Path) -> tuple[Listing, list[Path]]:
    """List the pictures of a directory by part and class.

    Returns:
        The pictures, and the files that are not pictures.

    Raises:
        InputError: if the directory has none of the layouts.
    """
    if not root.is_dir():
        raise InputError(f"data.root={root} is not a directory; {LAYOUTS}")
    entries = {entry.name: entry for entry in sorted(root.iterdir()) if not is_hidden(entry.name)}
    for name in entries:
        if name.lower() in PART_NAMES:
            check_link(entries[name])
    folders = {name: entry for name, entry in entries.items() if entry.is_dir()}
    parts = {name: PART_NAMES[name.lower()] for name in folders if name.lower() in PART_NAMES}
    split = {name: part for name, part in parts.items() if any(entry.is_dir() for entry in folders[name].iterdir())}
    if not split:
        if parts and len(parts) == len(folders):
            raise InputError(f"{folders[next(iter(parts))]} has no class folder; put images into <class>/ below it")
        classes, others = read_classes(root)
        return {"train": classes}, others
    listing: Listing = {}
    others = []
    for name, part in split.items():
        if part in listing:
            raise InputError(f"data.root={root} has two folders of {part} images; rename one")
        listing[part], unread = read_classes(folders[name])
        others += unread
    for name in folders.keys() - split.keys():
        if parts.get(name) == "train":
            raise InputError(f"{folders[name]} has no class folder; {LAYOUTS}")
        others += visible_files(folders[name])
    return {part: listing[part] for part in PARTS if part in listing}, others


def read_classes(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """List the pictures in each class folder, and the files that are not pictures."""
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            continue
        if not is_picture(entry):
            check_link(entry)
        if not entry.is_dir():
            others.append(entry)
            continue
        files = visible_files(entry)
        classes[entry.name] = [file for file in files if is_picture(file)]
        others += [file for file in files if not is_picture(file)]
        if not classes[entry.name]:
            raise InputError(f"{entry} contains no pictures; add some or remove it")
    if not classes:
        raise InputError(f"{folder} has no class folder; {LAYOUTS}")
    return classes, others


def check_link(path: Path) -> None:
    """Check that a path is not a broken link.

    Raises:
        InputError: if it is.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a broken link; restore its target or remove it")


def read_csv(path: Path) -> tuple[Listing, list[Path]]:
    """List the pictures in a CSV file with the columns ``path``, ``label`` and optionally ``split``.

    Raises:
        InputError: if a column is missing, or a row has no label or an unknown split.
    """
    listing: Listing = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"data.root={path} is not a CSV file in UTF-8 ({error})") from error
    except FileNotFoundError as error:
        raise InputError(f"data.root={path} does not exist; {LAYOUTS}") from error
    for name in ("path", "label"):
        if name not in columns:
            raise InputError(f"data.root={path} needs the columns path and label, and may have split; it lacks {name}")
    if not rows:
        raise InputError(f"data.root={path} lists no pictures; add some")
    for number, row in enumerate(rows, start=2):
        part = PART_NAMES.get((row.get("split") or "train").strip().lower())
        if part is None or not row["label"] or not row["path"]:
            raise InputError(f"data.root={path}, line {number}, needs a path, a label and a split (train, val or test)")
        listing.setdefault(part, {}).setdefault(row["label"], []).append(path.parent / row["path"])
    return {part: listing[part] for part in PARTS if part in listing}, []


def check_classes(root: Path, listing: Listing) -> None:
    """Check that there are two classes to train on, and that no image is from any other class.

    Raises:
        InputError: if not.
    """
    if "train" not in listing:
        return  # an evaluation compares the classes with the network's
    if len(listing["train"]) < 2:
        raise InputError(f"data.root={root} has training images of only one class; a classifier needs at least two")
    for part, classes in listing.items():
        for name in classes.keys() - listing["train"].keys():
            raise InputError(f"data.root={root} has {part} images of class {name}, but no training images of it")


def report_others(name: str, base: Path, others: Iterable[Path]) -> None:
    """Print a line on stderr about files below ``base`` that are not used; ``name`` is the setting that found them."""
    files = list(others)
    if files and is_first():
        counts = Counter(file.suffix.lower() or "no suffix" for file in files).most_common(5)
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in counts)
        example = as_text(os.path.relpath(files[0], base))
        print(f"warning: {name}: {len(files):,} files are not used ({kinds}), such as {example}", file=sys.stderr)
