"""How far the column `rounding` can be trusted: float32 and bfloat16 beside float64, on the embedded models and text.

    OMP_NUM_THREADS=1 python scripts/rounding.py       # about ten minutes of one core

Each model is measured in the three dtypes as a run of the command line measures it, float64 without the certified exit.
Into --to go

    rounding.png, .pdf, .csv   mamba2-tiny with its gate at four lambdas: distance from float64 and its estimate against layer
    coverage.csv               each model and dtype: how often the estimate covers that distance, and what is said of the rest

and the table of docs/rounding.md, which is coverage.csv in words, to the terminal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lscollapse import measure
from lscollapse.core import allocation
from lscollapse.core.config import Experiment, configure, shipped
from lscollapse.core.files import write_text
from lscollapse.core.progress import SILENT
from lscollapse.core.table import LOGARITHMIC, LOST, RESOLVE, UNRESOLVED
from lscollapse.experiments.paper import s4d_variants, sweep_variants
from lscollapse.instrument.rounding import PLACE, tolerances
from lscollapse.reports.figures import style, wording
from lscollapse.runs.loading import LoadedTask, load_tasks

CASES = (("mamba2-tiny", ""), ("minilm-l6", ""), ("albert-smiles", ""), ("s4d-digits", ""), ("mamba2-tiny", "streamed"))
STREAMED = 8  # excerpts of a streamed model, at most
BATCH = 8  # excerpts
NARROW = (torch.float32, torch.bfloat16)
DRAWN, LAMBDAS = "mamba2-tiny", (0.0, -0.5, 0.5, 1.0)
LOOKS = {"float32": (style.PALETTE[0], "o"), "bfloat16": (style.PALETTE[1], "s")}
ESTIMATE = (0, (4, 1.5))  # its dashes
EVERY = 8  # layers between two marks on a curve


def task_of(model: str, how: str, excerpts: int) -> LoadedTask:
    """A model of configs/embedded.yaml with its excerpts and the arms of its figure."""
    settings = {
        "models": [model],
        "excerpts": min(STREAMED, excerpts) if how else excerpts,
        "stream": "always" if how else "never",
    }
    config = configure(Experiment, shipped("embedded.yaml"), settings)
    return next(load_tasks(config, s4d_variants if model.startswith("s4d") else sweep_variants, SILENT))


def beside_float64(task: LoadedTask) -> pd.DataFrame:
    """The rows in the narrow dtypes that neither dtype lost, with `error` (distance from float64) and `tolerance`.

    Both are those of log10 where the measure is one of LOGARITHMIC, as `rounding` is.
    """
    truth = measured(task, torch.float64)[[*PLACE, "excerpt", "value", "log10", "status", "rounding"]]
    narrow = pd.concat([measured(task, dtype) for dtype in NARROW], ignore_index=True)
    rows = narrow.merge(truth, on=[*PLACE, "excerpt"], suffixes=("", "_true"), validate="many_to_one")
    rows = rows[~rows["status"].isin(LOST) & ~rows["status_true"].isin(LOST)]
    error, error_of_log10 = ((rows[column] - rows[f"{column}_true"]).abs() for column in ("value", "log10"))
    error = error.mask(rows["measure"].isin(LOGARITHMIC), error_of_log10)
    corpus = task.corpus
    return rows.assign(
        error=error,
        tolerance=tolerances(rows, RESOLVE),
        model=task.info.name,
        text=corpus.source,
        tokenizer=corpus.excerpts[0].tokenizer,
    )


def measured(task: LoadedTask, dtype: torch.dtype) -> pd.DataFrame:
    """All arms in one dtype."""
    print(f"{task.info.name}: {len(task.variants)} arms x {len(task.ids)} in {dtype}", file=sys.stderr, flush=True)
    gains = task.gains if dtype in NARROW else None
    return measure(task.adapter, task.ids, task.variants, dtype, gains=gains, batch=BATCH)


def coverage(rows: pd.DataFrame) -> dict[str, float]:
    """What the estimates are worth on the rows of one model and dtype; shares are of 1.

    A triple is an arm, a layer and a measure; it is covered when the excerpt that is furthest from float64 is within `rounding`.
    Of the rows, those are counted that are over the floor. `float64_in_tolerances` is the most that float64 leaves open itself.
    """
    triples = rows.groupby(PLACE)[["error", "rounding"]].max()
    nothing_known = triples["error"].isna() & np.isinf(triples["rounding"])
    covered = (triples["error"] <= triples["rounding"]) | nothing_known
    rows = rows[rows["status"] != "below_floor"]
    known = rows[rows["status"] != UNRESOLVED]
    left_by_float64 = (rows["rounding_true"] / rows["tolerance"])[rows["status_true"] != "below_floor"]
    excess = (known["error"] / known["tolerance"])[known["error"] > known["tolerance"]]
    return {
        "triples": len(triples),
        "covered": covered.mean(),
        "covered_relative_mu": covered.xs("relative_mu", level="measure").mean(),
        "covered_at_once": covered.groupby(["variant", "layer"]).all().mean(),
        "largest_in_estimates": (triples["error"] / triples["rounding"]).max(),
        "rows": len(rows),
        "known": len(known),
        "known_but_off": len(excess),
        "largest_in_tolerances": excess.max(),
        "unresolved": (rows["status"] == UNRESOLVED).mean(),
        "off": (rows["error"] > rows["tolerance"]).mean(),
        "float64_in_tolerances": left_by_float64.max(),
    }


def in_words(table: pd.DataFrame) -> str:
    """The table of coverage in Markdown."""
    lines = [
        "| model | dtype | triples | covered | relative μ | all at once | known, but off | unresolved | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        off = f"{row['known_but_off']:,}" + (
            f" (to {row['largest_in_tolerances']:.1f}x)" if row["known_but_off"] else ""
        )
        shares = (row[name] for name in ("covered", "covered_relative_mu", "covered_at_once"))
        cells = [row["model"], row["dtype"], f"{row['triples']:,}", *map(percent, shares), f"{off} of {row['known']:,}"]
        lines.append(f"| {' | '.join([*cells, percent(row['unresolved']), percent(row['off'])])} |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@style.styled
def drawn(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Distance from float64 and its estimate against layer, a panel for each of LAMBDAS; rows of `beside_float64`."""
    rows = rows[(rows["measure"] == "relative_mu") & rows["gating"] & rows["lam"].isin(LAMBDAS)]
    data = rows.groupby(["model", "lam", "dtype", "layer"]).agg(
        difference=("error", "max"),
        rounding=("rounding", "max"),
        rounding_in_float64=("rounding_true", "max"),
        n=("excerpt", "nunique"),
    )
    data = data.reset_index()
    words = [
        wording.describe(rows),
        wording.embedded_note([DRAWN]),
        "Full architecture. Solid: the largest |relative μ − that of float64| of the excerpts. Dashed: the estimate, the column "
        "rounding; over the tolerance a value counts as unresolved.",
    ]
    figure, axes = style.canvas(2, style.PANEL, words, (1, 1), style.PAGE)
    for ax, lam in zip(axes.flat, LAMBDAS, strict=True):
        for dtype, (colour, marker) in LOOKS.items():
            part = data[(data["lam"] == lam) & (data["dtype"] == dtype)].sort_values("layer")
            look: dict[str, Any] = {"color": colour, "marker": marker, "markevery": (EVERY // 2, EVERY)}
            ax.plot(part["layer"], part["difference"].where(part["difference"] > 0), **look)
            ax.plot(part["layer"], part["rounding"].where(part["rounding"] > 0), ls=ESTIMATE, mfc="white", **look)
        ax.axhline(RESOLVE, color="0.3", lw=0.7)
        ax.set(yscale="log", xlim=(0, data["layer"].max()))
    seen = data[["difference", "rounding"]].to_numpy()
    limits = 10.0 ** np.floor(np.log10(seen[seen > 0].min())), 3 * max(1.0, seen[np.isfinite(seen)].max())
    for ax in axes.flat:
        ax.set_ylim(*limits)
        style.log_ticks(ax, few_decades=False)
    for ax in axes[:, 0]:
        ax.set_ylabel("distance from float64")
    keys: list[style.Key] = [(dtype, {"color": colour, "marker": marker}) for dtype, (colour, marker) in LOOKS.items()]
    keys += [("estimate", {"ls": ESTIMATE}), (f"tolerance {RESOLVE:g}", {"lw": 0.7})]
    style.name_panels(figure, axes, [wording.lam_word(lam) for lam in LAMBDAS], ["layer", "layer"], keys)
    return figure, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("results/reference/rounding"))
    parser.add_argument("--excerpts", type=int, default=32)
    args = parser.parse_args()
    allocation.keep_freed_memory()
    lines = []
    for model, how in CASES:
        task = task_of(model, how, args.excerpts)
        torch.set_num_threads(1)
        rows = beside_float64(task)
        if (model, how) == (DRAWN, ""):
            style.save(*drawn(rows), args.to, "rounding")
        for dtype in rows["dtype"].unique():
            name = {"model": f"{model}, {how}".rstrip(", "), "excerpts": len(task.ids), "dtype": dtype}
            lines.append(name | coverage(rows[rows["dtype"] == dtype]))
    table = pd.DataFrame(lines)
    write_text(args.to / "coverage.csv", table.to_csv(index=False, lineterminator="\n"))
    print(in_words(table))


if __name__ == "__main__":
    main()
