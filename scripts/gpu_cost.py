"""What the default sweep of Mamba-2 2.7B asks of a GPU, counted from the code and the shapes, beside what a card can do.

    python scripts/gpu_cost.py                  one H200, as measured in results/reference/gpu/h200.json
    python scripts/gpu_cost.py --copy 2.9       another copy rate, TB/s; --help lists the other ceilings

22 arms (11 lambdas, with and without the gate) on 32 excerpts of 128 tokens through 64 layers, no layer left out. The
engine's own code runs on tensors without numbers (gpu/counted.py): launches, and the bytes of torch's operations, are those of the
code as it is; bytes and operations of the Triton kernels are formulas of their arguments. A kernel takes the longer of its
bytes at the copy rate and its operations at the rate of the unit that makes them. **Nothing here ran on a GPU**: products are
counted at the rate that the card's library reached, which the package's own product kernel may not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MEASURED = Path(__file__).resolve().parent.parent / "results" / "reference" / "gpu" / "h200.json"
PRECISIONS = ("split", "ieee", "bfloat16")
SIZES = {
    "hidden_size": 2560, "num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2, "conv_kernel": 4,
    "num_hidden_layers": 64, "vocab_size": 50288, "chunk_size": 256, "pad_token_id": 0,
}  # of the 2.7B model  # fmt: skip
EXCERPTS, TOKENS = 32, 128
PARAMETERS = 2_702_599_680
PASSES = {
    "split": ("bfloat16", 2),
    "ieee": ("ieee", 1),
    "bfloat16": ("bfloat16", 1),
}  # the ceiling, and products of each


def measured_ceilings() -> dict[str, float]:
    """Of the H200: TB/s, and TFLOP/s at 45,056 rows, over in_proj and out_proj as the sweep has them."""
    ceilings = json.loads(MEASURED.read_text(encoding="utf-8"))["ceilings"]
    inner, conv_dim = 5120, 5376
    widths = {2560: inner // 2 + conv_dim + 80, 5120: 2560}  # k -> n, mean over the gate
    found: dict[str, float] = {"copy": ceilings["copy_TB_s"]}
    for name, there in {"bfloat16": "bf16", "tf32": "tf32", "ieee": "ieee32", "float64": "float64"}.items():
        rows = [row for row in ceilings["products"] if row["rows"] == 45056 and row["precision"] == there]
        work = {row["k"]: row["k"] * widths[row["k"]] for row in rows}
        found[name] = sum(work.values()) / sum(work[row["k"]] / row["tflops"] for row in rows)
    return found


def product_flops(rows: int, hidden: int, inner: int, conv_dim: int, heads: int, gates: tuple[bool, ...]) -> float:
    """Of in_proj and out_proj of one layer, for `rows` tokens with each of these gate settings."""
    return float(sum(2 * rows * hidden * (inner * gate + conv_dim + heads + inner) for gate in gates))


def rate(unit: str, ceilings: Mapping[str, float]) -> float:
    """Operations a second of a unit. float16 products are taken to be as fast as bfloat16's; sums alone use half of a unit that
    multiplies and adds."""
    tera = {
        "float16": ceilings["bfloat16"],
        "bfloat16": ceilings["bfloat16"],
        "float32": ceilings["ieee"],
        "tf32": ceilings["tf32"],
        "float64": ceilings["float64"],
        "float64 alone": ceilings["float64_vector"] / 2,
        "float32 alone": ceilings["ieee"] / 2,
    }
    return 1e12 * tera[unit]


def seconds(launches: int, bytes: float, work: Mapping[str, float], ceilings: Mapping[str, float]) -> float:
    """Of kernels that are as fast as their memory and their units: those one after the other, memory meanwhile."""
    computing = sum(n / rate(unit, ceilings) for unit, n in work.items())
    return max(bytes / (1e12 * ceilings["copy"]), computing, launches * ceilings["least"] * 1e-6)


def count(precision: str, ceilings: Mapping[str, float], layers: int = 64) -> dict[str, Any]:
    """The table of one precision."""
    from gpu.counted import counted
    from transformers import Mamba2Config

    from lscollapse import Variant
    from lscollapse.core.config import DEFAULT_LAMBDAS

    arms = [Variant(lam, gating) for gating in (False, True) for lam in DEFAULT_LAMBDAS]
    ids = np.zeros((EXCERPTS, TOKENS), dtype=np.int64)
    start = time.process_time()
    counts, rows = counted(Mamba2Config(**SIZES | {"num_hidden_layers": layers}), arms, ids, precision)
    spent = time.process_time() - start
    inner = SIZES["num_heads"] * SIZES["head_dim"]
    conv_dim, tokens = inner + 2 * SIZES["state_size"], len(DEFAULT_LAMBDAS) * EXCERPTS * TOKENS
    flops = layers * product_flops(tokens, SIZES["hidden_size"], inner, conv_dim, SIZES["num_heads"], (False, True))
    ceiling, passes = PASSES[precision]
    parts = {
        name: {
            "launches": cost.launches,
            "GB": cost.bytes / 1e9,
            "TFLOP": {unit: n / 1e12 for unit, n in cost.work.items()},
            "seconds": seconds(cost.launches, cost.bytes, cost.work, ceilings),
        }
        for name, cost in counts.costs.items()
    }
    launches = sum(part["launches"] for part in parts.values()) + counts.copies
    return {
        "products_TFLOP": flops / 1e12,
        "floor_s": passes * flops / (1e12 * ceilings[ceiling]),
        "parts": parts,
        "counted_s": sum(part["seconds"] for part in parts.values()),
        "launches": launches,
        "launches_a_layer_and_batch": launches / layers / 2,
        "copies_to_the_card": counts.copies,
        "reads_by_the_host": counts.reads,
        "rows": rows,
        "host_s": {"launching": launches * ceilings["launch"] * 1e-6, "table": counts.host_seconds, "whole pass here": spent},
        "weights_GB": 2 * PARAMETERS / 1e9,
    }  # fmt: skip


def show(precision: str, found: dict[str, Any]) -> None:
    floor, counted = found["floor_s"], found["counted_s"]
    print(f"\n{precision}: products {found['products_TFLOP']:.1f} TFLOP, floor {floor:.2f} s")
    print(f"  {'':22} {'launches':>8} {'GB':>8} {'seconds':>8} {'/ floor':>8}")
    parts = sorted(found["parts"].items(), key=lambda item: -item[1]["seconds"])
    shown = [(name, part) for name, part in parts if part["seconds"] >= 0.001 * counted]
    for name, part in shown:
        print(
            f"  {name:22} {part['launches']:8,} {part['GB']:8.1f} {part['seconds']:8.3f} {part['seconds'] / floor:8.3f}"
        )
    others = [part for name, part in parts if part["seconds"] < 0.001 * counted]
    launches, rest = sum(part["launches"] for part in others), sum(part["seconds"] for part in others)
    print(f"  {f'{len(others)} others':22} {launches:8,} {'':8} {rest:8.3f} {rest / floor:8.3f}")
    print(f"  counted {counted:.2f} s = {counted / floor:.2f} x the floor")
    host = found["host_s"]
    print(
        f"  {found['launches']:,} launches and copies, {found['launches_a_layer_and_batch']:.1f} a layer and batch;"
        f" {found['copies_to_the_card']} copies to the card, {found['reads_by_the_host']} reads by the host, no other"
    )
    print(
        f"  beside it, on the host: launching {host['launching']:.2f} s, {found['rows']:,} rows of the table"
        f" {host['table']:.2f} s (here); before it: {found['weights_GB']:.2f} GB of weights"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    defaults = measured_ceilings() | {"float64_vector": 34.0, "launch": 15.0, "least": 2.0}
    words = {
        "copy": "TB/s, read and written",
        "float64_vector": "TFLOP/s outside tensor cores, of the data sheet",
        "launch": "microseconds of the host for one launch, assumed",
        "least": "microseconds of the card for the smallest kernel, assumed",
    }
    for name, value in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, help=words.get(name, "TFLOP/s of products")
        )
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    given = vars(parser.parse_args())
    file = given.pop("json")

    from gpu.counted import stand_in

    stand_in()
    found = {precision: count(precision, given) for precision in PRECISIONS}
    for precision, table in found.items():
        show(precision, table)
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
