"""The words of every figure and of the page: names, values of lambda, and the sentences of captions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lscollapse.core import registry
from lscollapse.core.table import ANGULAR, COLLAPSED, LITTLE, MASSIVE, STATUSES, UNRESOLVED, layer_words, reads_pixels
from lscollapse.reports.figures.points import KEYS, RATIO, groups_of, last_layer, massive_points, row_norm_ratios

# In the order in which the page offers them
NAMES = {
    "relative_mu": "relative μ", "rank1_residual": "rank-1 residual", "angular_mu": "angular μ",
    "angular_rank1_residual": "angular rank-1 residual", "row_norm_ratio": "row norm ratio", "mu": "μ",
    "stable_rank": "stable rank", "effective_rank": "effective rank", "mean_cosine": "mean cosine",
    "dong_residual": "Dong residual", "longest_row": "longest row", "lm_loss": "language-model loss (nats)",
    "grad_norm": "gradient norm",
}  # fmt: skip
PAIR = tuple(ANGULAR)  # relative mu, and what sees the collapse that it cannot see
PAIRS = {PAIR[0]: PAIR, ANGULAR[PAIR[0]]: tuple(ANGULAR.values())}
SIGNS = {1: "λ > 0", -1: "λ < 0", 0: "either sign"}
SITES = {
    "residual": "the skip around the mixer",
    "mixer": "a skip in the mixer",
    "ffn": "the FFN skip",
    "both": "both skips",
}
CURVE = ("model", "init", "arm")
FEW = 3  # clauses about single curves in a sentence
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
    """Why and where a curve against layer stops or has a hole, and for how many excerpts if not for all; "" if nowhere."""
    bad = points[points["drawn"] == "masked"]
    if bad.empty:
        return ""
    bad = bad.sort_values("layer")
    first, goes_on = bad.iloc[0], bad["layer"].max() < points["layer"].max()
    status, word = ("overflow", "overflow") if first["overflow"] else ("nan", "NaN")
    if math.isinf(first["mean"]):
        word = "infinite"
    total = int(sum(first[s] for s in STATUSES))
    some = f" ({first[status]} of {total})" if 0 < first[status] < total else ""
    return f"{word} at {layer_words(list(bad['layer'])) if goes_on else 'layer ' + str(first['layer'])}{some}"


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
    angular = set(data["measure"]) & set(ANGULAR.values())
    return [
        describe(rows),
        "Weights: random, not trained." if set(data["init"]) == {"random"} else "",
        f"λ acts on {' or '.join(sites)}." if sites else "",
        f"Line and band: mean and one standard deviation over {unit}." if (data["n"] > 1).any() else "",
        "Triangles: under the floor, below which the dtype resolves nothing." if "at_floor" in drawn else "",
        unresolved(data),
        "Angular μ: that of the rows scaled to norm 1, so that no row decides it alone." if angular else "",
        disagreement(data, rows),
        massive_note(row_norm_ratios(rows)),
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


def disagreement(data: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Names the curves that relative mu calls spread out and the rank-1 residual does not, at the last layer, and says why.

    The same of the angular two. `rows` are those that `data` was made of, and say where one row decides both.
    """
    last, keys = last_layer(data), [key for key in KEYS if key != "measure"]
    last = last.loc[last["drawn"] == "point", [*KEYS, "mean"]]
    long = massive_points(row_norm_ratios(rows))[keys]
    said = []
    for pair in PAIRS.values():
        spread, rank1 = (last[last["measure"] == measure].drop(columns="measure") for measure in pair)
        both = spread.merge(rank1, on=keys, suffixes=("", "_rank1"))
        both = both[(both["mean"] > COLLAPSED) & (both["mean_rank1"] < LITTLE * both["mean"])]
        one_row = both.merge(long, "left", keys, indicator="long")["long"].eq("both").to_numpy() & (pair == PAIR)
        mu, residual = map(measure_word, pair)
        disagree = f"At the last layer the two measures disagree ({mu} > {COLLAPSED:g}, {residual} under half of it)"
        if not one_row.all():
            blind = f"{mu.capitalize()} cannot see rows going to +u and −u."
            said.append(f"{blind} {disagree}: {_curves(both[~one_row], data)}.")
        if one_row.any():
            why = f"one row of over {MASSIVE:g} times the median norm decides both"
            said.append(f"{disagree}, because {why}: {_curves(both[one_row], data)}.")
    return " ".join(said)


def _curves(points: pd.DataFrame, data: pd.DataFrame) -> str:
    """These of the curves of `data`: their lambdas, and of which model and gate where there are several."""
    named: dict[str, list[str]] = {}
    for (model, gating), part in groups_of(points, ["model", "gating"]):
        named.setdefault(_lams(part), []).append(model if pd.isna(gating) else f"{model} ({gate_word(gating)})")
    alone = data["model"].nunique() == 1 and data["gating"].nunique() < 2
    return "; ".join(lams + ("" if alone else f" of {', '.join(names)}") for lams, names in named.items())


def _lams(points: pd.DataFrame) -> str:
    """Their lambdas, which no line break parts."""
    lams = sorted(points["lam"].dropna().unique())
    equals = [f"λ = {', '.join(map(number, lams))}"] if lams else []
    schedule = ["λ per layer"] if points["lam"].isna().any() else []
    return ", ".join([*equals, *schedule]).replace(" ", "\N{NO-BREAK SPACE}")


def massive_note(points: pd.DataFrame) -> str:
    """That one row has more than MASSIVE times the median norm, and where among these points of the row norm ratio; "" if nowhere."""
    long, ratios = massive_points(points), points[points["measure"] == RATIO]
    if long.empty:
        return ""
    several = [name for name in (*CURVE, "lam") if ratios[name].nunique(dropna=False) > 1] or ["model"]
    where = long.groupby(several, dropna=False)["layer"].transform(lambda layers: layer_words(sorted(set(layers))))
    total, clauses = _number_of(ratios, several), []
    for (layers,), part in groups_of(long.assign(layers=where), ["layers"]):
        every = _number_of(part, several) == total
        clauses.append(layers if every else f"{layers} of {_curves_of(part, several)}")
    if len(clauses) > FEW:
        some = layer_words(sorted(set(long["layer"])))
        clauses = [f"some of {some} in {_number_of(long, several)} of {total} curves"]
    long_at = f"One row has more than {MASSIVE:g} times the median norm at {'; '.join(clauses)}"
    return f"{long_at}: relative μ weighs that row most there."


def _number_of(points: pd.DataFrame, several: Sequence[str]) -> int:
    return len(points[[*several]].drop_duplicates())


def _curves_of(points: pd.DataFrame, several: Sequence[str]) -> str:
    """The curves of these points, by what varies among all; several lambdas of one arm together."""
    names: dict[str, None] = {}
    for _, part in groups_of(points, [name for name in several if name != "lam"] or ["model"]):
        first = part.iloc[0]
        words = [first[name] for name in ("model", "arm") if name in several]
        words += [_lams(part)] if "lam" in several else []
        random = "init" in several and first["init"] == "random"
        names[", ".join(words) + " (random weights)" * random] = None
    return " / ".join(names)
