"""The grid of Table 1: configurations, cells, the choice by validation, the statistical test, table and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from safetensors.torch import load_file
from scipy import stats
from typer.testing import CliRunner

from lscollapse.cli import train
from lscollapse.core.config import ConfigError, configure
from lscollapse.core.lock import LockError, locked
from lscollapse.core.manifest import RunFolderError
from lscollapse.data import images, mqar
from lscollapse.data.examples import SPLITS, Examples
from lscollapse.experiments.table1.cell import cells, drawn_task, make_net, modes
from lscollapse.experiments.table1.grid import run, train_one
from lscollapse.experiments.table1.schema import Table1
from lscollapse.models.nets.lambda_net import Net, NetConfig
from lscollapse.reports import table1
from lscollapse.reports.figures.table1 import draw, lambda_figure, mu_figure
from lscollapse.runs.training_state import Diverged
from tests import ROOT
from tests.unit.core.test_parts import Notes
from tests.unit.core.test_run_folder import GONE

CONFIGS = ROOT / "configs" / "table1"
SMALL_NET = ["hidden_size=8", "state_size=4", "head_dim=8"]
SMALL_MQAR = ["seq_len=12", "pairs=2", "vocab_size=16", "train=24", "validation=10", "test=12"]
TINY = [
    *(f"mqar.net.{setting}" for setting in SMALL_NET),
    *(f"mqar.data.{setting}" for setting in SMALL_MQAR),
    "mqar.training.steps=2",
    "mqar.training.batch=8",
    "measured=2",
    "tensorboard=false",
    "workers=1",
]


def tiny(*settings: str) -> Table1:
    return configure(Table1, None, {"mqar": {"lrs": [1e-2]}}, [*TINY, *settings])


# --- configuration ---


@pytest.mark.parametrize("name", ["paper", "author-code", "embedded"])
def test_the_shipped_configurations_start_on_a_tiny_fraction(name: str, tmp_path: Path) -> None:
    """Their own mixers, modes and recipes, with less data, narrower nets, two steps and one seed."""
    file = CONFIGS / f"{name}.yaml"
    settings = ["measured=2", "workers=1", "tensorboard=false", "seeds=[0]"]
    for task, section in configure(Table1, file).tasks.items():
        settings += [f"{task}.per_mixer.{mixer}.training.steps=1" for mixer in section.per_mixer]
        settings += [f"{task}.net.{setting}" for setting in SMALL_NET]
        settings += [f"{task}.training.{setting}" for setting in ("steps=1", "batch=4")]
        settings += [f"{task}.data.{setting}" for setting in SMALL_MQAR if task == "mqar"]
        settings += [f"{task}.lrs=[1e-3]", f"{task}.data.source=digits"][: 1 + (task == "image")]
    config = configure(Table1, file, settings=settings)
    assert all(len(recipe.lrs) == 1 for task in config.tasks.values() for recipe in task.per_mixer.values())
    rows = run(config, tmp_path)
    arms = 4 * len(modes(config)) * len(config.tasks)
    assert (rows["measure"] == "test_accuracy").sum() == arms
    assert not (rows["status"] != "ok").any()


def test_the_papers_configuration_is_appendix_a13() -> None:
    config = configure(Table1, CONFIGS / "paper.yaml")
    assert config.mqar is not None and config.image is not None
    np.testing.assert_allclose(config.mqar.lrs, np.logspace(-4, -2, 4), rtol=1e-6)
    made = {(c.task, c.mixer, c.lam, c.lr): c for c in cells(config, Path("x"))}
    assert len(made) == 4 * 2 * 4 + 4 * 2
    shape = ("hidden_size", "num_hidden_layers", "state_size")
    mqar_cell = made["mqar", "attention", "1", config.mqar.lrs[0]]
    assert tuple(mqar_cell.net[name] for name in shape) == (128, 2, 64)
    training = mqar_cell.training
    assert (training.batch, training.epochs, training.weight_decay) == (64, 64, 0.1)
    for mixer, lr, decay in (
        ("attention", 5e-4, 0.0),
        ("linear", 5e-4, 0.0),
        ("mamba", 2e-4, 0.01),
        ("mamba2", 2e-4, 0.01),
    ):
        cell = made["image", mixer, "learnt from -1", lr]
        assert tuple(cell.net[name] for name in shape) == (256, 4, 64)
        assert (cell.training.weight_decay, cell.training.batch, cell.net["lam_init"]) == (decay, 64, -1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mqar.net.hiden_size=3", "unknown setting 'mqar.net.hiden_size', did you mean 'hidden_size'"),
        ("mqar.per_mixer.mamba.training.batsh=3", "'mqar.per_mixer.mamba.training.batsh', did you mean 'batch'"),
        ("seed=3", "unknown setting 'seed', did you mean 'seeds'"),
        ("mqar.training.schedule=x", "mqar.training.schedule: .*'cosine' or 'constant'"),
        ("mqar.data.pears=4", "unknown setting 'mqar.data.pears', did you mean 'pairs'"),
        ("mqar.lrs=[0]", "mqar.lrs.0: input should be greater than 0, got 0"),
        ("mqar.lrs=[0.1, 1.0e-1]", "mqar.lrs: a learning rate is given twice"),
        ("mqar=null", "no task: give a section mqar or image"),
        ("mqar.net.hidden_size=0", "mqar.net.hidden_size: .*greater than or equal to 1, got 0"),
        ("mqar.net.shape=square", "mqar.net.shape: .*'paper' or 'author_code', got 'square'"),
        ("mqar.data.pairs=9", "mqar.data: 9 pairs do not fit into 12 tokens"),
        ("lams=[learned]", "lams.0: input should be a valid number or 'learnable', got 'learned'"),
        ("mixers=[mambo]", "mixers.0: .*'mamba' or 'mamba2'"),
    ],
)
def test_a_mistake_is_one_clear_line(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(setting)


def test_per_mixer_settings_lie_over_the_tasks() -> None:
    config = tiny("mqar.per_mixer.mamba.net.state_size=3", "mqar.per_mixer.mamba.lrs=[0.5]")
    made = {cell.mixer: cell for cell in cells(config, Path("x"))}
    assert (made["mamba"].net["state_size"], made["mamba"].net["hidden_size"], made["mamba"].lr) == (3, 8, 0.5)
    assert (made["linear"].net["state_size"], made["linear"].lr) == (4, 0.01)


# --- the grid ---


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table1, Path, pd.DataFrame]:
    config = tiny("mixers=[linear, mamba2]", "mqar.lrs=[1e-3, 3e-2]", "seeds=[0, 1]")
    folder = tmp_path_factory.mktemp("table1") / "run"
    return config, folder, run(config, folder)


def test_the_best_rate_on_validation_reads_the_test_set_and_no_other(grid: tuple[Table1, Path, pd.DataFrame]) -> None:
    _, folder, rows = grid
    validation = rows[rows["measure"] == "validation_accuracy"]
    assert len(validation) == 2 * 2 * 2 * 2
    tested = rows[rows["measure"] == "test_accuracy"]
    test = mqar.sequences(mqar.MqarConfig(seq_len=12, pairs=2, vocab_size=16), "test", 12, 0)
    for mixer in ("linear", "mamba2"):
        for lam in ("1", "learnt from -1"):
            own = validation[(validation["mixer"] == mixer) & (validation["lam"] == lam)]
            means = {lr: np.mean(own.loc[own["lr"] == lr, "value"].tolist()) for lr in (1e-3, 3e-2)}
            best = max(means, key=lambda lr: (means[lr], -lr))
            read = tested[(tested["mixer"] == mixer) & (tested["lam"] == lam)]
            assert set(read["lr"]) == {best} and sorted(read["seed"]) == [0, 1]
            for _, row in read.iterrows():
                net = folder / "cells" / f"mqar-{mixer}-lam_{lam.replace(' ', '_')}-lr_{best:g}-seed_{row['seed']}"
                assert row["value"] == pytest.approx(accuracy_of(net, test))


def accuracy_of(folder: Path, test: Examples) -> float:
    net = Net(NetConfig.from_dict(json.loads((folder / "config.json").read_text())))
    net.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        said = net.eval()(torch.from_numpy(test.ids.astype(np.int64))).argmax(-1).numpy()
    return float(np.mean(np.take_along_axis(said, test.at.astype(np.int64), 1) == test.labels))


def test_the_seed_alone_decides_where_a_net_starts(grid: tuple[Table1, Path, pd.DataFrame]) -> None:
    config, folder, _ = grid
    made = {(c.lam, c.seed): c for c in cells(config, folder) if c.mixer == "mamba2" and c.lr == 1e-3}
    nets = {key: make_net(cell, drawn_task(cell.data)) for key, cell in made.items()}
    a, b, c = (nets[key].state_dict() for key in (("1", 0), ("learnt from -1", 0), ("1", 1)))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(
        a["decoder.weight"], c["decoder.weight"]
    )


def test_layers_are_measured_before_and_after_training(grid: tuple[Table1, Path, pd.DataFrame]) -> None:
    _, folder, rows = grid
    own = rows[(rows["mixer"] == "mamba2") & (rows["lr"] == 1e-3) & (rows["seed"] == 1)]
    lams = own[own["measure"] == "lambda"].set_index(["lam", "when", "layer"])["value"]
    assert lams["1"].tolist() == [1.0] * 4
    assert lams["learnt from -1", "before"].tolist() == [-1.0, -1.0]
    key = "mqar-mamba2-lam_learnt_from_-1-lr_0.001-seed_1"
    saved = load_file(folder / "cells" / key / "model.safetensors")
    assert lams["learnt from -1", "after"].tolist() == [float(saved[f"layers.{k}.lam"]) for k in range(2)]
    assert (lams["learnt from -1", "after"] != -1).all()
    net = Net(NetConfig.from_dict(json.loads((folder / "cells" / key / "config.json").read_text())))
    net.load_state_dict(saved)
    ids = mqar.sequences(mqar.MqarConfig(seq_len=12, pairs=2, vocab_size=16), "validation", 10, 0).ids[:2]
    Y = net.layers[0](net.embed(torch.from_numpy(ids.astype(np.int64)))).detach().double().numpy()
    expected = [np.linalg.norm(y - y.mean(0)) / np.linalg.norm(y) for y in Y]
    mu = own[(own["measure"] == "relative_mu") & (own["lam"] == "learnt from -1") & (own["layer"] == 1)]
    np.testing.assert_allclose(mu.loc[mu["when"] == "after", "value"], expected, rtol=1e-6)


class Stop(Exception):
    pass


class Stopper:
    """A Progress that ends the run after some cells."""

    def __init__(self, after: int) -> None:
        self.left = after

    def note(self, message: str) -> None:
        return None

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


def test_a_killed_grid_continues_and_processes_change_nothing(
    grid: tuple[Table1, Path, pd.DataFrame], tmp_path: Path
) -> None:
    config, whole, rows = grid
    with pytest.raises(Stop):
        run(config, tmp_path / "run", Stopper(5))
    pd.testing.assert_frame_equal(run(config.model_copy(update={"workers": 2}), tmp_path / "run"), rows)
    for name in ("rows.parquet", "rows.csv"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    pd.testing.assert_frame_equal(run(config, whole), rows)  # complete: nothing is computed
    with pytest.raises(RunFolderError, match="seeds"):
        run(config.model_copy(update={"seeds": [7]}), whole)


def test_what_a_kill_or_a_bad_disk_did_to_a_grid_is_mended(
    grid: tuple[Table1, Path, pd.DataFrame], tmp_path: Path
) -> None:
    """A net that is not the one that was measured is trained again; states and half-written files of finished cells go."""
    config, whole, rows = grid
    with pytest.raises(Stop):
        run(config, tmp_path / "run", Stopper(4))
    nets = sorted((tmp_path / "run" / "cells").glob("*/model.safetensors"))
    good = nets[0].read_bytes()
    nets[0].write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for name in ("state.pt", f".model.safetensors.{GONE}.partial"):
        (nets[1].parent / name).write_bytes(b"left")
    told = Notes()
    pd.testing.assert_frame_equal(run(config, tmp_path / "run", told), rows)
    assert [f"{nets[0]} is not the net that it was measured on" in note for note in told.said].count(True) == 1
    assert nets[0].read_bytes() == good
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (whole, tmp_path / "run")]
    assert names[0] == names[1]


def test_a_folder_in_which_another_process_trains(tmp_path: Path) -> None:
    cell = next(cells(tiny("seeds=[0]"), tmp_path))
    with locked(cell.folder), pytest.raises(LockError, match="is being written by process"):
        train_one(cell)


def test_a_rate_that_diverged_is_not_chosen(tmp_path: Path) -> None:
    limits = ("mqar.lrs=[1e-3, 1e30]", "mqar.training.steps=3", "mqar.training.clip=1e30")
    config = tiny("mixers=[linear]", "lams=[1]", "seeds=[0]", *limits)
    rows = run(config, tmp_path / "run")
    states = rows[rows["measure"] == "validation_accuracy"].set_index("lr")["status"]
    assert states.to_dict() == {1e-3: "ok", 1e30: "nan"}
    assert set(rows.loc[rows["measure"] == "test_accuracy", "lr"]) == {1e-3}
    assert (tmp_path / "run" / "cells" / "mqar-linear-lam_1-lr_1e+30-seed_0" / "diverged.json").exists()
    cell = next(c for c in cells(config, tmp_path / "run" / "cells") if c.lr == 1e30)
    with pytest.raises(Diverged, match="lower the learning rate"):
        train_one(cell)


# --- the statistical test ---


def rows_of(accuracies: dict[tuple[str, str, str], list[float]]) -> pd.DataFrame:
    lines = [
        {"task": task, "mixer": mixer, "lam": lam, "lr": 0.1, "seed": seed, "measure": measure, "value": value}
        for (task, mixer, lam), values in accuracies.items()
        for seed, value in enumerate(values)
        for measure in ("test_accuracy", "validation_accuracy")
    ]
    layers = [
        {"task": task, "mixer": mixer, "lam": lam, "lr": 0.1, "seed": seed, "measure": measure, "layer": layer,
         "value": 0.1 * layer + seed, "when": when, "excerpt": 0}
        for (task, mixer, lam), values in accuracies.items() for seed in range(len(values))
        for measure in ("lambda", "relative_mu") for layer in (1, 2) for when in ("before", "after")
    ]  # fmt: skip
    steps = [{**line, "measure": "steps", "value": 30} for line in lines if line["measure"] == "test_accuracy"]
    return pd.DataFrame([*lines, *layers, *steps]).assign(data="some data", dtype="float32", status="ok")


def test_bounds_are_welchs() -> None:
    learnt, fixed = [0.91, 0.95, 0.90, 0.97], [0.88, 0.93, 0.94]
    expected = stats.ttest_ind(learnt, fixed, equal_var=False).confidence_interval(0.90)  # 5 % on either side
    assert table1.welch_bounds([(learnt, fixed)], 0.05) == pytest.approx((expected.low, expected.high))


def test_the_bounds_of_an_average_hold_as_often_as_they_say() -> None:
    """Three pairs of unequal sizes and spreads; 2,000 draws, the true mean difference is 0.01."""
    rng = np.random.default_rng(1)
    shapes = [(3, 4, 0.01, 0.0), (4, 3, 0.03, 0.02), (5, 3, 0.002, 0.01)]  # n learnt, n fixed, sd, difference
    over = 0
    for _ in range(2000):
        pairs = [(list(rng.normal(d, sd, n)), list(rng.normal(0, sd, m))) for n, m, sd, d in shapes]
        over += table1.welch_bounds(pairs, 0.05)[0] > 0.01
    assert 0.03 < over / 2000 < 0.07


def test_a_loss_of_the_margin_passes_as_no_worse_no_more_often_than_the_level() -> None:
    """2,000 draws at the edge of the hypothesis: 5 % of the verdicts may be "no worse", give or take."""
    rng = np.random.default_rng(0)
    arm = ("mqar", "mamba", "learnt from -1")
    draws = rng.normal(0.9, 0.01, (2000, 2, 5)) - np.array([[0.02], [0.0]])
    passed = [table1.contrast(arm, [(list(a), list(b))], 0.02, 1).verdict == "no worse" for a, b in draws]
    assert 0.03 < np.mean(passed) < 0.07


@pytest.mark.parametrize(
    ("learnt", "fixed", "verdict"),
    [
        ([0.99, 0.985, 0.99], [0.99, 0.99, 0.985], "no worse"),
        ([0.985, 0.985], [0.99, 0.99], "no worse"),  # without spread the difference itself decides: 0.5 points
        ([0.9, 0.9], [0.99, 0.99], "worse"),
        ([0.80, 0.81, 0.80], [0.99, 0.985, 0.99], "worse"),
        ([0.99, 0.30, 0.99], [0.99, 0.99, 0.985], "undecided"),
        ([0.99], [0.2], "undecided"),
    ],
)
def test_verdicts(learnt: list[float], fixed: list[float], verdict: str) -> None:
    found = table1.contrast(("mqar", "mamba", "learnt from -1"), [(learnt, fixed)], 0.02, 8)
    assert found.verdict == verdict
    assert found.difference == pytest.approx(np.mean(learnt) - np.mean(fixed))


def test_the_sentence_needs_every_comparison() -> None:
    same, worse, wide = [0.9, 0.901, 0.902], [0.5, 0.501, 0.502], [0.9, 0.3, 0.9]

    def verdict(*learnt: list[float]) -> list[str]:
        arms = {("mqar", mixer, "1"): same for mixer in ("attention", "mamba")}
        arms |= {
            ("mqar", mixer, "learnt from -1"): values
            for mixer, values in zip(("attention", "mamba"), learnt, strict=True)
        }
        return [v for v, _ in table1.verdicts(table1.contrasts(rows_of(arms), 0.02)).values()]

    assert verdict(same, same) == ["agrees", "agrees", "undecided"]  # each, on average, outperforms
    assert verdict(same, wide) == ["undecided", "undecided", "undecided"]
    assert verdict(worse, wide) == ["disagrees", "disagrees", "undecided"]
    assert verdict(same, [0.99, 0.991, 0.992]) == ["agrees", "agrees", "agrees"]


# --- what a person looks at ---


@pytest.fixture
def made_up() -> pd.DataFrame:
    modes = {"1": 0.0, "learnt from -1": 0.01}
    mixers = {"attention": 0.9, "linear": 0.1}
    arms = {("mqar", mixer, lam): [base + more, base + more + 0.02] for mixer, base in mixers.items()
            for lam, more in modes.items()}  # fmt: skip
    return rows_of(arms | {("image", "attention", lam): [0.5 + more] for lam, more in modes.items()})


def test_the_table_says_mean_spread_and_the_papers_figures(made_up: pd.DataFrame) -> None:
    text = table1.markdown(made_up, 0.02)
    assert "| MQAR | Transformer | 91.0 ± 1.4 | 92.0 ± 1.4 | 99.6 | 98.9 |" in text  # sd of two: 0.02 / sqrt(2)
    assert "| MQAR | Lin. Transformer | 11.0 ± 1.4 | 12.0 ± 1.4 | 1.6 | 1.55 |" in text
    assert "| Image | Transformer | 50.0 | 51.0 | 32.64 | 32.85 |" in text
    assert "margin 2 points, level 5 %" in text and "some data" in text and "2 seeds" in text
    assert "Transformer & 91.0 $\\pm$ 1.4 & 92.0 $\\pm$ 1.4 & 99.6 & 98.9 \\\\" in table1.latex(made_up)
    table = table1.summary(made_up).set_index(["task", "mixer", "lam"])
    assert table.loc[("mqar", "attention", "1"), "test_mean"] == pytest.approx(91.0)  # percent, as the paper's
    assert table.loc[("mqar", "attention", "1"), "test_sd"] == pytest.approx(2.0 / math.sqrt(2))
    assert table.loc[("mqar", "attention", "learnt from -1"), "paper"] == 98.9


def test_figures_plot_the_rows_and_say_what_they_are_of(made_up: pd.DataFrame, tmp_path: Path) -> None:
    figure, data = lambda_figure(made_up)
    assert set(data["lam"]) == {"learnt from -1"} and set(data["layer"]) == {1, 2}
    panel = next(ax for ax in figure.axes if "Transformer" in ax.get_title("left"))
    assert sorted(y for line in panel.get_lines() if line.get_marker() == "o" for y in line.get_ydata()) == [
        0.1,
        0.2,
        1.1,
        1.2,
    ]
    figure, data = mu_figure(made_up)
    chosen = data[(data["task"] == "mqar") & (data["mixer"] == "linear") & (data["when"] == "after")]
    assert chosen["mean"].tolist() == pytest.approx([0.6, 0.7, 0.6, 0.7])
    assert chosen["std"].tolist() == pytest.approx([math.sqrt(0.5)] * 4)
    caption = " ".join(figure.get_supxlabel().split())
    assert "some data" in caption and "n = 2 seeds" in caption and "float32" in caption
    names = {path.name for path in draw(made_up, tmp_path)}
    assert {"table1-lambda.png", "table1-mu.png", "table1-mu.csv"} <= names


# --- the verbs ---


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    app = typer.Typer()
    app.command()(train.train)
    app.command()(train.table1)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_verbs(call: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "mixers: [linear]\nseeds: [0, 1]\nmqar: {lrs: [1e-2, 1e-3]}\nimage: {lrs: [1e-3]}\n"
    )
    image = ["image.net.hidden_size=8", "image.training.steps=2", "image.training.batch=8"]
    limits = [word for setting in (*TINY, *image) for word in ("--set", setting)]
    told = call("table1", "--config", "tiny.yaml", *limits, "--out", "run", "--to", "results")
    assert "| MQAR | Lin. Transformer |" in told and "(digits" not in told
    assert "wrote results/table1.tex" in told and (tmp_path / "results" / "table1-lambda.png").exists()
    assert "handwritten digits" in (tmp_path / "results" / "table1.md").read_text()
    manifest = json.loads((tmp_path / "results" / "manifest.json").read_text())
    assert manifest["images"]["test"]["sha256"] == images.grey("digits", "test").sha256

    told = call("train", "--config", "tiny.yaml", *limits, "--task", "image", "--mixer", "mamba", "--lam", "learnable",
                "--lam-init", "0.5", "--lr", "0.02", "--steps", "3", "--seed", "5")  # fmt: skip
    assert "test accuracy" in told and "relative mu by layer after" in told
    folder = tmp_path / "runs" / "train" / "image-mamba-lam_learnt_from_0.5-lr_0.02-seed_5"
    rows = pd.read_csv(folder / "rows.csv")
    assert rows.loc[rows["measure"] == "steps", "value"].tolist() == [3]
    assert (rows.loc[(rows["measure"] == "lambda") & (rows["when"] == "before"), "value"] == 0.5).all()
    with pytest.raises(ConfigError, match="no task 'audio'"):
        call("train", "--config", "tiny.yaml", *limits, "--task", "audio")
    with pytest.raises(ConfigError, match=r"mixers\.0"):
        call("train", "--mixer", "rnn")


def test_a_split_of_no_size_is_refused() -> None:
    for split in SPLITS:
        with pytest.raises(ConfigError, match=f"mqar.data.{split}: input should be greater than or equal to 1, got 0"):
            configure(Table1, None, {"mqar": {"lrs": [1e-2]}}, [f"mqar.data.{split}=0"])
