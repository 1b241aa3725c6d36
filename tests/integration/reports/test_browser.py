"""The page of a report in headless Chromium, opened from disk: numbers under the pointer, toggles, keyboard, themes, phone, print.

Skipped where chromium or chromedriver is missing (Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import base64
import csv
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lscollapse.reports.page.page import write
from tests import ROOT
from tests.integration.reports.test_page import (
    EXCERPTS,
    HOSTILE,
    LAMBDAS,
    LAYERS,
    ablation,
    arm,
    doubtful,
    sweep,
    write_run,
)
from tests.unit.reports.figures.test_massive import EVEN, SINK, table

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = [name for name, found in (("chromium", BROWSER), ("chromedriver", DRIVER)) if not found]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not on PATH")

DESKTOP, PHONE = (1280, 900), (360, 740)
REMOVED, FULL = "gated, gate removed", "gated, full architecture"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("report")
    rows = sweep()
    loss = rows[rows["measure"].eq("mu") & rows["layer"].eq(LAYERS)].assign(measure="lm_loss", value=5.5, floor=np.nan)
    runs = [
        write_run(base / "sweep", "sweep-lambda", pd.concat([rows, loss])),
        write_run(base / "gating", "ablate-gating", ablation()),
    ]
    bounds = base / "bound-gated"
    bounds.mkdir()
    (bounds / "bounds.csv").write_text(
        'bound,sign,lam,reads,note\n"Theorem X, condition (7)",0,204.5,204,\n"measured, relative mu",1,3,3,\n'
    )
    (bounds / "curve.csv").write_text("lam,relative_mu,rank1_residual\n-2,0.5,0.1\n0,0.3,0.2\n2,0.4,0.5\n4,0.7,0.6\n")
    return write([*runs, bounds], base / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")
        driver = Chrome(options=options, service=Service(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


class View:
    """The page as somebody sees and uses it."""

    def __init__(self, driver: Chrome, path: Path, size: tuple[int, int] = DESKTOP, theme: str = "light") -> None:
        self.driver = driver
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        driver.get(path.as_uri())
        self.ready()

    def ready(self) -> None:
        wait = WebDriverWait(self.driver, 10, poll_frequency=0.02)
        wait.until(lambda driver: driver.execute_script("return document.documentElement.dataset.drawn") == "all")

    def figure(self, title: str) -> WebElement:
        figures = self.driver.find_elements(By.CSS_SELECTOR, ".figure")
        found = next(each for each in figures if each.find_element(By.TAG_NAME, "h2").text.startswith(title))
        self.driver.execute_script("arguments[0].scrollIntoView()", found)
        return found

    def click(self, inside: WebElement, words: str) -> WebElement:
        button = self.button(inside, words)
        button.click()
        return self.button(inside, words)

    def button(self, inside: WebElement, words: str) -> WebElement:
        script = """const [inside, words] = arguments, named = (b) => [b.dataset.name, b.textContent].includes(words);
          return [...inside.querySelectorAll("button")].find(named)"""
        return self.driver.execute_script(script, inside, words)

    def tick(self, figure: WebElement, x: float) -> float:
        """The centre of a tick of the x axis, in pixels of the page's view."""
        box = figure.find_element(By.CSS_SELECTOR, f'text[data-x="{x}"]')
        return self.driver.execute_script(
            "const b = arguments[0].getBoundingClientRect(); return b.left + b.width / 2", box
        )

    def hover(self, figure: WebElement, x: float, share: float = 0.5) -> None:
        """The pointer on the plot at this x of the page, and this share of its height from the top."""
        top, height = self.driver.execute_script(
            "const b = arguments[0].querySelector('svg').getBoundingClientRect(); return [b.top, b.height]", figure
        )
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(top + share * height))
        actions.perform()

    def legend(self, figure: WebElement) -> tuple[str, dict[str, tuple[str, str]]]:
        """What the crosshair is at, and of each curve the mean and spread."""
        script = """const text = (node, name) => node.querySelector(name).textContent;
          return [text(arguments[0], ".legend .at"), Object.fromEntries([...arguments[0].querySelectorAll(".legend li button")]
            .map((button) => [button.dataset.name, [text(button, ".value"), text(button, ".sd")]]))]"""
        at, values = self.driver.execute_script(script, figure)
        return at, {name: (mean, sd) for name, (mean, sd) in values.items()}

    def curves(self, figure: WebElement) -> int:
        return len(figure.find_elements(By.CSS_SELECTOR, "svg path.line"))

    def pressed(self, figure: WebElement, words: str) -> bool:
        return self.button(figure, words).get_attribute("aria-pressed") == "true"


