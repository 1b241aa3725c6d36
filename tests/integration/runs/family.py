"""The processes of a Ray that was started for a run. Without torch: the tasks that call `family` start in a second."""

from __future__ import annotations

from typing import Any

import psutil


def family(item: int) -> list[dict[str, Any]]:
    """Called in a task: its process, all others under the driver, the driver, and the keeper."""
    raylet = psutil.Process().parent()
    assert raylet is not None
    driver = raylet.parent()
    assert driver is not None
    keeper = driver.parent()
    assert keeper is not None
    return [process.as_dict(["pid", "name", "create_time"]) for process in (keeper, *keeper.children(recursive=True))]


def alive(processes: list[dict[str, Any]], within: float = 0) -> list[dict[str, Any]]:
    """Those that do not end `within` seconds."""
    left = []
    for process in processes:
        try:
            found = psutil.Process(process["pid"])
            if found.create_time() != process["create_time"] or found.status() == psutil.STATUS_ZOMBIE:
                continue
            found.wait(within)
        except psutil.NoSuchProcess:
            continue
        except psutil.TimeoutExpired:
            if found.status() != psutil.STATUS_ZOMBIE:  # in a container nobody may take it away
                left.append(process)
    return left
