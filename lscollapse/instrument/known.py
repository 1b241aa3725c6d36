"""What is known of the rows of a stream: their numbers in the last layer that was read, and what certifying left to multiply."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lscollapse.core.table import LOST

HOW = np.array(["ok", *LOST], dtype=object)
STATE = ("down", "lost", "log2_bound", "next_log2_bound")  # the columns after the measures


@dataclass
class Known:
    """The rows (arm, excerpt) of a stream as they were in the last layer that was read, (R,) each.

    Attributes:
        values: the measures of X, (R, measures).
        exponent: the stream is X * 2^exponent; of a certified row, times `sign` * 2^`skipped` besides.
        status: `ok` or how the row left the range.
        bound: of certified rows, how far the values can be off: what the weights prove, and rounding; NaN of others.
        next_bound: the same from the next layer on.
        skipped, sign: log2 and sign of the product of the lambdas since a row was certified.
    """

    values: np.ndarray
    exponent: np.ndarray
    status: np.ndarray
    bound: np.ndarray
    next_bound: np.ndarray
    skipped: np.ndarray
    sign: np.ndarray

    @classmethod
    def of(cls, n: int, n_measures: int) -> Known:
        """Of n rows, before the embedding is read."""
        unknown = np.full((3, n), np.nan)
        values = np.full((n, n_measures), np.nan)
        exponent = np.zeros(n, dtype=np.int64)
        return cls(values, exponent, np.full(n, "ok", dtype=object), unknown[0], unknown[1], np.zeros(n), np.ones(n))

    @property
    def settled(self) -> np.ndarray:
        """Which rows are certified, so that their X stands still."""
        settled: np.ndarray = ~np.isnan(self.bound)
        return settled

    @property
    def running(self) -> np.ndarray:
        """Which rows the next layer has to be computed for: finite and not certified."""
        running: np.ndarray = (self.status == "ok") & np.isnan(self.next_bound)
        return running

    @property
    def power(self) -> np.ndarray:
        """log2 of the size of the stream over that of X."""
        power: np.ndarray = self.exponent + self.skipped
        return power

    def status_of(self, own: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """The status of some rows' numbers, given what is wrong with each ("" where nothing is): a row that is lost says how."""
        status = np.where(self.settled[rows], "certified", "ok")
        return np.where(self.status[rows] != "ok", self.status[rows], np.where(own == "", status, own))

    def learn(self, rows: np.ndarray, found: np.ndarray, lams: np.ndarray | None, floor: float) -> None:
        """Take the columns `found` of some rows in the layer after the last; of the others X stands still.

        floor: of what the rows are computed in.
        lams: (R,), lambda of the block before; None for the embedding.
        """
        self.bound = self.next_bound.copy()
        self.values[rows] = found[:, : -len(STATE)]
        down, lost, bound, next_bound = found[:, -len(STATE) :].T
        self.exponent[rows] = -down
        # What is left to compute may be less than rounding, which is there all the same.
        self.bound[rows], self.next_bound[rows] = (np.maximum(np.exp2(log2), floor) for log2 in (bound, next_bound))
        self.status[rows] = np.where(self.status[rows] == "ok", HOW[lost.astype(int)], self.status[rows])
        if lams is not None and self.settled.any():
            settled = self.settled
            self.skipped[settled] += np.log2(np.abs(lams[settled]))
            self.sign[settled] *= np.sign(lams[settled])
