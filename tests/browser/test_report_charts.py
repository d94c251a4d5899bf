"""The report's curves in headless Chromium: hover, zoom, filter, axes, keyboard, print."""

import json
import re
import threading

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.browser.chromium import brightness
from tests.observed_run import IMAGES_PER_STEP, STEPS, metrics_row, write_run
from trainer.observe.evaluations import hold_metrics
from trainer.report import ReportConfig, report_server, write_report

pytestmark = pytest.mark.browser

LOSS, SPEED = "train/loss", "speed/images_per_s"
X_TEXTS = """return [...document.querySelectorAll('figure[data-panel] svg')].map(svg =>
    [...svg.querySelectorAll('text[text-anchor=middle]')].map(t => t.textContent).join(' '))"""
FRAME = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def chart(browser, key):
    return browser.find_element("css selector", f'figure[data-panel="{key}"] svg')


def move_to(browser, key, frac):
    """Move the pointer to a share of a chart's x axis; return the actions to go on with."""
    svg = chart(browser, key)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    width_px, natural_px = svg.size["width"], float(svg.get_dom_attribute("viewBox").split()[2])
    inner_px = (52 + frac * (natural_px - 52 - 14)) * width_px / natural_px
    return ActionChains(browser, duration=20).move_to_element_with_offset(
        svg, round(inner_px - width_px / 2), 0
    )


def told(browser, key):
    browser.execute_script(FRAME)
    return browser.find_element("css selector", f'figure[data-panel="{key}"] .readout').text


def place(browser):
    browser.execute_script(FRAME)
    return browser.find_element("id", "place").text


def step_told(browser):
    return int(re.search(r"([\d,]+) steps", place(browser))[1].replace(",", ""))


def assert_equal_to_the_data(browser):
    row = metrics_row(step_told(browser), 0, 0.0)
    for key in (LOSS, SPEED):
        assert float(told(browser, key)) == pytest.approx(row[key], rel=1e-5)


