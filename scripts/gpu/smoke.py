"""The first minutes on a card: what it is, what it can do at most, and whether the kernels are right there."""

from __future__ import annotations

import itertools
import platform
import subprocess
from importlib import metadata
from typing import Any

from gpu.setting import NotRun, Setting, compared, said

Found = tuple[str, dict[str, Any]]  # the headline of a step and its numbers
PACKAGES = ("torch", "triton", "transformers", "numpy", "pandas", "mamba-ssm", "causal-conv1d", "accelerate")


def versions(s: Setting) -> Found:
    import torch

    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    card = "no card"
    if not s.dry:
        subprocess.run(["nvidia-smi"], check=False)
        p = torch.cuda.get_device_properties(0)
        card = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors, sm_{p.major}{p.minor}"
    found = {"card": card, "python": platform.python_version(), **installed}
    return f"{card}; torch {installed['torch']}, triton {installed['triton']}", found


def ceilings(s: Setting) -> Found:
    """TB/s of a copy, read and written, and TFLOP/s of the product that is in_proj of all arms without their gate."""
    import torch

    m, k, n = (64, 64, 64) if s.dry else (45056, 2560, 5456)
    source = torch.zeros(2**20 if s.dry else 2**31, dtype=torch.uint8, device=s.device)
    target = torch.empty_like(source)
    found = {"copy": 2 * len(source) / 1e12 / s.seconds(lambda: target.copy_(source), 9)[0]}
    kinds = {
        "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False), "tf32": (torch.float32, True),
        "ieee": (torch.float32, False), "float64": (torch.float64, False),
    }  # fmt: skip
    for name, (dtype, tf32) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        X, W = (torch.randn(rows, k, device=s.device).to(dtype) for rows in (m, n))
        s.seconds(lambda X=X, W=W: X @ W.T, 3)
        found[name] = 2 * m * k * n / 1e12 / s.seconds(lambda X=X, W=W: X @ W.T, 7)[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    words = ", ".join(f"{name} {rate:.1f}" for name, rate in list(found.items())[1:])
    return f"copy {found['copy']:.2f} TB/s; TFLOP/s {words}", found


def verify_kernels(s: Setting) -> Found:
    from lscollapse.models.kernels.verify import passed, verify

    rows = verify(s.device, "torch" if s.dry else "auto")
    for row in rows:
        ok = "ok" if row.ok else "OFF"
        print(
            f"{ok:4}{row.name:14}{row.case:24}{row.error:8.1e} of {row.tolerance:.0e}{row.seconds:10.5f} s  {row.backend}"
        )
    over = [f"{row.name}, {row.case}: {row.error:.1e} by {row.backend}" for row in rows if not row.ok]
    numbers = {f"{row.name}, {row.case}, {row.backend}": row.error for row in rows}
    if not passed(rows):
        raise AssertionError(f"{len(over)} of {len(rows)} over their tolerance: {'; '.join(over)}")
    return f"{len(rows)} of {len(rows)} within their tolerance", numbers


def _own(s: Setting) -> Any:
    """Own kernels whether or not they are right here."""
    if s.dry:
        raise NotRun("own kernels need a GPU")
    from lscollapse.models.kernels.backends import own_kernels

    return own_kernels(s.device)


def poisoned(s: Setting) -> Found:
    """Blocks of the 2.7B shape by own kernels that find NaN in all they write to, one lambda an excerpt, against float64."""
    kernels = _own(s)
    import torch

    from lscollapse.models.kernels.gpu_block import GpuBlock
    from lscollapse.models.kernels.reference import TOLERANCE, block_weights, plain_block, relative_error
    from lscollapse.models.kernels.verify import MAMBA2_27B

    generator = torch.Generator().manual_seed(0)
    weights = block_weights(MAMBA2_27B, generator, torch.device(s.device))
    block, found = GpuBlock(weights, MAMBA2_27B, kernels), {}
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *args, make=make, **kwargs: _nan(make(*args, **kwargs)))
    for n_tokens, gating in itertools.product((1, 3, 75, 128), (True, False)):
        X = torch.randn(2, n_tokens, MAMBA2_27B.hidden, generator=generator).to(s.device)
        lam = torch.tensor([-3.0, 0.0], device=s.device)
        Y = block(X, lam=lam, gating=gating)
        O = block(X, lam=0.0, gating=gating)
        exact = lam[:, None, None].double() * X.double() + O.double()
        found[f"{n_tokens} tokens, gate {gating}, sum"] = relative_error(Y, exact)
        if gating:
            found[f"{n_tokens} tokens"] = relative_error(block(X, lam=1.0), plain_block(weights, MAMBA2_27B, X))
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
    if not found[worst] <= TOLERANCE["block"]:
        raise AssertionError(f"off by {found[worst]:.1e} at {worst}, {TOLERANCE['block']:.0e} is allowed")
    return f"off by {found[worst]:.1e} at most, at {worst}", found


