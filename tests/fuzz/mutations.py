"""Documents that are nearly right: a valid one with some values, keys or bytes changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

Path = list[str | int]

ESCAPES = "\x1b[31mred\x1b]0;title\x07"  # what a terminal would obey
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63) - 1, 2**70, 10**40, 0.5, -0.0, 1e39, 1e-320, 1e308, float("inf"),
    float("nan"), "", " ", "0", "1e999", "nan", "x", "../x", "/dev/null", "..", "a/b\\c", ESCAPES, "\ud800", "é\u202e\u0000",
    "y" * 5000, "__class__", "evil", "config.json", [], [None], [[]], [1, "x", None], {}, {"a": {}}, {"__float__": None},
    {"__float__": "Infinity"}, {"a": [{"b": [{}]}]},
]  # fmt: skip
KEYS = ["", "x", "__class__", "dtype", "use_return_dict", "layers", ESCAPES, "\ud800", "k" * 2000, "../x"]
BYTES = [b"", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1b[2J", b"\xed\xa0\x80", b"[" * 20_000, b'{"a":' * 20_000, b"1" * 5000]


def places(value: Any, above: Path | None = None) -> Iterator[Path]:
    """Where there is something in a JSON value that can be changed."""
    above = above or []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield [*above, key]
        yield from places(inner, [*above, key])


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value with one to three changes."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found or draw(st.integers(0, 30)) == 0:
            return copy.deepcopy(draw(st.sampled_from(ODD)))
        *above, last = draw(st.sampled_from(found))
        holder = changed
        for key in above:
            holder = holder[key]
        _change(draw, holder, last)
    return changed


def _change(draw: st.DrawFn, holder: Any, key: Any) -> None:
    kind, odd = draw(st.sampled_from(("replace", "replace", "drop", "rename", "add", "wrap", "swap", "scale"))), st.sampled_from(ODD)
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(odd))
    elif kind == "add":
        holder.insert(key, copy.deepcopy(draw(odd)))
    elif kind == "wrap":
        holder[key] = [holder[key]]
    elif kind == "swap":
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        other = draw(st.sampled_from(keys))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "scale" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * draw(st.sampled_from((-1, 0, 2, 1000, 10**12, 0.5)))
    else:
        holder[key] = copy.deepcopy(draw(odd))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that were cut off, flipped, doubled, or had others put among them."""
    at = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(("cut", "flip", "put", "double", "only")))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes(byte ^ draw(st.integers(1, 255)) for byte in data[at : at + 1]) + data[at + 1 :]
    odd = draw(st.sampled_from(BYTES))
    if kind == "put":
        return data[:at] + odd + data[at:]
    if kind == "double":
        return data[:at] + data[max(0, at - 40) : at] + data[at:]
    return odd


@st.composite
def documents(draw: st.DrawFn, document: Any, dump: Callable[[Any], bytes]) -> bytes:
    """A file of one format: mostly a valid value changed and written, else its bytes damaged."""
    if draw(st.integers(0, 4)):
        return dump(draw(mutated(document)))
    return draw(damaged(dump(document)))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_lines(value: Any) -> bytes:
    """One JSON value a line, of a list."""
    return b"\n".join(map(as_json, value if isinstance(value, list) else [value]))


def as_text(value: Any) -> bytes:
    """Lines of text, of a list; what is no text as Python writes it."""
    lines = value if isinstance(value, list) else [value]
    return "\n".join(line if isinstance(line, str) else repr(line) for line in lines).encode("utf-8", "surrogatepass")
