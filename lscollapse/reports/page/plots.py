"""What the page plots: figures of tabs, tabs of series, series of measures, as JSON values; excerpts packed beside them.

A figure is {id, title, caption, x, tabs}, a tab {name, run, x, series, marks, massive} (`massive`: in words, where one row
decides relative mu), a series {name, colour, dash, of} with `of` a record for each measure: `x` (left out where it is the
tab's), `y` means (null: masked or unresolved), `s` standard deviations, `r` rounding, `n` excerpts, `at` the place of each
point's excerpts in the pack, `notes` [first, last, words], `floor`, `open` and `hatched` (points at the floor and unresolved
ones), `end` and `gaps` in words.
"""

from __future__ import annotations

import base64
import colorsys
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lscollapse.core.table import ANGULAR, COLLAPSED, LOGARITHMIC, MASSIVE, POSITION, STATUSES, UNRESOLVED, reads_pixels
from lscollapse.reports.figures import wording
from lscollapse.reports.figures.points import KEYS, NEEDED, RATIO, groups_of, has_value, numbers, summarise
from lscollapse.reports.figures.style import PALETTE, lambda_colour
from lscollapse.reports.figures.theory import CURVES
from lscollapse.reports.page.folders import Bounds, Run

Json = dict[str, Any]
ARM = ("model", "init", "arm", "gating", "layernorm", "skip_site", "norm_site")  # one curve over lambda
SWEPT = 3  # lambdas from which an arm is a sweep
UNIT = (*ANGULAR, *ANGULAR.values(), "dong_residual")  # between 0 and 1
COUNTS = f"under {COLLAPSED:g} counts as collapsed"
FACTS: dict[str, Json] = {  # where a dotted line is and what it means, and whether the axis begins as a log one
    "relative_mu": {"line": COLLAPSED, "means": COUNTS},
    "angular_mu": {"line": COLLAPSED, "means": COUNTS},
    RATIO: {"line": MASSIVE, "means": f"over {MASSIVE:g} one row decides relative μ", "log": True},
}
STATUS = {
    "overflow": "overflow",
    "nan": "NaN",
    UNRESOLVED: "unresolved",
    "below_floor": "below the floor",
    "certified": "certified",
}
TITLES = {
    "sweep-lambda": ("Figure 1. Every λ, layer by layer", "Figure 2. The last layer against λ", "Arms, layer by layer"),
    "ablate-gating": ("λ, layer by layer", "The last layer against λ", "Figure 3. Gate and LayerNorm"),
    "ablate-s4d": ("λ, layer by layer", "The last layer against λ", "Figure 4. Skip and LayerNorm of an S4D"),
    "all-readings": (
        "Figure 1 under every reading",
        "The last layer against λ under every reading",
        "Figure 3 under every reading",
    ),
}
OTHER_TITLES = ("Every λ, layer by layer", "The last layer against λ", "Arms, layer by layer")


