"""An HTTP transport for the MediaWiki API: another endpoint, continuation, a disk cache, failures sorted for retry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, Field, StrictInt, StrictStr, model_validator

from lscollapse.core import web
from lscollapse.core.files import write_text
from lscollapse.core.outside import LARGEST, checked, parse_json, shown
from lscollapse.data.texts import CorpusError

T = TypeVar("T")

LONGEST_WAIT = 300  # seconds; a server that asks for more is not waited for
PARTS = 50  # continuations followed for one article
TRANSIENT_CODES = ("maxlag", "ratelimited", "readonly")  # error codes of the API that pass by themselves


class Fault(BaseModel):
    """What the API says went wrong."""

    code: StrictStr
    info: StrictStr = ""


class Page(BaseModel):
    """A page of an answer, as far as it is used; one that is missing has no id."""

    title: StrictStr
    pageid: StrictInt = -1
    ns: StrictInt = 0
    lastrevid: StrictInt | None = None
    fullurl: StrictStr | None = None
    extract: StrictStr = ""
    pageprops: dict[str, Any] = {}


class Drawn(BaseModel):
    """A page of list=random."""

    title: StrictStr
    id: StrictInt
    ns: StrictInt = 0


class Query(BaseModel):
    """What was asked for; `pages` is absent where a title is one of another wiki."""

    pages: dict[str, Page] = {}
    random: list[Drawn] = []
    redirects: list[dict[str, Any]] = []
    title: StrictStr = ""  # the client takes these three from here too
    pageid: StrictInt = -1
    ns: StrictInt = 0

    @model_validator(mode="after")
    def _numbered(self) -> Query:
        for key, page in self.pages.items():
            if page.pageid < 0 and not key.startswith("-"):
                raise ValueError(f"page {shown(key)} has no pageid")
        return self


class Content(BaseModel):
    """An answer of api.php in its default format; of what is not named here nothing is used."""

    error: Fault | None = None
    more: dict[str, StrictStr | StrictInt] | None = Field(default=None, alias="continue")
    query: Query | None = None


class Kept(BaseModel):
    """An answer in the cache, with the UTC time in ISO 8601 at which it came."""

    retrieved: StrictStr
    answer: dict[str, Any]


class Transport:
    """An `httpx` transport (by interface) for MediaWiki: endpoint, continuation, cache, and one kind of failure.

    The client retries on HTTP 429 after `Retry-After` and on 5xx with growing waits, and on nothing else. So what
    passes by itself (a lagging database, a page of HTML, half an answer, a broken connection) is handed to it as 429
    or 503, and what does not (an answer of another shape, none within the deadline) is raised as a CorpusError. `problem`
    says what the last failure was, `retrieved` when the last answer was fetched.
    """

    def __init__(self, endpoint: str | None, cache: Cache) -> None:
        self.endpoint, self.cache = endpoint, cache
        self.problem = self.retrieved = ""
        self.inner = web.client()

    def close(self) -> None:
        self.inner.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to one request of the client; a complete JSON answer, or a failure to be retried."""
        url = httpx.URL(self.endpoint, params=request.url.params) if self.endpoint else request.url
        keep = "titles" in url.params  # what the wiki chooses itself (random titles) is another thing every time
        kept = self.cache.get(str(url), _kept) if keep else None
        if kept is not None:
            self.retrieved = kept.retrieved
            return httpx.Response(200, json=kept.answer)
        try:
            answer = self._complete(url, request.headers["User-Agent"])
        except web.Late as late:
            raise CorpusError(
                f"{_place(url)} gave {late}: try later, or use --source packaged or a frozen file"
            ) from late
        except (web.Passing, web.Foreign) as failure:
            self.problem = str(failure)
            wait = getattr(failure, "wait", None)
            if wait is None:
                return httpx.Response(503)
            if wait > LONGEST_WAIT:
                raise CorpusError(f"{url.host} asks for a wait of {wait} s: try again after that") from failure
            return httpx.Response(429, headers={"Retry-After": str(wait)})
        self.retrieved = datetime.now(UTC).isoformat(timespec="seconds")
        if keep:
            self.cache.put(str(url), {"retrieved": self.retrieved, "answer": answer})
        return httpx.Response(200, json=answer)

    def _complete(self, url: httpx.URL, agent: str) -> dict[str, Any]:
        """The answer with its continuations merged in, page by page."""
        answer = part = self._get(url, agent)
        for _ in range(PARTS):
            if "continue" not in part or "titles" not in url.params:
                break
            part = self._get(url.copy_merge_params(part["continue"]), agent)
            for page_id, page in part.get("query", {}).get("pages", {}).items():
                answer.setdefault("query", {}).setdefault("pages", {}).setdefault(page_id, {}).update(page)
        if "query" not in answer:
            raise CorpusError(f"{_place(url)} answered without a query: is it a wiki's api.php?")
        return answer

    def _get(self, url: httpx.URL, agent: str) -> dict[str, Any]:
        """One GET: the JSON object that came back, if it is an answer and no error."""
        try:
            answer = web.ask(self.inner, url, {"User-Agent": agent}, web.API_DEADLINE)
        except web.Refused as refused:
            raise CorpusError(f"{_place(url)} answered {refused}: is it a wiki's api.php?") from refused
        content = _content(answer.value, f"{_place(url)} answered in another shape than api.php")
        if content.error is None:
            return {key: value for key, value in answer.value.items() if value is not None}
        code, info = shown(content.error.code), shown(content.error.info, 160)
        problem = f"the API's error {code!r} ({info})"
        if code in TRANSIENT_CODES or code.startswith("internal_api_error"):
            raise web.Passing(problem, wait=answer.wait)
        raise CorpusError(f"{_place(url)} answered with {problem}")


class Cache:
    """JSON values in files named by the sha256 of their key; without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder else None

    def get(self, key: str, read: Callable[[Any], T]) -> T | None:
        """What `read` makes of the value, or None; a file that cannot be read, or that it refuses, counts as absent."""
        path = self._path(key)
        try:
            if self.folder is None or not path.is_file() or path.stat().st_size > LARGEST:
                return None
            return read(parse_json(path.read_text(encoding="utf-8"), str(path), CorpusError, standard=True))
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: Any) -> None:
        if self.folder is None:
            return
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(value))
        except OSError as error:
            raise CorpusError(f"the cache folder {self.folder} cannot be written: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        return Path(self.folder or "") / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _content(answer: Any, where: str) -> Content:
    return checked(Content, answer, CorpusError, where)


def _kept(value: Any) -> Kept:
    kept = checked(Kept, value, CorpusError)
    if _content(kept.answer, "").query is None:
        raise CorpusError("an answer without a query")
    return kept


def _place(url: httpx.URL) -> str:
    return f"{url.host}{shown(url.path)}"
