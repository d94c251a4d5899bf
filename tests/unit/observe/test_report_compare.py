import re

import pytest
import yaml

from tests.observed_run import STEPS, write_run
from trainer.config_tools import ReportConfig
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.observe.report_compare import differing
from trainer.report import main, write_report


def two_runs(root):
    first, second = write_run(root / "a"), write_run(root / "b")
    other = second.rename(second.parent / "<b>calm")
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 7}))
    return first, other


def test_runs_stand_beside_each_other(tmp_path):
    first, second = two_runs(tmp_path)
    out = tmp_path / "page.html"
    cfg = compose(ReportConfig, "report", [f"run=[{first},'{second}']", f"output={out}"])
    assert write_report(cfg) == 0
    html = out.read_text()
    text = re.sub(r"<[^>]+>", "|", html)
    assert "a/scenes and b/&lt;b&gt;calm" in text
    assert f"|steps||{STEPS}||{STEPS}|" in text
    assert "|Energy per image, gross||0.177 J/image||0.177 J/image|" in text
    assert re.search(r"\|seed\|+-\|+7\|", text)
    assert html.count('polyline points="') == 2 * 3
    assert "<b>calm" not in html


def test_one_run_of_a_list_is_one_run_and_none_is_refused(tmp_path):
    run = write_run(tmp_path)
    assert main([f"run=[{run}]"]) == 0
    alone = (run / "report.html").read_bytes()
    assert main([f"run={run}"]) == 0
    assert (run / "report.html").read_bytes() == alone
    with pytest.raises(BadInput, match=r"run=\[\] names no run"):
        main(["run=[]"])


def test_only_what_differs_is_told():
    configs = [{"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": 3}, "e": []}]
    assert differing(configs) == {"a.c": ["2", "3"], "d": ["None", "-"], "e": ["-", "[]"]}
    assert differing([configs[0], configs[0]]) == {}
