"""Kill the program wherever it may be killed, start it again, and compare with a run that was left alone.

    make kill-test
    .venv/bin/python scripts/kill_test.py --minutes 20 --only sweep,train --seed 0

Every case is a verb on tiny inputs. It is killed (SIGKILL) before each operation on a file in its folder (opening for writing,
fsync, rename, remove, making or removing a folder), as many as time allows, evenly over all of them, and at random instants.
Then the same command runs again: it has to end well, its files have to be those of a run that nobody killed, byte for byte
but for times, and no other file may be there, nor a process. Exit 1 where it is not so; the last lines are the counts.

Each run is a copy of this process, which has imported what the verbs need: a fork takes milliseconds, an import seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = "work"  # the folder in which a command runs, and which is compared
WATCHED = {
    "os.rename": 2,
    "os.remove": 1,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
}  # audited: paths
VARYING = (
    "wall_seconds",
    "peak_rss_bytes",
    "git",
    "engine",
    "items_of_node",
)  # of a manifest: when, beside which changes, and on Ray where, it was measured
INSTANTS = 280  # at random, in all cases together
LONGEST = 300.0  # seconds that a run may take
NO_STATE = ("state.pt",)  # it holds seconds too; that it is there is compared
YAML = """mixers: [attention, mamba2]
lams: [1]
seeds: [0]
measured: 2
tensorboard: false
workers: {workers}
mqar:
  data: {{seq_len: 12, pairs: 2, vocab_size: 16, train: 24, validation: 10, test: 12}}
  net: {{hidden_size: 8, num_hidden_layers: 1, state_size: 4, heads: 2, head_dim: 8, mlp_ratio: 2}}
  training: {{steps: 4, batch: 8, save_every: 2, evaluate_every: 2}}
  lrs: [1.0e-2]
