import builtins
import io
import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nervure._kit import MissingExtra
from nervure.feed import FeedError, parse
from nervure.feed.parse import MOST_DEPTH, MOST_PAPERS, clean, decode
from nervure.spec import arxiv_id

SOURCE = "https://example.org/feed"
ATOM = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom">
  <title>the feed's own title</title><id>http://arxiv.org/api/x</id>
  <entry>
    <id>http://arxiv.org/abs/2601.00001v2</id>
    <title>Pruning
      without tears</title>
    <updated>2026-01-03T10:00:00+01:00</updated><published>2026-01-02T10:00:00+01:00</published>
    <link href="http://arxiv.org/abs/2601.00001v2" rel="alternate" type="text/html"/>
    <link href="http://arxiv.org/pdf/2601.00001v2" rel="related" title="pdf"/>
    <summary>  We prune.
    It works.  </summary>
    <author><name>Ada</name><title>not the title</title></author>
    <arxiv:comment>12 pages</arxiv:comment>
  </entry>
</feed>"""


def read(text, **options):
    return parse(text.encode() if isinstance(text, str) else text, source=SOURCE, **options)


def one(text, **options):
    found = read(text, **options)
    assert (len(found.papers), found.skipped) == (1, 0)
    return found.papers[0]


def entry(inside, head='<?xml version="1.0"?>'):
    return f'{head}<feed xmlns="http://www.w3.org/2005/Atom"><entry><link href="https://example.org/a"/>{inside}</entry></feed>'


def test_atom_as_arxiv_serves_it():
    paper = one(ATOM)
    assert paper.id == "arxiv:2601.00001"
    assert paper.title == "Pruning without tears"
    assert paper.link == "https://arxiv.org/abs/2601.00001"
    assert paper.summary == "We prune. It works."
    assert paper.published == "2026-01-02T09:00:00Z"
    assert (paper.votes, paper.source, paper.family, paper.score) == (None, SOURCE, "", 0)


def test_daily_papers():
    values = [
        {
            "paper": {
                "id": "2601.00002",
                "title": "A",
                "summary": "S",
                "upvotes": 12,
                "publishedAt": "2026-01-02T00:00:00.000Z",
            },
            "publishedAt": "2026-01-05T00:00:00.000Z",
            "title": "A",
            "numComments": 3,
        }
    ]
    paper = one(json.dumps(values))
    assert (paper.id, paper.link) == ("arxiv:2601.00002", "https://arxiv.org/abs/2601.00002")
    assert (paper.votes, paper.published, paper.summary) == (12, "2026-01-02T00:00:00Z", "S")


def test_a_plain_list():
    values = [
        {"link": "https://example.org/p?q=1#part", "title": "A", "votes": 3, "summary": "S"},
        {"id": "https://example.org/b", "title": "B", "abstract": "T"},
        {"id": "hep-th/9901001", "title": "C", "votes": 2.0},
    ]
    first, second, third = read(json.dumps(values)).papers
    assert (first.link, first.votes, first.id[:5]) == ("https://example.org/p?q=1", 3, "link:")
    assert (second.link, second.summary, second.votes) == ("https://example.org/b", "T", None)
    assert (third.id, third.votes) == ("arxiv:hep-th/9901001", 2)
    assert len(first.id) == 37


def test_what_cannot_be_used_is_counted():
    values = [
        None,
        7,
        "text",
        [],
        {},
        {"title": "no link"},
        {"title": ["A"], "link": "https://example.org"},
        {"title": "\u202e\x00 ", "link": "https://example.org"},
        {"title": "A", "link": "javascript:alert(1)"},
        {"title": "A", "link": "file:///etc/passwd", "id": "x"},
        {"title": "A", "link": "https://example.org/\n<b>"},
        {"title": "A", "link": {"href": "https://example.org"}},
        {"paper": {"title": "A"}},
        {"title": "A", "id": 2601.00001},
    ]
    found = read(json.dumps(values))
    assert (found.papers, found.skipped) == ((), len(values))


@pytest.mark.parametrize("votes", ["12", True, -1, 1e300, float("nan"), float("inf"), None, [], 10**400])
def test_votes_that_are_none(votes):
    text = json.dumps([{"title": "A", "id": "2601.00001", "votes": votes}])
    assert one(text).votes is None


@pytest.mark.parametrize(
    "when", ["yesterday", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", 7, None, "1-1-1"]
)
def test_dates_that_are_none(when):
    assert one(json.dumps([{"title": "A", "id": "2601.00001", "published": when}])).published == ""


def test_a_paper_that_stands_twice_counts_once():
    found = read(
        json.dumps(
            [{"title": "A", "id": "2601.00001"}, {"title": "B", "link": "https://arxiv.org/pdf/2601.00001v3.pdf"}]
        )
    )
    assert [paper.title for paper in found.papers] == ["A"]


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">
<!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;&c;&c;"><!ENTITY e "&d;&d;&d;&d;&d;&d;&d;&d;&d;&d;">]>
<feed xmlns="http://www.w3.org/2005/Atom"><entry><title>&e;&e;&e;&e;&e;&e;&e;&e;</title></entry></feed>"""
EXTERNAL = """<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<feed xmlns="http://www.w3.org/2005/Atom"><entry><title>&x;</title></entry></feed>"""
PARAMETER = """<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY % x SYSTEM "http://127.0.0.1:1/x.dtd"> %x;]>
<feed xmlns="http://www.w3.org/2005/Atom"/>"""
OUTSIDE = """<!DOCTYPE feed SYSTEM "http://127.0.0.1:1/x.dtd"><feed xmlns="http://www.w3.org/2005/Atom"/>"""


