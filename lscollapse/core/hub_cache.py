"""The cache of huggingface_hub on this disk: files under the digests that name them, snapshots of links to these, names of commits.

A file is whole or not there: what is arriving is DIGEST.partial, and takes its name when its digest is right. What is there is
checked against its name again whenever it has changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from lscollapse.core import web
from lscollapse.core.files import PARTIAL, sha256_file
from lscollapse.core.hub_listing import File, HubError
from lscollapse.core.outside import SHA1, SHA256
from lscollapse.core.progress import Progress

ABANDONED = 3600.0  # seconds since its last byte after which another tool's unfinished download counts as killed


class DamagedError(HubError):
    """A file in the cache is not the one that its name says."""


@dataclass(frozen=True)
class Repository:
    """A model repository in a cache."""

    cache: Path
    repo_id: str

    @property
    def folder(self) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self.cache / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def ref(self, revision: str) -> Path:
        """The file that says which commit a branch or tag was when it was fetched."""
        return self.folder / "refs" / revision

    def lock(self, digest: str) -> Path:
        """The file that huggingface_hub too locks while it fetches one."""
        return self.cache / ".locks" / self.folder.name / f"{digest}.lock"

    def commit(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit is, as far as the cache knows; "" where it does not."""
        ref = self.ref(revision)
        commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else revision
        return commit if SHA1.fullmatch(commit) else ""


def is_there(repository: Repository, snapshot: Path, file: File) -> bool:
    """Whether the file of a listing is in the snapshot.

    Raises:
        DamagedError: another one is, which is deleted.
    """
    path = snapshot / file.name
    if not path.is_file():
        return False
    _expect(path, file.digest or "", f"{repository.repo_id}/{file.name}")
    return True


def check(path: Path, advice: str) -> None:
    """Compare a file of the cache with the digest that names it; one that is no link has none.

    Raises:
        DamagedError: it is another one; ends with what to do.
    """
    blob = path.resolve()
    if SHA1.fullmatch(blob.name) or SHA256.fullmatch(blob.name):
        found = _digest(blob, like=blob.name)
        if found != blob.name:
            raise DamagedError(f"{blob} was altered, its digest is {found[:12]}... now: delete it, then {advice}")


def bring(
    client: httpx.Client,
    url: str,
    headers: Mapping[str, str],
    file: File,
    repository: Repository,
    commit: str,
    progress: Progress,
) -> None:
    """Put one file of a listing into the snapshot of a commit, going on from where an earlier run stopped.

    Raises:
        Passing, Refused, Foreign: as `web.bring`.
        DamagedError: what arrived is not what the hub says, and was deleted.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # made public untyped

    what = f"{repository.repo_id}/{file.name}"
    name = file.digest or hashlib.sha256(f"{commit}/{file.name}".encode()).hexdigest()
    blobs, lock = repository.folder / "blobs", repository.lock(name)
    blob, partial = blobs / name, blobs / f"{name}{PARTIAL}"
    for folder in (blobs, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.is_file():
            web.bring(client, url, headers, partial, file.length, progress)
            if file.digest is None:  # of a mirror that states none
                blob = blobs / _digest(partial, like="0" * 40)
            _store(partial, blob)
        _expect(blob, file.digest or "", what)
        _link(blob, repository.snapshot(commit) / file.name)
        _clear(blobs, name)


def _expect(path: Path, digest: str, what: str) -> None:
    """Delete a file that has not the digest that the hub states, if it states one; then it can be fetched again."""
    found = _digest(path, like=digest) if digest else ""
    if found != digest:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DamagedError(
            f"{what} has hash {found[:12]}... where the hub states {digest[:12]}...: the file was deleted,"
            " run the same command again, and check proxies and mirrors (HF_ENDPOINT) if it comes back"
        )


def _digest(path: Path, like: str) -> str:
    """The digest of a file, of the kind that another one is: sha256, or the shorter one that git gives a file."""
    if SHA256.fullmatch(like):
        return sha256_file(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _store(partial: Path, blob: Path) -> None:
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(blob)


def _link(blob: Path, path: Path) -> None:
    """Let a name in a snapshot stand for a file, as huggingface_hub does: a link, or where there are none the file itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to what is no more
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        blob.replace(path)


def _clear(blobs: Path, name: str) -> None:
    """Take away unfinished downloads of a file that is there now, which other tools' runs left behind when they were killed."""
    for left in blobs.glob(f"{name}.*incomplete"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            left.unlink(missing_ok=True)
