"""Rows -> the points of a figure, and the words of its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lscollapse.core import registry
from lscollapse.core.table import reads_pixels

KEYS = ("model", "init", "arm", "gating", "layernorm", "skip_site", "norm_site", "lam", "measure", "layer")
NEEDED = (*KEYS, "text", "dtype", "excerpt", "n_tokens", "value", "status", "floor")
STATUSES = ("ok", "certified", "below_floor", "overflow", "nan")
NAMES = {"relative_mu": "relative μ", "rank1_residual": "rank-1 residual"}
SIGNS = {1: "λ > 0", -1: "λ < 0", 0: "either sign"}
SITES = {
    "residual": "the skip around the mixer",
    "mixer": "a skip in the mixer",
    "ffn": "the FFN skip",
    "both": "both skips",
}
NORMS = {"mixer": "the mixer's norm", "block": "the block's norm", "both": "both norms"}


class FigureError(ValueError):
    """The table cannot be drawn; one line that says what is missing and what to do."""


def summarise(rows: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Mean, spread, status counts and fate of every point (see the module). Raises FigureError for pooled settings."""
    rows = rows[rows["measure"].isin(measures)]
    if rows.empty:
        raise FigureError(f"no rows of {' or '.join(measures)} for this figure: measure them, or choose another model")
    keys = list(KEYS)
    if rows.duplicated([*keys, "excerpt"]).any():
        settings = ("revision", "dtype", "backend", "seed", "tokenizer", "text")
        varied = ", ".join(c for c in settings if c in rows and rows[c].nunique() > 1) or "unknown"
        raise FigureError(f"several measurements of one excerpt ({varied} vary): keep the rows of one setting")
    counts = {status: rows["status"].eq(status) for status in STATUSES}
    groups = rows.assign(number=numbers(rows), **counts).groupby(keys, dropna=False)
    data = groups.agg(
        mean=("number", "mean"), std=("number", "std"), n=("number", "count"),
        **{status: (status, "sum") for status in STATUSES}, floor=("floor", "max"),
    ).reset_index()  # fmt: skip
    masked = (data["n"] == 0) | (data["overflow"] + data["nan"] > 0)
    unresolved = data["below_floor"] == data[list(STATUSES)].sum(axis=1)
    data["drawn"] = np.select([masked, unresolved], ["masked", "at_floor"], "point")
    return pd.concat([data[data["measure"] == measure] for measure in measures], ignore_index=True)


def numbers(rows: pd.DataFrame) -> pd.Series:
    """What a mean is taken of: the value, under the floor the floor itself, NaN where there is no number."""
    known = rows["value"].where(rows["status"].isin(("ok", "certified")))
    return known.mask(rows["status"].eq("below_floor"), rows["floor"].fillna(rows["value"]))


def checked(rows: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise FigureError(f"the table has no column {', '.join(missing)}: give the rows of a run folder")
    return rows


def of_model(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    rows = checked(rows)
    if model not in set(rows["model"]):
        known = ", ".join(sorted(set(rows["model"]))) or "none"
        raise FigureError(f"no rows of model {model!r}: the table has {known}")
    return rows[rows["model"] == model]


def _first_of(values: pd.Series, wanted: str) -> str:
    """The wanted value if it occurs, else the first that does."""
    present = list(values.dropna().unique())
    return wanted if wanted in present or not present else present[0]


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of trained weights; of a table without any, those of the first kind that it has."""
    return rows[rows["init"] == _first_of(rows["init"], "trained")]


def default_reading(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a table that crosses the sites, the default reading (or the first there is), per model."""
    parts = []
    for _, part in rows.groupby(["model", "layernorm"], sort=False):
        for column, wanted in (("skip_site", "residual"), ("norm_site", "both")):
            if part[column].notna().any():
                part = part[part[column] == _first_of(part[column], wanted)]
        parts.append(part)
    return pd.concat(parts) if parts else rows


def groups_of(rows: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return [(key, part) for key, part in rows.groupby(keys, dropna=False, sort=False)]  # type: ignore[misc]


def is_gated(rows: pd.DataFrame) -> pd.Series:
    return rows["gating"].fillna(False).astype(bool)


def number(lam: float) -> str:
    """As short as it can be, with a true minus sign."""
    return f"{lam:g}".replace("-", "\N{MINUS SIGN}")


def lam_word(lam: float) -> str:
    """Of a legend: λ and its value, or that it is a schedule (NaN)."""
    return "λ per layer" if np.isnan(lam) else f"λ = {number(lam)}"


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


def gate_word(gating: Any) -> str:
    return "no gate" if pd.isna(gating) else "full architecture" if gating else "gate removed"


def kind_of_text(text: str) -> str:
    return "SMILES" if "smiles" in text.lower() else text.split(" (")[0]


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
    """The sentences of every caption, before those of one figure."""
    sites = [SITES.get(str(site), str(site)) for site in rows["skip_site"].dropna().unique()]
    drawn, unit = set(data["drawn"]), "images" if reads_pixels(rows) else "excerpts"
    return [
        describe(rows),
        "Weights: random, not trained." if set(data["init"]) == {"random"} else "",
        f"λ acts on {' or '.join(sites)}." if sites else "",
        f"Line and band: mean and one standard deviation over {unit}." if (data["n"] > 1).any() else "",
        "Triangles: under the floor, below which the dtype resolves nothing." if "at_floor" in drawn else "",
        disagreement(data),
    ]


def disagreement(data: pd.DataFrame) -> str:
    """Names the curves that relative mu calls spread out and the rank-1 residual does not, at the last layer."""
    last = data[(data["layer"] == data.groupby("model")["layer"].transform("max")) & (data["drawn"] == "point")]
    last = last[[*KEYS, "mean"]]
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
