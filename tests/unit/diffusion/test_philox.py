"""Laws of the counter-based random numbers."""

import math

import pytest
import torch

from trainer.diffusion import philox

WORD = 0xFFFFFFFF


# Known answers published with Random123 (kat_vectors, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_answers(counter, key, answer):
    drawn = philox.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in drawn) == answer


def draw(ids, visits=None, *, seed=7, purpose=philox.NOISE, shape=(3, 5)):
    ids_B = torch.tensor(ids)
    visits_B = torch.zeros_like(ids_B) if visits is None else torch.tensor(visits)
    return philox.normals(seed, ids_B, visits_B, purpose=purpose, shape=shape)


def test_a_samples_draw_does_not_depend_on_its_batch():
    ids = [5, -1, 2**62, 17, 3, -(2**63)]
    together = draw(ids)
    alone = torch.cat([draw([sample_id]) for sample_id in ids])
    assert torch.equal(together, alone)


def test_every_part_of_the_address_matters():
    base = draw([1])
    others = [
        draw([2]),
        draw([1 + 2**32]),
        draw([1 - 2**63]),
        draw([1], [1]),
        draw([1], seed=8),
        draw([1], seed=7 + 2**32),
        draw([1], purpose=philox.LATENT),
    ]
    for other in others:
        assert (base != other).all()


def test_a_longer_draw_begins_with_the_shorter_one():
    ids_B, visits_B = torch.tensor([4, 9]), torch.tensor([0, 3])
    short = philox.uniforms(1, ids_B, visits_B, purpose=philox.TIME, count=3)
    long = philox.uniforms(1, ids_B, visits_B, purpose=philox.TIME, count=50)
    assert torch.equal(short, long[:, :3])


def test_purposes_drawn_together_get_what_each_gets_alone():
    who = (3, torch.tensor([4, -9]), torch.tensor([0, 3]))
    counts = {philox.NOISE: 9, philox.TIME: 1, philox.SOLVER: 64, philox.MAX_PURPOSE: 4}
    together = philox.words(*who, counts=counts)
    for purpose, count in counts.items():
        alone = philox.words(*who, counts={purpose: count})[purpose]
        assert torch.equal(together[purpose], alone)


def test_uniforms_are_uniform_and_inside():
    u = philox.uniforms(0, torch.arange(2000), torch.zeros(2000), purpose=philox.CROP, count=50)
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_extreme_words_stay_inside():
    words = torch.tensor([0, WORD])
    u = ((words >> 9).float() + 0.5) * 2.0**-23
    assert u[0] > 0
    assert u[1] < 1


def test_normals_have_the_moments_of_a_normal_and_are_uncorrelated():
    z = draw(list(range(1000)), shape=(100,)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    neighbours = (z[:, :-1] * z[:, 1:]).mean()
    across = (z[:-1] * z[1:]).mean()
    assert max(abs(neighbours), abs(across)) < 4 / math.sqrt(n)


def test_an_odd_number_of_normals_is_possible():
    assert draw([1], shape=(3, 3, 3)).shape == (1, 3, 3, 3)
