"""Six lambdas on models of transformers with random weights: `measure`, the model's own forwards, a hook loop and nnsight."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.common import in_process, timed

ARMS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
NNSIGHT = Path(__file__).resolve().parent.parent.parent / ".venv-nnsight"
ROUNDS = 2  # at most
# The list of blocks, and in a block the module whose output is added to the block's input.
PLACES = {
    "gpt2": ("h", "attn"),
    "bert": ("encoder.layer", "attention.output.dropout"),
    "llama": ("layers", "self_attn"),
}
LLAMA_135M = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
}  # fmt: skip


def models(layers: int) -> dict[str, Callable[[], Any]]:
    """GPT-2 124M, BERT base and a Llama of 135M, each with so many blocks at most."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    return {
        "gpt2": lambda: GPT2Model(GPT2Config(n_layer=min(layers, 12))),
        "bert": lambda: BertModel(BertConfig(num_hidden_layers=min(layers, 12))),
        "llama": lambda: LlamaModel(LlamaConfig(**LLAMA_135M, num_hidden_layers=min(layers, 30))),
    }


def with_ids(make: Callable[[], Any], args: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    ids = torch.randint(1000, (args.any_excerpts, args.tokens), generator=torch.Generator().manual_seed(1))
    return make().eval(), ids


def forwards(model: Any, *parts: Any) -> None:
    """One forward a lambda, of nothing but the model."""
    import torch

    with torch.no_grad():
        for _ in ARMS:
            for part in parts:
                model(part)


def relative_mu(Y: Any) -> Any:
    return (Y - Y.mean(-2, keepdim=True)).flatten(1).norm(dim=1) / Y.flatten(1).norm(dim=1)


def hook_loop(model: Any, ids: Any, blocks: str, mixer: str) -> None:
    """What a user of transformers writes: O + (lam - 1) X in place of the mixer's O, and relative mu of every block's output."""
    import torch

    def keeps(block: Any, args: Any) -> None:
        block.kept = args[0]

    def edits(block: Any, lam: float) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, O: Any) -> Any:
            edit = (lam - 1.0) * block.kept
            return (O[0] + edit, *O[1:]) if isinstance(O, tuple) else O + edit

        return hook

    def reads(_block: Any, _args: Any, Y: Any) -> None:
        relative_mu(Y[0] if isinstance(Y, tuple) else Y)

    for lam in ARMS:
        hooks = []
        for block in model.get_submodule(blocks):
            hooks += [block.register_forward_pre_hook(keeps), block.register_forward_hook(reads)]
            hooks.append(block.get_submodule(mixer).register_forward_hook(edits(block, lam)))
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()


def by_nnsight(model: Any, ids: Any, blocks: str, mixer: str) -> None:
    """The same, as nnsight writes it."""
    import torch
    from nnsight import NNsight

    envoys = {id(envoy._module): envoy for envoy in NNsight(model).modules()}
    net = envoys[id(model)]
    parts = [(envoys[id(block)], envoys[id(block.get_submodule(mixer))]) for block in model.get_submodule(blocks)]
    for lam in ARMS:
        with torch.no_grad(), net.trace(ids):
            found = list().save()
            for block, part in parts:
                edit = (lam - 1.0) * block.input
                O = part.output
                part.output = (O[0] + edit, *O[1:]) if isinstance(O, tuple) else O + edit
                Y = block.output
                found.append(relative_mu(Y[0] if isinstance(Y, tuple) else Y))


def ours_on(name: str, make: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lscollapse.instrument import rounding
    from lscollapse.instrument.forward import measure, measure_pass
    from lscollapse.instrument.surgery import Variant
    from lscollapse.models.adapt import adapt

    model, ids = with_ids(make, args)
    adapter, variants = adapt(model), [Variant(lam=lam) for lam in ARMS]
    probed, rest = ids[: rounding.PROBED], ids[rounding.PROBED :]
    dtypes = measure(model, probed, variants).groupby("variant")["dtype"].first()
    seconds = timed(
        {
            "forwards": lambda: forwards(model, ids),
            "forwards, twins too": lambda: forwards(model, probed.repeat(rounding.TWINS, 1), rest),
            "measure": lambda: measure(model, ids, variants),
            "measure_pass": lambda: measure_pass(adapter, ids, variants, torch.float32),
            "hook loop": lambda: hook_loop(model, ids, *PLACES[name]),
        },
        min(args.repeats, ROUNDS),
    )
    return {"seconds": seconds, "arms repeated in float64": int((dtypes == "float64").sum())}


def nnsight_on(name: str, make: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    model, ids = with_ids(make, args)
    runs = {"forwards": lambda: forwards(model, ids), "nnsight": lambda: by_nnsight(model, ids, *PLACES[name])}
    return timed(runs, min(args.repeats, ROUNDS))


def side_any_model(args: argparse.Namespace) -> dict[str, Any]:
    return {name: ours_on(name, make, args) for name, make in models(args.layers).items()}


def side_any_nnsight(args: argparse.Namespace) -> dict[str, Any]:
    if importlib.util.find_spec("nnsight") is None:
        return {"skipped": "nnsight is not in .venv-nnsight, which `make bench` fills where it can be installed"}
    return {name: nnsight_on(name, make, args) for name, make in models(args.layers).items()}


def section_any_model(args: argparse.Namespace) -> dict[str, Any]:
    ours, nnsight = in_process("any model", args), in_process("any model, nnsight", args, beside=NNSIGHT)
    ratios: dict[str, Any] = {}
    for name, of in ours.items():
        best = {run: times["best"] for run, times in of["seconds"].items()}
        ratios[name] = {
            "measure / forwards": best["measure"] / best["forwards"],
            "measure / forwards, twins too": best["measure"] / best["forwards, twins too"],
            "measure_pass (no twins) / forwards": best["measure_pass"] / best["forwards"],
            "hook loop / forwards": best["hook loop"] / best["forwards"],
        }
        if name in nnsight:
            ratios[name]["nnsight / forwards"] = nnsight[name]["nnsight"]["best"] / nnsight[name]["forwards"]["best"]
    shape = {"excerpts": args.any_excerpts, "tokens": args.tokens, "lambdas": len(ARMS), "blocks": args.layers}
    return {"of": shape, "ours": ours, "nnsight": nnsight, "ratios": ratios}
