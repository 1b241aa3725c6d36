"""The theory's statements as findings: from what `theory verify --out` and `theory bound --out` saved, or checked anew.

A statement agrees where it holds as printed and disagrees where its counterexample refutes it; one that gives nothing to
compute (undefined or non-constructive constants) is not measured. Statements that are not the paper's are left out.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lscollapse.core.files import read_text
from lscollapse.core.manifest import RunFolderError
from lscollapse.core.outside import parse_json, shown
from lscollapse.reports.claims.figures import CLAIMS, MUCH
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, Finding
from lscollapse.theory import verify
from lscollapse.theory.arrays import mu

VERIFY, BOUNDS, CHANNELS = "verify.json", "bounds.csv", "channels.csv"
PRINTED = {"holds": AGREE, "fails": DISAGREE, "void": NOT_MEASURED, "existence only": NOT_MEASURED}
CONSERVATIVE = "figure 2d"
ADVERSARIAL = "appendix A.12"
NORMS = "figure 4c"
SENTENCES = {  # name -> (sentence, threshold)
    NORMS: (
        "The condition on the Frobenius norm of the weight matrix being smaller than 1 is not met by the model.",
        "the mixing matrices of `theory bound` on an S4D: agrees where some layer has a channel with ||M||_F of 1 or more. That"
        " the condition is not met explains nothing by itself: it is sufficient for collapse, not necessary",
    ),
    ADVERSARIAL: (
        "For an LTI SSM one cannot simply find an adversarial input that causes rank collapse.",
        "an input that a linear LTI net without skip and LayerNorm turns into equal rows disproves it",
    ),
    "theory": (
        "The theorems, lemmas and propositions.",
        "agrees: holds as printed on every random and worsened instance; disagrees: a counterexample, computed anew; not"
        " measured: there is nothing to compute. The corrected form is tested beside it; the proofs are in theory.md",
    ),
}
DEPTH = 64


def verified(folder: Path) -> Iterator[Finding]:
    """The statements of a saved verify.json.

    Raises:
        RunFolderError: the file is damaged or another program's.
    """
    file = folder / VERIFY
    try:
        yield from statements(parse_json(read_text(file, RunFolderError), VERIFY, RunFolderError))
    except (ValueError, KeyError, TypeError) as error:
        why = shown(str(error)) if isinstance(error, RunFolderError) else type(error).__name__
        raise RunFolderError(
            f"{file} cannot be read ({why}): run `lscollapse theory verify --out {folder}` again"
        ) from None


def statements_now() -> Iterator[Finding]:
    """The same, put to the test now with the instances of `theory verify`."""
    yield from statements([vars(verdict) for verdict in verify.run()])


def statements(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Findings on the paper's own statements among `verdicts` (theory.checking.Verdict as dictionaries), then A.12."""
    for v in verdicts:
        if v["printed"] not in PRINTED:  # a definition, or new
            continue
        tested = f"{v['informative']} instances"
        detail = f"instead: {v['correction']} ({v['corrected']}, {tested})" if v["correction"] else f"{tested} tested"
        numbers = f"{v['printed_evidence']}; {detail}"
        yield Finding("theory", v["statement"], "as printed", PRINTED[v["printed"]], numbers)
    yield adversarial_input()


def bounded(folder: Path) -> Iterator[Finding]:
    """What `theory bound` says on the paper: 4c of an S4D; of other models 2d, with their own constants.

    Raises:
        RunFolderError: a file is damaged or has no line of condition (7).
    """
    model = folder.resolve().name.removeprefix("bound-")
    try:
        if (folder / CHANNELS).exists():
            yield _norms(_lines(folder / CHANNELS), model)
        else:
            yield _conservative(_lines(folder / BOUNDS), model)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, csv.Error) as error:
        raise RunFolderError(
            f"the tables in {folder} cannot be read ({type(error).__name__}): run `lscollapse theory bound MODEL --out"
            f" {folder}` again"
        ) from None


def _lines(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(read_text(file, RunFolderError), newline="")))


def _norms(channels: list[dict[str, str]], model: str) -> Finding:
    sizes: dict[str, list[float]] = {}
    for row in channels:
        sizes.setdefault(row["layer"], []).append(float(row["C_M"]))
    largest = [max(layer) for layer in sizes.values()]
    met = sum(size < 1.0 for size in largest)
    norms = f"largest ||M||_F of a layer {min(largest):.3g} to {max(largest):.3g}"
    numbers = f"{met} of {len(largest)} layers meet it; {norms}"
    return Finding(NORMS, SENTENCES[NORMS][0], model, AGREE if met < len(largest) else DISAGREE, numbers)


def _conservative(bounds: list[dict[str, str]], model: str) -> Finding:
    condition = next(float(row["lam"]) for row in bounds if "condition (7)" in row["bound"])
    own = [row for row in bounds if row["bound"] == "measured, relative mu"]
    measured = [(float(row["lam"] or "nan"), float(row.get("to") or "inf")) for row in own]
    if any(math.isnan(lam) for lam, _ in measured):
        missing = (
            "the last layer of some lambda is missing or unresolved, where floating point does not hold or resolve it"
        )
        return Finding(CONSERVATIVE, CLAIMS[CONSERVATIVE].sentence, model, NOT_MEASURED, missing)
    found = [(math.isfinite(to), lam, to) for lam, to in measured if math.isfinite(lam)]
    _, needed, to = min(found, default=(True, math.inf, math.inf))  # one without an end, if there is one: False < True
    kept = f"|lambda| from {needed:.3g} {'on' if math.isinf(to) else f'to {to:.3g}'} keeps the target"
    numbers = "no measured lambda keeps the target" if math.isinf(needed) else kept
    verdict = AGREE if needed <= MUCH * condition else DISAGREE
    numbers += f"; condition (7), own constants: > {condition:g}"
    return Finding(CONSERVATIVE, CLAIMS[CONSERVATIVE].sentence, model, verdict, numbers)


def adversarial_input() -> Finding:
    """Appendix A.12.1 on a linear LTI net without skip and LayerNorm, Y -> M Y: Y0 = M^-K 1 ends with equal rows.

    M = [[1, 0], [2, 1]] is that of Proposition 4.3.1, so M^-K = [[1, 0], [-2K, 1]] exactly. The same input exists for
    every M with a non-zero diagonal. It is one for that depth: a deeper net tears the rows apart again.
    """
    M = np.array([[1.0, 0.0], [2.0, 1.0]])
    first = np.array([[1.0], [1.0 - 2.0 * DEPTH]])
    last = np.linalg.matrix_power(M, DEPTH) @ first
    text = f"M = [[1,0],[2,1]], {DEPTH} layers, Y0 = M^-{DEPTH} 1: mu {mu(first):.3f} -> {mu(last):.3f}"
    return Finding(
        ADVERSARIAL, SENTENCES[ADVERSARIAL][0], "counterexample", DISAGREE if mu(last) == 0.0 else AGREE, text
    )
