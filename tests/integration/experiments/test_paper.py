"""`sweep_lambda` end to end on tiny models in folders and frozen excerpts: rows against the plain models, resuming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM

from lscollapse.core.config import Experiment
from lscollapse.core.manifest import RunFolderError
from lscollapse.core.table import COLUMNS, DEFAULT_MEASURES
from lscollapse.experiments import own_model, paper
from lscollapse.experiments.bounds import find_lambda
from tests.equivalence import plain_models, tiny
from tests.equivalence.compare import assert_rows_match

EXCERPTS, TOKENS = 19, 6  # three tiles, the last one short
LAMBDAS = [-2.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    made = {"little-mamba": tiny.mamba2(2, 2), "little-albert": tiny.albert(2, 1, 1)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: (str(folder / name), model) for name, model in made.items()}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A frozen file written by hand, longer than what is read of it."""
    file = tmp_path_factory.mktemp("frozen") / "excerpts.jsonl"
    ids = tiny.ids(EXCERPTS + 2, TOKENS + 3, seed=9)
    lines = [
        json.dumps({"title": f"T{n}", "text_sha256": "0" * 64, "tokenizer": "made up", "source": "by hand", "ids": row})
        for n, row in enumerate(ids.tolist())
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file, ids[:EXCERPTS, :TOKENS]


@pytest.fixture(scope="module")
def config(models: dict[str, Any], frozen: tuple[Path, np.ndarray]) -> Experiment:
    return Experiment(
        models=[folder for folder, _ in models.values()], lambdas=LAMBDAS, excerpts=EXCERPTS, tokens=TOKENS,
        source=str(frozen[0]), offline=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, paper.sweep_lambda(config, out)


class Stop(Exception):
    pass


class Recorder:
    """Records what it is told and stops the run after `patience` block passes."""

    def __init__(self, patience: float = float("inf")) -> None:
        self.patience = patience
        self.notes: list[str] = []
        self.total: float | None = None
        self.done = 0.0

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, total: float) -> None:
        self.total = total

    def grow(self, amount: float) -> None:
        assert self.total is not None
        self.total += amount

    def advance(self, amount: float) -> None:
        self.done += amount
        self.patience -= 1
        if self.patience < 0:
            raise Stop


def test_every_row_is_that_of_the_plain_model(run: Any, models: dict[str, Any], frozen: Any) -> None:
    """Also those of the second and third tile, under the right excerpt number."""
    rows, ids = run[1], frozen[1]
    assert tuple(rows) == COLUMNS
    arms = {"little-mamba": (True, False), "little-albert": (None,)}
    assert len(rows) == EXCERPTS * len(DEFAULT_MEASURES) * 3 * len(LAMBDAS) * (2 + 1)
    for name, (_, model) in models.items():
        weights, kind = plain_models.weights_of(model), model.config.model_type
        of_model = rows[rows["model"] == name]
        assert sorted(of_model["excerpt"].unique()) == list(range(EXCERPTS))
        for gating in arms[name]:
            of_arm = of_model[of_model["gating"].isna() if gating is None else of_model["gating"] == gating]
            for lam in LAMBDAS:
                if kind == "mamba2":
                    outputs = plain_models.mamba2(weights, model.config, ids, lam, gating)
                else:
                    outputs = plain_models.albert(weights, model.config, ids, lam)
                assert_rows_match(of_arm[of_arm["lam"] == lam], outputs, what=f"{name}, gate {gating}, lambda {lam}")


def test_provenance_of_the_rows(run: Any, models: dict[str, Any]) -> None:
    rows = run[1]
    for name, (folder, _) in models.items():
        weights = (Path(folder) / "model.safetensors").read_bytes()
        of_model = rows[rows["model"] == name]
        assert set(of_model["checkpoint_sha256"]) == {hashlib.sha256(weights).hexdigest()}
    assert set(rows["init"]) == {"trained"}
    assert set(rows["text"]) == {"by hand"} and set(rows["tokenizer"]) == {"made up"}
    assert set(rows["n_tokens"]) == {TOKENS} and set(rows["seed"]) == {0}
    assert not rows.duplicated(["model", "arm", "lam", "excerpt", "layer", "measure"]).any()


def test_manifest_of_a_run(run: Any, models: dict[str, Any], frozen: Any) -> None:
    manifest = json.loads((run[0] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"] is True
    assert manifest["identity"]["experiment"] == "sweep-lambda"
    assert manifest["identity"]["config"]["lambdas"] == LAMBDAS
    digest = hashlib.sha256(frozen[1].astype("<i8").tobytes()).hexdigest()
    assert [s["model"] for s in manifest["identity"]["subjects"]] == list(models)
    assert {s["excerpts_sha256"] for s in manifest["identity"]["subjects"]} == {digest}
    assert manifest["excerpts"]["little-mamba"]["titles"] == [f"T{n}" for n in range(EXCERPTS)]


@pytest.mark.parametrize("patience", [1, 13, 30, 40])
def test_stopped_anywhere_and_continued(config: Experiment, run: Any, tmp_path: Path, patience: int) -> None:
    """Stopped inside the first work item, in later ones, and in the second model."""
    with pytest.raises(Stop):
        paper.sweep_lambda(config, tmp_path / "run", Recorder(patience))
    assert not (tmp_path / "run" / "rows.parquet").exists()
    there = len(list((tmp_path / "run").glob("parts/*.parquet")))
    again = Recorder()
    paper.sweep_lambda(config, tmp_path / "run", again)
    assert any("is continued" in note for note in again.notes) == (there > 0)
    assert again.done == pytest.approx(again.total)  # and what was there is not computed again
    for name in ("rows.parquet", "rows.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (run[0] / name).read_bytes()


def test_a_finished_run_is_not_computed_again(config: Experiment, run: Any) -> None:
    again = Recorder(patience=0)
    before = (run[0] / "manifest.json").read_bytes()
    pd.testing.assert_frame_equal(paper.sweep_lambda(config, run[0], again), run[1])
    assert again.total is None
    assert "complete" in again.notes[0]
    assert (run[0] / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("named", "value"),
    [("lambdas", [0.0, 1.0]), ("tokens", 5), ("gating", True), ("seed", 3)],
)
def test_a_run_of_another_configuration_is_refused(config: Experiment, run: Any, named: str, value: Any) -> None:
    with pytest.raises(RunFolderError, match=rf"another configuration \(config\.{named}: "):
        paper.sweep_lambda(config.model_copy(update={named: value}), run[0])


def test_other_weights_are_refused(config: Experiment, run: Any, tmp_path: Path) -> None:
    """The same folder name and configuration, one weight file retrained."""
    tiny.mamba2(2, 2, seed=5).save_pretrained(tmp_path / "little-mamba")
    other = config.model_copy(update={"models": [str(tmp_path / "little-mamba"), config.models[1]]})
    with pytest.raises(RunFolderError, match="sha256"):
        paper.sweep_lambda(other, run[0])


def per_layer_file(path: Path, lams: list[float]) -> Path:
    path.write_text("layer,lam\n" + "".join(f"{k},{lam}\n" for k, lam in enumerate(lams, 1)), encoding="utf-8")
    return path


def test_per_layer_lambdas_from_a_file(config: Experiment, models: dict[str, Any], frozen: Any, tmp_path: Path) -> None:
    lams = [1.5, -0.5]
    file = per_layer_file(tmp_path / "lams.csv", lams)
    changes = {"lambdas": [1.0], "excerpts": 2, "lambdas_file": file, "gating": False, "models": config.models[:1]}
    small = config.model_copy(update=changes)
    rows = paper.sweep_lambda(small, tmp_path / "run")
    model = models["little-mamba"][1]
    found = rows[(rows["model"] == "little-mamba") & rows["lam"].isna()]
    outputs = plain_models.mamba2(plain_models.weights_of(model), model.config, frozen[1][:2], lams, gating=False)
    assert_rows_match(found, outputs)


def test_a_changed_file_of_lambdas_is_another_configuration(config: Experiment, tmp_path: Path) -> None:
    """The rows of per-layer lambdas carry no number, so a stale table could not be told from a new one."""
    file = per_layer_file(tmp_path / "lams.csv", [1.5, -0.5])
    small = config.model_copy(update={"lambdas": [1.0], "excerpts": 1, "lambdas_file": file})
    paper.sweep_lambda(small, tmp_path / "run")
    per_layer_file(file, [3.0, 0.25])
    with pytest.raises(RunFolderError, match="another configuration"):
        paper.sweep_lambda(small, tmp_path / "run")


@pytest.mark.parametrize(
    "lines", [["1,2"], ["1,2", "3,4"], ["1,two", "2,3"], ["1,nan", "2,1"], ["1", "2"], ["a,b", "1,2"], []], ids=" ".join
)
def test_bad_files_of_lambdas(config: Experiment, tmp_path: Path, lines: list[str]) -> None:
    file = tmp_path / "bad.csv"
    file.write_text("\n".join(["layer,lam", *lines] if lines else []), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        paper.sweep_lambda(config.model_copy(update={"lambdas_file": file}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_random_weights_beside_the_trained_ones(config: Experiment, tmp_path: Path) -> None:
    update = {"lambdas": [1.0], "excerpts": 1, "random_init": True, "models": config.models[1:]}
    small = config.model_copy(update=update)
    rows = paper.sweep_lambda(small, tmp_path / "run")
    assert list(dict.fromkeys(rows["init"])) == ["trained", "random"]
    again = paper.sweep_lambda(small, tmp_path / "again")
    pd.testing.assert_frame_equal(rows, again)
    other = paper.sweep_lambda(small.model_copy(update={"seed": 1}), tmp_path / "other")
    for init, same in (("trained", True), ("random", False)):
        ours, theirs = rows[rows["init"] == init]["value"], other[other["init"] == init]["value"]
        assert np.allclose(ours, theirs, equal_nan=True) == same


# --- gates that are absent, or not known ----------------------------------------------------------


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mixers of Mamba-2, which have a gate, in an architecture without an adapter of its own."""
    folder = tmp_path_factory.mktemp("bamba") / "little-bamba"
    config = BambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_chunk_size=8, mamba_d_head=8, mamba_d_state=4, mamba_n_heads=4,
        mamba_n_groups=1,
    )  # fmt: skip
    BambaForCausalLM(config).save_pretrained(folder)
    return str(folder)


RUNS: dict[str, Callable[[Experiment, Path], Any]] = {
    "measure": own_model.measure_own,
    "sweep-lambda": paper.sweep_lambda,
    "ablate-gating": paper.ablate_gating,
    "all-readings": paper.all_readings,
    "find-lambda": lambda config, out: find_lambda.load_with_grid(config),
}


@pytest.mark.parametrize("kind", ["bamba", "albert"])
@pytest.mark.parametrize("verb", RUNS)
def test_a_gate_that_cannot_be_removed_is_refused_by_every_verb(
    verb: str, kind: str, config: Experiment, bamba: str, tmp_path: Path
) -> None:
    """One line, and nothing is written; an unknown gate is not said to be absent."""
    model = bamba if kind == "bamba" else config.models[1]
    settings = config.model_copy(update={"models": [model], "gating": False, "excerpts": 2})
    with pytest.raises(ValueError) as caught:
        RUNS[verb](settings, tmp_path / "run")
    said = str(caught.value)
    assert "\n" not in said and not (tmp_path / "run").exists()
    if kind == "bamba":
        assert "whether the mixers of bamba have a gate, and where, is not known here" in said
        assert "has no gate" not in said
    else:
        assert "albert has no gate that could be removed" in said


def test_a_gate_that_is_not_known_stays_as_it_is(config: Experiment, bamba: str, tmp_path: Path) -> None:
    """One arm, whose rows say nothing of a gate, with the loss of transformers."""
    settings = config.model_copy(update={"models": [bamba], "excerpts": 2, "lambdas": [1.0], "quality": True})
    rows = paper.sweep_lambda(settings, tmp_path / "run")
    assert set(rows["arm"]) == {"LN"} and rows["gating"].isna().all()
    ids = torch.tensor([json.loads(line)["ids"][:TOKENS] for line in Path(config.source).read_text().splitlines()[:2]])
    model = BambaForCausalLM.from_pretrained(bamba).eval()
    with torch.no_grad():
        theirs = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
    np.testing.assert_allclose(rows.loc[rows["measure"] == "lm_loss", "value"], theirs, rtol=1e-5)


@pytest.mark.parametrize(("named", "value"), [("skip_site", "mixer"), ("skip_site", "ffn"), ("device", "tpu")])
def test_what_cannot_be_measured_leaves_no_folder(config: Experiment, tmp_path: Path, named: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        paper.sweep_lambda(config.model_copy(update={named: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