@pytest.fixture
def view(chromium: Chrome, path: Path) -> Iterator[View]:
    """The page on a desktop; at the end the console must be empty."""
    chromium.get_log("browser")
    yield View(chromium, path)
    assert chromium.get_log("browser") == []


def expected(rows: pd.DataFrame, layer: int, **arm_of: Any) -> tuple[float, float]:
    for column, value in {"layer": layer, "measure": "relative_mu", **arm_of}.items():
        rows = rows[rows[column].isna() if value is None else rows[column].eq(value).fillna(False)]
    assert len(rows) == EXCERPTS
    return rows["value"].mean(), rows["value"].std()


def assert_reads(text: tuple[str, str], values: tuple[float, float]) -> None:
    assert float(text[0]) == pytest.approx(values[0], abs=6e-4)
    assert float(text[1].removeprefix("± ")) == pytest.approx(values[1], abs=6e-4)


def test_hover_reads_every_shown_curve_at_its_layer(view):
    figure = view.figure("Figure 1")
    first, last = view.tick(figure, 0), view.tick(figure, LAYERS)
    for layer in (2, 5):
        view.hover(figure, first + (last - first) * (layer + 0.3) / LAYERS)
        at, values = view.legend(figure)
        assert at == f"layer {layer}" and len(values) == len(LAMBDAS)
        for lam in LAMBDAS:
            name = f"λ = {lam:g}".replace("-", "−")
            assert_reads(values[name], expected(sweep(), layer, model="gated", gating=False, lam=lam))
    dots = figure.find_elements(By.CSS_SELECTOR, "svg g:last-child circle.dot")
    assert len(dots) == len(LAMBDAS)


def test_hover_over_lambda_reads_the_last_layer(view):
    figure = view.figure("Figure 2")
    view.hover(figure, view.tick(figure, -2))
    at, values = view.legend(figure)
    assert (at == "λ = −2" and list(values) == [REMOVED, FULL, HOSTILE]) or set(values) == {REMOVED, FULL, HOSTILE}
    assert_reads(values[FULL], expected(sweep(), LAYERS, model="gated", gating=True, lam=-2.0))
    assert_reads(values[HOSTILE], expected(sweep(), LAYERS, model=HOSTILE, lam=-2.0))


def test_tabs_change_the_model(view):
    figure = view.figure("Figure 1")
    view.click(figure, f"tabs {HOSTILE}")
    assert view.pressed(figure, f"tabs {HOSTILE}") and not view.pressed(figure, f"tabs {REMOVED}")
    at, values = view.legend(figure)
    assert at == f"layer {LAYERS} (last)"
    assert_reads(values["λ = 8"], expected(sweep(), LAYERS, model=HOSTILE, lam=8.0))


def test_the_legend_hides_and_shows_curves(view):
    figure = view.figure("Figure 1")
    assert view.curves(figure) == 4
    assert view.click(figure, "λ = 8").get_attribute("aria-pressed") == "false"
    assert view.curves(figure) == 3
    view.click(figure, f"tabs {FULL}")
    assert view.curves(figure) == 3 and not view.pressed(figure, "λ = 8")
    view.click(figure, "none")
    assert view.curves(figure) == 0
    view.click(figure, "λ = 8")
    assert view.curves(figure) == 1
    view.click(figure, "all")
    assert view.curves(figure) == 4


