"""Images as pixel ids: scikit-learn's digits, folders of pictures, Parquet files, and what is refused."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lscollapse.data import images
from lscollapse.data.corpus import CorpusError
from lscollapse.models.nets.s4d import S4DConfig

GREY = S4DConfig(channels=1, levels=17, data="digits")
COLOURS = np.random.default_rng(3).integers(0, 256, (6, 2, 3, 3), dtype=np.uint8)  # six pictures of 2x3 pixels


def hex_ids(picture: np.ndarray) -> list[int]:
    """Row by row, each pixel as the number that its #RRGGBB is."""
    return [int("".join(f"{channel:02x}" for channel in pixel), 16) for row in picture for pixel in row]


def png(picture: np.ndarray, file: Path) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)
    return file.read_bytes()


def test_digits_are_scikit_learns_divided_once() -> None:
    train, test = images.read_images("digits", "train"), images.read_images("digits", "test")
    assert (len(train.ids), len(test.ids)) == (1437, 360)
    numbers = [int(name.removeprefix("digit ")) for name in (*train.names, *test.names)]
    assert sorted(numbers) == list(range(1797))
    bunch = load_digits()
    np.testing.assert_array_equal(np.concatenate([train.ids, test.ids]), bunch.images.reshape(1797, 64)[numbers])
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), bunch.target[numbers])
    assert (train.levels, train.channels, train.n_labels, int(train.ids.max())) == (17, 1, 10, 16)


