"""The order of the data: a keyed permutation of each epoch, computed position by position."""

import hashlib

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
_ROUNDS = 6


def samples_at(positions: Int64s, *, num_samples: int, seed: int) -> tuple[Int64s, Int64s]:
    """Say which sample stands at each position of the endless training sequence.

    Position p belongs to epoch p // num_samples; each epoch is its own permutation of all samples,
    so a global batch may roll over from one epoch into the next and none is shorter.

    Args:
        positions: Any shape, int64, >= 0; counted in samples from the start of training.
        num_samples: Samples in the dataset.
        seed: Keys the permutations together with the epoch.

    Returns:
        Sample numbers in [0, num_samples) and the epochs they belong to (how often that sample
        was visited before), both shaped like `positions`.
    """
    epochs = positions // num_samples
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places = positions[here] - epoch * num_samples
        samples[here] = permute(places, num_samples, seed=seed, epoch=int(epoch))
    return samples, epochs


def permute(places: Int64s, num_samples: int, *, seed: int, epoch: int) -> Int64s:
    """Map places in [0, num_samples) to samples, one to one, in O(1) memory.

    A balanced Feistel network on the next even number of bits, with cycle walking: values outside
    the range are encrypted again until they fall inside (Black and Rogaway 2002).
    """
    return _walk(places, num_samples, _round_keys(seed, epoch), forward=True)


def unpermute(samples: Int64s, num_samples: int, *, seed: int, epoch: int) -> Int64s:
    """Invert `permute`: at which place of the epoch does each sample stand?"""
    return _walk(samples, num_samples, _round_keys(seed, epoch), forward=False)


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    digest = hashlib.blake2b(f"kiln-order:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS)
    return [np.uint64(key) for key in np.frombuffer(digest.digest(), dtype="<u8")]


def _walk(values: Int64s, size: int, keys: list[np.uint64], *, forward: bool) -> Int64s:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    out = _feistel(values.astype(np.uint64), keys, half_bits, forward=forward)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], keys, half_bits, forward=forward)
    return out.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], keys: list[np.uint64], half_bits: int, *, forward: bool
) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    if forward:
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
    else:
        for key in reversed(keys):
            left, right = right ^ (_mix(left, key) & mask), left
    return (left << bits) | right


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Finalizer of splitmix64 (Steele et al. 2014): every output bit depends on every input bit."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
