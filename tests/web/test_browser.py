"""The pages in a real browser: headless Chromium, driven by its own driver, against the real command."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nervure.app.library import Library
from nervure.store import Store

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CLAIM = "masks-signs-lrr/single-neuron"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER) and "NERVURE_NEEDS_SERVERS" not in os.environ,
        reason="needs Debian's chromium and chromium-driver",
    ),
]
# Without them Chromium asks its makers' servers for updates.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
PAGES = ("/", "/paper/lottery-ticket", "/paper/snip-not-there", "/runs", "/leaderboards", "/networks", "/feed",
         "/network/audit-one", "/network/landscape-net", "/side?run=audit-one&run=audit-two")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, filled):
    return filled(tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def home(folder):
    words = [sys.executable, "-m", "nervure.cli", "web", "--port", "0", "--store", "store.db", "--report", "reports"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://[^/ ]+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@contextlib.contextmanager
def chromium(*, width=1100, script=True):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--window-size={width},1000"):
        options.add_argument(flag)
    if not script:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def one_browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def browser(one_browser, home):
    """A browser whose console stays silent and which asks no other host for anything."""
    one_browser.get(f"{home}/nothing-yet")
    one_browser.execute_script("localStorage.clear()")
    one_browser.get_log("browser")
    one_browser.get_log("performance")
    yield one_browser
    refused = "the server responded with a status of 404"
    assert [line for line in one_browser.get_log("browser") if refused not in line["message"]] == []
    assert asked(one_browser) <= {urlsplit(home).netloc}


def asked(browser):
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    addresses = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    return {urlsplit(address).netloc for address in addresses if not address.startswith(("data:", "about:", "chrome:"))}


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)
    return found


def shown(browser):
    return [one for one in browser.find_elements("css selector", "#papers > li") if one.is_displayed()]


def test_papers_are_found_as_one_types_and_opened(browser, home):
    browser.get(home)
    everything = len(shown(browser))
    browser.find_element("name", "q").send_keys("winning tick")
    found = until(lambda: len(shown(browser)) < everything and shown(browser))
    assert browser.find_element("css selector", "#count strong").text == str(len(found))
    browser.find_element("css selector", "select[name=outcome]").send_keys("holds")
    titles = [one.find_element("tag name", "a").text for one in shown(browser)]
    assert any(title.startswith("The Lottery Ticket Hypothesis") for title in titles)
    browser.find_element("partial link text", "The Lottery Ticket Hypothesis: Finding").click()
    assert until(lambda: "/paper/lottery-ticket" in browser.current_url)
    browser.back()
    browser.find_element("name", "q").clear()
    browser.find_element("name", "q").send_keys("zzzz")
    assert until(lambda: browser.find_element("id", "nothing").is_displayed())


def test_a_run_is_started_watched_and_read(browser, home):
    browser.get(f"{home}/paper/{CLAIM.split('/')[0]}")
    form = next(
        one
        for one in browser.find_elements("css selector", "form.start")
        if one.find_element("name", "what").get_attribute("value") == f"run {CLAIM}"
    )
    form.find_element("name", "quick").click()
    form.find_element("tag name", "button").click()
    until(lambda: "/started/" in browser.current_url)
    until(lambda: browser.find_element("id", "state").text == "done", 120)
    assert browser.find_element("id", "bar").get_property("value") == 1
    assert browser.find_elements("id", "stop") == []
    browser.find_element("css selector", "#result a").click()
    until(lambda: "/run/" in browser.current_url)
    assert "Rehearsal: not a verdict" in browser.find_element("id", "part").text
    assert browser.find_elements("css selector", "#part svg")


def test_a_run_is_stopped(browser, home):
    browser.get(f"{home}/paper/{CLAIM.split('/')[0]}")
    browser.find_element("css selector", "form.start button").click()
    until(lambda: "/started/" in browser.current_url)
    browser.find_element("css selector", "#stop button").click()
    until(lambda: [one.text for one in browser.find_elements("id", "state")] == ["stopped"])


def test_two_runs_are_laid_side_by_side(browser, home):
    browser.get(f"{home}/runs")
    for box in browser.find_elements("css selector", "input[name=run]")[:2]:
        box.click()
    browser.find_element("css selector", "form button:not(.sort)").click()
    until(lambda: "/side" in browser.current_url)
    assert len(browser.find_elements("css selector", ".two section svg")) == 2


def test_the_dark_is_chosen_and_kept(browser, home):
    def paper():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    browser.get(home)
    light = paper()
    browser.find_element("id", "theme").click()
    dark = paper()
    browser.get(f"{home}/runs")
    assert paper() == dark != light
    browser.find_element("id", "theme").click()
    assert paper() == light


def test_tables_are_sorted_by_value(browser, home, folder):
    with Store.open(folder / "store.db") as store:
        run = next(run for run in Library(store).runs() if run.as_claimed)
    browser.get(f"{home}/run/{run.id}")
    table = next(one for one in browser.find_elements("css selector", "table.sortable") if "signs flipped" in one.text)
    head = table.find_elements("css selector", "th button")[2]

    def column():
        return [float(one.text) for one in table.find_elements("css selector", "tbody td:nth-child(3)")]

    head.click()
    assert column() == sorted(column())
    head.click()
    assert column() == sorted(column(), reverse=True)
    assert table.find_element("css selector", "th:nth-child(3)").get_attribute("aria-sort") == "descending"


def test_a_page_follows_a_run_at_a_terminal(browser, home, folder, recorded):
    with Store.open(folder / "store.db") as store:
        run = next(run for run in Library(store).runs() if run.as_claimed)
        browser.get(f"{home}/run/{run.id}")
        assert "seeds 0, 1, 2 " in browser.find_element("id", "part").text
        time.sleep(0.5)  # the page opens its stream
        store.add(recorded(3))
    until(lambda: "seeds 0, 1, 2, 3" in browser.find_element("id", "part").text)


def test_the_surface_turns_by_mouse_and_keys(browser, home):
    from selenium.webdriver import ActionChains, Keys

    browser.get(f"{home}/network/landscape-net")
    place = until(lambda: browser.find_elements("css selector", "#graph canvas"))[0]
    before = place.screenshot_as_png
    ActionChains(browser).move_to_element(place).click_and_hold().move_by_offset(90, 30).release().perform()
    dragged = until(lambda: (now := place.screenshot_as_png) != before and now)
    browser.find_element("id", "graph").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    until(lambda: place.screenshot_as_png != dragged)
    browser.find_element("id", "reset").click()


def violations(browser):
    axe = Path(find_spec("axe_core_python").origin).parent / "axe.min.js"
    browser.execute_script(axe.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    return [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_keeps_anyone_out(browser, home, theme):
    browser.get(home)
    browser.execute_script("localStorage.setItem('theme', arguments[0])", theme)
    runs = re.findall(r"/run/[0-9a-f]{12}", page_source(browser, f"{home}/runs"))
    for page in (*PAGES, *dict.fromkeys(runs)):
        browser.get(home + page)
        assert violations(browser) == [], page


def page_source(browser, address):
    browser.get(address)
    return browser.page_source


def test_every_page_fits_a_phone_and_is_walked_by_keyboard(home):
    with chromium(width=500) as browser:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        )
        runs = re.findall(r"/run/[0-9a-f]{12}", page_source(browser, f"{home}/runs"))
        for page in (*PAGES, *dict.fromkeys(runs)):
            browser.get(home + page)
            assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 360, page
        browser.get(home)
        from selenium.webdriver import ActionChains, Keys

        focused = []
        for _ in range(8):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            focused.append(browser.switch_to.active_element.text)
        assert focused[:3] == ["To the content", "nervure", "Papers"]


def test_reading_needs_no_script(home):
    with chromium(script=False) as browser:
        browser.get(home)
        assert not browser.find_element("id", "theme").is_displayed()
        everything = len(shown(browser))
        browser.find_element("name", "q").send_keys("lottery")
        browser.find_element("css selector", "#filters button").click()
        assert 0 < len(shown(browser)) < everything
        browser.find_element("partial link text", "The Lottery Ticket Hypothesis: Finding").click()
        assert browser.find_elements("css selector", "main svg")
