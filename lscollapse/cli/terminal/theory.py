"""What the theory verbs show on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from lscollapse.cli.terminal.printing import plain_console, plain_table
from lscollapse.core.table import MASSIVE, times_words
from lscollapse.theory.checking import Verdict
from lscollapse.theory.stretches import Found, Report, in_words

NAMES = {"relative_mu": "relative mu", "rank1_residual": "rank-1 residual"}
CONSTANTS = {
    "gain": "largest row gain g_k",
    "tau": "largest tau = ||O||_F / ||X||_F",
    "C_M": "C_M",
    "spectral": "||M||_2, bounded by the FFT",
}  # of a layer
SIGNS = {1: "lambda > 0", -1: "lambda < 0", 0: "either sign"}


def verdicts_table(verdicts: Sequence[Verdict]) -> None:
    """Print one line a statement: as printed, corrected, instances with a margin, the worst margin."""
    headings = ("statement", "as printed", "corrected", "instances", "worst margin")
    table = plain_table("the paper's statements", *headings, right=("instances", "worst margin"))
    for v in verdicts:
        table.add_row(v.statement, v.printed, v.corrected, f"{v.informative}/{v.instances}", f"{v.worst_margin:.1e}")
    Console().print(table)


def found_table(found: Found) -> None:
    """Print per sign and measure the smallest |lambda|, what was checked, and the rank-1 warning."""
    console = plain_console()
    console.print(
        f"{found.model}, {found.arm}: last of {found.n_layers} layers, target {found.target:g}, mean over"
        f" {found.n_excerpts} excerpts of {found.n_tokens} tokens", style="italic", markup=False
    )  # fmt: skip
    for sign, estimate in found.estimates.items():
        console.print(f"  {SIGNS[sign]}  estimate {estimate.reads}  ({estimate.how})")
    if not found.points:
        return
    for sign in (1, -1):
        for measure, name in NAMES.items():
            console.print(f"  {SIGNS[sign]}  {name:<15}  {sentence(found, sign, measure)}")
    largest = max(found.points)
    console.print(
        f"  checked: {len(found.points)} values of lambda from {-largest:g} to {largest:g}; the curve is not monotone in"
        " general, and between the tested values nothing is promised"
    )  # fmt: skip
    _warn(console, found)


def _warn(console: Console, found: Found) -> None:
    for warning in filter(None, (found.rank_warning(), massive_warning(found))):
        console.print(f"  warning: {warning}", style="bold")


def massive_warning(found: Found) -> str | None:
    """What to say where one massive row of the last layer decides that relative mu is over the target, and angular mu is not."""
    doubtful = {
        lam: point
        for lam, point in found.points.items()
        if point.get("row_norm_ratio", 0.0) > MASSIVE
        and point["relative_mu"] >= found.target
        and not point["angular_mu"] >= found.target
    }
    if not doubtful:
        return None
    low, high = min(doubtful), max(doubtful)
    several = f"{len(doubtful)} of {len(found.points)} tested lambdas, from {low:.4g} to {high:.4g}"
    where, most = (several, "up to ") if low < high else (f"lambda = {low:.4g}", "")
    ratio = max(point["row_norm_ratio"] for point in doubtful.values())
    seen = [(point["angular_mu"], lam) for lam, point in doubtful.items() if not math.isnan(point["angular_mu"])]
    falls = f"falls to {min(seen)[0]:.3f} (lambda = {min(seen)[1]:.4g})" if seen else "is not known"
    row = f"at {where}, one row of the last layer has {most}{times_words(ratio)} the median norm"
    return f"{row} and decides relative mu, which is over {found.target:g}; angular mu, of directions alone, {falls}"


def sentence(found: Found, sign: int, measure: str) -> str:
    """What was found for one sign and one measure, in words."""
    lam, sizes, values = found.smallest(sign, measure), *found.curve(sign, measure)
    if lam == 0.0:
        return f"no collapse: over the target at every |lambda| tested, least {values.min():.3f} at {sizes[values.argmin()]:.3g}"
    lost = found.missing(sign, measure)
    gone = (
        f"the last layer is missing or unresolved at |lambda| {', '.join(f'{size:.3g}' for size in lost)}"
        if lost
        else ""
    )
    if math.isnan(lam):
        kept = ", ".join(in_words(*stretch) for stretch in found.kept(sign, measure))
        return f"not known: {gone}, where values leave floating point or rounding decides them{f'; over the target for |lambda| {kept}' if kept else ''}"
    closed = [stretch for stretch in found.intervals(sign, measure) if math.isfinite(stretch.high)]
    some, aside = ", ".join(in_words(*stretch) for stretch in closed), f"; {gone}" if gone else ""
    if math.isfinite(lam):
        also = f"; over it also for |lambda| {some}" if some else ""
        return f"|lambda| >= {lam:.3g} keeps it over the target{also}{aside}"
    last = f"{sizes[-1]:g} does not, where it is {values[-1]:.3f}"
    if some:
        return f"|lambda| {some} keeps it over the target; {last}{aside}"
    return f"none suffices up to {sizes[-1]:g}, where it is {values[-1]:.3f}{aside}"


def bounds_table(report: Report) -> None:
    """Print every bound beside the measured critical lambda, the largest constants, and the remarks."""
    found = report.found
    title = f"{found.model}, {found.arm}: |lambda| for relative mu >= {found.target:g} after {found.n_layers} layers"
    table = plain_table(title, "bound", "for", "|lambda|", "", right=("|lambda|",))
    for line in report.lines:
        table.add_row(line.bound, SIGNS[line.sign], line.reads, line.note)
    console = plain_console()
    console.print(table)
    for name, words in CONSTANTS.items():
        values = [(row[name], row["layer"]) for row in report.layers if name in row]
        if not values:
            continue
        (low, at_low), (high, at_high) = min(values), max(values)
        console.print(f"  {words}, lambda = 1: {high:.3g} (layer {at_high}), least {low:.3g} (layer {at_low})")
    for remark in report.remarks:
        console.print(f"  {remark}")
    _warn(console, found)
