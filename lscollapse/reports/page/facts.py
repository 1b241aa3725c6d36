"""What the page says in words and tables: verdicts, warnings, provenance, bounds. Plain data; the template escapes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lscollapse.core.table import POSITION, UNRESOLVED, reads_pixels
from lscollapse.reports import table1
from lscollapse.reports.claims.sentences import catalogue, judged
from lscollapse.reports.figures import wording
from lscollapse.reports.figures.points import groups_of, summarise
from lscollapse.reports.massive import pooled
from lscollapse.reports.page.folders import Bounds, Run
from lscollapse.reports.verdict import DISAGREE, NOT_EVEN, VERDICTS, ArmCurves, arms

PRIVATE = ("contact", "cache_dir")  # settings that say who ran it and where, not what
MANY = 5  # names that are counted, not listed
ROWS = 200  # of a table that is none of measurements


def models(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(model for run in runs for model in run.rows["model"]))


def verdicts(folders: Mapping[Path, str], verified: bool = True) -> list[dict[str, Any]]:
    """Every claim with what these folders (and their names) say of it: {claim, sentence, threshold, verdicts: [{who, verdict, numbers}]}.

    `who` is a model; where a claim stands for several sentences, as the theory's statements do, it is the sentence.
    """
    found = []
    table, names = judged(list(folders), verified=verified), {str(path): name for path, name in folders.items()}
    for claim, (sentence, threshold) in catalogue().items():
        part = table[table["claim"] == claim]
        several = part["sentence"].nunique() > 1
        again = part.duplicated(["sentence", "model", "reading"], keep=False)  # two runs that differ
        lines = []
        for line, named in zip(part.to_dict("records"), again, strict=True):
            aside = ", ".join(filter(None, (line["reading"], names[line["run"]] if named else "")))
            who = line["sentence"] if several else f"{line['model']} ({aside})" if aside else line["model"]
            numbers = line["numbers"] or ("" if line["model"] else "no run here is about it")
            lines.append({"who": who, "verdict": line["verdict"], "numbers": numbers})
        found.append({"claim": claim, "sentence": sentence, "threshold": threshold, "verdicts": lines})
    return found


def tally(found: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many verdicts of each kind there are."""
    counts = Counter(verdict["verdict"] for finding in found for verdict in finding["verdicts"])
    return {verdict: counts[verdict] for verdict in VERDICTS}


