"""The rows of Table 1 -> the table beside the paper's figures, and whether learning lambda hurts, as a statistical test.

The paper writes (Section 5.1): "learning lambda does not affect the performance and even outperforms the models with
fixed lambda in some cases". Put to the test for each task, mixer and start of lambda, and for their average over tasks and
mixers, with the test accuracies of the seeds, by Welch's t (unequal variances) on d = mean(learnt) - mean(fixed):

    no worse    the lower one-sided 95 % bound of d is over -margin: a loss of `margin` (2 points) or more is excluded
    worse       not so, and the upper one-sided bound of d, at 5 % over the number of comparisons (Bonferroni), is under 0
    undecided   neither; so is every comparison with fewer than two seeds in an arm

The sentence agrees when every comparison is "no worse" (no correction is needed for all of them to hold together), and
disagrees when one is "worse". "Outperforms" agrees when the lower bound at 5 % over the number of comparisons is over 0
for one. Margin and level were fixed before the grid was run. An arm whose accuracy is at the floor of chance is "no worse" for
want of anything to lose: read the verdict beside the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, variance

import pandas as pd

from lscollapse.core.files import write_text
from lscollapse.reports.verdict import AGREE, DISAGREE

LEVEL = 0.05
NO_WORSE, WORSE, UNDECIDED = "no worse", "worse", "undecided"
FIXED, ALL = "1", "all"
PAPER = {  # test accuracy in percent, lambda = 1 and learnt
    ("image", "attention"): (32.64, 32.85), ("image", "linear"): (34.10, 32.80), ("image", "mamba"): (63.04, 62.92),
    ("image", "mamba2"): (42.28, 38.92), ("mqar", "attention"): (99.6, 98.9), ("mqar", "linear"): (1.6, 1.55),
    ("mqar", "mamba"): (81.5, 85.3), ("mqar", "mamba2"): (97.3, 99.1),
}  # fmt: skip
MIXERS = {"attention": "Transformer", "linear": "Lin. Transformer", "mamba": "Mamba", "mamba2": "Mamba-2"}
TASKS = {"mqar": "MQAR", "image": "Image"}
Pair = tuple[list[float], list[float]]  # test accuracies of the seeds: learnt, fixed


@dataclass(frozen=True)
class Contrast:
    """A learnt lambda against lambda = 1 on one task with one mixer; accuracies and bounds of their difference, of 1.

    `low` is the one-sided 95 % bound; `corrected_low` and `corrected_high` are at 5 % over the number of comparisons.
    """

    task: str
    mixer: str
    lam: str
    seeds: int
    fixed: float
    learnt: float
    difference: float
    low: float
    corrected_low: float
    corrected_high: float
    verdict: str


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds of the test accuracy, a line for each task, mixer and lambda mode.

    Accuracies are in percent. `lr` is the learning rate that validation chose; `validation` its mean validation accuracy;
    `paper` the paper's figure (it trained once: no spread), of its own task and sizes.
    """
    test = rows[rows["measure"] == "test_accuracy"]
    validation = rows[rows["measure"] == "validation_accuracy"].groupby(["task", "mixer", "lam", "lr"])["value"].mean()
    seen = validation.to_dict()
    lines = []
    for (task, mixer, lam), part in test.groupby(["task", "mixer", "lam"], sort=False):
        lr, accuracy = part["lr"].iloc[0], part["value"]
        stated = is_learnt(str(lam)) or lam == FIXED  # the paper has lambda = 1 and learnt
        paper = PAPER.get((str(task), str(mixer)), (None, None))[is_learnt(str(lam))] if stated else None
        lines.append({
            "task": task, "mixer": mixer, "lam": lam, "lr": lr, "seeds": len(part), "test_mean": 100 * accuracy.mean(),
            "test_sd": 100 * accuracy.std(), "validation": 100 * seen[(task, mixer, lam, lr)], "paper": paper,
        })  # fmt: skip
    found = pd.DataFrame(lines)
    return found.sort_values(["task", "mixer", "lam"], ascending=[False, True, True], ignore_index=True)


