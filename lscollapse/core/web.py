"""Servers: answers within a deadline, and files that are kept to the byte where they break off and go on from there.

What a server may do is not known: it may stall, drip, break off, be busy, send another one's page, or send without end. What may
pass is Passing and tried again as long as `Patience` lasts; what does not is Refused (an HTTP status) or Foreign (another
thing than was asked for). Callers make one line of these that says what to do.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from lscollapse.core.files import first_line
from lscollapse.core.outside import LARGEST, parse_json, shown
from lscollapse.core.progress import Progress

T = TypeVar("T")

API_DEADLINE = 30.0  # seconds for an answer of an API, from the first try to its last byte
BODY_DEADLINE = 60.0  # seconds without a byte of a file, over all tries
CONNECTIONS = 3  # how often a silent connection is made anew within BODY_DEADLINE
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try
LONGEST_WAIT = 120.0  # the most that a Retry-After is obeyed for
PORTAL = "sign in to the network, if it asks for that, or mend the proxy"

_PART = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")  # of Content-Range


class Passing(ValueError):
    """A failure that may pass. `status`: of the answer, where there is one; `wait`: seconds that the server asked for."""

    def __init__(self, problem: str, status: int | None = None, wait: int | None = None) -> None:
        super().__init__(problem)
        self.status, self.wait = status, wait


class Late(Passing):
    """The deadline came before the answer."""


class Refused(ValueError):
    """An answer with an HTTP status that does not pass by itself, and the hub's code for it (X-Error-Code), if any."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"HTTP {response.status_code} {shown(response.reason_phrase)}{_elsewhere(response)}")
        self.status, self.code = response.status_code, response.headers.get("X-Error-Code", "")


class Foreign(ValueError):
    """An answer that is not what was asked for: what came, from where."""


class Patience:
    """How long is waited for what does not come: `seconds` from the last byte that did, and WAITS between the tries."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.came()

    def came(self) -> None:
        """Something arrived: all begins anew."""
        self.since, self.waits = time.monotonic(), iter(WAITS)

    @property
    def left(self) -> float:
        """Seconds; some always, so that a try can be made."""
        return max(self.seconds - (time.monotonic() - self.since), 0.01)

    def pause(self, failure: Passing) -> None:
        """Wait before the next try; the time that the server asks for is its own. Raises `failure` where no try is left."""
        wait = next(self.waits, None)
        if wait is None:
            raise failure
        if failure.wait is not None:
            asked = min(float(failure.wait), LONGEST_WAIT)
            self.since += asked
            time.sleep(asked)
        elif time.monotonic() - self.since + wait >= self.seconds:
            raise failure
        else:
            time.sleep(wait)


def patiently(attempt: Callable[[float], T], seconds: float) -> T:
    """`attempt(seconds left)`, made again after what may pass, for `seconds` in all."""
    patience = Patience(seconds)
    while True:
        try:
            return attempt(patience.left)
        except Passing as failure:
            patience.pause(failure)


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, made in a thread and left there after `seconds`: a name server or a dripping header knows no time limit.

    Raises:
        Late: it has not returned.
    """
    made: Future[T] = Future()

    def make() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        return made.result(timeout=seconds)
    except TimeoutError as error:
        raise Late("it stalls") from error


def client() -> httpx.Client:
    """A client that follows redirects, which it does not take the token to where they lead to another host."""
    return httpx.Client(follow_redirects=True)


class Answer(NamedTuple):
    """A JSON value, and the seconds that the server asks to wait before the next call, if it does."""

    value: Any
    wait: int | None


def ask(client: httpx.Client, url: httpx.URL | str, headers: Mapping[str, str], seconds: float) -> Answer:
    """The JSON that is the answer to one GET.

    Raises:
        Passing: no answer within `seconds`, none at all, half of one, or one that says that the server is busy.
        Refused: any other status than success.
        Foreign: no JSON, as of a captive portal, or more than LARGEST bytes.
    """

    def get() -> tuple[httpx.Response, bytes]:
        body = bytearray()
        with client.stream("GET", url, headers=dict(headers), timeout=seconds) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > LARGEST:
                    raise Foreign(f"an answer of more than {LARGEST} bytes{_elsewhere(response)}")
        return response, bytes(body)

    try:
        response, body = _tried(lambda: within(seconds, get))
    except Late as late:
        raise Late(f"no whole answer within {seconds:.3g} s") from late
    _refuse_status(response)
    came = f"{shown(_kind(response))}, {len(body)} bytes{_elsewhere(response)}"
    if body.lstrip()[:1] == b"<":
        raise Foreign(f"a web page where JSON is due ({came}): {PORTAL}")
    value = parse_json(body.decode(errors="replace"), f"an answer ({came})", Foreign, standard=True)
    return Answer(value, retry_after(response))


