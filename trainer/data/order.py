"""The order of one dataset: a keyed permutation of each epoch and its inverse, without arrays.

Rows are numbered through all shards: those of shard 0 come first. An endless sequence of positions
runs through one epoch after the other; every epoch is its own permutation of all rows.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]
Mode = Literal["shards", "ranges"]
_ROUNDS = 6
_BLOCK, _DENSE = 4096, 4
"""Positions that are looked up together; asked for by parts no sparser than 1 in `_DENSE`."""


class Epoch(NamedTuple):
    """How the shards of one epoch follow each other."""

    shards: Int64s
    """Shard numbers in the epoch's order."""
    ends: Int64s
    """Rows up to the end of each of `shards`."""
    turns: Int64s
    """Inverse of `shards`: when each shard's turn is."""


class Order:
    """Says which row stands at each position, and where a row stands in an epoch.

    Mode `shards`: the shards are permuted and their rows laid end to end. That line is cut into
    windows, each window into one piece of equal length per canonical stream, and the rows of a
    piece are permuted. So a reader of some streams needs the shards of their pieces only, and all
    streams are equally long whatever the sizes of the shards. Mode `ranges`: all rows are permuted.
    """

    def __init__(
        self,
        counts: Sequence[int] | Int64s,
        *,
        key: str,
        mode: Mode = "shards",
        streams: int = 1,
        window_rows: int = 1,
    ) -> None:
        """Take what the order depends on, and nothing else does it depend on.

        Args:
            counts: Rows of each shard, (num_shards,); not all 0.
            key: Keys the permutations: any text.
            mode: What is permuted.
            streams: Canonical streams; more than ranks let ranks come and go.
            window_rows: Rows of one stream in a window.
        """
        self.counts = np.asarray(counts, np.int64)
        self.ends = np.cumsum(self.counts)
        self.num_rows = int(self.ends[-1])
        self._key, self._by_shards = key, mode == "shards"
        if mode == "shards":
            self._streams, self._window = streams, streams * window_rows
        else:
            self._streams, self._window = 1, self.num_rows
        # Two epochs are in use where one rolls over into the next.
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        # A block of a small dataset is an epoch: each epoch costs some calls.
        self._block_rows = min(_BLOCK, self.num_rows)
        self._block = lru_cache(maxsize=4)(self._rows_of_block)

    @property
    def window_rows(self) -> int:
        """Rows of a window, over all streams: how far a row may be moved but for its shard."""
        return self._window

    def at(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Give the rows at positions of the endless sequence, and their epochs (any shape)."""
        epochs, places = np.divmod(positions, self.num_rows)
        size = self._block_rows
        if 0 < positions.size < size:
            low, high = int(positions.min()), int(positions.max())
            block = low // size
            # A small step: its neighbours will be asked for next, and cost nothing more.
            if block == high // size and high - low < _DENSE * positions.size:
                return self._block(block)[positions - block * size], epochs
        return self._rows_at(places, epochs), epochs

    def positions(self, rows: Int64s, epoch: int) -> Int64s:
        """Give the positions at which rows stand in an epoch: the inverse of `at`."""
        line = rows
        if self._by_shards:
            shards = self.shard_of(rows)
            table = self.epoch(epoch)
            before = table.ends[table.turns[shards]] - self.counts[shards]
            line = before + rows - (self.ends[shards] - self.counts[shards])
        return epoch * self.num_rows + self._shuffle(line, epoch, forward=False)

    def redrawn(self, positions: Int64s, attempt: int) -> Int64s:
        """Give other rows in place of those at `positions`, from the same pieces of the windows.

        Args:
            positions: Of the endless sequence.
            attempt: 1, 2, ...: each gives other rows.
        """
        epochs, places = np.divmod(positions, self.num_rows)
        first, size, streams = self._piece(places)
        draws = _mix(positions.astype(np.uint64), _keys(f"{self._key}:redraw:{attempt}")[0])
        drawn = (draws % size.astype(np.uint64)).astype(np.int64)
        return self.at(epochs * self.num_rows + first + drawn * self._streams + streams)[0]

    def streams(self, positions: Int64s) -> Int64s:
        """Say to which canonical stream each position belongs."""
        return positions % self.num_rows % self._window % self._streams

    def window(self, position: int) -> tuple[int, int]:
        """Name the window of a position: its epoch, and its number there."""
        epoch, place = divmod(position, self.num_rows)
        return epoch, place // self._window

    def window_after(self, window: tuple[int, int]) -> tuple[int, int]:
        """Name the window that follows."""
        epoch, number = window
        last = (self.num_rows - 1) // self._window
        return (epoch, number + 1) if number < last else (epoch + 1, 0)

    def shards_in(self, window: tuple[int, int], streams: Int64s) -> Int64s:
        """List the shards that some streams need in a window, in the epoch's order."""
        epoch, number = window
        if not self._by_shards:
            return np.flatnonzero(self.counts)
        first = number * self._window
        size, longer = divmod(min(self._window, self.num_rows - first), self._streams)
        starts = first + streams * size + np.minimum(streams, longer)
        stops = starts + size + (streams < longer)
        table = self.epoch(epoch)
        some = starts < stops
        low = np.searchsorted(table.ends, starts[some], side="right")
        high = np.searchsorted(table.ends, stops[some] - 1, side="right")
        spans = [np.arange(a, b + 1) for a, b in zip(low, high, strict=True)]
        turns = np.unique(np.concatenate(spans)) if spans else np.zeros(0, np.int64)
        shards = table.shards[turns]
        return shards[self.counts[shards] > 0]

    def shard_of(self, rows: Int64s) -> Int64s:
        """Say in which shard each row lies."""
        shards: Int64s = np.searchsorted(self.ends, rows, side="right")
        return shards

    def _epoch(self, epoch: int) -> Epoch:
        shards, turns = _permuted_shards(f"{self._key}:{epoch}:shards", len(self.counts))
        return Epoch(shards, np.cumsum(self.counts[shards]), turns)

    def _rows_of_block(self, block: int) -> Int64s:
        positions = np.arange(block * self._block_rows, (block + 1) * self._block_rows)
        epochs, places = np.divmod(positions, self.num_rows)
        return self._rows_at(places, epochs)

    def _rows_at(self, places: Int64s, epochs: Int64s) -> Int64s:
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._rows(places[here], int(epoch))
        return rows

    def _rows(self, places: Int64s, epoch: int) -> Int64s:
        line = self._shuffle(places, epoch, forward=True)
        if not self._by_shards:
            return line
        table = self.epoch(epoch)
        turns = np.searchsorted(table.ends, line, side="right")
        shards = table.shards[turns]
        return line - table.ends[turns] + self.ends[shards]

    def _shuffle(self, values: Int64s, epoch: int, *, forward: bool) -> Int64s:
        """Map places of an epoch to places on the line of rows, or back."""
        window = values // self._window
        if forward:
            first, size, stream = self._piece(values)
            inside = (values - first) // self._streams
        else:
            first, size, stream, inside = self._piece_on_line(values)
        tweak = (window * self._streams + stream).astype(np.uint64)
        keys = _keys(f"{self._key}:{epoch}:rows")
        moved = np.empty_like(inside)
        for length in np.unique(size):
            here = size == length
            moved[here] = _permute(inside[here], int(length), keys, tweak[here], forward=forward)
        inside_window = self._start(first, stream) + moved
        if not forward:
            inside_window = moved * self._streams + stream
        out: Int64s = first + inside_window
        return out

    def _piece(self, places: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Give the first place of each place's window, its piece's rows, and its stream."""
        first = places - places % self._window
        stream = (places - first) % self._streams
        whole, longer = np.divmod(self._rows_in(first), self._streams)
        return first, whole + (stream < longer), stream

    def _piece_on_line(self, line: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        first = line - line % self._window
        whole, longer = np.divmod(self._rows_in(first), self._streams)
        inside = line - first
        # The first `longer` pieces have one row more.
        long_part = longer * (whole + 1)
        stream = np.where(
            inside < long_part,
            inside // (whole + 1),
            longer + (inside - long_part) // np.maximum(whole, 1),
        )
        size = whole + (stream < longer)
        return first, size, stream, inside - self._start(first, stream)

    def _start(self, first: Int64s, stream: Int64s) -> Int64s:
        """Say where on its window's line a stream's piece begins."""
        whole, longer = np.divmod(self._rows_in(first), self._streams)
        start: Int64s = stream * whole + np.minimum(stream, longer)
        return start

    def _rows_in(self, first: Int64s) -> Int64s:
        return np.minimum(self._window, self.num_rows - first)


@lru_cache(maxsize=8)
def _permuted_shards(text: str, num_shards: int) -> tuple[Int64s, Int64s]:
    """Permute the shards, and give the inverse; the orders of all buckets share it."""
    draws = _mix(np.arange(num_shards, dtype=np.uint64), _keys(text)[0])
    shards = np.argsort(draws, kind="stable")
    turns = np.empty_like(shards)
    turns[shards] = np.arange(num_shards)
    return shards, turns


@lru_cache(maxsize=64)
def _keys(text: str) -> Uint64s:
    digest = hashlib.blake2b(f"kiln-order:{text}".encode(), digest_size=8 * _ROUNDS)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _permute(values: Int64s, size: int, keys: Uint64s, tweak: Uint64s, *, forward: bool) -> Int64s:
    """Permute [0, size), another way for each `tweak`, in O(1) memory.

    A balanced Feistel network on the next even number of bits, with cycle walking: values outside
    the range are encrypted again until they fall inside (Black and Rogaway 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    out = _feistel(values.astype(np.uint64), half_bits, keys, tweak, forward=forward)
    outside = np.flatnonzero(out >= size)
    while len(outside):
        out[outside] = _feistel(out[outside], half_bits, keys, tweak[outside], forward=forward)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _feistel(
    values: Uint64s, half_bits: int, keys: Uint64s, tweak: Uint64s, *, forward: bool
) -> Uint64s:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    spread = tweak << np.uint64(32)
    left, right = values >> bits, values & mask
    for key in keys if forward else keys[::-1]:
        if forward:
            left, right = right, left ^ (_mix(right ^ spread, key) & mask)
        else:
            left, right = right ^ (_mix(left ^ spread, key) & mask), left
    return (left << bits) | right


def _mix(values: Uint64s, key: np.uint64) -> Uint64s:
    """Finalizer of splitmix64 (Steele et al. 2014): every output bit depends on every input bit."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
