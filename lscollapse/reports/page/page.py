"""Run folders -> one self-contained page that opens from disk: figures, claims, bounds, provenance, warnings.

The page is a pure function of the folders: the same folders and library versions give the same bytes. Python decides
what there is to see (`plots.py`, `facts.py`), the template writes it down with everything escaped, and the scripts draw.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

import jinja2

from lscollapse.core.files import write_text
from lscollapse.core.manifest import read_manifest
from lscollapse.core.rows import edited_words, read_rows
from lscollapse.reports.page import facts, plots
from lscollapse.reports.page.folders import ReportError, Run, named, read_bounds

SCRIPTS = ("scales.js", "plot.js", "page.js")


def write(runs: Sequence[Path], out: Path, verified: bool = True) -> Path:
    """Write the page of `runs` to `out`, whole or not at all, and return `out`.

    Args:
        runs: folders that the verbs wrote (runs, `theory bound --out`, `theory verify --out`), in the order in which they
            are shown.
        out: the HTML file; its folder is made if absent.
        verified: refuse a table that was edited since; else the page says which was.

    Raises:
        ReportError, RunFolderError: a folder is none of these, damaged, or its run is not finished.
        FigureError: a table pools several settings of one arm.
        OSError: `out` cannot be written.
    """
    if not runs:
        raise ReportError("a report needs the folder of at least one run")
    text = page(runs, verified)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def page(folders: Sequence[Path], verified: bool = True) -> str:
    """The page as text; arguments and errors as `write`."""
    names = named(folders)
    finished = {path: name for path, name in names.items() if (path / "manifest.json").exists()}
    runs = {
        path: Run(name, read_rows(path, verified), read_manifest(path), edited_words(path))
        for path, name in finished.items()
    }
    bounds = [read_bounds(path, name) for path, name in names.items() if (path / "bounds.csv").exists()]
    pack = plots.Pack()
    shown = [run for run in runs.values() if plots.drawable(run.rows)]
    others = [run for run in runs.values() if run not in shown]
    strange = {path for path, run in runs.items() if run in others and run.experiment != "table1"}
    verdicts = facts.verdicts({path: name for path, name in names.items() if path not in strange}, verified)
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


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash of an inline script or style, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
