"""Speed of the Mamba-2 block and scan on this machine, at the shapes of Mamba-2 2.7B, with random weights.

    OMP_NUM_THREADS=2 python scripts/bench.py                 every section, some minutes on two cores
    OMP_NUM_THREADS=2 python scripts/bench.py --sections scan

    block   one block (and a stack of them), 32 excerpts of 128 tokens: transformers, ours in fp32 and with bf16
            weights, gate on and off, and the two matrix products of the block alone, timed in turn with it
    scan    the scan of one excerpt against its length, and the slope of log time in log length
    measures
            the default measures of a layer's output, one excerpt at a time, over each formula by passes over the whole batch, and
            beside one bf16 block of 2.7B
    sweep   eleven lambdas, gate off, at the shape of Mamba-2 130m: ours with and without the certified exit, and a plain
            loop of transformers forwards with hooks and output_hidden_states, reduced to relative mu
    probe   the same lambdas on 32 excerpts with and without the rounding error of every number
    any-model
            six lambdas on GPT-2, BERT and a Llama of 135M, cut to --layers blocks, over the models' own forwards, with and without
            the twins that rounding is estimated by; a hook loop and nnsight (where `make bench` could install it), relative mu alone
    mixers  tokens a second of each mixer of Table 1, forward and backward, beside transformers' Mamba and Mamba-2
    start   whole commands with little to compute, `measure` of a tiny Mamba-2 and a tiny GPT-2 and a sweep of the former,
            beside the import of torch and transformers
    stream  (opt-in, --stream-2.7b) random weights of the whole 2.7B in bfloat16, 5.4 GB in a temporary folder, and the
            default sweep's gate-off arms with --stream always, as the command line runs them: peak memory, time and its split

Each side runs in a process of its own. `default` and `tuned` say which malloc it had: glibc's own settings, or large
blocks kept by the process (lscollapse's command line sets this for itself). Times are seconds, the best of the repeats;
the medians are beside them. Numbers of a busy machine are worth little: `load` is the load average at the start.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benches import any_model, block, measures, mixers, scan, start, stream, sweep
from benches.common import machine

SIDES = {
    "native": block.side_native,
    "transformers": block.side_transformers,
    "scan": scan.side_scan,
    "measures": measures.side_measures,
    "sweep": sweep.side_sweep,
    "hook loop": sweep.side_hook_loop,
    "probe": sweep.side_probe,
    "any model": any_model.side_any_model,
    "any model, nnsight": any_model.side_any_nnsight,
    "mixers": mixers.side_mixers,
    "streamed": stream.side_streamed,
}
SECTIONS = {
    "block": block.section_block,
    "scan": scan.section_scan,
    "measures": measures.section_measures,
    "sweep": sweep.section_sweep,
    "probe": sweep.section_probe,
    "any-model": any_model.section_any_model,
    "mixers": mixers.section_mixers,
    "start": start.section_start,
}


def show(tree: dict[str, Any], indent: int = 0) -> None:
    for name, value in tree.items():
        if not isinstance(value, dict):
            print(
                f"{' ' * indent}{name}: {value:.4g}" if isinstance(value, float) else f"{' ' * indent}{name}: {value}"
            )
        elif "best" in value:
            print(f"{' ' * indent}{name}: {value['best']:.4f} s (median {value['median']:.4f})")
        else:
            print(f"{' ' * indent}{name}")
            show(value, indent + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--excerpts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="per excerpt")
    parser.add_argument("--layers", type=int, default=8, help="blocks in the stack")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep-excerpts", type=int, default=4)
    parser.add_argument("--any-excerpts", type=int, default=8)
    parser.add_argument("--stream-2.7b", dest="stream", action="store_true", help="only the streamed 2.7B")
    parser.add_argument("--stream-excerpts", type=int, default=32)
    parser.add_argument("--stream-dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--stream-exits", nargs="+", choices=("on", "off"), default=["on"], help="the certified exit")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in ["stream"] if args.stream else args.sections:
        section = stream.section_stream if name == "stream" else SECTIONS[name]
        report[name] = {"machine": machine()} | section(args)
        print(f"\n== {name}")
        show(report[name])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
