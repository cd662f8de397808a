"""Read feeds: Atom, and JSON lists of papers. Everything in them is foreign: bounded, cleaned, and only text."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nervure._kit import require
from nervure.feed.address import web_address
from nervure.feed.fetch import FeedError
from nervure.spec import Paper, arxiv_id

MOST_PAPERS, MOST_ELEMENTS, MOST_DEPTH = 2000, 200_000, 100
TITLE, SUMMARY = 500, 8000
_ATOM = "{http://www.w3.org/2005/Atom}"
_FIELDS = ("id", "title", "summary", "content", "published", "updated")
# Encodings a feed may name. Python knows more, some of them slow on purpose-made input.
_ENCODINGS = re.compile(
    r"(?:iso-8859-\d+|windows-\d+|us-ascii|gb\w+|big5|shift_jis|euc-\w+|koi8-\w|utf-?(?:8|16|32)(?:-(?:sig|le|be))?)"
)
# Zero-width joiners belong to words of some scripts; other invisible marks only hide or reorder text.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Parsed:
    """Hold what a feed says.

    Args:
        papers: Its papers, each once, not yet ranked.
        skipped: How many of its entries have no title or no usable link.
    """

    papers: tuple[Paper, ...]
    skipped: int


def parse(body: bytes, *, source: str, charset: str = "") -> Parsed:
    """Read a feed.

    Args:
        body: What the server sent.
        source: The feed's address.
        charset: The encoding the server named.

    Returns:
        Its papers.

    Raises:
        FeedError: If it is neither Atom nor a JSON list of papers.

    Examples:
        >>> body = b'[{"id": "1803.03635", "title": "The Lottery Ticket Hypothesis", "votes": 3}]'
        >>> parse(body, source="https://example.org").papers[0].link
        'https://arxiv.org/abs/1803.03635'
    """
    text = decode(body, charset).lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        values: Iterable[Any] = _atom(text)
    elif text.startswith("["):
        values = _json(text)
    else:
        raise FeedError("this is no feed nervure reads", expected="Atom or a JSON list", found=repr(text[:40]))
    papers: dict[str, Paper] = {}
    skipped = 0
    for count, value in enumerate(values):
        if count == MOST_PAPERS:
            break
        paper = _paper(value, source)
        if paper is None:
            skipped += 1
        else:
            papers.setdefault(paper.id, paper)
    return Parsed(tuple(papers.values()), skipped)


def clean(value: object, most: int) -> str:
    r"""Return text on one line without anything invisible in it.

    Args:
        value: What a feed says; anything but text becomes nothing.
        most: Most characters.

    Returns:
        The text.

    Examples:
        >>> clean("Two\n lines\x1b[31m and \u202ebackwards", 100)
        'Two lines[31m and backwards'
    """
    if not isinstance(value, str):
        return ""
    # Composing characters can make text longer, but no letter has more than a few of them.
    text = unicodedata.normalize("NFC", value[: 4 * most])
    seen = "".join(" " if one.isspace() else one for one in text if one.isspace() or one in _JOINERS or _visible(one))
    return " ".join(seen.split())[:most].rstrip()


def decode(body: bytes, charset: str = "") -> str:
    """Return a feed's text, whatever encoding it claims: what is valid UTF-8 is UTF-8.

    Args:
        body: The bytes.
        charset: What the server's header names; what XML says of itself is looked for here.

    Returns:
        The text.
    """
    declared = re.search(rb"""\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})""", body[:1000])
    named = [json.detect_encoding(body), declared[1].decode("ascii").lower() if declared else "", charset.lower()]
    for name in [one for one in named if _ENCODINGS.fullmatch(one)]:
        try:
            return body.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
    return body.decode("cp1252", errors="replace")


def _visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")


def _paper(value: Any, source: str) -> Paper | None:
    if not isinstance(value, Mapping):
        return None
    inner = value.get("paper")
    if isinstance(inner, Mapping):  # a daily paper: what the list adds stands outside, the paper inside
        value = {**value, **inner}
    title = clean(value.get("title"), TITLE)
    names = [one for one in (value.get("link"), value.get("url"), value.get("id")) if isinstance(one, str)]
    arxiv = next((found for name in names if (found := arxiv_id(name[:2000]))), "")
    link = f"https://arxiv.org/abs/{arxiv}" if arxiv else next((u for n in names if (u := web_address(n.strip()))), "")
    if not title or not link:
        return None
    return Paper(
        id=f"arxiv:{arxiv}" if arxiv else f"link:{hashlib.sha256(link.encode()).hexdigest()[:32]}",
        source=source,
        title=title,
        link=link,
        summary=clean(_first(value, "summary", "abstract", "content"), SUMMARY),
        published=_time(_first(value, "published", "publishedAt", "updated", "date")),
        votes=_votes(_first(value, "votes", "upvotes")),
    )


def _first(value: Mapping[str, Any], *names: str) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _votes(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        return None
    return int(value)


def _time(value: object) -> str:
    try:
        moment = datetime.fromisoformat(clean(value, 40))
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return ""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment.year >= 1000 else ""


def _json(text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise FeedError("the feed is nested too deeply") from error
    except ValueError as error:
        raise FeedError("the feed is broken JSON", found=error, try_="again later") from error
    return list(values)


def _atom(text: str) -> list[dict[str, str]]:
    xml = require("defusedxml.ElementTree", extra="feed")
    common = require("defusedxml.common", extra="feed")
    parser = xml.DefusedXMLParser(target=_Atom(), forbid_dtd=True)
    try:
        parser.feed(text)
        entries: list[dict[str, str]] = parser.close()
    except common.DefusedXmlException as error:
        raise FeedError("the feed defines entities, which no feed needs", found=type(error).__name__) from error
    except (xml.ParseError, ValueError) as error:
        raise FeedError("the feed is broken XML", found=error, try_="again later") from error
    return entries


class _Atom:
    """Collect the entries of an Atom feed while it is read. No tree is built, so none can fill the memory."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []
        self._depth = self._elements = self._size = 0
        self._entry: dict[str, str] | None = None
        self._name = ""
        self._text: list[str] = []

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Take a start tag.

        Raises:
            FeedError: If it is no Atom feed, or has too much in it.
        """
        self._depth, self._elements = self._depth + 1, self._elements + 1
        if self._depth > MOST_DEPTH or self._elements > MOST_ELEMENTS:
            raise FeedError("the feed has too many elements", expected=f"{MOST_ELEMENTS}, {MOST_DEPTH} deep")
        if self._depth == 1 and tag != f"{_ATOM}feed":
            raise FeedError("this is no Atom feed", expected="<feed>", found=f"<{clean(tag, 60)}>")
        name = tag.removeprefix(_ATOM)
        if self._depth == 2:
            self._entry = {} if name == "entry" and len(self.entries) < MOST_PAPERS else None
        elif self._depth == 3 and self._entry is not None:
            if name == "link" and attributes.get("rel", "alternate") == "alternate":
                self._entry.setdefault("link", attributes.get("href", ""))
            elif name in _FIELDS and name not in self._entry:
                self._name, self._text, self._size = name, [], 0

    def data(self, text: str) -> None:
        """Take a piece of text."""
        if self._name and self._size < 4 * SUMMARY:
            self._text.append(text)
            self._size += len(text)

    def end(self, tag: str) -> None:
        """Take an end tag.

        Raises:
            FeedError: If arXiv's feed is an error's.
        """
        if self._entry is not None and self._depth == 3 and self._name:
            self._entry[self._name], self._name = "".join(self._text), ""
        elif self._entry is not None and self._depth == 2:
            if re.match(r"\s*https?://arxiv\.org/api/errors", self._entry.get("id", "")):
                raise FeedError("arXiv does not understand the query", found=clean(self._entry.get("summary"), 200))
            self.entries.append(self._entry)
            self._entry = None
        self._depth -= 1

    def close(self) -> list[dict[str, str]]:
        """Return the entries."""
        return self.entries