class Pack:
    """Excerpt values, to 12 bits of mantissa (relative error 2^-13): the upper 24 bits of float64, as three planes of bytes."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.length = 0

    def add(self, values: np.ndarray) -> int:
        """Append values (any shape; NaN where there is none) and return the place of the first."""
        self.values.append(np.ravel(values))
        self.length += values.size
        return self.length - values.size

    def text(self) -> str:
        """The planes, deflated, in base64."""
        values = np.concatenate([np.zeros(0), *self.values])
        # Bit 39, the first that is cut off, is added: rounded to nearest, not down.
        upper = (values.view(np.uint64) >> np.uint64(40)) + (values.view(np.uint64) >> np.uint64(39) & np.uint64(1))
        planes = np.stack([upper >> np.uint64(16), upper >> np.uint64(8), upper]).astype(np.uint8)  # (3, n), low bytes
        return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def drawable(rows: pd.DataFrame) -> bool:
    """Whether a table is one of measurements (docs/table.md)."""
    return set(NEEDED) <= set(rows.columns) and len(rows) > 0


def figures(run: Run, pack: Pack) -> list[Json]:
    """The figures of one run: where an arm has several lambdas, over layers and over lambda; the other arms over layers."""
    rows = run.rows[run.rows["measure"] != POSITION].fillna({"skip_site": "", "norm_site": ""})
    points = _points(rows, pack)
    lams = points.groupby(list(ARM), dropna=False)["lam"].transform(lambda lams: lams.nunique(dropna=False))
    swept = lams >= (1 if run.experiment == "sweep-lambda" else SWEPT)
    rest = points[~swept]
    arms = points[points["model"].isin(rest["model"]) & (~swept | points["lam"].isin(rest["lam"]))]
    layers, last, ablation = TITLES.get(run.experiment, OTHER_TITLES)
    made = []
    if swept.any():
        made.append(("layers", layers, "layer", _sweep_tabs(points[swept])))
    if points["lam"][swept].notna().any():
        made.append(("lambda", last, "lambda", [_lambda_tab(points[swept])]))
    if len(rest):
        made.append(("arms", ablation, "layer", _arm_tabs(arms, run.experiment)))
    notes = [wording.nets_note(run.rows)] if run.experiment == "ablate-s4d" else []
    caption = " ".join([wording.describe(run.rows), *notes])
    return [
        {"id": f"{run.name}-{name}", "run": run.name, "title": title, "caption": caption, "x": x, "tabs": tabs,
         "unit": "image" if reads_pixels(run.rows) else "excerpt"}
        for name, title, x, tabs in made
    ]  # fmt: skip


def measure_facts(runs: Iterable[Run]) -> Json:
    """Name, range, axis and threshold of every measure that occurs, in the order in which they are offered."""
    present = {*ANGULAR, *(measure for run in runs for measure in run.rows["measure"].unique())} - {POSITION}
    order = [measure for measure in dict.fromkeys([*wording.NAMES, *sorted(present)]) if measure in present]
    return {
        m: {"name": wording.measure_word(m), "unit": m in UNIT, "angular": ANGULAR.get(m)} | FACTS.get(m, {})
        for m in order
    }


def theory_figure(folders: Sequence[Bounds]) -> Json:
    """Last-layer measures against |lambda|, both signs, with every finite bound as a line; a tab for each folder."""
    tabs = []
    for folder in folders:
        curve = folder.curve.assign(size=folder.curve["lam"].abs())
        sizes = sorted(set(curve["size"][curve["size"] > 0]))
        series = []
        for sign, colour in CURVES.items():
            half = curve[curve["lam"] * sign > 0].sort_values("size")
            of = {m: {"x": half["size"].tolist(), "y": _short(half[m], 6)} for m in ANGULAR if m in half}
            series.append({"name": wording.SIGNS[sign], "colour": both_themes(colour), "dash": False, "of": of})
        tabs.append({"name": folder.name, "run": "", "x": sizes, "series": series, "marks": _marks(folder.bounds)})
    return {"id": "theory-plot", "title": "What the theorems ask for, and what is needed", "x": "size", "tabs": tabs,
            "unit": "", "run": "", "caption": ""}  # fmt: skip


def _marks(bounds: pd.DataFrame) -> list[Json]:
    """Vertical lines at the ends of the bounds, named by their numbers in the table; equal ones share a line."""
    at: dict[str, Json] = {}
    for number, line in enumerate(bounds.to_dict("records"), 1):
        for end in dict.fromkeys((float(line["lam"]), float(line["to"]))):
            if math.isfinite(end) and end > 0:
                measured = str(line["bound"]).startswith("measured")
                mark = at.setdefault(f"{end:.3g}", {"x": end, "names": [], "measured": measured})
                mark["names"].append(str(number))
    return list(at.values())


def _points(rows: pd.DataFrame, pack: Pack) -> pd.DataFrame:
    """`summarise` for every measure, and in `at` where each point's excerpts are in the pack."""
    last = rows.groupby("model")["layer"].transform("max")
    rows = rows.assign(number=numbers(rows).astype(float), layer=rows["layer"].fillna(last))
    parts = []
    for _, part in rows.groupby(["model", "measure"], sort=False):
        data = summarise(part, list(part["measure"].unique()))
        excerpts = np.unique(part["excerpt"])
        values = np.full((len(data), len(excerpts)), np.nan)
        point = part.groupby(list(KEYS), dropna=False).ngroup()  # numbered as summarise sorts them
        values[point, np.searchsorted(excerpts, part["excerpt"])] = part["number"].replace(math.inf, math.nan)
        parts.append(data.assign(at=pack.add(values) + np.arange(len(data)) * len(excerpts), excerpts=len(excerpts)))
    return pd.concat(parts, ignore_index=True)


