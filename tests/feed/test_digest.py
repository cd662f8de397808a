import email
import email.policy
import re
from html.parser import HTMLParser

import pytest

from nervure.feed import Digest
from nervure.spec import Paper

SCRIPT = '<script>alert("1")</script><img src=x onerror=alert(1)>'


def paper(number=1, **more):
    base = {"id": f"arxiv:{number}", "source": "https://example.org", "title": f"Title {number}"}
    return Paper(**{**base, "link": f"https://arxiv.org/abs/2601.0000{number}", "summary": "A summary.", **more})


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_both_forms_hold_every_paper():
    papers = (paper(1, votes=1, family="compress", published="2026-01-02T00:00:00Z", score=0.5), paper(2, votes=7))
    digest = Digest(papers, ("pruning masks", "lora"))
    assert digest.title == "nervure: 2 new papers"
    for form in (digest.text(), Tags(digest.html()).text):
        for part in (
            "Title 1",
            "Title 2",
            "compress · 1 vote · 2026-01-02 · score 0.50",
            "7 votes",
            "pruning masks, lora",
        ):
            assert part in form
    assert "https://arxiv.org/abs/2601.00002\n" in digest.text()
    assert ("href", "https://arxiv.org/abs/2601.00002") in Tags(digest.html()).attributes


def test_nothing_a_feed_says_becomes_markup():
    hostile = paper(title=SCRIPT, summary=SCRIPT, family=SCRIPT, published=SCRIPT)
    tags = Tags(Digest((hostile,), (SCRIPT,)).html())
    assert set(tags.found) == {"html", "head", "meta", "title", "body", "h1", "p", "h2", "a"}
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert tags.text.count("alert") == 8  # twice in each but the date, which is cut
    assert SCRIPT in tags.text


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", 'https://example.org/"onclick="x', "data:text/html,x", "", "https://a b"]
)
def test_a_link_that_is_none_is_not_made_one(link):
    digest = Digest((paper(link=link),), ())
    tags = Tags(digest.html())
    assert "onclick" not in dict(tags.attributes)
    for name, value in tags.attributes:
        assert name != "href" or value.startswith("https://")
    assert "javascript" not in digest.text()


def test_long_texts_are_shortened_and_lines_are_short():
    text = Digest((paper(title="word " * 90, summary="word " * 1500),), ()).text()
    assert max(len(line) for line in text.splitlines()) <= 90
    assert len(text) < 1500


def test_the_letter():
    digest = Digest((paper(title=f"Ünïcode 神経 {SCRIPT}\r\nBcc: eve@example.org", summary="." * 2000),), ())
    raw = digest.message(sender="me@example.org", to="ada@example.org").as_bytes(policy=email.policy.SMTP)
    raw.decode("ascii")
    assert max(len(line) for line in raw.split(b"\r\n")) <= 998
    back = email.message_from_bytes(raw, policy=email.policy.default)
    names = [name.lower() for name in back.keys()]  # noqa: SIM118 - a message is no mapping: names may stand twice
    assert sorted(names) == sorted(["from", "to", "subject", "date", "message-id", "mime-version", "content-type"])
    assert (back["To"], back["From"], back["Subject"]) == ("ada@example.org", "me@example.org", "nervure: 1 new paper")
    assert back["Message-ID"].endswith("@example.org>")
    plain, html = back.iter_parts()
    assert (plain.get_content_type(), html.get_content_type()) == ("text/plain", "text/html")
    assert "神経" in plain.get_content()
    assert "神経" in html.get_content()


def test_nothing_is_loaded_from_anywhere():
    html = Digest((paper(),), ()).html()
    assert not re.search(r"<(script|img|link|iframe|object|style)|url\(|src=", html)