def bring(
    client: httpx.Client, url: str, headers: Mapping[str, str], partial: Path, size: int | None, progress: Progress
) -> None:
    """Complete the file `partial` from what there is of it; what arrives is in it at once, and stays where this fails.

    Args:
        size: bytes of the whole file; None where nobody says, then it is begun anew.
        progress: advances by bytes.

    Raises:
        Passing: nothing came for BODY_DEADLINE, or all of WAITS went by without a byte.
        Refused: an HTTP status that does not pass.
        Foreign: a web page, another size, or another part than was asked for.
    """
    if size is None:
        partial.unlink(missing_ok=True)
    patience, whole = Patience(BODY_DEADLINE), False
    with partial.open("ab", buffering=0) as file:
        if size is not None and file.tell() > size:
            file.seek(0)
            file.truncate()
        progress.advance(file.tell())
        while not whole and file.tell() != size:
            start = file.tell()
            part = {"Range": f"bytes={start}-"} if start else {}
            request = client.build_request(
                "GET",
                url,
                headers={**headers, **part, "Accept-Encoding": "identity"},
                timeout=min(BODY_DEADLINE / CONNECTIONS, patience.left),
            )
            try:
                whole = _go_on(client, request, file, size, patience, progress)
            except Late:
                patience.pause(Late(f"no byte of it within {BODY_DEADLINE:.3g} s"))
            except Passing as failure:
                patience.pause(failure)


def _go_on(
    client: httpx.Client, request: httpx.Request, file: Any, size: int | None, patience: Patience, progress: Progress
) -> bool:
    """Write what one connection brings to the end of `file`; True where the file is whole then."""
    start, seconds = file.tell(), request.extensions["timeout"]["read"]
    with closing(_tried(lambda: within(seconds, lambda: client.send(request, stream=True)))) as response:
        _refuse_status(response)
        if _kind(response) == "text/html" and not request.url.path.endswith((".html", ".htm")):
            raise Foreign(f"a web page in place of the file{_elsewhere(response)}: {PORTAL}")
        begin, total = _part(response)
        if begin is None or begin not in (0, start) or (None not in (size, total) and total != size):
            came = f"bytes from {_said(begin)} of {_said(total)}, where those from {start} of {_said(size)} are due"
            raise Foreign(f"{came}{_elsewhere(response)}")
        total, skip = size if total is None else total, start - begin  # a server that knows no ranges begins anew
        pieces = response.iter_raw()
        while total is None or file.tell() < total:
            piece = _tried(lambda: next(pieces, None))
            if piece is None:
                break
            piece, skip = piece[skip:], max(skip - len(piece), 0)
            piece = piece if total is None else piece[: total - file.tell()]
            if piece:
                file.write(piece)
                patience.came()
                progress.advance(len(piece))
    if total is not None and file.tell() < total:
        raise Passing(f"it ends after {file.tell()} of {total} bytes{_elsewhere(response)}")
    return True


def _said(number: int | None) -> str:
    return "?" if number is None else shown(str(number), 20)


def _part(response: httpx.Response) -> tuple[int | None, int | None]:
    """The byte that an answer begins with, and how many there are of the file; None where it does not say."""
    found = _PART.fullmatch(response.headers.get("Content-Range", "")) if response.status_code == 206 else None
    if found:
        return int(found[1]), int(found[2]) if found[2] != "*" else None
    length = response.headers.get("Content-Length", "")
    return (None if response.status_code == 206 else 0), int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _tried(call: Callable[[], T]) -> T:
    """`call()`; what may pass of what the client raises as Passing."""
    try:
        return call()
    except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise Foreign(f"an address that leads nowhere ({shown(first_line(error))})") from error
    except httpx.TimeoutException as error:
        raise Late(f"it stalls ({type(error).__name__})") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise Passing(f"no answer ({type(error).__name__}: {shown(first_line(error))})") from error


def _refuse_status(response: httpx.Response) -> None:
    if response.status_code in (408, 429) or response.status_code >= 500:
        said = f"HTTP {response.status_code} {shown(response.reason_phrase)}{_elsewhere(response)}"
        raise Passing(said, response.status_code, retry_after(response))
    if response.status_code >= 300:
        raise Refused(response)


def retry_after(response: httpx.Response) -> int | None:
    """Seconds of a Retry-After header, which may be a number or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        until = timedelta(seconds=int(value)) if value.isdigit() else parsedate_to_datetime(value) - datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):  # neither a number nor a date with a time zone
        return None
    return max(ceil(until.total_seconds()), 0)


def _kind(response: httpx.Response) -> str:
    return str(response.headers.get("Content-Type", "")).partition(";")[0].strip().lower() or "no type"


def _elsewhere(response: httpx.Response) -> str:
    """The host that an answer is from, where another one was asked."""
    asked = (response.history[0] if response.history else response).url.netloc
    return "" if response.url.netloc == asked else f" from {shown(response.url.netloc.decode(errors='replace'))}"
