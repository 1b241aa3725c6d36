"""An end to the waits of huggingface_hub's own client, by which `datasets` streams; what the package asks for itself goes by `web`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lscollapse.core import web

T = TypeVar("T")


class Watch:
    """How long the client has been waited for without a byte. Its hooks are called before each request and after each answer."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def came(self) -> None:
        self.since = time.monotonic()

    def each(self, values: Iterable[T]) -> Iterator[T]:
        """`values`, each waited for anew."""
        waited_for = iter(values)
        while True:
            self.came()
            try:
                yield next(waited_for)
            except StopIteration:
                return

    def asked(self, request: Any) -> None:
        """Bound every wait of a request; refuse it where what it repeats has not brought a byte for BODY_DEADLINE."""
        if time.monotonic() - self.since > web.BODY_DEADLINE:
            raise web.Late(f"no byte from {request.url.host} within {web.BODY_DEADLINE:.3g} s")
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or web.API_DEADLINE, web.API_DEADLINE)
            for kind in ("connect", "read", "write", "pool")
        }

    def answered(self, response: Any) -> None:
        """Note every piece of a body as it arrives; the time that a server asks for is its own."""
        self.since += web.retry_after(response) or 0
        response.stream = _noted(response.stream, self)


def _noted(stream: Any, watch: Watch) -> Any:
    """A body as the client (httpx or its successor, as huggingface_hub is old or new) knows it, whose pieces are noted."""
    kind: Any = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Noted(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                watch.came()
                yield piece

        def __getattr__(self, name: str) -> Any:
            return getattr(stream, name)

        def close(self) -> None:
            stream.close()

    return Noted()


@contextmanager
def watched() -> Iterator[Watch]:
    """Within the block the client of huggingface_hub gives up after BODY_DEADLINE without a byte, with a `web.Late`."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory  # the only name it has

    watch = Watch()

    def make() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], watch.asked],
            "response": [*hooks["response"], watch.answered],
        }
        return client

    set_client_factory(make)
    try:
        yield watch
    finally:
        set_client_factory(default_client_factory)
