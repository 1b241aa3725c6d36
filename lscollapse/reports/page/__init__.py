"""Run folders -> one self-contained page that opens from disk: figures, claims, bounds, provenance, warnings.

The page is a pure function of the folders: the same folders and library versions give the same bytes. Python decides
what there is to see (`plots.py`, `facts.py`), the template writes it down with everything escaped, and the scripts draw.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lscollapse.core import run_folder
from lscollapse.core.files import first_line, write_text

if TYPE_CHECKING:
    import pandas as pd


SCRIPTS = ("scales.js", "plot.js", "page.js")


class ReportError(ValueError):
    """A folder cannot be shown; one line that says what was expected."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run folder."""

    name: str
    rows: pd.DataFrame
    manifest: dict[str, Any]

    @property
    def experiment(self) -> str:
        return str(self.manifest.get("identity", {}).get("experiment", ""))


@dataclass(frozen=True)
class Bounds:
    """What `theory bound` left in a folder: bounds.csv and curve.csv."""

    name: str
    bounds: pd.DataFrame
    curve: pd.DataFrame


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of `runs` to `out`, whole or not at all, and return `out`.

    Args:
        runs: folders that the verbs wrote (runs, `theory bound --out`, `theory verify --out`), in the order in which they
            are shown.
        out: the HTML file; its folder is made if absent.

    Raises:
        ReportError, RunFolderError: a folder is none of these, damaged, or its run is not finished.
        FigureError: a table pools several settings of one arm.
        OSError: `out` cannot be written.
    """
    if not runs:
        raise ReportError("a report needs the folder of at least one run")
    text = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def page(folders: Sequence[Path]) -> str:
    """The page as text; arguments and errors as `write`."""
    import jinja2

    from lscollapse.reports.claims import runs as claims_runs
    from lscollapse.reports.page import facts, plots

    names = _names(folders)
    runs = {path: _run(path, name) for path, name in names.items() if (path / "manifest.json").exists()}
    bounds = [_bounds(path, name) for path, name in names.items() if (path / "bounds.csv").exists()]
    pack = plots.Pack()
    shown = [run for run in runs.values() if plots.drawable(run.rows)]
    others = [run for run in runs.values() if run not in shown]
    strange = {path for path, run in runs.items() if run in others and run.experiment not in claims_runs.READERS}
    verdicts = facts.verdicts({path: name for path, name in names.items() if path not in strange})
    figures = [figure for run in shown for figure in plots.figures(run, pack)]
    theory = plots.theory_figure(bounds) if bounds else None
    payload = {
        "measures": plots.measure_facts(shown),
        "figures": [*figures, *([theory] if theory else [])],
        "excerpts": {run.name: facts.excerpt_titles(run) for run in shown},
    }
    style, script = _asset("report.css"), "".join(map(_asset, SCRIPTS))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_asset("template.html")).render(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script), payload=payload, pack=pack.text(),
        figures=figures, theory=theory, bounds=facts.bounds_tables(bounds), claims=verdicts, tally=facts.tally(verdicts),
        warnings=facts.warnings(shown, others, verdicts), runs=[facts.provenance(run) for run in runs.values()],
        tables=[facts.other_table(run) for run in others], models=facts.models(shown),
        version=metadata.version("lscollapse"),
    )  # fmt: skip


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder once, named without the way to it, and by a number where another has that name."""
    names: dict[Path, str] = {}
    for path in folders:
        own = path.resolve().name
        same = sum(other.resolve().name == own for other in names)
        names.setdefault(path, f"{own} ({same + 1})" if same else own)
    return names


def _run(path: Path, name: str) -> Run:
    return Run(name, run_folder.read_rows(path), run_folder.read_manifest(path))


def _bounds(path: Path, name: str) -> Bounds:
    import pandas as pd

    try:
        bounds, curve = pd.read_csv(path / "bounds.csv", keep_default_na=False), pd.read_csv(path / "curve.csv")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} has no readable bounds.csv and curve.csv: {first_line(error)}") from None
    if "to" not in bounds:  # a file of before there were intervals with an end
        bounds["to"] = math.inf
    return Bounds(name, bounds, curve)


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Of an inline script or style, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
