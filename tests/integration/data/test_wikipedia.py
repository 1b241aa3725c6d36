"""The source `wikipedia` through the real wikipedia-api client, against a MediaWiki on loopback."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lscollapse.core import config, outside, web
from lscollapse.core.config import ConfigError, WikipediaSection
from lscollapse.data import corpus, tokenizers
from lscollapse.data.corpus import CorpusError
from tests.servers.mediawiki import MediaWikiServer, Page

ENGLISH = "The lighthouse keeper wrote down the weather every evening before the lamp was lit."
RUSSIAN = "Смотритель маяка каждый вечер записывал погоду, прежде чем зажечь лампу."
JAPANESE = "灯台守は毎晩ランプを灯す前に天気を書き留めた。"

PAGES = {
    "Lighthouse": Page(ENGLISH),
    "Маяк": Page(RUSSIAN),
    "灯台": Page(JAPANESE),
    "Pharos": Page(redirect="Lighthouse"),
    "Light": Page("Light may refer to: a lamp, a colour, a weight, and many another thing.", disambiguation=True),
    "Lamp": Page("A lamp."),
    "Wick": Page("  \n"),
    "Harbour wall": Page("The harbour wall kept the long waves out of the basin all winter.", in_parts=True),
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def wiki() -> Iterator[MediaWikiServer]:
    with MediaWikiServer(PAGES) as server:
        yield server


def settings(wiki: MediaWikiServer, **options: object) -> WikipediaSection:
    return WikipediaSection(contact="keeper@example.org", endpoint=wiki.endpoint, retry_wait=0, **options)  # type: ignore[arg-type]


def load(
    wiki: MediaWikiServer,
    titles: list[str] | None,
    n_excerpts: int,
    n_tokens: int = 8,
    seed: int = 0,
    **options: object,
) -> corpus.Corpus:
    any_script = replace(tokenizers.bert(), unknown=None)  # which knows no Japanese
    return corpus.draw_excerpts("wikipedia", n_excerpts, n_tokens, seed, any_script, titles, settings(wiki, **options))


def test_text_that_the_tokenizer_does_not_know(wiki: MediaWikiServer) -> None:
    with pytest.raises(
        CorpusError, match=r"62% of the ids of MediaWiki \(127\.0\.0\.1\) are the unknown token \(id 100\)"
    ):
        corpus.draw_excerpts("wikipedia", 1, 8, titles=["灯台"], wiki=settings(wiki))


def test_provenance_of_an_article(wiki: MediaWikiServer) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    excerpt = load(wiki, ["Lighthouse"], 1).excerpts[0]
    assert (excerpt.title, excerpt.page_id, excerpt.revision) == ("Lighthouse", "1", "1001")
    assert excerpt.url == "https://wiki.example/wiki/Lighthouse"
    assert excerpt.licence == "CC BY-SA 4.0"
    assert excerpt.source == "MediaWiki (127.0.0.1)"
    assert excerpt.text_sha256 == hashlib.sha256(ENGLISH.encode()).hexdigest()
    assert before <= datetime.fromisoformat(excerpt.retrieved) <= datetime.now(UTC)
    assert excerpt.retrieved.endswith("+00:00")


def test_text_is_that_of_the_article_in_any_script(wiki: MediaWikiServer) -> None:
    found = load(wiki, ["Маяк", "灯台"], 2).excerpts
    assert [excerpt.title for excerpt in found] == ["Маяк", "灯台"]
    assert [excerpt.text_sha256 for excerpt in found] == [
        hashlib.sha256(t.encode()).hexdigest() for t in (RUSSIAN, JAPANESE)
    ]


def test_one_request_an_article_names_tool_and_contact(wiki: MediaWikiServer) -> None:
    load(wiki, ["Lighthouse", "Маяк"], 2)
    assert [call.query["titles"] for call in wiki.calls] == ["Lighthouse", "Маяк"]
    assert {call.query["maxlag"] for call in wiki.calls} == {"5"}
    assert {call.path for call in wiki.calls} == {"/mirror/api.php"}
    for call in wiki.calls:
        assert re.fullmatch(r"lscollapse/\S+ \(keeper@example\.org\) Wikipedia-API/\S+; \S+", call.user_agent)
    assert wiki.most_at_once == 1


def test_what_is_no_article_is_counted(wiki: MediaWikiServer) -> None:
    titles = ["Pharos", "Light", "Lamp", "Wick", "No such page", "de:Leuchtturm", "Lighthouse", "Harbour_wall"]
    found = load(wiki, titles, 2)
    assert [excerpt.title for excerpt in found.excerpts] == ["Lighthouse", "Harbour wall"]
    assert found.skipped == 1
    assert found.counts == {"redirect": 1, "disambiguation": 1, "empty": 1, "missing": 2, "repeated": 1}
    assert found.titles == tuple(titles)


def test_an_answer_in_parts_is_put_together(wiki: MediaWikiServer) -> None:
    excerpt = load(wiki, ["Harbour wall"], 1).excerpts[0]
    assert excerpt.text_sha256 == hashlib.sha256(PAGES["Harbour wall"].text.encode()).hexdigest()
    assert (excerpt.page_id, excerpt.revision) == ("8", "1008")
    assert [call.query.get("excontinue") for call in wiki.calls] == [None, "1"]


def test_too_few_articles_say_what_was_passed_over(wiki: MediaWikiServer) -> None:
    with pytest.raises(
        CorpusError, match=r"has 1 texts .* \(1 are shorter, 1 disambiguation, 1 missing\), 3 were asked"
    ):
        load(wiki, ["Lighthouse", "Light", "Lamp", "Nowhere"], 3)


@pytest.mark.parametrize("fault", ["maxlag", "429", "503", "html", "truncated", "cut"])
def test_a_passing_fault_is_retried(wiki: MediaWikiServer, fault: str) -> None:
    wiki.faults = [fault, fault]
    assert load(wiki, ["Lighthouse"], 1).excerpts[0].text_sha256 == hashlib.sha256(ENGLISH.encode()).hexdigest()
    assert len(wiki.calls) == 3


@pytest.mark.parametrize("fault", ["maxlag", "429", "html"])
def test_a_random_draw_is_retried(wiki: MediaWikiServer, fault: str) -> None:
    wiki.faults = [fault]
    assert load(wiki, None, 1).excerpts[0].title == "Lighthouse"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("maxlag", "the API's error 'maxlag' (Waiting for db1: 7 seconds lagged.), also after 2 retries"),
        ("429", "HTTP 429 Too Many Requests, also after 2 retries"),
        ("503", "HTTP 503 Service Unavailable, also after 2 retries"),
        ("html", "a web page where JSON is due (text/html, 41 bytes): sign in to the network"),
        ("truncated", "bytes): not JSON ("),
        ("cut", "no answer (RemoteProtocolError"),
        ("portal", "a web page where JSON is due (text/html, 20 bytes from localhost:"),
    ],
)
def test_a_lasting_fault_is_one_line(wiki: MediaWikiServer, fault: str, line: str) -> None:
    wiki.faults = [fault] * 9
    with pytest.raises(CorpusError) as caught:
        load(wiki, ["Lighthouse"], 1, max_retries=2)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert len(wiki.calls) == 3


@pytest.mark.parametrize(
    ("fault", "line"), [("denied", "'readapidenied'"), ("404", "HTTP 404 Not Found: is it a wiki's api.php")]
)
def test_what_does_not_pass_is_not_retried(wiki: MediaWikiServer, fault: str, line: str) -> None:
    wiki.faults = [fault]
    with pytest.raises(CorpusError, match=line):
        load(wiki, ["Lighthouse"], 1)
    assert len(wiki.calls) == 1


def article(**more: object) -> dict[str, object]:
    """The answer for a page, with other values in its entry."""
    entry = {"pageid": 1, "ns": 0, "title": "Lighthouse", "lastrevid": 1001, "extract": ENGLISH, **more}
    return {"query": {"pages": {"1": entry}}}


DEEP = json.loads("[" * 90 + "]" * 90)
SHAPE = "127.0.0.1/mirror/api.php answered in another shape than api.php: "


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ([], SHAPE),
        (7, SHAPE),
        ({"error": "broken"}, f"{SHAPE}error: "),
        ({"error": ["broken"]}, f"{SHAPE}error: "),
        ({"error": {"code": ["x"]}}, f"{SHAPE}error.code: "),
        ({"error": {"code": "x\x1b[2J" * 999, "info": "y\n" * 999}}, "answered with the API's error"),
        ({}, "answered without a query"),
        ({"query": "none"}, f"{SHAPE}query: "),
        ({"query": ["none"]}, f"{SHAPE}query: "),
        ({"query": {"pages": "none"}}, f"{SHAPE}query.pages: "),
        ({"query": {"pages": [article()]}}, f"{SHAPE}query.pages: "),
        ({"query": {"pages": None}}, f"{SHAPE}query.pages: "),
        ({"query": {"pages": {"1": "none"}}}, f"{SHAPE}query.pages.1: "),
        ({"query": {"pages": {"1": {"title": "Lighthouse"}}}}, "has no pageid"),
        ({"query": {"title": [], "pages": {"-1": {"title": "x", "missing": ""}}}}, f"{SHAPE}query.title: "),
        (article(title=None), f"{SHAPE}query.pages.1.title: "),
        (article(pageid="1"), f"{SHAPE}query.pages.1.pageid: "),
        (article(lastrevid=[1]), f"{SHAPE}query.pages.1.lastrevid: "),
        (article(extract={"*": ENGLISH}), f"{SHAPE}query.pages.1.extract: "),
        (article(pageprops="disambiguation"), f"{SHAPE}query.pages.1.pageprops: "),
        ({**article(), "continue": "more"}, f"{SHAPE}continue: "),
        ({**article(), "continue": {"excontinue": [1]}}, f"{SHAPE}continue.excontinue"),
    ],
)
def test_an_answer_of_another_shape_is_one_line(wiki: MediaWikiServer, answer: object, place: str) -> None:
    """It names the wiki, and is not asked for again."""
    wiki.faults = [answer] * 9
    with pytest.raises(CorpusError) as caught:
        load(wiki, ["Lighthouse"], 1)
    assert place in str(caught.value) and outside.one_line(str(caught.value)) == str(caught.value)
    assert len(wiki.calls) == 1


@pytest.mark.parametrize(
    ("answer", "place"),
    [(article(extract="\ud800" + ENGLISH), "half of a character"), ({**article(), "warnings": DEEP}, "64 levels")],
)
def test_an_answer_that_cannot_be_kept(wiki: MediaWikiServer, answer: object, place: str) -> None:
    wiki.faults = [answer] * 9
    with pytest.raises(CorpusError, match=place) as caught:
        load(wiki, ["Lighthouse"], 1, max_retries=0)
    assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("drawn", "place"), [("none", "random"), ([{"id": 1}], "random.0.title"), (["Lighthouse"], "random.0")]
)
def test_a_draw_of_another_shape(wiki: MediaWikiServer, drawn: object, place: str) -> None:
    wiki.faults = [{"query": {"random": drawn}}]
    with pytest.raises(CorpusError, match=rf"another shape than api\.php: query\.{place}: "):
        load(wiki, None, 1)


def test_an_entry_that_says_less_than_was_asked_for(wiki: MediaWikiServer) -> None:
    """A page without its URL is a page; one without a revision is none."""
    wiki.faults = [article(length=None), article(lastrevid=None)]
    found = load(wiki, ["Lighthouse"], 1)
    assert found.excerpts[0].url == "" and found.excerpts[0].revision == "1001"
    with pytest.raises(CorpusError, match="1 missing"):
        load(wiki, ["Lighthouse"], 1)


def test_a_wiki_that_stalls(wiki: MediaWikiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One deadline, not one for every retry."""
    monkeypatch.setattr(web, "API_DEADLINE", 0.2)
    wiki.faults = ["stall"] * 9
    with pytest.raises(CorpusError, match=r"api\.php gave no whole answer within 0\.2 s: try later") as caught:
        load(wiki, ["Lighthouse"], 1)
    assert "127.0.0.1" in str(caught.value) and len(wiki.calls) == 1


