"""Find all pairs of perceptual hashes within a Hamming distance, exactly, by banded lookup.

The 64 bits are dealt out to k bands. Two hashes within distance d differ in at most d of them, so
they agree on some k - d bands: a join on each choice of k - d bands finds every pair (Manku, Jain
and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007, section 3). More bands mean
more joins, of fewer pairs each; k is what costs least for the number of hashes.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_BITS = 64
_MOST_JOINS = 5000
# Measured: to sort one hash into a join costs as much as to compare so many pairs.
_PAIRS_PER_HASH = 3.0
FLAT_BITS = 8
"""A hash with fewer bits set belongs to a picture that varies along one direction at most (plain,
or a straight gradient); such hashes are equal for pictures that are not, and are compared with
none. Hashes of photographs have 31 or 32."""


def flat_sql(phash: str) -> str:
    """Give SQL that is true for the hash of a flat picture; its highest bit is brightness."""
    return f"bit_count({phash} & {2**63 - 1}::UBIGINT) < {FLAT_BITS}"


def band_masks(num_hashes: int, max_distance: int) -> list[int]:
    """Choose the bits of each join: hashes within `max_distance` agree on all bits of some mask.

    Args:
        num_hashes: How many hashes are compared; decides the number of bands.
        max_distance: Largest distance that must be found, in bits, 0 to 63.
    """

    def cost(num_bands: int) -> float:
        bits = _BITS * (num_bands - max_distance) / num_bands
        pairs = num_hashes**2 / 2 / 2**bits
        return comb(num_bands, max_distance) * (_PAIRS_PER_HASH * num_hashes + pairs)

    choices = range(max_distance + 1, _BITS + 1)
    num_bands = min(
        (k for k in choices if comb(k, max_distance) <= _MOST_JOINS or k == max_distance + 1),
        key=cost,
    )
    # Neighbouring bits are neighbouring frequencies and go together: deal them out one by one.
    bands = [sum(1 << bit for bit in range(first, _BITS, num_bands)) for first in range(num_bands)]
    return [sum(chosen) for chosen in combinations(bands, num_bands - max_distance)]


def find_pairs(
    connection: duckdb.DuckDBPyConnection,
    max_distance: int,
    *,
    on_join: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill the table `pairs(a, b)` with all a < b of `hashes` that are near each other, once.

    Args:
        connection: Has a table `hashes(phash UBIGINT, own BOOLEAN)` of distinct hashes; pairs of
            which neither is `own` are of no interest.
        max_distance: Largest Hamming distance, in bits.
        on_join: Called after each join with the number done and the number of all.
    """
    (num_hashes,) = connection.execute("SELECT count(*) FROM hashes").fetchall()[0]
    connection.execute("CREATE OR REPLACE TEMP TABLE pairs (a UBIGINT, b UBIGINT)")
    masks = band_masks(num_hashes, max_distance)
    for idx, mask in enumerate(masks):
        connection.execute(
            "INSERT INTO pairs SELECT a.phash, b.phash FROM hashes a JOIN hashes b "
            f"ON a.phash & {mask}::UBIGINT = b.phash & {mask}::UBIGINT AND a.phash < b.phash "
            f"WHERE bit_count(xor(a.phash, b.phash)) <= {max_distance} AND (a.own OR b.own)"
        )
        on_join(idx + 1, len(masks))
    connection.execute("CREATE OR REPLACE TEMP TABLE pairs AS SELECT DISTINCT a, b FROM pairs")


def components(
    first: NDArray[np.int64], second: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Join what edges connect, however long the chain.

    Args:
        first: ``(E,)`` one end of each edge, any numbers.
        second: ``(E,)`` the other end.

    Returns:
        ``(N,)`` the numbers that have an edge, in order, and ``(N,)`` the smallest number that
        each is connected with.
    """
    nodes, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    if not len(nodes):
        return nodes, nodes
    ends = places.reshape(2, -1)
    ones = np.ones(ends.shape[1], bool)
    graph = coo_array((ones, (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    _, smallest = np.unique(labels, return_index=True)
    return nodes, nodes[smallest][labels]
