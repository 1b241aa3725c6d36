"""Fetching files of a hub model repository: resumable to the byte, checked against the digests that name them, or offline.

The files land in the ordinary cache of huggingface_hub, so what other tools fetched is used and the reverse. What was cut off
is kept and gone on with, by the next try or the next run; what is in the cache is checked against its name each time that it
has changed; every failure is one line. It is imported where a repository is asked for: a run from local files does without it.
The endpoint is HF_ENDPOINT, the token HF_TOKEN or that of `hf auth login`, as for every tool that uses huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import httpx

from lscollapse.core import web
from lscollapse.core.files import GGUF, write_text
from lscollapse.core.hub_cache import DamagedError as DamagedError
from lscollapse.core.hub_cache import Repository, bring, check, is_there
from lscollapse.core.hub_listing import HubError as HubError
from lscollapse.core.hub_listing import explained, inside, listing
from lscollapse.core.outside import shown
from lscollapse.core.progress import SILENT, Progress

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
PICTURES = "preprocessor_config.json"  # how a vision model's pictures are normalised
OPTIONAL = (*TOKENIZER_FILES, PICTURES)  # what is taken besides a model, as far as there is any


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
    progress: Progress = SILENT,
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
        progress: of what is fetched, in bytes.

    Raises:
        HubError: no such repository, revision or file; no access; no connection; a file that is not what the hub says.
        DamagedError: a file in the cache is not what its name says.
    """
    from huggingface_hub import constants

    revision = revision or "main"
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    optional = OPTIONAL if files is None else TOKENIZER_FILES if tokenizer else ()
    with explained(repo_id, revision):
        _check_names(repo_id, revision)
        if offline or constants.HF_HUB_OFFLINE:
            return _cached(Repository(cache, repo_id), revision, files, optional)
        with web.client() as client:
            return _fetch(client, Repository(cache, repo_id), revision, files, optional, progress)


def sizes(repo_id: str, *, revision: str | None = None, timeout: float = 10.0) -> dict[str, int]:
    """Bytes of every file that `fetch` would bring, as the hub states them; asked once, for at most `timeout` seconds.

    Raises:
        HubError: as for `fetch`.
    """
    revision = revision or "main"
    with explained(repo_id, revision), web.client() as client:
        _check_names(repo_id, revision)
        known = listing(client, repo_id, revision, _headers(), timeout).files
    return {name: known[name].length or 0 for name in _wanted(repo_id, known, None, OPTIONAL)}


def _check_names(repo_id: str, revision: str) -> None:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # made public untyped

    validate_repo_id(repo_id)
    try:
        inside(revision)
    except ValueError:
        raise HubError(f"{shown(revision)} is no revision: give a branch, a tag or a commit of {repo_id}") from None


def _headers() -> dict[str, str]:
    """What tool asks, and the token, if there is one. Not by the client's own function, which makes a call for them.

    Raises:
        HubError: what stands for a token cannot be one.
    """
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError(f"the token for {constants.ENDPOINT} holds more than ASCII characters: look at HF_TOKEN")
    return {"User-Agent": "lscollapse", **({"Authorization": f"Bearer {token}"} if token else {})}


def _fetch(
    client: httpx.Client,
    repository: Repository,
    revision: str,
    files: Sequence[str] | None,
    optional: Sequence[str],
    progress: Progress,
) -> Path:
    from huggingface_hub import hf_hub_url

    headers, repo_id = _headers(), repository.repo_id
    found = web.patiently(lambda left: listing(client, repo_id, revision, headers, left), web.API_DEADLINE)
    known, snapshot = found.files, repository.snapshot(found.commit)
    wanted = _wanted(repo_id, known, files, optional)
    for name in wanted:
        if name not in known:
            raise HubError(f"{repo_id} has no file {name} at revision {revision}: there are {_some(known)}")
    missing = [known[name] for name in wanted if not is_there(repository, snapshot, known[name])]
    if missing:
        progress.start(sum(file.length or 0 for file in missing))
    for file in missing:
        url = hf_hub_url(repo_id, file.name, revision=found.commit)
        with explained(repo_id, revision, file.name):
            bring(client, url, headers, file, repository, found.commit, progress)
    if revision != found.commit:  # so that the name is known offline too; only complete fetches get this far
        ref = repository.ref(revision)
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, found.commit)
    return snapshot


def _wanted(repo_id: str, names: Collection[str], files: Sequence[str] | None, optional: Sequence[str]) -> list[str]:
    """Of a repository's files, `files` and the optional ones that are there; by default what a model cannot do without."""
    also = [name for name in optional if name in names]
    if files is not None:
        return [*files, *also]
    weights = weights_files(names)
    if not weights:
        one = f" (of {GGUF} files, fetch one and give its path)" if any(name.endswith(GGUF) for name in names) else ""
        raise HubError(
            f"{repo_id} has no weights that can be read: expected model.safetensors, {INDEX} with its parts,"
            f" or pytorch_model.bin{one}, found {_some(names)}"
        )
    return ["config.json", *weights, *also]


def _some(names: Collection[str]) -> str:
    return shown(", ".join(sorted(names)) or "nothing", 160)


def _cached(repository: Repository, revision: str, files: Sequence[str] | None, optional: Sequence[str]) -> Path:
    """The snapshot of a revision, without a call; what is asked for is in it and as its name says."""
    commit, again = repository.commit(revision), f"lscollapse fetch {repository.repo_id} --revision {revision}"
    folder = repository.snapshot(commit)
    names = {path.name for path in folder.iterdir() if path.is_file()} if commit and folder.is_dir() else set()
    complete = "config.json" in names and weights_files(names) if files is None else names.issuperset(files)
    if not complete:
        raise HubError(
            f"{repository.repo_id} at revision {revision} is not in the cache {repository.cache} and no call may be made"
            f" (offline): run `{again}` where the hub can be reached"
        )
    for name in _wanted(repository.repo_id, names, files, optional):
        check(folder / name, f"run `{again}` where the hub can be reached")
    return folder
