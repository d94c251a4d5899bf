import json

import pytest

from tests.browser.chromium import brightness
from tests.observed_run import CAPTIONS

pytestmark = pytest.mark.browser

ASKED = "return performance.getEntriesByType('resource').map(e => e.name)"
SEEN = """return [...document.images].map(i =>
    [i.alt, i.naturalWidth, i.checkVisibility(), i.getBoundingClientRect().width])"""


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
