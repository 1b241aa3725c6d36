"""A verb in this process: its exit code, and what it wrote."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from lscollapse.cli import app


def run(arguments: Sequence[object]) -> tuple[int, str, str]:
    """`lscollapse ARGUMENTS`: exit code, and what it wrote to the one stream and the other."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    words = ["lscollapse", *map(str, arguments)]
    with patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code
    return int(str(code or 0)), out.getvalue(), err.getvalue()
