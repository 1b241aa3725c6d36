"""mamba-ssm's unmodified Triton kernels, interpreted on CPU, against plain float64 code."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from lscollapse.models.kernels.backends import resolve_kernels
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import BlockCall, Mamba2Shape
from tests.unit.models.kernels.test_cpu_block import plain_norm, plain_O, relative_error, stream, weights
from tests.unit.models.kernels.test_ssd import inputs, recurrence

OP = 5e-6  # of the largest value: a model is blind to an error of 1e-3 in one product, this is not
SIZES = [  # batch, L, heads, head_dim, groups, state, chunk
    (2, 64, 4, 16, 1, 16, 32),
    (2, 50, 4, 16, 2, 16, 32),
    (1, 3, 2, 16, 1, 16, 16),
    (1, 130, 2, 64, 1, 128, 64),
]
KERNELS = resolve_kernels("mamba-ssm", "cpu")


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
    assert not resolve_kernels("auto", "cpu").triton  # by device, not by what is installed
    assert KERNELS.for_dtype(torch.float32) is KERNELS
    assert KERNELS.for_dtype(torch.float64).backend == "torch operations"


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


@pytest.mark.parametrize("D", ["one", "one an excerpt"])
def test_a_block_is_the_plain_block(D: str) -> None:
    s = Mamba2Shape(hidden=32, heads=4, head_dim=16, state=16, groups=2)
    w, X = weights(s), stream(s, batch=2, N=21)
    block = GpuBlock({key: t.float() for key, t in w.items()}, s, KERNELS)
    lams = torch.tensor([-1.5, 0.5]) if D == "one an excerpt" else torch.tensor([0.5, 0.5])
    what = BlockCall(
        block._D + (lams[:, None] if D == "one an excerpt" else 0.5), True, True, True, lams, torch.ones(2)
    )
    with torch.no_grad():
        found = block._compute(X.float(), what)
    for one, x, lam in zip(found, X, lams.tolist(), strict=True):
        O = plain_O(w, s, x[None], True, True, True, lam)
        assert relative_error(one, lam * x + O[0]) < 1e-5


def test_verify_in_a_process_of_its_own() -> None:
    """As the command does it: it switches the interpreter on itself, and one configuration a kernel is tuned for all."""
    program = (
        "from lscollapse.models.kernels.verify import TOY, passed, verify; rows = verify('cpu', 'auto', TOY[-1:]); "
        "assert passed(rows); print(*sorted({(row.name, row.backend.split()[0]) for row in rows}))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {(name, by) for name in ("block", "product") for by in ("lscollapse", "mamba-ssm", "torch")}
    expected |= {(name, by) for name in ("conv", "gated norm", "scan") for by in ("mamba-ssm", "torch")}
    expected |= {("mixer", "lscollapse"), ("measures", "lscollapse"), ("scan backward", "mamba-ssm")}
    if resolve_kernels("native").native is not None:  # there is a compiler
        expected |= {("mixer", "native"), ("block", "native")}
    assert done.stdout.strip() == " ".join(map(str, sorted(expected)))