@pytest.mark.parametrize("when", ["0", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_retry_after_comes_before_the_growing_wait(wiki: MediaWikiServer, when: str) -> None:
    """With a base wait of a day the test would not end if the header were not obeyed."""
    wiki.faults, wiki.retry_after = ["429", "503", "maxlag"], when
    patient = WikipediaSection(contact="keeper@example.org", endpoint=wiki.endpoint, retry_wait=86400)
    assert corpus.draw_excerpts("wikipedia", 1, 8, titles=["Lighthouse"], wiki=patient).excerpts


def test_a_server_that_wants_a_long_wait_is_left_alone(wiki: MediaWikiServer) -> None:
    wiki.faults, wiki.retry_after = ["429"], "3600"
    with pytest.raises(CorpusError, match="asks for a wait of 3600 s"):
        load(wiki, ["Lighthouse"], 1)
    assert len(wiki.calls) == 1


def test_nobody_listens() -> None:
    with MediaWikiServer(PAGES) as closed:
        pass
    with pytest.raises(CorpusError, match=r"no answer \(ConnectError"):
        load(closed, ["Lighthouse"], 1, max_retries=1)


def test_random_articles_are_drawn_in_batches_without_repeats() -> None:
    batches = [["Lamp", "Lighthouse"], ["Lighthouse", "Light", "Маяк"], ["灯台"]]
    with MediaWikiServer(PAGES, random=batches) as wiki:
        found = load(wiki, None, 3)
    assert [excerpt.title for excerpt in found.excerpts] == ["Lighthouse", "Маяк", "灯台"]
    assert found.titles == ("Lamp", "Lighthouse", "Light", "Маяк", "灯台")


def test_the_recorded_titles_replay_a_random_draw() -> None:
    with MediaWikiServer(PAGES, random=[["Light", "Pharos", "灯台"]]) as wiki:
        drawn = load(wiki, None, 2)
        replayed = load(wiki, list(drawn.titles), 2)
    assert [(e.title, e.ids, e.text_sha256) for e in replayed.excerpts] == [
        (e.title, e.ids, e.text_sha256) for e in drawn.excerpts
    ]


def test_a_small_wiki_runs_out() -> None:
    with MediaWikiServer({"Lighthouse": Page(ENGLISH)}) as wiki:
        with pytest.raises(CorpusError, match="has 1 texts"):
            load(wiki, None, 2)
        assert len(wiki.calls) < 20


def test_the_cache_answers_for_the_wiki(wiki: MediaWikiServer, tmp_path: Path) -> None:
    wiki.random = [["Lighthouse", "Маяк"], ["灯台"]]
    first = load(wiki, None, 2, cache_dir=tmp_path / "cache")
    asked = len(wiki.calls)
    again = load(wiki, None, 2, cache_dir=tmp_path / "cache")
    assert again == first  # the time of retrieval too
    assert len(wiki.calls) == asked
    assert load(wiki, None, 1, cache_dir=tmp_path / "cache", seed=1).titles == ("灯台",)


KEPT = {"retrieved": "2026-01-01T00:00:00+00:00", "answer": article()}


@pytest.mark.parametrize(
    "spoilt",
    [
        b'{"retr',
        b"\xff",
        b"[]",
        b"[" * 100_000,
        json.dumps({**KEPT, "retrieved": 1}).encode(),
        json.dumps({**KEPT, "answer": []}).encode(),
        json.dumps({**KEPT, "answer": {}}).encode(),
        json.dumps({**KEPT, "answer": article(title=1)}).encode(),
        json.dumps({**KEPT, "answer": article(extract="\ud800")}).encode(),
    ],
)
def test_a_spoilt_cache_file_is_fetched_again(wiki: MediaWikiServer, tmp_path: Path, spoilt: bytes) -> None:
    load(wiki, ["Lighthouse"], 1, cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(spoilt)
    assert load(wiki, ["Lighthouse"], 1, cache_dir=tmp_path).excerpts[0].revision == "1001"
    assert len(wiki.calls) == 2
    assert all(json.loads(path.read_text()) for path in tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["{}", "[1]", '"Lighthouse"', "[null]"])
def test_a_spoilt_draw_is_made_again(wiki: MediaWikiServer, tmp_path: Path, spoilt: str) -> None:
    load(wiki, None, 1, cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(spoilt)
    assert load(wiki, None, 1, cache_dir=tmp_path).excerpts[0].title == "Lighthouse"


def test_faults_are_not_cached(wiki: MediaWikiServer, tmp_path: Path) -> None:
    wiki.faults = ["html"]
    with pytest.raises(CorpusError):
        load(wiki, ["Lighthouse"], 1, max_retries=0, cache_dir=tmp_path)
    assert load(wiki, ["Lighthouse"], 1, max_retries=0, cache_dir=tmp_path).excerpts


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "asks every tool for a contact"),
        ({"contact": "\u00e9@b"}, "one line of ASCII"),
        ({"contact": "a@b", "language": "en.evil/"}, "no language code"),
        ({"contact": "a@b", "endpoint": "wiki.example/api.php"}, "must be the URL of an api.php"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, object], line: str) -> None:
    with pytest.raises(CorpusError, match=line):
        corpus.draw_excerpts("wikipedia", 1, 8, titles=["X"], wiki=WikipediaSection(**options))  # type: ignore[arg-type]


def test_retries_are_not_negative() -> None:
    for name in ("max_retries", "retry_wait"):
        with pytest.raises(ConfigError, match=f"wikipedia.{name}: input should be greater than or equal to 0, got -1"):
            config.configure(config.Experiment, settings=[f"wikipedia.{name}=-1"])


def test_a_title_is_one_title(wiki: MediaWikiServer) -> None:
    with pytest.raises(CorpusError, match="one article a line"):
        load(wiki, ["Lighthouse|Lamp"], 1)
    assert wiki.calls == []


def test_a_password_in_the_endpoint_is_not_recorded(wiki: MediaWikiServer, tmp_path: Path) -> None:
    private = WikipediaSection(endpoint=wiki.endpoint.replace("//", "//user:secret@"), cache_dir=tmp_path)
    found = corpus.draw_excerpts("wikipedia", 1, 8, titles=["Lighthouse"], wiki=private)
    corpus.freeze(found, tmp_path / "frozen.jsonl")
    assert not any("secret" in path.read_text() for path in tmp_path.iterdir())
