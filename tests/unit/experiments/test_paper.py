"""Files of per-layer lambdas: by the number of the line that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lscollapse.core.config import ConfigError
from lscollapse.experiments.paper import read_lambdas


def read(folder: Path, *lines: str, n_layers: int = 2) -> tuple[float, ...]:
    (folder / "lams.csv").write_text("\n".join(lines), encoding="utf-8")
    return read_lambdas(folder / "lams.csv", n_layers)


def test_lines_in_any_order_with_other_columns(tmp_path: Path) -> None:
    assert read(tmp_path, "layer,lam,note", "3,0.5,", '1,-1,"a, b"', "", "2,2e0,", n_layers=3) == (-1.0, 2.0, 0.5)
    assert read(tmp_path, "lam,layer", "1e300,1", "-0.0,2") == (1e300, 0.0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["layer;lam", "1;2"], "is not a CSV with the columns layer,lam: it has no lam and no layer"),
        (["layer", "1", "2"], "it has no lam"),
        ([], "it has no lam and no layer"),
        (["layer,lam"], "gives 0 lambdas, expected one line for each layer of 1..2: see layer 1"),
        (["layer,lam", "1,2"], "see layer 2"),
        (["layer,lam", "1,2", "2,1", "3,1"], "see layer 3"),
        (["layer,lam", "1,2", "2,1", "2,1"], "see layer 2"),
        (["layer,lam", "1,nan", "2,1"], "line 2: lam: input should be a finite number, got 'nan'"),
        (["layer,lam", "1,1", "2,1e400"], "line 3: lam: input should be a finite number, got '1e400'"),
        (["layer,lam", "1,two", "2,1"], "line 2: lam: input should be a valid number"),
        (["layer,lam", "1", "2,1"], "line 2: lam: input should be a valid number"),
        (["layer,lam", "1.5,1", "2,1"], "line 2: layer: input should be a valid integer"),
        (["layer,lam", "0,1", "2,1"], "line 2: layer: input should be greater than or equal to 1"),
        (["layer,lam", "99999999999999999999,1"], "line 2: layer: input should be less than or equal to 1000"),
        (["layer,lam", "a,b"], "line 2: layer: input should be a valid integer"),
        (["layer,lam", '1,"1'], "is not a CSV"),
        (["layer,lam", "1,\x1b[31m"], r"got '\x1b[31m'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_files_that_give_no_lambdas(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *lines)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "lams.csv"))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.csv cannot be read: there is no such file"):
        read_lambdas(tmp_path / "nothing.csv", 3)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ConfigError, match=r"pipe\.csv cannot be read: it is a "):
        read_lambdas(tmp_path / "pipe.csv", 3)