def test_the_log_scale_puts_values_where_their_logarithm_is(view):
    figure = view.figure("Figure 3")

    def heights() -> tuple[dict[float, float], float]:
        """Of the ticks by value, and of the dot of the arm with the least value."""
        ticks = {}
        for text in figure.find_elements(By.CSS_SELECTOR, "svg text.tick[text-anchor=end]"):
            if re.fullmatch(r"[\d.]+", text.text):
                ticks[float(text.text)] = float(text.get_attribute("y")) - 4
        dots = figure.find_elements(By.CSS_SELECTOR, "svg g:last-child circle.dot")
        return ticks, float(dots[0].get_attribute("cy"))

    value, _ = expected(ablation(), 4, arm="gate, LN")
    for words, measure in (("scale linear", float), ("scale log", math.log)):
        view.click(figure, words)
        view.hover(figure, view.tick(figure, 4))
        ticks, height = heights()
        low, high = min(ticks), max(ticks)
        if words == "scale log":
            assert low > 0
        share = (measure(value) - measure(low)) / (measure(high) - measure(low))
        assert height == pytest.approx(ticks[low] + share * (ticks[high] - ticks[low]), abs=1.0)


def test_an_overflow_is_marked_and_named(view):
    figure = view.figure("Figure 3")
    assert len(figure.find_elements(By.CSS_SELECTOR, "path.cross")) == 1
    assert "overflow at layer 3 (2 of 5)" in view.button(figure, "no gate, no LN").text
    view.hover(figure, view.tick(figure, 5))
    at, values = view.legend(figure)
    assert at == "layer 5" and values["no gate, no LN"] == ("–", "")
    assert "overflow (2 of 5): no gate, no LN" in figure.find_element(By.CSS_SELECTOR, ".foot").text.replace(
        "\N{NO-BREAK SPACE}", " "
    )


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("rounded")
    rows = pd.concat([arm("gated", lam, False) for lam in LAMBDAS]).assign(rounding=1.25e-3)
    last = rows["lam"].eq(8) & rows["layer"].eq(LAYERS)
    rows = rows.assign(status=rows["status"].mask(last, "unresolved"))
    runs = [write_run(base / "doubtful", "ablate-gating", doubtful()), write_run(base / "sweep", "sweep-lambda", rows)]
    return write(runs, base / "report.html")


def hatched(figure: WebElement) -> list[tuple[float, float]]:
    """From where to where strokes begin, strip by strip."""
    starts = [
        re.findall(r"M([\d.]+),", path.get_attribute("d")) for path in figure.find_elements(By.CSS_SELECTOR, ".hatch")
    ]
    return [(min(map(float, strokes)), max(map(float, strokes))) for strokes in starts]


def test_what_is_unresolved_is_a_hatched_gap_in_the_curve(chromium, rounded):
    view = View(chromium, rounded)
    figure = view.figure("Figure 3")
    assert "hatched: unresolved" in figure.find_element(By.CSS_SELECTOR, ".view").text
    assert "unresolved: layers 5 to 6" in view.button(figure, "gate, LN").text
    assert "unresolved: layers 2 to 3" in view.button(figure, "gate, no LN").text
    script = "return arguments[0].querySelector('svg').getBoundingClientRect().left"
    left, ticks = chromium.execute_script(script, figure), {x: view.tick(figure, x) for x in range(LAYERS + 1)}
    half = (ticks[1] - ticks[0]) / 2
    for (first, last), (low, high) in zip(hatched(figure), ((5, 6), (2, 3)), strict=True):
        assert first + left == pytest.approx(ticks[low] - half, abs=6)  # a stroke every 5 pixels
        assert last + left == pytest.approx(ticks[high] + (half if high < LAYERS else 0), abs=6)
    subpaths = [path.get_attribute("d").count("M") for path in figure.find_elements(By.CSS_SELECTOR, "path.line")]
    assert subpaths == [1, 1, 2, 1]  # "gate, no LN" goes on after its gap
    view.hover(figure, view.tick(figure, 3))
    _, values = view.legend(figure)
    assert values["gate, no LN"] == ("–", "") and values["gate, LN"][0] != "–"
    foot = figure.find_element(By.CSS_SELECTOR, ".foot").text.replace("\N{NO-BREAK SPACE}", " ")
    assert "unresolved (1 of 5): gate, no LN" in foot
    view.click(figure, "gate, LN"), view.click(figure, "gate, no LN")
    assert hatched(figure) == [] and "hatched" not in figure.find_element(By.CSS_SELECTOR, ".view").text