def warnings(measured: Sequence[Run], others: Sequence[Run], found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a reader has to know before the figures, as {text, runs}, the gravest first."""
    runs = [*measured, *others]
    said = [(run.name, run.edited) for run in runs]
    said.append(("", wording.embedded_note(models(measured))))
    wrong = "; ".join(filter(None, map(_disproved, found)))
    said.append(("", f"The paper's statements that do not hold here: {wrong}." if wrong else ""))
    said += [(run.name, text) for run in measured for text in _of_rows(run)]
    said += [(run.name, text) for run in runs for text in _of_code(run.manifest)]
    commits = {(run.manifest.get("git") or {}).get("commit") for run in runs}
    if len(commits) > 1:
        said.append(("", f"These runs were made by {len(commits)} different commits of lscollapse."))
    runs_of: dict[str, list[str]] = {}
    for run_name, text in said:
        runs_of.setdefault(text, []).append(run_name)
    return [{"text": text, "runs": list(filter(None, names))} for text, names in runs_of.items() if text]


def _disproved(finding: dict[str, Any]) -> str:
    every = finding["verdicts"]
    who = [verdict["who"] for verdict in every if verdict["verdict"] == DISAGREE]
    names = ", ".join(who) if len(who) < MANY else f"{len(who)} of {len(every)}"
    return f"{finding['claim']}: {names}" if who else ""


def _of_rows(run: Run) -> Iterator[str]:
    rows, unit = run.rows, "image" if reads_pixels(run.rows) else "excerpt"
    for model, part in rows.groupby("model", sort=False):
        if part["excerpt"].nunique() == 1:
            yield f"{model}: one {unit} only, so nothing is known of the spread."
        if set(part["init"]) == {"random"}:
            yield f"{model}: random weights, not trained."
    present = [measure for measure in wording.PAIR if (rows["measure"] == measure).any()]
    if not present:
        return
    points = summarise(rows, present)
    yield wording.disagreement(points, rows)
    yield from _lost(points[points["measure"] == present[0]])
    yield from _massive(rows)
    yield from _unresolved(rows)
    certified = rows["status"].eq("certified").mean()
    if certified:
        yield (
            f"{certified:.0%} of the rows were not computed: the weights prove that these layers change nothing the dtype"
            " resolves (status certified)."
        )


def _arm_name(model: str, init: str, arm: str) -> str:
    return f"{model}, {arm}{', random weights' if init == 'random' else ''}"


def _lost(points: pd.DataFrame) -> Iterator[str]:
    """Arms that left the range of their dtype, and arms that fell under its floor."""
    floors: dict[str, list[str]] = {}
    for (model, init, arm, lam), part in groups_of(points, ["model", "init", "arm", "lam"]):
        name = _arm_name(model, init, arm)
        end, below = wording.ends_with(part), part.loc[part["below_floor"] > 0, "layer"]
        if end:
            yield f"{name}, {wording.lam_word(lam)}: {end}. The curve stops there."
        if len(below):
            floors.setdefault(name, []).append(f"{wording.lam_word(lam)} from layer {below.min()}")
    for name, where in floors.items():
        yield f"{name}: not resolved by the dtype (below the floor) at {', '.join(where)}."


def _massive(rows: pd.DataFrame) -> Iterator[str]:
    """Arms in which one row decides relative mu: at which lambdas, whose it is, and where."""
    found: dict[str, list[ArmCurves]] = {}
    for arm in arms(rows):
        if arm.massive.layers:
            found.setdefault(_arm_name(arm.model, arm.init, arm.arm), []).append(arm)
    for name, own in found.items():
        lams = ", ".join(dict.fromkeys(wording.lam_word(arm.lam) for arm in own))
        words = pooled(arm.massive for arm in own).words
        yield f"{name}, {lams}: {words}. Relative μ weighs that row most there; angular μ weighs all alike."


def _unresolved(rows: pd.DataFrame) -> Iterator[str]:
    """Arms that rounding decides: of which measures, from which layer, in what dtype, and what to do."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    told = rows["measure"] != POSITION  # of rows that agree any may be the longest, and none is massive
    unresolved = rows[told & (rows["status"] == UNRESOLVED)]
    for (model, init, arm, dtype, lam), part in groups_of(unresolved, ["model", "init", "arm", "dtype", "lam"]):
        first: dict[str, list[str]] = {}
        for measure, layer in part.groupby("measure", sort=False)["layer"].min().items():
            where = wording.lam_word(lam) + (f" from layer {layer:g}" if layer == layer else "")
            first.setdefault(where, []).append(wording.measure_word(str(measure)))
        for where, measures in first.items():
            found.setdefault((_arm_name(model, init, arm), dtype), {}).setdefault(", ".join(measures), []).append(where)
    for (name, dtype), places in found.items():
        listed = "; ".join(f"{measures} at {', '.join(where)}" for measures, where in places.items())
        mend = NOT_EVEN.format("them") if dtype == "float64" else "run with --dtype float64"
        yield f"{name}: unresolved, because rounding in {dtype} decides the values: {listed}. They are not known; {mend}."


def _of_code(manifest: dict[str, Any]) -> Iterator[str]:
    git = manifest.get("git")
    if git is None:
        yield "The state of the code is not recorded: it was not run from a git checkout."
    elif git.get("dirty"):
        yield f"Made with uncommitted changes on top of commit {str(git.get('commit'))[:12]}."


def provenance(run: Run) -> dict[str, Any]:
    """Name, experiment, and tables of (what, value) of one run: what decided the rows, and what computed them."""
    manifest = run.manifest
    identity, git = manifest["identity"], manifest.get("git") or {}
    peak, wall = manifest.get("peak_rss_bytes"), manifest.get("wall_seconds")
    computed = {
        "commit": f"{git.get('commit', 'unknown')}{' with uncommitted changes' if git.get('dirty') else ''}",
        "Python": manifest.get("python"),
        **{name: version for name, version in manifest.get("versions", {}).items() if version},
        "machine": manifest.get("machine"),
        "device": manifest.get("device"),
        "wall time": None if wall is None else f"{wall:g} s",
        "peak memory": None if peak is None else f"{peak / 2**30:.2f} GiB",
        "rows": f"{len(run.rows):,}",
    }
    loaded = [
        (known.get("model", ""), [(name, _words(value)) for name, value in known.items() if name != "model" and value])
        for known in identity.get("subjects", [])
    ]
    return {
        "name": run.name,
        "experiment": run.experiment,
        "config": [(key, _words(value)) for key, value in _flat(identity.get("config", {})) if value not in (None, "")],
        "computed": [(key, str(value)) for key, value in computed.items() if value],
        "loaded": loaded,
        "titles": {model: ", ".join(titles) for model, titles in excerpt_titles(run).items()},
    }


def excerpt_titles(run: Run) -> dict[str, list[str]]:
    """Titles of the excerpts of each model, in the order of the table's `excerpt`."""
    known = run.manifest.get("excerpts", {})
    titles = {}
    for model, part in run.rows.groupby("model", sort=False) if "model" in run.rows else ():
        names = known.get(model, {}).get("titles", [])
        numbers = sorted(part["excerpt"].unique()) if "excerpt" in part else []
        titles[str(model)] = [str(names[i]) if 0 <= i < len(names) else f"excerpt {i}" for i in numbers]
    return titles


def _flat(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{before}{key}.")
        elif key not in PRIVATE:
            yield before + key, inner


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def other_table(run: Run) -> dict[str, Any]:
    """The first rows of a table that is none of measurements; of Table 1 what table1.md shows."""
    if run.experiment == "table1":
        columns, *cells = table1.table(run.rows)
        caption = f"{table1.NOTE} {'; '.join(table1.made_from(run.rows))}."
        return {"name": run.name, "title": table1.TITLE, "columns": columns, "cells": cells, "caption": caption}
    rows = run.rows.head(ROWS)
    cells = [[_words(value) for value in row] for row in rows.itertuples(index=False)]
    left_out = len(run.rows) - len(rows)
    caption = f"{left_out} more rows are in the run folder." if left_out else ""
    return {"name": run.name, "title": run.experiment, "columns": list(map(str, rows.columns)), "cells": cells,
            "caption": caption}  # fmt: skip


def bounds_tables(folders: Iterable[Bounds]) -> list[dict[str, Any]]:
    """For each folder its bounds as (bound, sign, |lambda| in words, note), in the order of its file."""
    tables = []
    for folder in folders:
        signs = folder.bounds["sign"].map(wording.SIGNS).fillna("")
        lines = folder.bounds.assign(sign=signs)[["bound", "sign", "reads", "note"]].itertuples(index=False, name=None)
        tables.append({"name": folder.name, "lines": list(lines)})
    return tables
