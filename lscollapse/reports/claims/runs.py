"""Run folders of any kind -> the verdict on every sentence of the paper that they can judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lscollapse.core.run_folder import RunFolderError, read_manifest, read_rows
from lscollapse.reports.claims import sentences as claims
from lscollapse.reports.claims import table1 as claims_table1
from lscollapse.reports.claims import theory as claims_theory
from lscollapse.reports.claims.sentences import CLAIMS
from lscollapse.reports.verdict import NOT_MEASURED, Finding

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("run", "reading", "claim", "sentence", "model", "verdict", "numbers")


def table(runs: Sequence[Path], theory: bool = False) -> pd.DataFrame:
    """One row for each sentence and model: columns COLUMNS, in the order of the paper.

    A sentence that one run measures is not listed as not measured for another run of the same model; one that no run is
    about is listed once, with no model. `reading` is empty but for runs of --all-readings.

    Args:
        runs: folders that the verbs wrote: sweeps, ablations, readings, measurements, Table 1, `theory verify`, `theory
            bound`.
        theory: put the theory's statements to the test now.

    Raises:
        RunFolderError: a folder that holds none of these.
    """
    import pandas as pd

    found = [
        {"run": str(run), "reading": reading, **asdict(finding)} for run in runs for reading, finding in judge(run)
    ]
    if theory:
        found += [{"run": "", "reading": "", **asdict(finding)} for finding in claims_theory.check()]
    rows = pd.DataFrame(found, columns=list(COLUMNS))
    silent = [{"run": "", "reading": "", "claim": name, "sentence": sentence, "model": "", "verdict": NOT_MEASURED,
               "numbers": ""} for name, (sentence, _) in catalogue().items() if name not in set(rows["claim"])]  # fmt: skip
    rows = pd.concat([rows, pd.DataFrame(silent, columns=list(COLUMNS))], ignore_index=True)
    places = {name: place for place, name in enumerate(catalogue())}
    rows = rows.sort_values("claim", key=lambda names: names.map(places), kind="stable")
    return _folded(rows).reset_index(drop=True)


def catalogue() -> dict[str, tuple[str, str]]:
    """Name -> (sentence, threshold) of all claims, in the order of the paper; the theory's statements are one entry."""
    figures = {name: (claim.sentence, claim.threshold) for name, claim in CLAIMS.items()}
    norms = {claims_theory.NORMS: claims_theory.CLAIMS[claims_theory.NORMS]}  # beside the other sentences on Figure 4
    return figures | norms | claims_table1.CLAIMS | claims_theory.CLAIMS


def sentences() -> pd.DataFrame:
    """The catalogue as a table: columns claim, sentence, threshold."""
    import pandas as pd

    lines = [(name, *words) for name, words in catalogue().items()]
    return pd.DataFrame(lines, columns=["claim", "sentence", "threshold"])


def judge(run: Path) -> Iterator[tuple[str, Finding]]:
    """(reading, finding) of one folder."""
    if (run / "manifest.json").exists():
        experiment = read_manifest(run).get("identity", {}).get("experiment")
        yield from READERS.get(experiment, _default_reading)(read_rows(run))
    elif (run / claims_theory.VERIFY).exists():
        yield from (("", finding) for finding in claims_theory.verified(run))
    elif (run / claims_theory.BOUNDS).exists():
        yield from (("", finding) for finding in claims_theory.bounded(run))
    else:
        raise RunFolderError(
            f"{run} holds no manifest.json, {claims_theory.VERIFY} or {claims_theory.BOUNDS}: give the folder of a finished"
            " run, of `theory verify --out` or of `theory bound --out`"
        )


def _default_reading(rows: pd.DataFrame) -> Iterator[tuple[str, Finding]]:
    yield from (("", finding) for finding in claims.judge(rows))


def _all_readings(rows: pd.DataFrame) -> Iterator[tuple[str, Finding]]:
    """Readings that differ in the removed norm only and come to the same are one."""
    verdicts = claims.judge_readings(rows)
    norms = verdicts.groupby("skip_site")["norm_site"].unique()
    words = [field.name for field in fields(Finding)]
    for _, part in verdicts.groupby(["skip_site", *words], sort=False):
        row, removed = part.iloc[0], list(part["norm_site"])
        every = len(removed) == len(norms[row["skip_site"]])
        without = "" if every else f", LN=False removes {' or '.join(removed)}"
        yield f"{row['skip_site']} skip{without}", Finding(*(str(row[word]) for word in words))


def _table1(rows: pd.DataFrame) -> Iterator[tuple[str, Finding]]:
    yield from (("", finding) for finding in claims_table1.judge(rows))


READERS: dict[str | None, Callable[[pd.DataFrame], Iterator[tuple[str, Finding]]]] = {
    "all-readings": _all_readings,
    "table1": _table1,
}


def _folded(rows: pd.DataFrame) -> pd.DataFrame:
    """Without what another run says in the same words, and without "not measured" where another run measured it.

    A reading that says what the default reading says is the default one.
    """
    subject = ["claim", "sentence", "model"]
    words = [*subject, "verdict", "numbers"]
    rows = rows.drop_duplicates(["reading", *words])
    default, said = rows["reading"] == "", rows[words].apply(tuple, axis=1)
    rows = rows[default | ~said.isin(said[default])]
    measured = rows["verdict"] != NOT_MEASURED
    known = measured.groupby([rows[name] for name in ["reading", *subject]]).transform("any")
    return rows[measured | ~known]
