"""Weights larger than what may be used of memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.equivalence.layouts import VOCAB, write_original
from tests.integration.models.adapters.test_streamed import RUN, child, folder, settings

__all__ = ["folder"]  # the fixture


def test_peak_memory(tmp_path: Path, folder: Path) -> None:
    """A checkpoint of 300 MB in the original layout, measured within 10 % of what is predicted."""
    width, layers = 1024, 11
    inner, heads = 2 * width, 2 * width // 64
    channels = inner + 2 * 128
    config = {"d_model": width, "n_layer": layers, "vocab_size": VOCAB, "ssm_cfg": {"layer": "Mamba2"}}
    block = {
        "norm.weight": (width,), "mixer.A_log": (heads,), "mixer.D": (heads,), "mixer.dt_bias": (heads,),
        "mixer.in_proj.weight": (inner + channels + heads, width), "mixer.conv1d.weight": (channels, 1, 4),
        "mixer.conv1d.bias": (channels,), "mixer.norm.weight": (inner,), "mixer.out_proj.weight": (width, inner),
    }  # fmt: skip
    state = {
        f"backbone.layers.{k}.{name}": torch.rand(size) / 50 for k in range(layers) for name, size in block.items()
    }
    state |= {"backbone.embedding.weight": torch.rand(48, width), "backbone.norm_f.weight": torch.ones(width)}
    write_original(folder, state, **config)
    assert (folder / "pytorch_model.bin").stat().st_size > 280e6
    # Not ru_maxrss: it starts with the size of the process that started this one.
    script = RUN + "print(next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    values = settings(tmp_path, stream="always", gating=False, lambdas=[-2.0, 1.0], excerpts=8)
    done = child(script, folder, json.dumps(values), str(tmp_path / "run"), "0")
    assert done.returncode == 0, done.stderr
    note, peak = done.stdout.splitlines()
    predicted = float(note.split("predicted peak ")[1].split()[0]) * 2**30
    print(f"peak {int(peak):,} of {predicted:,.0f}")
    assert int(peak) <= 1.1 * predicted
