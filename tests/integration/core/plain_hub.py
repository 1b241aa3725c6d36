"""A hub on loopback with one small repository, and what fetching from it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lscollapse.core import hub, outside, web
from lscollapse.core.hub import HubError
from tests.servers.hub import HubServer

REPO = "tiny/plain"
WEIGHTS = bytes(range(256)) * 40  # 10,240 bytes
CONFIG = b'{"model_type": "none", "padding": "' + b"x" * 500 + b'"}'
TOKENIZER = b'{"version": "1.0"}'
ALL = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": TOKENIZER}
_RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"


@contextmanager
def plain_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, asked by everything in this process, without a pause between the tries."""
    with HubServer({REPO: ALL}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + _RESOLVE)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(web, "WAITS", (0.0, 0.0, 0.0, 0.0))
        yield running


def fetched(cache: Path, **arguments: Any) -> dict[str, bytes]:
    folder = hub.fetch(REPO, cache_dir=cache / "hub", **arguments)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(cache: Path, error: type[HubError] = HubError, **arguments: Any) -> str:
    """The one line that a fetch ends with."""
    with pytest.raises(HubError) as caught:
        hub.fetch(REPO, cache_dir=cache / "hub", **arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert outside.one_line(message) == message  # short, and without a character that a terminal obeys
    assert REPO in message or constants.ENDPOINT in message
    return message
