"""Work items on a real Ray cluster of two nodes on this machine: rows, nodes and drivers that die, errors in one line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lscollapse.core import config
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.manifest import read_manifest
from lscollapse.core.progress import SILENT
from lscollapse.experiments import paper
from lscollapse.experiments.table1 import grid, schema
from lscollapse.runs import cluster, ray_driver, work
from lscollapse.runs.loading import load_tasks
from lscollapse.runs.ray_driver import Driver
from tests.integration.runs.family import alive, family

os.environ["RAY_AUTH_MODE"] = "token"  # read when Ray is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
GIVES_UP = "RAY_gcs_rpc_server_reconnect_timeout_s"  # a head that does not answer, by default after a minute
os.environ[GIVES_UP] = "2"
ray = pytest.importorskip("ray")

EXCERPTS, TOKENS = 44, 6  # six tiles
QUICK = {"period_ms": "300", "failure_threshold": "3", "initial_delay_ms": "0"}  # to notice that a node is gone


class Nodes:
    """A head with a pretended GPU, and a second node that can be killed; each in a process group of its own."""

    def __init__(self) -> None:
        self.temp = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets are in it
        self.groups: dict[str, int] = {}

    def lead(self) -> str:
        """Start the head; returns its address."""
        quick = {f"RAY_health_check_{name}": value for name, value in QUICK.items()}
        head = ["--head", "--port=0", "--include-dashboard=false", "--num-gpus=1", f"--temp-dir={self.temp}"]
        output = self.start("head", *head, **quick)
        found = re.search(r"--address='([\d.]+:\d+)'", output)
        assert found, output
        return found[1]

    def start(self, name: str, *arguments: str, **environment: str) -> str:
        log = self.temp / f"{name}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        options = [
            "--num-cpus=1",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
        ]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *options], stdout=out, stderr=out, start_new_session=True, env=os.environ | environment
            )
            self.groups[name] = process.pid
            assert process.wait(180) == 0, log.read_text()
        return log.read_text()

    def kill(self, name: str) -> None:
        """As a machine that loses its power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.groups.pop(name), signal.SIGKILL)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    try:
        yield started
    finally:
        for name in [*started.groups]:
            started.kill(name)
        shutil.rmtree(started.temp, ignore_errors=True)


@pytest.fixture(scope="module")
def address(nodes: Nodes) -> str:
    found = nodes.lead()
    nodes.start("second", f"--address={found}")
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.equivalence import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.mamba2(2, 2).save_pretrained(folder / "little-mamba")
    common = {"text_sha256": "0" * 64, "tokenizer": "made up", "source": "by hand"}
    rows = [common | {"title": f"T{n}", "ids": row} for n, row in enumerate(tiny.ids(EXCERPTS, TOKENS).tolist())]
    (folder / "excerpts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return {
        "models": [str(folder / "little-mamba")], "lambdas": [-2.0, 1.0], "excerpts": EXCERPTS, "tokens": TOKENS,
        "source": str(folder / "excerpts.jsonl"), "offline": True, "cache_dir": str(folder),
    }  # fmt: skip


@pytest.fixture(scope="module")
def local(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made without Ray."""
    out = tmp_path_factory.mktemp("local")
    paper.sweep_lambda(Experiment(**settings), out)
    return out


def on_ray(settings: dict[str, Any], address: str) -> Experiment:
    return Experiment(**settings, engine="ray", address=address, device="cpu")


def assert_same_table(found: Path, expected: Path) -> None:
    for name in ("rows.parquet", "rows.csv"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


class Advances:
    """A Progress that keeps what it is told, and does something at the first advance."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self.first, self.total = first, 0.0
        self.amounts: list[float] = []
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, total: float) -> None:
        self.total = total

    def advance(self, amount: float) -> None:
        self.amounts.append(amount)
        if len(self.amounts) == 1:
            self.first()


# --- what a task may be asked to do; each takes the folder where processes meet ---------------------


def meet(folder: Path, item: int) -> tuple[str, list[int]]:
    """Return when an odd and an even item run at once: a named pipe opens when it is opened from both sides."""
    signal.alarm(120)  # where that never happens, this process ends
    with (folder / "pipe").open("rb" if item % 2 else "wb"):
        signal.alarm(0)
    return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


def attempt(folder: Path, item: int) -> Any:
    with (folder / f"{item}").open("a") as tries:
        tries.write("x")
    if item == 1:
        os._exit(1)
    if item == 2:
        raise ConfigError("item 2 is of no use")
    if item == 3:
        signal.alarm(120)
        for _ in itertools.count():
            pass
    return os.getcwd()


# --- without a cluster ----------------------------------------------------------------------------