def _record(points: pd.DataFrame, x: str, of_tab: list[float]) -> Json:
    """The points of one curve, which `summarise` has sorted by lambda and layer."""
    at, shown = points["at"].tolist(), has_value(points)
    hatched = points["drawn"] == UNRESOLVED
    record: Json = {
        "y": _short(points["mean"].where(shown), 6), "s": _short(points["std"].where(shown), 3),
        "n": int(points["excerpts"].max()), "at": at, "notes": _notes(points), "floor": _short(points["floor"][:1], 3)[0],
        "open": np.flatnonzero(points["drawn"] == "at_floor").tolist(),
        "hatched": np.flatnonzero(hatched).tolist(),
        "end": wording.ends_with(points) if x == "layer" else "",
        "gaps": wording.gaps(points[x][hatched], x),
    }  # fmt: skip
    if points["rounding"].notna().any():
        # A hundredth in log10 is 2.3 hundredths of the value: the differential.
        scale = points["mean"] * math.log(10) if points["measure"].iloc[0] in LOGARITHMIC else 1.0
        record["r"] = _short(points["rounding"] * scale, 2)
    if points[x].tolist() != of_tab:
        record["x"] = points[x].tolist()
    if at == list(range(at[0], at[0] + len(at) * record["n"], record["n"])):
        record["at"] = at[0]
    return {key: value for key, value in record.items() if value not in ([], "", None)}


def _notes(points: pd.DataFrame) -> list[list[Any]]:
    """Where a status other than ok occurs and in how many excerpts, equal neighbours together: [first, last, words]."""
    notes: list[list[Any]] = []
    if not points[list(STATUS)].to_numpy().any():
        return notes
    for i, row in enumerate(points[list(STATUSES)].to_dict("records")):
        total = sum(row.values())
        words = ", ".join(f"{text} ({row[status]} of {total})" for status, text in STATUS.items() if row[status])
        if notes and notes[-1][2] == words and notes[-1][1] == i - 1:
            notes[-1][1] = i
        elif words:
            notes.append([i, i, words])
    return notes


def _short(values: Iterable[float], digits: int) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _series(points: pd.DataFrame, x: str, of_tab: list[float], name: str, colour: str, dash: bool = False) -> Json:
    of = {str(m): _record(part, x, of_tab) for m, part in points.groupby("measure", sort=False)}
    return {"name": name, "colour": both_themes(colour), "dash": dash, "of": of}


def _tab(name: str, x: list[Any], series: list[Json], points: pd.DataFrame) -> Json:
    return {"name": name, "x": x, "series": series, "massive": wording.massive_note(points)}


def _sweep_tabs(points: pd.DataFrame) -> list[Json]:
    """A tab for each arm, those without a gate first; a curve for each lambda from the largest down."""
    tabs = []
    models = list(points["model"].unique())
    arms = [(key[0], part) for key, part in groups_of(points, list(ARM))]
    for model, part in sorted(arms, key=lambda arm: (models.index(arm[0]), arm[1]["gating"].fillna(False).any())):
        lams, layers = list(part["lam"].unique()), sorted(part["layer"].unique().tolist())
        series = []
        for lam in sorted(lams, key=lambda lam: (math.isnan(lam), -lam)):
            own = part[part["lam"].eq(lam) | (math.isnan(lam) & part["lam"].isna())]
            series.append(_series(own, "layer", layers, wording.lam_word(lam), lambda_colour(lam, lams)))
        name = ", ".join((model, *_facets(part, points[points["model"] == model])))
        tabs.append(_tab(name, layers, series, part) | {"model": model})
    return tabs


