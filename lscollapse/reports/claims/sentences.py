"""The paper's sentences on Figures 1-4 judged on a table: each agrees, disagrees, or was not measured, with the numbers.

The sentences and their predicates are in `figures`; `table1` judges Table 1, `theory` the theorems, `runs` whole run
folders. docs/claims.md lists every sentence with its threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from lscollapse.reports.claims.curves import Curves, NotMeasured
from lscollapse.reports.claims.figures import CLAIMS
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, Finding

if TYPE_CHECKING:
    import pandas as pd

NEEDS_GATE = ("figure 1", "figure 3")


def judge(rows: pd.DataFrame) -> Iterator[Finding]:
    """Every claim for every model of a table (one skip_site and norm_site reading of it).

    Where an arm that a claim needs lacks layers it is not measured, and the numbers say what is missing and what was seen
    before. S4D is judged on Figure 4 only, a transformer on Figure 2 only.
    """
    for model in dict.fromkeys(rows["model"]):
        curves = Curves(rows[rows["model"] == model])
        for claim, (sentence, predicate, _) in CLAIMS.items():
            if curves.images != claim.startswith("figure 4") or (not curves.gated and claim.startswith(NEEDS_GATE)):
                continue
            try:
                holds, numbers = predicate(curves)
            except NotMeasured as missing:
                yield Finding(claim, sentence, model, NOT_MEASURED, str(missing))
            else:
                yield Finding(claim, sentence, model, AGREE if holds else DISAGREE, numbers)


def judge_readings(rows: pd.DataFrame) -> pd.DataFrame:
    """The claims on Figures 1 and 3 under every reading: columns model, skip_site, norm_site, claim, sentence, verdict, numbers.

    Of a reading (skip_site, norm_site), the arms with LayerNorm are those of its skip_site, whatever norm_site they carry.
    """
    import pandas as pd

    found = []
    without = rows[~rows["layernorm"].astype(bool)]
    for skip_site, norm_site in dict.fromkeys(zip(without["skip_site"], without["norm_site"], strict=True)):
        chosen = (rows["skip_site"] == skip_site) & (rows["layernorm"].astype(bool) | (rows["norm_site"] == norm_site))
        for finding in judge(rows[chosen]):
            if finding.claim.startswith(NEEDS_GATE):
                found.append({"skip_site": skip_site, "norm_site": norm_site, **asdict(finding)})
    return pd.DataFrame(found)