def welch_bounds(pairs: Sequence[Pair], level: float) -> tuple[float, float]:
    """Lower and upper one-sided bounds at `level` of the mean over pairs of mean(learnt) - mean(fixed).

    Welch's t with the degrees of freedom of Welch and Satterthwaite; infinite with fewer than two values in an arm.
    """
    from scipy.stats import t

    arms = [arm for pair in pairs for arm in pair]
    if min(map(len, arms)) < 2:
        return -math.inf, math.inf
    d = difference(pairs)
    parts = [variance(arm) / len(arm) / len(pairs) ** 2 for arm in arms]  # of each mean in the mean over pairs
    if not sum(parts):  # no spread at all: the difference itself
        return d, d
    # Welch-Satterthwaite: (sum of the variances of the means)^2 / sum of (each)^2 / (n - 1)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(arm) - 1) for part, arm in zip(parts, arms, strict=True))
    half = float(t.ppf(1 - level, freedom)) * math.sqrt(sum(parts))
    return d - half, d + half


def difference(pairs: Sequence[Pair]) -> float:
    return mean(mean(learnt) - mean(fixed) for learnt, fixed in pairs)


def contrasts(rows: pd.DataFrame, margin: float) -> list[Contrast]:
    """Every learnt mode against lambda = 1, where both have a test accuracy; then each mode over all tasks and mixers."""
    test = rows[rows["measure"] == "test_accuracy"]
    arms = {
        (str(task), str(mixer), str(lam)): part.sort_values("seed")["value"].tolist()
        for (task, mixer, lam), part in test.groupby(["task", "mixer", "lam"], sort=False)
    }
    learnt = [arm for arm in arms if is_learnt(arm[2]) and (*arm[:2], FIXED) in arms]
    pairs = {arm: (arms[arm], arms[(*arm[:2], FIXED)]) for arm in learnt}
    in_order = sorted(pairs, key=lambda arm: (arm[0] != "mqar", arm))
    found = [contrast(arm, [pairs[arm]], margin, len(pairs)) for arm in in_order]
    for lam in sorted({arm[2] for arm in pairs}):
        own = [pair for arm, pair in pairs.items() if arm[2] == lam]
        if len(own) > 1:
            found.append(contrast((ALL, ALL, lam), own, margin, 1))
    return found


def contrast(arm: tuple[str, str, str], pairs: Sequence[Pair], margin: float, n_comparisons: int) -> Contrast:
    """The verdict on one pair of arms, or on the average over several; see the head of this file."""
    low, _ = welch_bounds(pairs, LEVEL)
    corrected_low, corrected_high = welch_bounds(pairs, LEVEL / n_comparisons)
    verdict = NO_WORSE if low > -margin else WORSE if corrected_high < 0 else UNDECIDED
    seeds = min(len(values) for pair in pairs for values in pair)
    learnt, fixed = (mean(mean(pair[k]) for pair in pairs) for k in (0, 1))
    return Contrast(*arm, seeds, fixed, learnt, difference(pairs), low, corrected_low, corrected_high, verdict)


def verdicts(found: list[Contrast]) -> dict[str, tuple[str, str]]:
    """The paper's statements, each with its verdict and the numbers behind it."""
    each, average = [c for c in found if c.task != ALL], [c for c in found if c.task == ALL]
    better = [c for c in each if c.corrected_low > 0]
    names = ", ".join(f"{TASKS[c.task]} {MIXERS[c.mixer]} ({mode_name(c.lam)})" for c in better)
    said = {"learning λ does not affect the performance, in each comparison": _joint(each)}
    if average:
        said["the same, on average over tasks and mixers"] = _joint(average)
    return {**said, "and even outperforms fixed λ in some cases": (AGREE if better else UNDECIDED, names or "in none")}


def _joint(found: list[Contrast]) -> tuple[str, str]:
    count = {verdict: sum(c.verdict == verdict for c in found) for verdict in (NO_WORSE, WORSE, UNDECIDED)}
    verdict = DISAGREE if count[WORSE] else AGREE if found and count[NO_WORSE] == len(found) else UNDECIDED
    return verdict, f"of {len(found)}: " + ", ".join(f"{n} {name}" for name, n in count.items())


TITLE = "Table 1: test accuracy in percent"
NOTE = "Mean ± sample standard deviation over seeds. The paper's figures are of its own sizes and data, one run each."


def is_learnt(lam: str) -> bool:
    """Whether a lambda mode is learnt; else it is the number that is fixed."""
    return lam.startswith("learnt")


