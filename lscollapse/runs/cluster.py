"""Work items on a Ray cluster: measured wherever there is room, collected and written by the process that asked.

An item's rows do not depend on who computes them, so an item whose process or node dies is given to another one, and a
driver that dies is started again: what it had collected is in the run folder.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import pandas as pd

from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.progress import Progress
from lscollapse.runs.ray_driver import START, ClusterError, Driver, result_of
from lscollapse.runs.work import Item, worker_for

T = TypeVar("T")
R = TypeVar("R")

REACHABLE_WITHIN = 10.0  # seconds; Ray itself tries for minutes
LOOKS_EVERY = 10.0  # seconds without an outcome until it is asked whether the nodes that are left have room
_connected: Driver | None = None


def map_on_nodes(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    on_result: Callable[[T, R], Sequence[T] | None],
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    retries: int = 3,
) -> None:
    """Call `function` on each item in a Ray task, and `on_result(item, result)` here as they finish, in any order.

    Args:
        function: of a module that every node can import, or a `functools.partial` of one. It is called again on an item
            whose process or node died. Relative paths mean what they mean here, where the nodes have this folder.
        on_result: what it returns are further items.
        address: of a running cluster, "auto" (the one that this machine is part of) or HOST:PORT; None starts Ray on this
            machine for the time of the call. Where this process has called `ray.init` before, it is that cluster. In a
            `connection` its connection is used.
        num_cpus: what an item takes; a task has as many threads.
        num_gpus: what an item takes; a fraction shares a GPU among items.
        retries: how often an item whose process or node died is tried again.

    Raises:
        ClusterError: see the class. What `function` and `on_result` raise comes through as it is; the other items are
            then cancelled, as they are on KeyboardInterrupt.
    """
    if not items:
        return
    room = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": retries, "scheduling_strategy": "SPREAD"}
    with connection(address) as driver:
        _check_room(driver.nodes(), num_cpus, num_gpus)
        pending: dict[int, T] = {}

        def begin(items: Sequence[T]) -> None:
            pending.update((driver.run(function, item, room), item) for item in items)

        try:
            begin(items)
            while pending:
                ended = driver.outcome(within=LOOKS_EVERY)
                if ended is None:
                    _check_room(driver.nodes(), num_cpus, num_gpus)  # else Ray would wait for a new node, for ever
                elif ended[0] in pending:  # and not of items that were cancelled
                    begin(on_result(pending.pop(ended[0]), result_of(ended[1])) or ())
        finally:
            if pending:
                driver.cancel()


@contextmanager
def connection(address: str | None) -> Iterator[Driver]:
    """Ray's driver, connected to `address` (see `map_on_nodes`) until the end of the block."""
    global _connected
    if _connected is not None:
        yield _connected
        return
    if find_spec("ray") is None:
        raise ClusterError('--engine ray needs Ray: pip install "lscollapse[cluster]"')
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
    elif address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address not in (None, "auto"):
        _check_reachable(address)
    _connected = Driver(address)
    try:
        yield _connected
    finally:
        driver, _connected = _connected, None
        driver.close()


def measure_on_nodes(
    items: Sequence[Item],
    config: Experiment,
    keep: Callable[[Item, pd.DataFrame], Sequence[Item] | None],
    progress: Progress,
) -> dict[str, Any]:
    """Measure every item and call `keep(item, rows)` here as they finish; what it returns are further items.

    Returns:
        what the manifest keeps: devices, and the number of items that each node measured.

    Raises:
        ConfigError, ClusterError: the items and the cluster do not fit. Errors of the measuring come through as they are.
    """
    measured: Counter[str] = Counter()

    def count(item: Item, result: tuple[pd.DataFrame, str]) -> Sequence[Item] | None:
        rows, node = result
        measured[node] += 1
        return keep(item, rows)

    with connection(config.address) as driver:
        nodes = driver.nodes()
        cpus, has_gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        gpus = _gpus_per_item(config, has_gpus)
        on = config.model_copy(update={"device": "cuda" if gpus else "cpu"})
        progress.note(
            f"the work items go to {len(nodes)} nodes with {cpus:g} CPUs and {has_gpus:g} GPUs in all;"
            f" an item takes 1 CPU and {gpus:g} GPU"
        )
        map_on_nodes(partial(_measure, on), items, on_result=count, address=config.address, num_gpus=gpus)
    return {"device": on.device, "engine": "ray", "items_of_node": dict(sorted(measured.items()))}


def _gpus_per_item(config: Experiment, in_cluster: float) -> float:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {config.device!r} with --engine ray, which chooses the GPU: use auto, cpu or cuda")
    if config.device == "cpu":
        return 0
    if config.device == "cuda" and not in_cluster:
        raise ConfigError("--device cuda, but the cluster has no GPU: start its nodes with `ray start --num-gpus=N`")
    return config.gpus_per_item or (1 if in_cluster else 0)


def _measure(config: Experiment, item: Item) -> tuple[pd.DataFrame, str]:
    """The rows of `item` and the id of the node that this is."""
    import ray

    return worker_for(config).rows(item), ray.get_runtime_context().get_node_id()[:8]


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"--address {address!r} is not an address: use auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHABLE_WITHIN).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"nothing answers at --address {address} ({reason}): {START}") from None


def _check_room(nodes: Sequence[Mapping[str, float]], num_cpus: float, num_gpus: float) -> None:
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        sizes = sorted({f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes})
        raise ClusterError(
            f"an item takes {num_cpus:g} CPUs and {num_gpus:g} GPUs, and no node has as many (they have"
            f" {', '.join(sizes) or 'ended'}): ask for less, or start nodes with `ray start --num-cpus=N --num-gpus=N`"
        )
