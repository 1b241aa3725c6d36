"""The paper's sentences judged on curves that say what they say, on real runs, and on the embedded ones against the README."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lscollapse.cli import results
from lscollapse.cli.paper import figures
from lscollapse.cli.terminal.paper import claims_table
from lscollapse.cli.terminal.results import show_claims
from lscollapse.core.config import Experiment
from lscollapse.core.manifest import RunFolderError
from lscollapse.experiments import paper
from lscollapse.reports.claims import sentences, table1, theory
from lscollapse.reports.claims.figures import CLAIMS
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED
from lscollapse.theory import verify
from tests import ROOT
from tests.equivalence import tiny

NAN = float("nan")
Arm = tuple[float, bool | None, bool]  # lambda, gating, layernorm
HIGH, LOW, FALLING = [0.9, 0.9, 0.9, 0.9], [0.9, 0.4, 0.3, 0.2], [0.9, 0.8, 0.3, 0.1]
DIP, RISING = [0.9, 0.2, 0.7, NAN], [0.6, 0.6, 0.9, 0.9]


def table(arms: dict[Arm, Sequence[float]], model: str = "net", **columns: Any) -> pd.DataFrame:
    """Rows of one excerpt for curves given layer by layer."""
    parts = [
        pd.DataFrame({"layer": range(len(curve)), "value": curve}).assign(lam=lam, gating=gating, layernorm=layernorm)
        for (lam, gating, layernorm), curve in arms.items()
    ]
    fixed = {
        "model": model,
        "init": "trained",
        "measure": "relative_mu",
        "tokenizer": "bert",
        "dtype": "float32",
        "n_tokens": 128,
        "excerpt": 0,
    }
    rows = pd.concat(parts, ignore_index=True).assign(**{**fixed, **columns})
    rows["status"] = rows["value"].isna().map({True: "overflow", False: "ok"})
    return rows.astype({"gating": "boolean"})


def ends(lasts: dict[float, float], gating: bool | None) -> dict[Arm, Sequence[float]]:
    return {(lam, gating, True): [0.9, last] for lam, last in lasts.items()}


def at_1(
    full: list[float], ungated: list[float], neither: list[float], gated: list[float]
) -> dict[Arm, Sequence[float]]:
    return {
        (1.0, True, True): full,
        (1.0, False, True): ungated,
        (1.0, False, False): neither,
        (1.0, True, False): gated,
    }


def verdict(rows: pd.DataFrame, claim: str) -> tuple[str, str]:
    (found,) = (finding for finding in sentences.judge(rows) if finding.claim == claim)
    assert found.verdict == NOT_MEASURED or found.numbers
    return found.verdict, found.numbers


FIGURE1 = {-4.0: 0.8, -0.5: 0.3, 0.0: 0.1, 0.5: 0.2, 1.0: 0.3, 4.0: 0.7}
FIGURE2 = {-2.0: 0.9, -1.0: 0.8, 0.0: 0.01, 1.0: 0.7, 2.0: 0.8}
PAPER_FIGURE3 = at_1(HIGH, FALLING, DIP, RISING)


@pytest.mark.parametrize(
    ("claim", "arms", "expected", "number"),
    [
        ("figure 1a", ends(FIGURE1, False), AGREE, "-0.5: 0.300"),
        ("figure 1a", ends({**FIGURE1, 0.5: 0.6}, False), DISAGREE, "0.5: 0.600"),
        ("figure 1a", ends({1.0: 0.1, 2.0: 0.1}, False), NOT_MEASURED, ""),
        ("figure 1b", ends(FIGURE1, False), AGREE, "0.300"),
        ("figure 1b", ends({1.0: 0.5}, False), DISAGREE, "0.500"),
        ("figure 1c", ends(FIGURE1, False), AGREE, "-4: 0.800"),
        ("figure 1c", ends({**FIGURE1, -4.0: 0.45}, False), DISAGREE, "-4: 0.450"),
        ("figure 1c", ends({**FIGURE1, 1.0: 0.75}, False), DISAGREE, "at 1: 0.750"),
        ("figure 1c", ends({-1.0: 0.8, 1.0: 0.3}, False), NOT_MEASURED, ""),
        ("figure 1d", ends(FIGURE1, False), AGREE, "0.100"),
        ("figure 1d", ends({0.0: 0.7}, False), DISAGREE, "0.700"),
        ("figure 1d", ends({1.0: 0.1}, False), NOT_MEASURED, ""),
        ("figure 2a", ends(FIGURE2, None), AGREE, "0.010"),
        ("figure 2a", ends({**FIGURE2, 0.0: 0.6}, None), DISAGREE, "0.600"),
        ("figure 2a", ends({**FIGURE2, 2.0: 0.001}, None), DISAGREE, "lambda 2"),
        ("figure 2b", ends(FIGURE2, None), AGREE, "0.900/0.800"),
        ("figure 2b", ends({**FIGURE2, -1.0: 0.6}, None), DISAGREE, "0.600/0.700"),
        ("figure 2b", ends({0.0: 0.1, 1.0: 0.9}, None), NOT_MEASURED, ""),
        ("figure 2c", ends(FIGURE2, None), AGREE, "0: 0.010, -2: 0.900"),
        ("figure 2c", ends(dict.fromkeys(FIGURE2, 0.9), None), DISAGREE, "0.900"),
        ("figure 2c", ends(dict.fromkeys(FIGURE2, 0.1), None), DISAGREE, "0.100"),
        ("figure 2d", ends(FIGURE2, True), AGREE, "> 937.924"),
        # attention of 128 tokens: C_M = sqrt(128) and the fraction after Theorem 4.1 at a = 0.9, c = S = 1
        ("figure 2d", ends(FIGURE2, None), AGREE, f"> {128**0.5 * (0.9 + 0.9**0.5) / (1 - 0.9):.3f}"),
        ("figure 2d", ends({0.0: 0.1, 1.0: 0.1, 90.0: 0.6, 95.0: 0.9}, True), AGREE, "at 90"),
        ("figure 2d", ends({0.0: 0.1, 1.0: 0.1, -95.0: 0.9}, True), DISAGREE, "at -95"),
        ("figure 2d", ends({0.0: 0.9, 1.0: 0.1, 2.0: 0.1}, True), DISAGREE, "no measured lambda"),
        ("figure 3a", PAPER_FIGURE3, AGREE, "0.900"),
        ("figure 3a", at_1([0.9, 0.4, 0.9], LOW, DIP, HIGH), DISAGREE, "lowest 0.400"),
        ("figure 3b", PAPER_FIGURE3, AGREE, "last 0.100"),
        ("figure 3b", at_1(HIGH, [0.9, 0.1, 0.6, 0.6], DIP, HIGH), DISAGREE, "last 0.600"),
        ("figure 3c", at_1(HIGH, LOW, [0.9, 0.2, 0.7, 0.8], HIGH), AGREE, "lowest 0.200 (layer 1), then up to 0.800"),
        ("figure 3c", PAPER_FIGURE3, NOT_MEASURED, "no gate, no LN, lambda 1: layers 3 to 3 are missing"),
        ("figure 3c", at_1(HIGH, LOW, FALLING, HIGH), DISAGREE, "then up to 0.100"),
        ("figure 3d", PAPER_FIGURE3, AGREE, "greatest gain 0.300"),
        ("figure 3d", at_1(HIGH, LOW, DIP, HIGH), DISAGREE, "greatest gain 0.000"),
        ("figure 3e", PAPER_FIGURE3, AGREE, "0.600"),
        ("figure 3e", at_1(HIGH, LOW, DIP, LOW), DISAGREE, "0.200"),
        ("figure 3f", PAPER_FIGURE3, AGREE, "no gate, no LN: overflow at layer 3"),
        ("figure 3f", at_1(HIGH, LOW, DIP, HIGH), DISAGREE, "gate, no LN: none lost"),
        ("figure 3f", at_1([0.9, 0.9, NAN], LOW, DIP, RISING), DISAGREE, "gate, LN: overflow at layer 2"),
        ("figure 3g", PAPER_FIGURE3, AGREE, "0.900 with the gate, 0.100 without"),
        ("figure 3g", at_1(HIGH, HIGH, DIP, HIGH), DISAGREE, "0.900 without"),
        ("figure 3g", ends({1.0: 0.9}, True), NOT_MEASURED, ""),
    ],
)  # fmt: skip
def test_figures_1_to_3(claim: str, arms: dict[Arm, Sequence[float]], expected: str, number: str) -> None:
    found, numbers = verdict(table(arms), claim)
    assert found == expected
    assert number in numbers


FULL, UNGATED = (True, True), (False, True)  # gate, LayerNorm
GONE = [0.9, 0.2, NAN]  # the last of two layers is missing


@pytest.mark.parametrize(
    ("names", "arms", "missing"),
    [
        (("1a", "1b", "1c", "1d"), {(lam, *UNGATED): GONE for lam in FIGURE1}, "no gate, LN, lambda "),
        (("2a", "2b", "2c", "2d"), {(lam, *FULL): GONE for lam in FIGURE2}, "gate, LN, lambda "),
        (("2a", "2b", "2c", "2d"), {(lam, *FULL): GONE if lam == 2.0 else HIGH for lam in FIGURE2}, "gate, LN, lambda 2: "),
        (("3a", "3b", "3c", "3d", "3e", "3g"), at_1(GONE, GONE, GONE, GONE), "LN, lambda 1: "),
    ],
)  # fmt: skip
def test_nothing_is_said_where_layers_are_missing(names: tuple[str, ...], arms: dict[Arm, Any], missing: str) -> None:
    """Under 0.5 or over it, what is held of a curve is no verdict; the numbers say which layers of which arm are not there."""
    for claim in names:
        found, numbers = verdict(table(arms), f"figure {claim}")
        assert found == NOT_MEASURED, claim
        assert missing in numbers and "layers 2 to 2 are missing, where 1 of 1 excerpts leave" in numbers
    s4d = {(lam, None, norm): GONE for lam in (0.0, 1.0) for norm in (True, False)}
    for claim in ("figure 4", "figure 4b"):
        found, numbers = verdict(table(s4d, tokenizer="pixels"), claim)
        assert found == NOT_MEASURED and "layers 2 to 2 are missing" in numbers


def unresolved(arms: dict[Arm, Sequence[float]], arm: Arm, *layers: int, **columns: Any) -> pd.DataFrame:
    """The rows with one excerpt of two unresolved at these layers of an arm; its numbers are there, and would decide."""
    rows = pd.concat([table(arms, excerpt=n, **columns) for n in (0, 1)], ignore_index=True)
    lam, gating, layernorm = arm
    gate = rows["gating"].isna() if gating is None else rows["gating"].eq(gating)
    bad = (
        gate
        & rows["lam"].eq(lam)
        & rows["layernorm"].eq(layernorm)
        & rows["layer"].isin(layers)
        & rows["excerpt"].eq(1)
    )
    assert bad.sum() == len(layers)
    rows.loc[bad, ["value", "status"]] = [0.7, "unresolved"]
    return rows


@pytest.mark.parametrize(
    ("arms", "arm", "layers", "silenced"),
    [
        (ends(FIGURE1, False), (0.5, *UNGATED), (1,), "1a"),
        (ends(FIGURE1, False), (1.0, *UNGATED), (1,), "1b 1c 3b"),
        (ends(FIGURE1, False), (0.0, *UNGATED), (1,), "1a 1d"),
        (ends(FIGURE1, False), (-4.0, *UNGATED), (1,), "1c"),
        ({(lam, *FULL): [0.9, last] for lam, last in FIGURE2.items()}, (2.0, *FULL), (1,), "2a 2b 2c 2d"),
        # 3b needs the whole curve, 1b and 3g its end
        (at_1(HIGH, FALLING, LOW, RISING), (1.0, *UNGATED), (1, 2), "3b 3f"),
        (at_1(HIGH, FALLING, LOW, RISING), (1.0, *UNGATED), (3,), "1b 3b 3f 3g"),
        (at_1(HIGH, FALLING, LOW, RISING), (1.0, *FULL), (2,), "3a 3f"),
        (at_1(HIGH, FALLING, LOW, RISING), (1.0, False, False), (1,), "3c 3f"),
        (at_1(HIGH, FALLING, LOW, RISING), (1.0, True, False), (2,), "3d 3e 3f"),
    ],
)  # fmt: skip
def test_a_claim_that_rests_on_an_unresolved_layer_is_not_measured(
    arms: dict[Arm, Sequence[float]], arm: Arm, layers: tuple[int, ...], silenced: str
) -> None:
    rows = unresolved(arms, arm, *layers)
    before, after = ({f.claim: f for f in sentences.judge(each)} for each in (table(arms), rows))
    changed = {name for name in after if before[name].verdict != NOT_MEASURED and after[name].verdict == NOT_MEASURED}
    assert changed == {f"figure {name}" for name in silenced.split()}
    which = f"layers {layers[0]} to {layers[-1]} are" if len(layers) > 1 else f"layer {layers[0]} is"
    for name in changed:
        numbers = after[name].numbers
        assert f"LN, lambda {arm[0]:g}: {which} unresolved: rounding in float32 decides" in numbers
        assert numbers.endswith("run with --dtype float64") and "0.700" not in numbers


def test_what_not_even_float64_resolves() -> None:
    rows = unresolved(PAPER_FIGURE3, (1.0, *FULL), 1, 3, dtype="float64")
    assert verdict(rows, "figure 3a") == (
        NOT_MEASURED, "gate, LN, lambda 1: layers 1 and 3 are unresolved: not even float64 resolves them"
    )  # fmt: skip


def test_s4d_of_which_a_layer_is_unresolved() -> None:
    arms: dict[Arm, Sequence[float]] = {
        (lam, None, norm): [0.9, 0.8, 0.8] for lam in (0.0, 1.0) for norm in (True, False)
    }
    for layer, silenced in ((1, {"figure 4"}), (2, {"figure 4", "figure 4b"})):
        found = sentences.judge(unresolved(arms, (0.0, None, False), layer, tokenizer="pixels"))
        assert {finding.claim for finding in found if finding.verdict == NOT_MEASURED} == silenced


def test_one_lambda_that_is_missing_leaves_the_others() -> None:
    rows = table({**ends(FIGURE1, False), (4.0, False, True): [0.9, NAN]})
    assert verdict(rows, "figure 1a")[0] == AGREE and verdict(rows, "figure 1b")[0] == AGREE
    assert verdict(rows, "figure 1c")[0] == NOT_MEASURED


def test_undefined_values_are_no_instability() -> None:
    """3f is about leaving the range; a layer of zeros leaves nothing."""
    rows = table(PAPER_FIGURE3)
    zero = rows.assign(status=rows["status"].replace("overflow", "nan"))
    assert verdict(rows, "figure 3f")[0] == AGREE
    assert verdict(zero, "figure 3f")[0] == NOT_MEASURED


def test_whether_s4d_collapses_for_all_images_or_for_some() -> None:
    arms: dict[Arm, Sequence[float]] = {(lam, None, norm): [0.9, 0.8] for lam in (0.0, 1.0) for norm in (True, False)}
    some = pd.concat([table(arms, tokenizer="pixels", excerpt=n) for n in (0, 1)])
    assert verdict(some, "figure 4b")[0] == AGREE
    neither = (some["lam"] == 0.0) & ~some["layernorm"] & (some["layer"] == 1)
    every = some.assign(value=some["value"].mask(neither, 0.1))
    assert verdict(every, "figure 4b") == (
        AGREE, "images that end under 0.5: skip + LN: 0 of 2, no skip + LN: 0 of 2, skip: 0 of 2, neither: 2 of 2"
    )  # fmt: skip
    one = some.assign(value=some["value"].mask(neither & (some["excerpt"] == 1), 0.1))
    assert verdict(one, "figure 4b")[0] == DISAGREE
    assert {finding.claim for finding in sentences.judge(one)} == {"figure 4", "figure 4b"}


# --- Table 1 -----------------------------------------------------------------------------------


def trained(learnt: Sequence[float], fixed: Sequence[float]) -> pd.DataFrame:
    lines = [
        {"task": "mqar", "mixer": "mamba", "lam": lam, "seed": seed, "measure": "test_accuracy", "value": value}
        for lam, values in (("learnt from -1", learnt), ("1", fixed))
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    ("learnt", "fixed", "first", "second"),
    [
        ([0.90, 0.91, 0.92], [0.90, 0.91, 0.92], AGREE, NOT_MEASURED),
        ([0.95, 0.96, 0.97], [0.80, 0.81, 0.82], AGREE, AGREE),
        ([0.80, 0.81, 0.82], [0.95, 0.96, 0.97], DISAGREE, NOT_MEASURED),
        ([0.5, 0.9, 0.7], [0.9, 0.5, 0.7], NOT_MEASURED, NOT_MEASURED),
        ([0.853], [0.815], NOT_MEASURED, NOT_MEASURED),  # the paper's own: one run each
    ],
)
def test_table1(learnt: Sequence[float], fixed: Sequence[float], first: str, second: str) -> None:
    found = {finding.claim: finding for finding in table1.findings(trained(learnt, fixed))}
    assert (found["table 1a"].verdict, found["table 1b"].verdict) == (first, second)
    points = 100 * (sum(learnt) / len(learnt) - sum(fixed) / len(fixed))
    assert f"MQAR Mamba, learnt from -1: {points:+.1f}" in found["table 1a"].numbers


def test_table1_of_several_mixers_is_judged_mixer_by_mixer() -> None:
    """Their average, which the `table1` verb adds, is no case of its own."""
    one = trained([0.9, 0.91, 0.9], [0.9, 0.91, 0.9])
    found = list(table1.findings(pd.concat([one, one.assign(mixer="attention")])))
    assert [finding.claim for finding in found] == ["table 1a", "table 1b"]
    assert found[0].model == "MQAR" and found[0].numbers.startswith("of 2: 2 no worse")


def test_table1_without_a_pair_of_arms() -> None:
    rows = trained([0.9, 0.9], [])
    assert [finding.verdict for finding in table1.findings(rows)] == [NOT_MEASURED, NOT_MEASURED]


# --- theory ------------------------------------------------------------------------------------


def test_statements_of_the_theory(tmp_path: Path) -> None:
    verdicts = verify.run(20, 1)
    (tmp_path / "verify.json").write_text(verify.to_json(verdicts), encoding="utf-8")
    found = {finding.sentence: finding for finding in theory.verified(tmp_path)}
    words = {"holds": AGREE, "fails": DISAGREE, "void": NOT_MEASURED, "existence only": NOT_MEASURED}
    for v in verdicts:
        assert (v.statement in found) == (v.printed not in ("new", "definition"))
        if v.statement in found:
            assert found[v.statement].verdict == words[v.printed]
            assert v.printed_evidence in found[v.statement].numbers
    assert found["Theorem 4.1, lam < 0"].verdict == DISAGREE


def test_an_adversarial_input_of_an_lti_net() -> None:
    """The recurrence in integers, layer by layer: the rows are apart until the last layer, and equal there."""
    K = theory.DEPTH
    first, second = 1, 1 - 2 * K
    for _ in range(K):
        assert first != second
        first, second = first, 2 * first + second
    assert first == second == 1
    finding = theory.adversarial_input()
    assert finding.verdict == DISAGREE
    assert f"mu {abs(2 * K) / 2**0.5:.3f} -> 0.000" in finding.numbers  # of rows 1 and 1 - 2K


@pytest.mark.parametrize(
    ("measured", "expected", "number"),
    [
        (["30,inf", "inf,inf"], AGREE, "from 30 on"),
        (["60,inf", "51,inf"], DISAGREE, "from 51 on"),
        (["inf,inf", "inf,inf"], DISAGREE, "no measured"),
        (["inf,inf", "0.68,2.46"], AGREE, "from 0.68 to 2.46 keeps"),
        (["0.1,0.2", "30,inf"], AGREE, "from 30 on"),
    ],
)
def test_condition_7_with_the_models_own_constants(
    tmp_path: Path, measured: list[Any], expected: str, number: str
) -> None:
    lines = ['"Theorem 4.1, condition (7) alone, a = 0.9",0,500,inf,500,b']
    lines += [f'"measured, relative mu",{sign},{ends},x,' for sign, ends in zip((1, -1), measured, strict=True)]
    folder = tmp_path / "bound-net"
    folder.mkdir()
    (folder / "bounds.csv").write_text("\n".join(["bound,sign,lam,to,reads,note", *lines]), encoding="utf-8")
    (finding,) = theory.bounded(folder)
    assert (finding.claim, finding.model, finding.verdict) == ("figure 2d", "net", expected)
    assert number in finding.numbers


def test_a_bound_beside_a_lambda_that_is_not_known(tmp_path: Path) -> None:
    """As `theory bound` writes a measured lambda above which last layers are missing."""
    lines = ["\"Theorem 4.1, condition (7)\",0,900,900,", "\"measured, relative mu\",1,,\"not known, values are missing\",",
             "\"measured, relative mu\",-1,2,2,"]  # fmt: skip
    (tmp_path / "bounds.csv").write_text("\n".join(["bound,sign,lam,reads,note", *lines]), encoding="utf-8")
    (finding,) = theory.bounded(tmp_path)
    assert finding.verdict == NOT_MEASURED and "last layer of some lambda is missing" in finding.numbers


@pytest.mark.parametrize(
    ("sizes", "expected", "number"),
    [([0.5, 0.9, 0.2, 1.0], AGREE, "1 of 2 layers meet it; largest ||M||_F of a layer 0.9 to 1"),
     ([0.5, 0.9, 0.2, 0.99], DISAGREE, "2 of 2 layers")],
)  # fmt: skip
def test_norms_of_an_s4d(tmp_path: Path, sizes: list[float], expected: str, number: str) -> None:
    lines = [f"{n // 2 + 1},{n % 2},{size}" for n, size in enumerate(sizes)]
    (tmp_path / "channels.csv").write_text("\n".join(["layer,channel,C_M", *lines]), encoding="utf-8")
    (finding,) = theory.bounded(tmp_path)
    assert (finding.claim, finding.verdict) == ("figure 4c", expected) and finding.numbers.startswith(number)


@pytest.mark.parametrize("file", ["verify.json", "bounds.csv"])
@pytest.mark.parametrize("text", ["", "[{}]", "bound,lam\nother,1\n", "\x00"])
def test_damaged_files_of_the_theory(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"theory (verify|bound)") as caught:
        sentences.judged([tmp_path])
    assert "\n" not in str(caught.value)


# --- massive rows ------------------------------------------------------------------------------


def long_row(rows: pd.DataFrame, lam: float, ratio: float, *layers: int, angular: float = 0.4) -> pd.DataFrame:
    """The same with the ratio, position and angular mu of the arms at `lam`: row 0 is long at `layers`."""
    own = rows[(rows["measure"] == "relative_mu") & (rows["lam"] == lam)]
    values = {
        "row_norm_ratio": own["layer"].isin(layers) * (ratio - 2.0) + 2.0,
        "longest_row": 0.0,
        "angular_mu": angular,
    }
    more = [own.assign(measure=name, value=value) for name, value in values.items()]
    return pd.concat([rows, *more], ignore_index=True)


SWEPT = table(ends(FIGURE2, None))
LONG_SWEEP = long_row(long_row(long_row(SWEPT, 1.0, 40.4, 1), 2.0, 170.4, 0, 1, angular=0.45), -1.0, 9.9, 1)
NOTE = (
    "LN, lambda 1, 2: token 0 has up to 170 times the median row norm at layers 0 to 1, which decides relative mu there;"
    " angular mu of the last layer 1: 0.400, 2: 0.450"
)


def notes(rows: pd.DataFrame) -> dict[str, str]:
    return {finding.claim: finding.note for finding in sentences.judge(rows)}


def test_a_claim_notes_where_a_row_is_massive_in_what_it_used() -> None:
    assert notes(LONG_SWEEP) == {f"figure 2{letter}": NOTE for letter in "abcd"}
    verdicts = [[(f.verdict, f.numbers) for f in sentences.judge(rows)] for rows in (LONG_SWEEP, SWEPT)]
    assert verdicts[0] == verdicts[1]  # claims are on the paper's measure
    assert set(notes(SWEPT).values()) == {""}


def test_a_note_is_on_the_arms_that_were_used_only() -> None:
    rows = long_row(table(PAPER_FIGURE3), 1.0, 30.0, 2)
    rows = rows[(rows["measure"] == "relative_mu") | rows["gating"] & rows["layernorm"]]
    said = "gate, LN, lambda 1: token 0 has 30 times the median row norm at layer 2, which decides relative mu there; angular mu"
    found = notes(rows)
    assert {claim for claim, note in found.items() if note} == {"figure 3a", "figure 3f", "figure 3g"}
    assert found["figure 3a"] == f"{said} of the last layer 0.400"
    lacking = notes(rows[rows["measure"] != "angular_mu"])
    assert lacking["figure 3g"] == f"{said} is not in this table: measure it again"
    unresolved = rows.assign(status=rows["status"].mask(rows["measure"] == "angular_mu", "unresolved"))
    assert notes(unresolved)["figure 3g"] == f"{said} of the last layer not known"


def test_notes_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = LONG_SWEEP
    found = sentences.noted(pd.DataFrame([{"run": "r", "reading": "", **asdict(f)} for f in sentences.judge(rows)]))
    for form in ("csv", "markdown", "json"):
        show_claims(found, form)
        assert capsys.readouterr().out.count(NOTE) == 4
    show_claims(found, "text")
    said = capsys.readouterr().out
    assert f"note on figure 2a, figure 2b, figure 2c, figure 2d: net, {NOTE}\n" in said and said.count(NOTE) == 1
    claims_table(rows)
    assert f"note on figure 2a, figure 2b, figure 2c, figure 2d: net, {NOTE}\n" in capsys.readouterr().out
    plain = sentences.noted(pd.DataFrame([asdict(f) for f in sentences.judge(SWEPT)]))
    assert "note" not in plain and sentences.footnotes(plain) == []


# --- run folders -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A sweep, an ablation and all readings of a tiny Mamba-2, and a sweep of a tiny BERT."""
    base = tmp_path_factory.mktemp("runs")
    tiny.mamba2(1, 2).save_pretrained(base / "mamba")
    tiny.bert(2).save_pretrained(base / "bert")
    ids = tiny.ids(2, 6).tolist()
    lines = [
        json.dumps({"title": f"T{n}", "text_sha256": "0" * 64, "tokenizer": "t", "source": "s", "ids": row})
        for n, row in enumerate(ids)
    ]
    (base / "excerpts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    common = {
        "lambdas": [-2, 0, 1, 2],
        "excerpts": 2,
        "tokens": 6,
        "source": str(base / "excerpts.jsonl"),
        "offline": True,
    }
    mamba = Experiment(models=[str(base / "mamba")], **common)
    folders = [base / name for name in ("sweep", "ablation", "readings", "bert-sweep")]
    paper.sweep_lambda(mamba, folders[0])
    paper.ablate_gating(mamba, folders[1])
    paper.all_readings(mamba, folders[2])
    paper.sweep_lambda(Experiment(models=[str(base / "bert")], **common), folders[3])
    return folders


