"""Sentences of the paper as predicates on the table: each agrees, disagrees, or was not measured, with the numbers.

The predicates on Figures 1-4 and the thresholds are in claims_curves.py; claims_table1.py judges Table 1,
claims_theory.py the theorems, claims_runs.py whole run folders. docs/claims.md lists every sentence with its threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from lscollapse.core.table import COLLAPSED, RISE
from lscollapse.reports.claims import curves as on
from lscollapse.reports.claims.curves import MUCH, PAPER_A, PAPER_BOUND, SMALL, Curves, Judgement
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, Finding

if TYPE_CHECKING:
    import pandas as pd


class Claim(NamedTuple):
    """A sentence of the paper, the predicate that judges it, and in words what the predicate asks for."""

    sentence: str
    predicate: Callable[[Curves], Judgement]
    threshold: str


_UNGATED, _FULL, _AT_1 = "gate removed, with LayerNorm", "the whole model", "lambda = 1"
CLAIMS: dict[str, Claim] = {
    "figure 1a": Claim(
        "When |lambda| is small, the model suffers from rank collapse.", on.small_lambda_collapses,
        f"{_UNGATED}: last layer under {COLLAPSED} at every measured |lambda| up to {SMALL}",
    ),
    "figure 1b": Claim(
        "This happens even when lambda = 1.", on.lambda_one_collapses,
        f"{_UNGATED}, {_AT_1}: last layer under {COLLAPSED}",
    ),
    "figure 1c": Claim(
        "Sufficiently increasing or decreasing lambda avoids rank collapse.", on.large_lambda_avoids,
        f"{_UNGATED}: at the least and the greatest measured lambda, beyond -1 and 1, last layer at least {COLLAPSED} and"
        " above that at 1",
    ),
    "figure 1d": Claim(
        "Eliminating the skip can cause rank collapse where A_t depends on the input too (lambda = 0).",
        on.without_skip_collapses, f"{_UNGATED}, lambda = 0: last layer under {COLLAPSED}",
    ),
    "figure 2a": Claim(
        "Lambda very close to 0 causes a very low mu, even with LayerNorm.", on.deep_minimum_near_zero,
        f"{_FULL}, three lambdas or more and 0 among them: the lowest last layer is at |lambda| up to {SMALL} and under"
        f" {COLLAPSED}",
    ),
    "figure 2b": Claim(
        "A negative lambda leads to a higher mu.", on.negative_is_higher,
        f"{_FULL}: last layer higher at -lambda than at lambda, for every lambda measured with both signs",
    ),
    "figure 2c": Claim(
        "The correct value of lambda is important to avoid rank collapse.", on.choice_of_lambda_decides,
        f"{_FULL}, lambdas as for 2a: the lowest last layer is under {COLLAPSED}, the highest is not",
    ),
    "figure 2d": Claim(
        "Condition (7) is too conservative: much lower values of lambda prevent rank collapse.",
        on.much_lower_lambda_suffices,
        f"{_FULL}, lambdas as for 2a: the least |lambda| > 0 that ends at {COLLAPSED} or more is at most {MUCH} of condition (7) at a ="
        f" {PAPER_A}: {PAPER_BOUND} for Mamba-2 as printed, with C_M = sqrt(N) for attention",
    ),
    "figure 3a": Claim(
        "With gating and LayerNorm there is no rank collapse.", on.full_model_does_not_collapse,
        f"{_FULL}, {_AT_1}: every layer at least {COLLAPSED}",
    ),
    "figure 3b": Claim(
        "Without gating, with LayerNorm, mu approaches zero in later layers.", on.ungated_falls,
        f"{_AT_1}: last layer under {COLLAPSED}, and the mean of the later half no higher than that of the early half",
    ),
    "figure 3c": Claim(
        "Without either, an initial drop, then a dramatic increase.", on.ungated_unnormed_drops_then_rises,
        f"{_AT_1}: from the first layer down by at least {RISE}, and from there up by at least {RISE}",
    ),
    "figure 3d": Claim(
        "With gating, without LayerNorm, a sudden increase.", on.gated_unnormed_rises,
        f"{_AT_1}: some layer at least {RISE} above the lowest before it",
    ),
    "figure 3e": Claim(
        "With gating, without LayerNorm, rank collapse is prevented.", on.gated_unnormed_does_not_collapse,
        f"{_AT_1}: every layer at least {COLLAPSED}",
    ),
    "figure 3f": Claim(
        "LayerNorm keeps the model stable.", on.layernorm_keeps_stable,
        f"{_AT_1}: both arms without LayerNorm leave the range of floating point or rise by at least {RISE}, neither arm with"
        " it does",
    ),
    "figure 3g": Claim(
        "Gating mechanisms play a crucial role in preventing rank collapse.", on.gate_prevents_collapse,
        f"{_AT_1}, with LayerNorm: last layer at least {COLLAPSED} with the gate, under it without",
    ),
    "figure 4": Claim(
        "In S4D no rank collapse, even without skip connection and LayerNorm.", on.s4d_does_not_collapse,
        f"skip x LayerNorm: in all four arms every layer from the first block on at least {COLLAPSED}",
    ),
    "figure 4b": Claim(
        "In S4D rank collapse depends on the weights only, not on the input.", on.s4d_collapse_is_the_weights,
        f"skip x LayerNorm: in each arm the last layer of all images is under {COLLAPSED}, or of none. Only of the images at"
        " hand: adversarial ones are not searched for",
    ),
}  # fmt: skip
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
                result = predicate(curves)
            except on.MissingLayers as missing:
                yield Finding(claim, sentence, model, NOT_MEASURED, str(missing))
                continue
            if result is None:
                yield Finding(claim, sentence, model, NOT_MEASURED, "")
            else:
                yield Finding(claim, sentence, model, AGREE if result[0] else DISAGREE, result[1])


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
