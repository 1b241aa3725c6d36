"""An HTTP transport for the MediaWiki API: another endpoint, continuation, a disk cache, failures sorted for retry."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import ceil
from pathlib import Path
from typing import Any

import httpx

from lscollapse.core.files import first_line, write_text
from lscollapse.data.texts import CorpusError

LONGEST_WAIT = 300  # seconds; a server that asks for more is not waited for
PARTS = 50  # continuations followed for one article
TIMEOUT = 30.0  # seconds
TRANSIENT_CODES = ("maxlag", "ratelimited", "readonly")  # error codes of the API that pass by themselves


class Transport:
    """An `httpx` transport (by interface) for MediaWiki: endpoint, continuation, cache, and one kind of failure.

    The client retries on HTTP 429 after `Retry-After` and on 5xx with growing waits, and on nothing else. So what
    passes by itself (a lagging database, a page of HTML, half an answer, a broken connection) is handed to it as 429
    or 503, and what does not is raised as a CorpusError. `problem` says what the last failure was, `retrieved` when
    the last answer was fetched.
    """

    def __init__(self, endpoint: str | None, cache: Cache) -> None:
        self.endpoint, self.cache = endpoint, cache
        self.problem = self.retrieved = ""
        self.inner = httpx.Client(timeout=TIMEOUT, follow_redirects=True)

    def close(self) -> None:
        self.inner.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to one request of the client; a complete JSON answer, or a failure to be retried."""
        url = httpx.URL(self.endpoint, params=request.url.params) if self.endpoint else request.url
        keep = "titles" in url.params  # what the wiki chooses itself (random titles) is another thing every time
        cached = self.cache.get(str(url)) if keep else None
        if cached is not None:
            self.retrieved = cached["retrieved"]
            return httpx.Response(200, json=cached["answer"])
        try:
            answer = self._complete(url, request.headers["User-Agent"])
        except _Transient as failure:
            self.problem = str(failure)
            if failure.wait is None:
                return httpx.Response(503)
            return httpx.Response(429, headers={"Retry-After": str(failure.wait)})
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
                answer["query"]["pages"].setdefault(page_id, {}).update(page)
        return answer

    def _get(self, url: httpx.URL, agent: str) -> dict[str, Any]:
        """One GET: the JSON object that came back, if it is an answer and no error."""
        try:
            response = self.inner.get(url, headers={"User-Agent": agent})
        except httpx.TransportError as error:
            raise _Transient(f"no answer ({type(error).__name__}: {first_line(error)})") from error
        wait = _retry_after(response)
        if response.status_code == 429 or response.status_code >= 500:
            raise _Transient(f"HTTP {response.status_code} {response.reason_phrase}", wait)
        if response.status_code != 200:
            raise CorpusError(f"{url.host}{url.path} answered HTTP {response.status_code}: is it a wiki's api.php?")
        try:
            answer = response.json()
        except ValueError as error:
            kind = response.headers.get("Content-Type", "").split(";")[0] or "no type"
            raise _Transient(f"an answer that is not JSON ({kind}, {len(response.content)} bytes)", wait) from error
        content: dict[str, Any] = answer if isinstance(answer, dict) else {"error": {"code": "no JSON object"}}
        fault = content.get("error")
        if fault is None:
            return content
        problem = f"the API's error {fault.get('code')!r} ({fault.get('info', '')})"
        if fault.get("code") in TRANSIENT_CODES or str(fault.get("code")).startswith("internal_api_error"):
            raise _Transient(problem, wait)
        raise CorpusError(f"{url.host}{url.path} answered with {problem}")


class Cache:
    """JSON values in files named by the sha256 of their key; without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder else None

    def get(self, key: str) -> Any:
        """The value, or None; a file that cannot be read counts as absent."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8")) if self.folder else None
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


class _Transient(Exception):
    """A failure that may pass; `wait`: the seconds that the server asked for, if it did."""

    def __init__(self, problem: str, wait: int | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


def _retry_after(response: httpx.Response) -> int | None:
    """Seconds of a Retry-After header, which may be a number or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        until = timedelta(seconds=int(value)) if value.isdigit() else parsedate_to_datetime(value) - datetime.now(UTC)
    except (ValueError, TypeError):  # neither a number nor a date with a time zone
        return None
    wait = ceil(until.total_seconds())
    if wait > LONGEST_WAIT:
        raise CorpusError(f"{response.url.host} asks for a wait of {wait} s: try again after that")
    return max(wait, 0)
