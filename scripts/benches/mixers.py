"""Training speed of each mixer of Table 1: tokens a second, forward and backward, one layer of the paper's MQAR width."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benches.common import in_process, timed

WIDTH, STATE = 128, 64
SHAPES = ((64, 64), (8, 512))  # excerpts x tokens: the embedded task's, and the paper's length
MIXERS = ("attention", "linear", "mamba", "mamba2")


def side_mixers(args: argparse.Namespace) -> dict[str, Any]:
    """Our mixers, and transformers' two of the same shape, whose loops and paddings are what its users train on a CPU."""
    import torch
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    from lscollapse.models.nets.lambda_net import NetConfig, make_mixer

    shape = {"hidden_size": WIDTH, "state_size": STATE, "expand": 2}
    modules = {name: make_mixer(NetConfig(mixer=name, **shape)) for name in MIXERS}
    modules["mamba, transformers"] = MambaMixer(MambaConfig(**shape), 0)
    heads = {"num_heads": 2 * WIDTH // 64, "head_dim": 64, "n_groups": 1}
    modules["mamba2, transformers"] = Mamba2Mixer(Mamba2Config(**shape, **heads), 0)

    def run(module: Any, X: Any) -> Callable[[], None]:
        def step() -> None:
            module.zero_grad(set_to_none=True)
            module(X).square().mean().backward()

        return step

    found = {}
    for excerpts, tokens in SHAPES:
        X = torch.randn(excerpts, tokens, WIDTH)
        found[f"{excerpts} x {tokens}"] = timed({name: run(m, X) for name, m in modules.items()}, args.repeats)
    return found


def section_mixers(args: argparse.Namespace) -> dict[str, Any]:
    seconds = in_process("mixers", args)
    counts = {name: int(name.split(" x ")[0]) * int(name.split(" x ")[1]) for name in seconds}
    speeds = {shape: {name: counts[shape] / s["best"] for name, s in sides.items()} for shape, sides in seconds.items()}
    ratios = {
        shape: {name: sides[f"{name}, transformers"]["best"] / sides[name]["best"] for name in ("mamba", "mamba2")}
        for shape, sides in seconds.items()
    }
    return {
        "width": WIDTH,
        "state": STATE,
        "tokens a second": speeds,
        "transformers / ours": ratios,
        "seconds": seconds,
    }