def test_an_unresolved_lambda_is_hatched_not_crossed(chromium, rounded):
    view = View(chromium, rounded)
    figure = view.figure("Figure 2")
    assert len(hatched(figure)) == 1 and not figure.find_elements(By.CSS_SELECTOR, "path.cross")
    assert "unresolved: λ = 8" in figure.find_element(By.CSS_SELECTOR, ".legend").text


def test_the_rounding_of_a_value_is_told_under_the_pointer(chromium, rounded):
    view = View(chromium, rounded)
    figure = view.figure("Figure 3")
    view.hover(figure, view.tick(figure, 4))
    words = figure.find_element(By.CSS_SELECTOR, "svg text.halo").text
    assert re.fullmatch(r".*: \d\.\d{3} ± \d\.\d{3}, rounding ± 1\.0·10⁻⁵", words)
    figure = view.figure("Figure 1")
    view.click(figure, "spread each excerpt")
    view.hover(figure, view.tick(figure, 4))
    assert figure.find_element(By.CSS_SELECTOR, "svg text.halo").text.endswith("), rounding ± 0.0013")
    assert chromium.get_log("browser") == []


def test_excerpts_on_demand_with_title_and_value(view):
    figure = view.figure("Figure 1")
    view.click(figure, "spread each excerpt")
    lines = figure.find_elements(By.CSS_SELECTOR, "path.excerpts")
    assert [line.get_attribute("d").count("M") for line in lines] == [EXCERPTS] * len(LAMBDAS)
    view.hover(figure, view.tick(figure, 4), 0.05)  # near the top: the highest excerpt
    rows = sweep().query("model == 'gated' and layer == 4 and measure == 'relative_mu'")
    rows = rows[~rows["gating"].astype(bool)]
    highest = rows.reset_index().sort_values("value").iloc[-1]
    words = figure.find_element(By.CSS_SELECTOR, "svg text.halo").text
    assert words == f"Article {highest['excerpt']} {HOSTILE}: {highest['value']:.3f} (λ = {highest['lam']:g})"


