"""The default sweep of the 2.7B shape in each precision, beside what its products alone take, and by other ways."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from functools import partial
from importlib.util import find_spec
from typing import Any

from gpu_cost import product_flops

from gpu.setting import NotRun, Setting, compared, first_layers, said
from gpu.smoke import Found

PASSES = {"split": ("float16", 2), "ieee": ("ieee", 1), "bfloat16": ("bfloat16", 1)}
LAUNCHES, SYNCS = ("LaunchKernel", "Memcpy", "Memset"), ("Synchronize",)


def checkpoint(s: Setting) -> Found:
    """A Mamba-2 of the 2.7B shape with random float16 weights, in transformers' layout, one file a layer."""
    import torch
    from safetensors.torch import save_file

    size, std = s.sizes, 0.02
    d, inner = size["hidden"], size["heads"] * size["head_dim"]
    conv_dim = inner + 2 * size["state"]
    generator = torch.Generator(s.device).manual_seed(0)

    def normal(*shape: int, std: float = std) -> Any:
        return (std * torch.randn(*shape, generator=generator, device=s.device)).half().cpu()

    def uniform(low: float, high: float) -> Any:
        return low + (high - low) * torch.rand(size["heads"], generator=generator, device=s.device).cpu()

    def layer() -> dict[str, Any]:
        step = uniform(math.log(1e-3), math.log(0.1)).exp()
        return {
            "norm.weight": torch.ones(d).half(),
            "mixer.in_proj.weight": normal(inner + conv_dim + size["heads"], d),
            "mixer.conv1d.weight": normal(conv_dim, 1, 4, std=0.3),
            "mixer.conv1d.bias": torch.zeros(conv_dim).half(),
            "mixer.dt_bias": (step + torch.log(-torch.expm1(-step))).half(),
            "mixer.A_log": uniform(1.0, 16.0).log().half(),
            "mixer.D": torch.ones(size["heads"]).half(),
            "mixer.norm.weight": torch.ones(inner).half(),
            "mixer.out_proj.weight": normal(d, inner, std=std / math.sqrt(2 * size["layers"])),
        }

    s.checkpoint.mkdir(parents=True)
    weights, written = {}, 0
    ends = {
        "backbone.embeddings.weight": normal(size["vocabulary"], d, std=1.0),
        "backbone.norm_f.weight": torch.ones(d).half(),
    }
    for k in range(size["layers"] + 1):
        held = ends if k == 0 else {f"backbone.layers.{k - 1}.{name}": tensor for name, tensor in layer().items()}
        file = s.checkpoint / f"model-{k:05d}.safetensors"
        save_file(held, file, {"format": "pt"})
        weights |= dict.fromkeys(held, file.name)
        written += file.stat().st_size
    index = {"metadata": {}, "weight_map": weights}
    (s.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (s.checkpoint / "config.json").write_text(json.dumps(_config(size)), encoding="utf-8")
    return f"{written / 1e9:.2f} GB", {"bytes": written}


def _config(size: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_size": size["hidden"], "state_size": size["state"],
        "num_hidden_layers": size["layers"], "num_heads": size["heads"], "head_dim": size["head_dim"], "n_groups": 1,
        "expand": size["heads"] * size["head_dim"] // size["hidden"], "conv_kernel": 4, "chunk_size": 256, "vocab_size": size["vocabulary"],
        "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "residual_in_fp32": True, "dtype": "float16",
        "pad_token_id": 0,
    }  # fmt: skip


def floor(s: Setting, precision: str) -> float:
    """Seconds of the products of the sweep at the rate that the card reached in the step `ceilings`."""
    size, (unit, passes) = s.sizes, PASSES[precision]
    inner = size["heads"] * size["head_dim"]
    n, N = s.ids().shape
    gates, conv_dim = tuple(arm.gating for arm in s.arms()), inner + 2 * size["state"]
    work = size["layers"] * product_flops(n * N, size["hidden"], inner, conv_dim, size["heads"], gates)
    return passes * work / (1e12 * s.ceilings()[unit])


def split(s: Setting) -> Found:
    return _sweep(s, "split")


def ieee(s: Setting) -> Found:
    return _sweep(s, "ieee")


def bfloat16(s: Setting) -> Found:
    return _sweep(s, "bfloat16")


def _sweep(s: Setting, precision: str) -> Found:
    """Seconds with and without the certified exit, beside the floor; what a layer launches; which kernels take the time."""
    import torch

    from lscollapse.instrument import early_exit
    from lscollapse.instrument.forward import measure_pass

    least = floor(s, precision)
    loading, (adapter, info) = s.seconds(lambda: s.adapter(products="ieee" if precision == "ieee" else "split"))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def sweep(gains: Any = None) -> Any:
        return measure_pass(adapter, s.ids(), s.arms(), dtype, gains=gains, batched=True)

    with first_layers(adapter, 1):
        cold = s.seconds(sweep)[0]  # compiles what this process launches
    numbers = {"floor": least, "loading": loading, "first layer, cold": cold, "backend": adapter.backend(dtype)}
    numbers |= traced(s, adapter, sweep)
    if not s.dry:
        torch.cuda.reset_peak_memory_stats()
    numbers["seconds"], rows = s.seconds(sweep)
    if not s.dry:
        numbers["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    numbers["bounds"], gains = s.seconds(lambda: early_exit.gains(adapter, info.sha256, s.scratch / "cache"))
    numbers["seconds with exit"], exited = s.seconds(lambda: sweep(gains))
    numbers["certified"] = float((exited["status"] == "certified").mean())
    numbers["statuses"] = rows["status"].astype(str).value_counts().to_dict()
    if not rows["value"].notna().any():
        raise AssertionError("no row has a value")
    whole = numbers["seconds"]
    return (
        f"{whole:.2f} s = {whole / least:.2f} x its products; {numbers['seconds with exit']:.2f} s with exit;"
        f" {numbers['launches a layer and batch']:.0f} launches, {numbers['syncs a layer']:.1f} syncs a layer"
    ), numbers


def traced(s: Setting, adapter: Any, sweep: Any) -> dict[str, Any]:
    """What two more layers add to a pass, by torch's profiler, and the kernels of three layers by time."""
    from torch.profiler import ProfilerActivity, profile

    counts, kernels = [], {}
    activities = [ProfilerActivity.CPU] if s.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    layers = (1, 2) if s.dry else (1, 3)
    for n in layers:
        with first_layers(adapter, n), profile(activities=activities) as seen:
            sweep()
            s.wait()
        table = seen.key_averages()
        counts.append(
            [
                sum(e.count for e in table if e.key.startswith("cu") and any(word in e.key for word in words))
                for words in (LAUNCHES, SYNCS)
            ]
        )
        kernels = {e.key[:80]: getattr(e, "self_device_time_total", 0.0) / 1e6 for e in table}
    (launched, waited), more = ([b - a for a, b in zip(*counts, strict=True)], layers[1] - layers[0])
    batches = len({arm.gating for arm in s.arms()})
    split = dict(sorted(kernels.items(), key=lambda item: -item[1])[:16])
    for name, taken in split.items():
        print(f"{taken:9.5f} s of {layers[1]} layers  {name}")
    return {
        "launches a layer and batch": launched / more / batches, "syncs a layer": waited / more, "kernels": split,
    }  # fmt: skip


def peer(s: Setting) -> Found:
    """transformers with lambda and relative mu by a hook on every block, beside ours, two arms."""
    if find_spec("mamba_ssm") and not find_spec("selective_scan_cuda"):
        sys.modules["selective_scan_cuda"] = types.ModuleType(
            "selective_scan_cuda"
        )  # else its Triton scan is not bound
    import torch
    from transformers import Mamba2Model

    from lscollapse import Variant
    from lscollapse.instrument.forward import measure_pass

    adapter, _ = s.adapter()
    ids, arms = s.ids(4), [Variant(1.0), Variant(-2.0)]
    ours_s, ours = s.seconds(lambda: measure_pass(adapter, ids, arms, torch.float32, batched=True), 2)
    model: Any = Mamba2Model.from_pretrained(s.checkpoint, dtype=torch.float32).to(s.device).eval()
    state: dict[str, Any] = {}

    def skip(block: Any, args: Any, kwargs: Any, out: Any) -> Any:
        X = args[0] if args else kwargs["hidden_states"]
        Y = out + (state["lam"] - 1.0) * X
        wide = Y.double()
        mu = torch.linalg.matrix_norm(wide - wide.mean(1, keepdim=True)) / torch.linalg.matrix_norm(wide)
        state["mus"].append(mu.mean().item())
        return Y

    for block in model.layers:
        block.register_forward_hook(skip, with_kwargs=True)

    def loop() -> list[float]:
        last = []
        for arm in arms:
            state.update(lam=arm.lam, mus=[])
            with torch.no_grad():
                model(torch.as_tensor(ids, device=s.device), use_cache=False)
            last.append(state["mus"][-1])
        return last

    theirs_s, theirs = s.seconds(loop, 2)
    part = ours[(ours["measure"] == "relative_mu") & (ours["layer"] == adapter.n_layers)]
    means = part.groupby("variant")["value"].mean()
    off = max(abs(one - other) for one, other in zip(means, theirs, strict=True))
    if not off <= 1e-4:
        raise AssertionError(f"relative mu of the last layer: theirs {theirs}, ours {list(means)}")
    numbers = {"ours": ours_s, "theirs": theirs_s, "off": off, "excerpts": len(ids)}
    return (
        f"{len(ids)} excerpts x 2: hooks {theirs_s:.2f} s, ours {ours_s:.2f} s = {theirs_s / ours_s:.1f}x; agree to {off:.1e}",
        numbers,
    )


def by_turns(s: Setting) -> Found:
    """The arms as batches and one after the other."""
    import torch

    from lscollapse.instrument.forward import measure_pass

    adapter, _ = s.adapter()
    found = {}
    for batched in (True, False, True):  # the first compiles
        run = partial(measure_pass, adapter, s.ids(8), s.arms(), torch.float32, batched=batched)
        found[batched] = s.seconds(run)
    (together, rows), (turns, alone) = found[True], found[False]
    numbers = compared(rows, alone) | {"batched": together, "by turns": turns}
    return f"batched {together:.2f} s, by turns {turns:.2f} s; {said(numbers)}", numbers


def mamba_ssm(s: Setting) -> Found:
    """The same arms by mamba-ssm's kernels and by the package's own."""
    import torch

    from lscollapse.instrument.forward import measure_pass
    from lscollapse.models.kernels.backends import KernelError, resolve_kernels

    if s.dry:
        raise NotRun("mamba-ssm's kernels need a GPU")
    try:
        theirs = resolve_kernels("mamba-ssm", s.device)
    except KernelError as error:
        raise NotRun(str(error)) from None
    adapter, _ = s.adapter()
    found = []
    for kernels in (adapter.kernels, theirs):
        adapter.kernels = kernels
        start = time.perf_counter()
        measure_pass(adapter, s.ids(2), s.arms()[:2], torch.float32)
        cold = time.perf_counter() - start
        found.append((*s.seconds(lambda: measure_pass(adapter, s.ids(8), s.arms(), torch.float32)), cold))
    (ours, rows, _), (taken, others, cold) = found
    numbers = compared(others, rows) | {"ours": ours, "theirs": taken, "cold": cold, "backend": theirs.backend}
    return f"{taken:.2f} s, own {ours:.2f} s ({theirs.backend}); {said(numbers)}", numbers
