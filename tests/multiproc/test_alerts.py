"""W&B tells the user of what goes wrong on any rank, at once, from rank 0 alone."""

import time
from functools import partial

import pytest
import wandb

from tests.multiproc.test_stuck import MET, catch_fire, run, sleep_forever
from tests.wandb_server import WandbServer, needs_wandb_server
from trainer.observe.jsonl import read_rows
from trainer.observe.wandb_session import read_kept

pytestmark = [pytest.mark.multiproc, needs_wandb_server]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as running:
        yield running


@pytest.fixture
def alerted(server, tmp_path, monkeypatch):
    """Train a toy on two ranks; return their exit codes and what W&B was told to tell."""
    wandb.teardown()  # the ranks are forks of this process
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)

    def go(changes=(), **faults):
        codes = run(tmp_path, changes={"logging.wandb": "online", **dict(changes)}, **faults)
        name = read_kept(tmp_path)["id"]
        assert server.history(name) or not codes.count(0)
        mine = [each for each in server.alerts() if each["runName"] == name]
        return codes, [(each["title"].split(": ")[1], each["text"]) for each in mine]

    return go


def test_of_a_rank_that_holds_up_all_before_the_attempt_ends(alerted):
    # Twice the period of its beats is left for that, 0.6 s here.
    limit = {"watchdog.timeout_s": 12.0}
    codes, [(kind, text)] = alerted(limit, feed_acts={MET[1]: sleep_forever}, others_s=30.0)
    assert codes == [85, 85]
    assert kind == "stuck"
    assert "held up by rank 1 on " in text


@pytest.mark.parametrize("guilty", [0, 1])
def test_of_the_error_of_the_rank_that_failed_first(alerted, guilty):
    fire = partial(catch_fire, f"rank {guilty}")
    codes, [(kind, text)] = alerted(acts={MET[guilty]: fire}, others_s=30.0)
    assert codes == [1, 1]
    assert kind == "failed"
    assert text.endswith(f"RuntimeError: the disk of rank {guilty} is on fire")


def test_of_the_first_rollback(alerted):
    codes, [(kind, text)] = alerted(nan_ids=[18, 34])
    assert codes == [0, 0]
    assert (kind, text.endswith("at step 3, back to step 2")) == ("rollback", True), text


def test_of_a_slow_rank_once(alerted, tmp_path):
    slow = {n: partial(time.sleep, 0.05) for n in range(1, 4 * 8, 2)}
    codes, [(kind, text)] = alerted(feed_acts=slow, steps=4)
    assert codes == [0, 0]
    assert kind == "slow rank"
    assert "all wait for rank 1 on " in text
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4
