"""Values that no verb can mean: one line and exit 2, before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lscollapse.core.outside import LONGEST
from tests.integration.cli.test_app import Shell, shell

__all__ = ["shell"]  # the fixture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0"], "steps: input should be greater than or equal to 1, got 0"),
        (["train", "--steps", "-1"], "steps: input should be greater than or equal to 1, got -1"),
        (["train", "--steps", "99999999999"], "steps: input should be less than or equal to 1000000000"),
        (["train", "--lr", "0"], "lr: input should be greater than 0, got 0.0"),
        (["train", "--lr", "inf"], "lr: input should be a finite number, got inf"),
        (["train", "--lr", "nan"], "lr: input should be a finite number, got nan"),
        (["train", "--seed", "-1"], "seeds.0: input should be greater than or equal to 0, got -1"),
        (["train", "--seed", str(2**63)], "seeds.0: input should be less than 9223372036854775808"),
        (["train", "--lam", "1e39"], "lams.0: "),
        (["train", "--lam-init", "nan"], "lam_inits.0: input should be a finite number, got nan"),
        (["train", "--mixer", "mambo"], "mixers.0: "),
        (["table1", "--workers", "0"], "workers: input should be greater than or equal to 1"),
        (["table1", "--device", "tpu"], "device: "),
        (["sweep-lambda", "--seed", str(2**64)], "seed: input should be less than 9223372036854775808"),
        (["sweep-lambda", "--lambdas", "1e400"], "lambdas.0: input should be a finite number, got inf"),
        (["sweep-lambda", "--tokens", str(10**12)], "tokens: input should be less than or equal to"),
        (["sweep-lambda", "--excerpts", str(10**12)], "excerpts: input should be less than or equal to"),
        (
            ["sweep-lambda", "--set", "wikipedia.retry_wait=.inf"],
            "wikipedia.retry_wait: input should be a finite number",
        ),
        (["ablate-s4d", "--set", "retrain.lr=.inf"], "retrain.lr: input should be a finite number, got inf"),
        (["sweep-lambda", "--device", "tpu"], "device: 'tpu' is not known"),
        (["theory", "verify", "--instances", "0"], "--instances 0: give a number from 1 to 1,000,000"),
        (["theory", "verify", "--instances", str(10**30)], ": give a number from 1 to 1,000,000"),
        (["theory", "verify", "--seed", "-1"], "--seed -1: give a number from 0 to"),
        (["compare", "a", "b", "--lines", "-1"], "--lines -1: give a number from 0 to 1,000,000"),
        (["verify-kernels", "--device", "tpu"], "on cpu or cuda"),
        (["sweep-lambda", "--model", "a" * 5000], "unknown model 'aaa"),
        (["sweep-lambda", "--model", "x/" + "a" * 5000], "it is not a hub id of the form owner/name"),
        (["sweep-lambda", "--source", "a\x1b[31m"], r"an argument holds \x1b"),
        (["figures", "half \udcff"], r"an argument holds \udcff"),
    ],
    ids=lambda value: " ".join(value)[:50].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_values_that_no_verb_can_mean(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = shell.refused(*arguments)
    assert message in line and len(line) <= LONGEST + 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep-lambda", "--config", "pipe.yaml"],
        ["sweep-lambda", "--model", "./pipe.yaml"],
        ["excerpts", "out.jsonl", "--source", "pipe.jsonl"],
        ["excerpts", "out.jsonl", "--source", "pipe.parquet"],
        ["excerpts", "out.jsonl", "--source", "wikipedia", "--titles", "pipe.yaml"],
        ["excerpts", "out.jsonl", "--source", "/dev/zero"],
        ["excerpts", "out.jsonl", "--tokenizer", "./pipe.yaml"],
        ["excerpts", "out.jsonl", "--tokenizer", "folder"],
    ],
    ids=" ".join,
)
def test_a_pipe_or_a_device_is_no_input(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("pipe.yaml", "pipe.jsonl", "pipe.parquet", "folder/config.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "folder" / "vocab.txt").write_text("a\n")
    shell.refused(*arguments)
    assert not (tmp_path / "out.jsonl").exists()


def test_only_verbs_that_go_on_say_so(shell: Shell, tmp_path: Path) -> None:
    """Where the disk fails a verb that leaves nothing to go on from."""
    (tmp_path / "file").write_text("")
    line = shell.refused("theory", "examples", "--out", tmp_path / "file" / "x")
    assert "Not a directory" in line and "kept" not in line


def test_titles_are_a_path_not_yaml(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1 #a: b").write_text("\x07\n")
    line = shell.refused("excerpts", "out.jsonl", "--source", "wikipedia", "--titles", "1 #a: b")
    assert r"1 #a: b, line 1: \x07 is no title" in line
