import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from nervure._kit import UsageError
from nervure.catalogue import entries
from nervure.report import plots
from nervure.web.site import write_site


@pytest.fixture(scope="module")
def page_count():
    return len(entries())


def test_every_link_of_the_site_leads_to_a_file(library, tmp_path, page_count, monkeypatch):
    monkeypatch.setattr(plots, "checks_plot", lambda verdict: "<svg></svg>")  # a tenth of a second each
    ticks = []
    count = write_site(library, tmp_path / "site", tick=lambda done, total: ticks.append((done, total)))
    pages = sorted((tmp_path / "site").rglob("*.html"))
    lists, runs, networks = 5, 4, 3
    assert count == len(pages) == page_count + lists + runs + networks
    assert ticks[-1] == (count - 1, count)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<form method" not in text.replace('<form method="get"', "")
        for address in re.findall(r'(?:href|src)="([^"]+)"', text):
            if urlsplit(address).scheme or address.startswith("#"):
                continue
            target = (page.parent / unquote(urlsplit(address).path)).resolve()
            assert target.is_file(), f"{page}: {address}"
            assert target.is_relative_to((tmp_path / "site").resolve())


def test_a_site_is_written_over_a_site_and_over_nothing_else(library, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError):
        write_site(library, tmp_path / "mine")
    assert [path.name for path in Path(tmp_path / "mine").iterdir()] == ["thesis.tex"]