def _nan(tensor: Any) -> Any:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def product_error(s: Setting) -> Found:
    """Of 2,560 terms, relative to the largest value: own products by the dtype of the weights, and torch's."""
    own = _own(s).own
    import torch
    import torch.nn.functional as F

    from lscollapse.models.kernels.reference import TOLERANCE, relative_error

    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(rows, 2560, generator=generator).to(s.device) for rows in (4096, 5456))
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = (W / 50).to(dtype)
        exact = X.double() @ weight.double().T
        found[f"own, {dtype}"] = relative_error(own.product(own.split(X), own.Weight.of(weight)), exact)
        for name, tf32 in (("ieee", False), ("tf32", True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            found[f"{name}, {dtype}"] = relative_error(F.linear(X, weight.float()), exact)
    torch.backends.cuda.matmul.allow_tf32 = False
    halves, weight = own.split(torch.randn(45056, 2560, device=s.device)), own.Weight.of(W.half())
    own.product(halves, weight)
    taken = s.seconds(lambda: own.product(halves, weight), 7)[0]
    rate = 2 * 2 * 45056 * 2560 * 5456 / 1e12 / taken
    found["own TFLOP/s of its two passes"] = rate
    worst = max(value for name, value in found.items() if name.startswith("own, "))
    if not worst <= TOLERANCE["product"]:
        raise AssertionError(f"own products are off by {worst:.1e}, {TOLERANCE['product']:.0e} is allowed")
    return f"own {worst:.1e}, ieee {found['ieee, torch.float16']:.1e}; own at {rate:.0f} TFLOP/s of two passes", found


def measures(s: Setting) -> Found:
    """Every measure by the kernels against float64 on the CPU, of random, collapsed and lopsided rows; and their time."""
    if s.dry:
        raise NotRun("own kernels need a GPU")
    import torch

    from lscollapse.measures import measure_all
    from lscollapse.models.kernels.fused_measures import Fused

    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(8, 128, 2560, generator=generator)
    Y[1] = Y[1, :1] + 1e-6 * Y[1]  # nearly equal rows
    Y[2] = Y[2, :1].expand(128, -1)  # equal rows
    Y[3] *= torch.logspace(-12, 12, 128)[:, None]
    Y[4] *= 1e-30
    Y[5] = Y[5, :1] * torch.tensor([1.0, -1.0]).repeat(64)[:, None] + 1e-4 * Y[5]  # rows at +u and -u
    found, expected = measure_all(Fused(Y.to(s.device))), measure_all(Y)
    off = {}
    for name, exact in expected.items():
        difference = (found[name].cpu() - exact).abs()
        off[name] = float((difference / exact.abs().clamp(min=1e-12)).max())
    large = torch.randn(352, 128, 2560, device=s.device)
    measure_all(Fused(large))
    taken = s.seconds(lambda: measure_all(Fused(large)), 7)[0]
    worst = max(off, key=lambda name: off[name] if off[name] == off[name] else float("inf"))
    if not off[worst] <= 1e-3:
        raise AssertionError(f"{worst} is off by {off[worst]:.1e}")
    return f"off by {off[worst]:.1e} at most ({worst}); 352 excerpts in {1e3 * taken:.2f} ms", off | {"seconds": taken}


def tiny_rows(s: Setting) -> Found:
    """mamba2-tiny on the CPU and here; of a dry run a random net, by turns and in batches."""
    import torch

    from lscollapse.instrument.forward import measure_pass
    from lscollapse.models.adapt import adapt

    if s.dry:
        from transformers import Mamba2Config, Mamba2Model

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_heads": 2, "head_dim": 32, "state_size": 16, "num_hidden_layers": 2}
        model: Any = Mamba2Model(Mamba2Config(vocab_size=64, pad_token_id=0, n_groups=1, expand=2, **sizes)).eval()
        there = model
    else:
        from lscollapse.models.checkpoints.checkpoint import load

        model, there = load("mamba2-tiny").model, load("mamba2-tiny", device=s.device).model
    arms, ids = s.arms(), s.ids(4)
    expected = measure_pass(adapt(model), ids, arms, torch.float32)
    taken, found = s.seconds(lambda: measure_pass(adapt(there), ids, arms, torch.float32, batched=True))
    numbers: dict[str, Any] = {"seconds": taken}
    for gating, part in expected.groupby(expected["gating"].astype(bool)):
        here = found[found["gating"].astype(bool) == gating]
        numbers |= {f"gate {gating}: {name}": value for name, value in compared(here, part).items()}
    numbers |= compared(found, expected)
    if not numbers["gate False: off relative_mu"] <= 1e-4:
        raise AssertionError(f"without the gate {said(numbers)}")
    return f"{said(numbers)}; without the gate off by {numbers['gate False: off relative_mu']:.1e}", numbers