def test_a_measure_of_one_layer_is_a_dot(view):
    figure = view.figure("Figure 1")
    Select(figure.find_element(By.TAG_NAME, "select")).select_by_visible_text("language-model loss (nats)")
    assert len(figure.find_elements(By.CSS_SELECTOR, ".series circle.dot")) == len(LAMBDAS)
    assert view.legend(figure)[1]["λ = 1"][0] == "5.500"


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a massive token at layers 2 to 4, whose ratio is infinite at layer 3 under lambda = 2."""
    base = tmp_path_factory.mktemp("sunk")
    hole = SINK | {"row_norm_ratio": (1.4, 2.6, 170.0, math.inf, 62.0, 5.6)}
    rows = pd.concat([table(EVEN, lam=0.0), table(SINK, lam=1.0), table(hole, lam=2.0)])
    return write([write_run(base / "decoder", "measure", rows)], base / "report.html")


def test_a_massive_row_is_told_and_what_shows_it_is_one_click_away(chromium, sunk):
    view = View(chromium, sunk)
    figure = view.figure("Every λ")
    note = figure.find_element(By.CSS_SELECTOR, ".massive")
    assert "layers 2 to 4 of λ = 1, 2: relative μ weighs that row most there." in note.text.replace(
        "\N{NO-BREAK SPACE}", " "
    )
    view.click(figure, "instead angular_mu")
    assert Select(figure.find_element(By.TAG_NAME, "select")).first_selected_option.text == "angular μ"
    assert note.text == "" and "under 0.5 counts as collapsed" in figure.find_element(By.CSS_SELECTOR, ".view").text
    assert float(view.legend(figure)[1]["λ = 1"][0]) == SINK["angular_mu"][-1]
    Select(figure.find_element(By.TAG_NAME, "select")).select_by_visible_text("relative μ")
    view.click(figure, "instead row_norm_ratio")
    assert view.pressed(figure, "scale log")
    assert "dotted: over 10 one row decides relative μ" in figure.find_element(By.CSS_SELECTOR, ".view").text
    ticks = {text.text: float(text.get_attribute("y")) for text in figure.find_elements(By.CSS_SELECTOR, "svg text.tick[text-anchor=end]")}  # fmt: skip
    (line,) = figure.find_elements(By.CSS_SELECTOR, "svg line.mark-line")
    assert float(line.get_attribute("y1")) == pytest.approx(ticks["10"] - 4, abs=0.5)
    view.hover(figure, view.tick(figure, 3))
    values = view.legend(figure)[1]
    assert (values["λ = 1"][0], values["λ = 2"][0], values["λ = 0"][0]) == ("137.0", "–", "3.000")
    assert "infinite at layer 3" in view.button(figure, "λ = 2").text
    assert not figure.find_elements(By.CSS_SELECTOR, "path.cross")  # the curve goes on
    view.click(figure, "spread each excerpt")
    assert view.curves(figure) == 3 and chromium.get_log("browser") == []


def test_theory_lines_and_table(view):
    figure = view.figure("What the theorems")
    assert len(figure.find_elements(By.CSS_SELECTOR, "line.bound")) == 2
    assert "Theorem X" in figure.text
    view.hover(
        figure,
        view.driver.execute_script(
            "return arguments[0].querySelector('.dot').getBoundingClientRect().left + 2", figure
        ),
    )
    at, values = view.legend(figure)
    assert at == "|λ| = 2" and values["λ > 0"][0] == "0.400" and values["λ < 0"][0] == "0.500"


def test_the_keyboard_does_everything(view):
    keys = ActionChains(view.driver, duration=0)
    driver = view.driver
    figure = view.figure("Figure 1")
    view.button(figure, f"tabs {REMOVED}").send_keys(Keys.TAB, Keys.ENTER)
    assert view.pressed(figure, f"tabs {FULL}")
    assert driver.switch_to.active_element.get_attribute("data-name") == f"tabs {FULL}"
    plot = figure.find_element(By.CSS_SELECTOR, ".plot")
    for _ in range(12):
        keys.send_keys(Keys.TAB).perform()
        if driver.switch_to.active_element == plot:
            break
    keys.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN).perform()
    assert view.legend(figure)[0] == "layer 1"
    mean, _ = expected(sweep(), 1, model="gated", gating=True, lam=1.0)
    spoken = figure.find_element(By.CSS_SELECTOR, "[aria-live]").get_attribute("textContent")
    assert spoken.startswith(f"layer 1, λ = 1: {mean:.3f}")
    keys.send_keys(Keys.END).perform()
    assert view.legend(figure)[0] == f"layer {LAYERS}"
    keys.send_keys(Keys.TAB, Keys.TAB, Keys.TAB, Keys.ENTER).perform()  # all, none, the first curve
    assert driver.switch_to.active_element == view.button(figure, "λ = 8") and not view.pressed(figure, "λ = 8")


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 of a computed colour, rgb(r, g, b)."""
    channels = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(view, path, theme):
    view = View(view.driver, path, theme=theme)
    style = "return getComputedStyle(arguments[0]).getPropertyValue(arguments[1])"

    def colour(selector: str, what: str) -> str:
        return view.driver.execute_script(style, view.driver.find_element(By.CSS_SELECTOR, selector), what)

    paper, card = colour("body", "background-color"), colour(".card", "background-color")
    assert (luminance(paper) < 0.05) == (theme == "dark")
    assert contrast(colour("body", "color"), paper) > 7
    for soft in (".caption", ".claims .name", ".chip.yes", ".chip.no", ".legend .sd"):
        background = colour(soft, "background-color") if "chip" in soft else card
        assert contrast(colour(soft, "color"), background) > 4.5, soft
    for line in view.figure("Figure 3").find_elements(By.CSS_SELECTOR, "path.line"):
        assert contrast(view.driver.execute_script(style, line, "stroke"), card) > 3


