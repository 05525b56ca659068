"""Picture files: listing them, noticing changes, and decoding them to arrays."""

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vit_lightning.keys import InputError

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # how to undo each value of the tag; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (  # what Pillow raises on damaged files
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # over 90 million pixels is too large to read

Image.init()
# Formats of Pillow that need other programs, or are not pictures.
OTHER_FORMATS = {"EPS", "WMF", "PDF", "MPEG", "HDF5", "BUFR", "GRIB", "FITS"}
SUFFIXES = {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in OTHER_FORMATS
}
LISTED = 10  # maximum number of files that an error names
LARGE_FILE = 16 * 1024  # bytes; measured: 32 × 32 PNGs of 2 KB decode three times as fast in one thread as in two


def is_hidden(name: str) -> bool:
    """Whether to skip files and directories of this name: those of editors, macOS (``._x.png``) and caches."""
    return name.startswith(".") or name == "__MACOSX"


def visible_files(folder: Path) -> list[Path]:
    """All files below a directory that are not hidden, sorted; includes broken links and devices, to be reported.

    A directory that links reach again is read once.

    Raises:
        OSError: if a directory cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if Path(place).resolve() in seen:  # a link to a directory that contains it would be followed forever
            folders.clear()
            continue
        seen.add(Path(place).resolve())
        found += [Path(place, name) for name in sorted(names) if not is_hidden(name)]
    return found


def is_picture(path: Path) -> bool:
    """Whether a file's name has the extension of a picture."""
    return path.suffix.lower() in SUFFIXES


def decode_image(path: Path, side: int, channels: int = 3) -> np.ndarray:
    """Read any picture as (channels, side, side), uint8: upright by its EXIF tag, shorter side resized, centre cropped.

    RGB, or gray for one channel; the first picture of an animation. Transparent parts become white, and 16-bit
    grayscale keeps its range.

    Raises:
        InputError: if the file cannot be read as an image.
    """
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would block forever
            raise OSError(0, "not a regular file")
        with Image.open(path) as file:
            return to_array(file, side, channels)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def to_array(file: Image.Image, side: int, channels: int = 3) -> np.ndarray:
    """Convert a picture as :func:`decode_image` does."""
    file.load()  # tags may be at the end of the file
    # Pillow's exif_transpose would rewrite all tags, and fails on unusual ones.
    turn = UPRIGHT.get(file.getexif().get(ORIENTATION, 1))
    image = file if turn is None else file.transpose(turn)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode_all(paths: list[Path], side: int) -> Iterator[np.ndarray | InputError]:
    """Decode files in order, or yield why one cannot be read; large files use all cores, small ones a single one."""
    sample = [path for path in paths[:: -(-len(paths) // 100)] if os.access(path, os.R_OK)]
    if sum(path.stat().st_size for path in sample) < LARGE_FILE * len(sample):
        yield from (_decoded(path, side) for path in paths)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):  # in chunks, so that results do not pile up
            yield from pool.map(lambda path: _decoded(path, side), paths[start : start + 1024])


def _decoded(path: Path, side: int) -> np.ndarray | InputError:
    try:
        return decode_image(path, side)
    except InputError as error:
        return error


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture; ``None`` if it cannot be read."""
    try:
        if not path.is_file():
            return None
        with Image.open(path) as image:
            return image.size
    except UNREADABLE:
        return None


def unreadable(name: Path | str, error: Exception) -> InputError:
    """The error for a file that is not a readable picture."""
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else getattr(error, "strerror", None)
    return InputError(f"{name} cannot be read ({reason or error})")


def describe_unreadable(problems: list[InputError]) -> str:
    """Name the first files that cannot be read, and how many there are."""
    names = "; ".join(map(str, problems[:LISTED]))
    return names if len(problems) <= LISTED else f"{names}; and {len(problems) - LISTED} more"


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """A digest of the names, sizes and modification times of files below ``root``; unreadable ones count too."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat() if os.access(file, os.R_OK) else None
        digest.update(os.fsencode(f"{os.path.relpath(file, root)} {stat and (stat.st_size, stat.st_mtime_ns)}\n"))
    return digest.hexdigest()
