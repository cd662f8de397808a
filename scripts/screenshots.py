"""Take the pictures of docs/web.md: ``python scripts/screenshots.py``. Needs chromium and chromedriver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
WORK = (
    "run lottery-ticket --data digits --quick",
    "compare similarity --quick",
    "audit lenet-300-100 --data digits --train 100 --budget 30",
    "landscape lenet-300-100 --data digits --train 100 --points 17",
)


def main() -> None:
    """Fill a store of its own, serve it, and photograph six pages."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    # Named, or selenium asks its makers' server for one.
    browser_path, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser_path or not driver_path:
        sys.exit("chromium and chromedriver are needed: apt install chromium chromium-driver")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NERVURE_STORE"] = str(Path(folder) / "store.db")
        command = [sys.executable, "-m", "nervure.cli"]
        for words in WORK:
            print(f"nervure {words}", flush=True)
            subprocess.run([*command, *words.split()], cwd=folder, stdout=subprocess.DEVNULL, check=False)
        server = subprocess.Popen([*command, "web", "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True)
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, "--window-size=1000,900"):
            options.add_argument(flag)
        options.binary_location = browser_path
        browser = webdriver.Chrome(options=options, service=Service(driver_path))
        try:
            home = re.search(r"http://[^/ ]+", server.stdout.readline())[0]
            shoot(browser, home)
        finally:
            browser.quit()
            server.terminate()
            server.wait()


def shoot(browser, home: str) -> None:
    """Photograph the pages.

    Args:
        browser: A driver.
        home: The server's address.
    """

    def first(page: str, pattern: str) -> str:
        browser.get(home + page)
        return re.search(pattern, browser.page_source)[0]

    pages = {
        "papers": "/?q=winning+tickets",
        "paper": "/paper/lottery-ticket",
        "run": first("/runs", r"/run/[0-9a-f]{12}(?=\">lottery)"),
        "leaderboard": first("/leaderboards", r"/run/[0-9a-f]{12}"),
        "audit": first("/networks", r"/network/audit-[^\"]+"),
        "landscape": first("/networks", r"/network/landscape-[^\"]+"),
    }
    for name, page in pages.items():
        browser.get(home + page)
        if name == "audit":
            browser.find_element("id", "theme").click()
        if name == "landscape":
            browser.execute_script("document.getElementById('surface').scrollIntoView()")
        time.sleep(1.0)
        browser.save_screenshot(str(IMAGES / f"{name}.png"))
        if name == "audit":
            browser.find_element("id", "theme").click()
        print(IMAGES / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
