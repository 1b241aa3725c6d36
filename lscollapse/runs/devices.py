"""What computes: CPU or GPUs, with how many threads, in how much memory."""

from __future__ import annotations

import os
from functools import cache

import torch

from lscollapse.core.config import Compute, ConfigError, Experiment, parse_memory

THREADED_WIDTH = 1024  # narrower models run on one thread: faster there, and the same bits whatever the number of cores
GPU_SHARE = 0.8  # of the free device memory that is planned with


def set_threads(width: int) -> None:
    """Let torch use one thread for a model of this hidden size, or all that this process has."""
    threads = _all_threads()  # asked before it is changed
    torch.set_num_threads(1 if width < THREADED_WIDTH else threads)


@cache
def _all_threads() -> int:
    return torch.get_num_threads()


def device(config: Compute) -> str:
    """`cpu`, `cuda` or `cuda:N`; "auto" is a GPU where torch sees one.

    Raises:
        ConfigError: an unknown device, or one that is not there.
    """
    cuda = torch.cuda.is_available()
    if config.device == "auto":
        return "cuda" if cuda else "cpu"
    if config.device.startswith("cuda") and not cuda:
        raise ConfigError("--device cuda, but torch sees no GPU: install a CUDA build of torch, or use --device cpu")
    allowed = ["cpu", "cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    if config.device not in allowed:
        raise ConfigError(f"--device {config.device!r} is not known: use auto, {', '.join(allowed)}")
    return config.device


def worker_devices(config: Experiment) -> list[str]:
    """The device of each process that measures: `workers` of them, by default one, or one for every visible GPU.

    Raises:
        ConfigError: more workers than GPUs.
    """
    on = device(config)
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if on == "cuda" else [on]
    wanted = config.workers or len(gpus)
    if on != "cpu" and wanted > len(gpus):
        raise ConfigError(
            f"workers: {wanted} were asked for, --device {on} has {len(gpus)} GPUs: one process works on each"
        )
    return gpus * wanted if on == "cpu" else gpus[:wanted]


def training_workers(config: Compute) -> int:
    """Processes that train small nets, one thread each: as configured, else one for each core, or one where a GPU computes."""
    return config.workers or (1 if device(config) == "cuda" else os.cpu_count() or 1)


def allowed_memory(config: Experiment) -> int:
    """Bytes that a process may plan with: on CPU its part of --max-memory, on a GPU what is free of the device's own."""
    on = device(config)
    if on == "cpu":
        return parse_memory(config.max_memory) // (config.workers or 1)
    return int(GPU_SHARE * torch.cuda.mem_get_info(on)[0])
