"""What comes from outside: read up to a bound, refused in one line, and repeated in messages as plain characters.

A reader of a format yields a checked object or raises the error of its room, with a message of one line: which file or server,
where in it, what came, what is allowed, how to mend it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

LONGEST = 400  # characters of a message
LARGEST = 2**26  # bytes of a file of JSON, YAML or text that describes something; a tokenizer has up to 2^25
DEEPEST = 64  # values inside values
SHA1, SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")  # as hexadecimal digits
Sha1 = Annotated[str, StringConstraints(pattern=f"^{SHA1.pattern}$")]
Sha256 = Annotated[str, StringConstraints(pattern=f"^{SHA256.pattern}$")]
_UNWRITTEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and halves of characters

Checked = TypeVar("Checked", bound=BaseModel)


def shown(value: object, limit: int = 80) -> str:
    """A value as a message repeats it: on one line, of `limit` characters at most, control characters and lone surrogates escaped."""
    cut = value if isinstance(value, str) else _cut(value)
    text = cut if isinstance(cut, str) else repr(cut)
    return _shortened(plain(text[: 2 * limit]), limit)


def one_line(message: str) -> str:
    """A message as it may be printed: one line of LONGEST characters at most, without a character that a terminal obeys."""
    return _shortened(plain(" ".join(message[: 8 * LONGEST].split())), LONGEST)


def plain(text: str) -> str:
    """A text whole, without a character that a terminal obeys."""
    return "".join(map(_plain, text))


def unwritten(text: str) -> str:
    """The first control character or lone surrogate of a text, which belongs into no name; "" where it has none."""
    found = _UNWRITTEN.search(text)
    return found[0] if found else ""


def _cut(value: object) -> object:
    """What is shown of a value, before it is written out: a collection may stand for far more than it takes."""
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys"
    if isinstance(value, list | tuple | set):
        short = len(value) <= 8 and not any(isinstance(v, list | tuple | dict) for v in value)
        return value if short else f"{len(value)} values"
    if isinstance(value, int) and abs(value) >= 10**24:
        return "an integer of more than 24 digits"
    return value


def _plain(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_json(
    text: str,
    where: str,
    error: type[ValueError],
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    *,
    standard: bool = False,
) -> Any:
    """The value that a JSON text is, no deeper than DEEPEST and of whole characters.

    Args:
        where: the file or server, and the place in it, for the message.
        error: what is raised where it is no such value.
        standard: refuse NaN and Infinity, which Python writes and reads, and JSON does not know.
    """
    try:
        value = json.loads(text, object_hook=object_hook, parse_constant=_refuse_constant if standard else None)
    except RecursionError:
        raise error(f"{where}: values inside values without end, where {DEEPEST} levels are read") from None
    except (ValueError, TypeError) as cause:
        raise error(f"{where}: not JSON ({cause})") from cause
    refuse_odd(value, where, error)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def refuse_odd(value: Any, where: str, error: type[ValueError]) -> None:
    """Raise `error` where a JSON or YAML value is too deep, or a text in it has half a character (a lone surrogate)."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise error(f"{where}: values inside values without end, where {DEEPEST} levels are read")
        below: dict[int, Any] = {}  # each once, however often it is referred to
        for one in level:
            if isinstance(one, dict):
                below.update((id(v), v) for v in [*one.keys(), *one.values()])
            elif isinstance(one, list):
                below.update((id(v), v) for v in one if isinstance(v, dict | list | str))
            elif isinstance(one, str):
                refuse_half_characters(one, where, error)
        level = list(below.values())


def refuse_half_characters(text: str, where: str, error: type[ValueError]) -> None:
    """Raise `error` where a text holds a lone surrogate, which is no character and cannot be written."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        half = shown(text[cause.start])
        raise error(
            f"{where}: {half} is half of a character (a lone surrogate): take it out, or write both halves"
        ) from None


def checked(schema: type[Checked], values: Any, error: type[ValueError], where: str = "") -> Checked:
    """`values` as the schema describes them; else `error`, in one line that begins with `where`."""
    try:
        return schema.model_validate(values)
    except ValidationError as invalid:
        raise error(f"{where}: {_first(invalid)}".removeprefix(": ")) from None


def _first(error: ValidationError) -> str:
    first, *others = error.errors()
    place: tuple[int | str, ...] = first["loc"]
    message = first["msg"].removeprefix("Value error, ")
    for other in others:  # of a union there is an error for each kind, whose name is the last part of the place
        if other["loc"][:-1] == place[:-1] and str(other["loc"][-1]).startswith("literal["):
            place, message = place[:-1], f"{message.partition(',')[0]} or {other['ctx']['expected']}"
    where = ".".join(shown(part) for part in place)
    if first["type"] == "unknown_key":
        key, hint = shown(first["ctx"]["key"]), first["ctx"]["hint"]
        return f"unknown setting {'.'.join(filter(None, (where, key)))!r}{hint}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of a whole section: too long to repeat
        return f"{where}: {message}".removeprefix(": ")
    came = first["input"]
    got = shown(repr(came) if isinstance(came, str) else came)
    return f"{where}: {message[0].lower()}{message[1:]}, got {got}".removeprefix(": ")
