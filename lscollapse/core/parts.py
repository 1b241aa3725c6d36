"""The parts of a run: the rows of each work item in a file of its own, which says whose they are and what they were.

The metadata of a part's schema hold the item, how many rows there are, the sha256 of the rows and that of the run's identity.
A part of which any of these does not agree is damaged, or another run's: it is set aside, and its item measured again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from lscollapse.core.files import arrow_table, first_line, write_arrow
from lscollapse.core.outside import shown

FACTS = "lscollapse"  # the key of the metadata
DAMAGED = ".damaged"  # how the name of a part ends that was set aside


class DamagedPart(ValueError):
    """What is wrong with a part, in words."""


class Parts:
    """The parts in a folder.

    Args:
        folder: made with the first part.
        identity: everything that decides the rows (JSON values).

    Attributes:
        unmarked: whether parts without these metadata are believed, as of a run that an earlier version began.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.unmarked = folder, False
        self.identity = _sha256(json.dumps(identity, sort_keys=True).encode())

    def file(self, item: str) -> Path:
        return self.folder / f"{item}.parquet"

    def add(self, item: str, rows: pd.DataFrame, **more: str) -> None:
        """Store one work item's rows, whole or not at all, and what `more` there is to know of them."""
        self.folder.mkdir(exist_ok=True)
        table = arrow_table(rows)
        facts = {"item": item, "rows": len(rows), "sha256": digest(table), "identity": self.identity, **more}
        write_arrow(self.file(item), table.replace_schema_metadata({**table.schema.metadata, FACTS: json.dumps(facts)}))

    def read(self, item: str) -> tuple[pd.DataFrame, dict[str, Any]]:
        """A work item's rows, and what their part says of them.

        Raises:
            DamagedPart: they are not what was stored for this item of this run.
        """
        from pyarrow import parquet

        try:
            table: Any = parquet.read_table(self.file(item))
            facts: Any = json.loads((table.schema.metadata or {}).get(FACTS.encode(), b"null"))
            rows = table.to_pandas()
            sha256 = digest(arrow_table(rows))  # of what is used: the metadata, which name columns too, may be damaged
        except FileNotFoundError:
            raise DamagedPart("it is gone") from None
        except MemoryError:
            raise
        except Exception as error:  # whatever the library makes of bytes that are not what was written
            raise DamagedPart(f"it cannot be read: {shown(first_line(error))}") from error
        if facts is None and self.unmarked:
            return rows, {}
        expected = {"item": item, "rows": table.num_rows, "sha256": sha256, "identity": self.identity}
        held = facts if isinstance(facts, dict) else {}
        wrong = [name for name, value in expected.items() if held.get(name) != value]
        if wrong:
            raise DamagedPart(
                f"its {' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what it was written with"
            )
        return rows, held

    def set_aside(self, item: str) -> Path:
        """Take a part out of the run; its new name."""
        file = self.file(item)
        return file.replace(file.with_name(file.name + DAMAGED)) if file.exists() else file

    def items(self) -> list[str]:
        """Of all parts in the folder."""
        return sorted(file.stem for file in self.folder.glob("*.parquet"))


def digest(table: Any) -> str:
    """Hex sha256 of an Arrow table: of its columns' types and its rows as CSV, in which every digit of a number stands."""
    from pyarrow import BufferOutputStream, csv

    sink = BufferOutputStream()
    csv.write_csv(table, sink)
    types = ", ".join(str(column.type) for column in table.schema)
    return _sha256(types.encode(), sink.getvalue())


def _sha256(*pieces: Any) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
