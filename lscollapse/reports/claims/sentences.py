"""Tables and run folders -> the verdict on every sentence of the paper that they can judge, with the numbers.

The sentences on Figures 1-4 and their predicates are in `figures`; `table1` judges Table 1 and `theory` the theorems.
docs/claims.md lists every sentence with its threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.rows import read_rows
from lscollapse.reports.claims import table1 as on_table1
from lscollapse.reports.claims import theory as on_theory
from lscollapse.reports.claims.curves import Curves, NotMeasured
from lscollapse.reports.claims.figures import CLAIMS
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, Finding

COLUMNS = ("run", "reading", "claim", "sentence", "model", "verdict", "numbers", "note")
NEEDS_GATE = ("figure 1", "figure 3")


def judge(rows: pd.DataFrame) -> Iterator[Finding]:
    """Every claim for every model of a table (one skip_site and norm_site reading of it).

    Where an arm that a claim needs lacks layers, or rounding leaves them unresolved, it is not measured, and the numbers say
    what is missing and what was seen before. S4D is judged on Figure 4 only, a transformer on Figure 2 only. The claims are
    on relative mu; a note says where one massive row decides it in an arm that was used, and what the directions say.
    """
    needed = ("model", "measure", "init", "gating", "layernorm", "lam", "layer", "value", "status", "dtype")
    missing = set(needed) - set(rows)
    if missing:
        raise RunFolderError(f"the table has no column {min(missing)}: give the rows of a run folder")
    for model in dict.fromkeys(rows["model"]):
        curves = Curves(rows[rows["model"] == model])
        for claim, (sentence, predicate, _) in CLAIMS.items():
            if curves.images != claim.startswith("figure 4") or (not curves.gated and claim.startswith(NEEDS_GATE)):
                continue
            curves.used.clear()
            try:
                holds, numbers = predicate(curves)
            except NotMeasured as lacking:
                yield Finding(claim, sentence, model, NOT_MEASURED, str(lacking))
            else:
                yield Finding(claim, sentence, model, AGREE if holds else DISAGREE, numbers, curves.note())


def judge_readings(rows: pd.DataFrame) -> pd.DataFrame:
    """The claims on Figures 1 and 3 under every reading: columns model, skip_site, norm_site, claim, sentence, verdict, numbers,
    and note where there is one.

    Of a reading (skip_site, norm_site), the arms with LayerNorm are those of its skip_site, whatever norm_site they carry.
    """
    found = []
    without = rows[~rows["layernorm"].astype(bool)]
    for skip_site, norm_site in dict.fromkeys(zip(without["skip_site"], without["norm_site"], strict=True)):
        chosen = (rows["skip_site"] == skip_site) & (rows["layernorm"].astype(bool) | (rows["norm_site"] == norm_site))
        for finding in judge(rows[chosen]):
            if finding.claim.startswith(NEEDS_GATE):
                found.append({"skip_site": skip_site, "norm_site": norm_site, **asdict(finding)})
    return noted(pd.DataFrame(found))


def judged(runs: Sequence[Path], theory: bool = False, verified: bool = True) -> pd.DataFrame:
    """One row for each sentence and model: columns COLUMNS, without `note` where there is none, in the order of the paper.

    A sentence that one run measures is not listed as not measured for another run of the same model; one that no run is
    about is listed once, with no model. `reading` is empty but for runs of --all-readings.

    Args:
        runs: folders that the verbs wrote: sweeps, ablations, readings, measurements, Table 1, `theory verify`, `theory
            bound`.
        theory: put the theory's statements to the test now.
        verified: refuse a table that was edited since.

    Raises:
        RunFolderError: a folder that holds none of these.
    """
    found = [(str(run), reading, finding) for run in runs for reading, finding in findings(run, verified)]
    found += [("", "", finding) for finding in (on_theory.statements_now() if theory else ())]
    spoken, order = {finding.claim for _, _, finding in found}, catalogue()
    found += [("", "", Finding(name, sentence, "", NOT_MEASURED, ""))
              for name, (sentence, _) in order.items() if name not in spoken]  # fmt: skip
    lines = [{"run": run, "reading": reading, **asdict(finding)} for run, reading, finding in found]
    rows = pd.DataFrame(lines, columns=list(COLUMNS))
    rows = rows.sort_values("claim", key=lambda names: names.map(list(order).index), kind="stable")
    return noted(_folded(rows).reset_index(drop=True))


def footnotes(rows: pd.DataFrame) -> list[str]:
    """What a reader of a table of claims has to know, each note once, with the claims that it is about."""
    claims: dict[str, dict[str, None]] = {}
    for row in rows.to_dict("records"):
        if row.get("note"):
            claims.setdefault(f"{row['model']}, {row['note']}", {})[row["claim"]] = None
    return [f"on {', '.join(names)}: {note}" for note, names in claims.items()]


def noted(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the column of notes where there is none."""
    return rows if "note" not in rows or (rows["note"] != "").any() else rows.drop(columns="note")