def mode_name(lam: str) -> str:
    return f"λ {'' if is_learnt(lam) else '= '}{lam}".replace("-", "\N{MINUS SIGN}")


def table(rows: pd.DataFrame) -> list[list[str]]:
    """The cells of Table 1, the headings first: a line for each task and mixer, accuracies in percent."""
    lams, cells = _cells(rows)
    lines = [["task", "mixer", *map(mode_name, lams), "paper: λ = 1", "paper: λ learnt"]]
    for task, mixer in dict.fromkeys(arm[:2] for arm in cells):
        values = [cells.get((task, mixer, lam), "-") for lam in lams]
        paper = [f"{v:g}" for v in PAPER.get((task, mixer), ())] or ["-", "-"]
        lines.append([TASKS[task], MIXERS[mixer], *values, *paper])
    return lines


def markdown(rows: pd.DataFrame, margin: float) -> str:
    """The table, what it was made from, and the verdicts."""
    head, *body = table(rows)
    found = contrasts(rows, margin)
    lines = [f"# {TITLE}", "", *(f"- {line}" for line in made_from(rows)), "", *_grid(head, body)]
    lines += ["", f"{NOTE} Learnt λ against λ = 1, in points; Welch's t, margin {100 * margin:g} points,"
              f" level {100 * LEVEL:g} %:", ""]  # fmt: skip
    head, body = ["task", "mixer", "mode", "difference", "lower bound", "verdict"], []
    for c in found:
        points = (f"{100 * value:+.1f}" for value in (c.difference, c.low))
        body.append([TASKS.get(c.task, ALL), MIXERS.get(c.mixer, ALL), mode_name(c.lam), *points, c.verdict])
    lines += [*_grid(head, body), ""]
    lines += [f'- "{sentence}": **{verdict}** ({numbers})' for sentence, (verdict, numbers) in verdicts(found).items()]
    return "\n".join(lines) + "\n"


def latex(rows: pd.DataFrame) -> str:
    """The table for a paper; needs the package booktabs."""
    (_, _, *modes, _, _), *body = table(rows)
    names = [mode.replace("λ", r"$\lambda$").replace("\N{MINUS SIGN}", "$-$") for mode in modes]
    head = ["Task", "Model", *names, r"paper, $\lambda = 1$", r"paper, var. $\lambda$"]
    lines = [rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    for row in body:
        cells = ("--" if cell == "-" else cell.replace("±", r"$\pm$") for cell in row)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write(rows: pd.DataFrame, margin: float, folder: Path) -> list[Path]:
    """table1.md, .tex and .csv, and table1-test.csv with every comparison, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    test = pd.DataFrame([asdict(each) for each in contrasts(rows, margin)])
    texts = {
        "table1.md": markdown(rows, margin),
        "table1.tex": latex(rows),
        "table1.csv": summary(rows).to_csv(index=False, float_format="%.6g"),
        "table1-test.csv": test.to_csv(index=False, float_format="%.6g"),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def made_from(rows: pd.DataFrame) -> list[str]:
    """Of each task its data, seeds, dtype and steps, in words."""
    steps = rows[rows["measure"] == "steps"]
    lines = []
    for task, part in rows.groupby("task", sort=False):
        counts = steps[steps["task"] == task].groupby("mixer", sort=False)["value"].first()
        each = ", ".join(f"{MIXERS[str(mixer)]} {count:.0f}" for mixer, count in counts.items())
        words = f"{part['seed'].nunique()} seeds, {part['dtype'].iloc[0]}; steps: {each}"
        lines.append(f"{origin(part['data'].iloc[0], str(task))}; {words}")
    return lines


def origin(data: str, task: str) -> str:
    """The task and its data, named once."""
    return f"{TASKS[task]}: {data.removeprefix(f'{TASKS[task]}, ')}"


def _cells(rows: pd.DataFrame) -> tuple[list[str], dict[tuple[str, str, str], str]]:
    """The lambda modes, and the text of each arm."""
    cells = {}
    for line in summary(rows).to_dict("records"):
        spread = f" ± {line['test_sd']:.1f}" if line["seeds"] > 1 else ""
        cells[(line["task"], line["mixer"], line["lam"])] = f"{line['test_mean']:.1f}{spread}"
    return sorted({lam for _, _, lam in cells}), cells


def _grid(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
