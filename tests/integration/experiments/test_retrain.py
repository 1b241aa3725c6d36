"""S4D against the state-space equations in numpy and scipy; training that resumes exactly; Figure 4."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.signal import cont2discrete

import lscollapse
from lscollapse.core.config import ConfigError, Experiment, S4DTraining, configure
from lscollapse.data import images
from lscollapse.experiments import paper, retrain
from lscollapse.instrument.forward import measure
from lscollapse.instrument.identity import differences
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.tensors import CheckpointError
from lscollapse.models.nets.s4d import S4D, S4DConfig, S4DMixer, causal_convolution
from lscollapse.reports.claims import sentences
from lscollapse.reports.figures.paper import figure2, figure4
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED
from lscollapse.runs.training_state import TrainingError
from tests import ROOT
from tests.equivalence.compare import assert_rows_match

SCRIPT = ROOT / "scripts" / "train_s4d.py"
LITTLE = S4DConfig(hidden_size=6, state_size=8, num_hidden_layers=3, channels=3, levels=5, num_labels=4)
ARMS = [Variant(lam=lam, layernorm=norm) for lam in (1.0, 0.0, -2.0, (0.5, 1.0, 3.0)) for norm in (True, False)]
Weights = dict[str, np.ndarray]


def little(config: S4DConfig = LITTLE, seed: int = 0) -> S4D:
    torch.manual_seed(seed)
    return S4D(config).eval()


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def some_ids(config: S4DConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.levels**config.channels, (batch, length))


# --- the oracle: float64 numpy, position by position ---


def plain_kernel(w: Weights, length: int) -> np.ndarray:
    """(length, d) by a dense Vandermonde product in complex128."""
    A = -np.exp(w["log_A_real"]) + 1j * w["A_imag"]
    C = w["C"][..., 0] + 1j * w["C"][..., 1]
    dtA = A * np.exp(w["log_dt"])[:, None]
    kernels = [
        2 * (c * (np.exp(z) - 1) / a) @ np.vander(np.exp(z), length, increasing=True)
        for c, a, z in zip(C, A, dtA, strict=True)
    ]
    return np.real(kernels).T


def recurrence(w: Weights, u: np.ndarray) -> np.ndarray:
    """y = 2 Re(C h) + D u with h' = A h + u under a zero-order hold, (N, d) -> (N, d)."""
    y = np.zeros_like(u)
    for channel in range(u.shape[1]):
        A = np.diag(-np.exp(w["log_A_real"][channel]) + 1j * w["A_imag"][channel])
        C = w["C"][channel, :, 0] + 1j * w["C"][channel, :, 1]
        n = len(C)
        system = (A, np.ones((n, 1)), C[None], np.zeros((1, 1)))
        step, drive, *_ = cont2discrete(system, math.exp(w["log_dt"][channel]), method="zoh")
        h = np.zeros(n, dtype=complex)
        for t, value in enumerate(u[:, channel]):
            h = step @ h + drive[:, 0] * value
            y[t, channel] = 2 * (C @ h).real + w["D"][channel] * value
    return y


def plain_mixer(w: Weights, u: np.ndarray) -> np.ndarray:
    y = recurrence(w, u)
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    value, gate = np.split(y @ w["output.weight"].T + w["output.bias"], 2, axis=-1)
    return value / (1 + np.exp(-gate))