@pytest.mark.parametrize("text", [BOMB, EXTERNAL, PARAMETER, OUTSIDE, BOMB.encode("utf-16")], ids=range(5))
def test_entities_are_refused_and_nothing_is_opened(text, monkeypatch):
    read(ATOM)

    def refuse(*arguments, **options):
        raise AssertionError(f"opened {arguments}")

    for module, name in ((builtins, "open"), (io, "open")):
        monkeypatch.setattr(module, name, refuse)
    start = time.process_time()
    with pytest.raises(FeedError, match="entities"):
        read(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no feed"),
        ("   \n", "no feed"),
        ("<html><body>log in</body></html>", "no Atom feed"),
        ("<rss><channel/></rss>", "no Atom feed"),
        ("<feed></feed>", "no Atom feed"),
        ("<feed", "broken XML"),
        (ATOM[:600], "broken XML"),
        (ATOM + "<more/>", "broken XML"),
        (entry("<title>&nbsp;</title>"), "broken XML"),
        ("{}", "no feed"),
        ("[", "broken JSON"),
        ('[{"title": "A"}] x', "broken JSON"),
        ("[" * 1_000_000, "nested|broken JSON"),
        ("[1" + "0" * 5000 + "]", "broken JSON"),
        (b"\x00\xff\x00\xff" * 10, "no feed"),
        (b"\x1f\x8b\x08\x00", "no feed"),
    ],
    ids=range(16),
)
def test_what_is_no_feed_is_said_to_be_none(text, why):
    with pytest.raises(FeedError, match=why):
        read(text)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(MissingExtra, match=r"pip install 'nervure\[feed\]'"):
        read(ATOM)
    assert read("[]").papers == ()


def test_an_empty_feed_is_one():
    assert read("[]") == read('<feed xmlns="http://www.w3.org/2005/Atom"/>')
    assert read("[]").papers == ()


def test_too_many_elements():
    with pytest.raises(FeedError, match="too many elements"):
        read(entry("<x/>" * 300_000))
    deep = "<x>" * MOST_DEPTH
    with pytest.raises(FeedError, match="too many elements"):
        read(entry(deep + deep.replace("<", "</")))


def test_no_more_papers_than_there_may_be():
    many = [{"title": "A", "link": f"https://example.org/{n}"} for n in range(MOST_PAPERS + 5)]
    assert len(read(json.dumps(many)).papers) == MOST_PAPERS
    atom = "".join(
        f'<entry><title>A</title><link href="https://example.org/{n}"/></entry>' for n in range(MOST_PAPERS + 5)
    )
    assert len(read(f'<feed xmlns="http://www.w3.org/2005/Atom">{atom}</feed>').papers) == MOST_PAPERS


def test_long_texts_are_cut():
    paper = one(entry(f"<title>{'t' * 100_000}</title><summary>{'s ' * 100_000}</summary>"))
    assert len(paper.title) == 500
    assert 7990 <= len(paper.summary) <= 8000


