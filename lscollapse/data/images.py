"""Labelled images as pixel sequences, one id a pixel in reading order.

An id is the pixel's colour as a number: its channels, red first, are the digits in base `levels`. A grey pixel of 17
levels is 0..16; a colour pixel of 8 bits is the number written #RRGGBB.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lscollapse.core import hub_client
from lscollapse.core.files import expanded, first_line, refuse_no_file
from lscollapse.core.outside import shown
from lscollapse.core.table import PIXELS
from lscollapse.data.corpus import Corpus, Excerpt
from lscollapse.data.examples import Split
from lscollapse.data.texts import CorpusError

DIGITS_SOURCE = "handwritten digits (scikit-learn load_digits)"
HELD_OUT = 360  # of the 1,797 digits
CIFAR10 = "uoft-cs/cifar10"  # on the hub
SIDE = 32  # to which the pictures of a folder are resized
SHIFT = 4  # pixels by which `cropped` moves an image
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
COLOUR = {"levels": 256, "channels": 3}
# Of CIFAR-10's training and test images: what the paper's counts leave room for.
TAKEN = {50_000: 40_000, 10_000: 7_850}
LABELS = 2**16  # classes at most
PIXELS_READ = 2**20  # of a picture of a data set: each is an id, and a model reads them all
VALIDATION = 0.12  # of the training images taken: 4,800 of 40,000


@dataclass(frozen=True)
class Images:
    """One split of a data set.

    Attributes:
        ids: (images, N) integers, N = height * width pixels.
        labels: (images,) int64, 0..n_labels-1.
        names: one for each image, for the record.
    """

    ids: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    n_labels: int
    levels: int
    channels: int
    source: str

    @property
    def sha256(self) -> str:
        """Of all ids and labels, for the record: whatever the files, the same images have the same."""
        digest = hashlib.sha256()
        for row in (*self.ids, self.labels):
            digest.update(row.astype("<i8").tobytes())
        return digest.hexdigest()


def read_images(source: str, split: str) -> Images:
    """The `train` or `test` images of a source.

    Args:
        source: `digits` (8x8, grey, comes with scikit-learn), `cifar10` (32x32, colour, from the hub), or a folder: of
            Parquet files train*.parquet and test*.parquet as on the hub (an image column and `label`), or of pictures,
            one sub-folder a class, under train/ and test/ if there are these two.

    Raises:
        CorpusError: no such source, or it cannot be read.
    """
    if source == "digits":
        return digits(split)
    if source == "cifar10":
        return _from_rows(_hub_rows(split), f"CIFAR-10 ({CIFAR10})")
    path = expanded(source)
    if not os.path.isdir(path):
        raise CorpusError(
            f"no images '{shown(source, 200)}': give digits, cifar10, or a folder of Parquet files or pictures"
        )
    if any(path.rglob("*.parquet")):
        return _from_rows(_parquet_rows(path, split), path.resolve().name)
    return _from_rows(_pictures(path, split), path.resolve().name)


def grey(source: str, split: Split, seed: int = 0) -> Images:
    """The `train`, `validation` or `test` images of a source in grey, ids 0..255 (`digits`: 0..16), uint8.

    With `cifar10`, or a folder of its Parquet files, this is the image task of the Long Range Arena with the counts of
    appendix A.13 of arXiv:2410.10609v3: 35,200 images to train on and 7,850 to test on. Which ones is not told: here
    35,200 and 4,800 for validation are drawn from the 50,000 training images, the 7,850 from the 10,000 test images.
    Any other source is used whole, 12 % of its training images for validation. Grey is ITU-R 601-2 luma, PIL's "L".

    Args:
        seed: of the division into train and validation, 0 for the one that all runs share; the test images depend on
            nothing.

    Raises:
        CorpusError: as `read_images`, or too few images to divide.
    """
    return part_in_grey(read_images(source, "test" if split == "test" else "train"), split, seed)


def part_in_grey(images: Images, split: Split, seed: int = 0) -> Images:
    """What `grey` gives for `split`, from the source's test images or, for the other two, its training images."""
    n_images, test = len(images.ids), split == "test"
    order = np.random.default_rng(0 if test else seed).permutation(n_images)[: TAKEN.get(n_images, n_images)]
    held = round(VALIDATION * len(order))
    if not held and not test:
        raise CorpusError(f"{images.source} has {n_images} training images: too few to hold out {VALIDATION:.0%} of")
    chosen = np.sort({"train": order[held:], "validation": order[:held], "test": order}[split])
    ids = np.stack([luma(images.ids[i]) if images.channels == 3 else images.ids[i] for i in chosen]).astype(np.uint8)
    names = tuple(images.names[i] for i in chosen)
    return replace(images, ids=ids, labels=images.labels[chosen], names=names, channels=1)


