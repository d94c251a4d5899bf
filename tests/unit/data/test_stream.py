import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.streams import law_of, run
from trainer.data.stream import (
    advance,
    begin,
    check_step,
    from_json,
    next_bucket,
    rank_slots,
    remix,
    removal_versions,
    step_slots,
    steps_in_epoch,
    to_json,
)
from trainer.errors import BadInput

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@st.composite
def laws(draw):
    buckets = draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
    datasets = [{name: draw(COUNTS) for name in buckets} for _ in range(draw(st.integers(1, 3)))]
    return law_of(
        *datasets,
        mode=draw(st.sampled_from(["shards", "ranges"])),
        streams=draw(st.integers(1, 5)),
        window_shards=draw(st.integers(1, 3)),
    )


@given(laws(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_same_set_for_any_ranks_and_restarts(law, data):
    weights = [1.0, 2.0, 0.5][: len(law.members)]
    batches = data.draw(st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=12))
    expected, _ = run(law, begin(law, weights), batches)
    state, got = begin(law, weights), []
    for images in batches:
        world = data.draw(st.sampled_from([1, 2, 4]))
        steps, state = run(law, state, [images], world=world)
        got += steps
        if data.draw(st.booleans()):
            state = from_json(law, json.loads(json.dumps(to_json(law, state))))
    assert [Counter(step) for step in got] == [Counter(step) for step in expected]
    assert state.samples == sum(batches)


@given(COUNTS, st.integers(1, 5), st.sampled_from(["shards", "ranges"]), st.data())
@settings(deadline=None)
def test_every_sample_comes_once_an_epoch_however_batches_and_ranks_change(
    counts, streams, mode, data
):
    law = law_of(counts, streams=streams, mode=mode)
    size, seen, state = sum(counts), Counter(), begin(law, [1.0])
    while state.samples < 2 * size:
        world = data.draw(st.sampled_from([1, 2, 3, 6]))
        (samples,), state = run(law, state, [data.draw(st.sampled_from([6, 12]))], world=world)
        seen.update(samples)
    for epoch in (0, 1):
        rows = [row for _, _, row, of in seen if of == epoch]
        assert sorted(rows) == list(range(size))
    assert set(seen.values()) == {1}


@given(COUNTS, st.integers(1, 30))
def test_the_samples_do_not_depend_on_the_size_of_the_batch(counts, batch):
    law = law_of(counts, [3, 4])
    steps, _ = run(law, begin(law, [1.0, 1.0]), [batch] * 4)
    whole, _ = run(law, begin(law, [1.0, 1.0]), [4 * batch])
    assert Counter(chain(*steps)) == Counter(whole[0])


@given(COUNTS, st.integers(1, 12))
def test_drop_leaves_out_less_than_a_batch_and_pad_repeats_less_than_one(counts, batch):
    size = sum(counts)
    for ending in ("drop", "pad"):
        law = law_of(counts, ending=ending)
        if ending == "drop" and size < batch:
            with pytest.raises(BadInput, match=r"data.ending=drop would drop every sample"):
                check_step(law, batch)
            continue
        check_step(law, batch)
        num_steps = int(steps_in_epoch(law, batch))
        steps, state = run(law, begin(law, [1.0]), [batch] * 2 * num_steps)
        for epoch in (0, 1):
            samples = list(chain(*steps[epoch * num_steps : (epoch + 1) * num_steps]))
            assert {of for *_, of in samples} == {epoch}
            num_different = len(set(samples))
            if ending == "drop":
                assert len(samples) == num_different > size - batch
            else:
                assert num_different == size
                assert len(samples) - size < batch
        assert state.samples == 2 * num_steps * batch


def test_six_shards_on_four_ranks_give_equal_steps():
    law = law_of([7, 5, 9, 4, 6, 11], streams=4)
    steps, _ = run(law, begin(law, [1.0]), [8] * 6, world=4)
    assert [len(step) for step in steps] == [8] * 6
    assert len({row for step in steps[:5] for _, _, row, _ in step}) == 40


def test_a_rank_keeps_to_the_shards_of_its_streams():
    law = law_of([64] * 32, streams=8, window_shards=1)
    order, state, by_rank = law.orders[0][""], begin(law, [1.0]), [set() for _ in range(4)]
    for _ in range(4):  # the first window is 8 streams of 64 rows
        for rank in range(4):
            mine = rank_slots(law, step_slots(law, state, 128), rank=rank, world=4)
            by_rank[rank] |= set(order.shard_of(order.at(mine.positions)[0]).tolist())
        state = advance(law, state, 128)
    assert [len(shards) for shards in by_rank] == [2] * 4
    assert len(set.union(*by_rank)) == 8


def test_weights_hold_and_a_change_of_weights_goes_on_where_each_dataset_stands():
    law = law_of([100], [50])
    steps, state = run(law, begin(law, [3.0, 1.0]), [8] * 5)
    first = Counter(member for step in steps for member, *_ in step)
    assert first == {0: 30, 1: 10}
    changed = remix(law, state, [1.0, 3.0])
    assert remix(law, state, [3.0, 1.0]) is state
    steps_after, _ = run(law, changed, [8] * 5)
    second = Counter(member for step in steps_after for member, *_ in step)
    assert second == {0: 10, 1: 30}
    seen = Counter(chain(*steps, *steps_after))
    assert set(seen.values()) == {1}
    everything = {(0, "", row, 0) for row in range(100)} | {(1, "", row, 0) for row in range(50)}
    assert set(seen) <= everything


def test_a_dataset_may_wait_without_weight():
    law = law_of({"a": [9]}, {"b": [9]})
    steps, state = run(law, begin(law, [1.0, 0.0]), [4] * 9)
    assert {member for step in steps for member, *_ in step} == {0}
    steps, _ = run(law, remix(law, state, [0.0, 1.0]), [4] * 2)
    assert {(member, bucket) for step in steps for member, bucket, *_ in step} == {(1, "b")}


def test_a_global_batch_has_one_bucket_and_all_buckets_keep_pace():
    law = law_of({"wide": [10, 20, 30], "tall": [20, 0, 10], "square": [1, 2, 3]}, streams=3)
    state, given_out = begin(law, [1.0]), Counter()
    for _ in range(160):
        (step,), state = run(law, state, [6])
        assert len({bucket for _, bucket, *_ in step}) == 1
        given_out[step[0][1]] += 6
        for bucket, rows in (("wide", 60), ("tall", 30), ("square", 6)):
            assert abs(given_out[bucket] / rows - state.samples / 96) <= 12 / rows
    assert given_out == {"wide": 600, "tall": 300, "square": 60}


def test_the_state_is_small_and_says_what_it_counts_by():
    buckets = {f"{width}x512": [1_000_000] * 10 for width in range(256, 256 + 20 * 16, 16)}
    law = law_of(buckets, buckets)
    tallies = tuple(
        replace(tally, since=10**9, before=(10**9,) * 2) for tally in begin(law, [1, 1]).tallies
    )
    saved = to_json(law, replace(begin(law, [1, 1]), samples=10**11, tallies=tallies))
    assert len(json.dumps(saved)) < 1000
    plain = law_of([10**6] * 5000)
    assert len(json.dumps(to_json(plain, begin(plain, [1.0])))) < 250
    assert removal_versions(saved) == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed was 5 when the state was saved, and is 6"),
        ({"streams": 3}, "data.canonical_streams"),
        ({"mode": "ranges"}, "data.order"),
        ({"ending": "pad"}, "data.ending"),
    ],
)
def test_a_state_of_another_law_is_refused(change, message):
    law = law_of([5, 6])
    saved = to_json(law, begin(law, [1.0]))
    with pytest.raises(BadInput, match="would not continue") as error:
        from_json(law_of([5, 6], **change), saved)
    assert message in str(error.value)


def test_a_state_of_other_datasets_or_buckets_is_refused():
    law = law_of([5, 6])
    saved = to_json(law, begin(law, [1.0]))
    with pytest.raises(BadInput, match=r"the shards of data\.dataset"):
        from_json(law_of([5, 6], [1]), saved)
    with pytest.raises(BadInput, match=r"encoders\.buckets"):
        from_json(law_of({"a": [5, 6]}), saved)
    assert from_json(law, saved) == begin(law, [1.0])


def test_drop_and_pad_of_a_mix_are_refused():
    with pytest.raises(BadInput, match=r"Give data\.ending=roll"):
        check_step(law_of([5], [6], ending="drop"), 2)
    check_step(law_of([5], [6]), 2)


def test_the_choice_of_bucket_does_not_depend_on_their_order_in_the_dataset():
    one, two = law_of({"a": [5], "b": [9]}), law_of({"b": [9], "a": [5]})
    assert [next_bucket(law, begin(law, [1.0]), 4) for law in (one, two)] == [1, 1]
