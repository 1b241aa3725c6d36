"""Random arms of random tiny nets for test_fuzz.py, and every row of the table against a reference.

The nets are in fuzz_nets.py (adapters of their own) and fuzz_classes.py (the generic adapter).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

import lscollapse
from lscollapse import Variant
from lscollapse.core.table import ABSOLUTE
from lscollapse.models.adapters.adapter import UnsupportedModel
from tests.equivalence import plain_models

Outputs = list[np.ndarray]  # X_0 .. X_K, each (B, N, d)
Reference = Callable[[Variant, float, np.random.Generator], Outputs]  # of an arm, shaken by a spacing (0: not at all)
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
SPACING = {"float32": 2.0**-23, "float64": 2.0**-52}
DRAWS, SAFETY = 3, 8.0  # shaken references, and how many times the largest of their moves is allowed
CAUTION = 30.0  # times `slack` an estimate of rounding may be, which takes the largest of five layers, 16 times
OWN = 4 * 2.0**-52  # rounding of the reference's own singular values and differences, relative to the norm of Y
VANISHING = {"mu", "relative_mu", "rank1_residual", "dong_residual"}
ARMS = 4


@dataclass
class Case:
    """A model, its ids (B, N), what can be switched in it, and its reference."""

    name: str
    model: Any
    ids: np.ndarray
    reference: Reference
    layers: int
    skip_sites: tuple[str, ...] = ("residual",)
    norm_sites: tuple[str, ...] = ()
    gate: bool = False


@dataclass
class Tally:
    """What was compared, and what differed."""

    configs: int = 0
    arms: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOLERANCE, 0))
    amplified: int = 0  # rows whose tolerance is that of the shaken references
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOLERANCE, 0.0))
    refused: list[tuple[str, str]] = field(default_factory=list)  # case and reason
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = ", ".join(
            f"{self.rows[dtype]} rows of {dtype}, worst difference {self.worst[dtype]:.1e}" for dtype in self.rows
        )
        return (
            f"{self.configs} configurations, {self.arms} arms, {rows}; {self.amplified} rows where rounding is amplified;"
            f" refused: {', '.join(name for name, _ in self.refused) or 'none'}; wrong: {len(self.wrong)}"
        )


# --- arms ---


def _lambda(rng: np.random.Generator) -> float:
    special = (0.0, 1.0, -1.0, 16.0, -16.0, 0.125, -0.5)
    return float(rng.choice(special)) if rng.random() < 0.3 else float(rng.uniform(-16.0, 16.0))


def arms(case: Case, rng: np.random.Generator) -> list[Variant]:
    """ARMS random ones: a lambda or a list of them, and the gate, norms and sites that the case has."""
    found = []
    for _ in range(ARMS):
        per_layer = rng.random() < 0.35
        layernorm = not case.norm_sites or bool(rng.random() < 0.7)
        found.append(
            Variant(
                lam=tuple(_lambda(rng) for _ in range(case.layers)) if per_layer else _lambda(rng),
                gating=not case.gate or bool(rng.random() < 0.5),
                layernorm=layernorm,
                skip_site=str(rng.choice(case.skip_sites)),
                norm_site="both" if layernorm else str(rng.choice(case.norm_sites)),
            )
        )
    return found


def vary(model: Any, rng: np.random.Generator) -> None:
    """All matrices of the blocks larger or smaller: nets that mix much, and nets that hardly do."""
    size = float(rng.choice([0.5, 1.0, 1.0, 2.0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layer" in name and "A_" not in name:
                parameter *= size


# --- a case against its reference ---


def check(case: Case, seed: list[int], tally: Tally) -> None:
    """Measure ARMS arms of `case`, interleaved, in float32 and float64, and compare every row.

    By default an arm whose blocks lost their norms computes in float64; what counts is the `dtype` that its rows name.
    """
    tally.configs += 1
    rng = np.random.default_rng(seed)
    variants = arms(case, rng)
    first = None if rng.random() < 0.5 else torch.float32
    for dtype in (first, torch.float64):
        try:
            rows = lscollapse.measure(case.model, case.ids, variants, dtype=dtype)
        except UnsupportedModel as refusal:
            tally.refused.append((case.name, str(refusal)))
            return
        for number, variant in enumerate(variants):
            own = rows[rows["variant"] == number]
            tally.arms += dtype is first
            _compare(own, case, variant, rng, tally)


def _compare(rows: pd.DataFrame, case: Case, variant: Variant, rng: np.random.Generator, tally: Tally) -> None:
    dtype = rows["dtype"].iloc[0]
    exact = case.reference(variant, 0.0, rng)
    values = _values(exact)
    spread = np.abs(np.stack([_values(case.reference(variant, SPACING[dtype], rng)) - values for _ in range(DRAWS)]))
    moved = spread.max(0)  # NaN where one of them left the range
    names = list(plain_models.plain_measures(np.eye(2)))
    table = rows.pivot(index=["layer", "excerpt"], columns="measure", values=["value", "status"])
    assert table["value"].shape == (len(exact) * len(case.ids), len(names)), "a measurement is missing"
    bad: list[str] = []
    for (layer, excerpt), row in zip(np.ndindex(values.shape[:2]), table.itertuples(index=False), strict=True):
        own: dict[Any, Any] = dict(zip(table.columns, row, strict=True))
        largest = float(np.abs(exact[layer][excerpt]).max())
        for m, name in enumerate(names):
            value, status = own["value", name], own["status", name]
            expected, slack = values[layer, excerpt, m], SAFETY * moved[layer, excerpt, m]
            if name in VANISHING:
                slack += OWN * (float(np.linalg.norm(exact[layer][excerpt])) if name == "mu" else 1.0)
            where = f"layer {layer}, excerpt {excerpt}, {name}: {value!r}, {status}, against {expected!r}"
            if status == "ok":
                difference, allowed = abs(value - expected), TOLERANCE[dtype] * abs(expected)
                tally.rows[dtype] += 1
                if difference <= allowed:
                    tally.worst[dtype] = max(tally.worst[dtype], difference / abs(expected) if expected else 0.0)
                elif difference <= slack or (math.isnan(slack) and largest > 1e100):
                    tally.amplified += 1
                else:
                    bad.append(f"{where}, off by {difference / abs(expected):.1e} where rounding moves it {slack:.1e}")
            elif not _explained(status, name, expected, slack, largest, float(rows["floor"].iloc[0])):
                bad.append(where)
    if bad:
        tally.wrong.append(f"{case.name}, {dtype}, {variant}: {len(bad)} rows, first {bad[0]}")


def _explained(status: str, name: str, expected: float, slack: float, largest: float, floor: float) -> bool:
    """Whether a value is rightly not given, or rightly called unresolved: what rounding moves is that near the tolerance."""
    if status == "unresolved":
        tolerance = 0.01 * (1.0 if name in ABSOLUTE else abs(expected))
        return tolerance <= CAUTION * slack
    if status == "below_floor":
        return name in VANISHING and (name == "mu" or expected <= floor + slack)
    if status == "overflow":  # float32 must also hold what a gated Mamba forms, a product of four values of this size
        return not largest < (1e9 if floor > 1e-10 else 1e280)
    return status == "nan" and not math.isfinite(expected)


def _values(outputs: Outputs) -> np.ndarray:
    """(K + 1, B, 6): every measure of every matrix; NaN where one is not finite."""
    with np.errstate(all="ignore"):
        return np.array([[_measures(Y) for Y in X] for X in outputs])


def _measures(Y: np.ndarray) -> list[float]:
    if not np.isfinite(Y).all() or not Y.any():
        return [math.nan] * 6
    return list(plain_models.plain_measures(Y).values())
