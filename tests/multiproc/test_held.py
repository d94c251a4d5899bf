"""What real ranks hold, beside what is planned of them; `benchmarks/plan.py` has more."""

import pytest

from benchmarks.held_rank import build_counter
from benchmarks.plan import held, planned_bytes, words_of
from trainer.runtime.compiled import build_cpu_op

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    build_cpu_op()
    return build_counter(tmp_path_factory.mktemp("counter"))


@pytest.mark.parametrize(
    ("stage", "world", "changes"),
    [
        (0, 2, ()),
        (1, 1, ()),
        (1, 2, ("batch.micro_batch_images=32",)),
        (2, 2, ()),
        (2, 2, ("engine.precision=bf16",)),
        (3, 2, ()),
    ],
)
def test_ranks_hold_within_5_percent_of_the_plan(stage, world, changes, counter, tmp_path):
    words = words_of(world, stage, changes)
    found = held(tmp_path, counter, words, world)["most_bytes"]
    assert found == pytest.approx(planned_bytes(words), rel=0.05)
