"""Decoding and caching of the sources."""

import hashlib
import http.server
import io
import os
import pickle
import resource
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SERVER, write_folder
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision import datasets

from vit_lightning.config import DataConfig
from vit_lightning.data import cache as cache_module
from vit_lightning.data import images
from vit_lightning.data.cache import ImageSet, Source, channel_statistics, open_source
from vit_lightning.data.images import decode_image
from vit_lightning.data.sources import _unpickle, load_arrays
from vit_lightning.keys import InputError


def test_digits_are_scikit_learns(digits_config):
    arrays = load_arrays(digits_config, 16)
    assert arrays.class_names == list("0123456789")
    assert (len(arrays.labels["train"]), len(arrays.labels["test"])) == (1437, 360)
    ours = torch.cat([arrays.images["train"], arrays.images["test"]])
    assert ours.dtype == torch.uint8
    assert ours.shape == (1797, 1, 8, 8)
    theirs = load_digits()

    def pairs(images, labels):
        return sorted(zip(images.reshape(1797, -1).tolist(), labels.tolist(), strict=True))

    labels = torch.cat([arrays.labels["train"], arrays.labels["test"]])
    assert pairs(ours.numpy(), labels.numpy()) == pairs(np.rint(theirs.images * 255 / 16).astype(int), theirs.target)
    shares = torch.bincount(arrays.labels["test"]) / torch.bincount(labels)
    assert ((shares - 0.2).abs() < 0.01).all()


def test_folder_gives_sorted_classes_and_its_own_pixels(folder, folder_config):
    arrays = load_arrays(folder_config, 72)
    theirs = datasets.ImageFolder(str(folder / "train"))
    assert arrays.class_names == theirs.classes == ["ant", "bee", "cat"]
    assert arrays.labels["train"].tolist() == theirs.targets
    expected = np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in theirs])
    assert np.array_equal(arrays.images["train"].numpy(), expected)  # 8 × 8 as they are, not 72
    assert arrays.images["test"].shape == (21, 3, 8, 8)


def test_images_of_differing_sizes_are_kept_at_the_networks_size(folder, folder_config):
    Image.new("RGB", (30, 20)).save(folder / "train" / "ant" / "wide.png")
    assert load_arrays(folder_config, 24).images["train"].shape[1:] == (3, 24, 24)
    assert load_arrays(folder_config, 12).images["train"].shape[1:] == (3, 12, 12)  # not the cache of 24
    assert load_arrays(replace(folder_config, stored_size=16), 12).images["test"].shape[1:] == (3, 16, 16)


def fail(*_):
    pytest.fail("decoded again")


def caches(config: DataConfig) -> list[Path]:
    """What lies in the cache's directory, but for locks."""
    return [path for path in Path(config.cache_dir).iterdir() if path.suffix != ".lock"]


