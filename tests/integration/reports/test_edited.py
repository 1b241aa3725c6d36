"""A table that was edited after its run: refused by every verb that reads it, read with --no-verify, and said of what comes out."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path

import pandas as pd
import pytest

from tests.integration.reports.test_page import Page, sweep, write_run
from tests.verbs import run as run_verb

WORDS = "Edited after the run: rows.parquet of run."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as this version writes it, of which one value was changed since."""
    folder = write_run(tmp_path / "run", "sweep-lambda", sweep().assign(log10=0.0, bound=0.0), schema=1)
    record = json.loads((folder / "manifest.json").read_text())
    record["files"] = {"rows.parquet": hashlib.sha256((folder / "rows.parquet").read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(record))
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.loc[rows.index[0], "value"] += 1e-3
    rows.to_parquet(folder / "rows.parquet")
    return folder


def text_of(pdf: Path) -> str:
    """What a PDF of matplotlib shows: the pieces of text of its streams, without what lies between them."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL)
    shown = []
    for stream in streams:
        try:
            shown += re.findall(rb"\(((?:[^()\\]|\\.)*)\)", zlib.decompress(stream))
        except zlib.error:  # fonts and pictures
            continue
    return b"".join(shown).decode("latin-1").replace("\0", "")


def test_every_verb_refuses_it_in_one_line_and_takes_it_where_it_is_told(run: Path, tmp_path: Path) -> None:
    verbs = {
        "figures": ("figures", run, "--to", tmp_path / "drawn"),
        "report": ("report", run, "-o", tmp_path / "page.html"),
        "claims": ("claims", run, "--format", "json"),
        "compare": ("compare", run, run),
    }
    for name, words in verbs.items():
        code, out, err = run_verb(words)
        assert (code, out, err.count("\n")) == (2, "", 1), name
        assert f"{run / 'rows.parquet'} is not what the run wrote" in err and "--no-verify" in err, name
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}
    for name, words in verbs.items():
        code, out, err = run_verb([*words, "--no-verify"])
        assert (code, err) == (0, "" if name == "compare" else f"{WORDS}\n"), name
        assert name != "compare" or out.count(WORDS) == 1
    assert WORDS in Page(tmp_path / "page.html").text
    assert WORDS.replace(" ", "") in text_of(tmp_path / "drawn" / "figure1.pdf").replace(" ", "")


def test_a_table_that_was_not_edited_is_said_to_be_none(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "manifest.json").read_text())
    record["files"] = {"rows.parquet": hashlib.sha256((run / "rows.parquet").read_bytes()).hexdigest()}
    (run / "manifest.json").write_text(json.dumps(record))
    for more in ((), ("--no-verify",)):
        code, out, err = run_verb(["report", run, "-o", tmp_path / "page.html", *more])
        assert (code, err) == (0, "") and out == f"wrote {tmp_path / 'page.html'}\n"
        assert "Edited" not in Page(tmp_path / "page.html").text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": None}, "manifest.json: identity: "),
        ({"git": "main"}, "manifest.json: git: "),
        ({"versions": [1]}, "manifest.json: versions: "),
        ({"excerpts": {"gated": {"titles": 3}}}, "manifest.json: excerpts.gated.titles: "),
        ({"wall_seconds": "long"}, "manifest.json: wall_seconds: "),
        ({"complete": False}, "is not a finished run"),
    ],
)
def test_a_manifest_of_another_shape_is_one_line_for_every_verb(
    run: Path, tmp_path: Path,
    change: dict[str, object], message: str,
) -> None:  # fmt: skip
    record = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(record | change))
    for words in (("figures", run), ("report", run, "-o", tmp_path / "p.html"), ("claims", run), ("compare", run, run)):
        code, out, err = run_verb([*words, "--no-verify"])
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
