"""The words of every figure and of the page: names, values of lambda, and the sentences of captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lscollapse.core import registry
from lscollapse.core.table import STATUSES, UNRESOLVED, layer_words, reads_pixels
from lscollapse.reports.figures.points import KEYS, groups_of, last_layer

NAMES = {"relative_mu": "relative μ", "rank1_residual": "rank-1 residual"}
SIGNS = {1: "λ > 0", -1: "λ < 0", 0: "either sign"}
SITES = {
    "residual": "the skip around the mixer",
    "mixer": "a skip in the mixer",
    "ffn": "the FFN skip",
    "both": "both skips",
}
NORMS = {"mixer": "the mixer's norm", "block": "the block's norm", "both": "both norms"}


def measure_word(measure: str) -> str:
    return NAMES.get(measure, measure.replace("_", " "))


def number(lam: float) -> str:
    """A lambda as short as it can be, with a true minus sign."""
    return f"{lam:g}".replace("-", "\N{MINUS SIGN}")


def lam_word(lam: float) -> str:
    """A lambda in a legend: λ and its value, or that it is a schedule (NaN)."""
    return "λ per layer" if lam != lam else f"λ = {number(lam)}"


def ends_with(points: pd.DataFrame) -> str:
    """Why and where a curve against layer stops, and for how many excerpts if not for all; "" if it does not."""
    bad = points[points["drawn"] == "masked"]
    if bad.empty:
        return ""
    first = bad.sort_values("layer").iloc[0]
    status = "overflow" if first["overflow"] else "nan"
    total = int(sum(first[s] for s in STATUSES))
    some = f" ({first[status]} of {total})" if 0 < first[status] < total else ""
    return f"{'overflow' if first['overflow'] else 'NaN'} at layer {first['layer']}{some}"


def gaps(places: Iterable[float], x: str) -> str:
    """At which layers or lambdas a curve is unresolved; "" if nowhere."""
    found = list(places)
    if not found:
        return ""
    return f"unresolved: {layer_words([*map(int, found)]) if x == 'layer' else 'λ = ' + ', '.join(map(number, found))}"


def gate_word(gating: Any) -> str:
    return "no gate" if pd.isna(gating) else "full architecture" if gating else "gate removed"


def nets_note(rows: pd.DataFrame) -> str:
    """Whether the arms of Figure 4 are one net's, or each has its own."""
    n_nets = rows["checkpoint_sha256"].nunique()
    if n_nets == 1:
        return "One net, trained with skip and LN; every arm is ablated at inference, none retrained."
    return f"{n_nets} nets, each arm retrained: trained as it is measured, nothing is ablated at inference."


def describe(rows: pd.DataFrame) -> str:
    """Who read what: models, text, number of excerpts, tokens and dtype, models of one kind together."""
    kinds: dict[str, list[str]] = {}
    for (model,), part in groups_of(rows, ["model"]):
        texts, dtypes = " / ".join(part["text"].unique()), ", ".join(sorted(set(part["dtype"])))
        n, low, high = part["excerpt"].nunique(), part["n_tokens"].min(), part["n_tokens"].max()
        length = f"{low}" if low == high else f"{low} to {high}"
        one, units = ("image", "pixels") if reads_pixels(part) else ("excerpt", "tokens")
        what = f"{texts}, n = {n} {one}{'s' * (n > 1)} of {length} {units}, {dtypes}."
        kinds.setdefault(what, []).append(model)
    return " ".join(f"{', '.join(models)}: {what}" for what, models in kinds.items())


def embedded_note(models: Sequence[str]) -> str:
    small = [model for model in models if model in registry.ENTRIES and registry.ENTRIES[model].embedded]
    if not small:
        return ""
    what = "are small embedded models" if len(small) > 1 else "is a small embedded model"
    return f"{', '.join(small)} {what}, not the paper's."


def caption(rows: pd.DataFrame, data: pd.DataFrame) -> list[str]:
    """The sentences that every caption begins with, before those of one figure."""
    sites = [SITES.get(str(site), str(site)) for site in rows["skip_site"].dropna().unique()]
    drawn, unit = set(data["drawn"]), "images" if reads_pixels(rows) else "excerpts"
    return [
        describe(rows),
        "Weights: random, not trained." if set(data["init"]) == {"random"} else "",
        f"λ acts on {' or '.join(sites)}." if sites else "",
        f"Line and band: mean and one standard deviation over {unit}." if (data["n"] > 1).any() else "",
        "Triangles: under the floor, below which the dtype resolves nothing." if "at_floor" in drawn else "",
        unresolved(data),
        disagreement(data),
    ]


def unresolved(data: pd.DataFrame) -> str:
    """What is hatched, and how far rounding may move the least doubtful of it, cut to one digit."""
    part = data[data["drawn"] == UNRESOLVED]
    if part.empty:
        return ""
    least = part["rounding"].min()
    digit = 10.0 ** math.floor(math.log10(least)) if 0 < least < math.inf else math.nan
    by = f"by more than {math.floor(least / digit) * digit:g}" if digit == digit else "too far"
    return f"Hatched at the bottom, a gap in the line: unresolved, rounding may move the value {by}."


def disagreement(data: pd.DataFrame) -> str:
    """Names the curves that relative mu calls spread out and the rank-1 residual does not, at the last layer."""
    last = last_layer(data)
    last = last.loc[last["drawn"] == "point", [*KEYS, "mean"]]
    spread, rank1 = (last[last["measure"] == m].drop(columns="measure") for m in ("relative_mu", "rank1_residual"))
    both = spread.merge(rank1, on=[key for key in KEYS if key != "measure"], suffixes=("", "_rank1"))
    both = both[(both["mean"] > 0.5) & (both["mean_rank1"] < both["mean"] / 2)]
    if both.empty:
        return ""
    named: dict[str, list[str]] = {}
    for (model, gating), part in groups_of(both, ["model", "gating"]):
        lams = ",\N{NO-BREAK SPACE}".join(map(number, sorted(part["lam"].unique())))
        named.setdefault(lams, []).append(model if pd.isna(gating) else f"{model} ({gate_word(gating)})")
    alone = data["model"].nunique() == 1 and data["gating"].nunique() < 2
    equals = "λ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    where = [equals + lams + ("" if alone else f" of {', '.join(names)}") for lams, names in named.items()]
    return (
        "Relative μ cannot see rows going to +u and −u. At the last layer the two measures disagree "
        f"(relative μ > 0.5, rank-1 residual under half of it): {'; '.join(where)}."
    )
