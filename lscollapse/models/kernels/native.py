"""What lies between the products of a Mamba-2 block, and the norm and the sum around them, by the package's own C++.

    native, note = load()          # None where it cannot be had, and why

`between.cpp` is compiled on first use (native_build.py) and compared with float64 before it is used.
"""

from __future__ import annotations

import functools
import re
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_double, c_float, c_int64, c_void_p
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lscollapse.models.kernels import guard, ssd
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.models.kernels.native_build import SECONDS, BuildError, build
from lscollapse.models.kernels.reference import TOLERANCE, block_weights, plain_mixer, plain_norm, relative_error
from lscollapse.workers import Workspace

SOURCE = Path(__file__).with_name("between.cpp")
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of the functions, by what they read and write
ELSE = "torch operations run instead"
CHECKED = Mamba2Shape(24, heads=4, head_dim=12, state=5, groups=2, dt_limit=(0.001, 5.0))
CHECKED_TOKENS, CHECKED_CHUNK = 37, 20


class Mixer(NamedTuple):
    """What a mixer is made of, in float32: its shape, whether it has its gate and its norm, and its tensors.

    conv is (conv_kernel, conv_dim), contiguous; A is -exp(A_log).
    """

    shape: Mamba2Shape
    gating: bool
    keeps_norm: bool
    conv: Tensor
    conv_bias: Tensor | None
    A: Tensor
    dt_bias: Tensor
    norm: Tensor


class _Sizes(Structure):
    """`Sizes` of between.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "heads", "head_dim", "groups", "state", "taps", "chunk")),
        *((name, c_int64) for name in ("row_in", "row_out", "gate", "norm")),
        ("eps", c_double), ("dt_low", c_float), ("dt_high", c_float),
    )  # fmt: skip


class _Weights(Structure):
    """`Weights` of between.cpp."""

    _fields_ = tuple((name, c_void_p) for name in ("conv", "conv_bias", "A", "dt_bias", "norm"))


class Native:
    """The functions of the library. Tensors are float32, or where it is said so float32 or bfloat16; rows are contiguous.

    Attributes:
        name: what compiled it, and for which vectors, as `backend` says it.
    """

    def __init__(self, library: CDLL, compiler: str) -> None:
        self._scratch_floats = library.scratch_floats
        self._scratch_floats.argtypes, self._scratch_floats.restype = (POINTER(_Sizes),), c_int64
        rows = (c_void_p, c_void_p, c_double, c_int64, c_int64, c_void_p)
        mix = (POINTER(_Sizes), POINTER(_Weights), c_void_p, c_void_p, c_void_p, c_void_p)
        add = (c_void_p, c_void_p, c_float, c_float, c_int64, c_void_p)
        self._functions = {}
        for (name, arguments), (dtype, suffix) in product(
            (("enter", rows), ("mix", mix), ("add", add)), SUFFIXES.items()
        ):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            self._functions[name, dtype] = function
        library.vectors.restype = c_char_p
        self.name = f"{_short(compiler)}, {library.vectors().decode()}"

    def enter(self, X: Tensor, weight: Tensor | None, eps: float, out: Tensor) -> None:
        """out = weight * X / rms(X), or X without a weight; X (N, width), out float32 or bfloat16."""
        self._functions["enter", out.dtype](_at(X), _at(weight), eps, *X.shape, _at(out))

    def mix(
        self, mixer: Mixer, projected: Tensor, D: Tensor, out: Tensor, workspace: Workspace, chunk: int = ssd.CHUNK
    ) -> None:
        """Convolution, scan, gate and norm of one excerpt, in memory of the workspace that is bounded for any N.

        Args:
            projected: (N, [inner +] conv_dim + heads): [z,] xBC, dt, float32 or bfloat16.
            D: (heads,).
            out: (N, inner) of the same dtype; it may be the first columns of projected.
            chunk: tokens between two hand-overs of the state.
        """
        s, N = mixer.shape, len(projected)
        sizes = _Sizes(
            N, s.heads, s.head_dim, s.groups, s.state, s.conv_kernel, min(N, max(chunk, s.conv_kernel - 1)),
            projected.stride(0), out.stride(0), mixer.gating, mixer.keeps_norm, s.eps, *s.dt_limit,
        )  # fmt: skip
        weights = _Weights(*(_at(tensor) for tensor in mixer[3:]))
        memory = workspace.take("native", (self._scratch_floats(byref(sizes)),), torch.float32)
        mix = self._functions["mix", projected.dtype]
        mix(byref(sizes), byref(weights), _at(projected), _at(D), _at(out), _at(memory))

    def add(self, X: Tensor, O: Tensor, skip: float, scale: float, out: Tensor) -> None:
        """out = skip*X + scale*O, all (N, hidden), O float32 or bfloat16; a factor of 0 leaves X or O out, whatever it holds."""
        self._functions["add", O.dtype](_at(X), _at(O), skip, scale, X.numel(), _at(out))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _short(compiler: str) -> str:
    """`g++ (Debian 12.2.0-14) 12.2.0` as `gcc 12.2.0`."""
    versions = re.findall(r"\d+(?:\.\d+)+", re.sub(r"\(.*?\)", "", compiler))
    return " ".join(["clang" if "clang" in compiler else "gcc", *versions[:1]])


@functools.cache
def load(source: Path = SOURCE, seconds: float = SECONDS) -> tuple[Native | None, str]:
    """The functions of `between.cpp`, or None where they cannot be had; and a note for the user, empty where there is none.

    Args:
        source: the file.
        seconds: how long a compiler may take.
    """
    try:
        built = build(source, seconds=seconds)
        native = Native(built.library, built.compiler)
    except BuildError as error:
        return None, f"the native kernels cannot be compiled: {error}: {ELSE}"
    except AttributeError as error:
        return None, f"the native kernels lack a function ({error}): {ELSE}"
    fault = faults(native)
    return (None, fault) if fault else (native, built.note)


def faults(native: Native) -> str:
    """Why the functions are not to be used on this machine, for the user; empty where they are right."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small would wait for another core, on a busy machine for a second
    try:
        return _faults(native)
    finally:
        torch.set_num_threads(threads)


