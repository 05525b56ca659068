"""Which images are used for training, validation and testing."""

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor

from vit_lightning.config import DataConfig
from vit_lightning.data.cache import ImageArrays
from vit_lightning.keys import InputError


def split_indices(arrays: ImageArrays, config: DataConfig) -> dict[str, Tensor]:
    """Choose the training, validation and test images.

    The source's own validation images are used if it has any. Otherwise they are 70% of its test images
    (``data.split=blog``) or are held out of its training images (``standard``), as are missing test images. With
    validation images of its own, a source may lack test images; without training images it can only be evaluated.

    Returns:
        ``train``, ``val`` and ``test``, each int64 of shape (number of images,): indices into the part of the source
        that contains them.

    Raises:
        InputError: if a split would be empty, or a class has too few images to be in each split.
    """
    counts = {part: len(labels) for part, labels in arrays.labels.items()}
    own = {split: torch.arange(counts.get(split, 0)) for split in ("train", "val", "test")}
    if "train" not in counts or ("val" in counts and config.folds is None):
        return own
    if "val" in counts:
        raise InputError(f"data.folds={config.folds}: the data has validation images of its own; remove data.folds")
    if config.split == "blog":
        n_test = counts.get("test", 0)
        # The same numbers as random_split(test_set, [n_val, n_test - n_val], generator=...).
        order = torch.randperm(n_test, generator=torch.Generator().manual_seed(config.split_seed))
        n_val = int(0.7 * n_test)
        if not 0 < n_val < n_test:
            raise InputError(f"data.split=blog cannot split {n_test} test image(s) 70/30; use data.split=standard")
        return {**own, "val": order[:n_val], "test": order[n_val:]}
    train = own["train"].numpy()
    if "test" not in counts:
        train, test = hold_out(train, arrays, config.val_fraction, config)
        own["test"] = torch.from_numpy(np.sort(test))
    size = config.val_fraction if "test" in counts else len(own["test"])
    train, val = hold_out(train, arrays, size, config) if config.folds is None else fold_of(train, arrays, config)
    return {**own, "train": torch.from_numpy(np.sort(train)), "val": torch.from_numpy(np.sort(val))}


def hold_out(
    indices: np.ndarray, arrays: ImageArrays, size: float | int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Split training images, class by class, into the remaining ones and a share (float) or number that is held out.

    Raises:
        InputError: if a class has too few images.
    """
    labels = arrays.labels["train"].numpy()[indices]
    try:
        rest, held = train_test_split(indices, test_size=size, random_state=config.split_seed, stratify=labels)
    except ValueError as error:
        needed = 2 if "test" in arrays.labels else 3  # one image for each split
        counts = np.bincount(arrays.labels["train"], minlength=len(arrays.class_names))
        rare = [f"{name} ({n})" for name, n in zip(arrays.class_names, counts, strict=True) if n < needed]
        few = f"{len(indices)} images are too few for {len(counts)} classes; choose a share closer to 0.5"
        if rare:
            more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
            few = f"each class needs at least {needed} images; too few of {', '.join(rare[:5])}{more}"
        raise InputError(f"data.val_fraction={config.val_fraction} cannot be held out class by class: {few}") from error
    return rest, held


def fold_of(indices: np.ndarray, arrays: ImageArrays, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the training images of the other folds of a stratified cross-validation, and those of the chosen fold.

    Raises:
        InputError: if a class has fewer images than there are folds.
    """
    labels = arrays.labels["train"].numpy()[indices]
    assert config.folds is not None
    rarest = int(np.bincount(labels, minlength=len(arrays.class_names)).argmin())
    if (labels == rarest).sum() < config.folds:
        name, count = arrays.class_names[rarest], (labels == rarest).sum()
        raise InputError(f"data.folds={config.folds} needs at least as many images of each class; {name} has {count}")
    folds = StratifiedKFold(config.folds, shuffle=True, random_state=config.split_seed)
    rest, held = list(folds.split(indices, labels))[config.fold]
    return indices[rest], indices[held]