def _lambda_tab(points: pd.DataFrame) -> Json:
    """Every arm at its last layer, over lambda."""
    points = points[points["lam"].notna()]
    points = points[points["layer"] == points.groupby(["model", "measure"])["layer"].transform("max")]
    lams = sorted(points["lam"].unique().tolist())
    series = []
    for i, ((model, init, *_), part) in enumerate(groups_of(points, list(ARM))):
        name = ", ".join((model, *_facets(part, points[points["model"] == model])))
        series.append(_series(part, "lam", lams, name, PALETTE[i % len(PALETTE)], init == "random"))
        series[-1]["model"] = model
    return _tab("", lams, series, points)


def _arm_tabs(points: pd.DataFrame, experiment: str) -> list[Json]:
    """A tab for each model and reading, a curve for each arm; random weights dashed in the colour of the trained ones."""
    tabs = []
    for (model,), of_model in groups_of(points, ["model"]):
        removed = of_model[~of_model["layernorm"].astype(bool)]
        readings = (removed if len(removed) else of_model)[["skip_site", "norm_site"]].drop_duplicates()
        for skip_site, norm_site in readings.astype(str).to_numpy():
            part = of_model[of_model["skip_site"].eq(skip_site)]
            part = part[part["layernorm"].astype(bool) | part["norm_site"].eq(norm_site)]
            layers = sorted(part["layer"].unique().tolist())
            order = part.sort_values(["layernorm", "gating", "lam"], ascending=False, kind="stable")
            arms: dict[Any, str] = {}
            series = []
            for (init, layernorm, gating, lam), own in groups_of(order, ["init", "layernorm", "gating", "lam"]):
                arm = (layernorm, str(gating), str(lam))
                colour = arms.setdefault(arm, PALETTE[len(arms) % len(PALETTE)])
                name = _arm_name(own.iloc[0], part["lam"].nunique(dropna=False) > 1, experiment)
                series.append(_series(own, "layer", layers, name, colour, init == "random"))
            where = (wording.SITES.get(skip_site, skip_site), f"without {wording.NORMS.get(norm_site, norm_site)}")
            name = model if len(readings) == 1 else f"{model}, λ on {', '.join(where)}"
            tabs.append(_tab(name, layers, series, part) | {"model": model})
    return tabs


def _arm_name(point: pd.Series, names_lam: bool, experiment: str) -> str:
    words = [] if pd.isna(point["gating"]) else ["gate" if point["gating"] else "no gate"]
    if experiment == "ablate-s4d":
        words.append("skip" if point["lam"] else "no skip")
    elif names_lam:
        words.append(wording.lam_word(point["lam"]))
    words.append("LN" if point["layernorm"] else "no LN")
    return ", ".join([*words, *(["random weights"] if point["init"] == "random" else [])])


def _facets(part: pd.DataFrame, of_model: pd.DataFrame) -> list[str]:
    """In words, what tells this arm from the others of its model."""
    first = part.iloc[0]
    words = {
        "gating": wording.gate_word(first["gating"]),
        "layernorm": "LN" if first["layernorm"] else "no LN",
        "skip_site": f"λ on {wording.SITES.get(first['skip_site'], first['skip_site'])}",
        "norm_site": f"norm site {first['norm_site']}",
        "init": "random weights" if first["init"] == "random" else "trained",
    }
    return [text for column, text in words.items() if of_model[column].nunique(dropna=False) > 1]


def both_themes(colour: str) -> list[str]:
    """A colour for a light page, and the same hue with its lightness mirrored for a dark one."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    mirrored = colorsys.hls_to_rgb(hue, 0.92 - 0.62 * lightness, 0.75 * saturation)
    return [colour, "#" + "".join(f"{round(255 * channel):02x}" for channel in mirrored)]
