"""The command line as a user meets it: a mistake is one line and exit 2, a run survives kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from lscollapse.core import assets, config, registry
from lscollapse.core.rows import read_rows
from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.experiments import paper
from tests import ROOT
from tests.integration.reports.test_page import write_run
from tests.unit.reports.figures.test_massive import SINK, table
from tests.verbs import run

HEAVY = ("torch", "pandas", "transformers", "matplotlib", "pyarrow", "scipy", "datasets", "tokenizers", "numpy")
DEADLINE = 120.0


@pytest.fixture
def minilm() -> str:
    try:
        registry.embedded_files(registry.resolve("minilm-l6"))
        assets.locate(assets.SUMMARIES)
    except assets.AssetError as error:
        pytest.skip(str(error))
    return "minilm-l6"


class Shell:
    """`lscollapse ARGUMENTS` in this process: its exit code, and what it wrote."""

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        return run(arguments)

    def refused(self, *arguments: str | Path) -> str:
        """The one line of an error."""
        code, out, err = self(*arguments)
        assert code == 2, (code, out, err)
        assert err.startswith("lscollapse: ") and err.endswith("\n"), err
        assert err.count("\n") == 1 and "Traceback" not in err + out, err
        return err


@pytest.fixture
def shell() -> Shell:
    return Shell()


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False)


# --- help and usage -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["sweep-lambda", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['lscollapse', *{arguments!r}]\n"
        "from lscollapse.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        f"    print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    found = python("-c", program)
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip().endswith("LOADED []")


@pytest.mark.parametrize("verb", ["models", "claims"])
def test_verbs_that_only_list_load_neither_torch_nor_scipy(verb: str) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['lscollapse', {verb!r}]\n"
        "from lscollapse.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    print('LOADED', sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))\n"
    )
    found = python("-c", program)
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip().endswith("LOADED []")


@pytest.mark.parametrize("arguments", [("--device", "tpu"), ("--kernels", "none")])
def test_kernels_that_do_not_exist_are_no_kernels_to_verify(shell: Shell, arguments: tuple[str, str]) -> None:
    assert "choose auto, native, torch, triton, mamba-ssm, on cpu or cuda" in shell.refused(
        "verify-kernels", *arguments
    )


def test_figures_are_compared_with_figures(shell: Shell, tmp_path: Path) -> None:
    shutil.copy(ROOT / "results" / "reference" / "figure4.csv", tmp_path)
    code, out, err = shell("compare", ROOT / "results" / "reference", tmp_path)
    assert (code, err) == (0, "") and out.startswith("figure4: agrees within 1e-4 (264 points)\n")
    assert "holds figures and" in shell.refused("compare", tmp_path, tmp_path / "nowhere")
    (tmp_path / "figure4.csv").write_text("model,lam\n", encoding="utf-8")
    assert "figure4.csv is not the points of a figure" in shell.refused("compare", tmp_path, tmp_path)


def test_debug_shows_the_traceback() -> None:
    found = python("-m", "lscollapse", "--debug", "sweep-lambda", "--lambdas", "one")
    assert found.returncode != 0
    assert "Traceback" in found.stderr and "ConfigError: --lambdas takes numbers" in found.stderr


def test_debug_does_not_stay_on(shell: Shell) -> None:
    with pytest.raises(ValueError, match="--lambdas takes numbers"):
        shell("--debug", "sweep-lambda", "--lambdas", "one")
    shell.refused("sweep-lambda", "--lambdas", "one")


@pytest.mark.parametrize(
    "arguments",
    [["sweep-lambda", "--lambda", "3"], ["sweep"], ["sweep-lambda", "--excerpts", "many"], ["figures"], ["excerpts"]],
    ids=" ".join,
)
def test_usage_errors(shell: Shell, arguments: list[str]) -> None:
    code, _, err = shell(*arguments)
    assert code == 2
    assert "Usage" in err and "Traceback" not in err


def test_list_of_models(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = shell("models")
    assert code == 0
    for name in ("mamba2-tiny", "minilm-l6", "albert-smiles", "mamba2-2.7b", "albert-base-v2", "bert-base-uncased"):
        assert name in out
    assert "state-spaces/mamba2-2.7b" in out


# --- mistakes: one line, exit 2, nothing left -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambdas", "1,x"], "--lambdas takes numbers"),
        (["--lambdas", "1,,2"], "--lambdas takes numbers"),
        (["--lambdas", ""], "--lambdas takes numbers"),
        (["--lambdas", "-1,nan"], "finite"),
        (["--lambdas=-1,-1"], "given twice"),
        (["--model", "minilm-l7"], "did you mean 'minilm-l6'"),
        (["--model", "./no/such/folder"], "no folder ./no/such/folder"),
        (["--set", "lamdas=[1]"], "did you mean 'lambdas'"),
        (["--set", "lambdas=[1, 2"], "lambdas"),
        (["--set", "seed"], "key=value"),
        (["--source", "packagd"], "unknown source 'packagd'"),
        (["--source", "no-such-file.txt"], "no-such-file.txt"),
        (["--tokens", "100000"], "100000"),
        (["--tokens", "600", "--source", "TEXTS"], "0 texts of at least 600 tokens"),
        (["--excerpts", "4", "--tokens", "8", "--source", "TEXTS"], "2 texts of at least 8 tokens"),
        (["--excerpts", "0"], "excerpts"),
        (["--skip-site", "mixer"], "skip_site 'mixer' does not exist in bert"),
        (["--skip-site", "nowhere"], "skip_site"),
        (["--dtype", "float16"], "dtype"),
        (["--device", "tpu"], "'tpu' is not known"),
        (["--config", "no-such.yaml"], "no configuration file no-such.yaml"),
        (["--lambdas-file", "no-such.csv"], "no-such.csv"),
        (["--titles", "no-such.txt", "--source", "wikipedia"], "no-such.txt cannot be read: there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_a_sweep(shell: Shell, minilm: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("A first text that is long enough.\n\nA second one, long enough for it too.\n\nNot this.\n")
    arguments = [str(texts) if a == "TEXTS" else a for a in arguments]
    model = [] if "--model" in arguments else ["--model", minilm]
    line = shell.refused("sweep-lambda", *model, "--out", tmp_path / "run", *arguments)
    assert message in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts.txt"], "a refused run leaves no folder"


def test_unwritable_folder(shell: Shell, minilm: str, tmp_path: Path) -> None:
    """A file is in the way: unwritable for root too."""
    (tmp_path / "file").write_text("x")
    small = ("--model", minilm, "--excerpts", "1", "--tokens", "4", "--lambdas", "1")
    line = shell.refused("sweep-lambda", *small, "--out", tmp_path / "file" / "run")
    assert "cannot write the run folder" in line
    assert (tmp_path / "file").read_text() == "x"


def test_excerpts_to_an_unwritable_file(shell: Shell, minilm: str, tmp_path: Path) -> None:
    line = shell.refused("excerpts", tmp_path / "none" / "e.jsonl", "--excerpts", "1", "--tokens", "4")
    assert "cannot be written" in line
    assert list(tmp_path.iterdir()) == []


def test_figures_of_no_run(shell: Shell, tmp_path: Path) -> None:
    assert "has no rows.parquet" in shell.refused("figures", tmp_path)


def test_angular_figures_of_a_run_that_has_and_of_one_that_lacks_the_measure(shell: Shell, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "measure", table(SINK))
    command = ("figures", run, "--to", tmp_path / "drawn", "--measure", "angular_mu")
    assert shell(*command)[0] == 0
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == {
        f"figure1-angular.{k}" for k in ("png", "pdf", "csv")
    }
    old = write_run(tmp_path / "old", "measure", table({"relative_mu": SINK["relative_mu"]}))
    assert "no rows of angular_mu" in shell.refused("figures", old, "--measure", "angular_mu")
    assert shell("figures", run, "--measure", "mu")[0] == 2


# --- runs -----------------------------------------------------------------------------------------


def test_frozen_excerpts_give_the_same_rows(shell: Shell, minilm: str, tmp_path: Path) -> None:
    """From a file that holds more than is asked for. And the folder refuses another configuration by name."""
    frozen, out = tmp_path / "frozen.jsonl", tmp_path / "run"
    code, said, _ = shell("excerpts", frozen, "--excerpts", "4", "--tokens", "8", "--seed", "3")
    assert code == 0
    assert "4 excerpts" in said
    command = (
        "sweep-lambda",
        "--model",
        minilm,
        "--excerpts",
        "3",
        "--lambdas",
        "-2,0,1",
        "--source",
        frozen,
        "--out",
        out,
    )
    code, said, _ = shell(*command, "--tokens", "8", "--seed", "3")
    assert code == 0
    assert minilm in said
    settings = {"models": [minilm], "excerpts": 3, "tokens": 8, "lambdas": [-2, 0, 1], "seed": 3}
    direct = paper.sweep_lambda(config.configure(config.Experiment, flags=settings), tmp_path / "direct")
    pd.testing.assert_frame_equal(read_rows(out), direct)
    assert len(direct) == 3 * 3 * 7 * len(DEFAULT_MEASURES)

    before = {file.name: file.read_bytes() for file in out.iterdir()}
    line = shell.refused(*command, "--tokens", "7", "--seed", "3")
    assert "config.tokens: 8, now 7" in line
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}

    code, said, _ = shell("figures", out, "--to", tmp_path / "again")
    assert code == 0
    drawn = {file.name for file in (tmp_path / "again").iterdir()}
    assert {Path(name).suffix for name in drawn} == {".png", ".pdf", ".csv"}
    assert set(before) == drawn | {"rows.parquet", "rows.csv", "manifest.json"}


def test_kill_9_and_the_same_command_again(shell: Shell, minilm: str, tmp_path: Path) -> None:
    """The rows of a run that was killed and continued are those of one that was not, byte for byte."""
    command = ("sweep-lambda", "--model", minilm, "--excerpts", "24", "--tokens", "16", "--lambdas", "-4,-1,0,1,4")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "lscollapse", *command, "--out", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        end = time.monotonic() + DEADLINE
        while not list(killed.glob("parts/*.parquet")):
            assert time.monotonic() < end, "no part appeared"
            with suppress(subprocess.TimeoutExpired):  # looks again at once when the run ends, else after a moment
                pytest.fail(f"the run ended with code {process.wait(timeout=0.01)} before its first part was seen")
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "rows.parquet").exists(), "the run was over before it could be killed"
    there = len(list(killed.glob("parts/*.parquet")))
    assert 1 <= there < 7

    code, _, err = shell(*command, "--out", killed)
    assert code == 0
    assert f"is continued: {there} of 7 work items are there" in " ".join(err.split())
    settings = {"models": [minilm], "excerpts": 24, "tokens": 16, "lambdas": [-4, -1, 0, 1, 4]}
    paper.sweep_lambda(config.configure(config.Experiment, flags=settings), whole)
    for name in ("rows.parquet", "rows.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not (killed / "parts").exists()
