"""Multi-query associative recall (MQAR): remember which value followed each key, and say it when the key comes again.

The distribution is that of Arora et al., "Zoology: Measuring and improving recall in efficient language models"
(arXiv:2312.04927): a sequence opens with its key-value pairs; every key comes once more, as a query, in one of the
two-token slots that follow, and the answer is its value. Slot g = 0, 1, ... has weight (g + 1)^(a - 1); the keys choose
in the order of their pairs, each among the slots that are left.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from lscollapse.core.config import Section
from lscollapse.data.examples import SPLITS, Examples, Split

CHUNK = 512  # sequences that are drawn together: their pools of tokens stay in cache


class MqarConfig(Section):
    """The defaults are the paper's (appendix A.13 of arXiv:2410.10609v3).

    Attributes:
        seq_len: L, tokens of a sequence.
        pairs: P, key-value pairs of a sequence, at most L / 4.
        vocab_size: V; keys are 1..V//2-1, values V//2..V-1, each at most once in a sequence; 0 fills.
        power_a: a, of the power law, in (0, 1]; 1 is uniform.
        random_fillers: any token 0..V-1 in the places that 0 fills, as the public generator does by default. A filler
            may then equal a key.
    """

    seq_len: int = Field(default=512, le=2**20)
    pairs: int = 64
    vocab_size: int = Field(default=8192, le=2**24)
    power_a: float = Field(default=0.01, gt=0, le=1)
    random_fillers: bool = False

    @model_validator(mode="after")
    def _fits(self) -> MqarConfig:
        if self.pairs < 1 or self.seq_len < 4 * self.pairs:
            raise ValueError(
                f"{self.pairs} pairs do not fit into {self.seq_len} tokens: a pair takes 2 and the slot of its query 2"
                " more, so pairs must be 1 to seq_len / 4"
            )
        if self.keys < self.pairs:
            raise ValueError(
                f"a vocabulary of {self.vocab_size} has {max(self.keys, 0)} keys, {self.pairs} pairs need as many:"
                f" vocab_size must be at least {2 * self.pairs + 2}"
            )
        return self

    @property
    def keys(self) -> int:
        """Number of tokens that can be a key."""
        return self.vocab_size // 2 - 1

    @property
    def slots(self) -> int:
        """Number of places where a query can stand: every second position after the pairs."""
        return (self.seq_len - 2 * self.pairs) // 2


def sequences(config: MqarConfig, split: Split, n: int, seed: int) -> Examples:
    """The first `n` sequences of `train`, `validation` or `test`, three independent streams of one seed.

    A larger `n` only adds to them. Integers are in the smallest type that holds them.

    Returns:
        ids (n, L), tokens 0..V-1; at (n, P), the positions of the queries, 0..L-1, column j that of pair j; labels (n, P),
        the values to be said there.
    """
    P, L = config.pairs, config.seq_len
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split),)))
    tokens = np.int16 if config.vocab_size <= 2**15 else np.int32
    ids = np.zeros((n, L), tokens)
    labels = np.empty((n, P), tokens)
    at = np.empty((n, P), np.int16 if L <= 2**15 else np.int32)
    key_pool = np.tile(np.arange(1, config.keys + 1, dtype=tokens), (CHUNK, 1))
    value_pool = np.tile(np.arange(config.vocab_size // 2, config.vocab_size, dtype=tokens), (CHUNK, 1))
    weights = np.arange(1, config.slots + 1) ** (config.power_a - 1.0)
    for first in range(0, n, CHUNK):
        part = slice(first, first + CHUNK)
        size = len(labels[part])
        keys, values = _drawn(key_pool, P, rng)[:size], _drawn(value_pool, P, rng)[:size]
        # Exponential times of rates w, in the order in which they end, are draws by w without replacement.
        ends = rng.standard_exponential((CHUNK, config.slots)) / weights
        at[part] = 2 * P + 2 * np.argsort(ends, axis=1)[:size, :P]  # (size, P)
        if config.random_fillers:
            ids[part] = rng.integers(config.vocab_size, size=(CHUNK, L), dtype=tokens)[:size]
        ids[part, 0 : 2 * P : 2], ids[part, 1 : 2 * P : 2], labels[part] = keys, values, values
        np.put_along_axis(ids[part], at[part].astype(np.intp), keys, axis=1)
    return Examples(ids, labels, at)


def _drawn(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first `count` steps of a Fisher-Yates shuffle of every row of `pool`, in place: the columns drawn."""
    rows = np.arange(len(pool))
    for j in range(count):
        chosen = rng.integers(j, pool.shape[1], size=len(pool))
        pool[rows, chosen], pool[:, j] = pool[:, j].copy(), pool[rows, chosen]
    return pool[:, :count]