def test_every_sentence_gets_a_line(runs: list[Path]) -> None:
    found = sentences.judged(runs[:2])
    assert list(dict.fromkeys(found["claim"])) == list(sentences.catalogue())
    about = found[found["model"] == "mamba"]
    assert set(about["claim"]) == {name for name in CLAIMS if not name.startswith("figure 4")}
    assert not (about["verdict"] == NOT_MEASURED).any()  # what one run lacks the other has
    rest = found[found["model"] != "mamba"]
    assert set(rest["verdict"]) == {NOT_MEASURED} and set(rest["model"]) == {""}


def test_findings_are_those_of_the_tables(runs: list[Path]) -> None:
    for run, part in sentences.judged(runs[:1]).query("run != ''").groupby("run"):
        own = {
            f.claim: (f.verdict, f.numbers) for f in sentences.judge(pd.read_parquet(Path(str(run)) / "rows.parquet"))
        }
        assert {row.claim: (row.verdict, row.numbers) for row in part.itertuples()} == own


def test_the_default_reading_is_not_told_twice(runs: list[Path]) -> None:
    found = sentences.judged([runs[0], runs[2]])
    said = found[found["model"] == "mamba"]
    assert not said.duplicated(["claim", "verdict", "numbers", "reading"]).any()
    of_1b = said[said["claim"] == "figure 1b"]
    assert list(of_1b["reading"]) == ["", "mixer skip"]  # the norm that is removed does not matter with LayerNorm
    of_3d = said[said["claim"] == "figure 3d"]
    assert "residual skip, LN=False removes mixer" in set(of_3d["reading"])


