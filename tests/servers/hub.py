"""A model hub on loopback: the HTTP protocol that huggingface_hub's client speaks, with faults that tests switch on.

Small files are served directly; .bin and .safetensors as LFS files are: the hub redirects to a second server
(the CDN), and states their sha256 and size in X-Linked-ETag and X-Linked-Size.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Faults:
    """What goes wrong, and how often."""

    info: list[int] = field(default_factory=list)  # status codes of the next model info calls, then all is well
    cdn: list[int] = field(default_factory=list)  # the same for downloads; 0 lets one pass
    cuts: int = 0  # so many downloads break off half-way
    at_most: int | None = None  # bytes after which every download breaks off
    stall: str = (
        ""  # "info", "headers" of it, "file", "once" a file: that answer stops half-way, its connection stays open
    )
    drip: bool = False  # the headers of an info answer never end
    portal: str = ""  # "info", "file": a web page comes in its place; "elsewhere": a redirect to another host's
    ranges: bool = True  # whether downloads can begin in the middle
    longer: bool = False  # downloads are said to be longer than the hub announces
    wrong: bool = False  # downloads are other bytes than the hub announces
    gated: bool = False  # files are refused with 403 GatedRepo
    edit: Callable[[dict[str, Any]], Any] = lambda info: info  # what is answered in place of the listing
    retry_after: str | None = "0"


@dataclass
class Call:
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


def lfs(name: str) -> bool:
    return name.endswith((".bin", ".safetensors"))


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client may hang up, which is no matter for the terminal."""


class HubServer:
    """`with HubServer({"owner/name": {"config.json": b"..."}}) as server:` serves at `server.url`."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.faults = Faults()
        self.calls: list[Call] = []
        self.over = threading.Event()
        self._hub = _Server(("127.0.0.1", 0), _handler(self, _HubHandler))
        self._cdn = _Server(("127.0.0.1", 0), _handler(self, _CdnHandler))
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_port}"

    def commit(self, repo: str) -> str:
        listing = "".join(f"{name}{_sha256(data)}" for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(listing.encode()).hexdigest()

    def downloads(self) -> list[Call]:
        return [call for call in self.calls if call.path.startswith("/cdn/")]

    def small_downloads(self) -> list[Call]:
        return [call for call in self.calls if "/resolve/" in call.path and not lfs(call.path)]

    def __enter__(self) -> HubServer:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.call = Call(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.owner.calls.append(self.call)
        self.answer(path)

    do_HEAD = do_GET

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.call.sent += len(body)

    def page(self) -> None:
        self.reply(200, b"<!DOCTYPE html><title>Sign in</title>", {"Content-Type": "text/html; charset=utf-8"})

    def serve(self, data: bytes, etag: str) -> None:
        """A file, from where it was asked for."""
        faults = self.owner.faults
        if faults.portal == "file":
            return self.page()
        body = bytes(byte ^ 1 for byte in data) if faults.wrong else data
        start = int(self.call.range.removeprefix("bytes=").rstrip("-")) if self.call.range and faults.ranges else 0
        total = len(body) + faults.longer
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(total - start))
        self.send_header("ETag", f'"{etag}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        stop = len(body)
        silent = faults.stall in ("file", "once")
        faults.stall = "" if faults.stall == "once" else faults.stall
        if faults.cuts or silent:
            faults.cuts -= not silent
            stop = start + (len(body) - start) // 2
        if faults.at_most is not None:
            stop = min(stop, start + faults.at_most)
        self.close_connection = stop < len(body) or faults.longer
        self.wfile.write(body[start:stop])
        self.call.sent = stop - start
        if silent:
            self.owner.over.wait()

    def fail(self, status: int, code: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        if self.owner.faults.retry_after is not None and status in (429, 500, 503):
            headers["Retry-After"] = self.owner.faults.retry_after
        self.reply(status, b"{}", headers)


class _HubHandler(_Handler):
    def answer(self, path: str) -> None:
        if match := _INFO.fullmatch(path):
            self.info(match[1], match[2] or "main")
        elif match := _RESOLVE.fullmatch(path):
            self.resolve(*match.groups())
        else:
            self.fail(404)

    def known(self, repo: str, revision: str) -> bool:
        if repo not in self.owner.repos:
            self.fail(401, "RepoNotFound")
        elif revision not in ("main", self.owner.commit(repo)):
            self.fail(404, "RevisionNotFound")
        else:
            return True
        return False

    def info(self, repo: str, revision: str) -> None:
        faults = self.owner.faults
        if faults.info:
            self.fail(faults.info.pop(0))
        elif faults.portal == "info":
            self.page()
        elif faults.portal == "elsewhere":
            self.reply(302, b"", {"Location": f"{self.owner.cdn_url}/portal"})
        elif faults.stall == "headers" or faults.drip:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            while faults.drip and not self.owner.over.wait(0.01):
                self.wfile.write(b"x")
            self.owner.over.wait()
        elif self.known(repo, revision):
            siblings = []
            for name, data in self.owner.repos[repo].items():
                sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_hash(data)}
                if lfs(name):
                    sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
                siblings.append(sibling)
            info = {"_id": "0", "id": repo, "modelId": repo, "sha": self.owner.commit(repo), "siblings": siblings}
            body = json.dumps(faults.edit(info)).encode()
            if faults.stall == "info":
                self.reply(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
                self.owner.over.wait()
            else:
                self.reply(200, body, {"Content-Type": "application/json"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.known(repo, revision):
            return
        if self.owner.faults.gated:
            return self.fail(403, "GatedRepo")
        if name not in self.owner.repos[repo]:
            return self.fail(404, "EntryNotFound")
        data = self.owner.repos[repo][name]
        commit = {"X-Repo-Commit": self.owner.commit(repo)}
        if lfs(name):
            linked = {"X-Linked-ETag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
            self.reply(302, b"", {**commit, **linked, "Location": f"{self.owner.cdn_url}/cdn/{repo}/{name}"})
        elif self.command == "HEAD":  # of the stock client
            self.reply(200, data, {**commit, "ETag": f'"{_git_hash(data)}"'})
        else:
            self.serve(data, _git_hash(data))


class _CdnHandler(_Handler):
    def answer(self, path: str) -> None:
        faults = self.owner.faults
        if path == "/portal":
            return self.page()
        if faults.cdn and (status := faults.cdn.pop(0)):
            return self.fail(status)
        _, _, owner, repo, name = path.split("/", 4)
        data = self.owner.repos[f"{owner}/{repo}"][name]
        self.serve(data, _sha256(data))


def _handler(owner: HubServer, kind: type[_Handler]) -> type[_Handler]:
    return type(kind.__name__, (kind,), {"owner": owner})
