"""Fetching files of a hub model repository: resumable, checked against the hub's own hashes, or fully offline.

The files land in the ordinary cache of huggingface_hub, so what other tools fetched is used and the reverse. On top of
the client this module keeps a large file that was cut off and goes on from there in the next run, checks what arrived
(sha256 of large files, git hash of small ones), waits when the hub asks for it, and turns every failure into one line.
It is imported where a repository is asked for: a run from local files does without it.
The endpoint is HF_ENDPOINT, the token HF_TOKEN or that of `hf auth login`, as for every tool that uses huggingface_hub.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lscollapse.core.files import GGUF, first_line, sha256_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try
LONGEST_WAIT = 120.0  # the most that a Retry-After is obeyed for

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
PICTURES = "preprocessor_config.json"  # how a vision model's pictures are normalised


class HubError(ValueError):
    """Files of a hub repository could not be had, with what to do about it."""


def weights_files(names: Collection[str]) -> list[str]:
    """Of the file names in a model folder, those that hold its weights: safetensors if there are any, else .bin."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if INDEX in names:
        return [INDEX, *sorted(name for name in names if _SHARD.fullmatch(name))]
    return [name for name in ("pytorch_model.bin",) if name in names]


def storage(cache_dir: str | Path | None) -> Path | None:
    """Where fetched files lie: `hub` in `cache_dir`, or None for the ordinary cache of huggingface_hub."""
    return Path(cache_dir).expanduser() / "hub" if cache_dir else None


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    files: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    tokenizer: bool = False,
) -> Path:
    """The folder that holds `files` of a model repository; its name is the commit they are of.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; the default is "main".
        files: names in the repository; the default is config.json, the weights (safetensors before .bin) and the
            tokenizer's (TOKENIZER_FILES) and PICTURES, as far as there are any.
        cache_dir: a cache of huggingface_hub; the default is its own (HF_HUB_CACHE).
        offline: make no call at all and take what is in the cache; HF_HUB_OFFLINE=1 asks for the same.
        tokenizer: take the tokenizer's files besides `files`.

    Raises:
        HubError: no such repository, revision or file; no access; no connection; a file that is not what the hub says.
    """
    from huggingface_hub import constants

    revision = revision or "main"
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    with _explained(repo_id, revision):
        if offline or constants.HF_HUB_OFFLINE:
            return _cached(repo_id, revision, files, cache)
        return _fetch(repo_id, revision, files, cache, TOKENIZER_FILES if tokenizer else ())


