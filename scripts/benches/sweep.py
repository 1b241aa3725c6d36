"""Eleven lambdas, gate off, at the shape of Mamba-2 130m: ours, and a plain loop of transformers forwards."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benches.common import LAMBDAS, in_process

PROBED_RUN, TILE = 32, 8  # excerpts
SWEEP = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "vocab_size": 1024}  # Mamba-2 130m, few words


def sweep_model() -> Any:
    """Mamba-2 of the shape of the 130m, fresh from transformers' initialisation."""
    import torch
    from transformers import Mamba2Config, Mamba2Model

    torch.manual_seed(0)
    config = Mamba2Config(**SWEEP, head_dim=64, state_size=128, n_groups=1, pad_token_id=0)
    return Mamba2Model(config).eval()


def sweep_ids(args: argparse.Namespace) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(SWEEP["vocab_size"], (args.sweep_excerpts, args.tokens), generator=generator)


def side_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """All lambdas in one pass: every block computed, and up to where the weights decide the rest."""
    import torch

    from lscollapse.instrument import early_exit
    from lscollapse.instrument.forward import measure_pass
    from lscollapse.instrument.surgery import Variant
    from lscollapse.models.adapt import adapt

    adapter, ids = adapt(sweep_model()), sweep_ids(args)
    variants = [Variant(lam=lam, gating=False) for lam in LAMBDAS]
    start = time.perf_counter()
    gains = early_exit.gains(adapter, "")
    seconds = {"gains, once a checkpoint": time.perf_counter() - start}
    measure_pass(adapter, ids[:1], variants[:1], torch.float32)  # warms
    for name, bounds in (("whole", None), ("certified exit", gains)):
        start = time.perf_counter()
        rows = measure_pass(adapter, ids, variants, torch.float32, gains=bounds)
        seconds[name] = time.perf_counter() - start
    saved = rows[rows["measure"] == "relative_mu"]["bound"].notna()
    return {"seconds": seconds, "passes saved": float(saved.sum() / len(saved))}


def side_probe(args: argparse.Namespace) -> dict[str, Any]:
    """All lambdas on PROBED_RUN excerpts, in passes over TILE of them, and by `measure`, whose first two have twins."""
    import torch

    from lscollapse.instrument.forward import measure, measure_pass
    from lscollapse.instrument.surgery import Variant
    from lscollapse.models.adapt import adapt

    adapter = adapt(sweep_model())
    args.sweep_excerpts = PROBED_RUN
    ids, variants = sweep_ids(args), [Variant(lam=lam, gating=False) for lam in LAMBDAS]
    measure_pass(adapter, ids[:1], variants[:1], torch.float32)  # warms
    start = time.perf_counter()
    for i in range(0, PROBED_RUN, TILE):
        measure_pass(adapter, ids[i : i + TILE], variants, torch.float32)
    passes = time.perf_counter() - start
    start = time.perf_counter()
    measure(adapter, ids, variants, torch.float32, batch=TILE)
    return {"passes": passes, "with rounding": time.perf_counter() - start}


def side_hook_loop(args: argparse.Namespace) -> dict[str, Any]:
    """What a user of transformers writes: hooks, one forward a lambda, the hidden states of all layers, relative mu."""
    import torch

    model, ids = sweep_model(), sweep_ids(args)
    with torch.no_grad():
        model(ids[:1])
        start = time.perf_counter()
        for lam in LAMBDAS:
            hooks = []
            for block in model.layers:
                hooks.append(
                    block.register_forward_hook(lambda _, inputs, output, lam=lam: output + (lam - 1.0) * inputs[0])
                )
                hooks.append(block.mixer.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0], None)))
            for Y in model(ids, output_hidden_states=True, use_cache=False).hidden_states:
                _ = (Y - Y.mean(-2, keepdim=True)).flatten(1).norm(dim=1) / Y.flatten(1).norm(dim=1)
            for hook in hooks:
                hook.remove()
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def section_sweep(args: argparse.Namespace) -> dict[str, Any]:
    ours = in_process("sweep", args)
    theirs = {
        malloc: in_process("hook loop", args, tuned=malloc == "tuned")["seconds"] for malloc in ("default", "tuned")
    }
    ratios = {
        f"transformers {malloc} / ours, {name}": seconds / ours["seconds"][name]
        for malloc, seconds in theirs.items()
        for name in ("whole", "certified exit")
    }
    shape = {**SWEEP, "lambdas": len(LAMBDAS), "excerpts": args.sweep_excerpts, "tokens": args.tokens}
    return {"of": shape, "ours, tuned": ours, "hook loop, seconds": theirs, "ratios": ratios}


def section_probe(args: argparse.Namespace) -> dict[str, Any]:
    seconds = in_process("probe", args)
    shape = {**SWEEP, "lambdas": len(LAMBDAS), "excerpts": PROBED_RUN, "tokens": args.tokens}
    return {
        "of": shape,
        "seconds": seconds,
        "ratios": {"with rounding / without": seconds["with rounding"] / seconds["passes"]},
    }
