"""Work items on a Ray cluster: measured wherever there is room, collected and written by the process that asked.

An item's rows do not depend on who computes them, so an item whose process or node dies is given to another one, and a
driver that dies is started again: what it had collected is in the run folder.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pandas as pd

from lscollapse import __version__
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.files import first_line
from lscollapse.core.progress import Progress
from lscollapse.runs.work import Item, worker_for

T = TypeVar("T")
R = TypeVar("R")

START = (
    "start a cluster with `ray start --head`, set RAY_AUTH_MODE=token if it wants its token, or leave --address out to"
    " start Ray on this machine for this run"
)
REACHABLE_WITHIN = 10.0  # seconds; Ray itself tries for minutes


class ClusterError(ValueError):
    """No Ray, no cluster at the address, no room for an item on it, or an item that was lost too often."""


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
            machine for the time of the call. Where `ray.init` was called before, that connection is used and left open.
        num_cpus: what an item takes; a task has as many threads.
        num_gpus: what an item takes; a fraction shares a GPU among items.
        retries: how often an item whose process or node died is tried again.

    Raises:
        ClusterError: see the class. What `function` and `on_result` raise comes through as it is; the other items are
            then cancelled, as they are on KeyboardInterrupt.
    """
    if not items:
        return
    with connection(address) as ray:
        _check_room(ray, num_cpus, num_gpus)
        task = ray.remote(_portable_call()).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_retries=retries, scheduling_strategy="SPREAD"
        )
        where = __version__, os.getcwd()

        def begun(items: Sequence[T]) -> dict[Any, T]:
            return {task.remote(*where, pickle.dumps((function, item))): item for item in items}

        pending = begun(items)
        try:
            while pending:
                for done in ray.wait(list(pending))[0]:
                    pending |= begun(on_result(pending.pop(done), _result(ray, done)) or ())
        finally:
            for left in pending:  # not by force: that ends this process where a task finishes just then (Ray 2.60)
                ray.cancel(left)


@contextmanager
def connection(address: str | None) -> Iterator[Any]:
    """The module ray, connected to `address` (see `map_on_nodes`) until the end of the block."""
    if "ray" not in sys.modules:  # which reads these when it is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of items that fail after the one that is reported
        if address is None and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            # Else Ray would leave a token in the home folder, and later clusters of this user would ask for it.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise ClusterError('--engine ray needs Ray: pip install "lscollapse[cluster]"') from None
    if ray.is_initialized():
        yield ray
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address not in (None, "auto"):
        _check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "Ray does not start here" if address is None else f"no Ray cluster at --address {address}"
        raise ClusterError(f"{where} ({first_line(error)}): {START}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


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

    with connection(config.address) as ray:
        has = ray.cluster_resources()
        gpus = _gpus_per_item(config, has.get("GPU", 0))
        on = config.model_copy(update={"device": "cuda" if gpus else "cpu"})
        progress.note(
            f"the work items go to {sum(node['Alive'] for node in ray.nodes())} nodes with {has.get('CPU', 0):g} CPUs"
            f" and {has.get('GPU', 0):g} GPUs in all; an item takes 1 CPU and {gpus:g} GPU"
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


def _check_room(ray: Any, num_cpus: float, num_gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        sizes = sorted({f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes})
        raise ClusterError(
            f"an item takes {num_cpus:g} CPUs and {num_gpus:g} GPUs, and no node has as many (they have"
            f" {', '.join(sizes)}): ask for less, or start nodes with `ray start --num-cpus=N --num-gpus=N`"
        )


def _portable_call() -> Callable[[str, str, bytes], Any]:
    """What a task runs. Ray sends a nested function as code, so that it can say that a node lacks the package."""

    def call(version: str, folder: str, function_and_item: bytes) -> Any:
        import os
        import pickle
        import socket

        try:
            import lscollapse

            found = lscollapse.__version__
        except ImportError:
            found = "none"
        if found != version:
            raise ValueError(
                f"node {socket.gethostname()} has lscollapse {found}, this machine has {version}: install the same everywhere"
            )
        if os.path.isdir(folder):
            os.chdir(folder)
        function, item = pickle.loads(function_and_item)
        return function(item)

    return call


def _result(ray: Any, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a work item was lost again and again ({first_line(error)}): its process was killed (out of memory?);"
            " what was finished is kept, the same command continues"
        ) from None