def luma(ids: np.ndarray) -> np.ndarray:
    """24-bit colours -> grey 0..255: 0.299 red + 0.587 green + 0.114 blue, in 16-bit fixed point and rounded, as PIL."""
    red, green, blue = ids >> 16, ids >> 8 & 255, ids & 255
    grey: np.ndarray = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def image_excerpts(source: str, model: Any, n_images: int, seed: int) -> Corpus:
    """`n_images` held-out images, drawn by `seed`, each whole: what a model of pixels reads in place of text.

    Args:
        model: the net's config, whose `levels` and `channels` the images must have.

    Raises:
        CorpusError: as `read_images`, or images of another kind, or too few.
    """
    images = read_images(source, "test")
    if (images.levels, images.channels) != (model.levels, model.channels):
        raise CorpusError(
            f"{images.source} has {images.channels} channels of {images.levels} levels, the model reads {model.channels} of"
            f" {model.levels}: choose the data it was trained on ({model.data}) with --source"
        )
    if n_images > len(images.ids):
        raise CorpusError(
            f"{images.source} has {len(images.ids)} held-out images, {n_images} were asked: lower --excerpts"
        )
    return corpus_of(f"{images.source}, held out", images.names, images.ids.__getitem__, n_images, seed)


def corpus_of(source: str, names: Sequence[str], read: Callable[[int], np.ndarray], n_images: int, seed: int) -> Corpus:
    """`n_images` of those that have `names`, drawn by `seed`; `read` gives the ids of one by its number."""
    excerpts = []
    for i in np.random.default_rng(seed).permutation(len(names))[:n_images]:
        ids = read(i)
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        excerpts.append(Excerpt(names[i], tuple(ids.tolist()), digest, PIXELS, source))
    return Corpus(tuple(excerpts), 0, source)


