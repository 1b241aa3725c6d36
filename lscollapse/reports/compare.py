"""Two finished runs side by side: what differs in their configuration, and in their numbers.

The yardstick is the spread over excerpts (of Table 1: over seeds): a difference of two means counts as within it up to one
standard deviation, the band that the figures draw, or up to four standard errors where that is more. Of 32 unpaired excerpts
the two are the same; of fewer, means differ by a whole spread by chance. Where both runs read the same excerpts the standard
error is that of the paired differences, else that of two independent means. `mu` and `grad_norm` are compared by their logarithms,
which are right where the value overflows. What rounding leaves unresolved in a run is compared with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lscollapse.core.files import changes
from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.rows import edited_words, read_rows
from lscollapse.core.table import KNOWN, LOGARITHMIC, LOST, POSITION, UNRESOLVED, lambda_word

ARM = ["model", "init", "arm", "lam"]
CELL = ["name", "measure", "layer"]  # name: the arm in words
RECORDED = ("versions", "python", "machine", "device", "git")  # of the manifest, beside the identity
STANDARD_ERRORS = 4.0  # that two means may be apart


@dataclass(frozen=True)
class Comparison:
    """What differs between runs A and B.

    Attributes:
        configuration: one line a setting, "key: in A, now in B".
        only_a, only_b: models and arms that one run has.
        lost: arms where one run lost layers to overflow or NaN, or leaves layers unresolved, that the other has.
        differences: per arm and measure the layer with the largest ratio, largest first: columns name, measure, layer, a, b
            (means over excerpts), difference = b - a, spread (standard deviation over excerpts, at least what bounds
            and rounding leave open), error (standard error of the difference; NaN for one excerpt), ratio = |difference| / max(spread,
            STANDARD_ERRORS x error): beyond the spread above 1.
        notes: how they were compared, where it is not plain.
        sentence: the verdict in words.
        alike: whether all that both have is identical or within the spread.
    """

    configuration: list[str]
    only_a: list[str]
    only_b: list[str]
    lost: list[str]
    differences: pd.DataFrame
    notes: list[str]
    sentence: str
    alike: bool


def compare(run_a: Path, run_b: Path, verified: bool = True) -> Comparison:
    """Compare two run folders with rows of measurements.

    Models are matched by name; a single one that only A has is matched with a single one that only B has. Nets of
    different depth are compared at their last layers. Where `verified` is false, a table that was edited is compared too.

    Raises:
        RunFolderError: not the folder of a finished run, or one without measurements of layers.
    """
    a, b = _rows(run_a, verified), _rows(run_b, verified)
    manifests = read_manifest(run_a), read_manifest(run_b)
    notes = list(dict.fromkeys(words for run in (run_a, run_b) if (words := edited_words(run))))
    b, renamed = _matched(a, b, notes)
    a, b = (_named(rows) for rows in _one_depth(a, b, notes))
    common = set(a["name"]) & set(b["name"])
    only_a, only_b = (_arms(rows[~rows["name"].isin(common)]) for rows in (a, b))
    a, b = (rows[rows["name"].isin(common)] for rows in (a, b))
    paired = _paired(*manifests, renamed)
    others = [model for model in dict.fromkeys(a["model"]) if model not in paired and _loaded(manifests[0])]
    notes += [f"{model}: not the same excerpts, so only their means are compared" for model in others]
    table, lost = _differences(a, b, paired), _lost(a, b)
    sentence, alike = _verdict(a, b, table, len(lost))
    return Comparison(_configuration(*manifests, renamed), only_a, only_b, lost, table, notes, sentence, alike)


def _rows(run: Path, verified: bool) -> pd.DataFrame:
    """The rows of a run with `lam` in words and `number`, what is compared: NaN where it is not known."""
    rows = read_rows(run, verified)
    if "mixer" in rows.columns:
        _refuse_without(run, rows, ("task", "lam", "lr", "seed", "measure", "value", "status"))
        return _of_table1(rows)
    _refuse_without(run, rows, (*ARM, "measure", "layer", "excerpt", "value", "log10", "status", "bound", "floor"))
    rows = rows[rows["measure"] != POSITION]
    number = rows["value"].where(~rows["measure"].isin(LOGARITHMIC), rows["log10"])
    return rows.assign(number=number.where(rows["status"].isin(KNOWN)), lam=rows["lam"].map(lambda_word))


def _refuse_without(run: Path, rows: pd.DataFrame, needed: Sequence[str]) -> None:
    missing = set(needed) - set(rows.columns)
    if missing:
        raise RunFolderError(f"{run} has no column {min(missing)!r}: give runs of measurements or of table1")


def _of_table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies as rows of measurements: seeds stand where excerpts do."""
    test = rows[rows["measure"] == "test_accuracy"]
    return test.assign(
        model=test["task"] + " " + test["mixer"], init="trained", arm="trained", layer=0, excerpt=test["seed"],
        number=test["value"], bound=0.0, floor=0.0, rounding=0.0,
    )  # fmt: skip


