"""A MediaWiki on loopback: the part of api.php that the stock client uses, with faults that tests switch on.

Answers have the shape of the real API in its default format (formatversion 1): pages keyed by page id, "-1" for a
missing one, `redirects` and `normalized` beside them, and a `continue` block after every list of random pages.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit


@dataclass
class Page:
    """`redirect`: the title this page points to. `in_parts`: its text arrives in a continuation of the answer."""

    text: str = ""
    redirect: str | None = None
    disambiguation: bool = False
    in_parts: bool = False


@dataclass
class Call:
    query: dict[str, str]
    user_agent: str
    path: str


class MediaWikiServer:
    """`with MediaWikiServer(pages) as wiki:` serves `wiki.endpoint`; page n has id n and revision 1000 + n.

    `random` holds the batches of titles that list=random gives, one after the other and round again. `faults` holds
    what goes wrong with the next requests, one each: maxlag, denied, 429, 503, 404, html, truncated, cut, stall, portal
    (a redirect to a page of another host), or the JSON value that is answered.
    """

    def __init__(self, pages: dict[str, Page], random: list[list[str]] | None = None) -> None:
        self.pages = pages
        self.ids = {title: number for number, title in enumerate(pages, 1)}
        self.random = random or [list(pages)]
        self.faults: list[Any] = []
        self.over = threading.Event()
        self.retry_after: str | None = "0"
        self.calls: list[Call] = []
        self.at_once = self.most_at_once = self.batches = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wiki": self}))
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.endpoint = f"http://{self.host}/mirror/api.php"

    def __enter__(self) -> MediaWikiServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: dict[str, str]) -> dict[str, Any]:
        assert query["action"] == "query" and query["format"] == "json"
        if query.get("list") == "random":
            titles = self.random[self.batches % len(self.random)][: int(query["rnlimit"])]
            self.batches += 1
            entries = [{"id": self.ids[title], "ns": 0, "title": title} for title in titles]
            return {
                "batchcomplete": "",
                "continue": {"rncontinue": "0.5|0.6|1|0", "continue": "-||"},
                "query": {"random": entries},
            }
        return self.article(query)

    def article(self, query: dict[str, str]) -> dict[str, Any]:
        title = query["titles"].replace("_", " ")
        if title.startswith("de:"):
            return {"batchcomplete": "", "query": {"interwiki": [{"title": title, "iw": "de"}]}}
        body: dict[str, Any] = {}
        if title != query["titles"]:
            body["normalized"] = [{"from": query["titles"], "to": title}]
        page = self.pages.get(title)
        if page is not None and page.redirect is not None and "redirects" in query:
            body["redirects"] = [{"from": title, "to": page.redirect}]
            title, page = page.redirect, self.pages[page.redirect]
        if page is None:
            return {"batchcomplete": "", "query": {**body, "pages": {"-1": {"ns": 0, "title": title, "missing": ""}}}}
        number = self.ids[title]
        entry: dict[str, Any] = {"pageid": number, "ns": 0, "title": title}
        props = query["prop"].split("|")
        if "info" in props and "url" in query["inprop"]:
            entry |= {"lastrevid": 1000 + number, "length": len(page.text)}
            entry["fullurl"] = f"https://wiki.example/wiki/{quote(title.replace(' ', '_'))}"
        if "pageprops" in props and page.disambiguation:
            entry["pageprops"] = {"disambiguation": ""}
        postponed = page.in_parts and "excontinue" not in query
        if "extracts" in props and not postponed:
            entry["extract"] = page.text if query.get("explaintext") else f"<p>{page.text}</p>"
        end = {"continue": {"excontinue": 1, "continue": "||info|pageprops"}} if postponed else {"batchcomplete": ""}
        return {**end, "query": {**body, "pages": {str(number): entry}}}


class _Handler(BaseHTTPRequestHandler):
    wiki: MediaWikiServer

    def do_GET(self) -> None:
        wiki, parts = self.wiki, urlsplit(self.path)
        if parts.path == "/portal":
            return self.send(200, b"<html>Sign in</html>", "text/html")
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        with wiki.lock:
            wiki.calls.append(Call(query, self.headers["User-Agent"], parts.path))
            wiki.at_once += 1
            wiki.most_at_once = max(wiki.most_at_once, wiki.at_once)
            fault = wiki.faults.pop(0) if wiki.faults else ""
        try:
            self.respond(fault, json.dumps(wiki.answer(query)).encode())
        finally:
            with wiki.lock:
                wiki.at_once -= 1

    def respond(self, fault: Any, good: bytes) -> None:
        if not isinstance(fault, str):
            self.send(200, json.dumps(fault).encode())
        elif fault == "stall":
            self.send(200, good[: len(good) // 2], length=len(good))
            self.wiki.over.wait()
        elif fault == "portal":
            self.send(302, b"", location=f"http://localhost:{self.wiki.server.server_port}/portal")
        elif fault == "maxlag":
            error = {"code": "maxlag", "info": "Waiting for db1: 7 seconds lagged.", "lag": 7, "type": "db"}
            self.send(200, json.dumps({"error": error, "servedby": "mw1"}).encode())
        elif fault == "denied":
            error = {"code": "readapidenied", "info": "You need read permission to use this module."}
            self.send(200, json.dumps({"error": error}).encode())
        elif fault == "html":
            self.send(200, b"<!DOCTYPE html><title>Maintenance</title>", "text/html; charset=utf-8")
        elif fault == "truncated":
            self.send(200, good[: len(good) // 2])
        elif fault == "cut":
            self.send(200, good[: len(good) // 2], length=len(good))
            self.close_connection = True
        elif fault:
            self.send(int(fault), b"", "text/plain")
        else:
            self.send(200, good)

    def send(
        self, status: int, body: bytes, kind: str = "application/json", length: int | None = None, location: str = ""
    ) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if self.wiki.retry_after is not None and (status != 200 or b'"error"' in body):
            self.send_header("Retry-After", self.wiki.retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
