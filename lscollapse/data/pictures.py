"""Pictures at the size that a vision model reads, one id a pixel: 24-bit colour in reading order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lscollapse.core.files import expanded
from lscollapse.core.outside import shown
from lscollapse.data import images
from lscollapse.data.corpus import SOURCES, Corpus
from lscollapse.data.texts import CorpusError

Opened = tuple[str, list[str], Callable[[int], Image.Image]]  # the source's name, its pictures' names, and each of them


def picture_excerpts(source: str, size: tuple[int, int], n_pictures: int, seed: int) -> Corpus:
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
        name, names, open_picture = _folder(expanded(source))
    if n_pictures > len(names):
        raise CorpusError(f"{name} has {len(names)} pictures, {n_pictures} were asked: lower --excerpts")

    def read(i: int) -> np.ndarray:
        height, width = size
        return images.pixel_ids(open_picture(i).resize((width, height), Image.Resampling.BILINEAR))

    return images.corpus_of(name, names, read, n_pictures, seed)


def _digits() -> Opened:
    held = images.digits("test")

    def picture(i: int) -> Image.Image:
        grey = held.ids[i].reshape(8, 8) * 255 // (held.levels - 1)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")

    return held.source, list(held.names), picture


def _folder(folder: Path) -> Opened:
    if not os.path.isdir(folder):
        raise CorpusError(f"no pictures '{shown(str(folder), 200)}': give digits, or a folder of pictures")
    names = sorted(map(str, images.pictures_in(folder)))
    return folder.resolve().name, names, lambda i: images.open_picture(folder / names[i])
