"""The page of a report: numbers against plain numpy, escaping, provenance, warnings. What a browser makes of it is in
test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lscollapse.reports.page.folders import ReportError
from lscollapse.reports.page.page import write
from tests import ROOT
from tests.unit.reports.figures.test_massive import EVEN, SINK, table

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"
LAMBDAS = (-2.0, 0.0, 1.0, 8.0)
LAYERS, EXCERPTS, FLOOR = 6, 5, 1e-6
COMMIT = "0123456789abcdef0123456789abcdef01234567"
EMBEDDED = ROOT / "results" / "reference" / "report.html"


def arm(
    model: str, lam: float, gating: bool | None, layernorm: bool = True, level: float = 0.6, seed: int = 0, **columns: Any
) -> pd.DataFrame:  # fmt: skip
    """Rows of one variant: relative mu falls from 0.98 to about `level`; at negative lambda the rank-1 residual is far lower."""
    rng = np.random.default_rng([seed, round(1000 * (lam + 10)), layernorm, 2 if gating is None else gating])
    fall = np.linspace(1, 0, LAYERS + 1)[:, None]
    relative = (level + (0.98 - level) * fall**2) * (1 - 0.05 * rng.random((LAYERS + 1, EXCERPTS)))
    measures = {"relative_mu": relative, "rank1_residual": relative * (0.3 if lam < 0 else 0.9), "mu": 1e3 * relative}
    parts = []
    for measure, values in measures.items():
        layer, excerpt = (axis.ravel() for axis in np.indices(values.shape))
        parts.append(
            pd.DataFrame(
                {"layer": layer, "excerpt": excerpt, "measure": measure, "value": values.ravel(), "status": "ok"}
            )
        )
    words = ([] if gating is None else ["gate" if gating else "no gate"]) + ["LN" if layernorm else "no LN"]
    fixed = {
        "model": model, "init": "trained", "text": "test texts", "tokenizer": "bert", "arm": ", ".join(words), "lam": lam,
        "layernorm": layernorm, "skip_site": "residual", "norm_site": "both", "dtype": "float32", "n_tokens": 16,
        "floor": FLOOR,
    }  # fmt: skip
    rows = pd.concat(parts, ignore_index=True).assign(**(fixed | columns))
    return rows.assign(gating=pd.array([pd.NA if gating is None else gating] * len(rows), dtype="boolean"))


@cache
def sweep() -> pd.DataFrame:
    """A gated model that collapses up to lambda = 1 without its gate, and one without a gate that falls under the floor at 0."""
    levels = {-2.0: 0.7, 0.0: 0.3, 1.0: 0.2, 8.0: 0.8}
    parts = [arm("gated", lam, False, level=levels[lam]) for lam in LAMBDAS]
    parts += [arm("gated", lam, True, level=0.9 if lam else 0.4) for lam in LAMBDAS]
    plain = pd.concat([arm(HOSTILE, lam, None, level=levels[lam]) for lam in LAMBDAS])
    lost = plain["lam"].eq(0) & plain["layer"].ge(4) & plain["measure"].eq("relative_mu")
    return pd.concat(
        [
            *parts,
            plain.assign(value=plain["value"].mask(lost, FLOOR / 10), status=plain["status"].mask(lost, "below_floor")),
        ]
    )


@cache
def ablation() -> pd.DataFrame:
    """Gating x LayerNorm at lambda = 1; the arm without either overflows at layer 3 in two excerpts of five."""
    parts = [arm("gated", 1.0, gating, layernorm) for gating in (True, False) for layernorm in (True, False)]
    rows = pd.concat(parts, ignore_index=True)
    lost = rows["arm"].eq("no gate, no LN") & rows["layer"].ge(3) & rows["excerpt"].lt(2)
    return rows.assign(value=rows["value"].mask(lost), status=rows["status"].mask(lost, "overflow"))


@cache
def doubtful() -> pd.DataFrame:
    """An ablation with rounding: one excerpt of "gate, no LN" unresolved at layers 2 and 3, "gate, LN" from layer 5 on."""
    rows = ablation().assign(rounding=lambda rows: 2e-6 * (1 + rows["layer"]))
    relative = rows["measure"].eq("relative_mu")
    some = rows["arm"].eq("gate, no LN") & rows["layer"].between(2, 3) & rows["excerpt"].eq(1)
    end = rows["arm"].eq("gate, LN") & rows["layer"].ge(5)
    rows.loc[relative & (some | end), ["value", "status", "rounding"]] = [0.111, "unresolved", 0.034]
    return rows


def write_run(folder: Path, experiment: str, rows: pd.DataFrame, **manifest: Any) -> Path:
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "rows.parquet")
    titles = [f"Article {i} {HOSTILE}" for i in range(EXCERPTS)]
    record = {
        "complete": True,
        "identity": {
            "experiment": experiment,
            "config": {"seed": 7, "wikipedia": {"language": "en", "contact": "me@example.org", "cache_dir": "/secret/x"}},
            "subjects": [{"model": "gated", "sha256": "abc123", "text": "test texts"}],
        },
        "versions": {"torch": "9.9.9", "mamba-ssm": None}, "python": "3.11.7", "machine": "a machine", "device": "cpu",
        "git": {"commit": COMMIT, "dirty": False}, "peak_rss_bytes": 2**31, "wall_seconds": 12.5,
        "excerpts": {"gated": {"titles": titles}, HOSTILE: {"titles": titles}},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(record | manifest), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a page holds, as a standard HTML parser sees it."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self.lines: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside] = self.raw.get(self._inside, "") + data
        elif data.strip():
            self.lines.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.lines)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.raw["data"])

    def figure(self, title: str) -> dict[str, Any]:
        return next(figure for figure in self.data["figures"] if figure["title"].startswith(title))


def unpacked(text: str) -> np.ndarray:
    """The excerpts, byte by byte: three planes hold the upper 24 bits of float64 values."""
    planes = zlib.decompress(base64.b64decode(text))
    n = len(planes) // 3
    triples = zip(planes[:n], planes[n : 2 * n], planes[2 * n :], strict=True)
    return np.array([struct.unpack(">d", bytes(triple) + bytes(5))[0] for triple in triples])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    dirty = {"commit": "f" * 40, "dirty": True}
    return [
        write_run(base / "sweep", "sweep-lambda", sweep()),
        write_run(base / "gating", "ablate-gating", ablation(), git=dirty),
    ]


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write(folders, tmp_path_factory.mktemp("page") / "new" / "report.html"))


def mean_and_sd(rows: pd.DataFrame, **arm_of: Any) -> tuple[np.ndarray, np.ndarray]:
    for column, value in arm_of.items():
        rows = rows[rows[column].isna() if value is None else rows[column].eq(value).fillna(False)]
    values = rows.sort_values(["layer", "excerpt"])["value"].to_numpy().reshape(LAYERS + 1, EXCERPTS)
    return values.mean(axis=1), values.std(axis=1, ddof=1)


def test_the_same_folders_give_the_same_bytes_wherever_they_are(folders, tmp_path):
    copies = [Path(shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)) for folder in folders]
    first, second = write(folders, tmp_path / "a.html"), write(copies, tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in second.read_text(encoding="utf-8")


def test_folders_of_one_name_are_told_apart(folders, tmp_path):
    again = Path(shutil.copytree(folders[1], tmp_path / "other" / folders[1].name))
    page = Page(write([folders[1], again, folders[1]], tmp_path / "r.html"))
    assert list(page.data["excerpts"]) == ["gating", "gating (2)"]
    assert len({figure["id"] for figure in page.data["figures"]}) == len(page.data["figures"]) == 2


def test_curves_are_mean_and_sd_of_the_rows(page):
    tabs = {tab["name"]: tab for tab in page.figure("Figure 1")["tabs"]}
    assert list(tabs) == ["gated, gate removed", "gated, full architecture", HOSTILE]
    for name, gating in (("gated, gate removed", False), ("gated, full architecture", True), (HOSTILE, None)):
        assert tabs[name]["x"] == list(range(LAYERS + 1))
        assert [series["name"] for series in tabs[name]["series"]] == ["λ = 8", "λ = 1", "λ = 0", "λ = −2"]
        for lam, series in zip((8.0, 1.0, -2.0), np.array(tabs[name]["series"], object)[[0, 1, 3]], strict=True):
            for measure, record in series["of"].items():
                model = name.split(",")[0] if gating is not None else HOSTILE
                mean, sd = mean_and_sd(sweep(), model=model, gating=gating, lam=lam, measure=measure)
                np.testing.assert_allclose(record["y"], mean, rtol=1e-5)
                np.testing.assert_allclose(record["s"], sd, rtol=1e-2)


def test_figure_2_is_the_last_layer(page):
    (tab,) = page.figure("Figure 2")["tabs"]
    assert tab["x"] == sorted(LAMBDAS)
    full = next(series for series in tab["series"] if series["name"] == "gated, full architecture")
    wanted = [
        mean_and_sd(sweep(), model="gated", gating=True, lam=lam, measure="relative_mu")[0][-1] for lam in LAMBDAS
    ]
    np.testing.assert_allclose(full["of"]["relative_mu"]["y"], wanted, rtol=1e-5)


def test_an_overflow_masks_the_curve_and_says_where(page):
    (tab,) = page.figure("Figure 3")["tabs"]
    assert [series["name"] for series in tab["series"]] == ["gate, LN", "no gate, LN", "gate, no LN", "no gate, no LN"]
    record = tab["series"][3]["of"]["relative_mu"]
    assert record["y"][3:] == [None] * 4 and None not in record["y"][:3]
    assert record["notes"] == [[3, LAYERS, "overflow (2 of 5)"]]
    assert record["end"] == "overflow at layer 3 (2 of 5)"


def test_what_is_unresolved_is_no_value(tmp_path):
    page = Page(write([write_run(tmp_path / "doubtful", "ablate-gating", doubtful())], tmp_path / "r.html"))
    (tab,) = page.figure("Figure 3")["tabs"]
    found = {series["name"]: series["of"] for series in tab["series"]}
    end, some = found["gate, LN"]["relative_mu"], found["gate, no LN"]["relative_mu"]
    assert (end["hatched"], some["hatched"]) == ([5, 6], [2, 3])
    assert end["y"][5:] == [None] * 2 and some["y"][2:4] == [None] * 2 and None not in some["y"][4:]
    np.testing.assert_allclose(
        some["y"][4:], mean_and_sd(ablation(), arm="gate, no LN", measure="relative_mu")[0][4:], rtol=1e-5
    )
    assert (end["gaps"], some["gaps"]) == ("unresolved: layers 5 to 6", "unresolved: layers 2 to 3")
    assert (end["notes"], some["notes"]) == ([[5, 6, "unresolved (5 of 5)"]], [[2, 3, "unresolved (1 of 5)"]])
    assert "end" not in end and "hatched" not in found["no gate, LN"]["relative_mu"]
    assert end["r"] == [2e-6, 4e-6, 6e-6, 8e-6, 1e-5, 0.034, 0.034]
    # of mu the estimate is of the logarithm: d mu = ln(10) mu d log10
    mean, _ = mean_and_sd(ablation(), arm="gate, LN", measure="mu")
    np.testing.assert_allclose(found["gate, LN"]["mu"]["r"][3], 2.302585 * mean[3] * 8e-6, rtol=0.05)
    values = unpacked(page.raw["pack"])
    at_layer_2 = values[some["at"] + 2 * EXCERPTS :][:EXCERPTS]
    assert np.isnan(at_layer_2).tolist() == [False, True, False, False, False]


def test_an_old_run_says_nothing_of_rounding(page):
    for figure in page.data["figures"]:
        records = [record for tab in figure["tabs"] for series in tab["series"] for record in series["of"].values()]
        assert not [record for record in records if {"r", "hatched", "gaps"} & set(record)]
    assert "unresolved" not in page.text[page.text.index("Before you read on") : page.text.index("Figure 1.")]


@pytest.mark.parametrize(
    ("dtype", "mend"),
    [
        ("float32", "run with --dtype float64"),
        ("float64", "not even float64 resolves them"),
    ],
)
def test_unresolved_arms_are_named_with_their_mend(tmp_path, dtype, mend):
    run = write_run(tmp_path / "run", "ablate-gating", doubtful().assign(dtype=dtype))
    text = Page(write([run], tmp_path / "r.html")).text
    for arm_name, layer in (("gate, LN", 5), ("gate, no LN", 2)):
        assert (
            f"gated, {arm_name}: unresolved, because rounding in {dtype} decides the values: relative μ at λ = 1 from layer"
            f" {layer}. They are not known; {mend}."
        ) in text


def test_values_under_the_floor_stand_on_it(page):
    record = page.figure("Figure 1")["tabs"][2]["series"][2]["of"]["relative_mu"]
    assert record["open"] == [4, 5, 6] and record["y"][4:] == [FLOOR] * 3
    assert record["notes"] == [[4, 6, "below the floor (5 of 5)"]]


def test_the_pack_holds_every_excerpt_to_twelve_bits(page):
    values = unpacked(page.raw["pack"])
    record = page.figure("Figure 1")["tabs"][1]["series"][0]["of"]["mu"]
    own = values[record["at"] : record["at"] + (LAYERS + 1) * EXCERPTS]
    rows = sweep().query("model == 'gated' and lam == 8 and measure == 'mu'")
    rows = rows[rows["gating"].astype(bool)].sort_values(["layer", "excerpt"])
    np.testing.assert_allclose(own, rows["value"], rtol=2**-13)
    lost = page.figure("Figure 3")["tabs"][0]["series"][3]["of"]["relative_mu"]
    at_layer_3 = values[lost["at"] + 3 * EXCERPTS :][:EXCERPTS]
    assert np.isnan(at_layer_3).tolist() == [True, True, False, False, False]


def test_names_from_outside_stay_text(page):
    assert [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "svg")] == []
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == [
        "application/json",
        "text/plain",
        None,
    ]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "style"]
    assert page.text.count(HOSTILE) >= 3
    assert page.data["excerpts"]["sweep"][HOSTILE][4] == f"Article 4 {HOSTILE}"


def test_nothing_is_loaded_and_only_our_script_and_style_may_run(page):
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    links = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    assert {link for link in links if not link.startswith(("#", "data:"))} == {"https://arxiv.org/abs/2410.10609"}


def test_the_verdicts_are_those_that_the_curves_were_made_for(page):
    rows = page.text[page.text.index("What the paper writes") :]
    one = rows[rows.index("figure 1b") : rows.index("figure 1c")]  # lambda = 1 without the gate ends near 0.2, near 0.6
    assert "gated (sweep) agrees" in one and "gated (gating) disagrees" in one
    low = rows[rows.index("figure 1a") : rows.index("figure 1b")]  # and lambda = 0 near 0.3, in one run only
    assert "gated agrees" in low
    none = rows[rows.index("figure 4 ") :]
    assert "not measured no run here is about it" in none


@pytest.mark.parametrize(
    "warning",
    [
        "gated, no gate, no LN, λ = 1: overflow at layer 3 (2 of 5). The curve stops there. gating",
        "LN: not resolved by the dtype (below the floor) at λ = 0 from layer 4. sweep",
        "Made with uncommitted changes on top of commit ffffffffffff. gating",
        "These runs were made by 2 different commits",
        "At the last layer the two measures disagree",
        "do not hold here: figure 1b: gated (gating)",
    ],
)
def test_warnings(page, warning):
    shown = page.text[page.text.index("Before you read on") : page.text.index("Figure 1.")]
    assert warning in shown


def test_massive_rows_are_named_with_where_they_are(tmp_path):
    rows = ablation()
    own = rows[rows["measure"].eq("relative_mu") & rows["arm"].eq("gate, LN")]
    ratio = own.assign(measure="row_norm_ratio", value=np.where(own["layer"].between(3, 5), 60.4, 1.5))
    places = own.assign(measure="longest_row", value=np.where(own["excerpt"] == 4, 7.0, 0.0))
    places["status"] = np.where(places["layer"] == 1, "unresolved", "ok")
    page = Page(
        write([write_run(tmp_path / "run", "ablate-gating", pd.concat([rows, ratio, places]))], tmp_path / "r.html")
    )
    shown = page.text[page.text.index("Before you read on") : page.text.index("Figure 3.")]
    assert (
        "gated, gate, LN, λ = 1: one token (0 in 12 of 15 outputs) has up to 60 times the median row norm at layers 3 to 5."
        " Relative μ weighs that row most there; angular μ weighs all alike."
    ) in shown
    assert shown.count("median row norm") == 1 and "longest" not in shown


def test_embedded_models_are_named_as_such(tmp_path):
    rows = pd.concat([arm("mamba2-tiny", lam, True) for lam in (0.0, 1.0)])
    run = write_run(tmp_path / "run", "sweep-lambda", rows)
    assert "mamba2-tiny is a small embedded model, not the paper's." in Page(write([run], tmp_path / "r.html")).text


def test_provenance_without_what_is_private(page):
    for fact in (COMMIT, "torch 9.9.9", "a machine", "12.5 s", "2.00 GiB", "abc123", "wikipedia.language en", "seed 7"):
        assert fact in page.text
    for private in ("me@example.org", "/secret/x", "mamba-ssm"):
        assert private not in page.text


def test_measures_that_nobody_knows_are_offered(tmp_path):
    rows = pd.concat([arm("gated", lam, None) for lam in LAMBDAS])
    last = rows[rows["measure"].eq("mu") & rows["layer"].eq(LAYERS)]
    loss = last.assign(measure="lm_loss", value=5.5, floor=np.nan)
    odd = rows[rows["measure"].eq("mu") & rows["layer"].gt(0)].assign(measure="odd", value=-1.5)
    run = write_run(tmp_path / "run", "something-new", pd.concat([rows, loss, odd]))
    page = Page(write([run], tmp_path / "r.html"))
    assert list(page.data["measures"])[-1] == "odd"
    record = page.figure("Every λ")["tabs"][0]["series"][0]["of"]
    assert record["lm_loss"]["x"] == [LAYERS] and record["lm_loss"]["y"] == [5.5]
    assert record["odd"]["x"] == list(range(1, LAYERS + 1)) and set(record["odd"]["y"]) == {-1.5}


def test_a_massive_row_is_named_and_its_measures_are_offered(tmp_path):
    effective = {"effective_rank": (40.0, 30.0, 20.0, 20.0, 18.0, 15.0)}
    rows = pd.concat(
        [table(SINK | effective, lam=1.0), table(EVEN | effective, lam=0.0), table(EVEN | effective, lam=2.0)]
    )
    page = Page(write([write_run(tmp_path / "run", "measure", rows)], tmp_path / "r.html"))
    facts = page.data["measures"]
    assert [facts[name]["name"] for name in facts] == [
        "relative μ", "rank-1 residual", "angular μ", "angular rank-1 residual", "row norm ratio", "effective rank"
    ]  # fmt: skip
    assert {name: facts[name].get("line") for name in facts} == {
        "relative_mu": 0.5, "rank1_residual": None, "angular_mu": 0.5, "angular_rank1_residual": None,
        "row_norm_ratio": 10, "effective_rank": None,
    }  # fmt: skip
    assert facts["row_norm_ratio"]["log"] and not facts["row_norm_ratio"]["unit"] and facts["angular_mu"]["unit"]
    assert facts["relative_mu"]["angular"] == "angular_mu"
    (tab,) = page.figure("Every λ")["tabs"]
    note = "One row has more than 10 times the median norm at layers 2 to 4 of λ = 1: relative μ weighs that row most there."
    assert tab["massive"].replace("\N{NO-BREAK SPACE}", " ") == note
    one = next(series for series in tab["series"] if series["name"] == "λ = 1")["of"]
    assert set(one) == set(facts)
    for measure, record in one.items():
        np.testing.assert_allclose(record["y"], (SINK | effective)[measure], rtol=1e-5)
    (last,) = page.figure("The last layer")["tabs"]
    assert last["massive"] == ""
    assert "scaled to norm 1" in page.text


def test_a_page_without_the_new_measures_does_not_speak_of_them(page):
    assert "scaled to norm 1" not in page.text
    assert not [tab for figure in page.data["figures"] for tab in figure["tabs"] if tab["massive"]]


def test_an_infinite_ratio_is_masked_and_named(tmp_path):
    rows = table(SINK | {"row_norm_ratio": (1.4, np.inf, np.inf, 137.0, 62.0, 5.6)})
    page = Page(write([write_run(tmp_path / "run", "measure", rows)], tmp_path / "r.html"))
    record = page.data["figures"][0]["tabs"][0]["series"][0]["of"]["row_norm_ratio"]
    assert record["y"][1:3] == [None] * 2 and record["y"][3] == 137.0
    assert record["end"] == "infinite at layers 1 to 2"
    values = unpacked(page.raw["pack"])[record["at"] :][: 6 * 2]
    assert np.isnan(values).tolist() == [False] * 2 + [True] * 4 + [False] * 6


def test_every_reading_has_a_tab(tmp_path):
    sites = [(skip, norm) for skip in ("residual", "mixer") for norm in ("both", "block")]
    parts = [arm("gated", 1.0, True, False, skip_site=skip, norm_site=norm) for skip, norm in sites]
    parts += [arm("gated", lam, False, skip_site=skip) for skip in ("residual", "mixer") for lam in LAMBDAS]
    run = write_run(tmp_path / "run", "all-readings", pd.concat(parts))
    page = Page(write([run], tmp_path / "r.html"))
    assert len(page.figure("Figure 1")["tabs"]) == 2
    tabs = page.figure("Figure 3")["tabs"]
    assert len({tab["name"] for tab in tabs}) == 4
    assert [[series["name"] for series in tab["series"]] for tab in tabs] == [["no gate, LN", "gate, no LN"]] * 4


def test_random_weights_are_dashed_in_the_colour_of_the_trained(tmp_path):
    rows = pd.concat([arm("gated", 1.0, True, init=init) for init in ("trained", "random")])
    page = Page(write([write_run(tmp_path / "run", "ablate-gating", rows)], tmp_path / "r.html"))
    series = {each["name"]: each for each in page.figure("Figure 3")["tabs"][0]["series"]}
    assert series["gate, LN, random weights"]["dash"] and not series["gate, LN"]["dash"]
    assert series["gate, LN, random weights"]["colour"] == series["gate, LN"]["colour"]


def test_an_s4d_run_names_skips_and_says_that_nothing_was_retrained(tmp_path):
    arms = [(lam, layernorm) for lam in (0.0, 1.0) for layernorm in (True, False)]
    pixels = {"tokenizer": "pixels", "checkpoint_sha256": "c"}
    rows = pd.concat([arm("net", lam, None, layernorm, **pixels) for lam, layernorm in arms])
    page = Page(write([write_run(tmp_path / "run", "ablate-s4d", rows)], tmp_path / "r.html"))
    figure = page.figure("Figure 4")
    names = [series["name"] for series in figure["tabs"][0]["series"]]
    assert names == ["skip, LN", "no skip, LN", "skip, no LN", "no skip, no LN"]
    assert figure["unit"] == "image" and "none retrained" in page.text


def test_lambdas_per_layer_have_a_curve(tmp_path):
    rows = pd.concat([*(arm("gated", lam, False) for lam in LAMBDAS), arm("gated", 3.0, False).assign(lam=np.nan)])
    page = Page(write([write_run(tmp_path / "run", "sweep-lambda", rows)], tmp_path / "r.html"))
    assert page.figure("Figure 1")["tabs"][0]["series"][-1]["name"] == "λ per layer"
    assert page.figure("Figure 2")["tabs"][0]["x"] == sorted(LAMBDAS)


def test_theory_bounds_and_their_lines(tmp_path):
    folder = tmp_path / "bound-gated"
    folder.mkdir()
    bounds = (
        'bound,sign,lam,to,reads,note\n"Theorem 4.1, condition (7) alone",0,204.5,inf,204,b is infinite\nTheorem X,0,'
    )
    bounds += f'inf,inf,certifies nothing,{HOSTILE!r}\n"measured, relative mu",1,5.7,inf,5.7,\n'
    bounds += '"measured, rank-1 residual",1,5.7,8.1,5.7 to 8.1,\n'
    (folder / "bounds.csv").write_text(bounds)
    (folder / "curve.csv").write_text("lam,relative_mu,rank1_residual\n-2,0.5,0.1\n0,0.3,0.2\n2,0.6,0.5\n4,0.7,0.6\n")
    page = Page(write([folder], tmp_path / "r.html"))
    (tab,) = page.figure("What the theorems")["tabs"]
    assert tab["name"] == "gated" and tab["x"] == [2, 4]
    assert tab["series"][0]["of"]["relative_mu"]["y"] == [0.6, 0.7]
    assert tab["marks"] == [
        {"x": 204.5, "names": ["1"], "measured": False}, {"x": 5.7, "names": ["3", "4"], "measured": True},
        {"x": 8.1, "names": ["4"], "measured": True},
    ]  # fmt: skip
    assert "λ > 0 5.7 to 8.1" in page.text
    assert "certifies nothing" in page.text and not [tag for tag, _ in page.tags if tag == "img"]


def test_other_tables_are_shown_as_they_are(tmp_path):
    rows = pd.DataFrame({"mixer": ["mamba", HOSTILE], "accuracy": [0.51234567, 0.25]})
    page = Page(write([write_run(tmp_path / "run", "some-table", rows)], tmp_path / "r.html"))
    assert "mixer accuracy mamba 0.512346" in page.text and HOSTILE in page.text


def test_statements_of_the_theory_are_lines_of_one_claim(tmp_path):
    verdict = {
        "printed": "fails", "printed_evidence": "a counterexample", "correction": "another form", "corrected": "holds",
        "instances": 9, "informative": 9, "worst_margin": 0.5, "counterexample": None,
    }  # fmt: skip
    statements = [{"statement": f"Lemma {n} {HOSTILE}"} | verdict for n in range(6)]
    (tmp_path / "verify.json").write_text(json.dumps(statements))
    page = Page(write([tmp_path], tmp_path / "out" / "r.html"))
    assert [page.text.count(f"Lemma {n} {HOSTILE} disagrees a counterexample") for n in range(6)] == [1] * 6
    assert page.text.count("The theorems, lemmas and propositions.") == 1
    assert "theory: 6 of 6" in page.text[: page.text.index("What the paper writes")]


def test_table_1_is_summed_up_over_seeds(tmp_path):
    """Percent everywhere, in words: no fraction beside the paper's percents, no name of a column."""
    arms = {("mamba", "1"): (0.5, 0.7), ("mamba", "learnt from 1"): (0.6, 0.65)}
    cells = [(*key, seed, value) for key, values in arms.items() for seed, value in enumerate(values)]
    rows = pd.DataFrame(
        {
            "task": "mqar", "data": "d", "mixer": mixer, "lam": lam, "lr": 0.01, "seed": seed, "dtype": "float32", "when": "",
            "layer": pd.NA, "excerpt": pd.NA, "measure": measure, "value": value, "status": "ok",
        }
        for mixer, lam, seed, value in cells
        for measure in ("validation_accuracy", "test_accuracy")
    )  # fmt: skip
    page = Page(write([write_run(tmp_path / "run", "table1", rows)], tmp_path / "r.html"))
    shown = page.text[page.text.index("Table 1: test accuracy in percent") : page.text.index("Configuration and")]
    assert "task mixer λ = 1 λ learnt from 1 paper: λ = 1 paper: λ learnt" in shown
    assert "MQAR Mamba 60.0 ± 14.1 62.5 ± 3.5 81.5 85.3" in shown  # sd of two: the difference over sqrt(2)
    assert "2 seeds, float32" in shown
    assert not re.search(r"\b0\.\d|test_mean|test_sd|mqar", shown)


@pytest.mark.parametrize("content", [{}, {"manifest.json": "{}"}, {"bounds.csv": "a\n1\n"}])
def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        write([tmp_path], tmp_path / "out" / "r.html")
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ReportError, match="at least one run"):
        write([], tmp_path / "r.html")


def test_the_embedded_example_is_small_and_says_nothing_of_this_machine():
    text = EMBEDDED.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert "/work" not in text and "/home/" not in text and "/root" not in text
