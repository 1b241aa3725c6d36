"""A configuration's YAML, read within bounds."""

from __future__ import annotations

from typing import Any

import yaml

from lscollapse.core.outside import one_line, refuse_odd

LARGEST_YAML = 2**18  # bytes of a configuration, which is read slowly


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
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as cause:  # of what a tag or its look makes a date or a number
        why = one_line(str(cause)) if isinstance(cause, ValueError) else "see the YAML tags in it"
        raise error(f"{where} holds a date, a number or a tag that means nothing: {why}") from None
    refuse_odd(value, where, error)
    return value