def plain_s4d(w: Weights, config: S4DConfig, ids: np.ndarray, variant: Variant) -> list[np.ndarray]:
    """[X_0, ..., X_K], each (B, N, d)."""
    places = [config.levels**k for k in reversed(range(config.channels))]
    values = np.stack([ids // place % config.levels for place in places], -1)
    X = (2 * values / (config.levels - 1) - 1) @ w["encoder.weight"].T + w["encoder.bias"]
    outputs = [X]
    for k in range(config.num_hidden_layers):
        part = {name.removeprefix(f"layers.{k}."): a for name, a in w.items() if name.startswith(f"layers.{k}.")}
        mixer = {name.removeprefix("mixer."): a for name, a in part.items() if name.startswith("mixer.")}
        X = variant.lam_at(k) * X + np.stack([plain_mixer(mixer, u) for u in X])
        if variant.layernorm:
            centred = X - X.mean(-1, keepdims=True)
            X = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * part["norm.weight"] + part["norm.bias"]
        outputs.append(X)
    return outputs


# --- the net ---


def test_the_papers_shape_has_1_6_million_parameters() -> None:
    net = S4D(S4DConfig())
    assert sum(p.numel() for p in net.layers[0].parameters()) == 49_920
    assert sum(p.numel() for p in net.parameters()) == 32 * 49_920 + (3 * 128 + 128) + (128 * 10 + 10) == 1_599_242


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_kernel_is_the_vandermonde_product(length: int) -> None:
    torch.manual_seed(length)
    mixer = S4DMixer(5, 32, 0.0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = mixer.to(dtype).kernel(length).detach().double().numpy()
        expected = plain_kernel(weights_of(mixer), length)
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_kernel_and_convolution_are_the_recurrence() -> None:
    torch.manual_seed(0)
    mixer = S4DMixer(4, 6, 0.0).double()
    u = torch.randn(1, 30, 4, dtype=torch.float64)
    found = causal_convolution(u, mixer.kernel(30)) + u * mixer.D
    np.testing.assert_allclose(found[0].detach().numpy(), recurrence(weights_of(mixer), u[0].numpy()), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 9, 64])
def test_fft_convolution_is_the_direct_one(length: int) -> None:
    rng = np.random.default_rng(length)
    u, K = rng.standard_normal((2, length, 3)), rng.standard_normal((length, 3))
    expected = [[np.convolve(row[:, c], K[:, c])[:length] for c in range(3)] for row in u]
    found = causal_convolution(torch.from_numpy(u), torch.from_numpy(K))
    np.testing.assert_allclose(found.numpy(), np.moveaxis(expected, 1, 2), atol=1e-12)


def test_initialisation_is_s4d_lin() -> None:
    torch.manual_seed(0)
    mixer = S4DMixer(400, 32, 0.0)
    np.testing.assert_allclose(-mixer.log_A_real.exp().detach(), -0.5)
    np.testing.assert_allclose(mixer.A_imag.detach()[7], np.pi * np.arange(32), rtol=1e-6)
    dt = mixer.log_dt.exp().detach().numpy()
    assert 1e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1


def test_a_pixel_is_read_as_its_colours() -> None:
    net = S4D(S4DConfig(hidden_size=3, num_hidden_layers=1))
    net.encoder.weight.data, net.encoder.bias.data = torch.eye(3), torch.zeros(3)
    found = net.embed(torch.tensor([[0xFF8000, 0x0000FF]]))[0].detach().numpy()
    np.testing.assert_allclose(found, [[1, 256 / 255 - 1, -1], [-1, -1, 1]], atol=1e-6)


def test_state_space_parameters_train_slowly_and_without_decay() -> None:
    net = little()
    rest, ssm = net.parameter_groups(weight_decay=0.05)
    assert (rest["weight_decay"], ssm["weight_decay"], ssm["highest_lr"]) == (0.05, 0.0, 1e-3)
    assert "highest_lr" not in rest
    assert sum(p.numel() for p in ssm["params"]) == 3 * (6 + 2 * 6 * 4)
    assert len(ssm["params"]) + len(rest["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"state_size": 7}, "state_size: input should be a multiple of 2, got 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: input should be greater than or equal to 1, got 0"),
        ({"levels": 1}, "levels: input should be greater than or equal to 2, got 1"),
    ],
)
def test_shapes_that_there_are_not(bad: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        S4DConfig.from_dict(bad)


# --- measured ---


@pytest.mark.parametrize("variant", ARMS, ids=lambda v: f"{v.lam}, {'LN' if v.layernorm else 'no LN'}")
def test_every_arm_is_the_plain_net(variant: Variant) -> None:
    net, ids = little(), some_ids(LITTLE, 3, 11)
    rows = measure(net, ids, [variant])
    assert set(rows["dtype"]) == {"float32" if variant.layernorm else "float64"}
    assert_rows_match(rows, plain_s4d(weights_of(net), LITTLE, ids, variant), rel=2e-5, noise=2e-6)


def test_surgery_leaves_the_net_as_it_was() -> None:
    net, ids = little(), some_ids(LITTLE, 2, 9)
    with torch.no_grad():
        before = net(torch.from_numpy(ids))
        with lscollapse.surgery(net, Variant(lam=0.0, layernorm=False)):
            assert not torch.equal(net(torch.from_numpy(ids)), before)
        assert torch.equal(net(torch.from_numpy(ids)), before)
    assert max(d.output for d in differences(net, ids)) < 1e-6
    with pytest.raises(ValueError, match="outside the model's vocabulary of 125"):
        measure(net, [[125]])


# --- checkpoints ---


def write_folder(net: S4D, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config.to_dict()))
    return folder


def test_a_folder_is_a_checkpoint(tmp_path: Path) -> None:
    net = little()
    folder = write_folder(net, tmp_path / "little")
    loaded = checkpoint.load(folder)
    assert (loaded.info.architecture, loaded.info.n_layers) == ("s4d", 3)
    assert loaded.model.config == LITTLE and not loaded.model.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), net.parameters(), strict=True))
    first, again, other = (checkpoint.load(folder, random_init=seed).model.layers[0].mixer.C for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    (folder / "config.json").write_text(json.dumps({**LITTLE.to_dict(), "hidden": 3}))
    with pytest.raises(CheckpointError, match="unknown setting 'hidden', did you mean 'hidden_size'"):
        checkpoint.load(folder)


def test_the_shipped_net_has_the_accuracy_of_its_card() -> None:
    loaded = checkpoint.load("s4d-digits")
    test = images.read_images("digits", "test")
    with torch.no_grad():
        right = loaded.model(torch.from_numpy(test.ids)).argmax(1).numpy() == test.labels
    folder = Path(lscollapse.__file__).parent / "models" / "weights" / "s4d-digits"
    record = json.loads((folder / "training.json").read_text())
    assert right.mean() == pytest.approx(record["test_accuracy"]["trained"], abs=1 / 360)
    assert right.mean() > 0.95
    assert loaded.info.sha256 == record["sha256"]
    assert (folder / "model.safetensors").stat().st_size < 4_000_000


# --- training ---

FEW = S4DTraining(epochs=3, batch=200, save_every=4, model={"hidden_size": 6, "state_size": 4, "num_hidden_layers": 2})


class Killed(Exception):
    pass


class Killer:
    """A Progress that ends the training after some steps."""

    def __init__(self, after: int) -> None:
        self.left, self.told = after, list[str]()
        self.note = self.told.append

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


def test_training_killed_and_continued_ends_with_the_same_bits(tmp_path: Path) -> None:
    retrain.train_net(FEW, tmp_path / "whole")  # 7 steps an epoch
    with pytest.raises(Killed):
        retrain.train_net(FEW, tmp_path / "parts", Killer(14))
    killed = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert killed["step"] == 12  # in the middle of the second epoch
    again = Killer(1000)
    retrain.train_net(FEW, tmp_path / "parts", again)
    assert "continued at step 12 of 21" in again.told[0]
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 21
    assert all(torch.equal(whole["net"][name], parts["net"][name]) for name in whole["net"])
    moments = [list(state["optimizer"]["state"].values()) for state in (whole, parts)]
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(*moments, strict=True))

    record = retrain.export(tmp_path / "parts", tmp_path / "exported")
    loaded = checkpoint.load(tmp_path / "exported")
    assert (loaded.model.config.data, loaded.model.config.levels, loaded.model.config.channels) == ("digits", 17, 1)
    assert loaded.info.sha256 == record["sha256"] and record["steps"] == 21
    torch.testing.assert_close(
        loaded.model.layers[0].mixer.C.data, parts["net"]["layers.0.mixer.C"], rtol=1e-3, atol=1e-3
    )
    with pytest.raises(TrainingError, match=r"settings\.steps: 21, now 28"):
        retrain.train_net(FEW.model_copy(update={"epochs": 4}), tmp_path / "parts")


