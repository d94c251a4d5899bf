import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Order


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
    return Order(
        counts,
        key=draw(st.sampled_from("ab")),
        mode=draw(st.sampled_from(["shards", "ranges"])),
        streams=draw(st.integers(1, 6)),
        window_rows=draw(st.integers(1, 30)),
    )


@given(orders(), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_the_inverse_finds_it(order, epoch):
    first = epoch * order.num_rows
    positions = np.arange(first, first + order.num_rows)
    rows, epochs = order.at(positions)
    assert sorted(rows) == list(range(order.num_rows))
    assert set(epochs) == {epoch}
    assert (order.positions(rows, epoch) == positions).all()


@given(orders(), st.integers(1, 3))
def test_a_stream_needs_the_shards_of_its_window_alone_and_is_redrawn_from_them(order, attempt):
    positions = np.arange(order.num_rows)
    rows, _ = order.at(positions)
    redrawn = order.redrawn(positions, attempt)
    streams = order.streams(positions)
    windows = [order.window(int(position)) for position in positions]
    for stream in set(streams.tolist()):
        for window in set(windows):
            mine = (streams == stream) & np.array([found == window for found in windows])
            shards = set(order.shards_in(window, np.array([stream])).tolist())
            used = set(order.shard_of(rows[mine]).tolist())
            assert used <= shards
            assert set(order.shard_of(redrawn[mine]).tolist()) <= shards
            assert used == shards or not mine.any()


@given(orders())
def test_windows_follow_each_other_without_a_gap(order):
    found = []
    for position in range(2 * order.num_rows):
        if not found or found[-1] != order.window(position):
            found.append(order.window(position))
    expected = [(0, 0)]
    while len(expected) < len(found):
        expected.append(order.window_after(expected[-1]))
    assert found == expected


@given(orders())
def test_streams_of_a_window_are_equally_long_whatever_the_shards(order):
    positions = np.arange(order.num_rows)
    windows = np.array([order.window(int(position))[1] for position in positions])
    for window in set(windows.tolist()):
        lengths = np.bincount(order.streams(positions[windows == window]))
        assert lengths.max() - lengths.min() <= 1


@given(st.integers(1, 10**10), st.integers(0, 10**10), st.sampled_from(["shards", "ranges"]))
@settings(max_examples=50)
def test_forward_and_back_at_any_size(num_rows, start, mode):
    counts = np.full(1000, num_rows // 1000)
    counts[0] += num_rows % 1000
    order = Order(counts, key="k", mode=mode, streams=8, window_rows=num_rows // 50 + 1)
    positions = np.unique((start + np.arange(100) * 7919) % num_rows)
    rows, _ = order.at(positions)
    assert len(np.unique(rows)) == len(positions)
    assert (order.positions(rows, 0) == positions).all()


def test_keys_and_epochs_give_other_orders():
    def order(key):
        return Order([50] * 20, key=key, streams=4, window_rows=100)

    positions = np.arange(1000)
    first = order("a").at(positions)[0]
    assert (first == order("a").at(positions)[0]).all()
    for other in (order("b").at(positions)[0], order("a").at(positions + 1000)[0]):
        assert (first == other).mean() < 0.02


def test_the_order_is_this_one_for_ever():
    """A change here would change the data of every run that is resumed."""
    order = Order([5, 0, 9, 7], key="golden", streams=2, window_rows=4)
    ranges = Order([5, 0, 9, 7], key="golden", mode="ranges")
    assert order.at(np.arange(21))[0].tolist() == GOLDEN_SHARDS
    assert ranges.at(np.arange(21))[0].tolist() == GOLDEN_RANGES


GOLDEN_SHARDS = [6, 12, 7, 10, 5, 9, 8, 11, 16, 20, 13, 17, 15, 18, 14, 19, 0, 4, 1, 3, 2]
GOLDEN_RANGES = [9, 6, 8, 17, 13, 7, 3, 16, 4, 1, 20, 10, 11, 5, 18, 19, 12, 15, 14, 2, 0]


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_neighbours_are_as_far_apart_as_in_a_uniform_shuffle(mode):
    order = Order([100] * 100, key="far", mode=mode, streams=10, window_rows=1000)
    rows = order.at(np.arange(10_000))[0]
    assert np.abs(np.diff(rows)).mean() == pytest.approx(10_000 / 3, rel=0.05)