def test_a_transformer_is_judged_on_figure_2_only(runs: list[Path]) -> None:
    found = sentences.judged(runs[3:])
    assert set(found.loc[found["model"] == "bert", "claim"]) == {"figure 2a", "figure 2b", "figure 2c", "figure 2d"}


def test_the_verdicts_on_readings_are_a_file_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    """Beside the figure's numbers, not under their name; sentences 1b and 1d judged here by hand from the table."""
    for folder in (runs[2], tmp_path):
        figures([runs[2]], to=folder)
        verdicts, points = (pd.read_csv(folder / name) for name in ("readings-verdicts.csv", "readings.csv"))
        assert {"claim", "verdict", "skip_site", "norm_site"} <= set(verdicts) and {"mean", "layer"} <= set(points)
        assert "verdict" not in points and "layer" not in verdicts
    rows = pd.read_parquet(runs[2] / "rows.parquet")
    last = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == 2) & ~rows["gating"] & rows["layernorm"]]
    for claim, lam in (("figure 1b", 1.0), ("figure 1d", 0.0)):
        own = verdicts[verdicts["claim"] == claim]
        assert len(own) == len(own[["skip_site", "norm_site"]].drop_duplicates()) > 2
        for line in own.itertuples():
            value = last.loc[(last["lam"] == lam) & (last["skip_site"] == line.skip_site), "value"].mean()
            assert line.verdict == (AGREE if value < 0.5 else DISAGREE), (claim, line.skip_site)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="finished run"):
        sentences.judged([tmp_path])


