"""Headless Chromium for tests, and what they ask of it."""

import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1100,1400")  # fmt: skip


def open_chromium(profile: Path, *flags: str):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "needs the Debian packages chromium and chromium-driver"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Both programs are named, so that selenium looks for none on the network.
    service = webdriver.ChromeService(executable_path=driver)
    return webdriver.Chrome(options=options, service=service)


def brightness(browser, selector, style):
    script = f"return getComputedStyle(document.querySelector('{selector}')).{style}"
    return sum(int(part) for part in browser.execute_script(script)[4:-1].split(",")[:3]) / 3
