"""Figures: the plotted numbers against plain numpy, the marks, the labels, and every edge a run can produce."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from lscollapse.figures import FigureError, figure1, figure2, figure3, lambda_colour, save, spread

LAMBDAS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
Profile = Callable[[float, np.ndarray], np.ndarray]


def decay(lam: float, x: np.ndarray) -> np.ndarray:
    """x in 0..1 through the depth; small |lam| and lam near 1 fall, negative lambda stays above positive."""
    last = 1 - np.exp(-((0.25 + abs(lam - 0.45)) ** 0.6) * (1.2 if lam < 0 else 0.8))
    return last + (0.98 - last) * np.exp(-6 * x)


def arm_rows(
    model: str = "mamba2-tiny", lams=LAMBDAS, n_layers: int = 48, excerpts: int = 32, profile: Profile = decay,
    gating: bool | None = False, layernorm: bool = True, init: str = "trained", text: str = "Wikipedia summaries (packaged, en)",
    floor: float = 1e-6, overflow_at: int | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    rng = np.random.default_rng(seed)
    layers = np.arange(n_layers + 1)
    parts = []
    for lam in lams:
        mean = profile(lam, layers / n_layers)
        spread_ = rng.normal(0, 0.06, (excerpts, 1)) + rng.normal(0, 0.01, (excerpts, n_layers + 1))
        relative = np.clip(mean * np.exp(spread_), 0, 1)
        rank1 = relative * (0.3 if lam <= -4 else 0.95)
        for measure, values in (("relative_mu", relative), ("rank1_residual", rank1)):
            parts.append(pd.DataFrame({
                "lam": lam, "measure": measure, "excerpt": np.repeat(np.arange(excerpts), n_layers + 1),
                "layer": np.tile(layers, excerpts), "value": values.ravel(),
            }))  # fmt: skip
    rows = pd.concat(parts, ignore_index=True)
    rows["status"] = np.where(rows["value"] < floor, "below_floor", "ok")
    if overflow_at is not None:
        late = rows["layer"] >= overflow_at
        rows.loc[late, "status"] = "overflow"
        rows.loc[late, "value"] = np.nan
    gate = pd.array([pd.NA if gating is None else gating] * len(rows), dtype="boolean")
    return rows.assign(
        model=model, revision="", checkpoint_sha256="0", arm=[f"lam={v:g}" for v in rows["lam"]], gating=gate,
        layernorm=layernorm, skip_site="residual", norm_site="both", init=init, text=text, tokenizer="bert", dtype="float32",
        backend="cpu", seed=0, n_tokens=128, log10=np.log10(rows["value"].where(rows["value"] > 0)), floor=floor,
    )  # fmt: skip


def albert(lam: float, x: np.ndarray) -> np.ndarray:
    """Collapses exponentially at lam = 0, less with |lam|."""
    return 0.98 * np.exp(-20 * x / (1 + 15 * abs(lam)) * (1 if lam >= 0 else 0.6))


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    """Eleven lambdas, 32 excerpts, three models; 48 layers of Mamba-2 with and without its gate."""
    return pd.concat(
        [
            arm_rows(),
            arm_rows(gating=True, profile=lambda lam, x: 0.98 - (0.1 + 0.5 * np.exp(-abs(lam))) * x, seed=1),
            arm_rows("minilm-l6", n_layers=6, gating=None, profile=albert, seed=2),
            arm_rows("albert-smiles", n_layers=12, gating=None, profile=albert, text="Chemical reactions (SMILES, packaged)"),
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def arms() -> pd.DataFrame:
    """The four arms at lam = 1, those without a norm overflowing, each with a random-init control."""
    def fall(lam, x): return 0.3 + 0.68 * np.exp(-5 * x)
    def dip(lam, x): return 0.98 - 2.4 * x * np.exp(-4 * x) + 0.5 * x**2
    def flat(lam, x): return 0.98 - 0.08 * x
    def rise(lam, x): return 0.97 + 0.025 * (x > 0.8)
    kinds = [(True, True, flat, None), (False, True, fall, None), (False, False, dip, 41), (True, False, rise, 44)]
    parts = []
    for i, (gating, layernorm, profile, overflow) in enumerate(kinds):
        common = {"lams": (1.0,), "gating": gating, "layernorm": layernorm, "overflow_at": overflow}
        parts.append(arm_rows(profile=profile, seed=i, **common))
        parts.append(arm_rows(profile=lambda lam, x, p=profile: p(lam, x) * (1 - 0.15 * x), init="random", seed=9 + i, **common))
    return pd.concat(parts, ignore_index=True)
