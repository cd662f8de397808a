"""Write new papers as a letter: plain text and HTML, all that a feed said escaped."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

import jinja2

from nervure.feed.address import web_address
from nervure.spec import Paper

_SUMMARY = 400
_FOOT = "These papers are not yet runnable. `nervure feed subscriptions` says what you are told of."


@dataclass(frozen=True)
class Digest:
    """Hold the papers of a letter.

    Args:
        papers: The papers, the best first.
        queries: The subscriptions they match; none where they are simply the best.

    Examples:
        >>> paper = Paper(id="arxiv:1", source="", title="<script>", link="https://example.org/a")
        >>> digest = Digest((paper,), ())
        >>> digest.title, "&lt;script&gt;" in digest.html()
        ('nervure: 1 new paper', True)
    """

    papers: tuple[Paper, ...]
    queries: tuple[str, ...]

    @property
    def title(self) -> str:
        """Return the subject: no word of it comes from a feed."""
        return f"nervure: {len(self.papers)} new paper{'' if len(self.papers) == 1 else 's'}"

    def text(self) -> str:
        """Return the letter as plain text."""
        lines = [self.title, ""]
        if self.queries:
            lines += [textwrap.fill(f"They match {', '.join(self.queries)}.", 78), ""]
        for paper in self.papers:
            lines += [textwrap.fill(paper.title, 78, break_long_words=False), web_address(paper.link), _told(paper)]
            summary = textwrap.fill(
                _short(paper.summary), 78, initial_indent="  ", subsequent_indent="  ", break_long_words=False
            )
            lines += [summary, ""] if summary else [""]
        return "\n".join([*lines, _FOOT, ""])

    def html(self) -> str:
        """Return the letter as one HTML page without scripts, images or anything else that is loaded."""
        values = {"title": self.title, "queries": self.queries, "papers": self.papers, "foot": _FOOT}
        functions = {"told": _told, "short": _short, "link": web_address}
        return _templates().get_template("digest.html").render(**values, **functions)

    def message(self, *, sender: str, to: str) -> EmailMessage:
        """Return the letter.

        Args:
            sender: Address it comes from, as `mail.mail_address` gives it.
            to: Address it goes to, likewise.

        Returns:
            The letter with both forms, in ASCII lines that every server takes.
        """
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = sender, to, self.title
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=sender.rpartition("@")[2])
        message.set_content(self.text(), cte="quoted-printable")
        message.add_alternative(self.html(), subtype="html", cte="quoted-printable")
        return message


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("nervure.feed", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _told(paper: Paper) -> str:
    votes = None if paper.votes is None else f"{paper.votes} vote{'' if paper.votes == 1 else 's'}"
    parts: Sequence[str | None] = (paper.family, votes, paper.published[:10], f"score {paper.score:.2f}")
    return " · ".join(part for part in parts if part)


def _short(summary: str) -> str:
    return textwrap.shorten(summary, _SUMMARY, placeholder=" ...")
