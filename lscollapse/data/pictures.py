"""Pictures at the size that a vision model reads, one id a pixel: 24-bit colour in reading order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lscollapse.core.files import first_line
from lscollapse.data import images
from lscollapse.data.corpus import SOURCES, Corpus, CorpusError, Excerpt


def excerpts(source: str, size: tuple[int, int], n_pictures: int, seed: int) -> Corpus:
    """`n_pictures`, drawn by `seed`, each resized to `size` (height, width) without regard to its proportions, as ViT's
    own image processor does.

    Args:
        source: a folder of pictures, searched through; `digits` (scikit-learn's, enlarged) or any source of text for these.

    Raises:
        CorpusError: no such source, too few pictures, or an unreadable one.
    """
    if source == "digits" or source in SOURCES:
        name, names, open_picture = _digits()
    else:
        name, names, open_picture = _folder(Path(source).expanduser())
    if n_pictures > len(names):
        raise CorpusError(f"{name} has {len(names)} pictures, {n_pictures} were asked: lower --excerpts")
    chosen = np.random.default_rng(seed).permutation(len(names))[:n_pictures]
    return Corpus(tuple(_excerpt(name, names[i], open_picture(i), size) for i in chosen), 0, name)


def _excerpt(source: str, title: str, picture: Image.Image, size: tuple[int, int]) -> Excerpt:
    height, width = size
    ids = images.pixel_ids(picture.resize((width, height), Image.Resampling.BILINEAR))
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return Excerpt(title, tuple(ids.tolist()), digest, images.PIXELS, source)


Opened = tuple[str, list[str], Callable[[int], Image.Image]]


def _digits() -> Opened:
    held = images.digits("test")

    def picture(i: int) -> Image.Image:
        grey = held.ids[i].reshape(8, 8) * 255 // (held.levels - 1)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")

    return held.source, list(held.names), picture


def _folder(folder: Path) -> Opened:
    if not folder.is_dir():
        raise CorpusError(f"no pictures {str(folder)!r}: give digits, or a folder of pictures")
    names = sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix.lower() in images.SUFFIXES
    )

    def picture(i: int) -> Image.Image:
        try:
            with Image.open(folder / names[i]) as opened:
                return opened.convert("RGB")
        except OSError as error:
            raise CorpusError(f"{folder / names[i]} is not a readable picture: {first_line(error)}") from error

    return folder.resolve().name, names, picture
