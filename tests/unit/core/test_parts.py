"""Parts of a run: whatever happens to one while the run is interrupted, it is measured again and the rows are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lscollapse.core.manifest import RunFolderError
from lscollapse.core.parts import Parts
from lscollapse.core.progress import Progress
from lscollapse.core.run_folder import RunFolder
from tests.unit.core.test_run_folder import IDENTITY, ITEMS, expected_rows, part


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def begun(path: Path) -> Path:
    """A run with its parts, interrupted; returns the file of the second."""
    with RunFolder(path, IDENTITY) as folder:
        for number, item in enumerate(ITEMS):
            folder.add(item, part(number))
    return path / "parts" / f"{ITEMS[1]}.parquet"


def flipped(file: Path) -> None:
    """Flip the first bit from a third of the file on that the reader of Parquet takes for something else."""
    whole, rows = file.read_bytes(), pd.read_parquet(file)
    for place in range(len(whole) // 3, len(whole)):
        data = bytearray(whole)
        data[place] ^= 4
        file.write_bytes(data)
        try:
            if not pd.read_parquet(file).equals(rows):
                return
        except (ValueError, OSError):
            return


def rewritten(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    return lambda file: change(pd.read_parquet(file)).to_parquet(file)


def of_another_run(file: Path) -> None:
    Parts(file.parent, {"experiment": "another"}).add(ITEMS[1], part(1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flipped,
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "a row less": rewritten(lambda rows: rows.head(-1)),
    "another number": rewritten(lambda rows: rows.assign(value=rows["value"] + 1e-12)),
    "another program's": rewritten(lambda rows: rows),
    "of another item": lambda file: file.write_bytes(file.with_name(f"{ITEMS[0]}.parquet").read_bytes()),
    "of another run": of_another_run,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_set_aside_and_measured_again(tmp_path: Path, damage: str) -> None:
    file, notes = begun(tmp_path / "run"), Notes()
    DAMAGES[damage](file)
    bytes_of_it = file.read_bytes()
    with RunFolder(tmp_path / "run", IDENTITY, notes) as folder:
        assert [folder.has(item) for item in ITEMS] == [True, False, True]
        (said,) = notes.said
        assert said.startswith(f"{file} is damaged (") and said.endswith(
            f"set aside as {file.name}.damaged, measured again"
        )
        assert file.with_name(f"{file.name}.damaged").read_bytes() == bytes_of_it
        folder.add(ITEMS[1], part(1))
        pd.testing.assert_frame_equal(folder.finish(ITEMS, {}), expected_rows())
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["manifest.json", "rows.csv", "rows.parquet"]


def test_any_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    """Footer and statistics included: what is believed has the rows that were stored."""
    parts, seen = Parts(tmp_path, IDENTITY), 0
    parts.add("item", part(0))
    whole, rows = parts.file("item").read_bytes(), parts.read("item")[0]
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        parts.file("item").write_bytes(data)
        try:
            pd.testing.assert_frame_equal(parts.read("item")[0], rows)
        except ValueError:
            seen += 1
    assert seen > 20


def test_a_part_that_is_damaged_while_the_run_goes_on_ends_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        for number, item in enumerate(ITEMS):
            folder.add(item, part(number))
        flipped(tmp_path / "run" / "parts" / f"{ITEMS[2]}.parquet")
        with pytest.raises(
            RunFolderError, match=f"{ITEMS[2]}.parquet is damaged .* the same command measures it again"
        ):
            folder.finish(ITEMS, {})
        assert not folder.has(ITEMS[2]) and not folder.complete


def test_parts_of_an_earlier_version_are_believed_in_a_run_that_it_began(tmp_path: Path) -> None:
    file = begun(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"complete": False, "identity": IDENTITY}))
    pd.read_parquet(file).to_parquet(file)  # which loses what says what it is
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        pd.testing.assert_frame_equal(folder.finish(ITEMS, {}), expected_rows())


def test_what_is_known_of_an_item_is_kept_beside_its_rows(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        folder.add(ITEMS[0], part(0), net="abc")
        assert folder.facts(ITEMS[0])["net"] == "abc" and folder.facts(ITEMS[0])["rows"] == len(part(0))
