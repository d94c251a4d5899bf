import pytest

from tests.browser.chromium import open_chromium
from tests.observed_run import write_run
from trainer.report import ReportConfig, write_report


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
