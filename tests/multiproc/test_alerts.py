"""W&B tells the user of what goes wrong on any rank, at once, from rank 0 alone."""

import time
from functools import partial

import pytest
import wandb

from tests.multiproc.test_stuck import MET, catch_fire, run, sleep_forever
from tests.wandb_server import WandbServer, needs_wandb_server
from trainer.observe.wandb_session import read_kept

pytestmark = [pytest.mark.multiproc, needs_wandb_server]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as running:
        yield running


@pytest.fixture
def alerted(server, tmp_path, monkeypatch):
    """Train a toy on two ranks; return their exit codes and what W&B was told to tell of a kind."""
    wandb.teardown()  # the ranks are forks of this process
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)

    def go(kind, changes=(), **faults):
        changes = {"logging.wandb": "online", **dict(changes)}
        codes = run(tmp_path, changes=changes, others_s=30.0, **faults)
        mine = [each for each in server.alerts() if each["runName"] == read_kept(tmp_path)["id"]]
        title = f"{tmp_path.name[:40]}: {kind}"
        return codes, [each["text"] for each in mine if each["title"] == title]

    return go


def test_of_a_rank_that_holds_up_all_before_the_attempt_ends(alerted):
    # Twice the period of its beats is left for that, 0.6 s here.
    limit = {"watchdog.timeout_s": 12.0}
    codes, [text] = alerted("stuck", limit, feed_acts={MET[1]: sleep_forever})
    assert codes == [85, 85]
    assert "held up by rank 1 on " in text


@pytest.mark.parametrize("guilty", [0, 1])
def test_of_the_error_of_the_rank_that_failed_first(alerted, guilty):
    fire = partial(catch_fire, f"rank {guilty}")
    codes, [text] = alerted("failed", acts={MET[guilty]: fire})
    assert codes == [1, 1]
    assert text.endswith(f"RuntimeError: the disk of rank {guilty} is on fire")


def test_of_the_first_rollback(alerted):
    codes, [text] = alerted("rollback", nan_ids=[18, 34])
    assert codes == [0, 0]
    assert text.endswith("at step 3, back to step 2")


def test_of_a_slow_rank_once(alerted):
    slow = {n: partial(time.sleep, 0.05) for n in range(1, 4 * 8, 2)}
    codes, [text] = alerted("slow rank", feed_acts=slow, steps=4)
    assert codes == [0, 0]
    assert "all wait for rank 1 on " in text
