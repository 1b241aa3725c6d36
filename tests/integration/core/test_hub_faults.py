"""A hub that stalls, drips, cuts, lies about names and digests, or is not the hub at all; and a cache that was altered."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session

from lscollapse.core import files, hub, hub_client, outside, web
from lscollapse.core.hub import DamagedError, HubError
from tests import ROOT
from tests.servers.hub import HubServer

REPO = "tiny/plain"
WEIGHTS = bytes(range(256)) * 40  # 10,237 bytes
CONFIG = b'{"model_type": "none", "padding": "' + b"x" * 500 + b'"}'
TOKENIZER = b'{"version": "1.0"}'
_RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def server(monkeypatch):
    repos = {REPO: {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": TOKENIZER}}
    with HubServer(repos) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + _RESOLVE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(web, "WAITS", (0.0, 0.0, 0.0, 0.0))
        yield running


def fetched(cache, **arguments):
    folder = hub.fetch(REPO, cache_dir=cache / "hub", **arguments)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(cache, error=HubError, **arguments):
    with pytest.raises(HubError) as caught:
        hub.fetch(REPO, cache_dir=cache / "hub", **arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert outside.one_line(message) == message  # short, and without a character that a terminal obeys
    assert REPO in message or constants.ENDPOINT in message
    return message


def altered(path):
    """Four other bytes in the middle of a file, of the same length."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(byte ^ 255 for byte in data[middle : middle + 4])
    path.write_bytes(data)
    return path


ALL = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": TOKENIZER}


