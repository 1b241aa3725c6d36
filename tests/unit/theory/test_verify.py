"""The verifier: all corrected statements hold, a wrong one is caught, and the renderings carry what a reader needs."""

import json

import numpy as np
import pytest

from lscollapse.theory import bounds, verify
from lscollapse.theory.arrays import TheoryError
from lscollapse.theory.checking import Statement, lower, put_to_test, upper
from lscollapse.theory.instances import cone, shape
from lscollapse.theory.statements_upper import STATEMENTS as UPPER


@pytest.fixture(scope="module")
def verdicts():
    return verify.run(instances=120, seed=3)


def test_every_corrected_statement_holds(verdicts):
    assert [v.statement for v in verdicts if v.violated] == []
    assert all(v.instances == 180 and v.informative >= 45 for v in verdicts)


def test_what_the_paper_prints(verdicts):
    by_name = {v.statement: v.printed for v in verdicts}
    holding = {name for name, printed in by_name.items() if printed == "holds"}
    assert holding == {
        "Theorem 4.1, lam > 0, unit-row input",
        "Lemma A.6, Theorems A.7, A.8, LTI",
        "Lemma A.9, selective",
    }
    failing = {name for name, printed in by_name.items() if printed == "fails"}
    assert failing == {
        "Eq. 6 equals eq. 3",
        "Theorem 4.1, proof, LayerNorm step",
        "Theorem 4.1, proof, row-norm step",
        "Theorem 4.1, lam < 0",
        "Theorem 4.1, input not normalised",
        "Threshold after Theorem 4.1 suffices",
        "Lemma A.1",
        "Lemma A.4, entries of M",
        "Lemma A.5, LayerNorm divisors",
        "Theorem 4.3, selective SSM with LayerNorm",
        "Corollary A.3.1, norms",
        "Theorem A.10, selective",
        "Footnote 3, attention and LTI",
        "Footnote 3, selective",
        "Proposition 4.3.1 (Sys-1)",
        "Proposition 4.3.2 (Sys-2)",
    }


def test_same_seed_same_verdicts():
    assert verify.run(15, 5) == verify.run(15, 5)
    with pytest.raises(TheoryError, match="at least one instance"):
        verify.run(0)


def _printed_lemma_a4(Y, W_BC):
    """The printed Lemma A.4, lam_min * phi, on symmetric positive W_BC = A A^T + I / 10."""
    Y = Y / np.linalg.norm(Y, axis=1, keepdims=True)
    W = W_BC @ W_BC.T + 0.1 * np.eye(len(W_BC))
    return lower(float((Y @ W @ Y.T).min()), float(np.linalg.eigvalsh(W)[0] * (Y @ Y.T).min()))


def _draw(rng):
    N, d = shape(rng)
    return {"Y": cone(rng, N, d), "W_BC": rng.standard_normal((d, d))}


def test_a_wrong_statement_is_caught_with_its_counterexample():
    wrong = Statement("printed A.4", lambda: ("holds", ""), "as printed", _draw, _printed_lemma_a4)
    verdict = put_to_test(wrong, 200, np.random.default_rng(0))
    assert verdict.violated and verdict.corrected == "violated" and verdict.worst_margin < -1e-3
    again = _printed_lemma_a4(**{name: np.array(value) for name, value in verdict.counterexample.items()})
    assert again == verdict.worst_margin
    printed = put_to_test(
        Statement("printed A.4", lambda: ("holds", ""), "", _draw, _printed_lemma_a4), 200, np.random.default_rng(0)
    )
    assert printed.printed == "fails"


def test_a_statement_that_cannot_be_tested_counts_as_violated():
    mute = Statement("mute", lambda: ("new", ""), "never informative", _draw, lambda Y, W_BC: None)
    verdict = put_to_test(mute, 5, np.random.default_rng(0))
    assert verdict.corrected == "untested" and verdict.violated
    assert json.loads(verify.to_json([verdict]))[0]["worst_margin"] is None


def test_the_climb_makes_the_worst_instance_worse():
    statement = next(s for s in UPPER if s.name.startswith("Theorem 4.3, selective"))
    rng = np.random.default_rng(7)
    drawn = [m for m in (statement.margin(**statement.draw(rng)) for _ in range(60)) if m is not None]
    assert put_to_test(statement, 60, np.random.default_rng(7)).worst_margin <= min(drawn)


def test_renderings(verdicts):
    rows = json.loads(verify.to_json(verdicts))
    assert [row["statement"] for row in rows] == [v.statement for v in verdicts]
    lines = verify.to_markdown(verdicts).splitlines()
    assert len(lines) == 2 + len(verdicts)
    assert all(line.replace("\\|", "").count("|") == 8 for line in lines)
    assert any("0.961164" in line for line in lines) and any("50.7347" in line for line in lines)


def test_margins():
    assert upper(1.0, 2.0) == 0.5 and upper(1.0, 1e-9) is None
    assert lower(2.0, 1.0) == 1.0 and lower(1.0, 0.0) is None


def test_log_bounds_survive_great_depth():
    assert bounds.attention_log_bound(0.5, 1.0, 40) == pytest.approx((3.0**40 - 1) / 2 * np.log(0.5))
    assert bounds.attention_log_bound(0.5, 1.0, 5000) == -np.inf
    assert bounds.attention_log_bound(2.0, 1.0, 5000) == np.inf
    assert bounds.attention_log_bound(1.0, 1.0, 5000) == 0.0
    assert bounds.attention_log_bound(0.0, 1.0, 3) == -np.inf and bounds.attention_log_bound(2.0, 0.0, 3) == -np.inf
    assert bounds.attention_log_bound(0.5, 0.3, 0) == np.log(0.3)
