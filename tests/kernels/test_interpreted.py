"""mamba-ssm's unmodified Triton kernels, interpreted on CPU, against plain float64 code."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lscollapse.models.kernels.backends import (
    KernelError,
    Kernels,
    causal_conv,
    chunked_scan,
    gated_norm,
    resolve_kernels,
)
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from tests.unit.models.kernels.test_cpu_block import plain_norm, plain_O, relative_error, stream, weights
from tests.unit.models.kernels.test_ssd import inputs, recurrence

OP = 5e-6  # of the largest value: a model is blind to an error of 1e-3 in one product, this is not
SIZES = [  # batch, L, heads, head_dim, groups, state, chunk
    (2, 64, 4, 16, 1, 16, 32),
    (2, 50, 4, 16, 2, 16, 32),
    (1, 3, 2, 16, 1, 16, 16),
    (1, 130, 2, 64, 1, 128, 64),
]
KERNELS = resolve_kernels("triton", "cpu")


def n_configurations() -> int:
    """The most configurations any kernel of the scan has."""
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing
    from triton.runtime.autotuner import Autotuner

    modules = (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing)
    found = [thing for module in modules for thing in vars(module).values() if isinstance(thing, Autotuner)]
    return max(len(kernel.configs) for kernel in found)


def test_what_is_bound_says_so() -> None:
    assert KERNELS.triton and KERNELS.device == "cpu"
    assert KERNELS.backend == "mamba-ssm 2.3.1 triton interpreted + torch conv"
    assert resolve_kernels("auto", "cpu").backend == "torch native"  # by device, not by what is installed
    assert KERNELS.for_dtype(torch.float32) is KERNELS
    assert KERNELS.for_dtype(torch.float64).backend == "torch native"
    with pytest.raises(KernelError, match="new process"):
        resolve_kernels("triton", "cpu", allow_tf32=True)


@pytest.mark.parametrize("decay", ["weak", "usual"])
@pytest.mark.parametrize("size", SIZES)
def test_scan_is_the_recurrence(size: tuple[int, ...], decay: str) -> None:
    tensors = inputs(size, decay, torch.float32)
    limit = (0.01, 0.5) if size[4] == 2 else (0.0, math.inf)
    found = KERNELS.scan(**tensors, dt_limit=limit, chunk=size[-1])
    assert found.dtype == torch.float32
    assert relative_error(found, recurrence(**tensors, dt_limit=limit)) < OP


@pytest.mark.parametrize("configuration", range(n_configurations()), indirect=True)
def test_every_autotune_configuration(configuration: int) -> None:
    """Forward and backward of a scan over two chunks, the second one short."""
    tensors = inputs((1, 44, 2, 32, 1, 32, 32), dtype=torch.float32)
    exact = {name: t.double().requires_grad_() for name, t in tensors.items()}
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    expected, found = recurrence(**exact), KERNELS.scan(**leaves, chunk=32)
    assert relative_error(found.detach(), expected.detach()) < OP
    ascent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, list(leaves.values()), ascent)
    exact_gradients = torch.autograd.grad(expected, list(exact.values()), ascent.double())
    for name, one, other in zip(leaves, gradients, exact_gradients, strict=True):
        assert relative_error(one, other) < 4 * OP, name


@pytest.mark.parametrize(("width", "groups"), [(48, 1), (64, 2), (640, 4)])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_norm(width: int, groups: int, gated: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    y, gate = torch.randn(2, 2, 5, width, generator=generator).unbind(0)
    weight = torch.randn(width, generator=generator)
    u = y.double() * gate.double() * torch.sigmoid(gate.double()) if gated else y.double()
    expected = plain_norm(u, weight.double(), 1e-5, groups)
    assert relative_error(KERNELS.gated_norm(y, gate if gated else None, weight, 1e-5, groups), expected) < 1e-6


ARMS = [
    {"gating": gating, "layernorm": norm_site is None, "skip_site": skip_site, "norm_site": norm_site or "both"}
    for gating, skip_site, norm_site in itertools.product(
        [True, False], ["residual", "mixer"], [None, "both", "mixer", "block"]
    )
]
TORCH = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "cpu")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_every_arm_of_a_block(arm: dict) -> None:
    """The interpreted kernels, and torch's operations for a GPU, against the plain float64 block; lambda of both signs."""
    s, o_scale = Mamba2Shape(hidden=32, heads=4, head_dim=16, state=16, groups=2), 0.25
    w, X = weights(s), stream(s, batch=2, N=21)
    blocks: dict[str, GpuBlock] = {
        name: GpuBlock({key: t.float() for key, t in w.items()}, s, kernels)
        for name, kernels in (("triton", KERNELS), ("torch", TORCH))
    }
    for lam in (-1.5, 0.0):
        on_mixer = arm["skip_site"] == "mixer"
        keeps_block, keeps_mixer = (arm["layernorm"] or arm["norm_site"] == site for site in ("mixer", "block"))
        O = plain_O(w, s, X, arm["gating"], keeps_block, keeps_mixer, lam if on_mixer else 0.0)
        expected = (1.0 if on_mixer else lam) * X + o_scale * O
        for name, block in blocks.items():
            found: Tensor = block(X.float(), lam=lam, o_scale=o_scale, **arm)
            assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5, (name, lam)


def test_verify_in_a_process_of_its_own() -> None:
    """As the command does it: it switches the interpreter on itself, and one configuration a kernel is tuned for all."""
    program = (
        "from lscollapse.models.kernels.verify import TOY, passed, verify; rows = verify('cpu', 'auto', TOY[-1:]); "
        "assert passed(rows); print(*sorted({(row.name, row.backend.split()[0]) for row in rows}))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    operations = ("block", "conv", "gated norm", "scan")
    pairs = [(name, by) for name in operations for by in ("mamba-ssm", "torch")] + [("scan backward", "mamba-ssm")]
    assert done.stdout.strip() == " ".join(map(str, pairs))