def _configuration(a: dict[str, Any], b: dict[str, Any], renamed: dict[str, str]) -> list[str]:
    """What differs between the manifests; of the models only those that are compared."""
    theirs = {(s["model"], _init_of(s)): s for s in _loaded(b)}
    old, new = ({**m["identity"], "subjects": {}, **{key: m.get(key) for key in RECORDED}} for m in (a, b))
    for ours in _loaded(a):
        partner = theirs.get((renamed.get(ours["model"], ours["model"]), _init_of(ours)))
        if partner:
            name = ours["model"] + _init(_init_of(ours))
            old["subjects"][name], new["subjects"][name] = ours, partner
    return changes(old, new)


def _loaded(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What a manifest says of every model that was loaded; "subjects" is what run folders have always called them."""
    loaded: list[dict[str, Any]] = manifest["identity"].get("subjects", [])
    return loaded


def _init_of(loaded: dict[str, Any]) -> str:
    return str(loaded.get("init", "trained"))


def _init(init: str) -> str:
    return " (random)" if init == "random" else ""


def _paired(a: dict[str, Any], b: dict[str, Any], renamed: dict[str, str]) -> set[str]:
    """The models of A that read the same excerpts in B."""
    read = [{s["model"]: s.get("excerpts_sha256") for s in _loaded(m)} for m in (a, b)]
    return {model for model, digest in read[0].items() if digest and digest == read[1].get(renamed.get(model, model))}


def _matched(a: pd.DataFrame, b: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """B with a model that A lacks under the name of the one that B lacks, where each is the only one."""
    (ours, theirs) = (sorted(set(x["model"]) - set(y["model"])) for x, y in ((a, b), (b, a)))
    if len(ours) != 1 or len(theirs) != 1:
        return b, {}
    notes.append(f"{ours[0]} of A is compared with {theirs[0]} of B")
    return b.assign(model=b["model"].replace(theirs[0], ours[0])), {ours[0]: theirs[0]}


def _one_depth(a: pd.DataFrame, b: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both without the layers before the last of a model that is not as deep in A as in B; B's last is numbered as A's."""
    depths = [rows.groupby("model")["layer"].max() for rows in (a, b)]
    for model in depths[0].index.intersection(depths[1].index):
        ours, theirs = int(depths[0][model]), int(depths[1][model])
        if ours == theirs:
            continue
        notes.append(f"{model} has {ours} layers in A and {theirs} in B: the last ones are compared")
        a = a[(a["model"] != model) | (a["layer"] == ours)]
        b = b[(b["model"] != model) | (b["layer"] == theirs)]
        b = b.assign(layer=b["layer"].mask(b["model"] == model, ours))
    return a, b


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column `name`, the arm in words."""
    arms = rows[ARM].drop_duplicates()
    names = [f"{model}{_init(init)}: {arm}, lambda {lam}" for model, init, arm, lam in arms.itertuples(index=False)]
    return rows.merge(arms.assign(name=names), on=ARM, how="left")


def _arms(rows: pd.DataFrame) -> list[str]:
    """One line for every model and arm, with its lambdas."""
    arms = rows[ARM].drop_duplicates().groupby(["model", "init", "arm"], sort=False)["lam"]
    return [f"{model}{_init(str(init))}: {arm}, lambda {', '.join(lams)}" for (model, init, arm), lams in arms]


def _moments(rows: pd.DataFrame) -> pd.DataFrame:
    """Per cell mean, variance and number of the excerpts, and what its numbers are uncertain by."""
    doubt = rows[["floor", "bound", "rounding"]].max(axis=1).fillna(0.0)
    what = {"mean": ("number", "mean"), "var": ("number", "var"), "n": ("number", "count"), "doubt": ("doubt", "max")}
    return rows.assign(doubt=doubt).groupby(CELL, sort=False).agg(**what).reset_index()


def _differences(a: pd.DataFrame, b: pd.DataFrame, paired: set[str]) -> pd.DataFrame:
    """The largest difference of every arm and measure; see Comparison.differences."""
    cells = _moments(a).merge(_moments(b), on=CELL, suffixes=("_a", "_b"))
    cells = cells[(cells["n_a"] > 0) & (cells["n_b"] > 0)]
    both = a.merge(b, on=[*CELL, "excerpt"], suffixes=("_a", "_b"))
    both = both[both["name"].map(dict(zip(a["name"], a["model"], strict=True))).isin(paired)]
    steps = both.assign(step=both["number_b"] - both["number_a"]).groupby(CELL, sort=False)["step"]
    pairs = steps.agg(step="mean", deviation="std", n="count").reset_index()
    cells = cells.merge(pairs, on=CELL, how="left")
    step = cells["step"].fillna(cells["mean_b"] - cells["mean_a"])
    independent = np.sqrt(cells["var_a"] / cells["n_a"] + cells["var_b"] / cells["n_b"])
    # Of the same excerpts the standard error of the paired differences, else that of two independent means.
    error = (cells["deviation"] / np.sqrt(cells["n"])).where(cells["step"].notna(), independent)
    spread = np.sqrt((cells["var_a"].fillna(0.0) + cells["var_b"].fillna(0.0)) / 2)  # pooled over both runs
    spread = np.maximum(spread, cells[["doubt_a", "doubt_b"]].max(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = step.abs() / np.fmax(spread, STANDARD_ERRORS * error)
    table = cells[CELL].assign(
        a=cells["mean_a"], b=cells["mean_b"], difference=step, spread=spread, error=error,
        ratio=ratio.where(step != 0.0, 0.0),
    )  # fmt: skip
    largest = table.sort_values("ratio", ascending=False, kind="stable").drop_duplicates(["name", "measure"])
    return largest.reset_index(drop=True)


def _lost(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """One line for every arm of which the runs did not lose the same layers, or leave the same ones unresolved."""
    where: list[dict[str, str]] = []
    for rows in (a, b):
        relative, words = rows[rows["measure"] == "relative_mu"], dict[str, str]()
        for how, statuses in (("unresolved from", (UNRESOLVED,)), ("from", LOST)):
            first = relative[relative["status"].isin(statuses)].groupby("name", sort=False)["layer"].min()
            for name, layer in first.items():
                words[str(name)] = " and ".join(filter(None, (words.get(str(name)), f"{how} layer {layer}")))
        where.append(words)
    pairs = {name: [words.get(name, "nowhere") for words in where] for name in dict.fromkeys([*where[0], *where[1]])}
    return [f"{name}: A {ours}, B {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _verdict(a: pd.DataFrame, b: pd.DataFrame, table: pd.DataFrame, lost: int) -> tuple[str, bool]:
    arms, apart = a["name"].nunique(), table.loc[table["ratio"] > 1.0, "name"].nunique()
    if not arms:
        return "nothing to compare: the runs have no arm in common", False
    both = a.merge(b, on=[*CELL, "excerpt"], suffixes=("_a", "_b"))
    same = (both["value_a"] == both["value_b"]) | (both["value_a"].isna() & both["value_b"].isna())
    same &= both["status_a"] == both["status_b"]
    if len(a) == len(b) == len(both) and same.all():
        return f"identical: every number of {arms} arms", True
    parts = [f"beyond the spread in {apart} of {arms} arms"] if apart else []
    parts += [f"other layers lost or unresolved in {lost} of {arms} arms"] if lost else []
    unknown = arms - table["name"].nunique()
    parts += [f"nothing that both know in {unknown} of {arms} arms"] if unknown else []
    if parts:
        return "; ".join(parts), False
    doubtful = pd.concat([rows.loc[rows["status"] == UNRESOLVED, "name"] for rows in (a, b)]).nunique()
    aside = f" as far as they are resolved; {doubtful} of them are not everywhere" if doubtful else ""
    return f"within the spread in all {arms} arms{aside}", True
