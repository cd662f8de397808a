"""Floor 7: public feeds of papers. Reads, ranks and mails them; nothing a feed says is ever trusted or executed."""

from nervure.feed.digest import Digest
from nervure.feed.fetch import FeedError, Fetched, Fetcher
from nervure.feed.parse import Parsed, parse
from nervure.feed.rank import Ranker, matches, twin
from nervure.feed.sources import SOURCES

__all__ = ["SOURCES", "Digest", "FeedError", "Fetched", "Fetcher", "Parsed", "Ranker", "matches", "parse", "twin"]
