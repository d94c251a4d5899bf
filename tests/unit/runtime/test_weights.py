import numpy as np
import pytest
import torch

from tests.tiny_run import WholeTensors, write_checkpoint
from trainer.errors import BadInput
from trainer.runtime.checkpoint import TrainState, read_record
from trainer.runtime.ema import gamma_of, power
from trainer.runtime.rundir import complete
from trainer.runtime.weights import Kept, read_weights, shares, weights_fingerprint

STEPS, IMAGES, EVERY = 1000, 10, 100
WIDTHS = (0.05, 0.1)


def walk():
    """Weights of a training: they move, and move less and less."""
    rng = np.random.default_rng(0)
    t = np.arange(1, STEPS + 1)
    return np.cumsum(rng.standard_normal((STEPS, 64)) / np.sqrt(t)[:, None], axis=0)


def averaged(path, sigma_rel):
    """Average it as training does: what there is after every step."""
    decay, average, found = power(sigma_rel), np.zeros(path.shape[1]), []
    for step, weights in enumerate(path, start=1):
        kept = decay(IMAGES, step * IMAGES)
        average = kept * average + (1 - kept) * weights
        found.append(average)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that kept two power averages at every tenth of its training."""
    run, path = tmp_path_factory.mktemp("posthoc"), walk()
    averages = {width: averaged(path, width) for width in WIDTHS}
    for step in range(EVERY, STEPS + 1, EVERY):
        named = {
            f"power_{width:g}": {"a": torch.tensor(averages[width][step - 1]).view(8, 8)}
            for width in WIDTHS
        }
        whole = WholeTensors({"a": torch.tensor(path[step - 1]).view(8, 8)}, **named)
        state = TrainState(step, step * IMAGES, 1, "d", "e", {})
        assert write_checkpoint(run / "checkpoints", state, whole, keep_last=99)
    return run


@pytest.mark.parametrize("width", [0.055, 0.06, 0.075, 0.09, 0.12])
def test_an_average_of_any_width_is_made_afterwards(run, width):
    exact = averaged(walk(), width)[-1]
    found = read_weights(run, f"power_{width:g}")[0]["a"].flatten().numpy()
    nearest = min(np.abs(averaged(walk(), other)[-1] - exact).max() for other in WIDTHS)
    assert np.abs(found - exact).max() < 0.05 * nearest


def test_one_of_an_earlier_checkpoint_knows_nothing_of_later_ones(run):
    middle = complete(run / "checkpoints")[5]
    found, state = read_weights(run, "power_0.075", checkpoint=middle)
    exact = averaged(walk()[: state.step], 0.075)[-1]
    assert state.step == 6 * EVERY
    np.testing.assert_allclose(found["a"].flatten().numpy(), exact, atol=0.01)


def test_kept_averages_are_read_as_they_are(run):
    for width in WIDTHS:
        found = read_weights(run, f"power_{width:g}")[0]["a"].flatten()
        exact = torch.tensor(averaged(walk(), width)[-1]).float()
        assert torch.equal(found, exact)


def test_a_kept_average_needs_only_itself():
    kept = [Kept(None, "", t, gamma_of(w)) for t in (10.0, 50.0, 100.0) for w in WIDTHS]
    for number, each in enumerate(kept):
        found = shares(kept, images_seen=each.images_seen, gamma=each.gamma)
        np.testing.assert_allclose(found, np.eye(len(kept))[number], atol=1e-6)


def test_weights_that_never_moved_stay_as_they_are():
    kept = [Kept(None, "", 100.0 * n, gamma_of(w)) for n in range(1, 30) for w in WIDTHS]
    for width in (0.03, 0.07, 0.2):
        found = shares(kept, images_seen=2900.0, gamma=gamma_of(width))
        assert found.sum() == pytest.approx(1, abs=1e-12)


def test_the_fingerprint_names_what_was_read(run):
    newest = complete(run / "checkpoints")[-1]
    names = [weights_fingerprint(run, w, newest) for w in ("ema", "raw", "power_0.08")]
    assert len(set(names)) == 3
    assert weights_fingerprint(run, "power_0.05", newest) == names[0], "the same files"


def test_what_cannot_be_made_is_refused(run, tmp_path):
    with pytest.raises(BadInput, match=r"no average 'half_life_5', but ema, power_0\.05"):
        read_weights(run, "half_life_5")
    whole = WholeTensors({"a": torch.zeros(3)})
    assert write_checkpoint(tmp_path / "checkpoints", TrainState(1, 8, 1, "d", "e", {}), whole)
    assert read_record(complete(tmp_path / "checkpoints")[0]).averages == ["ema"]
    with pytest.raises(BadInput, match=r"at least two power averages.*have 0.*power_sigma_rel="):
        read_weights(tmp_path, "power_0.1")