def digits(split: str) -> Images:
    """scikit-learn's 8x8 grey digits of 17 levels; 1,437 train and 360 test images, divided once and for all."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = _division(len(data.target), HELD_OUT, split)
    names = tuple(f"digit {i}" for i in chosen)
    ids, labels = data.data[chosen].astype(np.int64), data.target[chosen].astype(np.int64)
    return Images(ids, labels, names, n_labels=10, levels=17, channels=1, source=DIGITS_SOURCE)


def pixel_ids(picture: Any) -> np.ndarray:
    """A PIL picture as (height * width,) ids of 24-bit colour."""
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=np.int32), -1, 0)
    ids: np.ndarray = ((red * 256 + green) * 256 + blue).reshape(-1)  # (height * width,)
    return ids


def cropped(ids: Tensor, seed: Any) -> Tensor:
    """Square images (B, N), each moved by up to SHIFT pixels both ways over a black ground and half of them mirrored.

    What nets are trained with on CIFAR-10: a random crop after padding by 4, and a random flip. The seed decides.
    """
    side = math.isqrt(ids.shape[1])
    rng = np.random.default_rng(seed)
    up, left = rng.integers(-SHIFT, SHIFT + 1, (2, len(ids), 1))
    rows, columns = np.arange(side) + up, np.arange(side) + left  # (B, side)
    columns = np.where(rng.random((len(ids), 1)) < 0.5, columns, side - 1 - columns)
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    source = rows.clip(0, side - 1)[:, :, None] * side + columns.clip(0, side - 1)[:, None]  # (B, side, side)
    taken = ids.gather(1, torch.from_numpy(source.reshape(len(ids), -1)).to(ids.device))
    return taken * torch.from_numpy(inside.reshape(len(ids), -1)).to(ids.device)


def _division(n_images: int, n_test: int, split: str) -> np.ndarray:
    order = np.random.default_rng(0).permutation(n_images)
    return order[n_test:] if split == "train" else order[:n_test]


def _from_rows(rows: Iterable[tuple[np.ndarray, int, str]], source: str) -> Images:
    held = list(rows)
    if not held:
        raise CorpusError(f"{source} holds no images")
    ids, labels, names = zip(*held, strict=True)
    if len({len(row) for row in ids}) > 1:
        raise CorpusError(f"the images of {source} differ in size: resize them to one size")
    return Images(np.stack(ids), np.array(labels), names, n_labels=max(labels) + 1, source=source, **COLOUR)


def _hub_rows(split: str) -> Iterator[tuple[np.ndarray, int, str]]:
    import datasets

    try:
        with hub_client.watched():
            rows = datasets.load_dataset(CIFAR10, split=split)
    except Exception as error:  # whatever the hub's client raises
        why = f"{CIFAR10} cannot be fetched from the hub ({first_line(error)})"
        raise CorpusError(f"{why}: fetch it elsewhere and give the folder with its Parquet files") from error
    yield from _decoded(rows, split)


def _parquet_rows(folder: Path, split: str) -> Iterator[tuple[np.ndarray, int, str]]:
    import datasets

    files = sorted(map(str, folder.rglob(f"{split}*.parquet")))
    if not files:
        raise CorpusError(f"no {split}*.parquet in {folder}")
    for file in files:
        refuse_no_file(Path(file), CorpusError)
    try:
        rows = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
        yield from _decoded(rows, split)
    except CorpusError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers of Parquet and of pictures raise
        raise CorpusError(f"{folder} cannot be read: {shown(first_line(error), 200)}") from error


def _decoded(rows: Any, split: str) -> Iterator[tuple[np.ndarray, int, str]]:
    import datasets

    columns = rows.column_names or []
    image = next((name for name in ("img", "image") if name in columns), None)
    if image is None or "label" not in columns:
        raise CorpusError(
            f"the Parquet files have the columns {shown(columns, 200)}: needed are img (or image) and label"
        )
    for number, row in enumerate(rows.cast_column(image, datasets.Image())):
        label, picture = row["label"], row[image]
        if type(label) is not int or not 0 <= label < LABELS:
            raise CorpusError(f"row {number + 1} of {split} has the label {shown(label)}: 0 to {LABELS - 1:,} are read")
        if picture is None or picture.width * picture.height > PIXELS_READ:
            size = "no picture" if picture is None else f"a picture of {picture.width} x {picture.height} pixels"
            raise CorpusError(f"row {number + 1} of {split} has {size}: up to {PIXELS_READ:,} pixels are read")
        yield pixel_ids(picture), label, f"{split} {number}"


def _pictures(folder: Path, split: str) -> Iterator[tuple[np.ndarray, int, str]]:
    """Every picture at SIDE x SIDE; of a folder without train/ and test/ a fifth is held out."""
    names = sorted(pictures_in(folder))
    divided = (folder / "train").is_dir() and (folder / "test").is_dir()
    kinds = {name: "/".join(name.parts[divided:-1]) for name in names}
    classes = sorted(set(kinds.values()))
    if divided:
        names = [name for name in names if name.parts[0] == split]
    else:
        names = [names[i] for i in _division(len(names), -(-len(names) // 5), split)]
    for name in names:
        picture = open_picture(folder / name).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        yield pixel_ids(picture), classes.index(kinds[name]), str(name)


def pictures_in(folder: Path) -> Iterator[Path]:
    """Every picture in and below a folder, relative to it, in no order."""
    return (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def open_picture(file: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        CorpusError: it cannot be read.
    """
    refuse_no_file(file, CorpusError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", Image.DecompressionBombWarning
            )  # a small file of more pixels than memory holds
            with Image.open(file) as picture:
                return picture.convert("RGB")
    except Exception as error:  # whatever a damaged file makes one of the many readers raise
        raise CorpusError(f"{file} is not a readable picture: {shown(first_line(error), 200)}") from error
