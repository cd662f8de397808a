"""Every docstring example and every Python block of README and docs runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import nervure

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(nervure.__path__, "nervure.")
    if not info.name.endswith("__main__") and ".migrations" not in info.name
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_they_say(page, capsys):
    names: dict = {"__name__": "page"}  # the blocks of a page follow one another
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
        expected = re.findall(r"print\(.*\)  # (.+)", block)
        printed = capsys.readouterr().out.splitlines()
        assert not expected or printed == expected


def test_no_file_hides_a_part():
    long = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "src").rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
