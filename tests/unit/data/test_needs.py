import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.streams import law_of
from trainer.data.fetch import PIECE_BYTES
from trainer.data.manifest import ShardEntry
from trainer.data.needs import need, node_streams


def entries_of(sizes):
    rest = {"sha256": "", "count": 1, "index_bytes": 1, "index_sha256": ""}
    return [ShardEntry(name=f"{n:05d}.tar", bytes=size, **rest) for n, size in enumerate(sizes)]


@st.composite
def cases(draw):
    num_shards = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(1, 20), min_size=num_shards, max_size=num_shards))
    sizes = draw(st.lists(st.integers(1, 9 << 20), min_size=num_shards, max_size=num_shards))
    law = law_of(
        counts, streams=draw(st.integers(1, num_shards)), window_shards=draw(st.integers(1, 3))
    )
    return law, entries_of(sizes)


def orders(law):
    return list(law.orders[0].values())


@given(cases())
@settings(max_examples=60, deadline=None)
def test_one_node_fetches_every_shard_once_an_epoch_in_pieces(case):
    law, entries = case
    found = need(orders(law), entries, node_streams(law.streams, 1, 4))
    assert found.epoch_bytes == sum(entry.bytes for entry in entries)
    assert found.epoch_requests == sum(-(-entry.bytes // PIECE_BYTES) for entry in entries)


@given(cases(), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_more_nodes_fetch_no_less_together_and_keep_no_more_each(case, num_nodes, ranks):
    law, entries = case
    total = sum(entry.bytes for entry in entries)
    alone = need(orders(law), entries, node_streams(law.streams, 1, ranks))
    found = need(orders(law), entries, node_streams(law.streams, num_nodes, ranks))
    assert total <= found.epoch_bytes <= num_nodes * total
    assert found.two_windows_bytes <= alone.two_windows_bytes <= total
    assert found.window_shards <= alone.window_shards


@given(cases(), st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_every_sample_of_a_node_is_in_the_two_windows_it_has_room_for(case, nodes, ranks, data):
    law, entries = case
    streams = node_streams(law.streams, nodes, ranks)
    assert set(np.concatenate(streams).tolist()) == set(range(law.streams))
    (order,) = orders(law)
    found = need([order], entries, streams)
    own = streams[data.draw(st.integers(0, nodes - 1))]
    positions = np.arange(order.num_rows)
    mine = positions[np.isin(order.streams(positions), own)]
    for window in range(found.num_windows):
        here = mine[mine // order.window_rows == window]
        shards = np.unique(order.shard_of(order.at(here)[0]))
        assert len(shards) <= found.window_shards
        assert sum(entries[n].bytes for n in shards) <= found.two_windows_bytes


def test_buckets_of_a_window_share_their_shards():
    law = law_of({"a": [5] * 8, "b": [3] * 8}, streams=2, window_shards=2)
    alone = law_of([8] * 8, streams=2, window_shards=2)
    entries = entries_of([100] * 8)
    nodes = node_streams(2, 2, 1)
    assert need(orders(law), entries, nodes) == need(orders(alone), entries, nodes)


def test_a_part_of_many_nodes_and_windows_stands_for_all():
    law = law_of([7] * 1200, streams=40, window_shards=1)
    found = need(orders(law), entries_of([10] * 1200), node_streams(40, 20, 2))
    assert found.epoch_bytes == pytest.approx(12_000, rel=0.02)
    many = law_of([7] * 1200, streams=2, window_shards=1)
    found = need(orders(many), entries_of([10] * 1200), node_streams(2, 1, 2))
    assert found.num_windows == 600
    assert found.epoch_bytes == pytest.approx(12_000, rel=0.02)
