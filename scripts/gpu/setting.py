"""What the steps of gpu_check.py share: the device, sizes, a checkpoint, arms and excerpts, seconds, and rows compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# hidden, heads, head_dim, state, layers, vocabulary
FULL = {"hidden": 2560, "heads": 80, "head_dim": 64, "state": 128, "layers": 64, "vocabulary": 50288}
TINY = {"hidden": 32, "heads": 2, "head_dim": 32, "state": 16, "layers": 2, "vocabulary": 64}


class NotRun(Exception):
    """A step that cannot be made here, and why."""


@dataclass(frozen=True)
class Setting:
    """Where and how a step runs: `dry` on the CPU in small, `out` for results, `scratch` for what is thrown away."""

    dry: bool
    out: Path
    scratch: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def sizes(self) -> dict[str, int]:
        return TINY if self.dry else FULL

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoint"

    def ids(self, excerpts: int = 32) -> np.ndarray:
        """Random token ids, (excerpts, 128); of a dry run (4, 16)."""
        shape, top = ((4, 16), 60) if self.dry else ((excerpts, 128), 30000)
        return np.random.default_rng(0).integers(0, top, shape)

    def arms(self) -> list[Any]:
        from lscollapse import Variant
        from lscollapse.core.config import DEFAULT_LAMBDAS

        if self.dry:
            return [Variant(1.0), Variant(-2.0, gating=False), Variant(0.5, gating=False)]
        return [Variant(lam, gating) for gating in (False, True) for lam in DEFAULT_LAMBDAS]

    def config(self, **changes: Any) -> Any:
        """The configuration of a run of the checkpoint on excerpts of `ids`."""
        from lscollapse.core.config import Experiment

        frozen = self.scratch / "excerpts.jsonl"
        ids = self.ids()
        head = {"title": "random", "text_sha256": "0" * 64, "tokenizer": "random ids", "source": "random ids"}
        frozen.write_text("".join(json.dumps(head | {"ids": row.tolist()}) + "\n" for row in ids), encoding="utf-8")
        settings = {
            "models": [str(self.checkpoint)], "device": self.device, "stream": "never", "offline": True, "seed": 0,
            "cache_dir": self.scratch / "cache", "source": str(frozen), "excerpts": len(ids), "tokens": ids.shape[1],
        } | ({"lambdas": [-2.0, 0.5, 1.0]} if self.dry else {})  # fmt: skip
        return Experiment(**settings | changes)

    def adapter(self, **changes: Any) -> tuple[Any, Any]:
        """The checkpoint as a run loads it, and what is known of it."""
        from lscollapse.core.progress import SILENT
        from lscollapse.runs.loading import load_adapter

        if not self.checkpoint.is_dir():
            raise NotRun("there is no checkpoint: the step before it failed")
        config = self.config(**changes)
        return load_adapter(config.models[0], "trained", config, SILENT)

    def wait(self) -> None:
        import torch

        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
        """The median seconds of a call, the device's work included, and the last result."""
        spent, result = [], None
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            result = run()
            self.wait()
            spent.append(time.perf_counter() - start)
        return sorted(spent)[len(spent) // 2], result

    def ceilings(self) -> dict[str, float]:
        """What the step `ceilings` measured."""
        file = self.out / "ceilings.json"
        if not file.is_file():
            raise NotRun("there are no ceilings: the step before it failed")
        return dict(json.loads(file.read_text(encoding="utf-8"))["numbers"])


@contextmanager
def first_layers(adapter: Any, n: int) -> Iterator[None]:
    """The model cut to its first n layers."""
    layers = adapter.held_as.layers
    adapter.held_as.layers = layers[:n]
    try:
        yield
    finally:
        adapter.held_as.layers = layers


def compared(found: Any, expected: Any) -> dict[str, float]:
    """Two tables of the same rows: the largest difference of each measure (of mu, relative), and how many statuses differ."""
    keys = ["variant", "layer", "measure", "excerpt"]
    found, expected = (rows.sort_values(keys).reset_index(drop=True) for rows in (found, expected))
    if len(found) != len(expected) or not (found[keys] == expected[keys]).all(axis=None):
        raise AssertionError(f"{len(found)} rows of one table and {len(expected)} of the other are not the same rows")
    off = (found["value"] - expected["value"]).abs()
    off = off.where(found["measure"] != "mu", off / expected["value"].abs())
    off = off.where((found["status"] == "ok") & (expected["status"] == "ok"), 0.0)
    largest = {f"off {name}": float(part.max()) for name, part in off.groupby(found["measure"].astype(str))}
    same = (found["value"] == expected["value"]) | (found["value"].isna() & expected["value"].isna())
    statuses = found["status"].astype(str) != expected["status"].astype(str)
    return largest | {"rows": len(found), "not equal": int((~same).sum()), "statuses differ": int(statuses.sum())}


def said(difference: dict[str, float]) -> str:
    """A comparison in words."""
    if not difference["not equal"] and not difference["statuses differ"]:
        return f"all {difference['rows']:,} rows equal"
    return (
        f"relative mu off by {difference['off relative_mu']:.1e} at most, {difference['not equal']:,} of"
        f" {difference['rows']:,} values not equal, {difference['statuses differ']} statuses differ"
    )
