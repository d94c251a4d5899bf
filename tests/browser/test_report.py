import json
import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver

from tests.observed_run import CAPTIONS, write_run
from trainer.report import ReportConfig, write_report

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1100,1400")  # fmt: skip
ASKED = "return performance.getEntriesByType('resource').map(e => e.name)"
SEEN = """return [...document.images].map(i =>
    [i.alt, i.naturalWidth, i.checkVisibility(), i.getBoundingClientRect().width])"""


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


@pytest.fixture
def report(tmp_path):
    run = write_run(tmp_path / "made")
    write_report(ReportConfig(run=str(run), dataset=None, output=None))
    return run / "report.html"


@pytest.fixture
def browser(tmp_path):
    chromium = open_chromium(tmp_path / "profile")
    yield chromium
    chromium.quit()


def brightness(browser, selector, style):
    script = f"return getComputedStyle(document.querySelector('{selector}')).{style}"
    return sum(int(part) for part in browser.execute_script(script)[4:-1].split(",")[:3]) / 3


def test_a_browser_shows_all_of_the_report(browser, report):
    browser.get(report.as_uri())
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # What the browser's own start page loads is not the report's.
    urls = {one["request"]["url"] for one in asked if one["documentURL"] == report.as_uri()}
    assert report.as_uri() in urls
    assert all(url == report.as_uri() or url.startswith("data:") for url in urls)
    assert not [name for name in browser.execute_script(ASKED) if not name.startswith("data:")]

    pictures = browser.execute_script(SEEN)
    assert len(pictures) == 3 * len(CAPTIONS)
    for alt, natural_px, visible, shown_px in pictures:
        assert alt
        assert natural_px > 0
        assert visible
        assert shown_px > 40

    body = browser.find_element("tag name", "body").text
    for heading in ("Samples", "Evaluation", "Training", "Time and energy",
                    "Energy, carbon and cost", "Data", "Autoencoder",
                    "Configuration", "Lineage", *CAPTIONS):  # fmt: skip
        assert heading in body
    assert len(browser.find_elements("css selector", "svg polyline")) == 4


def test_the_page_is_legible_in_both_colour_schemes_and_on_a_phone(browser, report):
    contrasts = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(report.as_uri())
        page = brightness(browser, "body", "backgroundColor")
        contrasts[scheme] = [
            brightness(browser, selector, style) - page
            for selector, style in [
                ("p", "color"),
                ("svg text", "fill"),
                ("polyline.bold", "stroke"),
            ]
        ]
    assert max(contrasts["light"]) < -80
    assert min(contrasts["dark"]) > 80
    phone = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
