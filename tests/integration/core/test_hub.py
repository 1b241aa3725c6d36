"""Fetching from a hub on loopback: cuts, wrong bytes, busy servers, refusals, and the cache of the stock client."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lscollapse.core import hub, web
from lscollapse.core.hub import HubError
from lscollapse.models.checkpoints import checkpoint
from tests import ROOT
from tests.equivalence.layouts import hf_state, write_hf, write_original
from tests.servers.hub import HubServer

ORIGINAL, HF = "tiny/original", "tiny/hf"
_RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    base = tmp_path_factory.mktemp("repos")
    hf = contents(write_hf(base / "hf"))
    return {
        ORIGINAL: contents(write_original(base / "original")),
        HF: hf | {"pytorch_model.bin": b"older copy", "README.md": b"# a card"},
        "tiny/gguf": {"model.Q4_1.gguf": b"x"},
        "tiny/none": {"config.json": b"{}", "weights.msgpack": b"x"},
    }


@pytest.fixture
def server(repos, monkeypatch):
    with HubServer(repos) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)  # what HF_ENDPOINT sets when the client is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + _RESOLVE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(web, "WAITS", (0.0, 0.0, 0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield running


def fails(repo, cache, **arguments):
    with pytest.raises(HubError) as caught:
        hub.fetch(repo, cache_dir=cache, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert repo in message or constants.ENDPOINT in message
    return message


def partials(cache):
    return list(cache.rglob("*.partial"))


def test_fetch_takes_config_and_preferred_weights(server, repos, tmp_path):
    folder = hub.fetch(HF, cache_dir=tmp_path)
    assert folder.name == server.commit(HF)
    assert contents(folder) == {name: repos[HF][name] for name in ("config.json", "model.safetensors")}
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]
    assert partials(tmp_path) == []


def test_a_second_fetch_downloads_nothing(server, tmp_path):
    hub.fetch(ORIGINAL, cache_dir=tmp_path)
    server.calls.clear()
    hub.fetch(ORIGINAL, cache_dir=tmp_path)
    assert [call.path for call in server.calls] == [f"/api/models/{ORIGINAL}/revision/main"]


def tree(folder):
    """Files and links under a folder, by their paths in it; without locks and other tools' notes."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink())
        and not {".locks", "CACHEDIR.TAG"} & set(path.relative_to(folder).parts)
    }


def test_the_cache_is_that_of_the_stock_client(server, repos, tmp_path):
    from huggingface_hub import hf_hub_download

    hub.fetch(HF, cache_dir=tmp_path / "own")
    for name in ("config.json", "model.safetensors"):
        path = hf_hub_download(HF, name, cache_dir=tmp_path / "own", local_files_only=True)
        assert Path(path).read_bytes() == repos[HF][name]
        hf_hub_download(HF, name, cache_dir=tmp_path / "stock")
    assert tree(tmp_path / "own") == tree(tmp_path / "stock")
    server.calls.clear()
    hub.fetch(HF, cache_dir=tmp_path / "stock")
    assert server.downloads() == server.small_downloads() == []


def test_named_files_and_revision(server, repos, tmp_path):
    folder = hub.fetch(HF, files=["README.md"], revision=server.commit(HF), cache_dir=tmp_path)
    assert contents(folder) == {"README.md": repos[HF]["README.md"]}
    assert "no file tokenizer.json" in fails(HF, tmp_path, files=["tokenizer.json"])


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(server, tmp_path):
    hub.fetch(ORIGINAL, cache_dir=tmp_path)
    hub_calls = [call for call in server.calls if ORIGINAL in call.path and not call.path.startswith("/cdn/")]
    assert {call.authorization for call in hub_calls} == {"Bearer a-token"}
    assert {call.authorization for call in server.downloads()} == {None}


def test_a_cut_download_goes_on_where_it_broke(server, repos, tmp_path):
    hub.fetch(ORIGINAL, files=["config.json"], cache_dir=tmp_path)
    server.faults.cuts = 1
    folder = hub.fetch(ORIGINAL, cache_dir=tmp_path)
    assert contents(folder) == repos[ORIGINAL]
    size = len(repos[ORIGINAL]["pytorch_model.bin"])
    kept = size // 2
    assert [call.range for call in server.downloads()] == [None, f"bytes={kept}-"]
    assert server.downloads()[1].sent == size - kept


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, repos, tmp_path):
    hub.fetch(ORIGINAL, files=["config.json"], cache_dir=tmp_path)
    server.faults.cuts = 1
    server.faults.cdn = [0, 404]
    assert "try again later" in fails(ORIGINAL, tmp_path)
    (partial,) = partials(tmp_path)
    size = len(repos[ORIGINAL]["pytorch_model.bin"])
    kept = size // 2
    assert partial.stat().st_size == kept
    server.calls.clear()
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]
    assert [call.range for call in server.downloads()] == [f"bytes={kept}-"]


def test_wrong_bytes_are_deleted(server, repos, tmp_path):
    hub.fetch(ORIGINAL, files=["config.json"], cache_dir=tmp_path)
    server.faults.wrong = True
    message = fails(ORIGINAL, tmp_path)
    data = repos[ORIGINAL]["pytorch_model.bin"]
    assert f"pytorch_model.bin has hash {hashlib.sha256(bytes(b ^ 1 for b in data)).hexdigest()[:12]}" in message
    assert f"the hub states {hashlib.sha256(data).hexdigest()[:12]}" in message
    assert partials(tmp_path) == []
    server.faults.wrong = False
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_a_cached_file_that_went_bad_is_deleted(server, repos, tmp_path, name):
    file = hub.fetch(ORIGINAL, cache_dir=tmp_path) / name
    data = repos[ORIGINAL][name]
    file.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{name} has hash" in fails(ORIGINAL, tmp_path)
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]


