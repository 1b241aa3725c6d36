"""Gradient collapse: the norm of the loss gradient with respect to X^(k), layer by layer, of every variant.

The loss is the language-model loss of lm_loss.py, one an excerpt. Forward, X of every layer is kept; backward, one block at
a time is computed again on the model's own modules under the hooks of `surgery`, and the gradient pulled back through it.
All in float32. Like X (stream.py), the gradient is carried as g * 2^power, one power per excerpt: it neither vanishes nor
overflows by itself however many layers multiply it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.lm_loss import Targets, excerpt_numbers, head_of, last_X, losses, targets_of
from lscollapse.instrument.rounding import Twins
from lscollapse.instrument.rows import LOG10_2, Table
from lscollapse.instrument.stream import Stream
from lscollapse.instrument.surgery import Variant, check
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter, Head, Scores, UnsupportedModel
from lscollapse.models.numerics.carried import largest_entries


class State(NamedTuple):
    """The input of a block, X * 2^-down."""

    X: Tensor  # (B, N, d)
    down: Tensor  # (B,)


def grad_norm(
    model: Any,
    ids: Any,
    variants: Sequence[Variant] = (Variant(),),
    *,
    mask_token: int | None = None,
    seed: int = 0,
    first: int = 0,
    twins: Twins | None = None,
) -> pd.DataFrame:
    """Frobenius norm of the gradient of each excerpt's loss with respect to its X^(k), k = 0..K.

    Args:
        model: a transformers model with a language-model head, in eval mode and in memory, or its Adapter.
        ids, variants, mask_token, seed, first, twins: as for `lm_loss`; an encoder reads the excerpts with hidden tokens.

    Returns:
        One row per variant, excerpt and layer, with the columns of `measure`: measure `grad_norm`, in nats per token and
        unit of X. `overflow` at every layer of an excerpt whose X leaves float32 anywhere; `below_floor` where it is zero.

    Raises:
        LossError: the model has no head, or an encoder's mask token is missing.
        UnsupportedModel: the checkpoint is streamed, so that there are no modules to go back through; or blocks hand
            numbers to later ones beside X.
        SurgeryError, ValueError: as `measure`.
    """
    adapter = adapt(model)
    head = head_of(adapter)
    for variant in variants:
        check(adapter, variant)
    tokens = checked_ids(adapter, ids)
    targets = targets_of(adapter, tokens, mask_token, seed, excerpt_numbers(tokens, first, twins))
    single = adapter if adapter.dtype == torch.float32 else adapt(copy.deepcopy(adapter.model).float())
    table = Table(adapter, tokens.shape[1])
    for number, variant in enumerate(variants):
        with torch.no_grad():
            stream = Stream(single, {number: variant}, single.embed(targets.inputs), torch.float32, twins=twins)
        check_chain(single)
        norms = list(_norms(single, stream, head, targets))
        lost = stream.known.status != "ok"
        for layer, log2 in enumerate(reversed(norms)):
            log2 = np.where(lost, np.nan, log2)
            status = ["below_floor" if v == -np.inf else s for s, v in zip(stream.known.status, log2, strict=True)]
            log10 = np.where(np.isfinite(log2), log2 * LOG10_2, np.nan)
            bound = np.full(len(lost), np.nan)
            table.extend(stream.arms[0], layer, "grad_norm", np.exp2(log2), log10, status, bound)
    return table.frame()


def check_chain(adapter: Adapter) -> None:
    """Raise UnsupportedModel where X^(k) is not all that the loss sees of the first k blocks."""
    if adapter.hands_on:
        raise UnsupportedModel(
            f"the gradient of {adapter.config.model_type} cannot be followed from block to block: its blocks hand numbers"
            " (as shared keys and values) to later ones beside X; leave out --gradients"
        )


def _norms(adapter: Adapter, stream: Stream, head: Head | Scores, targets: Targets) -> Iterator[np.ndarray]:
    """log2 of the norm for k = K..0, (B,) each; meaningless where the stream ends with another status than ok."""
    states = [State(stream.X, stream.carried.down)]
    with torch.no_grad():
        for layer in range(adapter.n_layers):
            stream.step(adapter, layer, None)
            states.append(State(stream.X, stream.carried.down))
    stream.read()
    lost = stream.lost != 0
    g, power = _from_head(adapter, stream, head, targets), np.zeros(len(lost))
    for layer in reversed(range(-1, adapter.n_layers)):
        g = torch.where(lost[:, None, None], 0.0, g)
        shift = torch.frexp(largest_entries(g)).exponent  # (B, N, d) -> (B,)
        g = torch.ldexp(g.double(), -shift[:, None, None]).float()  # a power of two rounds nothing
        power += shift.cpu().numpy()
        with np.errstate(divide="ignore"):
            size = np.log2(torch.linalg.vector_norm(g.double(), dim=(1, 2)).cpu().numpy())
        yield (size + power + states[layer + 1].down.numpy(force=True))  # by X = 2^-down times the X that is carried
        if layer >= 0:
            g = _pulled_back(adapter, stream, layer, states[layer], g)


def _from_head(adapter: Adapter, stream: Stream, head: Head | Scores, targets: Targets) -> Tensor:
    """Gradient of each excerpt's loss with respect to the last X as it is carried; one excerpt's scores at a time."""
    with torch.enable_grad():
        X = stream.X = stream.X.detach().requires_grad_()
        Y = last_X(adapter, stream)
        pulls = []
        for b, y in enumerate(Y):
            end = y.detach()[None].requires_grad_()  # (1, N, d)
            one = Targets(targets.inputs[b : b + 1], targets.at[b : b + 1], targets.labels[b : b + 1])
            pulls += torch.autograd.grad(losses(head, end, one), end)
        return torch.autograd.grad(Y, X, torch.cat(pulls))[0]


def _pulled_back(adapter: Adapter, stream: Stream, layer: int, state: State, g: Tensor) -> Tensor:
    """The gradient with respect to the input of block `layer` from that with respect to its output, both as carried."""
    with torch.enable_grad():
        X = stream.X = state.X.detach().requires_grad_()
        stream.carried.down = state.down
        stream.step(adapter, layer, None)
        return torch.autograd.grad(stream.X, X, g)[0]
