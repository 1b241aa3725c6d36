"""The language-model loss of every variant, in nats per token, on the excerpts whose collapse is measured.

A decoder predicts each next token of an excerpt; an encoder fills in the 15 % of its tokens that a seeded stream has
replaced by the mask token. The head (final norm and output matrix) goes over blocks of the vocabulary: no more scores
than those of one block are in memory. Where the parts of the head are not known (own_head.py) the model's own forward
makes the scores, of one excerpt at a time.

Early exit (early_exit.py). X of an excerpt that was certified at layer k stands for X^(K) up to the factor
lam_k ... lam_{K-1}, which `last_X` puts back, and a relative change of at most `bound` in each row. A final RMSNorm turns
the change of a row into one of at most 2 bound sqrt(d) max|g|, g its weight. So a score moves by at most that times the
longest row of the output matrix, and the loss by twice as much: the `bound` of the row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.instrument.engines import Engines
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.rounding import Twins
from lscollapse.instrument.rows import Table
from lscollapse.instrument.stream import Stream
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter, Head, Scores
from lscollapse.models.adapters.heads import missing
from lscollapse.models.checkpoints.tensors import forget
from lscollapse.models.numerics.carried import HIGH, largest_entries
from lscollapse.models.numerics.widened import computing_in

MASKED = 0.15  # share of the tokens that an encoder has to fill in
BLOCK = 4096  # vocabulary entries that are scored at a time
HIDING = int.from_bytes(b"masked")  # names the random numbers that decide which tokens are hidden


class LossError(ValueError):
    """The model has no language-model head, or no mask token is known."""


@dataclass(frozen=True)
class Targets:
    """What the model reads and what it has to say: token `labels[b, p]` from the last X at position `at[b, p]`."""

    inputs: Tensor  # (B, N)
    at: Tensor  # (B, P)
    labels: Tensor  # (B, P)


def lm_loss(
    model: Any,
    ids: Any,
    variants: Sequence[Variant] = (Variant(),),
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    *,
    mask_token: int | None = None,
    seed: int = 0,
    first: int = 0,
    streams: Sequence[Stream] | None = None,
    twins: Twins | None = None,
) -> pd.DataFrame:
    """The language-model loss of every variant on every excerpt.

    Args:
        model: a transformers model with a language-model head, in eval mode, or its Adapter.
        ids, variants, dtype: as for `measure`; dtype may also be one for each variant.
        mask_token: id that hides a token; needed for encoders.
        seed, first: choose the hidden tokens, of excerpts `first`, `first` + 1, ...
        streams: of a decoder, what `measure_pass` ended with for these ids and variants; computed where not given.
        twins: of the ids, as for `measure_pass`; a twin has the hidden tokens of its original.

    Returns:
        One row per variant and excerpt, with the columns of `measure`: measure `lm_loss`, layer K, nats per token.
        `overflow` where X left its range, `certified` with a bound where the last layers were not computed.

    Raises:
        LossError: the model has no head, or an encoder's mask token is missing.
        SurgeryError, UnsupportedModel, ValueError: as `measure`.
    """
    adapter = adapt(model)
    head = head_of(adapter)
    tokens = checked_ids(adapter, ids)
    targets = targets_of(adapter, tokens, mask_token, seed, excerpt_numbers(tokens, first, twins))
    with torch.no_grad():
        if streams is None or adapter.masked:
            streams = Engines(adapter, variants, dtype).ends(targets.inputs, twins)
        table = Table(adapter, tokens.shape[1])
        certified = any(stream.known.settled.any() for stream in streams)
        root, largest, longest = _steepness(head) if certified else (math.nan,) * 3
        for stream in streams:
            X, bound = last_X(adapter, stream), 4 * stream.known.bound * root * largest * longest
            for arm in stream.arms:
                value = losses(head, X[arm.rows], targets).double().cpu().numpy()  # (B,)
                status = stream.known.status_of(np.where(np.isfinite(value), "", "overflow"), arm.rows)
                value = np.where(np.isin(status, ("ok", "certified")), value, np.nan)
                table.extend(arm, adapter.n_layers, "lm_loss", value, np.log10(value), status, bound[arm.rows])
    return table.frame()


def head_of(adapter: Adapter) -> Head | Scores:
    """The model's head, or LossError."""
    head = adapter.head
    if head is None:
        raise LossError(missing(adapter))
    return head


def excerpt_numbers(tokens: Tensor, first: int, twins: Twins | None) -> list[int]:
    """The number of each excerpt of a batch (B, N); a twin has that of its original."""
    return list(range(first, first + len(tokens))) if twins is None else [*twins.numbers, *twins.numbers]