def test_the_script_trains(tmp_path: Path) -> None:
    little_net = [f"--set=model.{key}={value}" for key, value in FEW.model.items()]
    call = [
        sys.executable,
        str(SCRIPT),
        "--out",
        str(tmp_path / "run"),
        "--set=epochs=1",
        "--set=batch=700",
        *little_net,
    ]
    subprocess.run(call, check=True, capture_output=True, timeout=300)
    retrain.export(tmp_path / "run", tmp_path / "exported")
    assert checkpoint.load(tmp_path / "exported").model.config.hidden_size == 6


def test_the_configuration_of_figure_4_is_the_papers_shape() -> None:
    training = configure(S4DTraining, SCRIPT.parents[1] / "configs" / "training" / "figure4.yaml")
    assert S4DConfig.from_dict({**training.model, "data": training.data}) == S4DConfig()


# --- Figure 4 ---


@pytest.fixture(scope="module")
def figure4_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[S4D, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("figure4")
    shape = S4DConfig(hidden_size=6, state_size=4, num_hidden_layers=3, channels=1, levels=17, data="digits")
    net = little(shape)
    config = Experiment(models=["mamba2-tiny", str(write_folder(net, folder / "little"))], excerpts=3)
    return net, paper.ablate_s4d(config, folder / "run")


def test_ablate_s4d_measures_skip_by_norm_on_held_out_digits(figure4_run: tuple[S4D, pd.DataFrame]) -> None:
    net, rows = figure4_run
    assert set(zip(rows["lam"], rows["layernorm"], strict=True)) == {(1, True), (1, False), (0, True), (0, False)}
    assert set(rows["model"]) == {"little"} and set(rows["n_tokens"]) == {64} and set(rows["tokenizer"]) == {"pixels"}
    ids = np.array([excerpt.ids for excerpt in images.image_excerpts("digits", net.config, 3, 0).excerpts])
    for (lam, norm), part in rows.groupby(["lam", "layernorm"]):
        variant = Variant(lam=float(lam), layernorm=bool(norm))
        assert_rows_match(part, plain_s4d(weights_of(net), net.config, ids, variant), rel=2e-5, noise=2e-6)


def test_figure4_draws_the_means_and_says_what_was_done(figure4_run: tuple[S4D, pd.DataFrame]) -> None:
    _, rows = figure4_run
    figure, data = figure4(rows, "little")
    assert len(data) == 2 * 4 * 4  # measures, arms, layers 0..3
    for _, point in data.iterrows():
        same = rows[(rows["lam"] == point["lam"]) & (rows["layernorm"] == point["layernorm"])]
        same = same[(same["layer"] == point["layer"]) & (same["measure"] == point["measure"])]
        assert point["mean"] == pytest.approx(np.mean(same["value"].tolist()))
    caption = " ".join(figure.get_supxlabel().split())
    for words in ("little", "scikit-learn", "n = 3 images of 64 pixels", "float32, float64", "ablated at inference"):
        assert words in caption
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert {"skip + LN", "no skip + LN", "skip, no LN", "no skip, no LN"} <= labels


def test_every_arm_is_trained_as_it_is_measured(tmp_path: Path) -> None:
    few = FEW.model_copy(update={"epochs": 1})
    config = Experiment(models=["mamba2-tiny"], excerpts=2, retrain=few, workers=1)
    rows = retrain.ablate_retrained(config, tmp_path / "run")
    arms = pd.read_csv(tmp_path / "run" / "nets" / "arms.csv").set_index("arm")
    assert set(rows["model"]) == {"s4d-digits-retrained"} and rows["checkpoint_sha256"].nunique() == 4
    assert set(zip(rows["lam"], rows["layernorm"], strict=True)) == {(1, True), (1, False), (0, True), (0, False)}
    for (lam, norm), part in rows.groupby(["lam", "layernorm"]):
        arm = f"{'skip' if lam else 'no-skip'}-{'norm' if norm else 'no-norm'}"
        net = checkpoint.load(tmp_path / "run" / "nets" / arm / "s4d-digits-retrained").model
        assert (net.config.lam, net.config.layernorm) == (lam, norm)
        ids = np.array([excerpt.ids for excerpt in images.image_excerpts("digits", net.config, 2, 0).excerpts])
        expected = plain_s4d(weights_of(net), net.config, ids, Variant(lam=float(lam), layernorm=bool(norm)))
        assert_rows_match(part, expected, rel=2e-5, noise=2e-6)
        with torch.no_grad():  # its own forward pass, without surgery, is that arm too
            own = net.layers[0](net.embed(torch.from_numpy(ids)))
        np.testing.assert_allclose(own.double().numpy(), expected[1], rtol=1e-4, atol=1e-5)
        test = images.read_images("digits", "test")
        with torch.no_grad():
            right = net(torch.from_numpy(test.ids)).argmax(1).numpy() == test.labels
        assert arms.loc[arm, "test_accuracy"] == pytest.approx(
            right.mean(), abs=2 / 360
        )  # the file is in half precision
    figure, data = figure4(rows, "s4d-digits-retrained")
    assert "4 nets, each arm retrained" in " ".join(figure.get_supxlabel().split()) and len(data) == 2 * 4 * 3
    pd.testing.assert_frame_equal(retrain.ablate_retrained(config, tmp_path / "run"), rows)


def test_an_arm_that_diverged_is_named_and_left_out(tmp_path: Path) -> None:
    config = Experiment(excerpts=2, retrain=FEW.model_copy(update={"epochs": 1, "lr": 1e30, "warmup": 0.0}), workers=1)
    with pytest.raises(TrainingError, match="no arm could be trained"):
        retrain.ablate_retrained(config, tmp_path / "run")
    assert pd.read_csv(tmp_path / "run" / "nets" / "arms.csv")["note"].str.contains("training stopped").all()


@pytest.mark.parametrize(("last", "verdict"), [(0.9, AGREE), (0.3, DISAGREE)])
def test_claim_of_figure_4(last: float, verdict: str) -> None:
    parts = [
        pd.DataFrame(
            {
                "lam": lam,
                "layernorm": norm,
                "layer": [0, 1, 2],
                "value": [0.2, 0.8, last if lam == 0 and not norm else 0.7],
            }
        )
        for lam in (0.0, 1.0)
        for norm in (True, False)
    ]
    fixed = {"model": "net", "init": "trained", "measure": "relative_mu", "tokenizer": "pixels", "dtype": "float32"}
    rows = pd.concat(parts).assign(gating=pd.NA, status="ok", **fixed)
    found = {finding.claim: finding for finding in sentences.judge(rows)}
    assert found["figure 4"].verdict == verdict
    assert f"{last:.3f}" in found["figure 4"].numbers
    with_norm = {finding.claim: finding for finding in sentences.judge(rows[rows["layernorm"]])}
    assert with_norm["figure 4"].verdict == NOT_MEASURED
    assert set(found) == {"figure 4", "figure 4b"}


def test_lambda_is_swept_on_s4d_too(figure4_run: tuple[S4D, pd.DataFrame], tmp_path: Path) -> None:
    net, _ = figure4_run
    folder = write_folder(net, tmp_path / "little")
    rows = paper.sweep_lambda(Experiment(models=[str(folder)], lambdas=[-1, 0, 1], excerpts=2), tmp_path / "run")
    assert set(rows["lam"]) == {-1, 0, 1} and rows["gating"].isna().all()
    figure, _ = figure2(rows)
    assert [ax.get_title("left").split()[-1] for ax in figure.axes] == ["images"]


def test_only_s4d_is_ablated_so(tmp_path: Path) -> None:
    from tests.equivalence import tiny

    tiny.mamba2(1, 1).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConfigError, match="is no S4D"):
        paper.ablate_s4d(Experiment(models=[str(tmp_path / "mamba")]), tmp_path / "run")
    assert adapt(little()).has_gate is False
