"""A configuration's YAML, read within bounds."""

from __future__ import annotations

from typing import Any

import yaml

from lscollapse.core.outside import one_line, refuse_odd

LARGEST_YAML = 2**17  # bytes of a configuration, which is read slowly
MOST_VALUES = 100_000  # in it


def parse_yaml(text: str, where: str, error: type[ValueError]) -> Any:
    """The value that a YAML text is.

    Args:
        where: the file, or the option, for the message.
        error: what is raised where it is none, or too deep, or holds half a character.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise error(f"{where} is not YAML: {one_line(str(cause))}") from None
    except RecursionError:
        raise error(f"{where} is not a configuration: values inside values without end") from None
    except (ValueError, TypeError, AttributeError, LookupError) as cause:
        # of what a tag or its look makes a date or a number
        why = one_line(str(cause)) if isinstance(cause, ValueError) else "see the YAML tags in it"
        raise error(f"{where} holds a date, a number or a tag that means nothing: {why}") from None
    refuse_odd(value, where, error)
    if (size := _written_out(value, {})) > MOST_VALUES:
        raise error(f"{where} stands for {size:,} values, its aliases written out; at most {MOST_VALUES:,} are read")
    return value


def _written_out(value: Any, known: dict[int, int]) -> int:
    """How many values a value holds, itself among them, those counted again that are referred to again."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(v, known) for v in inner)
    return known[id(value)]
