"""Files of a tokenizer that are damaged, too large, or no files: one line, whatever the library makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lscollapse.core.outside import plain
from lscollapse.data import tokenizers
from lscollapse.data.texts import CorpusError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "salt": 1, "road": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    path = tmp_path / "own"
    path.mkdir()
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def refused(folder: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        tokenizers.named(str(folder)).encode_batch(["salt road"])
    message = str(caught.value)
    assert "\n" not in message and plain(message) == message and str(folder)[:60] in message
    return message


def test_what_is_right_is_read(folder: Path) -> None:
    assert tokenizers.named(str(folder)).encode_batch(["salt road"]) == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 50_000),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "\\u001b[31m"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"a": ' * 5000),
        ("special_tokens_map.json", '{"unk_token": "\\ud83d"}'),
        ("added_tokens.json", "3"),
        ("config.json", "[]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_file(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_pipe_is_not_opened(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("a\n")
    os.mkfifo(folder / name)
    assert f"{name} is a pipe or a device" in refused(folder)


def test_a_file_too_large_is_not_read(folder: Path) -> None:
    with (folder / "vocab.txt").open("wb") as handle:
        handle.truncate(tokenizers.LARGEST + 1)  # takes no room on the disk
    assert "vocab.txt is 67,108,865 bytes, at most 67,108,864 are read" in refused(folder)
