"""The sentence on Table 1 as two findings; the test behind them is that of the `table1` verb, in `reports.table1`."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from lscollapse.core.table import MARGIN
from lscollapse.reports.table1 import ALL, MIXERS, TASKS, contrasts, verdicts
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, Finding

SENTENCES = {  # name -> (sentence, threshold)
    "table 1a": (
        "Learning lambda does not affect the performance.",
        "test accuracy of every task and mixer, a learnt lambda against lambda = 1, Welch's t over seeds: agrees where each"
        " loss of 2 points or more is excluded at 5 %, disagrees where one is worse at 5 % over the number of comparisons;"
        " with fewer than two seeds it is not measured",
    ),
    "table 1b": (
        "It even outperforms the models with fixed lambda in some cases.",
        "the same test: agrees where a learnt lambda is better at 5 % over the number of comparisons in one case; without one"
        " it is not refuted and counts as not measured",
    ),
}  # fmt: skip


def findings(rows: pd.DataFrame) -> Iterator[Finding]:
    """Findings on the rows of a `table1` run; `model` names its tasks."""
    found = [c for c in contrasts(rows, MARGIN) if c.task != ALL]
    tasks = ", ".join(TASKS[task] for task in dict.fromkeys(c.task for c in found))
    points = "; ".join(
        f"{TASKS[c.task]} {MIXERS[c.mixer]}, {c.lam}: {100 * c.difference:+.1f} (at least {100 * c.low:+.1f})"
        for c in found
    )
    for (name, (sentence, _)), (verdict, numbers) in zip(SENTENCES.items(), verdicts(found).values(), strict=True):
        decided = verdict in (AGREE, DISAGREE)
        words = numbers if decided else f"{verdict}: {numbers}"
        detail = f"; points: {points}" if found and name == "table 1a" else ""
        yield Finding(name, sentence, tasks or "no pair of arms", verdict if decided else NOT_MEASURED, words + detail)
