"""What nodes need of a dataset's shards, window by window: room in their caches, and requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.fetch import PIECE_BYTES
from trainer.data.manifest import ShardEntry
from trainer.data.order import Int64s, Order

MAX_NODES, MAX_WINDOWS = 8, 256
"""Of larger runs so many nodes and windows are looked at, and stand for all."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one dataset takes."""

    two_windows_bytes: int
    """Of the shards that any node needs in a window and the one behind it, at most."""
    window_shards: int
    """Shards that any node needs in a window, at most."""
    num_windows: int
    """Of an epoch."""
    epoch_requests: float
    """Over all nodes."""
    epoch_bytes: float
    """Over all nodes."""


def node_streams(streams: int, num_nodes: int, ranks_per_node: int) -> list[Int64s]:
    """List, for each node, the canonical streams that its ranks read."""
    world = num_nodes * ranks_per_node
    firsts = range(0, world, ranks_per_node)
    return [
        np.arange(first * streams // world, -(-(first + ranks_per_node) * streams // world))
        for first in firsts
    ]


def need(orders: Sequence[Order], entries: Sequence[ShardEntry], nodes: Sequence[Int64s]) -> Need:
    """Follow nodes through the windows of an epoch, with caches that keep two of them.

    Args:
        orders: Of the buckets of one dataset; they go through the shards alike.
        entries: The shards.
        nodes: The streams of each.
    """
    num_bytes = np.array([entry.bytes for entry in entries], np.int64)
    pieces = -(-num_bytes // PIECE_BYTES)
    num_windows = max(-(-order.num_rows // order.window_rows) for order in orders)
    some_nodes = np.unique(np.linspace(0, len(nodes) - 1, MAX_NODES).round().astype(np.int64))
    some_windows = min(num_windows, MAX_WINDOWS)
    most_bytes = most_shards = requests = fetched = 0
    for node in some_nodes.tolist():
        before = np.zeros(0, np.int64)
        for window in range(some_windows):
            now = _shards(orders, window, nodes[node])
            new = np.setdiff1d(now, before)
            most_bytes = max(most_bytes, int(num_bytes[np.union1d(before, now)].sum()))
            most_shards = max(most_shards, len(now))
            requests += int(pieces[new].sum())
            fetched += int(num_bytes[new].sum())
            before = now
    scale = len(nodes) / len(some_nodes) * num_windows / some_windows
    return Need(most_bytes, most_shards, num_windows, requests * scale, fetched * scale)


def _shards(orders: Sequence[Order], window: int, streams: Int64s) -> Int64s:
    """List the shards that streams need in a window of any bucket."""
    found = [
        order.shards_in((0, window), streams)
        for order in orders
        if window * order.window_rows < order.num_rows
    ]
    return np.unique(np.concatenate(found))
