"""What malformed input stands among: a tiny model with its tokenizer, texts, frozen excerpts, a finished run, answers of servers."""

from __future__ import annotations

import io
import json
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from huggingface_hub import constants
from pyarrow import parquet
from safetensors.torch import save_file

from lscollapse.core import web
from tests.equivalence import tiny
from tests.fuzz.mutations import as_json
from tests.servers.hub import HubServer
from tests.verbs import run

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"{a}{b}" for a in "bdfghklm" for b in "aeiou"),
    *"abcdefghijklmnop",
]
TEXT = "\n\n".join(" ".join(WORDS[5 + (7 * i + k) % 40] for k in range(24)) for i in range(3))
FEW = ("--excerpts", "2", "--tokens", "8")


@cache
def folder() -> Path:
    """Of this process, with `model`, `sharded`, `mamba2`, `text.txt`, `frozen.jsonl` and the run `finished`, none of them malformed."""
    root = Path(mkdtemp(prefix="malformed-"))
    for name, net in (("model", tiny.bert(n_layers=2)), ("mamba2", tiny.mamba2(n_layers=2))):
        place = root / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(net.config.to_diff_dict()))
        save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, place / "model.safetensors")
        (place / "vocab.txt").write_text("\n".join(WORDS))
        (place / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
        )
    shutil.copytree(root / "model", root / "sharded")
    (root / "sharded" / "model.safetensors").rename(root / "sharded" / "model-00001-of-00001.safetensors")
    names = tiny.bert(n_layers=2).state_dict()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "text.txt").write_text(TEXT)
    must("excerpts", root / "frozen.jsonl", *FEW, "--source", root / "text.txt", "--tokenizer", root / "model")
    must(
        "measure",
        root / "model",
        *FEW,
        "--source",
        root / "frozen.jsonl",
        "--lambdas",
        "0,1",
        "--out",
        root / "finished",
    )
    return root


def must(*arguments: str | Path) -> None:
    code, out, err = run(arguments)
    assert code == 0, (arguments, out, err)


def copied(name: str, root: Path) -> Path:
    """A copy of something of `folder()` in `root`."""
    shutil.copytree(folder() / name, root / name)
    return root / name


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its header and what follows it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def as_safetensors(value: Any) -> bytes:
    """A header, mutated, before the tensors of `model`."""
    head = as_json(value)
    return struct.pack("<Q", len(head)) + head + header(folder() / "model" / "model.safetensors")[1]


def columns(file: Path) -> dict[str, Any]:
    return dict(parquet.read_table(file).to_pydict())


def as_parquet(value: Any) -> bytes:
    """Columns of a table, mutated; what is no column as text, shorter ones to the length of the shortest."""
    if not isinstance(value, dict) or not value:
        return as_json(value)
    held = {
        str(name).encode("utf-8", "replace").decode(): v if isinstance(v, list) else [v] for name, v in value.items()
    }
    shortest = min(map(len, held.values()))
    table = pa.table({name: _array(values[:shortest]) for name, values in held.items()})
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def _array(values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
        parquet.write_table(pa.table({"values": array}), io.BytesIO())  # of some types there are arrays but no files
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([repr(value)[:1000].encode("utf-8", "replace").decode() for value in values])


class Answers:
    """A server on loopback that gives one answer to every request, another one where random titles are asked for."""

    def __init__(self) -> None:
        self.answer = self.random = b""
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = answers.random if "list=random" in self.path else answers.answer
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"


@cache
def answers() -> Answers:
    return Answers()


@cache
def hub() -> HubServer:
    """A hub that has `model`."""
    files = {file.name: file.read_bytes() for file in (folder() / "model").iterdir()}
    return HubServer({"tiny/bert": files}).__enter__()


@contextmanager
def on_the_hub(root: Path) -> Iterator[None]:
    """The client asks `hub()` and keeps what comes in `root`; it does not wait between its tries."""
    url = hub().url
    settings = {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(root / "cache"),
    }  # fmt: skip
    with patch.multiple(constants, **settings), patch.object(web, "WAITS", (0.0, 0.0)):
        yield
