"""Malformed documents of every format, 10,000 of each: `make fuzz`.

    python -m tests.fuzz --examples 10000 --state runs/fuzz --only config

It is seeded, and goes on from where it was stopped: what was tried of a format, and what was wrong, is kept in the state
folder, a file a format.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.formats import FORMATS
from tests.fuzz.search import Tally, search

BATCH = 250


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="of each format")
    parser.add_argument("--state", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    names, wrong, start, new = [name for name in FORMATS if args.only in name], 0, time.monotonic(), 0
    for number, name in enumerate(names):
        file = args.state / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"
        tally, tried = _read(file)
        while tried < args.examples:
            search(name, BATCH, tally, seed=tried // BATCH + 1)
            tried, new = tried + BATCH, new + BATCH
            file.write_text(json.dumps({"tried": tried, "codes": tally.codes, "wrong": tally.wrong, "faults": tally.faults}, indent=1))
            left = (args.examples - tried + args.examples * (len(names) - number - 1)) * (time.monotonic() - start) / new
            print(f"\r{name}: {tried:,} of {args.examples:,}, about {left / 60:.0f} min left   ", end="", flush=True)
        wrong += tally.wrong
        print(f"\r{name}: {tried:,} tried, {tally}" + " " * 20)
        for fault, data in tally.faults:
            print(f"    {fault}\n        {data[:300]}")
    return int(wrong > 0)


def _read(file: Path) -> tuple[Tally, int]:
    if not file.is_file():
        return Tally(), 0
    held = json.loads(file.read_text())
    faults = [(fault, data) for fault, data in held["faults"]]
    return Tally(Counter({int(code): n for code, n in held["codes"].items()}), faults, held["wrong"]), held["tried"]


if __name__ == "__main__":
    raise SystemExit(main())