@pytest.mark.parametrize("fault", [{"stall": "info"}, {"stall": "headers"}, {"drip": True}])
def test_an_answer_that_never_ends(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(web, "API_DEADLINE", 0.2)
    vars(server.faults).update(fault)
    message = fails(tmp_path)
    assert "no whole answer within 0.2 s" in message and "--offline" in message
    assert len(server.calls) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_stalls(server, tmp_path, monkeypatch, name):
    """What came is kept, and the next run brings the rest."""
    monkeypatch.setattr(web, "BODY_DEADLINE", 0.6)
    monkeypatch.setattr(web, "WAITS", ())
    server.faults.stall = "file"
    message = fails(tmp_path, files=[name])
    assert f"stalls, no byte of it within 0.6 s for {REPO}/{name}" in message and "kept" in message
    (partial,) = tmp_path.rglob("*.partial")
    assert partial.read_bytes() == ALL[name][: len(ALL[name]) // 2]
    server.faults.stall = ""
    server.calls.clear()
    assert fetched(tmp_path, files=[name]) == {name: ALL[name]}
    (download,) = [*server.downloads(), *server.small_downloads()]
    assert download.range == f"bytes={len(ALL[name]) // 2}-"
    assert not [*tmp_path.rglob("*.partial")]


def test_a_silent_connection_is_made_anew(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "BODY_DEADLINE", 0.6)
    server.faults.stall = "once"
    assert fetched(tmp_path, files=["model.safetensors"]) == {"model.safetensors": WEIGHTS}
    assert [call.range for call in server.downloads()] == [None, f"bytes={len(WEIGHTS) // 2}-"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_is_cut_again_and_again(server, tmp_path, name):
    """The file arrives in more pieces than there are tries, and none of it twice."""
    server.faults.at_most = len(ALL[name]) // 9
    assert fetched(tmp_path, files=[name]) == {name: ALL[name]}
    downloads = [*server.downloads(), *server.small_downloads()]
    assert len(downloads) == 10 > len(web.WAITS) + 1
    assert sum(call.sent for call in downloads) == len(ALL[name])


def test_an_endpoint_that_is_no_address(server, tmp_path, monkeypatch):
    for address in ("http://127.0.0.1:x", "ftp://127.0.0.1", "127.0.0.1"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert "an address that leads nowhere" in fails(tmp_path)


def test_a_server_that_cannot_begin_in_the_middle(server, tmp_path):
    server.faults.cuts, server.faults.ranges = 1, False
    assert fetched(tmp_path, files=["model.safetensors"]) == {"model.safetensors": WEIGHTS}


def test_a_small_file_is_tried_again(server, tmp_path):
    server.faults.cuts = 2
    assert fetched(tmp_path, files=["config.json"]) == {"config.json": CONFIG}


def test_a_partial_file_that_is_too_long(server, tmp_path):
    server.faults.cuts, server.faults.cdn = 1, [0, 404]
    fails(tmp_path, files=["model.safetensors"])
    (partial,) = tmp_path.rglob("*.partial")
    partial.write_bytes(WEIGHTS + b"more")
    assert fetched(tmp_path, files=["model.safetensors"]) == {"model.safetensors": WEIGHTS}


def test_a_file_of_another_length(server, tmp_path):
    server.faults.longer = True
    assert f"bytes from 0 of {len(WEIGHTS) + 1}, where those from 0 of {len(WEIGHTS)} are due from 127.0.0.1:" in fails(
        tmp_path, files=["model.safetensors"]
    )


def test_a_mirror_that_states_no_digests(server, tmp_path):
    def bare(info):
        return {**info, "siblings": [{"rfilename": entry["rfilename"]} for entry in info["siblings"]]}

    server.faults.edit = bare
    server.faults.cuts = 1
    assert fetched(tmp_path) == ALL


@pytest.mark.parametrize(
    ("portal", "where"),
    [("info", "a web page where JSON is due (text/html, 37 bytes)"), ("file", "a web page in place")],
)
def test_a_captive_portal_is_named(server, tmp_path, portal, where):
    server.faults.portal = portal
    message = fails(tmp_path)
    assert where in message and "sign in to the network" in message and "HF_ENDPOINT" in message
    assert not [path for path in tmp_path.rglob("*.partial") if path.stat().st_size]


def test_another_host_is_named(server, tmp_path):
    server.faults.portal = "elsewhere"
    assert f"37 bytes from {server.cdn_url.removeprefix('http://')})" in fails(tmp_path)


def listed(**entry):
    """The listing with other values for the weights."""

    def edit(info):
        lfs = entry.get("lfs")
        siblings = [
            {**file, **entry, **({"lfs": {**file["lfs"], **lfs}} if isinstance(lfs, dict) else {})}
            if file["rfilename"] == "model.safetensors"
            else file
            for file in info["siblings"]
        ]
        return {**info, "siblings": siblings}

    return edit


DEEP = json.loads("[" * 90 + "]" * 90)


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (listed(lfs={"sha256": "../../../stray"}), "siblings.1.lfs.sha256"),
        (listed(lfs={"sha256": "/tmp/stray"}), "siblings.1.lfs.sha256"),
        (listed(lfs={"sha256": "0" * 64 + "\n"}), "siblings.1.lfs.sha256"),
        (listed(lfs={"sha256": None}), "siblings.1.lfs.sha256"),
        (listed(lfs={"size": -1}), "siblings.1.lfs.size"),
        (listed(lfs="none"), "siblings.1.lfs"),
        (listed(blobId="../stray"), "siblings.1.blobId"),
        (listed(rfilename="../stray.safetensors"), "siblings.1.rfilename"),
        (listed(rfilename="/stray.safetensors"), "siblings.1.rfilename"),
        (listed(rfilename="a/../../stray"), "siblings.1.rfilename"),
        (listed(rfilename="a\\..\\stray"), "siblings.1.rfilename"),
        (listed(rfilename="C:stray"), "siblings.1.rfilename"),
        (listed(rfilename="\x1b[2Jstray"), "siblings.1.rfilename"),
        (listed(rfilename=["stray"]), "siblings.1.rfilename"),
        (lambda info: {**info, "sha": "../../stray"}, "sha"),
        (lambda info: {**info, "sha": None}, "sha"),
        (lambda info: {**info, "siblings": "none"}, "siblings"),
        (lambda info: {**info, "siblings": [1]}, "siblings.0"),
        (lambda info: [info], "a valid dictionary"),
        (lambda info: "\x1b[2J", "a valid dictionary"),
        (lambda info: {**info, "tags": "\ud800"}, "half of a character"),
        (lambda info: {**info, "tags": DEEP}, "64 levels"),
    ],
)
def test_a_listing_of_another_shape(server, tmp_path, edit, place):
    server.faults.edit = edit
    message = fails(tmp_path)
    assert place in message and "127.0.0.1" in message
    assert [*tmp_path.rglob("*")] == []  # nothing is written, in the cache or beside it


def test_a_file_name_is_shown_without_its_escapes(server, tmp_path):
    server.faults.edit = lambda info: {**info, "siblings": [{"rfilename": "\u202e\u2066model.onnx"}]}
    assert "\\u202e" in fails(tmp_path)


@pytest.mark.parametrize("revision", ["../../main", "/etc", "a\x1b[2J", "a\\b"])
def test_a_revision_stays_in_the_cache(server, tmp_path, revision):
    for offline in (False, True):
        assert "is no revision" in fails(tmp_path, revision=revision, offline=offline)
    assert server.calls == []


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


def test_the_hub_client_of_others_is_given_up_too(server, monkeypatch):
    """`datasets` streams by it: a request that is repeated and brings no byte ends in our error, which nobody retries."""
    monkeypatch.setattr(web, "BODY_DEADLINE", 0.1)
    monkeypatch.setattr(web, "API_DEADLINE", 0.1)
    server.faults.stall = "headers"
    with hub_client.watched(), pytest.raises(web.Late, match=r"no byte from 127\.0\.0\.1 within 0\.1 s"):
        for _ in range(9):
            with suppress(HTTPError):
                get_session().get(f"{server.url}/api/models/{REPO}", timeout=None)
    server.faults.stall = ""
    monkeypatch.setattr(web, "BODY_DEADLINE", 60.0)
    with hub_client.watched() as watch:
        for path, content in (
            (f"{REPO}/resolve/main/config.json", CONFIG),
            (f"{REPO}/resolve/main/tokenizer.json", TOKENIZER),
        ):
            watch.since = begun = time.monotonic() - 50
            assert get_session().get(f"{server.url}/{path}").content == content
            assert watch.since > begun + 50


def test_a_token_that_cannot_be_one_is_not_repeated(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    assert "hf_s" not in fails(tmp_path) and server.calls == []


def test_the_terminal_shows_one_line_and_no_more(server, tmp_path):
    """As it is installed: cuts and busy answers on the way, then a refusal."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lscollapse", "fetch"]

    def run(repo):
        return subprocess.run(
            [*command, repo], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

    server.faults.info, server.faults.cdn = [503], [503]
    good = run(REPO)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.strip().endswith(server.commit(REPO))
    bad = run("tiny/unheard-of")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "tiny/unheard-of does not exist" in bad.stderr
