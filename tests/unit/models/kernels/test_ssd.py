"""The scan against the plain float64 recurrence (written here) and transformers' torch code; conv against F.conv1d."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import ssd
from lscollapse.workers import Workspace

SIZES = [  # batch, L, heads, head_dim, groups, state, chunk
    (1, 1, 2, 4, 1, 3, 128),
    (2, 7, 4, 3, 2, 5, 128),
    (3, 33, 4, 5, 4, 6, 128),
    (1, 128, 8, 8, 1, 16, 128),
    (2, 97, 4, 8, 2, 4, 40),
    (1, 300, 4, 4, 1, 8, 128),
    (2, 70, 8, 2, 4, 4, 1),
    (2, 65, 4, 4, 1, 1, 32),
]
DECAYS = {"weak": (0.01, -6.0), "usual": (8.0, -2.0), "strong": (300.0, 2.0)}


def inputs(size: tuple[int, ...], decay: str = "usual", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch, L, heads, head_dim, groups, state, _ = size
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    largest_A, dt_bias = DECAYS[decay]
    return {
        "x": normal(batch, L, heads, head_dim),
        "dt": 3.0 * normal(batch, L, heads),
        "A": -largest_A * torch.rand(heads, generator=generator, dtype=torch.float64).to(dtype),
        "B": normal(batch, L, groups, state),
        "C": normal(batch, L, groups, state),
        "D": normal(heads),
        "dt_bias": normal(heads) + dt_bias,
    }


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The definition, token by token, in float64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, L, heads, head_dim = x.shape
    step = torch.logaddexp(dt + (0 if dt_bias is None else dt_bias.double()), torch.zeros(())).clamp(*dt_limit)
    group = torch.arange(heads) // (heads // B.shape[2])
    state = torch.zeros(batch, heads, B.shape[3], head_dim, dtype=torch.float64)
    y = torch.empty_like(x)
    for t in range(L):
        state = torch.exp(step[:, t] * A)[..., None, None] * state
        state = state + step[:, t, :, None, None] * B[:, t, group, :, None] * x[:, t, :, None, :]
        y[:, t] = (C[:, t, group, :, None] * state).sum(2)
        if D is not None:
            y[:, t] += D.double()[:, None] * x[:, t]
    return y


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("size", SIZES)
def test_scan_is_the_recurrence(size: tuple[int, ...], decay: str) -> None:
    tensors = inputs(size, decay)
    expected = recurrence(**tensors)
    found = ssd.scan(**tensors, chunk=size[-1])
    assert found.dtype == torch.float64 and relative_error(found, expected) < 1e-12
    narrow = {name: t.float() for name, t in tensors.items()}
    found = ssd.scan(**narrow, chunk=size[-1])
    assert found.dtype == torch.float32 and relative_error(found, recurrence(**narrow)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_scan_agrees_with_transformers(size: tuple[int, ...]) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    reference = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    tensors = inputs(size, dtype=torch.float32)
    x, dt, A, B, C = (tensors[name] for name in ("x", "dt", "A", "B", "C"))
    limit = (0.01, 0.5)
    expected = reference(
        x, dt, A, B, C, chunk_size=16, D=tensors["D"], dt_bias=tensors["dt_bias"], dt_softplus=True, dt_limit=limit
    )
    assert relative_error(ssd.scan(**tensors, dt_limit=limit, chunk=size[-1]), expected.double()) < 1e-5


def test_optional_inputs_and_bfloat16() -> None:
    tensors = inputs(SIZES[3])
    for name in ("D", "dt_bias"):
        del tensors[name]
    assert relative_error(ssd.scan(**tensors), recurrence(**tensors)) < 1e-12
    coarse = {name: t.bfloat16() for name, t in tensors.items()}
    found = ssd.scan(**coarse)
    assert found.dtype == torch.float32 and relative_error(found, recurrence(**coarse)) < 1e-5


def test_decay_that_switches_from_violent_to_gentle_keeps_float32() -> None:
    """cum reaches -1e5 before steps of 1e-3: differences of a float32 cum would be noise."""
    size = (1, 96, 2, 4, 1, 4, 96)
    tensors = inputs(size, dtype=torch.float32)
    tensors |= {"A": torch.tensor([-100.0, -100.0]), "dt_bias": torch.zeros(2)}
    tensors["dt"] = torch.full((1, 96, 2), 30.0)
    tensors["dt"][:, 40:] = -11.5
    expected = recurrence(**tensors)
    assert relative_error(ssd.scan(**tensors)[:, 48:], expected[:, 48:]) < 1e-5


def test_extreme_steps_stay_finite() -> None:
    tensors = inputs(SIZES[3], dtype=torch.float32)
    tensors["dt"] = torch.where(tensors["dt"] > 0, 1e6, -1e6)
    found = ssd.scan(**tensors)
    assert relative_error(found, recurrence(**tensors)) < 1e-5


def test_excerpts_do_not_influence_each_other() -> None:
    tensors = inputs((5, 77, 4, 8, 2, 4, 128), dtype=torch.float32)
    together = ssd.scan(**tensors)
    for b in range(5):
        alone = {name: t[b : b + 1] if t.ndim > 1 else t for name, t in tensors.items()}
        assert torch.equal(ssd.scan(**alone)[0], together[b])


def test_views_out_and_a_used_workspace_change_nothing() -> None:
    tensors = inputs((2, 50, 4, 8, 2, 4, 16), dtype=torch.float32)
    expected = ssd.scan(**tensors, chunk=16)
    packed = torch.cat([tensors[name].flatten(2) for name in ("x", "B", "C", "dt")], dim=-1)
    x, B, C, dt = packed.split([32, 8, 8, 4], dim=-1)
    workspace, out = Workspace(), torch.empty(2, 50, 32)
    ssd.scan(**inputs((1, 300, 8, 8, 1, 8, 128), dtype=torch.float32), workspace=workspace)
    views = {"x": x.unflatten(-1, (4, 8)), "B": B.unflatten(-1, (2, 4)), "C": C.unflatten(-1, (2, 4)), "dt": dt}
    found = ssd.scan(**(tensors | views), chunk=16, out=out.unflatten(-1, (4, 8)), workspace=workspace)
    assert found.data_ptr() == out.data_ptr()
    assert relative_error(found, expected.double()) < 1e-6


def test_scan_refuses_shapes_that_do_not_fit() -> None:
    good = inputs(SIZES[1])
    for name, wrong in {
        "x": good["x"][0],
        "dt": good["dt"][:, :3],
        "A": good["A"][:1],
        "D": good["D"][None],
        "C": good["C"][..., :2],
    }.items():
        with pytest.raises(ssd.ScanError, match=r"fit|expected|axes"):
            ssd.scan(**(good | {name: wrong}))
    three = torch.zeros(2, 7, 3, 5)
    with pytest.raises(ssd.ScanError, match="multiple"):
        ssd.scan(**(good | {"B": three, "C": three}))
    with pytest.raises(ssd.ScanError, match="chunk"):
        ssd.scan(**good, chunk=0)


@pytest.mark.parametrize(
    ("batch", "L", "channels", "K"), [(1, 1, 3, 4), (2, 3, 5, 4), (3, 40, 6, 2), (1, 200, 3000, 4), (2, 9, 4, 1)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv_is_a_causal_depthwise_convolution(batch: int, L: int, channels: int, K: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(L)
    x = torch.randn(batch, L, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, K, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64) if with_bias else None
    padded = F.conv1d(x.transpose(1, 2), weight, bias, padding=K - 1, groups=channels)[..., :L].transpose(1, 2)
    expected = padded / (1 + torch.exp(-padded))
    assert relative_error(ssd.conv(x, weight, bias), expected) < 1e-14
    assert torch.equal(ssd.conv(x, weight[:, 0], bias), ssd.conv(x, weight, bias))
    found = ssd.conv(x.float(), weight.float(), None if bias is None else bias.float())
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-6


def test_conv_refuses_weights_of_other_channels() -> None:
    with pytest.raises(ssd.ScanError, match="do not fit"):
        ssd.conv(torch.zeros(1, 5, 4), torch.zeros(3, 1, 4))
