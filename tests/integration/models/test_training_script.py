"""The net that scripts/train_tiny_mamba2.py trains: transformers' function, and the gradient of plain cross-entropy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2ForCausalLM

from lscollapse.data import corpus
from lscollapse.models.checkpoints.checkpoint import load
from tests import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import article_tokens
import tiny_mamba2
import train_tiny_mamba2


def test_the_net_has_transformers_loss() -> None:
    backbone = load("mamba2-tiny").model
    model = Mamba2ForCausalLM(backbone.config).eval()
    model.backbone, model.lm_head.weight = backbone, backbone.embeddings.weight
    weights = {"backbone." + name: tensor for name, tensor in backbone.named_parameters()}
    net = tiny_mamba2.TinyMamba2(weights["backbone.embeddings.weight"], 0, backbone.config.num_hidden_layers)
    net.weights.load_state_dict({name.replace(".", "/"): tensor for name, tensor in weights.items()})
    ids = np.array([corpus.draw_excerpts(n_excerpts=2).excerpts[k].ids for k in range(2)])
    with torch.no_grad():
        expected = float(model(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss)
    assert train_tiny_mamba2.held_out_loss(net, ids) == pytest.approx(expected, abs=2e-3)  # its products are bfloat16


def test_lambda_and_gate_act_as_in_the_surgery() -> None:
    """lam X + O for a lambda far outside the range of squares in float32, and O alone for lambda = 0."""
    net = tiny_mamba2.TinyMamba2(torch.randn(30522, 128, generator=torch.Generator().manual_seed(0)), 0, 1)
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        X, Y = net.stream(ids)
        net.lam.fill_(0.0)
        _, O = net.stream(ids)
        torch.testing.assert_close(Y, X + O, rtol=0, atol=1e-5)
        net.lam.fill_(1e25)
        _, far = net.stream(ids)
        torch.testing.assert_close(far, 1e25 * X)
        assert torch.isfinite(tiny_mamba2.rms_norm(far, torch.ones(128))).all()


def test_the_head_has_the_gradients_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 16, generator=generator).requires_grad_()
    E = (0.1 * torch.randn(500, 16, generator=generator)).requires_grad_()
    targets = torch.randint(0, 500, (300,), generator=generator)
    found = tiny_mamba2.HeadLoss.apply(x, E, targets, tiny_mamba2.head_block)
    expected = F.cross_entropy(x @ E.T, targets)
    assert found.item() == pytest.approx(expected.item(), abs=1e-3)
    for a, b in zip(torch.autograd.grad(found, [x, E]), torch.autograd.grad(expected, [x, E]), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 0.02  # bfloat16 products


def test_fingerprints_find_a_shared_run_of_tokens() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 30522, (2, 200)).astype(np.uint16)
    known = article_tokens.fingerprints(one)
    assert not np.isin(article_tokens.fingerprints(other), known).any()
    other[50:62] = one[10:22]  # twelve in a row are one too few
    assert not np.isin(article_tokens.fingerprints(other), known).any()
    other[62] = one[22]
    assert np.isin(article_tokens.fingerprints(other), known).sum() == 1


def small_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Two steps on made-up articles."""
    rng, file, out = np.random.default_rng(0), tmp_path / "articles.npz", tmp_path / "run"
    tokens, held_out = rng.integers(0, 30522, 1200).astype(np.uint16), rng.integers(0, 30522, (2, 128))
    np.savez(file, tokens=tokens, starts=np.array([0, 500]), held_out=held_out)
    sizes = ["--layers", "1", "--batch", "2", "--steps", "2", "--every", "1", "--no-compile"]
    monkeypatch.setattr(
        sys, "argv", ["train_tiny_mamba2.py", "--articles", str(file), "--out", str(out), *sizes, *more]
    )
    train_tiny_mamba2.main()
    return out


def test_a_net_trained_with_lambda_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its state, its config and its record; and it is not continued, or exported, as one of another lambda."""
    out, folder = small_training(tmp_path, monkeypatch, "--lam", "-2"), tmp_path / "net"
    assert torch.load(out / "state.pt", weights_only=True)["model"]["lam"].tolist() == [-2.0]
    for more in ([], ["--export", str(folder)]):
        with pytest.raises(SystemExit, match=re.escape(f"{out} was trained with lambda -2: give --lam -2, or")):
            small_training(tmp_path, monkeypatch, "--lam", "0.5", *more)
    small_training(tmp_path, monkeypatch, "--lam", "-2", "--export", str(folder))
    assert json.loads((folder / "config.json").read_text())["lam"] == -2
    assert json.loads((folder / "training.json").read_text())["lam"] == -2
    assert load(folder).info.n_layers == 1
