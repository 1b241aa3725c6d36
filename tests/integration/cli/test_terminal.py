"""What the terminal says where layers are missing, and no verdict, or a row is massive."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lscollapse.cli.terminal import model as of_model
from lscollapse.cli.terminal.paper import arms_table, last_layer_table
from lscollapse.cli.terminal.prepare import identity_table
from lscollapse.instrument.identity import LayerDifference
from tests.unit.reports.test_verdict import HEALTHY, LONG, NAMES, SINK, without, zero_rows

NAN = float("nan")


def test_identity_is_not_known_where_values_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    same = [LayerDifference(layer, "hooks", 0.0, 0.0) for layer in range(5)]
    assert identity_table(same)
    assert "identical within 1e-05" in capsys.readouterr().out
    gone = [d._replace(output=NAN, mu=NAN) if d.layer >= 3 else d for d in same]
    assert not identity_table(gone)
    said = capsys.readouterr().out
    assert said.startswith("not known whether it is identical: from layer 3 of 4 on values are missing")
    assert "NOT identical" not in said


def rows(lost: int) -> pd.DataFrame:
    """Two excerpts of three layers, 0.8 and 0.6 everywhere; the second lacks those from `lost` on."""
    table = pd.DataFrame(
        [{"layer": layer, "excerpt": e, "value": v} for layer in range(3) for e, v in enumerate((0.8, 0.6))]
    )
    gone = (table["layer"] >= lost) & (table["excerpt"] == 1)
    fixed = {"model": "net", "init": "trained", "arm": "LN", "lam": 1.0, "dtype": "float32", "measure": "relative_mu"}
    return table.assign(
        value=table["value"].mask(gone), status=np.where(gone, "overflow", "ok"), **fixed
    )  # fmt: skip


@pytest.mark.parametrize(("lost", "last"), [(3, "0.700"), (2, "missing"), (0, "missing")])
def test_no_mean_over_the_excerpts_that_are_left(
    lost: int, last: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    last_layer_table(rows(lost))
    assert capsys.readouterr().out.split()[-1] == last
    arms_table(rows(lost))
    cells = capsys.readouterr().out.split("\n")[-3].split()
    ends = ["none"] if lost == 3 else ["layer", str(lost)]
    assert cells[-len(ends) - 1 :] == [last, *ends]


def test_every_measure_of_a_massive_row_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = zero_rows(HEALTHY, LONG, SINK, HEALTHY, (0.8, 0.8, 3.0, NAN, NAN))
    of_model.show(rows, own_tokens=False)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("1 relative mu 0.900 0.800 4 0.800", "rank1 residual 0.800 0.050 1 0.800", "angular mu 0.850 0.200 2 undefined",
                 "angular rank1 residual 0.800 0.200 2 undefined", "row norm ratio 2.000 100.000 1 3.000"):  # fmt: skip
        assert line in shown
    assert shown[-1].startswith(
        "m, LN, lambda 1: falls under 0.5 and recovers: relative mu, angular where a row is massive,"
    )
    of_model.show(without(rows, *NAMES[2:], "longest_row"), own_tokens=False)
    shown_before = capsys.readouterr().out
    assert "angular" not in shown_before and "ratio" not in shown_before