@pytest.fixture
def files(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a Ray that is started for a run keeps its files."""
    folder = nodes.temp / "r"  # short, as above
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


def test_ray_is_started_here_and_nothing_of_it_is_left(files: Path) -> None:
    found: list[dict[str, Any]] = []
    cluster.map_on_nodes(family, [-1, -2], on_result=lambda _, processes: found.extend(processes))
    assert {"raylet", "gcs_server"} <= {process["name"] for process in found} and not ray.is_initialized()
    assert not alive(found) and not any(files.iterdir())
    files.rmdir()


def test_of_ray_nothing_outlives_a_run_that_is_killed(files: Path) -> None:
    program = (
        "import json, os; from lscollapse.runs.ray_driver import Driver, result_of;"
        "from tests.integration.runs.family import family;"
        "driver = Driver(None); driver.run(family, 0, {});"
        "print(json.dumps(result_of(driver.outcome(120)[1])), flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr
    found = json.loads(run.stdout)
    assert len(found) > 4 and not alive(found, within=60)  # the keeper is one of them
    assert not any(files.iterdir())


def test_no_cluster_is_one_line(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cases = {f"127.0.0.1:{port}": "nothing answers", "no such host:1": "nothing answers", "here": "HOST:PORT"}
    for address, message in cases.items():
        with pytest.raises(cluster.ClusterError, match=message):
            paper.sweep_lambda(on_ray(settings, address), tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(cluster.ClusterError, match=r'pip install "lscollapse\[cluster\]"'):
        paper.sweep_lambda(on_ray(settings, "auto"), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["engine=dask"], "'local' or 'ray'"),
        (["address=auto"], "address: this is for engine ray"),
        (["gpus_per_item=0.5"], "gpus_per_item: this is for engine ray"),
        (["engine=ray", "workers=2"], "workers: this is for engine local"),
        (["engine=ray", "gpus_per_item=0"], "greater than 0"),
    ],
)
def test_settings_that_do_not_fit(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.configure(config.Experiment, settings=given)


def test_other_weights_than_those_of_the_run_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    from tests.equivalence import tiny

    shutil.copytree(settings["models"][0], tmp_path / "model")
    changed = Experiment(**settings | {"models": [str(tmp_path / "model")]})
    task = next(load_tasks(changed, paper.sweep_variants, SILENT)).alone
    tiny.mamba2(2, 2, seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(work.WorkerError, match="not the same for every process"):
        work.worker_for(changed).rows(work.probes(0, task)[0])


# --- two nodes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connected(address: str) -> Iterator[Driver]:
    """One connection for all that follows, and so the same processes on the nodes, which have torch loaded."""
    with cluster.connection(address) as driver:
        yield driver


def test_the_table_is_that_of_one_process(
    settings: dict[str, Any], address: str, connected: Driver, local: Path, tmp_path: Path
) -> None:
    told = Advances()
    paper.sweep_lambda(on_ray(settings, address), tmp_path, told)
    assert_same_table(tmp_path, local)
    assert len(told.amounts) == 7 and sum(told.amounts) == told.total
    assert "to 2 nodes with 2 CPUs and 1 GPUs" in told.notes[-1]
    record = read_manifest(tmp_path)
    assert record["device"] == "cpu" and sum(record["items_of_node"].values()) == 7
    assert 1 <= len(record["items_of_node"]) <= 2  # which node is quicker with so little is not the test's to say
    assert not (tmp_path / "parts").exists()


def test_a_driver_that_is_killed_is_continued(
    settings: dict[str, Any], address: str, connected: Driver, local: Path, tmp_path: Path
) -> None:
    program = (
        "import json, os, sys; from pathlib import Path; from lscollapse.experiments import paper;"
        "from tests.integration.runs.test_cluster import Advances, on_ray;"
        "settings, address, out = json.loads(sys.argv[1]);"
        "paper.sweep_lambda(on_ray(settings, address), Path(out), Advances(lambda: os.kill(os.getpid(), 9)))"
    )
    arguments = json.dumps([settings, address, str(tmp_path / "run")])
    driver = subprocess.run([sys.executable, "-c", program, arguments], capture_output=True, text=True, timeout=300)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    assert len([*(tmp_path / "run" / "parts").glob("*.parquet")]) == 1
    told = Advances()
    paper.sweep_lambda(on_ray(settings, address), tmp_path / "run", told)
    assert len(told.amounts) == 6
    assert_same_table(tmp_path / "run", local)


def test_cells_of_table_1(address: str, connected: Driver, tmp_path: Path) -> None:
    sizes = ["hidden_size=8", "state_size=4", "head_dim=8"]
    data = ["seq_len=12", "pairs=2", "vocab_size=16", "train=24", "validation=10", "test=12"]
    small = [*(f"mqar.net.{size}" for size in sizes), *(f"mqar.data.{size}" for size in data)]
    small += ["mqar.training.steps=2", "mqar.training.batch=8", "mqar.lrs=[0.01]", "measured=2", "tensorboard=false"]
    small += ["mixers=[mamba2]", "lams=[1.0]", "seeds=[0, 1]", "device=cpu"]
    for name, more in (("one", ["workers=1"]), ("ray", ["engine=ray", f"address={address}"])):
        grid.run(config.configure(schema.Table1, settings=[*small, *more]), tmp_path / name)
    assert_same_table(tmp_path / "ray", tmp_path / "one")


def test_items_run_on_both_nodes_at_once(connected: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: dict[int, Any] = {}
    cluster.map_on_nodes(partial(meet, tmp_path), [0, 1], on_result=found.__setitem__)
    assert len({node for node, _ in found.values()}) == 2
    assert {tuple(gpus) for _, gpus in found.values()} == {()}


def test_items_share_a_gpu(connected: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: dict[int, Any] = {}
    cluster.map_on_nodes(partial(meet, tmp_path), [0, 1], on_result=found.__setitem__, num_cpus=0.5, num_gpus=0.5)
    assert [gpus for _, gpus in found.values()] == [[0], [0]]


def test_errors_are_those_of_the_function(connected: Driver, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        cluster.map_on_nodes(partial(attempt, tmp_path), [2], on_result=print)
    assert str(error.value) == "item 2 is of no use"
    assert (tmp_path / "2").read_text() == "x"  # which trying again does not mend


def test_an_item_that_fits_nowhere(connected: Driver) -> None:
    for room in ({"num_cpus": 2}, {"num_gpus": 2}):
        with pytest.raises(cluster.ClusterError, match="no node has as many"):
            cluster.map_on_nodes(abs, [-1], on_result=print, **room)  # type: ignore[arg-type]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="the pretended GPU is a real one")
def test_a_gpu_is_taken_where_there_is_one(settings: dict[str, Any], connected: Driver, tmp_path: Path) -> None:
    """The pretended GPU is given to the item, and torch there says that there is none."""
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        paper.sweep_lambda(Experiment(**settings, engine="ray"), tmp_path / "a")
    with pytest.raises(cluster.ClusterError, match="1 CPUs and 2 GPUs"):
        paper.sweep_lambda(Experiment(**settings, engine="ray", gpus_per_item=2), tmp_path / "b")


def test_a_node_that_dies_in_the_middle(
    settings: dict[str, Any], nodes: Nodes, address: str, connected: Driver, local: Path, tmp_path: Path
) -> None:
    paper.sweep_lambda(on_ray(settings, address), tmp_path, Advances(lambda: nodes.kill("second")))
    assert_same_table(tmp_path, local)
    assert len(connected.nodes()) == 1


# --- one node is left -----------------------------------------------------------------------------


def test_an_item_that_kills_its_process_is_tried_again_then_one_line(connected: Driver, tmp_path: Path) -> None:
    with pytest.raises(cluster.ClusterError, match="the same command continues"):
        cluster.map_on_nodes(partial(attempt, tmp_path), [1], on_result=print, retries=1)
    assert (tmp_path / "1").read_text() == "xx"


def test_stopping_cancels_the_rest(connected: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[str] = []

    def stop(item: int, folder: str) -> None:
        found.append(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.map_on_nodes(partial(attempt, tmp_path), [3, 4], on_result=stop, num_cpus=0.5)  # 3 has no end
    assert found == [os.getcwd()]  # a relative path means on a node what it means here
    # Neither takes up room any more.
    cluster.map_on_nodes(partial(meet, tmp_path), [0, 1], on_result=lambda *_: None, num_cpus=0.5)


def test_a_node_without_the_package_is_one_line(nodes: Nodes, address: str, connected: Driver, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['lscollapse'] = None\n")  # cannot be imported
    nodes.start("bare", f"--address={address}", PYTHONPATH=str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"node \S+ has lscollapse none, this machine has \d"):
        cluster.map_on_nodes(partial(meet, tmp_path), [0, 1], on_result=lambda *_: None)  # needs both
    nodes.kill("bare")


def test_a_node_that_dies_with_all_the_room_there_is(
    nodes: Nodes, address: str, connected: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "LOOKS_EVERY", 0.5)
    nodes.start("wide", f"--address={address}", "--num-gpus=4")
    with pytest.raises(cluster.ClusterError, match=r"takes 0\.5 CPUs and 2 GPUs, and no node has as many"):
        cluster.map_on_nodes(
            partial(attempt, tmp_path), [4, 3], on_result=lambda *_: nodes.kill("wide"), num_cpus=0.5, num_gpus=2
        )  # 3 has no end


def test_a_head_that_dies_is_one_line(
    nodes: Nodes, connected: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "LOOKS_EVERY", 1.0)
    monkeypatch.setattr(ray_driver, "ANSWERS_WITHIN", 5.0)
    with pytest.raises(
        cluster.ClusterError, match=r"connection to Ray was lost: .* the same command continues"
    ) as error:
        cluster.map_on_nodes(partial(attempt, tmp_path), [4], on_result=lambda *_: nodes.kill("head") or [3])
    assert len(str(error.value)) < 400