# --- the verb ----------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> str:
    capsys.readouterr()
    results.claims(*arguments, **options)
    return capsys.readouterr().out


def test_all_formats_say_the_same(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    expected = sentences.judged(runs[1:2]).to_dict("records")
    assert json.loads(printed(capsys, runs[1:2], form="json")) == expected
    assert list(csv.DictReader(io.StringIO(printed(capsys, runs[1:2], form="csv")))) == expected
    lines = printed(capsys, runs[1:2], form="markdown").splitlines()
    assert len(lines) == len(expected) + 2
    assert all(re.split(r"(?<!\\)\|", line)[1:3] for line in lines)
    text = printed(capsys, runs[1:2])
    for row in expected:
        assert row["sentence"] in text and row["numbers"] in text


def test_the_list_of_sentences_is_the_documented_one(capsys: pytest.CaptureFixture[str]) -> None:
    documented = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert printed(capsys, form="markdown") in documented
    text = printed(capsys)
    assert all(sentence in text and threshold in text for sentence, threshold in sentences.catalogue().values())


# --- the embedded runs and the README ------------------------------------------------------------


WORDS = {"yes": AGREE, "not measured": NOT_MEASURED, "no": DISAGREE}


def test_the_readme_says_what_the_embedded_figures_show() -> None:
    """Its table of sentences, cell by cell, against the curves of the committed figures."""
    parts = [pd.read_csv(ROOT / "results" / "reference" / f"figure{n}.csv") for n in (1, 2, 3, 4)]
    keys = ["model", "arm", "lam", "layer"]
    rows = pd.concat(parts).rename(columns={"mean": "value"}).drop_duplicates(keys).astype({"gating": "boolean"})
    rows["value"] = rows["value"].where(rows["overflow"] == 0)  # the figures' means are over the excerpts that are left
    rows["status"] = rows["overflow"].gt(0).map({True: "overflow", False: "ok"})
    rows["tokenizer"] = rows["model"].map(lambda name: "pixels" if name == "s4d-digits" else "bert")
    found = {
        (f.claim, f.model): f.verdict for f in sentences.judge(rows.assign(n_tokens=128, excerpt=0, dtype="float32"))
    }
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| the paper writes |"))
    models = [cell.strip() for cell in lines[start].split("|")[2:-1]]
    told = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        sentence, *cells = (cell.strip() for cell in line.replace("\\|", "").split("|")[1:-1])
        for model, cell in zip(models, cells, strict=True):
            if cell:
                other = re.match(r"`(.+?)`: ", cell)
                word = cell.removeprefix(other[0] if other else "").strip("*")
                said = next(v for w, v in WORDS.items() if word.strip("*").startswith(w))
                told["figure " + sentence.split(":")[0], other[1] if other else model] = said
    assert len(told) >= 14
    assert {key: found[key] for key in told} == told
