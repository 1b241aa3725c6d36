"""Whether the models of a configuration can be had, stored and held in memory here; part of `lscollapse doctor`.

Sizes err on the safe side: memory as a run would plan it for a model that is streamed, and a weight's bytes for each
parameter of one that is not; disk as the hub states it, or 4 bytes a parameter where it does not answer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from huggingface_hub import constants

from lscollapse.core import hub, registry, web
from lscollapse.core.allocation import available_memory
from lscollapse.core.config import Experiment
from lscollapse.core.registry import Entry
from lscollapse.instrument.rounding import PROBED, TWINS
from lscollapse.models.checkpoints import checkpoint, mamba_ssm
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.runs.devices import allowed_memory, device
from lscollapse.runs.memory import BASE, MemoryPlanError, bytes_of_a_weight, is_streamed, plan_streamed

TIMEOUT = 5.0  # seconds for each call
GIB = 2**30
CACHED = "in the cache"
LOCAL = {"package": "embedded", "wheel": "an installed package", "folder": "a local folder", "file": "a local file"}
HERE = (CACHED, *LOCAL.values())  # where the files of a model can be looked at


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at. `mend`: what to do where the configuration cannot run; `good`: nothing to remark."""

    name: str
    found: str
    mend: str = ""
    good: bool = True


def model_findings(config: Experiment) -> Iterator[Diagnosis]:
    """Examine the hub, every model, and the disk for what is not there yet."""
    offline = config.offline or bool(constants.HF_HUB_OFFLINE)
    fault = "not asked (offline)" if offline else asked(constants.ENDPOINT, {}, {})
    host = str(urlsplit(constants.ENDPOINT).hostname)
    yield Diagnosis("hub", f"{host}: {fault or 'answers'}", good=offline or not fault)
    needs: dict[Path, int] = {}
    for name in config.models:
        try:
            entry = registry.resolve(name)
            where, mend = _stored(entry, config, fault, needs)
            fits = "" if mend and not entry.n_parameters else _fits(name, entry, config, offline, where in HERE)
            yield Diagnosis(name, "; ".join(filter(None, (where, fits))), mend)
        except (ValueError, OSError) as error:
            yield Diagnosis(name, "cannot be used", str(error).replace(constants.ENDPOINT, host))
    yield from _disk(needs)


def asked(url: str, query: dict[str, str], headers: dict[str, str]) -> str:
    """Nothing where an HTTP server answers without complaint, else what happened."""
    try:
        get = partial(httpx.get, url, params=query, headers=headers, timeout=TIMEOUT, follow_redirects=True)
        answer = web.within(TIMEOUT, get)
    except (httpx.HTTPError, httpx.InvalidURL, web.Late, ValueError) as error:
        return f"does not answer ({type(error).__name__})"
    return f"answers HTTP {answer.status_code}" if answer.status_code >= 500 else ""


def _stored(entry: Entry, config: Experiment, fault: str, needs: dict[Path, int]) -> tuple[str, str]:
    """Where the weights are, and what to do where they cannot be had; adds to `needs` what they will take in which folder.

    Args:
        fault: why the hub cannot be asked.

    Raises:
        HubError: the hub has no such model, or does not give it; DamagedError: the one in the cache was altered.
    """
    if entry.source != "hub":
        return LOCAL[entry.source], ""
    revision = config.revision or entry.revision or None
    cache = hub.storage(config.cache_dir) or Path(constants.HF_HUB_CACHE)
    try:
        hub.fetch(entry.location, revision=revision, cache_dir=cache, offline=True)
        return CACHED, ""
    except hub.DamagedError:
        raise
    except hub.HubError:
        files = {} if fault else hub.sizes(entry.location, revision=revision, timeout=TIMEOUT)
    size = sum(files.values()) or 4 * (entry.n_parameters or 0)
    needs[cache] = needs.get(cache, 0) + size
    if files:
        return f"{size / GIB:.2f} GiB to fetch", ""
    mend = f"run `lscollapse fetch {entry.name}` where the hub answers and bring its cache here, or set HF_ENDPOINT to a mirror"
    return "not in the cache" + (f", at most {size / GIB:.2f} GiB" if size else ""), mend


def _fits(name: str, entry: Entry, config: Experiment, offline: bool, here: bool) -> str:
    """How the weights are held, in how much memory; where they are `here` as their files say, else as the registry does.

    Raises:
        MemoryPlanError: there is less.
        AssetError: a file of a data package is missing.
        CheckpointError: config.json cannot be read, or the weights are not there or not those that it describes.
    """
    where: Any = {"revision": config.revision, "cache_dir": config.cache_dir, "offline": offline or here}
    architecture, n_parameters = (checkpoint.inspect if here else checkpoint.outline)(name, **where)
    on, limit, streamed = device(config), allowed_memory(config), is_streamed(architecture, n_parameters, config)
    needed = bytes_of_a_weight(config) * n_parameters + BASE
    if streamed:
        needed = _peak(entry, config, limit) if on == "cpu" else limit
    free = available_memory() if on == "cpu" else limit
    how = f"{n_parameters:,} parameters {'streamed' if streamed else 'in memory'}"
    if needed * (config.workers or 1) <= free:
        return f"{how}, {needed / GIB:.2f} GiB of {free / GIB:.2f} free on {on}"
    mend = (
        f"set --max-memory under {free / GIB:.2f}GiB"
        if streamed
        else "use --stream auto"
        if architecture == "mamba2"
        else "choose a smaller model, or a machine with more"
    )
    raise MemoryPlanError(f"{how} need {needed / GIB:.2f} GiB, {free / GIB:.2f} are free on {on}: {mend}")


def _peak(entry: Entry, config: Experiment, limit: int) -> int:
    """The predicted peak of a streamed model, or what it is allowed where its shape is not known ahead.

    Raises:
        MemoryPlanError: `--max-memory` is less than one layer and one excerpt take.
    """
    if entry.config is None:
        return limit
    c = mamba_ssm.read_config(entry.config, entry.name)
    shape = Mamba2Shape(c.hidden_size, c.num_heads, c.head_dim, c.state_size, c.n_groups, c.conv_kernel)
    arms = len(config.lambdas) * (2 if config.gating is None else 1)
    size = arms, bytes_of_a_weight(config), limit
    probe = plan_streamed(shape, config.tokens, min(PROBED, config.excerpts), *size, TWINS)
    return max(probe.bytes, plan_streamed(shape, config.tokens, config.excerpts, *size).bytes)


def _disk(needs: dict[Path, int]) -> Iterator[Diagnosis]:
    """Free space for what is fetched, added up for each file system; and for the run folder."""
    places: dict[int, tuple[Path, int]] = {}
    for folder, size in [(Path(), 0), *needs.items()]:
        there = next(each for each in [folder.absolute(), *folder.absolute().parents] if each.exists())
        device = there.stat().st_dev
        known, so_far = places.get(device, (there, 0))
        places[device] = known, so_far + size
    for place, size in places.values():
        free = shutil.disk_usage(place).free
        found = f"{free / GIB:.1f} GiB free" + (f", {size / GIB:.1f} GiB needed" if size else "")
        short = f"free {(size - free) / GIB:.1f} GiB, or choose another disk with cache_dir" if size > free else ""
        yield Diagnosis("disk", found, short)