def sizes(repo_id: str, *, revision: str | None = None, timeout: float = 10.0) -> dict[str, int]:
    """Bytes of every file that `fetch` would bring, as the hub states them; asked once, for at most `timeout` seconds.

    Raises:
        HubError: as for `fetch`.
    """
    from huggingface_hub import HfApi

    revision = revision or "main"
    with _explained(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    known = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return {name: known[name] for name in _default_files(repo_id, known)}


def _fetch(repo_id: str, revision: str, files: Sequence[str] | None, cache: Path, optional: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    info = _patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    commit = str(info.sha)
    known = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wanted = _default_files(repo_id, known) if files is None else list(files)
    wanted += [name for name in optional if name in known]
    storage = _storage(cache, repo_id)
    for name in wanted:
        if name not in known:
            raise HubError(f"{repo_id} has no file {name} at revision {revision}: there are {', '.join(sorted(known))}")
        if known[name].lfs:
            _fetch_large(repo_id, commit, known[name], storage / "blobs")
        path = hf_hub_download(repo_id, name, revision=commit, cache_dir=cache)
        _check(Path(path), known[name], repo_id)
    if revision != commit:  # so that the name is known offline too; only complete fetches get this far
        ref = storage / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return storage / "snapshots" / commit


def _storage(cache: Path, repo_id: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _default_files(repo_id: str, names: Collection[str]) -> list[str]:
    weights = weights_files(names)
    if not weights:
        one = f" (of {GGUF} files, fetch one and give its path)" if any(name.endswith(GGUF) for name in names) else ""
        raise HubError(
            f"{repo_id} has no weights that can be read: expected model.safetensors, {INDEX} with its parts,"
            f" or pytorch_model.bin{one}, found {', '.join(sorted(names)) or 'nothing'}"
        )
    return ["config.json", *weights, *(name for name in (*TOKENIZER_FILES, PICTURES) if name in names)]


def _fetch_large(repo_id: str, commit: str, sibling: RepoSibling, blobs: Path) -> None:
    """Bring one LFS file into the cache under its sha256, going on from where an earlier run stopped."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # made public untyped

    assert sibling.lfs is not None
    size, sha256, name = sibling.lfs.size, sibling.lfs.sha256, sibling.rfilename
    blob, partial = blobs / sha256, blobs / f"{sha256}.partial"
    url = hf_hub_url(repo_id, name, revision=commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def go_on() -> None:
        with partial.open("ab") as handle:
            http_get(
                url, handle, resume_size=handle.tell(), headers=headers, expected_size=size, displayed_filename=name
            )

    blobs.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(blobs / f"{sha256}.partial.lock"):
        if blob.exists():
            return
        if partial.exists() and partial.stat().st_size > size:
            partial.unlink()
        _patiently(go_on)
        found = sha256_file(partial)
        if found != sha256:
            partial.unlink()
            raise HubError(_mismatch(repo_id, name, found, sha256))
        partial.rename(blob)


def _check(path: Path, sibling: RepoSibling, repo_id: str) -> None:
    """Compare a cached file with the size and the hash that the hub gives; a wrong one is deleted."""
    if sibling.lfs:
        found, expected = sha256_file(path), sibling.lfs.sha256
    elif sibling.blob_id:
        data = path.read_bytes()
        found, expected = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), sibling.blob_id
    else:  # a mirror that states no hashes
        return
    if found != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HubError(_mismatch(repo_id, sibling.rfilename, found, expected))


def _mismatch(repo_id: str, name: str, found: str, expected: str) -> str:
    return (
        f"{repo_id}/{name} has hash {found[:12]}... where the hub states {expected[:12]}...: the file was deleted,"
        " run the same command again, and check proxies and mirrors (HF_ENDPOINT) if it comes back"
    )


def _cached(repo_id: str, revision: str, files: Sequence[str] | None, cache: Path) -> Path:
    storage = _storage(cache, repo_id)
    ref = storage / "refs" / revision
    folder = storage / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    complete = "config.json" in names and weights_files(names) if files is None else names.issuperset(files)
    if not complete:
        raise HubError(
            f"{repo_id} at revision {revision} is not in the cache {cache} and no call may be made (offline):"
            f" run `lscollapse fetch {repo_id} --revision {revision}` where the hub can be reached"
        )
    return folder


def _patiently(call: Callable[[], T]) -> T:
    """`call()`, tried again on 429, 5xx and broken connections after a pause: Retry-After, else WAITS."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2

    for wait in WAITS:
        try:
            return call()
        except HTTPError as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code != 429 and response.status_code < 500:
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait)
    return call()


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """Where the client fails in the block, a HubError that says in one line why and what helps."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # as in _patiently

    try:
        yield
    except (HTTPError, OSError, HFValidationError) as error:
        raise HubError(_explanation(error, repo_id, revision)) from error


def _explanation(error: Exception, repo_id: str, revision: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    cause = error.__cause__ if isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(cause, hub_errors.GatedRepoError) or status == 403:
        return f"{repo_id} is gated: accept its terms at {page}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(cause, hub_errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: see {page}/commits/main"
    if isinstance(cause, hub_errors.RepositoryNotFoundError) or status == 401:
        return f"{repo_id} does not exist on {constants.ENDPOINT} or is private: check the name, or set HF_TOKEN"
    if status == 404:
        return f"a file of {repo_id} at revision {revision} that the hub lists is not there (404): try again later"
    if status == 429:
        return f"{constants.ENDPOINT} limits the rate of calls (429): wait some minutes, or set HF_TOKEN"
    if status is not None:
        return f"{constants.ENDPOINT} answers {status} for {repo_id}: try again later; what has arrived is kept"
    line = first_line(cause)
    if isinstance(cause, hub_errors.HTTPError):  # type: ignore[attr-defined]  # as in _patiently
        return f"no connection to {constants.ENDPOINT} ({line}): run it again to go on, or --offline to use the cache"
    return f"{repo_id} could not be fetched: {line}"
