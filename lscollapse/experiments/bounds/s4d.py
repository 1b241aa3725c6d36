"""What the theory can say of an S4D (models/nets/s4d.py): its weights alone give its mixing matrices, one for every channel.

Channel c mixes the positions by M_c = Toeplitz(K_c) + D_c I, lower triangular, K_c its kernel. ||M_c||_F is exact;
||M_c||_2 is at most the largest modulus of the FFT of that column padded to 2N. What follows in the block, GELU, a 1x1
convolution and the GLU gate, no theorem of the paper counts.

Theorem 4.1 is written for one M. Its repaired proof only needs ||O||_F <= C ||Y||_F, and ||O||_F^2 = sum_c ||M_c y_c||^2,
so it holds for one M a channel with C = max_c ||M_c||_2, and with the larger C_M = max_c ||M_c||_F.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from lscollapse import measures
from lscollapse.experiments.bounds.gains import normalised, trace
from lscollapse.instrument.forward import checked_ids
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.nets.s4d import S4DMixer
from lscollapse.runs.loading import LoadedTask
from lscollapse.theory import constants
from lscollapse.theory.arrays import Array


def channel_rows(adapter: Adapter, length: int) -> list[dict[str, Any]]:
    """One row a layer and channel for N = `length`.

    Columns: C_M = ||M||_F and spectral, the bound on ||M||_2, both with D; without_D, ||M||_F of the kernel alone, which
    footnote 3 is about; printed and corrected, that footnote as it stands and as `theory.constants.lti` mends it.
    """
    rows = []
    for layer in range(adapter.n_layers):
        mixer = _double(adapter, layer)
        with torch.no_grad():
            kernel, D = mixer.kernel(length).T.numpy(force=True), mixer.D.numpy(force=True)
        whole, alone = constants.s4d(kernel, D), constants.s4d(kernel)
        for channel, (A, B, C) in enumerate(_state_norms(mixer)):
            rows.append(
                {
                    "layer": layer + 1,
                    "channel": channel,
                    "C_M": float(whole.frobenius[channel]),
                    "spectral": float(whole.spectral[channel]),
                    "without_D": float(alone.frobenius[channel]),
                    "printed": float(A * B * C),
                    "corrected": constants.lti(A, B, C, length).frobenius,
                }
            )
    return rows


def layer_rows(task: LoadedTask, channels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a layer, to stand beside its gains.

    Columns: spectral, the largest of the channels; under_1, how many channels have ||M||_F < 1; norm_turn, degrees by
    which the affine weights of the norm turn a row at most (lambda = 1); mu_ratio, mu(O) / mu(X), largest over the
    excerpts, and relative_mu, mean, of the net with neither skip nor LayerNorm.
    """
    adapter, rows = task.adapter, []
    turns = norm_turns(task)
    with torch.no_grad():
        X = adapter.embed(checked_ids(adapter, task.ids)).double()
        for layer in range(adapter.n_layers):
            O = _double(adapter, layer)(X)
            own = [row for row in channels if row["layer"] == layer + 1]
            rows.append(
                {
                    "spectral": max(row["spectral"] for row in own),
                    "under_1": sum(row["C_M"] < 1.0 for row in own),
                    "norm_turn": float(turns[layer]),
                    "mu_ratio": float((measures.mu(O) / measures.mu(X)).max()),
                    "relative_mu": float(measures.relative_mu(O).mean()),
                }
            )
            X = O
    return rows


def norm_turns(task: LoadedTask) -> Array:
    """Degrees by which weight and bias of each layer's norm turn a row at most, (K,), at lambda = 1.

    Between the unit rows without channel mean that the norm makes of X + O, and those of its output. Lambda does not act
    on it, so no |lambda| makes whole blocks turn rows by little.
    """
    turns, before = [], None
    for step in trace(task.adapter, task.ids[: task.plan.excerpts], 1.0, dtype=task.compute_dtype):
        if before is not None:
            chord = torch.linalg.vector_norm(normalised(step.X) - before, dim=-1).max()
            turns.append(math.degrees(2.0 * math.asin(min(1.0, float(chord) / 2.0))))
        if step.parts:
            (X, O), *_ = step.parts
            before = normalised(X + O)
    return np.array(turns)


def remarks(channels: list[dict[str, Any]], layers: list[dict[str, Any]]) -> list[str]:
    """What the rows of this net say of the paper's explanation of Figure 4, and of footnote 3."""
    largest = [max(row["C_M"] for row in channels if row["layer"] == layer["layer"]) for layer in layers]
    met = sum(size < 1.0 for size in largest)
    under = sum(layer["under_1"] for layer in layers)
    power = sum(math.log10(layer["spectral"]) for layer in layers)
    ratios = [layer["mu_ratio"] for layer in layers]
    lowest = min(layers, key=lambda layer: layer["relative_mu"])
    wrong = sum(row["printed"] < row["without_D"] for row in channels)
    loose = float(np.median([row["corrected"] / row["without_D"] for row in channels]))
    return [
        "the paper's reason for Figure 4 is that ||M||_F < 1, which forces mu to 0 (Theorem A.8), is not met. Here"
        f" {met} of {len(layers)} layers meet it,"
        f" {under} of {len(channels)} channels; the largest of a layer is {min(largest):.3g} to {max(largest):.3g}, and with"
        f" ||M||_2 the theorem lets mu grow by 10^{power:.1f}. Not meeting it proves nothing: with neither skip nor"
        f" LayerNorm a layer multiplies mu by {min(ratios):.2f} to {max(ratios):.2f}, and relative mu is"
        f" {lowest['relative_mu']:.2f} after layer {lowest['layer']}, {layers[-1]['relative_mu']:.2f} after the last.",
        f"footnote 3, C_M >= ||A|| ||B|| ||C||_F, is under the ||M||_F of the kernel in {wrong} of {len(channels)} channels;"
        f" corrected it bounds all, {loose:.1f} times too large in the median.",
    ]


def _double(adapter: Adapter, layer: int) -> S4DMixer:
    mixer: S4DMixer = copy.deepcopy(adapter.block(layer).mixer).double()
    return mixer


def _state_norms(mixer: S4DMixer) -> list[tuple[float, float, float]]:
    """||A||_2, ||B||_2, ||C||_2 of every channel's discrete system, both members of each conjugate pair counted."""
    with torch.no_grad():
        A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
        dtA = A * mixer.log_dt.exp()[:, None]
        B = torch.expm1(dtA) / A
        norms = (
            torch.exp(dtA).abs().amax(1),
            math.sqrt(2.0) * torch.linalg.vector_norm(B, dim=1),
            math.sqrt(2.0) * torch.linalg.vector_norm(mixer.C, dim=(1, 2)),
        )
    return list(zip(*(norm.tolist() for norm in norms), strict=True))
