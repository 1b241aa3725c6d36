"""What pyproject.toml allows of each dependency, and what of it the tests run with."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WANTED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in wanted] for name, wanted in PROJECT["optional-dependencies"].items()}
TORCH = "torch"  # pinned beside the others, without hashes


def pins() -> dict[str, tuple[Version, list[str]]]:
    """Of each package in constraints.txt its version and the sha256 of its files."""
    text = re.sub(r"\\\n", " ", (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        requirement, *hashes = line.split("--hash=sha256:")
        wanted = Requirement(requirement.strip())
        (pin,) = wanted.specifier
        assert pin.operator == "==" and wanted.name not in found
        found[wanted.name] = Version(pin.version), [digest.strip() for digest in hashes]
    return found


def test_every_package_is_pinned_with_its_digests() -> None:
    for name, (_, digests) in pins().items():
        assert name == canonicalize_name(name) and digests, name
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests), name


def test_the_pins_are_allowed() -> None:
    torch = Requirement((ROOT / "configs" / "torch.txt").read_text(encoding="utf-8").splitlines()[-1])
    (pin,) = torch.specifier
    pinned = {name: version for name, (version, _) in pins().items()} | {torch.name: Version(pin.version)}
    for wanted in [*WANTED, *EXTRAS["cluster"], *EXTRAS["train"], *EXTRAS["dev"]]:
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted
    assert TORCH not in pins()


def test_every_dependency_has_a_lower_bound() -> None:
    for wanted in [*WANTED, *(wanted for extra in EXTRAS.values() for wanted in extra)]:
        assert {bound.operator for bound in wanted.specifier} & {">=", "=="}, wanted