def test_large_square_images_are_kept_at_the_networks_size(tmp_path):
    write_folder(tmp_path / "images", {"ant": (2, 2), "bee": (2, 2)}, side=300)
    config = DataConfig(source="image_folder", root=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert load_arrays(config, 24).images["train"].shape[1:] == (3, 24, 24)


def test_a_valid_cache_is_opened_and_not_decoded_again(folder_config, monkeypatch):
    first = load_arrays(folder_config, 8)
    monkeypatch.setattr(images, "decode_image", fail)
    monkeypatch.setattr(cache_module, "write_cache", fail)
    again = load_arrays(folder_config, 8)
    assert torch.equal(first.images["train"], again.images["train"])
    assert torch.equal(first.labels["test"], again.labels["test"])
    assert (first.class_names, first.mean, first.std) == (again.class_names, again.mean, again.std)


def test_a_cache_of_other_content_is_rebuilt(folder, folder_config):
    load_arrays(folder_config, 8)
    (folder / "train" / "bee" / "000.png").unlink()
    assert len(load_arrays(folder_config, 8).labels["train"]) == 26

    changed = folder / "test" / "ant" / "000.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert load_arrays(folder_config, 8).images["test"][0, :, 0, 0].tolist() == [1, 2, 3]
    assert len(caches(folder_config)) == 1


def test_a_disk_that_is_full_only_for_the_labels_is_named_as_such(tmp_path):
    content = ImageSet(["a", "b"], {"train": np.arange(999) % 2}, {"train": np.zeros((999, 1, 1, 1), np.uint8)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # room for 999 bytes, not for as many labels
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\); free disk space"):
            open_source(Source(lambda: "", lambda: content), DataConfig(cache_dir=str(tmp_path)), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("damage", ["cut short", "empty", "no meta", "binary", "", "{}", "[]", '{"fingerprint":'])
def test_a_damaged_cache_is_rebuilt(folder_config, damage):
    expected = load_arrays(folder_config, 8).images["train"].clone()
    [cache] = caches(folder_config)
    if damage == "cut short":
        file = cache / "train_images.npy"
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "empty":
        (cache / "train_labels.npy").write_bytes(b"")
    elif damage == "binary":
        (cache / "meta.json").write_bytes(b"\x80\xff\x00")
    elif damage == "no meta":
        (cache / "meta.json").unlink()
    else:
        (cache / "meta.json").write_text(damage)
    assert torch.equal(load_arrays(folder_config, 8).images["train"], expected)


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_its_tag_says(tmp_path, orientation):
    """As by Pillow's exif_transpose, which fails where another tag is not what it should be."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "plain.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "plain.png"))).transpose(2, 0, 1)
    assert np.array_equal(decode_image(tmp_path / "plain.png", 9), expected)
    text, short = (0x011A, 2, 3, b"72\0\0"), (0x0112, 3, 1, struct.pack("<HH", orientation, 0))  # a resolution in words
    tags = b"".join(struct.pack("<HHI4s", *tag) for tag in (short, text))
    Image.fromarray(pixels).save(
        tmp_path / "odd.png", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    )
    assert np.array_equal(decode_image(tmp_path / "odd.png", 9), expected)


def test_two_first_starts_at_once_decode_once(folder_config, monkeypatch):
    decoded = []

    def slow(path: Path, side: int) -> np.ndarray:
        decoded.append(path)
        time.sleep(0.01)
        return decode_image(path, side)

    monkeypatch.setattr(images, "decode_image", slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: load_arrays(folder_config, 8), range(2))
    assert len(decoded) == len(set(decoded)) == 3 * (9 + 7)
    assert torch.equal(one.images["train"], other.images["train"])


def test_nothing_half_done_is_left_where_decoding_fails(folder, folder_config):
    sound = (folder / "train" / "cat" / "000.png").read_bytes()
    (folder / "train" / "cat" / "bad.png").write_bytes(sound[:100])  # its header can still be read
    with pytest.raises(InputError, match=r"bad\.png cannot be read"):
        load_arrays(folder_config, 8)
    assert caches(folder_config) == []


def test_training_cannot_write_into_the_cache(folder_config):
    load_arrays(folder_config, 8).images["train"].zero_()
    assert load_arrays(folder_config, 8).images["train"].any()


def test_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 7, 5), dtype=np.uint8)
    mean, std = channel_statistics(images)
    scaled = images / 255
    assert mean == pytest.approx(scaled.mean(axis=(0, 2, 3)))
    assert std == pytest.approx(scaled.std(axis=(0, 2, 3)))


def test_statistics_are_of_the_training_images(folder, folder_config):
    arrays = load_arrays(folder_config, 8)
    pixels = arrays.images["train"].double() / 255
    assert arrays.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_of_each_format(tmp_path, suffix):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / f"x.{suffix}")
    pixels = decode_image(tmp_path / f"x.{suffix}", 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[:, 4, 4].astype(int) - [200, 100, 50]).max() <= 4


def test_grayscale_16_bit_palette_and_bilevel(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)).save(tmp_path / "i16.png")
    Image.new("RGB", (8, 8), (77, 77, 77)).quantize(4).save(tmp_path / "p.png")
    for name in ("l.png", "i16.png", "p.png"):
        assert (decode_image(tmp_path / name, 8) == 77).all(), name
    Image.new("1", (8, 8), 1).save(tmp_path / "1.png")
    assert (decode_image(tmp_path / "1.png", 8) == 255).all()


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((2, 3), (10, 20, 30, 255))
    image.save(tmp_path / "x.png")
    pixels = decode_image(tmp_path / "x.png", 8)
    assert pixels[:, 3, 2].tolist() == [10, 20, 30]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.putpixel((7, 0), (255, 0, 0))  # upper right; orientation 6 means: turn a quarter clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    assert decode_image(tmp_path / "x.png", 8)[0].nonzero() == (7, 7)


def test_a_wide_picture_is_cropped_at_its_centre(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "x.png")
    assert (decode_image(tmp_path / "x.png", 10)[2, :, 1:-1] > 200).all()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "not an image"), (b"GIF89a", "not an image"), (None, "truncated")]
)
def test_an_unreadable_picture_is_named(tmp_path, content, reason):
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[:5000]
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"broken\.png cannot be read \(.*{reason}.*\)"):
        decode_image(tmp_path / "broken.png", 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "avif", "ico", "dds"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these files
def test_a_damaged_picture_is_read_or_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for number in range(100):
        damaged = bytearray(content[: random.integers(1, len(content))] if number % 3 == 0 else content)
        for place in random.integers(0, min(len(damaged), 400), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        with suppress(InputError):
            assert decode_image(path, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("stored_size", [None, 8])
def test_a_link_to_nowhere_is_named(folder, folder_config, stored_size):
    (folder / "train" / "ant" / "000.png").unlink()
    (folder / "train" / "ant" / "000.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"ant/000\.png cannot be read \(No such file or directory\)"):
        load_arrays(replace(folder_config, stored_size=stored_size), 8)


# --- folders that cannot be trained on --------------------------------------------------------------------------------


def mistaken_folder(root: Path, mistake: str) -> None:
    write_folder(root, {"ant": (3, 3), "bee": (3, 3)})
    if mistake == "one class":
        (root / "train" / "bee").rename(root / "bee")
        (root / "test" / "bee").rename(root / "bee2")
    elif mistake == "unknown class":
        (root / "test" / "bee").rename(root / "test" / "wasp")
    elif mistake == "empty class":
        (root / "train" / "cat").mkdir()
        (root / "train" / "cat" / "notes.txt").write_text("none yet")
    elif mistake == "broken part":
        (root / "train").rename(root / "old")
        (root / "train").symlink_to("nowhere")
    elif mistake == "broken class":
        (root / "train" / "cat").symlink_to("nowhere")
    elif mistake == "two":
        (root / "validation").mkdir()
        (root / "test").rename(root / "val")
        (root / "validation" / "ant").mkdir()
        Image.new("RGB", (8, 8)).save(root / "validation" / "ant" / "x.png")
    elif mistake == "no classes":
        (root / "train").rename(root / "old")
        (root / "train").mkdir()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("one class", "has training images of only one class; a classifier needs at least two"),
        ("unknown class", "has test images of class wasp, but no training images of it"),
        ("empty class", "train/cat contains no pictures; add some or remove it"),
        ("no classes", "train has no class folder; data.root needs train/<class>"),
        ("broken class", "train/cat is a broken link; restore its target or remove it"),
        ("broken part", "images/train is a broken link; restore its target or remove it"),
        ("two", "has two folders of val images; rename one"),
    ],
)
def test_a_mistaken_folder_is_refused(tmp_path, mistake, message):
    mistaken_folder(tmp_path / "images", mistake)
    config = DataConfig(source="image_folder", root=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=message):
        load_arrays(config, 8)


def test_an_unwritable_cache_is_named(folder_config, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(
        InputError, match=r"data\.cache_dir=.*cache cannot be written \(File exists\); free disk space or choose"
    ):
        load_arrays(folder_config, 8)


def test_a_full_disk_is_told_and_leaves_nothing_behind(folder_config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        load_arrays(folder_config, 8)
    assert caches(folder_config) == []


# --- CIFAR, downloaded from a server on this machine ------------------------------------------------------------------


def cifar_batch(count: int, seed: int, label_key: str) -> tuple[bytes, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(count)]
    names = [f"picture_s_{number:06}.png" for number in rng.permutation(count)]
    by_name = sorted(range(count), key=lambda index: (labels[index], names[index]))
    return pickle.dumps({"data": pixels, label_key: labels, "filenames": names}), pixels[by_name], sorted(labels)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Iterator[dict[str, list]]:
    """A small archive of CIFAR-100's form, with its own checksums, at a server that the class is pointed to."""
    train, *train_images = cifar_batch(40, 0, "fine_labels")
    test, *test_images = cifar_batch(20, 1, "fine_labels")
    meta = pickle.dumps({"fine_label_names": [f"class{index}" for index in range(10)]})
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cifar-100-python.tar.gz", "w:gz") as tar:
        for name, content in (("train", train), ("test", test), ("meta", meta)):
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind = datasets.CIFAR100
    monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz")
    monkeypatch.setattr(kind, "tgz_md5", md5((served / "cifar-100-python.tar.gz").read_bytes()))
    monkeypatch.setattr(kind, "train_list", [["train", md5(train)]])
    monkeypatch.setattr(kind, "test_list", [["test", md5(test)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    yield {"train": train_images, "test": test_images}  # as a folder of them is read: by class, then by name
    server.shutdown()
    server.server_close()


@pytest.fixture
def cifar_config(tmp_path) -> DataConfig:
    return DataConfig(source="cifar100", root=str(tmp_path / "data"), cache_dir=str(tmp_path / "data" / "cache"))


def test_cifar_is_downloaded_verified_and_kept(archive, cifar_config, tmp_path, monkeypatch):
    arrays = load_arrays(cifar_config, 72)
    for split, (pixels, labels) in archive.items():
        assert np.array_equal(arrays.images[split].numpy(), pixels.reshape(-1, 3, 32, 32))
        assert arrays.labels[split].tolist() == labels
    assert arrays.class_names == [f"class{index}" for index in range(10)]
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/gone")
    monkeypatch.setattr(cache_module, "write_cache", fail)
    assert (tmp_path / "data" / "cifar-100-python.tar.gz").exists()
    assert torch.equal(load_arrays(cifar_config, 72).images["train"], arrays.images["train"])


def test_an_archive_put_there_by_hand_needs_no_network(archive, cifar_config, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "served" / "cifar-100-python.tar.gz").rename(tmp_path / "data" / "cifar-100-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/gone")
    assert len(load_arrays(cifar_config, 72).labels["train"]) == 40


def test_without_network_and_data_the_message_says_what_to_do(cifar_config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(InputError) as error:
        load_arrays(cifar_config, 72)
    message = str(error.value)
    assert "http://127.0.0.1:9/cifar-100-python.tar.gz cannot be downloaded" in message
    assert f"put that archive at {tmp_path}/data/cifar-100-python.tar.gz" in message
    assert "data=digits, which needs no download" in message
    assert "\n" not in message


def test_a_download_of_other_content_is_refused(archive, cifar_config, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_arrays(cifar_config, 72)


def test_an_archive_that_would_leave_its_folder_is_refused_before_it_is_unpacked(archive, cifar_config, tmp_path):
    with tarfile.open(tmp_path / "served" / "cifar-100-python.tar.gz", "w:gz") as tar:
        for name in ("../escaped", str(tmp_path / "escaped"), "cifar-100-python/train"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match="has no valid copy"):
        load_arrays(cifar_config, 72)
    assert not (tmp_path / "escaped").exists()
    assert not (tmp_path / "data" / "cifar-100-python").exists()


def test_a_batch_that_is_not_what_was_verified_is_not_unpickled(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    (tmp_path / "train").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match="train was changed while it was read; delete it and start again"):
        _unpickle(tmp_path / "train", hashlib.md5(b"what was verified").hexdigest())
    assert not (tmp_path / "it-ran").exists()


def _prepare(config: DataConfig, marks: Path, until_killed: bool) -> None:
    """Open a source in a process of its own, which leaves a mark when it writes the cache."""
    statistics = cache_module.channel_statistics

    def marked(images: np.ndarray) -> tuple[list[float], list[float]]:
        with marks.open("a") as file:
            file.write("x")
        time.sleep(60 if until_killed else 0.5)
        return statistics(images)

    cache_module.channel_statistics = marked
    load_arrays(config, 8)


def test_of_four_processes_at_once_one_prepares_the_data(folder_config, tmp_path):
    marks = tmp_path / "marks"
    processes = [SERVER.Process(target=_prepare, args=(folder_config, marks, False)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert marks.read_text() == "x"
    assert len(caches(folder_config)) == 1


def test_a_killed_preparation_leaves_nothing_half_done(folder_config, tmp_path):
    marks = tmp_path / "marks"
    process = SERVER.Process(target=_prepare, args=(folder_config, marks, True))
    process.start()
    while not marks.exists():
        time.sleep(0.02)
    process.kill()
    process.join()
    [unfinished] = caches(folder_config)
    assert unfinished.name.startswith(".")
    assert len(load_arrays(folder_config, 8).labels["train"]) == 27
    [finished] = caches(folder_config)
    assert not finished.name.startswith(".")