def catalogue() -> dict[str, tuple[str, str]]:
    """Name -> (sentence, threshold) of all claims, in the order of the paper; the theory's statements are one entry."""
    figures = {name: (claim.sentence, claim.threshold) for name, claim in CLAIMS.items()}
    norms = {on_theory.NORMS: on_theory.SENTENCES[on_theory.NORMS]}  # beside the other sentences on Figure 4
    return figures | norms | on_table1.SENTENCES | on_theory.SENTENCES


def sentences() -> pd.DataFrame:
    """The catalogue as a table: columns claim, sentence, threshold."""
    lines = [(name, *words) for name, words in catalogue().items()]
    return pd.DataFrame(lines, columns=["claim", "sentence", "threshold"])


def findings(run: Path, verified: bool = True) -> Iterator[tuple[str, Finding]]:
    """(reading, finding) of one folder."""
    if (run / "manifest.json").exists():
        experiment, rows = read_manifest(run)["identity"].get("experiment"), read_rows(run, verified)
        if experiment == "all-readings":
            yield from _of_readings(rows)
            return
        found = on_table1.findings(rows) if experiment == "table1" else judge(rows)
    elif (run / on_theory.VERIFY).exists():
        found = on_theory.verified(run)
    elif (run / on_theory.BOUNDS).exists():
        found = on_theory.bounded(run)
    else:
        raise RunFolderError(
            f"{run} holds no manifest.json, {on_theory.VERIFY} or {on_theory.BOUNDS}: give the folder of a finished"
            " run, of `theory verify --out` or of `theory bound --out`"
        )
    yield from (("", finding) for finding in found)


def _of_readings(rows: pd.DataFrame) -> Iterator[tuple[str, Finding]]:
    """Readings that differ in the removed norm only and come to the same are one."""
    verdicts = judge_readings(rows)
    norms = verdicts.groupby("skip_site")["norm_site"].unique()
    words = [field.name for field in fields(Finding) if field.name in verdicts]
    for _, part in verdicts.groupby(["skip_site", *words], sort=False):
        row, removed = part.iloc[0], list(part["norm_site"])
        every = len(removed) == len(norms[row["skip_site"]])
        without = "" if every else f", LN=False removes {' or '.join(removed)}"
        yield f"{row['skip_site']} skip{without}", Finding(*(str(row[word]) for word in words))


def _folded(rows: pd.DataFrame) -> pd.DataFrame:
    """Without what another run says in the same words, and without "not measured" where another run measured it.

    A reading that says what the default reading says is the default one.
    """
    about = ["claim", "sentence", "model"]
    words = [*about, "verdict", "numbers"]
    rows = rows.drop_duplicates(["reading", *words])
    default, said = rows["reading"] == "", rows[words].apply(tuple, axis=1)
    rows = rows[default | ~said.isin(said[default])]
    measured = rows["verdict"] != NOT_MEASURED
    known = measured.groupby([rows[name] for name in ["reading", *about]]).transform("any")
    return rows[measured | ~known]
