"""MQAR: answers by brute force, the distribution against closed forms, the streams, and what cannot be posed."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from lscollapse.core.config import ConfigError, checked
from lscollapse.data import mqar
from lscollapse.data.examples import SPLITS
from lscollapse.data.mqar import MqarConfig

SHAPES = [
    MqarConfig(),
    MqarConfig(seq_len=64, pairs=8, vocab_size=256),
    MqarConfig(seq_len=64, pairs=8, random_fillers=True),
    MqarConfig(seq_len=32, pairs=8, vocab_size=18),  # every key and every slot is taken
    MqarConfig(seq_len=9, pairs=2, vocab_size=70_001),
]


def answered(ids: list[int], n_pairs: int) -> dict[int, int]:
    """Position -> answer, by reading: the pairs first, then every token that is a key again."""
    value_of = dict(zip(ids[0 : 2 * n_pairs : 2], ids[1 : 2 * n_pairs : 2], strict=True))
    return {i: value_of[ids[i]] for i in range(2 * n_pairs, len(ids)) if ids[i] in value_of}


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_every_answer_by_brute_force(config: MqarConfig) -> None:
    data, L, P, V = mqar.sequences(config, "train", 700, 3), config.seq_len, config.pairs, config.vocab_size
    assert (data.ids.shape, data.at.shape, data.labels.shape) == ((700, L), (700, P), (700, P))
    for ids, at, labels in zip(data.ids.tolist(), data.at.tolist(), data.labels.tolist(), strict=True):
        keys, values = ids[0 : 2 * P : 2], ids[1 : 2 * P : 2]
        assert len(set(keys)) == len(set(values)) == len(set(at)) == P
        assert all(1 <= key < V // 2 for key in keys)
        assert all(V // 2 <= value < V for value in values)
        assert all(2 * P <= i < L and i % 2 == 0 for i in at)
        assert [ids[i] for i in at] == keys
        assert labels == values
        if config.random_fillers:
            assert all(0 <= token < V for token in ids)
        else:
            assert answered(ids, P) == dict(zip(at, labels, strict=True))
            assert all(ids[i] == 0 for i in range(2 * P, L) if i not in at)


def test_gaps_follow_the_power_law() -> None:
    """The slot of the first key has exactly the weights of the law: chi-square, 191 degrees of freedom."""
    data = mqar.sequences(MqarConfig(), "train", 60_000, 0)
    weights = np.array([g ** (0.01 - 1.0) for g in range(1, 193)])
    counts = np.bincount((data.at[:, 0] - 128) // 2, minlength=192)
    assert chisquare(counts, 60_000 * weights / weights.sum()).pvalue > 0.01


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_slots_are_drawn_one_after_the_other_among_those_left(power_a: float) -> None:
    """Three keys into five slots: the 60 ordered outcomes against the product of the weights among what is left."""
    data = mqar.sequences(MqarConfig(seq_len=16, pairs=3, vocab_size=64, power_a=power_a), "test", 30_000, 1)
    weights = [(g + 1.0) ** (power_a - 1.0) for g in range(5)]
    outcomes = list(permutations(range(5), 3))
    expected = []
    for outcome in outcomes:
        left, probability = sum(weights), 1.0
        for slot in outcome:
            probability *= weights[slot] / left
            left -= weights[slot]
        expected.append(30_000 * probability)
    seen = [tuple(row) for row in ((data.at - 6) // 2).tolist()]
    assert chisquare([seen.count(outcome) for outcome in outcomes], expected).pvalue > 0.01


def test_keys_and_values_are_uniform_ordered_draws() -> None:
    config = MqarConfig(seq_len=12, pairs=3, vocab_size=12)  # keys 1..5, values 6..11
    ids = mqar.sequences(config, "train", 30_000, 2).ids.tolist()
    for column, tokens in ((0, range(1, 6)), (1, range(6, 12))):
        outcomes = list(permutations(tokens, 3))
        seen = [tuple(row[column:6:2]) for row in ids]
        assert chisquare([seen.count(outcome) for outcome in outcomes]).pvalue > 0.01


def test_fillers_are_zero_or_any_token() -> None:
    data = mqar.sequences(MqarConfig(seq_len=64, pairs=4, vocab_size=50, random_fillers=True), "train", 3_000, 0)
    fillers = np.concatenate([np.delete(row[8:], at - 8) for row, at in zip(data.ids, data.at, strict=True)])
    assert chisquare(np.bincount(fillers, minlength=50)).pvalue > 0.01


def test_splits_are_independent_and_repeatable() -> None:
    config = MqarConfig(seq_len=64, pairs=8)
    splits = {name: mqar.sequences(config, name, 2_000, 7) for name in SPLITS}
    again = mqar.sequences(config, "validation", 2_000, 7)
    for name in ("ids", "at", "labels"):
        np.testing.assert_array_equal(getattr(splits["validation"], name), getattr(again, name))
    for one, other in [*pairwise(splits.values()), (splits["train"], mqar.sequences(config, "train", 2_000, 8))]:
        assert not {row.tobytes() for row in one.ids} & {row.tobytes() for row in other.ids}
        correlation = np.corrcoef(one.ids[:, 0], other.ids[:, 0])[0, 1]
        assert abs(correlation) < 4.0 / np.sqrt(2_000)
    assert kstest(np.concatenate([s.ids[:, 0] for s in splits.values()]) / 4096.0, "uniform").pvalue > 0.01


def test_more_sequences_only_add() -> None:
    config = MqarConfig(seq_len=64, pairs=8, random_fillers=True)
    few, many = mqar.sequences(config, "train", 100, 0), mqar.sequences(config, "train", 1_500, 0)
    np.testing.assert_array_equal(few.ids, many.ids[:100])
    np.testing.assert_array_equal(few.labels, many.labels[:100])
    assert few.ids.dtype == np.int16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 255}, "64 pairs do not fit into 255 tokens"),
        ({"pairs": 0}, "0 pairs do not fit"),
        ({"vocab_size": 129}, "129 has 63 keys, 64 pairs need as many: vocab_size must be at least 130"),
        ({"vocab_size": 0}, "0 has 0 keys"),
        ({"power_a": 0.0}, "power_a: input should be greater than 0, got 0"),
        ({"power_a": float("nan")}, "power_a: .*got nan"),
    ],
)
def test_impossible_sizes_are_one_line(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        checked(MqarConfig, values, ConfigError)
    assert "\n" not in str(caught.value)


def test_no_such_split() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        mqar.sequences(MqarConfig(), "dev", 1, 0)  # type: ignore[arg-type]
