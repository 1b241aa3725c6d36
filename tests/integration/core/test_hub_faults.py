"""A hub that stalls, drips, cuts, lies about names and digests, or is not the hub at all."""

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

from lscollapse.core import hub_client, web
from tests import ROOT
from tests.integration.core.plain_hub import ALL, CONFIG, REPO, TOKENIZER, WEIGHTS, fails, fetched, plain_hub


@pytest.fixture
def server(monkeypatch):
    with plain_hub(monkeypatch) as running:
        yield running


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
