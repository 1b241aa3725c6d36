"""Every statement of the paper, and of what replaces it, put to the test: one verdict each.

Each statement is tried on seeded random instances and on instances made worse by hill climbing; what the paper prints
is held against its counterexample, computed anew. A test can refute a statement, never prove it: the proofs are in
docs/theory.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from lscollapse.theory import statements_decay, statements_examples, statements_lower, statements_upper
from lscollapse.theory.arrays import TheoryError
from lscollapse.theory.checking import Verdict, put_to_test

STATEMENTS = (
    statements_lower.STATEMENTS
    + statements_upper.STATEMENTS
    + statements_decay.STATEMENTS
    + statements_examples.STATEMENTS
)


def run(instances: int = 1500, seed: int = 0) -> list[Verdict]:
    """Verdicts on all statements, in the order of the paper's sections; deterministic in (instances, seed).

    instances: random draws a statement (half as many again are spent on making the worst one worse). A caller should
    fail when any verdict is `violated`. TheoryError for fewer than one instance or a negative seed.
    """
    if instances < 1 or seed < 0:
        raise TheoryError(f"instances = {instances}, seed = {seed}: give at least one instance and a seed >= 0")
    streams = np.random.SeedSequence(seed).spawn(len(STATEMENTS))
    pairs = zip(STATEMENTS, streams, strict=True)
    return [put_to_test(statement, instances, np.random.default_rng(stream)) for statement, stream in pairs]


def to_json(verdicts: Sequence[Verdict]) -> str:
    """A JSON array, one object a verdict; an untested statement has worst_margin null."""
    rows = [vars(v) | {"worst_margin": v.worst_margin if np.isfinite(v.worst_margin) else None} for v in verdicts]
    return json.dumps(rows, indent=2) + "\n"


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table, one row a verdict."""
    lines = [
        "| statement | as printed | numbers | corrected form that was checked | result | instances | worst margin |",
        "|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        checked = v.correction or "as printed"
        cells = (v.statement, v.printed, v.printed_evidence, checked, v.corrected)
        texts = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join([*texts, f"{v.informative} of {v.instances}", f"{v.worst_margin:.2g}"]) + " |")
    return "\n".join(lines) + "\n"
