"""Counter-based random numbers (Philox4x32-10): each draw is a function of what it is for.

A sample's noise, time, crop and caption dropout depend on (seed, sample id, visit, purpose) and on
nothing else: not on ranks, workers, batch sizes or restarts, nor on what was drawn before.

Philox is Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The integers are
equal on every device. The reals are made in float64 and rounded once, so that the last bit of a
library's logarithm does not show.

Letters: ``B`` samples, ``N`` numbers per sample.
"""

import math
from collections.abc import Sequence

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


def words(seed: int, ids_B: Tensor, visits_B: Tensor, *, purpose: int, count: int) -> Tensor:
    """Draw 32-bit words for samples.

    Args:
        seed: The run's seed; its low 64 bits are the key.
        ids_B: ``(B,)`` int64 sample ids; all 64 bits count.
        visits_B: ``(B,)`` int64, how often the sample was seen before (the epoch), below 2^32.
        purpose: One of this module's purposes; different purposes never share a draw.
        count: Words per sample, at most 2^26.

    Returns:
        ``(B, count)`` int64 in [0, 2^32). A longer draw begins with the shorter one.
    """
    num_blocks = -(-count // 4)
    assert 0 <= purpose <= MAX_PURPOSE, purpose
    assert num_blocks <= MAX_BLOCKS, count
    ids, visits = ids_B.long()[:, None], visits_B.long()[:, None]
    blocks = torch.arange(num_blocks, device=ids.device)[None, :] | (purpose << 24)
    counter = (ids & _WORD, (ids >> 32) & _WORD, visits & _WORD, blocks)
    drawn = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(drawn, dim=2).flatten(1)[:, :count]


def uniforms(seed: int, ids_B: Tensor, visits_B: Tensor, *, purpose: int, count: int) -> Tensor:
    """Draw ``(B, count)`` float32 strictly inside (0, 1); arguments as in `words`."""
    drawn = words(seed, ids_B, visits_B, purpose=purpose, count=count)
    # 23 bits and a half step: exact in float32, so neither 0 nor 1 can appear.
    return ((drawn >> 9).float() + 0.5) * 2.0**-23


def normals(
    seed: int, ids_B: Tensor, visits_B: Tensor, *, purpose: int, shape: Sequence[int]
) -> Tensor:
    """Draw ``(B, *shape)`` float32 standard normals (Box-Muller); arguments as in `words`."""
    count = math.prod(shape)
    drawn = words(seed, ids_B, visits_B, purpose=purpose, count=count + count % 2)
    unit = (drawn.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(unit[:, 0::2]))
    angle = (2.0 * math.pi) * unit[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)
    return pairs.flatten(1)[:, :count].float().reshape(-1, *shape)
