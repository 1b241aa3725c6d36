"""The measures of rows that lie near one another, from what they differ by: to the last digit, and without a Gram matrix.

Rows y_i = c + r_i, with c the mean row. Along c and across it, y_i = (1 + s_i) c + t_i with s_i = r_i.c / c.c, so that of the rows,
each times a factor f_i (1, or one over its length), the Gram matrix is that of one direction and a little beside it:

    G = a a^T + T,    a_i = f_i (1 + s_i) ||c||,    T_ij = f_i f_j t_i.t_j
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

# What is across c is so little of Y that a handful of steps find its leading singular vector.
LITTLE = 2.0**-4
# It is told from what is along c where it is so much of the differences: of its squares some 2^-45 are sure then.
SURE = 2.0**-7
PROVED = 2.0**-56  # of what the leading vector leaves


class NearCollapse:
    """Sums over the rows c + r_i of one excerpt.

    Attributes:
        holds: whether all rows are within half of ||c|| of c, and what is across c is little and sure; else there are no sums.
    """

    def __init__(self, R: np.ndarray, distances: np.ndarray, centre: np.ndarray) -> None:
        """R (N, d), the rows r_i; their norms (N,); c (d,)."""
        self.R, self.centre = R, centre
        square = centre @ centre
        self.holds = bool(square > 0 and distances.max() <= 0.5 * np.sqrt(square))
        if self.holds:
            self.beside = R @ centre / square  # s_i, (N,)
            self.across = np.maximum(distances**2 - self.beside**2 * square, 0.0)  # ||t_i||^2, (N,)
            self.along = (1.0 + self.beside) * np.sqrt(square)  # (N,)
            across = self.across.sum()
            self.holds = bool(SURE * dot(distances, distances) <= across <= LITTLE * dot(self.along, self.along))

    @cached_property
    def spread(self) -> float:
        """Of the N rows scaled to length 1 the sum of the squared distances from their mean."""
        f = 1.0 / np.sqrt(self.along**2 + self.across)  # one over the lengths of the rows
        across = self.across * f**2  # (N,)
        mean = self._weighted(f)  # N times the mean of what is across c, (d,)
        short = across / (1.0 + self.along * f)  # 1 - cos of the angle to c, whose square is 1 - across
        return float(across.sum() - mean @ mean / len(f) + np.square(short - short.mean()).sum())

    def rank1_residual(self, f: np.ndarray) -> float:
        """Of the rows times the factors f (N,): the root of (tr G - its leading eigenvalue) / tr G.

        In the direction of a and those across it, G is [[A, b^T], [b, S]]. Its leading eigenvector is (1, z), with
        z = (b + S z) / (A + b.z), which converges as tr S / A, and its eigenvalue is A + b.z; what is left is tr S - b.z.
        """
        a, across = self.along * f, dot(self.across, f**2)
        whole = dot(a, a)
        e = a / np.sqrt(whole)
        Te = self._times(f, e)
        inside = dot(e, Te)
        A, left, b = whole + inside, max(across - inside, 0.0), Te - inside * e
        z = b / A
        rate = 2.0 * left / A  # little more than 2^-3 at most
        error = rate * dot(b, z)
        while error > PROVED * left:
            Tz = self._times(f, z)
            z = (b + Tz - dot(e, Tz) * e) / (A + dot(b, z))
            error *= rate
        return float(np.sqrt(max(left - dot(b, z), 0.0) / (whole + across)))

    def _times(self, f: np.ndarray, x: np.ndarray) -> np.ndarray:  # T x, (N,) -> (N,)
        return np.asarray(f * (self.R @ self._weighted(f * x)))

    def _weighted(self, x: np.ndarray) -> np.ndarray:  # the sum of x_i t_i, (N,) -> (d,)
        return np.asarray(x @ self.R - dot(x, self.beside) * self.centre)


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """a.b of some rows' numbers. numpy's product would let other threads have the interpreter, which takes longer than the sum."""
    return float(np.add.reduce(a * b))