def test_markup_in_a_title_is_text():
    html = one(entry("<title type='html'>&lt;script&gt;alert(1)&lt;/script&gt;</title>"))
    assert html.title == "<script>alert(1)</script>"
    nested = one(entry("<title type='xhtml'><div xmlns='http://www.w3.org/1999/xhtml'>On <i>x</i></div></title>"))
    assert nested.title == "On x"
    cdata = one(entry("<title><![CDATA[<img src=x onerror=alert(1)>]]></title>"))
    assert cdata.title == "<img src=x onerror=alert(1)>"


def test_an_error_of_arxiv_is_told():
    text = ATOM.replace("http://arxiv.org/abs/2601.00001v2</id>", "http://arxiv.org/api/errors#incorrect_id</id>")
    with pytest.raises(FeedError, match=r"does not understand.*We prune"):
        read(text)


@pytest.mark.parametrize("claimed", ["UTF-8", "ISO-8859-1", "utf-16", "no-such", "windows-1252", "idna", "hex"])
@pytest.mark.parametrize("real", ["utf-8", "cp1252", "utf-16", "utf-8-sig"])
def test_whatever_encoding_is_claimed_the_real_one_is_read(claimed, real):
    if (claimed, real) == ("utf-16", "cp1252"):
        pytest.skip("an even number of Latin letters is valid UTF-16 too")
    text = entry("<title>Naïve Müller</title>", head=f'<?xml version="1.0" encoding="{claimed}"?>')
    assert one(text.encode(real)).title == "Naïve Müller"
    values = json.dumps([{"title": "Naïve Müller", "id": "2601.00001"}], ensure_ascii=False)
    assert one(values.encode(real), charset=claimed).title == "Naïve Müller"


def test_encodings_that_are_named_and_needed():
    text = entry("<title>Нейрон</title>", head='<?xml version="1.0" encoding="KOI8-R"?>')
    assert one(text.encode("koi8-r")).title == "Нейрон"
    assert (
        one(
            json.dumps([{"title": "神経", "id": "2601.1234"}], ensure_ascii=False).encode("shift_jis"),
            charset="Shift_JIS",
        ).title
        == "神経"
    )


def test_clean():
    assert clean("a\x1b]0;x\x07b\u2066c\u200bd\ufeff\ud800\x9b", 100) == "a]0;xbcd"
    assert clean("می\u200cخواهم", 100) == "می\u200cخواهم"
    assert clean("a\u2028b\xa0c\td", 100) == "a b c d"
    assert clean("e\u0301", 5) == "é"
    assert clean("ab cd", 3) == "ab"
    assert clean(7, 5) == ""


@given(st.text(max_size=50), st.integers(1, 20))
def test_clean_text_stays_clean(text, most):
    once = clean(text, most)
    assert len(once) <= most
    assert clean(once, most) == once
    once.encode()
    assert once.isprintable() or any(joiner in once for joiner in "\u200c\u200d")


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_feed_or_none(body):
    for start in (b"", b"[", b'[{"title":"a","id":"', b'<?xml version="1.0" encoding="', b"<feed>"):
        try:
            read(start + body, charset="latin-1")
        except FeedError:
            continue


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
    )
)
def test_values_of_any_kind_are_papers_or_none(value):
    names = ("title", "id", "link", "url", "summary", "votes", "published", "paper")
    read(json.dumps([dict.fromkeys(names, value), {"title": "A", "id": "2601.00001", "paper": value, "votes": value}]))


def test_decode_never_fails():
    assert decode(b"") == ""
    assert decode(b"\x81\x8d", "utf-8") == "\ufffd\ufffd"


def test_arxiv_identifiers():
    for text in ("http://arxiv.org/abs/2601.00001v2", "https://www.arxiv.org/pdf/2601.00001", "arXiv:2601.00001v1",
                 "https://export.arxiv.org/abs/2601.00001?context=cs#x", " 2601.00001 "):  # fmt: skip
        assert arxiv_id(text) == "2601.00001"
    assert arxiv_id("https://arxiv.org/abs/math.GT/0309136v1") == "math.GT/0309136"
    for text in ("", "https://arxiv.org.evil.example/abs/2601.00001", "https://example.org/arxiv.org/abs/2601.00001",
                 "2601.000012", "260.00001", "https://arxiv.org/list/cs.LG"):  # fmt: skip
        assert arxiv_id(text) == ""
