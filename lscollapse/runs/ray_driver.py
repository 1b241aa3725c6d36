"""Ray's driver in a process of its own: where Ray ends it, the run is told so, and of Ray nothing outlives the run.

Ray ends, from C++ and without a word, the process that is connected to a cluster whose head is gone, or whose node on this machine
is; and its agents outlive a process that is killed. So there are three:

    the run <-- connection --> driver      connects to Ray, or starts it on this machine
       |                         |
       +------> keeper <---------+         waits for the end of either, ends all of its session, and takes Ray's files away
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, cast

from lscollapse import __version__
from lscollapse.core.files import first_line

START = (
    "start a cluster with `ray start --head`, set RAY_AUTH_MODE=token if it wants its token, or leave --address out to"
    " start Ray on this machine for this run"
)
STARTS_WITHIN = 90.0  # seconds; Ray itself waits for minutes where something else answers at the address
ANSWERS_WITHIN = 60.0  # seconds; by default as long as Ray waits for its head
LEAVES_WITHIN = 5.0  # seconds from the end of the run until what Ray started here is killed


class ClusterError(ValueError):
    """No Ray, no cluster at the address, no room for an item on it, an item that was lost too often, or a head or node that was."""


class Driver:
    """What the run asks of the driver. All methods raise ClusterError where it has ended."""

    def __init__(self, address: str | None) -> None:
        """Connect to `address`, or start Ray on this machine where it is None.

        Raises:
            ClusterError: what Ray says to that.
        """
        self._talk, theirs = multiprocessing.Pipe()
        self._keys, self._early = count(), deque[tuple[int, bytes | str]]()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import keep; keep()"
        command = [sys.executable, "-c", code, str(theirs.fileno()), address or ""]
        with theirs:
            self._keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=_environment(address), pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        try:
            problem = self._greeting()
            if problem:
                where = "Ray does not start here" if address is None else f"no Ray cluster at --address {address}"
                raise ClusterError(f"{where} ({problem}): {START}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the cluster, and wait until what Ray started on this machine for it is gone."""
        self._talk.close()
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()

    def nodes(self) -> list[Mapping[str, float]]:
        """What each node that is alive has: its "CPU", its "GPU"."""
        self._send(("nodes",))
        while True:
            if not self._talk.poll(ANSWERS_WITHIN):
                raise _lost()
            key, found = self._receive()
            if key is None:
                return cast(list[Mapping[str, float]], found)
            self._early.append((key, found))

    def run(self, function: Callable[[Any], Any], item: Any, room: Mapping[str, Any]) -> int:
        """Have a task call `function(item)`, in `room`, which are options of a Ray task; returns the key of its outcome."""
        key = next(self._keys)
        self._send(("run", key, room, (__version__, os.getcwd(), pickle.dumps((function, item)))))
        return key

    def outcome(self, within: float) -> tuple[int, bytes | str] | None:
        """A key and what came of its task, for `result_of`, in the order in which they end; None if none does `within` seconds."""
        if self._early:
            return self._early.popleft()
        return self._receive() if self._talk.poll(within) else None

    def cancel(self) -> None:
        """Cancel what has not ended; outcomes of it may come nevertheless."""
        with suppress(ClusterError):  # it has ended, and its tasks with it
            self._send(("cancel",))

    def _greeting(self) -> str:
        """What is amiss, once it is connected or is not."""
        try:
            return str(self._talk.recv()) if self._talk.poll(STARTS_WITHIN) else f"no answer for {STARTS_WITHIN:g} s"
        except (EOFError, OSError):
            return "Ray ended the process that connects to it"

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._talk.send(message)
        except OSError:
            raise _lost() from None

    def _receive(self) -> tuple[Any, Any]:
        try:
            return cast(tuple[Any, Any], self._talk.recv())
        except (EOFError, OSError):
            raise _lost() from None


def result_of(outcome: bytes | str) -> Any:
    """The result that a task came to. The error of its function comes through as it is.

    Raises:
        ClusterError: the process of the task was lost.
    """
    if isinstance(outcome, str):
        raise ClusterError(
            f"a work item was lost again and again ({outcome}): its process was killed (out of memory?);"
            " what was finished is kept, the same command continues"
        )
    result, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return result


def _lost() -> ClusterError:
    return ClusterError(
        "the connection to Ray was lost: the cluster's head or its node on this machine has ended (killed? out of memory?);"
        " what was finished is kept, the same command continues, on a new cluster if the head is gone"
    )


