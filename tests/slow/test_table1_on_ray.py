"""Table 1 on Ray."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lscollapse.experiments.table1.grid import run
from lscollapse.experiments.table1.schema import Table1
from tests.integration.experiments.test_table1 import grid

__all__ = ["grid"]  # the fixture


def test_ray_gives_the_same_rows(grid: tuple[Table1, Path, pd.DataFrame], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config, whole, _ = grid
    run(config.model_copy(update={"engine": "ray", "workers": None}), tmp_path / "run")
    assert (whole / "rows.parquet").read_bytes() == (tmp_path / "run" / "rows.parquet").read_bytes()