def test_the_theme_is_chosen_and_kept(view):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = view.driver.execute_script(background)
    toggle = view.driver.find_element(By.ID, "theme")
    toggle.send_keys(Keys.ENTER)
    dark = view.driver.execute_script(background)
    assert toggle.get_attribute("aria-pressed") == "true" and luminance(dark) < luminance(light)
    view.driver.refresh()
    view.ready()
    assert view.driver.execute_script(background) == dark
    view.driver.execute_script("localStorage.clear()")


def test_a_phone_has_nothing_beside_the_screen(view, path):
    phone = View(view.driver, path, PHONE)
    for words in (f"tabs {FULL}", "spread each excerpt"):
        phone.click(phone.figure("Figure 1"), words)
    script = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, seen = phone.driver.execute_script(script)
    assert scrolled == seen == PHONE[0]
    outside = """return [...document.querySelectorAll("button, select, h1, h2, p, svg, dd, td")].filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width && (box.right > innerWidth + 1 || box.left < -1) && !node.closest(".wide, .hidden, .skip");
    }).map((node) => node.outerHTML.slice(0, 80))"""
    assert phone.driver.execute_script(outside) == []
    low = "return [...document.querySelectorAll('.legend li button, .controls button')].map((b) => b.getBoundingClientRect().height)"
    assert min(phone.driver.execute_script(low)) >= 32


def test_the_numbers_are_a_table_and_a_file(view):
    figure = view.figure("Figure 3")
    figure.find_element(By.TAG_NAME, "summary").click()
    rows = (By.CSS_SELECTOR, "details tbody tr")
    WebDriverWait(view.driver, 10, poll_frequency=0.02).until(lambda _: len(figure.find_elements(*rows)) > 2)
    cells = figure.find_elements(*rows)[2].find_elements(By.TAG_NAME, "td")
    mean, sd = expected(ablation(), 2, arm="gate, LN")
    assert cells[0].text == f"{mean:.3f} ± {sd:.3f}"
    view.click(figure, "Save as CSV")
    file = view.driver.downloads / "gating-arms-relative_mu.csv"
    WebDriverWait(view.driver, 10, poll_frequency=0.02).until(lambda _: file.exists() and file.stat().st_size)
    lines = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    line = next(line for line in lines if line["x"] == "2" and line["curve"] == "gate, LN")
    assert float(line["mean"]) == pytest.approx(mean, rel=1e-5)
    assert (
        next(line["note"] for line in lines if line["curve"] == "no gate, no LN" and line["x"] == "3")
        == "overflow (2 of 5)"
    )


def test_it_prints_on_white_without_its_controls(view, path):
    view = View(view.driver, path, theme="dark")
    printed = view.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    view.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return [...document.querySelectorAll('.controls, .bar')].filter((node) => node.offsetHeight).length"
    assert view.driver.execute_script(shown) == 0
    assert luminance(view.driver.execute_script("return getComputedStyle(document.body).backgroundColor")) == 1
    opened = "return [...document.querySelectorAll('#runs details')].map((details) => details.open)"
    assert view.driver.execute_script(opened) == [True, False]
    view.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert view.driver.execute_script(opened) == [True, True]
    view.driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert view.driver.execute_script(opened) == [True, False]


def test_names_from_outside_run_nothing(view):
    assert HOSTILE in view.driver.find_element(By.TAG_NAME, "body").text
    assert view.driver.execute_script("return document.querySelectorAll('img, script[src]').length") == 0


def test_the_embedded_example_opens(view):
    example = ROOT / "results" / "reference" / "report.html"
    opened = View(view.driver, example)
    for title in ("Figure 1", "Figure 2", "Figure 3", "Figure 4"):
        assert opened.curves(opened.figure(title)) >= 4


def test_one_excerpt_and_no_spread_draw_too(view, tmp_path):
    rows = pd.concat([arm("one", lam, None).query("excerpt == 0") for lam in LAMBDAS])
    page = write([write_run(tmp_path / "run", "sweep-lambda", rows)], tmp_path / "one.html")
    opened = View(view.driver, page)
    figure = opened.figure("Figure 1")
    assert opened.curves(figure) == len(LAMBDAS)
    assert opened.legend(figure)[1]["λ = 1"][1] == ""