def _environment(address: str | None) -> dict[str, str]:
    found = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ}
    found.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of items that fail after the one that is reported
    if address is None and found.setdefault("RAY_AUTH_MODE", "token") == "token":
        # Else Ray would leave a token in the home folder, and later clusters of this user would ask for it.
        found.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return found


# --- the keeper and the driver; the former becomes two before Ray is loaded -----------------------------------------------


def keep() -> None:
    """What the keeper does. Its arguments are the descriptor of the connection and the address; the lifeline is its input."""
    talk, address = int(sys.argv[1]), sys.argv[2]
    gone, alive = os.pipe()
    above = os.environ.get("RAY_TMPDIR") or "/tmp"  # as of Ray; a short path, for sockets are in it
    with TemporaryDirectory(prefix="ray", dir=above, ignore_cleanup_errors=True) as files:
        driver = os.fork()
        if not driver:
            try:
                os.setpgid(0, 0)
                os.close(gone)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if not address:
                    os.environ["RAY_TMPDIR"] = files
                _drive(Connection(talk), address)
            finally:
                os._exit(0)
        with suppress(OSError):  # it has done so itself
            os.setpgid(driver, driver)
        os.close(alive)
        os.close(talk)
        if gone not in select.select([gone, 0], [], [])[0]:  # the run has ended
            select.select([gone], [], [], LEAVES_WITHIN)
        _end_all(driver)


def _end_all(driver: int) -> None:
    """Kill the driver and its group, then what has left the group but not the session, as Ray's workers do; wait for their ends.

    Where the system is not Linux, those are left to themselves: they end a second after the rest.
    """
    with suppress(ProcessLookupError):
        os.killpg(driver, signal.SIGKILL)
    ends = []
    for name in os.listdir("/proc") if hasattr(os, "pidfd_open") else ():
        with suppress(OSError, ValueError):  # it has ended, or is none
            if os.getsid(int(name)) == os.getsid(0) and int(name) != os.getpid():
                ends.append(os.pidfd_open(int(name)))
                os.kill(int(name), signal.SIGKILL)
    os.waitpid(driver, 0)
    for end in ends:
        select.select([end], [], [], LEAVES_WITHIN)


def _drive(talk: Connection, address: str) -> None:
    """What the driver does, until the run has ended."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray: Any = import_module("ray")  # of few types
        if address:
            ray.init(address, **quiet)
        else:
            ray.init("local", include_dashboard=False, **quiet)
    except Exception as error:
        talk.send(first_line(error))
        return
    talk.send("")
    outcomes: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    Thread(target=_send_all, args=(talk, outcomes), daemon=True).start()
    call, begun = ray.remote(_portable_call()), dict[int, Any]()
    with suppress(EOFError, OSError):
        while True:
            kind, *what = talk.recv()
            if kind == "nodes":
                outcomes.put((None, [node["Resources"] for node in ray.nodes() if node["Alive"]]))
            elif kind == "run":
                key, room, arguments = what
                begun[key] = call.options(**room).remote(*arguments)
                begun[key].future().add_done_callback(partial(_ended, key, begun, outcomes))
            else:
                for left in [
                    *begun.values()
                ]:  # not by force: that ends this process where a task finishes just then (Ray 2.60)
                    ray.cancel(left)
    if address:  # else nobody is left whom it would tell
        ray.shutdown()


def _send_all(talk: Connection, outcomes: SimpleQueue[tuple[Any, Any]]) -> None:
    with suppress(OSError):
        while True:
            talk.send(outcomes.get())


def _ended(key: int, begun: dict[int, Any], outcomes: SimpleQueue[tuple[Any, Any]], task: Future[bytes]) -> None:
    begun.pop(key, None)
    try:
        outcomes.put((key, task.result()))
    except BaseException as error:  # Ray's own, of a task that was lost or cancelled
        outcomes.put((key, first_line(error)))


def _portable_call() -> Callable[[str, str, bytes], bytes]:
    """What a task runs. Ray sends a nested function as code, so that it can say that a node lacks the package.

    It returns, pickled, a result and None, or None and the error.
    """

    def call(version: str, folder: str, function_and_item: bytes) -> bytes:
        import os
        import pickle
        import socket
        import traceback

        try:
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
            return pickle.dumps((function(item), None))
        except Exception as error:
            error.add_note(traceback.format_exc())  # for --debug: the traceback itself cannot be sent
            try:
                answer = pickle.dumps((None, error))
                pickle.loads(answer)
            except Exception:  # an error of a library that cannot be read again
                answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
            return answer

    return call
