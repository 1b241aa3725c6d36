"""100 random nets of the architectures with adapters of their own, and the classes under the generic one, 4 random arms each.

Every row with status ok is within 1e-5 (float32) or 1e-11 (float64) of the plain float64 reference, relative to it, or
within what rounding to that dtype does: 8 times the largest move of three references whose intermediate results are each
off by up to one spacing of the dtype (plain_models.shaken). A difference that this allows and 1e-5 does not is counted.
"""

from __future__ import annotations

import pytest

from tests.equivalence import fuzz, fuzz_classes, fuzz_nets

CONFIGURATIONS = 100


def _report(tally: fuzz.Tally, capsys: pytest.CaptureFixture[str], what: str) -> None:
    with capsys.disabled():
        print(f"\n{what}: {tally}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert min(tally.rows.values()) > 5_000
    assert tally.amplified < 0.02 * sum(tally.rows.values())


def test_native_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    tally = fuzz.Tally()
    for number in range(CONFIGURATIONS):
        fuzz.check(fuzz_nets.native(number), [3, number], tally)
    _report(tally, capsys, "native adapters")
    assert tally.configs == CONFIGURATIONS and not tally.refused


def test_classes_under_the_generic_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    tally = fuzz.Tally()
    for number, name in enumerate(fuzz_classes.GENERIC):
        fuzz.check(fuzz_classes.generic(name), [4, number], tally)
    _report(tally, capsys, "generic adapter")
    assert {name for name, _ in tally.refused} <= {f"generic({name!r})" for name in fuzz_classes.MAY_BE_REFUSED}
    assert tally.configs - len(tally.refused) >= 30