def write_parquet(folder: Path, split: str, image_column: str = "img") -> None:
    """As the hub lays it out: encoded bytes in a struct, written without `datasets`."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    chosen = COLOURS[:4] if split == "train" else COLOURS[4:]
    encoded = [{"bytes": png(p, folder / "made.png"), "path": None} for p in chosen]
    (folder / "made.png").unlink()
    table = pa.table({image_column: pa.array(encoded, kind), "label": pa.array(range(len(chosen)), pa.int64())})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_files_in_a_folder(tmp_path: Path, column: str) -> None:
    for split in ("train", "test"):
        (tmp_path / "plain_text").mkdir(exist_ok=True)
        write_parquet(tmp_path / "plain_text", split, column)
    train, test = images.read_images(str(tmp_path), "train"), images.read_images(str(tmp_path), "test")
    assert train.ids.tolist() == [hex_ids(picture) for picture in COLOURS[:4]]
    assert test.ids.tolist() == [hex_ids(picture) for picture in COLOURS[4:]]
    assert (train.labels.tolist(), train.n_labels, train.levels, train.channels) == ([0, 1, 2, 3], 4, 256, 3)


def test_pictures_in_classes_with_and_without_a_division(tmp_path: Path) -> None:
    plain = {"cat": (255, 0, 0), "dog": (0, 128, 255)}
    for name, colour in plain.items():
        for number in range(5):
            picture = np.full((20, 30, 3), colour, dtype=np.uint8)
            png(picture, tmp_path / "whole" / name / f"{number}.png")
            png(picture, tmp_path / "divided" / ("test" if number < 2 else "train") / name / f"{number}.png")
    for folder, sizes in (("whole", (8, 2)), ("divided", (6, 4))):
        splits = [images.read_images(str(tmp_path / folder), split) for split in ("train", "test")]
        assert tuple(len(split.ids) for split in splits) == sizes
        assert not set(splits[0].names) & set(splits[1].names)
        for split in splits:
            assert split.ids.shape[1] == 32 * 32
            for row, label, name in zip(split.ids, split.labels, split.names, strict=True):
                kind = Path(name).parent.name
                assert set(row.tolist()) == {hex_ids(np.array([[plain[kind]]]))[0]}  # one colour, whatever the size
                assert label == sorted(plain).index(kind)


def test_what_is_no_image_source(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="give digits, cifar10, or a folder"):
        images.read_images("mnist", "test")
    with pytest.raises(CorpusError, match="holds no images"):
        images.read_images(str(tmp_path), "test")
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(CorpusError, match=r"broken\.png is not a readable picture"):
        images.read_images(str(tmp_path), "test")
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "test.parquet")
    with pytest.raises(CorpusError, match="needed are img"):
        images.read_images(str(tmp_path), "test")
    with pytest.raises(CorpusError, match=r"no train\*\.parquet"):
        images.read_images(str(tmp_path), "train")


def test_cifar10_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(CorpusError, match="give the folder with its Parquet files"):
        images.read_images("cifar10", "test")


def test_grey_digits_have_a_validation_part_of_their_own() -> None:
    splits = {split: images.grey("digits", split) for split in ("train", "validation", "test")}
    assert [len(part.ids) for part in splits.values()] == [1265, 172, 360]
    names = [name for part in splits.values() for name in part.names]
    assert len(set(names)) == 1797
    assert set(splits["test"].names) == set(images.read_images("digits", "test").names)
    bunch = load_digits()
    for part in splits.values():
        numbers = [int(name.removeprefix("digit ")) for name in part.names]
        np.testing.assert_array_equal(part.ids, bunch.images.reshape(1797, 64)[numbers])
        np.testing.assert_array_equal(part.labels, bunch.target[numbers])
        assert (part.levels, part.channels, part.n_labels) == (17, 1, 10)
    again, other = images.grey("digits", "train"), images.grey("digits", "train", seed=1)
    assert again.names == splits["train"].names
    assert other.names != again.names
    assert images.grey("digits", "test", seed=1).names == splits["test"].names


def test_grey_is_pils_luma(tmp_path: Path) -> None:
    """Every source goes through the same conversion: here Parquet files, against PIL's own mode "L"."""
    pictures = np.random.default_rng(0).integers(0, 256, (25, 16, 16, 3), dtype=np.uint8)
    encoded = [{"bytes": png(p, tmp_path / "made.png"), "path": None} for p in pictures]
    (tmp_path / "made.png").unlink()
    column = pa.array(encoded, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"img": column, "label": pa.array(range(25), pa.int64())}), tmp_path / "train-0.parquet")
    train, validation = images.grey(str(tmp_path), "train"), images.grey(str(tmp_path), "validation")
    assert (len(train.ids), len(validation.ids)) == (22, 3)
    assert sorted([*train.labels, *validation.labels]) == list(range(25))
    for split in (train, validation):
        assert (split.levels, split.channels, split.ids.dtype) == (256, 1, np.uint8)
        for ids, label in zip(split.ids, split.labels, strict=True):
            np.testing.assert_array_equal(
                ids.reshape(16, 16), np.asarray(Image.fromarray(pictures[label]).convert("L"))
            )


def test_as_many_pictures_as_cifar10_give_the_papers_counts() -> None:
    """Pictures of one grey pixel, #000000, #010101, ...: the shade says which picture it was."""
    parts = {}
    for split, count in (("train", 50_000), ("validation", 50_000), ("test", 10_000)):
        numbers = np.arange(count)
        names = tuple(map(str, numbers))
        whole = images.Images((numbers % 256 * 0x010101)[:, None], numbers % 10, names, 10, 256, 3, "made")
        parts[split] = images.part_in_grey(whole, split)
    assert [len(part.ids) for part in parts.values()] == [35_200, 4_800, 7_850]
    assert not set(parts["train"].names) & set(parts["validation"].names)
    for part in parts.values():
        assert len(set(part.names)) == len(part.names)
        assert part.ids[:, 0].tolist() == [int(name) % 256 for name in part.names]
        assert part.labels.tolist() == [int(name) % 10 for name in part.names]


def test_what_cannot_be_grey(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="dev"):  # its type allows SPLITS only
        images.grey("digits", "dev")  # type: ignore[arg-type]
    write_parquet(tmp_path, "train")
    with pytest.raises(CorpusError, match="has 4 training images: too few to hold out 12%"):
        images.grey(str(tmp_path), "train")


