"""Counter-based random numbers (Philox4x32-10): each draw is a function of what it is for.

A sample's noise, time, crop and caption dropout depend on (seed, sample id, visit, purpose) and on
nothing else: not on ranks, workers, batch sizes or restarts, nor on what was drawn before.

Philox is Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The integers are
equal on every device. The reals are made in float64 and rounded once, so that the last bit of a
library's logarithm does not show.

Letters: ``B`` samples, ``N`` numbers per sample.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NOISE = 0
TIME = 1
CAPTION_DROPOUT = 2
LATENT = 3
CROP = 4
FLIP = 5
SOLVER = 6
MAX_PURPOSE = 255
MAX_BLOCKS = 1 << 24

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt 128-bit counters with a 64-bit key.

    Args:
        counter: Four int64 tensors that broadcast together, each holding 32-bit words.
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # int64 products wrap modulo 2^64, which is what is wanted; the mask drops the sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _WORD) ^ c1 ^ k0,
            right & _WORD,
            ((left >> 32) & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def words(
    seed: int, ids_B: Tensor, visits_B: Tensor, *, counts: Mapping[int, int]
) -> dict[int, Tensor]:
    """Draw 32-bit words for samples, for several purposes at once.

    Args:
        seed: The run's seed; its low 64 bits are the key.
        ids_B: ``(B,)`` int64 sample ids; all 64 bits count.
        visits_B: ``(B,)`` int64, how often the sample was seen before (the epoch), below 2^32.
        counts: Purpose -> words per sample, at most 2^26. Purposes are this module's; different
            ones never share a draw, and what one gets does not depend on the others.

    Returns:
        Purpose -> ``(B, count)`` int64 in [0, 2^32). A longer draw begins with the shorter one.
    """
    num_blocks = {purpose: -(-count // 4) for purpose, count in counts.items()}
    assert all(0 <= purpose <= MAX_PURPOSE for purpose in counts), counts
    assert all(num <= MAX_BLOCKS for num in num_blocks.values()), counts
    ids, visits = ids_B.long()[:, None], visits_B.long()[:, None]
    blocks = torch.cat(
        [
            torch.arange(purpose << 24, (purpose << 24) + num, device=ids.device)
            for purpose, num in num_blocks.items()
        ]
    )
    counter = (ids & _WORD, (ids >> 32) & _WORD, visits & _WORD, blocks[None])
    drawn = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    parts = torch.split(torch.stack(drawn, dim=2), list(num_blocks.values()), dim=1)
    return {
        purpose: part.flatten(1)[:, :count]
        for (purpose, count), part in zip(counts.items(), parts, strict=True)
    }


def uniforms(seed: int, ids_B: Tensor, visits_B: Tensor, *, purpose: int, count: int) -> Tensor:
    """Draw ``(B, count)`` float32 strictly inside (0, 1); arguments as in `words`."""
    return as_uniforms(words(seed, ids_B, visits_B, counts={purpose: count})[purpose])


def normals(
    seed: int, ids_B: Tensor, visits_B: Tensor, *, purpose: int, shape: Sequence[int]
) -> Tensor:
    """Draw ``(B, *shape)`` float32 standard normals; arguments as in `words`."""
    drawn = words(seed, ids_B, visits_B, counts={purpose: words_of_normals(shape)})
    return as_normals(drawn[purpose], shape)


def words_of_normals(shape: Sequence[int]) -> int:
    """Say how many words normals of a shape are made of."""
    count = math.prod(shape)
    return count + count % 2


def as_uniforms(words_BN: Tensor) -> Tensor:
    """Turn words into as many float32 strictly inside (0, 1)."""
    # 23 bits and a half step: exact in float32, so neither 0 nor 1 can appear.
    return ((words_BN >> 9).float() + 0.5) * 2.0**-23


def as_normals(words_BN: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn `words_of_normals` words into ``(B, *shape)`` float32 standard normals (Box-Muller)."""
    unit = (words_BN.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2]))
    angle = (2.0 * math.pi) * unit[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)
    return pairs.flatten(1)[:, : math.prod(shape)].float().reshape(-1, *shape)