@pytest.mark.parametrize("statuses", [[429], [500], [503, 429]])
def test_busy_hub_is_asked_again(server, repos, tmp_path, statuses):
    server.faults.info = list(statuses)
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]
    asked = [call for call in server.calls if call.path.startswith("/api/models/")]
    assert len(asked) == len(statuses) + 1


def test_busy_cdn_is_asked_again(server, repos, tmp_path):
    server.faults.cdn = [503]
    assert contents(hub.fetch(ORIGINAL, cache_dir=tmp_path)) == repos[ORIGINAL]


@pytest.mark.parametrize(("status", "says"), [(429, "limits the rate"), (500, "answers 500")])
def test_a_hub_that_stays_busy(server, tmp_path, status, says):
    server.faults.info = [status] * 20
    assert says in fails(ORIGINAL, tmp_path)
    assert len(server.faults.info) == 20 - len(web.WAITS) - 1


def test_retry_after_is_obeyed(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(web, "WAITS", (1.0, 2.0))
    monkeypatch.setattr(web.time, "sleep", waits.append)
    server.faults.retry_after = "7"
    server.faults.info = [429]
    hub.fetch(ORIGINAL, cache_dir=tmp_path)
    server.faults.retry_after = None
    server.faults.info = [500, 500]
    hub.fetch(ORIGINAL, cache_dir=tmp_path)
    assert waits == [7.0, 1.0, 2.0]


def test_refusals_say_what_helps(server, tmp_path):
    assert "does not exist" in fails("tiny/unheard-of", tmp_path)
    assert "no revision 'v9'" in fails(ORIGINAL, tmp_path, revision="v9")
    assert "no weights that can be read" in fails("tiny/none", tmp_path)
    assert "of .gguf files, fetch one and give its path" in fails("tiny/gguf", tmp_path)
    server.faults.gated = True
    message = fails(ORIGINAL, tmp_path)
    assert "is gated: accept its terms" in message and "HF_TOKEN" in message
    server.faults.info = [403]
    assert "is gated" in fails(ORIGINAL, tmp_path)


def test_no_connection(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "WAITS", ())
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to http://127.0.0.1:9" in fails(ORIGINAL, tmp_path)


def test_not_a_repository_name(server, tmp_path):
    with pytest.raises(HubError, match="could not be fetched"):
        hub.fetch("tiny/two--dashes", cache_dir=tmp_path)


def test_offline_makes_no_call(server, repos, tmp_path):
    assert f"lscollapse fetch {ORIGINAL}" in fails(ORIGINAL, tmp_path, offline=True)
    online = hub.fetch(ORIGINAL, cache_dir=tmp_path)
    server.calls.clear()
    assert hub.fetch(ORIGINAL, cache_dir=tmp_path, offline=True) == online
    assert hub.fetch(ORIGINAL, cache_dir=tmp_path, offline=True, revision=online.name) == online
    assert hub.fetch(ORIGINAL, cache_dir=tmp_path, offline=True, files=["config.json"]) == online
    assert "not in the cache" in fails(ORIGINAL, tmp_path, offline=True, revision="v9")
    assert "not in the cache" in fails(HF, tmp_path, offline=True)
    assert server.calls == []


def test_half_a_fetch_is_not_offered_offline(server, tmp_path):
    server.faults.wrong = True
    fails(ORIGINAL, tmp_path)
    assert "not in the cache" in fails(ORIGINAL, tmp_path, offline=True)


@pytest.mark.parametrize("repo", [ORIGINAL, HF])
def test_load_from_the_hub(server, repos, tmp_path, repo):
    loaded = checkpoint.load(repo, cache_dir=tmp_path)
    name = "pytorch_model.bin" if repo == ORIGINAL else "model.safetensors"
    assert loaded.info.sha256 == hashlib.sha256(repos[repo][name]).hexdigest()
    assert (loaded.info.location, loaded.info.revision) == (repo, server.commit(repo))
    state = hf_state()
    assert torch.equal(loaded.model.embeddings.weight, state["backbone.embeddings.weight"].float())
    server.calls.clear()
    again = checkpoint.load(repo, cache_dir=tmp_path, offline=True)
    assert again.info == loaded.info
    assert server.calls == []


def test_random_weights_need_the_config_only(server, tmp_path):
    loaded = checkpoint.load(HF, cache_dir=tmp_path, random_init=0)
    assert loaded.info.revision == server.commit(HF)
    assert server.downloads() == []


def test_stock_client_in_a_process_of_its_own(repos, tmp_path):
    """Nothing patched: HF_ENDPOINT and HF_HOME in the environment, as a user sets them for a mirror."""
    code = (
        "from lscollapse.models.checkpoints import checkpoint\n"
        f"for offline in (False, True): print(checkpoint.load({ORIGINAL!r}, offline=offline).info.sha256)\n"
    )
    with HubServer(repos) as server:
        server.faults.cuts = 1
        server.faults.info = [429]
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "LSCOLLAPSE_CACHE": str(tmp_path / "own"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = hashlib.sha256(repos[ORIGINAL]["pytorch_model.bin"]).hexdigest()
    assert done.stdout.split() == [expected, expected]
    assert [*tmp_path.rglob("*.safetensors")] == []  # no second copy of the weights is written anywhere
    assert not (tmp_path / "own").exists()
