"""Articles of Wikipedia, or of another MediaWiki, through the wikipedia-api client: one at a time, with provenance."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from pydantic import StrictStr, TypeAdapter

from lscollapse.core.config import WikipediaSection
from lscollapse.core.outside import shown
from lscollapse.data.mediawiki import Cache, Transport
from lscollapse.data.texts import CorpusError, Text

DRAWN_PER_EXCERPT = 200  # random articles looked at, at most, for each excerpt asked for
BATCH = 20  # random titles a request
FRUITLESS_BATCHES = 5  # a wiki that gives no new title so often in a row has no more
TITLES = TypeAdapter(list[StrictStr])  # a batch in the cache

# One request an article: its text, revision, URL and whether it is a disambiguation page. See the API's help on maxlag.
QUERY = {
    "prop": "info|extracts|pageprops",
    "inprop": "url",
    "explaintext": 1,
    "exsectionformat": "plain",
    "ppprop": "disambiguation",
    "maxlag": 5,
}


class Articles:
    """An iterator over the texts of articles, to be used as a context manager.

    Redirects are followed; disambiguation pages, empty and missing articles and repeats are passed over. `counts` holds
    how many of each there were, `titles` the titles in the order in which they were drawn or given.

    Raises:
        CorpusError: the settings are wrong, or the wiki cannot be reached or goes on failing.
    """

    def __init__(self, settings: WikipediaSection, seed: int, titles: list[str] | None, limit: int) -> None:
        """`titles`: the articles to take; None draws at most `limit` random ones, kept in the cache for `seed`."""
        import wikipediaapi

        _check(settings)
        self.settings, self.seed, self.given, self.limit = settings, seed, titles, limit
        self.counts: Counter[str] = Counter()
        self.titles: list[str] = []
        self.cache = Cache(settings.cache_dir)
        self.transport = Transport(settings.endpoint, self.cache)
        self.client = wikipediaapi.Wikipedia(
            user_agent=user_agent(settings.contact),
            language=settings.language,
            extra_api_params=QUERY,
            max_retries=settings.max_retries,
            retry_wait=settings.retry_wait,
            transport=self.transport,
        )
        host = urlsplit(settings.endpoint or f"https://{settings.language}.wikipedia.org").hostname
        self.source = f"{'MediaWiki' if settings.endpoint else 'Wikipedia'} ({host})"

    def __enter__(self) -> Articles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transport.close()

    def __iter__(self) -> Iterator[Text]:
        seen: set[int] = set()
        given = None if self.given is None else [title.strip() for title in self.given if title.strip()]
        for title in self._random_titles() if given is None else given:
            self.titles.append(title)
            text = self._article(title)
            if text is None:
                continue
            if int(text.page_id) in seen:
                self.counts["repeated"] += 1
                continue
            seen.add(int(text.page_id))
            yield text

    def _article(self, title: str) -> Text | None:
        """The text of one article; None, counted, if there is none."""
        if "|" in title:
            raise CorpusError(f"{shown(title)!r} is no title: give one article a line, without '|'")
        page = self.client.page(title)
        revision = self._ask(lambda: page.lastrevid)  # the first attribute that is read makes the request
        if revision is None or page.pageid < 0:
            self.counts["missing"] += 1
            return None
        if getattr(page, "redirects", None):
            self.counts["redirect"] += 1
        if "disambiguation" in getattr(page, "pageprops", {}):
            self.counts["disambiguation"] += 1
            return None
        text = getattr(page, "extract", "").strip()
        if not text:
            self.counts["empty"] += 1
            return None
        return Text(
            title=page.title,
            text=text,
            url=page.fullurl or "",
            revision=str(revision),
            licence=self.settings.licence,
            retrieved=self.transport.retrieved,
            page_id=str(page.pageid),
        )

    def _random_titles(self) -> Iterator[str]:
        """New random titles, until `limit` or until the wiki gives no more; kept in the cache for the seed."""
        seen: set[str] = set()
        fruitless = batch = 0
        while len(seen) < self.limit and fruitless < FRUITLESS_BATCHES:
            key = f"random {self.settings.endpoint or self.settings.language} {self.seed} {batch}"
            titles = self.cache.get(key, TITLES.validate_python)
            if titles is None:
                titles = list(self._ask(lambda: self.client.random(limit=BATCH)))
                self.cache.put(key, titles)
            new = [title for title in dict.fromkeys(titles) if title not in seen]
            fruitless = 0 if new else fruitless + 1
            seen.update(new)
            batch += 1
            yield from new

    def _ask(self, request: Any) -> Any:
        """The answer of the client; what it could not get after all its retries is one line."""
        import wikipediaapi

        try:
            return request()
        except KeyError:  # the client's reading of an answer without pages: "de:Katze" is a title of another wiki
            return None
        except wikipediaapi.WikipediaException as error:
            raise CorpusError(
                f"{self.source}: {self.transport.problem}, also after {self.settings.max_retries} retries:"
                " try later, or use --source packaged or a frozen file"
            ) from error


def user_agent(contact: str) -> str:
    """`lscollapse/VERSION (contact)`, to which the client adds its own name. See Wikimedia's User-Agent policy."""
    try:
        version = metadata.version("lscollapse")
    except metadata.PackageNotFoundError:
        version = "0"
    return f"lscollapse/{version} ({contact or 'no contact given'})"


def _check(settings: WikipediaSection) -> None:
    """One line for settings that cannot work.

    Raises:
        CorpusError: no contact for Wikipedia itself, a contact that fits no header, no real language or endpoint.
    """
    if not settings.endpoint and not settings.contact:
        raise CorpusError(
            "Wikipedia asks every tool for a contact: set wikipedia.contact to an e-mail address or a web page of yours"
        )
    if not (settings.contact.isascii() and settings.contact.isprintable()):
        raise CorpusError(
            f"wikipedia.contact {settings.contact!r} must be one line of ASCII: it goes into the User-Agent"
        )
    if not re.fullmatch(r"[a-z][a-z0-9-]*", settings.language):
        raise CorpusError(f"wikipedia.language {settings.language!r} is no language code such as 'en' or 'zh-yue'")
    parts = urlsplit(settings.endpoint or "https://wikipedia.org")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CorpusError(
            f"wikipedia.endpoint {settings.endpoint!r} must be the URL of an api.php: https://HOST/w/api.php"
        )
