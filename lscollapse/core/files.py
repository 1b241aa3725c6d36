"""Files: read from a person, written whole or not at all, told apart by their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lscollapse.core.outside import LARGEST, SHA256, parse_json, shown

if TYPE_CHECKING:  # every verb loads this file for its --help, which needs no pandas
    import pandas as pd

PIECE = 2**22  # bytes that are hashed at a time: large, so that a thread that hashes seldom waits for others
GGUF = ".gguf"  # how the name of a file ends that llama.cpp reads
PARTIAL = ".partial"  # how the name of a file ends that is not whole yet
REMEMBERED = 2**24  # bytes of a file from which on its digest is kept for other processes too
REMEMBERED_FILES = 1000
_digests: dict[tuple[int, ...], str] = {}  # by what changes when a file does


class OutputError(ValueError):
    """What is to be written to is no file: one line."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end of the block the file is on the disk under `path`, whole or not at all.

    A link is followed: what it points to is replaced. What a kill left half-written under that name is taken away.

    Raises:
        OutputError: `path` is a folder, a pipe or a device.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if kind := odd_kind(target):
        raise OutputError(f"{path} cannot be written: it is {kind}, give the name of a file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    clear_partials(target.parent, target.name)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def clear_partials(folder: Path, name: str = "") -> None:
    """Take away what processes that are no more left half-written in a folder, under one name or under any."""
    if not folder.is_dir():
        return
    for file in os.listdir(folder):
        own, _, pid = file.removesuffix(PARTIAL).rpartition(".")
        if (
            file.endswith(PARTIAL)
            and pid.isdigit()
            and own.startswith(".")
            and name in ("", own[1:])
            and _gone(int(pid))
        ):
            (folder / file).unlink(missing_ok=True)


def _gone(pid: int) -> bool:
    """Whether no other process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it is another user's
        return False
    return pid == os.getpid()


def odd_kind(path: Path) -> str:
    """What stands under a name where it is neither a file nor nothing, in words: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing, or out of reach, which whoever opens it says
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: ""}
    return kinds.get(stat.S_IFMT(mode), "a device")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_parquet(path: Path, rows: pd.DataFrame) -> None:
    """Write a table as Parquet, whole or not at all."""
    write_arrow(path, arrow_table(rows))


def write_arrow(path: Path, table: Any) -> None:
    """The same of an Arrow table."""
    from pyarrow import parquet

    with atomic(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def arrow_table(rows: pd.DataFrame) -> Any:
    """A table as it is written. Categoricals are written as what they stand for, and read so."""
    from pyarrow import Table, types

    table: Any = Table.from_pandas(rows, preserve_index=False)
    for number, column in enumerate(table.schema):
        if types.is_dictionary(column.type):
            table = table.set_column(number, column.name, table[number].cast(column.type.value_type))
    return table


def write_csv(path: Path, rows: pd.DataFrame) -> None:
    """Write a table as CSV with all digits of its numbers, nothing where one is missing; whole or not at all."""
    from pyarrow import Table, csv

    with atomic(path) as temporary:
        csv.write_csv(Table.from_pandas(rows, preserve_index=False), temporary)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: Path, error: type[ValueError], largest: int = LARGEST) -> str:
    """The text of a file that a person gave: UTF-8, with or without a byte order mark, lines ended in any way.

    Args:
        error: what is raised where it cannot be read, with the file's name in its one line.
        largest: bytes that are read at most.
    """
    refuse_no_file(path, error)
    try:
        if (size := path.stat().st_size) > largest:
            raise error(f"{path} is {size:,} bytes, at most {largest:,} are read: give a smaller file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text (byte {cause.start}): convert it first") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause


def refuse_no_file(path: Path, error: type[ValueError]) -> None:
    """Raise `error` where there is no file of that name, or a folder, a pipe or a device, which may never end."""
    if not os.path.isfile(path):
        kind = odd_kind(path)
        raise error(
            f"{shown(str(path), 200)} cannot be read: {f'it is {kind}, no file' if kind else 'there is no such file'}"
        )


def read_mapping(
    path: Path,
    error: type[ValueError],
    largest: int = LARGEST,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The object in a JSON file; `error` where there is none or something else."""
    content = parse_json(read_text(path, error, largest), str(path), error, object_hook)
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object ({{...}}) but {shown(content)}: fetch it again")
    return content


def refuse_pipes(folder: Path, error: type[ValueError]) -> None:
    """Raise `error` where something in a folder is neither file nor folder: opening a pipe may never end."""
    for entry in sorted(folder.iterdir()):
        if os.path.exists(entry) and not (os.path.isfile(entry) or os.path.isdir(entry)):
            raise error(f"{entry} is a pipe or a device: a folder of a model or a tokenizer holds files")


def expanded(path: str | Path) -> Path:
    """The path with the home folder for a ~ at its start, where that is known."""
    return Path(os.path.expanduser(path))


def is_gguf(path: Path) -> bool:
    """Whether there is a GGUF file of that name."""
    return path.suffix.lower() == GGUF and os.path.isfile(path)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file; computed once as long as the file does not change, of a large file once for all processes."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key in _digests:
        return _digests[key]
    name, known = ":".join(map(str, key)), _remembered() if stat.st_size >= REMEMBERED else {}
    if name not in known:
        digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
        with path.open("rb", buffering=0) as handle:
            while size := handle.readinto(piece):
                digest.update(piece[:size])
        known = {**known, name: digest.hexdigest()}
        if stat.st_size >= REMEMBERED:
            _remember(known)
    _digests[key] = known[name]
    return known[name]


def _remembered() -> dict[str, str]:
    """The digests that processes before this one computed; a memory that cannot be read is empty."""
    try:
        kept = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder, or values without end
        return {}
    right = isinstance(kept, dict) and all(isinstance(d, str) and SHA256.fullmatch(d) for d in kept.values())
    return kept if right else {}


def _remember(digests: dict[str, str]) -> None:
    with suppress(OSError, RuntimeError):  # it saves time, no more
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_json(_memory(), dict(list(digests.items())[-REMEMBERED_FILES:]))


def _memory() -> Path:
    return cache_folder(None) / "digests.json"


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where the package keeps what it made: `cache_dir`, else LSCOLLAPSE_CACHE, else ~/.cache/lscollapse.

    Raises:
        ValueError: none is named and there is no home folder.
    """
    folder = expanded(cache_dir or os.environ.get("LSCOLLAPSE_CACHE") or "~/.cache/lscollapse")
    if str(folder).startswith("~"):
        raise ValueError(
            f"no home folder is known for {shown(str(folder))} (is HOME set?): name a folder to keep things in, by"
            " LSCOLLAPSE_CACHE or --set cache_dir=FOLDER"
        )
    return folder


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, as "key: old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in changes(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    records = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if records and all(isinstance(entry, dict) for entry in [*old, *new]):
        pairs = enumerate(zip(old, new, strict=True), start=1)
        return [line for number, pair in pairs for line in changes(*pair, f"{where}.{number}".lstrip("."))]
    if old == new:
        return []
    lists = isinstance(old, list) and isinstance(new, list)
    if lists and _short(old) == _short(new):  # they differ beyond what is shown
        less, more = ([v for v in one if v not in other] for one, other in ((old, new), (new, old)))
        return [f"{where}: less {_short(less)}, plus {_short(more)}"]
    return [f"{where}: {_short(old)}, now {_short(new)}"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