def targets_of(adapter: Adapter, tokens: Tensor, mask_token: int | None, seed: int, numbers: Sequence[int]) -> Targets:
    """Next tokens for a decoder; for an encoder round(0.15 N) hidden tokens, at least one, by seed and excerpt number."""
    N = tokens.shape[1]
    if not adapter.masked:
        if N < 2:
            raise LossError("an excerpt of one token has no next one: give --tokens 2 or more")
        return Targets(tokens, torch.arange(N - 1, device=tokens.device).expand(len(tokens), -1), tokens[:, 1:])
    if mask_token is None:
        raise LossError(
            f"{adapter.config.model_type} fills in masked tokens and its tokenizer has no mask token: give mask_token, or"
            " texts with --tokenizer native"
        )
    hidden = max(1, round(MASKED * N))
    chosen = [
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(HIDING, number))).permutation(N)[:hidden]
        for number in numbers
    ]
    at = torch.as_tensor(np.sort(chosen, axis=1), device=tokens.device)
    return Targets(tokens.scatter(1, at, mask_token), at, tokens.gather(1, at))


def last_X(adapter: Adapter, stream: Stream) -> Tensor:
    """X^(K) as the head gets it, (R, N, d), float32 at least; zeros for excerpts that left the range.

    In its true size up to 2^HIGH, and in that size beyond, where a final norm gives the same.
    """
    X, known = stream.whole(), stream.known
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    lost = torch.as_tensor(known.status != "ok", device=X.device)
    X = torch.where(lost[:, None, None], 0.0, X)
    if not adapter.pre_norm:
        return X
    largest = torch.frexp(largest_entries(X)).exponent.cpu().numpy()  # (B, N, d) -> (B,)
    scale = known.sign * np.exp2(np.minimum(known.power, HIGH - largest))
    return X * torch.as_tensor(scale, dtype=X.dtype, device=X.device)[:, None, None]


def losses(head: Head | Scores, X: Tensor, targets: Targets) -> Tensor:
    """Mean cross-entropy of every excerpt, (B, N, d) -> (B,), in nats per token; differentiable in X."""
    with computing_in(X.dtype):
        if not isinstance(head, Head):
            excerpts = zip(X, targets.inputs, targets.at, targets.labels, strict=True)
            scores = ((head.scores(x[None], ids[None])[0, at], labels) for x, ids, at, labels in excerpts)
            return torch.stack([F.cross_entropy(logits, labels) for logits, labels in scores])  # (P, V) and (P,) -> ()
        at = targets.at[..., None].expand(-1, -1, X.shape[-1])  # (B, P) -> (B, P, d)
        transform = copy.deepcopy(head.transform).to(X.device, X.dtype)
        per_excerpt = zip(X.gather(1, at), targets.labels, strict=True)  # (P, d), (P,)
        return torch.stack([cross_entropy(transform(x), labels, head).mean() for x, labels in per_excerpt])


def cross_entropy(Z: Tensor, labels: Tensor, head: Head) -> Tensor:
    """-log softmax(Z @ weight.T + bias)[labels], (P, e) and (P,) -> (P,), over blocks of the vocabulary."""
    total = Z.new_full(labels.shape, -math.inf)  # (P,), log of the sum of exp(scores) over the blocks so far
    wanted = Z.new_zeros(labels.shape)  # (P,), the scores of the labels
    for start, weight in _blocks(head):
        scores = Z @ weight.to(Z).T  # (P, e) -> (P, block)
        if head.bias is not None:
            scores = scores + head.bias[start : start + BLOCK].to(Z)
        total = torch.logaddexp(total, scores.logsumexp(-1))
        inside = (labels >= start) & (labels < start + scores.shape[-1])
        here = scores.gather(1, (labels - start).clamp(0, scores.shape[-1] - 1)[:, None])[:, 0]  # (P,)
        wanted = torch.where(inside, here, wanted)
    return total - wanted


def _blocks(head: Head) -> Iterator[tuple[int, Tensor]]:
    """The rows of the output matrix, BLOCK at a time, each with the number of its first."""
    for start in range(0, len(head.weight), BLOCK):
        block = head.weight[start : start + BLOCK]
        yield start, block
        if head.mapped:
            forget({"output": block})


def _steepness(head: Head | Scores) -> tuple[float, float, float]:
    """sqrt(d), max|g| and the longest row of the output matrix, for the bound of certified excerpts (see the module)."""
    # Every architecture whose excerpts are certified has its head in parts, with a transform that is a norm alone.
    assert isinstance(head, Head)
    g = next(head.transform.parameters()).detach()
    longest = max(float(torch.linalg.vector_norm(block.float(), dim=-1).max()) for _, block in _blocks(head))
    return math.sqrt(len(g)), float(g.abs().max()), longest
