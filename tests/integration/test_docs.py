"""The Python examples of docs/python.md and of the README run, and print what they say; numbers quoted are those of results/."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import logging

from lscollapse.core.registry import ENTRIES
from lscollapse.core.table import ANGULAR
from tests import ROOT
from tests.equivalence import tiny
from tests.equivalence.plain_models import plain_measures

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(file: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


def run(file: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> int:
    """Runs the python blocks of a file in one namespace; compares with a text block that follows one. Counts both."""
    found = blocks(file)
    ran = 0
    for (language, code), (following, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "python":
            continue
        exec(compile(code, f"{file}, block {ran}", "exec"), names)
        printed = capsys.readouterr().out
        ran += 1
        if following == "text":
            assert printed == shown, f"{file} shows\n{shown}\nand this is printed\n{printed}"
            ran += 1
    return ran


def test_the_page_on_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    assert run("docs/python.md", {}, capsys) == 15


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It speaks of a model with a gate and its token ids."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny.mamba2(), "input_ids": torch.as_tensor(tiny.ids(2, 8))}
    assert run("README.md", names, capsys) > 0
    assert len(names["rows"])


# --- numbers are written once, by the program, and quoted from there ---

RESULTS = ROOT / "results"
QUOTED = {  # row of README.md or docs/theory.md -> the bounds it quotes, each for the signs that there are
    "Theorem 4.1, condition (7) alone, a = 0.9": ("Theorem 4.1, condition (7) alone, a = 0.9",),
    "Theorem 4.1, (7) alone, a = 0.9": ("Theorem 4.1, condition (7) alone, a = 0.9",),
    "Theorem 4.1 with its hypothesis b": ("Theorem 4.1 with b, a = 0.9",),
    "Theorem 4.1 with b, a = 0.9": ("Theorem 4.1 with b, a = 0.9",),
    "pre-norm certificate, from the weights, every depth": ("pre-norm certificate, weights only, every depth",),
    "pre-norm, weights only: this depth / every depth": (
        "pre-norm certificate, weights only, this depth", "pre-norm certificate, weights only, every depth",
    ),
    "angle certificate, measured gains, lambda > 0 / < 0": ("measured gains, every depth|sublayers alone|mixers alone",),
    "certificate with measured gains, λ > 0 / λ < 0": ("measured gains, every depth|sublayers alone",),
    "needed, lambda > 0 / < 0": ("measured, relative mu",),
    "needed, λ > 0 / λ < 0": ("measured, relative mu",),
    "needed for the rank-1 residual": ("measured, rank-1 residual",),
}  # fmt: skip


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def tables(file: str) -> list[list[list[str]]]:
    """The cells of every table of a page, headings first."""
    found: list[list[list[str]]] = [[]]
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def bounds_in_words(model: str, bounds: tuple[str, ...]) -> str:
    rows = rows_of(RESULTS / "reference" / "theory" / f"bound-{model.replace(', no gate', '-no-gate')}" / "bounds.csv")
    words: dict[tuple[str, str], list[str]] = {}
    for bound in bounds:
        for row in rows:
            if re.search(bound if "|" in bound else re.escape(bound), row["bound"]):
                words.setdefault((bound, row["sign"]), []).append(row["reads"])
    return " / ".join(" or ".join(stretches) for stretches in words.values()) or "-"


@pytest.mark.parametrize("file", ["README.md", "docs/theory.md"])
def test_bounds_are_quoted_from_their_tables(file: str) -> None:
    (table,) = (table for table in tables(file) if table[0][1] == "mamba2-tiny, no gate")
    models, compared = table[0][1:], 0
    for name, *cells in table[2:]:
        if name in QUOTED:
            for model, cell in zip(models, cells, strict=True):
                assert re.sub(r" [†‡]| \(attention alone\)", "", cell) == bounds_in_words(model, QUOTED[name]), (
                    name,
                    model,
                )
                compared += 1
    assert compared == 6 * len(models)


def test_constants_are_quoted_from_their_tables() -> None:
    theory = RESULTS / "reference" / "theory"
    largest = {
        folder.name.removeprefix("bound-"): f"{max(float(row['C_M']) for row in rows_of(folder / 'heads.csv')):.3g}"
        for folder in theory.glob("bound-*") if (folder / "heads.csv").exists()
    }  # fmt: skip
    (table,) = (table for table in tables("docs/theory.md") if table[0][1] == "mamba2-tiny, no gate")
    (quoted,) = (cells for name, *cells in table if name.startswith("C_M"))
    assert quoted == [largest[model.replace(", no gate", "-no-gate")] for model in table[0][1:]]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"mamba2-tiny has C_M = {largest['mamba2-tiny-no-gate']} ({largest['mamba2-tiny']} with its gate)" in text
    layers = [float(row["C_M"]) for row in rows_of(theory / "bound-s4d-digits" / "layers.csv")]
    assert f"(largest channel of a layer: {min(layers):.1f} to {max(layers):.1f})" in text
    printed = [line["printed"] for line in json.loads((theory / "verify.json").read_text(encoding="utf-8"))]
    judged = sum(word in ("holds", "fails", "void", "existence only") for word in printed)
    assert f"of {judged} statements, {printed.count('fails')} do not hold as printed" in text


def test_table_1_is_quoted_from_its_table() -> None:
    """README, table1.md and table1.csv, which is in percent throughout, agree."""
    (quoted,) = (table for table in tables("README.md") if table[0][:2] == ["task", "mixer"])
    written, tests, *_ = tables("results/table1/table1.md")
    assert quoted == written
    cells = {(row[0], row[1]): row[2:5] for row in written[2:]}
    tasks, mixers = {"mqar": "MQAR", "image": "Image"}, dict(zip(
        ("attention", "linear", "mamba", "mamba2"), ("Transformer", "Lin. Transformer", "Mamba", "Mamba-2"), strict=True
    ))  # fmt: skip
    for row in rows_of(RESULTS / "table1" / "table1.csv"):
        text = f"{float(row['test_mean']):.1f} ± {float(row['test_sd']):.1f}"
        where = ["1", "learnt from -1", "learnt from 1"].index(row["lam"])
        assert cells[tasks[row["task"]], mixers[row["mixer"]]][where] == text
    verdicts = [row[-1] for row in tests[2:] if row[0] != "all"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Of {len(verdicts)} comparisons {verdicts.count('no worse')} exclude a loss of 2 points" in text
    average = [row[3] for row in tests if row[0] == "all"]
    assert "({} points from -1, {} from 1)".format(*average) in text


def test_what_rounding_does_is_quoted_from_its_tables() -> None:
    distances, covered = tables("docs/rounding.md")
    folder = RESULTS / "reference" / "rounding"
    drawn = {(float(row["lam"]), row["dtype"], row["layer"]): row for row in rows_of(folder / "rounding.csv")}
    layers = [heading.removeprefix("layer ") for heading in distances[0][2:]]
    assert len(distances[2:]) == 8
    for lam, dtype, *cells in distances[2:]:
        found = [float(drawn[float(lam.replace("−", "-")), dtype, layer]["difference"]) for layer in layers]
        assert cells == [f"{difference:.0e}".replace("e-0", "e-") for difference in found]
    lines = rows_of(folder / "coverage.csv")
    for cells, row in zip(covered[2:], lines, strict=True):
        shares = ("covered", "covered_relative_mu", "covered_at_once", "unresolved", "off")
        percents = [f"{100 * float(row[share]):.1f} %" for share in shares]
        assert cells[:2] + cells[3:6] + cells[7:] == [row["model"], row["dtype"], *percents]
        assert int(cells[2].replace(",", "")) == int(row["triples"])
        many, times = row["known_but_off"], row["largest_in_tolerances"]
        off = f"{int(many):,}" + (f" (to {float(times):.1f}x)" if times else "")
        assert cells[6] == f"{off} of {int(row['known']):,}"


def test_the_figures_are_resolved_as_far_as_the_readme_says() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    first, second = (rows_of(RESULTS / "reference" / f"figure{number}.csv") for number in (1, 2))
    assert "Rounding moves no value of this figure by more than 2e-4" in text
    assert 1e-4 < max(float(row["rounding"]) for row in first) < 2e-4
    whole = [row for row in second if row["gating"] == "True" and row["measure"] == "relative_mu"]
    lowest = min(whole, key=lambda row: float(row["mean"]))
    assert (
        f"Its minimum, {float(lowest['mean']):.2f} at lambda = {float(lowest['lam']):g}, is what float32 cannot tell"
        in text
    )
    assert (
        "in float64, which leaves 1e-7" in text
        and 5e-8 < max(float(row["rounding"]) for row in whole if abs(float(row["lam"])) < 1) < 2e-7
    )
    assert not any(float(row["unresolved"]) for row in first + second)


def test_every_table_of_results_is_its_own() -> None:
    """No published file is a copy of another."""
    files = [path for folder in ("reference", "table1") for path in (RESULTS / folder).rglob("*")]
    contents = [path.read_bytes() for path in files if path.suffix in (".csv", ".md", ".json")]
    assert len(set(contents)) == len(contents)


def test_smollm2_is_quoted_from_its_figures() -> None:
    folder = ROOT / "results" / "reference" / "smollm2"
    angular = [row for row in rows_of(folder / "sweep-lambda" / "figure1-angular.csv") if row["drawn"] == "point"]
    (quoted,) = (table for table in tables("results/reference/smollm2/README.md") if table[0][0] == "lambda")
    losses = {float(row["lam"]): row for row in rows_of(folder / "sweep-lambda" / "quality.csv")}
    assert len(quoted[2:]) == len(losses)
    for lam, *numbers in quoted[2:]:
        row = losses[float(lam)]
        (directions,) = (
            r for r in angular if (float(r["lam"]), r["measure"], r["layer"]) == (float(lam), "angular_mu", "30")
        )
        assert numbers == [f"{float(x):.2f}" for x in (row["relative_mu"], directions["mean"], row["lm_loss"])]
    curves: dict[str, list[float]] = {}
    for row in [*rows_of(folder / "measure" / "figure1.csv"), *(r for r in angular if float(r["lam"]) == 1.0)]:
        layers = curves.setdefault(row["measure"].replace("_", " "), [])
        if len(layers) == int(row["layer"]):  # the ratio is in both, the same
            layers.append(float(row["mean"]))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition("$ lscollapse measure smollm2-135m")[2]
    for name in ("relative mu", "rank1 residual", "angular mu", "row norm ratio"):
        curve = curves[name]
        first, worst, layer, last = re.search(rf" {name} +([\d.]+) +([\d.]+) +(\d+) +([\d.]+)\n", shown).groups()  # type: ignore[union-attr]
        wanted = (max if name == "row norm ratio" else min)(curve[1:])
        assert (first, worst, last) == (f"{curve[0]:.3f}", f"{wanted:.3f}", f"{curve[-1]:.3f}"), name
        assert curve[int(layer)] == wanted


def test_the_rise_of_figure_3_is_quoted_from_its_figures() -> None:
    folder, found = ROOT / "results" / "reference", {}
    for file in ("figure3.csv", "figure3-angular.csv"):
        for row in rows_of(folder / file):
            if row["arm"] == "no gate, no LN" and row["mean"]:
                found[row["measure"], int(row["layer"])] = float(row["mean"])
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    spread, angular = (
        (lambda layer: f"{found['relative_mu', layer]:.2f}"),
        (lambda layer: f"{found['angular_mu', layer]:.2f}"),
    )
    assert f"relative mu goes from {spread(3)} at layer 3 to {spread(6)} at layer 6" in said
    assert f"angular mu from {angular(3)} to {angular(5)} at layer 5 and {angular(6)} at layer 6" in said
    assert f"it rises too, to {angular(7)}" in said and ("angular_mu", 9) not in found
    assert found["row_norm_ratio", 4] < 10 < found["row_norm_ratio", 5]


def test_the_table_of_a_massive_row() -> None:
    """By numpy, from the definitions."""
    (quoted,) = (table for table in tables("docs/table.md") if table[0][0] == "first row, times")
    Y = np.random.default_rng(0).standard_normal((128, 256)) + 1.0
    for times, *numbers in quoted[2:]:
        long = Y * np.where(np.arange(128) == 0, float(times), 1.0)[:, None]
        found = plain_measures(long)
        names = ["relative_mu", "rank1_residual", "stable_rank", "row_norm_ratio", *ANGULAR.values(), "effective_rank"]
        assert numbers == [f"{found[name]:.3f}" for name in names]


def test_the_cards_quote_the_training() -> None:
    weights = ROOT / "lscollapse" / "models" / "weights"
    for name in ("mamba2-tiny", "s4d-digits"):
        card = (weights / name / "README.md").read_text(encoding="utf-8")
        record = json.loads((weights / name / "training.json").read_text(encoding="utf-8"))
        assert f"{record['parameters']:,} parameters" in card and record["parameters"] == ENTRIES[name].n_parameters
        if "held_out_nats" in record:
            nats = {when: f"{value:.2f}" for when, value in record["held_out_nats"].items()}
            assert f"{nats['trained']} nats per token on the 32" in card and f"against {nats['unigram']} of" in card
        else:
            trained = f"{100 * record['test_accuracy']['trained']:.1f} % of"
            assert trained in card and f"({trained} 360 held-out images" in (ROOT / "README.md").read_text(
                encoding="utf-8"
            )
