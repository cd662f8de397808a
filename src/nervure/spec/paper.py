"""A paper a public feed told of."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_ARXIV = re.compile(
    r"(?i:arxiv\.org/(?:abs|pdf|html)/|arxiv:)?(\d{4}\.\d{4,5}|[a-z-]{2,20}(?:\.[A-Z]{2})?/\d{7})(?:v\d{1,3})?"
)


def arxiv_id(text: str) -> str:
    """Return the arXiv identifier that a link or an id names.

    Args:
        text: Such as ``"https://arxiv.org/abs/1803.03635v5"`` or ``"1803.03635"``.

    Returns:
        The identifier without its version, or an empty string.

    Examples:
        >>> arxiv_id("http://arxiv.org/abs/1803.03635v5"), arxiv_id("https://example.org/1803.03635")
        ('1803.03635', '')
    """
    bare = re.sub(r"\Ahttps?://(?:www\.|export\.)?|[?#].*\Z", "", text.strip()).removesuffix(".pdf")
    found = _ARXIV.fullmatch(bare)
    return found[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Hold one paper of a feed. It is not runnable: nobody has written its method yet.

    Args:
        id: ``"arxiv:1803.03635"``, or a hash of its link.
        source: Address of the feed that told of it first.
        title: One line.
        link: Where to read it, http or https.
        summary: The abstract, or what the feed gives in its place.
        published: ISO 8601 in UTC, or empty.
        votes: What readers of the feed gave it, or None where the feed has no votes.
        family: Family of the papers of the catalogue it is most alike, or empty.
        score: What it is ranked by, in [0, 1].
        first_seen: When it was stored, ISO 8601 in UTC.
    """

    id: str
    source: str
    title: str
    link: str
    summary: str = ""
    published: str = ""
    votes: int | None = None
    family: str = ""
    score: float = 0.0
    first_seen: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)
