import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.chain import after, split, waiting_for
from slurm.client import Queued


@given(st.sets(st.integers(0, 5000)), st.integers(1, 1000))
def test_arrays_together_have_all_tasks_once_and_no_number_that_slurm_refuses(tasks, most):
    arrays = list(split(sorted(tasks), most))
    assert [first + n for first, numbers in arrays for n in numbers] == sorted(tasks)
    assert all(0 <= n < most for _, numbers in arrays for n in numbers)
    assert all(numbers for _, numbers in arrays)


def job(shown_id="9", dependency=""):
    fields = dict.fromkeys(Queued.__dataclass_fields__, "")
    return Queued(**{**fields, "shown_id": shown_id, "dependency": dependency})


@pytest.mark.parametrize(
    ("dependency", "waits"),
    [
        ("afterok:12(unfulfilled)", True),
        ("afterok:12_*(unfulfilled)", True),
        ("afterok:7(unfulfilled),afterok:12(unfulfilled)", True),
        ("afterok:123(unfulfilled)", False),
        ("afterok:112(unfulfilled)", False),
        ("afternotok:12(unfulfilled)", False),
        ("(null)", False),
    ],
)
def test_who_waits_for_a_job_is_read_from_the_queue(dependency, waits):
    assert bool(waiting_for("12", [job(dependency=dependency)])) == waits


def test_what_begins_after_nothing_has_no_options():
    assert after([]) == ()
    assert after(["3", "4"]) == ("--dependency=afterok:3:4", "--kill-on-invalid-dep=yes")


def test_tasks_belong_to_their_array():
    assert [job(shown_id).array for shown_id in ("12_3", "12_[4-9]", "12")] == ["12"] * 3