def test_the_checksum_is_of_pixels_and_labels() -> None:
    """sha256 of the numbers as 64-bit little-endian integers: image after image, then the labels."""
    made = images.Images(np.array([[1, 2], [3, 256]]), np.array([7, 8]), ("a", "b"), 9, 257, 1, "made")
    numbers = b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 256, 7, 8))
    assert made.sha256 == hashlib.sha256(numbers).hexdigest()


def test_excerpts_are_held_out_images_drawn_by_the_seed() -> None:
    corpus = images.image_excerpts("digits", GREY, 32, 0)
    test = images.read_images("digits", "test")
    held_out = dict(zip(test.names, test.ids.tolist(), strict=True))
    assert len({excerpt.title for excerpt in corpus.excerpts}) == 32
    assert all(held_out[excerpt.title] == list(excerpt.ids) for excerpt in corpus.excerpts)
    assert corpus == images.image_excerpts("digits", GREY, 32, 0)
    assert corpus.excerpts != images.image_excerpts("digits", GREY, 32, 1).excerpts
    with pytest.raises(CorpusError, match="360 held-out images, 361 were asked"):
        images.image_excerpts("digits", GREY, 361, 0)
    with pytest.raises(CorpusError, match="the model reads 3 of 256"):
        images.image_excerpts("digits", S4DConfig(), 1, 0)


def test_crops_are_those_of_a_padded_image_moved_and_mirrored() -> None:
    """Every crop is one of the 81 windows of the image padded by 4, as NumPy cuts them, or its mirror image."""
    side = 6
    pictures = np.arange(1, 20 * side * side + 1).reshape(20, side, side)
    found = images.cropped(torch.from_numpy(pictures.reshape(20, -1)), [0, 7]).numpy().reshape(20, side, side)
    mirrored = 0
    for picture, crop in zip(pictures, found, strict=True):
        padded = np.pad(picture, 4)
        windows = [padded[y : y + side, x : x + side] for y in range(9) for x in range(9)]
        plain = any((crop == w).all() for w in windows)
        assert plain or any((crop == w[:, ::-1]).all() for w in windows)
        mirrored += not plain
    assert 4 <= mirrored <= 16
    again = images.cropped(torch.from_numpy(pictures.reshape(20, -1)), [0, 7]).numpy().reshape(20, side, side)
    np.testing.assert_array_equal(found, again)


# --- pictures and rows that are none ---


def test_pictures_that_cannot_be_opened(tmp_path: Path) -> None:
    """A pipe, whose opening would wait; a small file of 400 million pixels; and one that is cut off."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CorpusError, match="it is a "):
        images.open_picture(tmp_path / "pipe.png")
    whole = png(COLOURS[0], tmp_path / "a.png")
    for n in (7, 20, 30, 45):
        (tmp_path / "cut.png").write_bytes(whole[:n])
        with pytest.raises(CorpusError, match=r"cut\.png is not a readable picture"):
            images.open_picture(tmp_path / "cut.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = whole[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(CorpusError, match=r"bomb\.png is not a readable picture: Image size \(400000000 pixels\)"):
        images.open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("label", "broken", "says"),
    [
        (-1, False, "row 2 of train has the label -1: 0 to 65,535 are read"),
        (2**40, False, "row 2 of train has the label 1099511627776"),
        (None, False, "row 2 of train has the label None"),
        (1, None, "row 2 of train has no picture"),
        (1, True, "cannot be read"),
    ],
)
def test_rows_that_are_no_labelled_picture(tmp_path: Path, label: int | None, broken: bool | None, says: str) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    good = {"bytes": png(COLOURS[0], tmp_path / "a.png"), "path": None}
    other = None if broken is None else {"bytes": b"no picture", "path": None} if broken else good
    table = pa.table({"img": pa.array([good, other], kind), "label": pa.array([0, label], pa.int64())})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(CorpusError, match=says) as caught:
        images.read_images(str(tmp_path), "train")
    assert "\n" not in str(caught.value)