def _faults(native: Native) -> str:
    for dtype, gating in product(SUFFIXES, (True, False)):
        # a bfloat16 is off by up to half a unit of its last place, which is 2^-9 to 2^-8 of it
        tolerance = TOLERANCE["mixer"] if dtype == torch.float32 else 2.0**-8
        said = guard.fault("the package's native kernels", functools.partial(_error, native, dtype, gating), tolerance)
        if said:
            return said
    return ""


@torch.no_grad()
def mixed(
    native: Native, weights: dict[str, Tensor], s: Mamba2Shape, projected: Tensor, gating: bool = True,
    chunk: int = ssd.CHUNK,
) -> Tensor:  # fmt: skip
    """`plain_mixer` by the functions: projected (B, N, [inner +] conv_dim + heads) -> (B, N, inner), in its dtype."""
    conv = weights["mixer.conv1d.weight"].flatten(1).T.contiguous()
    A, dt_bias = -weights["mixer.A_log"].exp(), weights["mixer.dt_bias"]
    mixer = Mixer(s, gating, True, conv, weights["mixer.conv1d.bias"], A, dt_bias, weights["mixer.norm.weight"])
    out, workspace = projected.new_empty(*projected.shape[:2], s.inner), Workspace()
    for one, one_out in zip(projected, out, strict=True):
        native.mix(mixer, one, weights["mixer.D"], one_out, workspace, chunk)
    return out


def _error(native: Native, dtype: torch.dtype, gating: bool) -> float:
    """The largest of the three functions, over one excerpt of two chunks."""
    s, generator = CHECKED, torch.Generator().manual_seed(0)
    w = block_weights(s, generator, torch.device("cpu"))
    width, norm = s.inner * gating + s.conv_dim + s.heads, w["mixer.norm.weight"]
    projected = torch.randn(1, CHECKED_TOKENS, width, generator=generator).to(dtype)
    O = mixed(native, w, s, projected, gating, CHECKED_CHUNK)
    X, normed = torch.randn(O.shape, generator=generator), torch.empty_like(O)
    Y = torch.empty_like(X)
    native.enter(X[0], norm, s.eps, normed[0])
    native.add(X, O, -0.5, 3.0, Y)
    pairs = (
        (O, plain_mixer(w, s, projected, gating)), (normed, plain_norm(X, None, norm, s.eps)),
        (Y, 3.0 * O.double() - 0.5 * X),
    )  # fmt: skip
    return max((relative_error(*pair) for pair in pairs), key=guard.order)
