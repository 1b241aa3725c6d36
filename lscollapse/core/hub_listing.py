"""What a hub says of a repository, checked before it names anything, and what its refusals mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import quote

import httpx
from pydantic import AfterValidator, BaseModel, Field

from lscollapse.core import web
from lscollapse.core.files import first_line
from lscollapse.core.outside import Sha1, Sha256, checked, shown, unwritten


class HubError(ValueError):
    """Files of a hub repository could not be had, with what to do about it."""


def inside(name: str) -> str:
    """`name`, where it is a path that stays in the folder that it is put in, on any system.

    Raises:
        ValueError: it is absolute, or has "..", a backslash or a control character in it.
    """
    parts = name.split("/")
    if (
        "\\" in name
        or unwritten(name)
        or re.match(r"[A-Za-z]:", name)
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError("a name in the repository is due, as config.json or folder/model.safetensors")
    return name


class Large(BaseModel):
    """How a file is stored that git does not hold itself."""

    sha256: Sha256
    size: int = Field(ge=0, lt=2**63)


class File(BaseModel):
    """A file of a listing; `blob` is its git hash."""

    name: Annotated[str, AfterValidator(inside)] = Field(alias="rfilename")
    size: int | None = Field(default=None, ge=0, lt=2**63)
    blob: Sha1 | None = Field(default=None, alias="blobId")
    lfs: Large | None = None

    @property
    def digest(self) -> str | None:
        """What names the file in the cache: the sha256 of a large one, the git hash of a small one; None of a mirror that
        states neither."""
        return self.lfs.sha256 if self.lfs else self.blob

    @property
    def length(self) -> int | None:
        return self.lfs.size if self.lfs else self.size


class Listing(BaseModel):
    """A repository at a commit."""

    commit: Sha1 = Field(alias="sha")
    siblings: list[File] = []

    @property
    def files(self) -> dict[str, File]:
        return {file.name: file for file in self.siblings}


def listing(client: httpx.Client, repo_id: str, revision: str, headers: Mapping[str, str], seconds: float) -> Listing:
    """The files of a repository with their sizes and hashes; asked once.

    Raises:
        Passing, Refused, Foreign: as `web.ask`.
        HubError: an answer of another shape.
    """
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
    answer = web.ask(client, url, headers, seconds)
    return checked(
        Listing, answer.value, HubError, f"{constants.ENDPOINT} lists {shown(repo_id)} in another way than a hub does"
    )


@contextmanager
def explained(repo_id: str, revision: str, name: str = "") -> Iterator[None]:
    """Where a call fails in the block, a HubError that says in one line why and what helps.

    Args:
        name: the file that is asked for, where it is not the listing.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    what = f"{repo_id}/{name}" if name else repo_id
    try:
        yield
    except web.Refused as refused:
        raise HubError(_refusal(refused, repo_id, revision, name)) from refused
    except web.Foreign as foreign:
        raise HubError(
            f"{constants.ENDPOINT} gives for {what} {foreign}; check HF_ENDPOINT too, then run it again"
        ) from foreign
    except web.Passing as failure:
        raise HubError(_failure(failure, what)) from failure
    except HFValidationError as error:
        raise HubError(f"{what} could not be fetched: {shown(first_line(error), 200)}") from error
    except OSError as error:
        said = f"{error.strerror}: {error.filename}" if error.filename else first_line(error)
        raise HubError(f"{what} could not be fetched: {shown(said, 200)}") from error


def _refusal(refused: web.Refused, repo_id: str, revision: str, name: str) -> str:
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/{repo_id}"
    if refused.status == 403 or refused.code == "GatedRepo":
        return f"{repo_id} is gated: accept its terms at {page}, then set HF_TOKEN or run `hf auth login`"
    if refused.code == "RevisionNotFound":
        return f"{repo_id} has no revision {revision!r}: see {page}/commits/main"
    if refused.status == 401 or refused.code == "RepoNotFound" or (refused.status == 404 and not name):
        return f"{repo_id} does not exist on {constants.ENDPOINT} or is private: check the name, or set HF_TOKEN"
    if refused.status == 404:
        return f"{name} of {repo_id} at revision {revision} is listed by the hub but not there (404): try again later"
    return f"{constants.ENDPOINT} answers {refused} for {repo_id}: try again later; what has arrived is kept"


def _failure(failure: web.Passing, what: str) -> str:
    from huggingface_hub import constants

    if failure.status == 429:
        return f"{constants.ENDPOINT} limits the rate of calls (429): wait some minutes, or set HF_TOKEN"
    if failure.status is not None:
        return f"{constants.ENDPOINT} answers {failure.status} for {what}: try again later; what has arrived is kept"
    advice = "run it again to go on, what has arrived is kept, or --offline to use the cache"
    if isinstance(failure, web.Late):
        return f"{constants.ENDPOINT} stalls, {failure} for {what}: {advice}"
    return f"no connection to {constants.ENDPOINT} for {what}, {failure}: {advice}"
