"""How far the measures of a layer's output can move where its rows do: what a certified row may be off by, and rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def bounds(values: Mapping[str, np.ndarray], change: np.ndarray, n: int, d: int) -> dict[str, np.ndarray]:
    """The most by which each measure of Y (n, d) can differ from that of Y + E, given ||E_i|| <= b ||Y_i|| for every row i;
    infinite where that is not known.

    Args:
        values: the measures of Y, one array over excerpts each; relative_mu and rank1_residual are among them.
        change: b of every excerpt, below 1; NaN gives NaN.

    With alpha = arcsin b the largest angle that a row, and so Y as a whole, and the rows scaled to length 1 as a whole, turns by:
        relative_mu, rank1_residual, angular_mu, angular_rank1_residual: b. They are sines of the angle to a set of lines through 0.
        mu: of its log10, -log10(1 - b / relative_mu), since ||R|| moves by at most b ||Y||.
        stable_rank: s = 1 / (1 - r^2) of the rank-1 residual r, so ds = 2 r s^2 dr, which grows with s^2: the difference of s at
            r + b and at r; or, where s cannot grow over min(n, d), of s at r and at r - b.
        mean_cosine: 2 b. An angle between two rows moves by at most 2 alpha, its cosine by 2 sin(alpha).
        dong_residual: ||E||_inf <= b sqrt(d) ||Y||_inf and ||E||_1 <= b d ||Y||_1 (norms of rows and columns as entries' sums);
            R moves by at most twice that, and D^2 is a product of two quotients that are at most 2 each.
        row_norm_ratio: every norm moves by the factor 1 - b to 1 + b, so that a quotient of two grows by (1 + b) / (1 - b).
        longest_row: n - 1, since another row may be as long.
        effective_rank: U / sqrt(n) of the rows scaled to length 1 is a pure state whose Gram matrix is its reduced one: turned by
            alpha, that moves by a trace distance of b, and its entropy by b log(k - 1) - b log b - (1 - b) log(1 - b) with
            k = min(n, d) (Fannes, Audenaert 2007).
    """
    given: dict[str, np.ndarray] = {name: np.inf + change for name in values}
    b, r = change, values["rank1_residual"]
    given |= dict.fromkeys(("relative_mu", "rank1_residual", "angular_mu", "angular_rank1_residual"), b)
    given |= {"mu": log10_mu_change(values["relative_mu"], b), "mean_cosine": 2 * b}
    given["longest_row"] = np.where(b > 0, n - 1.0, b)
    if "stable_rank" in values:
        given["stable_rank"] = stable_rank_change(r, values["stable_rank"], b, min(n, d))
    if "dong_residual" in values:
        given["dong_residual"] = _dong_change(values["dong_residual"], b, d)
    if "row_norm_ratio" in values:
        with np.errstate(invalid="ignore"):  # an infinite ratio, b = 0
            given["row_norm_ratio"] = values["row_norm_ratio"] * (2 * b / (1 - b))
    if "effective_rank" in values:
        given["effective_rank"] = _effective_rank_change(values["effective_rank"], b, min(n, d))
    return {name: given[name] for name in values}


def log10_mu_change(relative_mu: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The most by which log10 of mu differs from that of a relative mu within b, the norm being the same; infinite from there on."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change: np.ndarray = np.where(b < relative_mu, -np.log1p(-b / relative_mu) / math.log(10), np.inf + b)
    return change


def stable_rank_change(r: np.ndarray, s: np.ndarray, b: np.ndarray, most: int) -> np.ndarray:
    """The most by which the stable rank s = 1 / (1 - r^2), at most `most`, differs from that of a rank-1 residual within b of r."""
    below = np.minimum(r, b)
    with np.errstate(divide="ignore", invalid="ignore"):  # quotients, so that no difference is rounded to zero
        larger = s * (2 * r * b + b**2) / (1 - np.minimum(r + b, 1) ** 2)
        smaller = s * (2 * r * below - below**2) / (1 - (r - below) ** 2)
    change: np.ndarray = np.maximum(np.minimum(larger, most - s), smaller)
    return change


def _dong_change(D: np.ndarray, b: np.ndarray, d: int) -> np.ndarray:
    columns, rows = b * d, b * math.sqrt(d)
    spread = 4 * columns + 4 * rows + 4 * columns * rows  # of D^2, before the change of ||Y||_1 ||Y||_inf
    least, shrunk, grown = np.minimum(spread, D**2), (1 - columns) * (1 - rows), (1 + columns) * (1 + rows)
    # Differences are written as quotients of what they are made of, so that none of them is rounded to zero.
    with np.errstate(divide="ignore", invalid="ignore"):
        over = (spread + D**2 * (columns + rows - columns * rows)) / (shrunk * (np.sqrt((D**2 + spread) / shrunk) + D))
        under = (least + D**2 * (columns + rows + columns * rows)) / (grown * (np.sqrt((D**2 - least) / grown) + D))
        most = np.where(columns < 1, np.minimum(np.fmax(over, under), 2.0), 2.0)
    change: np.ndarray = np.where(b > 0, most, b)
    return change


def _effective_rank_change(rank: np.ndarray, b: np.ndarray, most: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(b > 0, b * math.log(max(most - 1, 1)) - b * np.log(b) - (1 - b) * np.log1p(-b), b)
    # The bound of the entropy grows up to b = 1 - 1 / k only.
    known = np.where(b <= 1 - 1 / most, entropy, np.where(np.isnan(b), b, math.log(most)))
    change: np.ndarray = np.minimum(rank * np.expm1(known), most - 1.0)
    return change
