"""What one layer would do to relative mu under every lambda, from one forward pass that kept X and O."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, centred, pair, require_unit_rows


class Response(NamedTuple):
    """Six scalars of (X, O): ||PX||^2, <PX, PO>, ||PO||^2 and the same without P (centring), names ending in `_all`.

    Exact for lam X + O without a LayerNorm after the skip.
    """

    A: float
    B: float
    C: float
    A_all: float
    B_all: float
    C_all: float

    def relative_mu_squared(self, lam: ArrayLike) -> Array:
        """Squared relative mu of lam X + O, elementwise in lam; NaN where lam X + O = 0."""
        lam = np.asarray(lam, dtype=np.float64)
        above = lam**2 * self.A + 2 * lam * self.B + self.C
        below = lam**2 * self.A_all + 2 * lam * self.B_all + self.C_all
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(below > 0.0, above / below, np.nan)

    def _line(self) -> tuple[float, float]:
        """(slope, offset): the layer raises relative mu iff slope lam + offset > 0."""
        return 2 * (self.B * self.A_all - self.A * self.B_all), self.C * self.A_all - self.A * self.C_all

    def crossing(self) -> float:
        """The one lambda at which the layer leaves relative mu unchanged; NaN when no lambda does, or all do."""
        slope, offset = self._line()
        return -offset / slope if slope else float("nan")

    def raises(self, lam: float) -> bool:
        """True when the layer with this lambda increases relative mu."""
        slope, offset = self._line()
        return slope * lam + offset > 0.0


def response(X: ArrayLike, O: ArrayLike) -> Response:
    """The six scalars of a layer's input and mixer output, both (N, d)."""
    X, out = pair(X, O)
    PX, PO = centred(X), centred(out)
    pairs = ((PX, PX), (PX, PO), (PO, PO), (X, X), (X, out), (out, out))
    return Response(*(float(np.vdot(a, b)) for a, b in pairs))


def drive(X: ArrayLike, O: ArrayLike) -> float:
    """Collapse drive h of a post-norm layer with unit-row X: relative mu^2 changes by -2 h / lam + O(1 / lam^2).

    h = mean_i [xbar . O_i - (xbar . x_i)(x_i . O_i)]. h > 0: a positive lambda collapses, a negative one separates.
    """
    X, out = pair(require_unit_rows(X, "X"), O)
    mean = X.mean(0)
    return float(np.mean(out @ mean - (X @ mean) * np.einsum("id,id->i", X, out)))
