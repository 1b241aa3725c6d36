"""The hub's cache on this disk: altered files, killed downloads, and the memory of digests."""

import os

import pytest

from lscollapse.core import files, hub
from lscollapse.core.hub import DamagedError
from tests.integration.core.plain_hub import ALL, REPO, fails, fetched, plain_hub


@pytest.fixture
def server(monkeypatch):
    with plain_hub(monkeypatch) as running:
        yield running


def altered(path):
    """Four other bytes in the middle of a file, of the same length."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(byte ^ 255 for byte in data[middle : middle + 4])
    path.write_bytes(data)
    return path


def test_a_damaged_ref_is_no_path(server, tmp_path):
    folder = hub.fetch(REPO, cache_dir=tmp_path / "hub")
    (folder.parents[1] / "refs" / "main").write_bytes(b"../../../..\xff")
    assert "is not in the cache" in fails(tmp_path, offline=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_altered_file_in_the_cache_is_named_offline(server, tmp_path, name):
    path = altered((hub.fetch(REPO, cache_dir=tmp_path / "hub") / name).resolve())
    message = fails(tmp_path, DamagedError, offline=True)
    assert message.startswith(f"{path} was altered") and f"delete it, then run `lscollapse fetch {REPO}" in message
    path.unlink()
    assert fetched(tmp_path) == ALL
    assert fetched(tmp_path, offline=True) == ALL


def test_a_blob_that_no_name_leads_to_is_checked_too(server, tmp_path):
    path = hub.fetch(REPO, cache_dir=tmp_path / "hub") / "model.safetensors"
    altered(path.resolve())
    path.unlink()
    assert "model.safetensors has hash" in fails(tmp_path, DamagedError)
    assert fetched(tmp_path) == ALL


def test_killed_downloads_of_other_tools_are_taken_away(server, tmp_path):
    folder = hub.fetch(REPO, cache_dir=tmp_path / "hub", files=["config.json"])
    (config,) = (folder.parents[1] / "blobs").iterdir()
    old, new = (config.with_name(f"{config.name}.{number}.incomplete") for number in ("0a1b2c3d", "4e5f6071"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    (folder / "config.json").unlink()
    hub.fetch(REPO, cache_dir=tmp_path / "hub")
    assert new.exists() and not old.exists()


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch):
    """Across processes, which forget what they computed: another digest in the memory is believed until the file changes."""
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(files, "REMEMBERED", 1000)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"x" * 1000)
    small.write_bytes(b"x")
    right = files.sha256_file(large)
    files.sha256_file(small)
    memory = tmp_path / "own" / "digests.json"
    assert memory.read_text().count(right) == 1 and memory.read_text().count(":") == 5  # of one file
    memory.write_text(memory.read_text().replace(right, "0" * 64))
    files._digests.clear()
    assert files.sha256_file(large) == "0" * 64
    os.utime(large, (0, 0))
    assert files.sha256_file(large) == right


@pytest.mark.parametrize("kept", ["", "[]", '{"a": 1}', '{"a": "../x"}', "[" * 100_000, "\x00"])
def test_a_damaged_memory_counts_as_empty(tmp_path, monkeypatch, kept):
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "REMEMBERED", 0)
    (tmp_path / "digests.json").write_text(kept)
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.sha256_file(tmp_path / "file") == digest
    assert digest in (tmp_path / "digests.json").read_text()