"""


@dataclass
class Case:
    """What is killed.

    Attributes:
        run: the words of a command, or, where its figures would take most of the time, what the verb calls before it draws.
        slow: it draws, or starts interpreters of its own: killed at few places.
        patience: seconds after its end in which its processes have to end too.
        prepare: what the copy of this process does first.
        operations: how many there are, known from a run that was left alone, as `seconds` and `files` are.
    """

    name: str
    run: list[str] | Callable[[], object]
    slow: bool = False
    patience: float = 10.0
    prepare: Callable[[], None] = lambda: None
    operations: int = 0
    seconds: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Tally:
    """What came of the kills: how many there were before an operation and at an instant, and what was wrong after which."""

    killed: Counter[tuple[str, str]] = field(default_factory=Counter)
    survived: int = 0  # an instant after the end
    untried: int = 0  # when time was over
    wrong: list[str] = field(default_factory=list)


class Killed:
    """Counts operations on files under a folder, and kills this process before the `last`-th."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.root, self.last, self.count = str(folder), last, 0
        self._fsync = os.fsync

    def install(self) -> None:
        sys.addaudithook(self._event)
        os.fsync = self._sync  # which is not audited

    def _sync(self, handle: Any) -> None:
        link = Path(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        if not link.exists() or self._is_inside(os.readlink(link)):
            self._one()
        self._fsync(handle)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and self._is_inside(path):
                self._one()
        elif event in WATCHED and any(map(self._is_inside, arguments[: WATCHED[event]])):
            self._one()

    def _is_inside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a file that is open already
        name = os.fsdecode(path)
        return not os.path.isabs(name) or name.startswith(self.root)

    def _one(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def start(case: Case, folder: Path, last: int | None = None) -> int:
    """Begin the command in a process of its own, in `folder`/WORK, and return its number; see Killed for `last`."""
    work = folder / WORK
    work.mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(work)
        with (folder / "said").open("wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        case.prepare()
        watch = Killed(work, last)
        watch.install()
        code = _main(case.run)
        (folder / "count").write_text(str(watch.count))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _main(run: list[str] | Callable[[], object]) -> int:
    from lscollapse.cli import app

    if callable(run):
        run()
        return 0
    sys.argv = ["lscollapse", *run]
    try:
        app.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def ended(process: int, patience: float) -> tuple[int, list[str]]:
    """How a process ended (its exit code, negative of a signal), and whether others of its group outlived it by `patience` seconds."""
    until, code = time.monotonic() + LONGEST, None
    while code is None:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
        else:
            time.sleep(0.002)
    until, left = time.monotonic() + patience, []
    while True:  # its orphans are children of this process, where Linux is asked for it
        try:
            if os.waitpid(-process, os.WNOHANG)[0] == 0:
                if time.monotonic() > until:
                    os.killpg(process, signal.SIGKILL)
                    left = [f"processes that it started outlived it by {patience:g} s"]
                time.sleep(0.01)
        except ChildProcessError:
            return code, left


def tree(work: Path) -> dict[str, bytes]:
    """Every file of a folder, without what differs from run to run."""
    found: dict[str, bytes] = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if path.is_symlink():
            found[name] = os.fsencode(os.readlink(path))
        elif path.is_dir():
            found[f"{name}/"] = b""
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            found[name] = json.dumps({key: value for key, value in manifest.items() if key not in VARYING}).encode()
        elif path.name == "log.csv":
            lines = (line.split(",") for line in path.read_text().split())
            found[name] = "\n".join(",".join([line[0], *line[2:]]) for line in lines).encode()
        else:
            found[name] = b"" if path.name in NO_STATE else path.read_bytes()
    return found


def left_alone(case: Case, folder: Path) -> None:
    """Run the command once to its end, for what it makes, how long it takes, and how many operations it is."""
    began = time.monotonic()
    code, _ = ended(start(case, folder), case.patience)
    if code:
        raise SystemExit(f"{case.name} does not even run ({code}): {(folder / 'said').read_text()[-2000:]}")
    case.seconds, case.operations = time.monotonic() - began, int((folder / "count").read_text())
    case.files = tree(folder / WORK)


def killed_and_continued(case: Case, folder: Path, tally: Tally, last: int | None, instant: float = 0.0) -> None:
    """One kill, before an operation or after some seconds, then the command again, then the comparison."""
    process, how = start(case, folder, last), "operation" if last else "instant"
    if last is None:
        time.sleep(instant)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    code, outlived = ended(process, case.patience)
    at = f"{case.name}, killed {f'before operation {last}' if last else f'after {instant:.3f} s'}"
    if code == -signal.SIGKILL:
        tally.killed[case.name, how] += 1
    elif code == 0:
        tally.survived += 1
    else:
        tally.wrong.append(f"{at}: it ended with {code} before that: {_said(folder)}")
        return
    again, more = ended(start(case, folder), case.patience)
    found = tree(folder / WORK)
    problems = outlived + more + ([f"the second time it ends with {again}: {_said(folder)}"] if again else [])
    problems += [f"{name} is left" for name in sorted(set(found) - set(case.files))]
    problems += [f"{name} is missing" for name in sorted(set(case.files) - set(found))]
    problems += [
        f"{name} is another" for name in sorted(set(found) & set(case.files)) if found[name] != case.files[name]
    ]
    if problems:
        tally.wrong.append(f"{at}: {'; '.join(problems[:5])}")
        print(tally.wrong[-1], flush=True)


def _said(folder: Path) -> str:
    return (folder / "said").read_text(errors="replace").strip()[-300:]


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what is killed ---


def load() -> None:
    """Import what the verbs need, so that copies of this process need not."""
    from lscollapse.cli.terminal import bar, paper, prepare, results  # noqa: F401
    from lscollapse.core import hub  # noqa: F401
    from lscollapse.data import corpus  # noqa: F401
    from lscollapse.experiments import paper as experiments  # noqa: F401
    from lscollapse.experiments.table1 import grid  # noqa: F401
    from lscollapse.reports.page import page  # noqa: F401


def inputs(folder: Path) -> None:
    """A tiny Mamba-2, frozen excerpts, texts, and configurations of Table 1."""
    from tests.equivalence import tiny

    tiny.mamba2(1, 2).save_pretrained(folder / "net")
    with (folder / "frozen.jsonl").open("w", encoding="utf-8") as lines:
        for number, ids in enumerate(tiny.ids(9, 6).tolist()):
            head = {"title": f"T{number}", "text_sha256": "0" * 64, "tokenizer": "t", "source": "s"}
            lines.write(json.dumps(head | {"ids": ids}) + "\n")
    words = "The lamp in the harbour is lit before the boats come in, and nobody knows who lights it."
    (folder / "texts.txt").write_text("\n\n".join(f"{number}. {words}" for number in range(4)), encoding="utf-8")
    for workers in (1, 2):
        (folder / f"table1-{workers}.yaml").write_text(YAML.format(workers=workers), encoding="utf-8")


def cases(folder: Path, hub_url: str, ray: bool) -> list[Case]:
    """The first makes `finished`, which others read."""
    from lscollapse.core.config import Experiment, configure
    from lscollapse.experiments import paper
    from lscollapse.experiments.table1 import grid
    from lscollapse.experiments.table1.schema import Table1

    config = Experiment(models=[str(folder / "net")], lambdas=[-2.0, 1.0], source=str(folder / "frozen.jsonl"),
                        excerpts=9, tokens=6, offline=True)  # fmt: skip
    on_ray = config.model_copy(update={"engine": "ray"})
    measured = ["--source", config.source, "--excerpts", "9", "--tokens", "6", "--offline", "--out", "run"]
    texts = ["--source", str(folder / "texts.txt"), "--excerpts", "3", "--tokens", "8"]
    finished, out = folder / "finished" / WORK / "run", Path("run")
    tables = [folder / f"table1-{workers}.yaml" for workers in (1, 2)]
    found = [
        Case("sweep", lambda: paper.sweep_lambda(config, out)),
        Case("ablate", lambda: paper.ablate_gating(config, out)),
        Case("table1", lambda: grid.run(configure(Table1, tables[0]), out)),
        Case("train", ["train", "--config", str(tables[0]), "--lr", "0.01", "--out", "run"]),
        Case("excerpts", ["excerpts", "frozen.jsonl", *texts]),
        Case("report", ["report", str(finished), "-o", "report.html"]),
        Case("fetch", ["fetch", "tiny/net"], prepare=lambda: _use_hub(hub_url)),
        Case("figures", ["figures", str(finished), "--to", "drawn"], slow=True),
        Case("sweep-lambda", ["sweep-lambda", "--model", config.models[0], "--lambdas=-2,1", *measured], slow=True),
        Case("table1 by 2 processes", lambda: grid.run(configure(Table1, tables[1]), out), slow=True),
    ]
    return [
        *found,
        *([Case("sweep on Ray", lambda: paper.sweep_lambda(on_ray, out), slow=True, patience=60.0)] if ray else []),
    ]


def _use_hub(url: str) -> None:
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE = url, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.HF_HUB_CACHE = str(Path.cwd() / "hub")
    os.environ["HF_HUB_CACHE"] = constants.HF_HUB_CACHE


def _adopt_orphans() -> None:
    """Processes whose parent was killed become children of this one, so that their end can be waited for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 1..total, evenly; all where there are no more."""
    wanted = min(total, wanted)
    return sorted({1 + round(i * (total - 1) / max(1, wanted - 1)) for i in range(wanted)})


def plan(chosen: list[Case], seed: int, each: int) -> list[tuple[Case, int | None, float]]:
    """(case, operation or None, seconds) of every kill, in an order that does justice to all cases wherever time ends it."""
    draw, kills = random.Random(seed), []
    for case in chosen:
        wanted = min(each, 3) if case.slow else each
        kills += [(case, last, 0.0) for last in spread(case.operations, wanted)]
    quick = [case for case in chosen if not case.slow] or chosen
    at_random = [case for case in chosen if case.slow] + draw.choices(quick, k=min(INSTANTS, 40 * each))
    kills += [(case, None, draw.random() * case.seconds) for case in at_random]
    draw.shuffle(kills)
    return kills


def kill_all(chosen: list[Case], base: Path, seed: int, each: int, jobs: int, until: float) -> Tally:
    """All kills of the plan, `jobs` at a time, each job a copy of this process."""
    kills, context = plan(chosen, seed, each), multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    for job in range(jobs):
        context.Process(target=_job, args=(kills[job::jobs], base, until, told)).start()
    whole = Tally()
    for _ in range(jobs):
        part = told.get()
        whole.killed += part.killed
        whole.survived += part.survived
        whole.wrong += part.wrong
        whole.untried += part.untried
    return whole


def _job(kills: list[tuple[Case, int | None, float]], base: Path, until: float, told: Any) -> None:
    _adopt_orphans()
    tally = Tally()
    for number, (case, last, instant) in enumerate(kills):
        if time.monotonic() > until:
            tally.untried = len(kills) - number
            break
        with scratch(base) as folder:
            killed_and_continued(case, folder, tally, last, instant)
        if number % 50 == 49:
            print(f"{number + 1} of {len(kills)}, {len(tally.wrong)} wrong", flush=True)
    told.put(tally)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=20.0, help="when it ends, whatever is left")
    arguments.add_argument("--only", default="", help="names of cases, comma-separated")
    arguments.add_argument("--each", type=int, default=10**6, help="operations of each case before which it is killed")
    arguments.add_argument("--jobs", type=int, default=2, help="how many at a time")
    arguments.add_argument("--seed", type=int, default=0, help="of the random instants and the order")
    asked = arguments.parse_args()
    until = time.monotonic() + 60 * asked.minutes
    sys.path.insert(0, str(ROOT))
    from lscollapse.reports import painter
    from tests.servers.hub import HubServer

    _adopt_orphans()
    load()
    painter._load()
    with tempfile.TemporaryDirectory(prefix="kill-test-") as name:
        base = Path(name)
        os.environ["LSCOLLAPSE_CACHE"] = str(base / "cache")
        inputs(base)
        with HubServer({"tiny/net": {file.name: file.read_bytes() for file in (base / "net").iterdir()}}) as server:
            for each in (server._hub, server._cdn):
                each.handle_error = lambda *_: None  # whoever asked was killed
            every = cases(base, server.url, importlib.util.find_spec("ray") is not None)
            chosen = [case for case in every if not asked.only or case.name in asked.only.split(",")]
            (base / "finished").mkdir()
            left_alone(every[0], base / "finished")
            for case in chosen:
                with scratch(base) as folder:
                    left_alone(case, folder)
                print(
                    f"{case.name}: {case.operations} operations, {case.seconds:.1f} s, {len(case.files)} files",
                    flush=True,
                )
            tally = kill_all(chosen, base, asked.seed, asked.each, asked.jobs, until)
    return told(chosen, tally)


def told(chosen: list[Case], tally: Tally) -> int:
    for case in chosen:
        before, at = (tally.killed[case.name, how] for how in ("operation", "instant"))
        print(f"{case.name}: killed before {before} of {case.operations} operations and at {at} instants")
    kills = sum(tally.killed.values())
    print(
        f"{kills} kills: {len(tally.wrong)} wrong ({tally.survived} came after the end, for {tally.untried} there was no time)"
    )
    for line in tally.wrong:
        print(f"  {line}")
    return int(bool(tally.wrong) or not kills)


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = "1"  # a copy of a process has none of its threads
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    sys.exit(main())