@pytest.fixture
def opened(browser, report):
    browser.get(report.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_hovering_one_chart_tells_the_data_in_all(opened):
    for frac in (0.1, 0.5, 0.9):
        move_to(opened, SPEED, frac).perform()
        assert abs(step_told(opened) - frac * STEPS) < 4
        assert f"{step_told(opened) * IMAGES_PER_STEP:,} images" in place(opened)
        assert f"nearest pictures: step {STEPS}" in place(opened)
        assert_equal_to_the_data(opened)


def test_dragging_zooms_all_charts_and_a_double_click_ends_it(opened):
    before = opened.execute_script(X_TEXTS)
    assert len(set(before)) == 1
    move_to(opened, LOSS, 0.25).click_and_hold().perform()
    move_to(opened, LOSS, 0.5).release().perform()
    zoomed = opened.execute_script(X_TEXTS)
    assert len(set(zoomed)) == 1
    numbers = [float(text.removesuffix("k")) for text in zoomed[0].split()[:-2]]
    whole = STEPS * IMAGES_PER_STEP / 1000
    assert min(numbers) >= 0.24 * whole
    assert max(numbers) <= 0.51 * whole
    move_to(opened, SPEED, 1.0).perform()
    assert abs(step_told(opened) - 0.5 * STEPS) < 4
    move_to(opened, SPEED, 0.5).double_click().perform()
    assert opened.execute_script(X_TEXTS) == before


def test_an_attempt_can_be_left_out(opened):
    move_to(opened, LOSS, 0.2).perform()
    assert step_told(opened) < 100
    first, second = opened.find_elements("css selector", "#attempts input")
    first.click()
    move_to(opened, LOSS, 0.0).perform()
    assert step_told(opened) == 101  # the second attempt begins after step 100
    second.click()
    assert not opened.find_elements("css selector", "figure[data-panel] polyline")
    first.click()
    move_to(opened, LOSS, 1.0).perform()
    assert step_told(opened) == 100


def test_the_same_curves_over_steps_hours_and_joules(opened):
    axis = Select(opened.find_element("id", "axis"))
    words = {"steps": "steps", "hours": "hours since the start", "joules": "joules of training"}
    for name, title in words.items():
        axis.select_by_value(name)
        assert all(text.endswith(title) for text in opened.execute_script(X_TEXTS))
        move_to(opened, LOSS, 0.6).perform()
        assert_equal_to_the_data(opened)
    *_, hours, joules, _ = re.split(r" · ", place(opened))
    # Ten watts for as long as the two attempts went on.
    assert float(joules.removesuffix(" J").replace(",", "")) == pytest.approx(
        10 * 3600 * float(hours.removesuffix(" h")), rel=1e-3
    )


def test_arrow_keys_move_the_cursor_and_say_where_it_is(opened):
    svg = chart(opened, LOSS)
    svg.send_keys(Keys.HOME)
    assert step_told(opened) == 1
    svg.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert step_told(opened) == 3
    assert_equal_to_the_data(opened)
    assert told(opened, LOSS) in svg.get_attribute("aria-valuetext")
    assert svg.get_attribute("role") == "slider"
    assert svg.get_attribute("aria-label") == "Loss"
    svg.send_keys(Keys.END, Keys.ARROW_LEFT)
    assert step_told(opened) == STEPS - 1
    before = opened.execute_script(X_TEXTS)
    svg.send_keys("+")
    assert opened.execute_script(X_TEXTS) != before
    svg.send_keys(Keys.ESCAPE)
    assert opened.execute_script(X_TEXTS) == before


def test_paper_has_all_charts_and_no_tools(opened):
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    figures = opened.find_elements("css selector", "figure[data-panel] svg")
    assert len(figures) == 3
    assert all(figure.is_displayed() for figure in figures)
    assert not opened.find_element("id", "tools").is_displayed()
    assert opened.execute_cdp_cmd("Page.printToPDF", {})["data"]


def test_the_dark_scheme_colours_what_the_script_draws(opened):
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    move_to(opened, LOSS, 0.5).perform()
    opened.execute_script(FRAME)
    page = brightness(opened, "body", "backgroundColor")
    for selector, style in ((".cursor line", "stroke"), (".dot", "fill"), ("#axis", "color")):
        assert brightness(opened, selector, style) - page > 80


def test_nothing_moves_by_itself(opened):
    moving = """return [...document.querySelectorAll('*')].filter(e => {
        const style = getComputedStyle(e);
        return parseFloat(style.transitionDuration) || style.animationName !== 'none'; }).length"""
    assert opened.execute_script(moving) == 0


def test_without_scripts_the_charts_are_there(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(report.as_uri())
    assert len(browser.find_elements("css selector", "figure[data-panel] polyline")) == 4
    assert not browser.find_element("id", "tools").is_displayed()


def test_no_other_script_runs(browser, report):
    html = report.read_text().replace("</main>", "<script>window.bad = 1</script></main>")
    report.write_text(html)
    browser.get(report.as_uri())
    assert browser.execute_script("return window.bad") is None
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


def test_a_run_may_be_called_anything(browser, tmp_path):
    made = write_run(tmp_path / "made")
    name = "<!--<script><img src=x onerror=alert(1)>"
    run = made.rename(made.parent / name)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps({**json.loads(row), "eval/</script><b>": 0.5}) for row in rows[:3]] + rows
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    write_report(ReportConfig(run=str(run), dataset=None, output=str(tmp_path / "page.html")))
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert name in browser.title
    assert browser.find_element("id", "axis").is_displayed()


@pytest.fixture
def comparison(browser, tmp_path):
    runs = [str(write_run(tmp_path / name)) for name in ("calm", "stormy")]
    page = tmp_path / "comparison.html"
    write_report(ReportConfig(run=tuple(runs), dataset=None, output=str(page)))
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_runs_lie_over_each_other_and_each_can_be_left_out(comparison):
    move_to(comparison, SPEED, 0.5).perform()
    value = metrics_row(step_told(comparison), 0, 0.0)[SPEED]
    names = [word.split(": ") for word in told(comparison, SPEED).split(" · ")]
    assert [name for name, _ in names] == ["calm/scenes", "stormy/scenes"]
    assert all(float(number) == pytest.approx(value, rel=1e-5) for _, number in names)
    lines = "figure[data-panel] polyline.bold"
    colours = {
        line.value_of_css_property("stroke")
        for line in comparison.find_elements("css selector", lines)
    }
    assert len(colours) == 2
    comparison.find_elements("css selector", "#runs input")[0].click()
    shown = comparison.find_elements("css selector", lines)
    assert {line.value_of_css_property("stroke") for line in shown} < colours
    assert len({line.value_of_css_property("stroke") for line in shown}) == 1


def test_a_live_page_shows_new_rows_and_says_when_the_run_is_finished(browser, tmp_path):
    run = write_run(tmp_path)
    cfg = ReportConfig(run=str(run), dataset=None, output=None)
    file = run / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:-20]))

    def status():
        return browser.find_element("id", "status").text

    def last_step():
        chart(browser, LOSS).send_keys(Keys.END)
        return step_told(browser)

    with report_server(cfg) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        wait = WebDriverWait(browser, 60, ignored_exceptions=[WebDriverException, TypeError])
        with hold_metrics(run):
            browser.get(server.url)
            wait.until(lambda _: status() == "live")
            assert last_step() == STEPS - 20
            with file.open("a") as more:
                more.write("".join(rows[-20:]))
            wait.until(lambda _: last_step() == STEPS)
        wait.until(lambda _: status() == "the run is finished")
        server.shutdown()
    assert browser.get_log("browser") == []
