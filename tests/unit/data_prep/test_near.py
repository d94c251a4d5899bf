import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.near import FLAT_BITS, band_masks, components, find_pairs, flat_sql
from data_prep.rows import connect

ONES = 2**64 - 1


@pytest.fixture(scope="module")
def connection(tmp_path_factory):
    with connect(tmp_path_factory.mktemp("near"), memory_gb=0.2, threads=1) as opened:
        yield opened


def pairs(connection, hashes, max_distance, own=None):
    table = pa.table(
        {
            "phash": pa.array(hashes, pa.uint64()),
            "own": pa.array([True] * len(hashes) if own is None else own, pa.bool_()),
        }
    )
    connection.register("unsorted", table)
    connection.execute("CREATE OR REPLACE TEMP TABLE hashes AS SELECT * FROM unsorted")
    find_pairs(connection, max_distance)
    found = connection.execute("SELECT a, b FROM pairs").fetchall()
    assert len(found) == len(set(found))
    return set(found)


def every_pair(hashes, max_distance):
    """The definition."""
    return {(a, b) for a in hashes for b in hashes if a < b and (a ^ b).bit_count() <= max_distance}


def crowd(rng, *, num, around):
    """Hashes in clusters: a few centres, and copies of them with 0 to 9 bits flipped."""
    centres = rng.integers(0, 2**64, around, dtype=np.uint64)
    hashes = rng.choice(centres, num)
    often = rng.random(num) / 2
    for _ in range(9):
        bits = np.uint64(1) << rng.integers(0, 64, num).astype(np.uint64)
        hashes = np.where(rng.random(num) < often, hashes ^ bits, hashes)
    return sorted(set(hashes.tolist()))


@given(
    hashes=st.sets(
        st.one_of(st.integers(0, ONES), st.integers(0, 63).map(lambda bit: 1 << bit)), max_size=40
    ),
    max_distance=st.integers(0, 12),
)
@settings(max_examples=40, deadline=None)
def test_all_near_pairs_are_found_and_no_others(connection, hashes, max_distance):
    assert pairs(connection, sorted(hashes), max_distance) == every_pair(hashes, max_distance)


@pytest.mark.parametrize("max_distance", [1, 4, 7])
def test_crowds_are_parted_as_by_brute_force(connection, max_distance):
    hashes = crowd(np.random.default_rng(max_distance), num=700, around=40)
    expected = every_pair(hashes, max_distance)
    assert len(expected) > 10
    assert pairs(connection, hashes, max_distance) == expected
    assert pairs(connection, hashes[::-1], max_distance) == expected


def test_pairs_of_others_are_left_out(connection):
    assert pairs(connection, [0, 1, 3, 7], 1, own=[False, False, False, True]) == {(3, 7)}


@given(
    max_distance=st.integers(0, 12),
    num_hashes=st.integers(1, 10**9),
    flipped=st.lists(st.integers(0, 63), min_size=12, max_size=12, unique=True),
)
def test_whatever_bits_differ_some_mask_has_none_of_them(max_distance, num_hashes, flipped):
    difference = sum(1 << bit for bit in flipped[:max_distance])
    masks = band_masks(num_hashes, max_distance)
    assert len(set(masks)) == len(masks)
    assert any(mask & difference == 0 for mask in masks)


def test_more_hashes_get_finer_bands():
    few, many = band_masks(1_000, 4), band_masks(100_000_000, 4)
    assert len(few) < len(many)
    assert min(mask.bit_count() for mask in few) < min(mask.bit_count() for mask in many)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_components_are_those_of_a_walk_over_the_edges(edges):
    ends = np.array(edges, np.int64).reshape(-1, 2)
    nodes, smallest = components(ends[:, 0], ends[:, 1])
    found = dict(zip(nodes.tolist(), smallest.tolist(), strict=True))
    expected = {node: node for edge in edges for node in edge}
    for _ in expected:
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert found == expected


def test_flat_hashes_are_told_from_others(connection):
    flat = [0, 2**63, 2**63 + 2 ** (FLAT_BITS - 1) - 1]
    others = [2**FLAT_BITS - 1, ONES]
    answers = [
        connection.execute(f"SELECT {flat_sql(f'{value}::UBIGINT')}").fetchall()[0][0]
        for value in (*flat, *others)
    ]
    assert answers == [True] * len(flat) + [False] * len(others)
