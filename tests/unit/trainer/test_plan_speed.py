from dataclasses import replace

import pytest

from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.hardware import ACCELERATORS
from trainer.plan_memory import num_ranks
from trainer.plan_options import with_stages
from trainer.plan_speed import constants, predict_speed

PUBLISHED = {
    8: (1100, 290),
    16: (2180, 585),
    32: (4080, 1195),
    64: (8530, 2340),
    128: (11600, 4590),
}
"""Images/s of SD2's UNet at 256 and 512 px by A100s (README of mosaicml/diffusion)."""
AS_PUBLISHED = [
    "data.dataset=none",
    "batch.micro_batch_images=16",
    "engine.activation_checkpointing=false",
]


def run(*words, experiment="sd2_512"):
    return compose(TrainConfig, "train", [f"experiment={experiment}", *AS_PUBLISHED, *words])


def speed(cfg):
    steps = cfg.batch.global_batch_images // (cfg.batch.micro_batch_images * num_ranks(cfg))
    return predict_speed(cfg, accumulation_steps=steps)


def published(gpus, px):
    cfg = run(f"cluster.num_nodes={gpus // 8}", experiment=f"sd2_{px}")
    return speed(cfg).images_per_s, PUBLISHED[gpus][px == 512]


@pytest.mark.parametrize("px", [256, 512])
def test_the_two_points_of_the_calibration_are_reproduced(px):
    predicted, measured = published(8, px)
    assert predicted.mid == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("gpus", [16, 32, 64, 128])
@pytest.mark.parametrize("px", [256, 512])
def test_rows_that_nothing_was_fitted_to_are_met(gpus, px):
    predicted, measured = published(gpus, px)
    if (gpus, px) == (128, 256):
        # Published scaling falls to 66 % there; nothing in the hardware numbers says why.
        assert predicted.mid / measured == pytest.approx(1.33, abs=0.03)
        return
    assert predicted.mid == pytest.approx(measured, rel=0.05)
    assert predicted.low < measured < predicted.high


def test_the_constants_are_shares_that_can_be():
    share, readings = constants()
    assert 0.2 < share < 0.5
    assert 1 < readings < 20


def test_more_nodes_are_faster_and_less_efficient():
    found = [speed(run(f"cluster.num_nodes={nodes}")) for nodes in (1, 2, 4, 8, 16)]
    rates = [each.images_per_s.mid for each in found]
    assert rates == sorted(rates)
    mfu = [each.mfu_frac.mid for each in found]
    assert mfu == sorted(mfu, reverse=True)


def test_a_slower_network_is_slower_and_a_single_node_has_none():
    fast, slow = (speed(run(f"cluster.network_gb_per_s={gb}")) for gb in (200, 5))
    assert slow.step_s.mid > fast.step_s.mid
    assert slow.exposed_s / slow.step_s.mid > fast.exposed_s / fast.step_s.mid
    alone = run("cluster.num_nodes=1", "cluster.network_gb_per_s=1")
    assert speed(alone) == speed(run("cluster.num_nodes=1"))


def test_stage_3_communicates_most():
    exchanged = [
        speed(changed).exchange_s for _, changed in with_stages(run("cluster.num_nodes=2"))
    ]
    assert exchanged == sorted(exchanged)


def test_the_band_holds_the_prediction_and_widens_with_what_is_unknown():
    known = speed(run()).images_per_s
    other = speed(run("cluster.accelerator=h100_80gb")).images_per_s
    assert known.low < known.mid < known.high
    assert other.high / other.low > known.high / known.low
    assert other.mid > known.mid


def test_what_is_done_again_costs_time_and_is_no_work():
    once, again = speed(run()), speed(run("engine.activation_checkpointing=true"))
    assert again.compute_s == pytest.approx(once.compute_s * 4 / 3)
    assert again.mfu_frac.mid < once.mfu_frac.mid


@pytest.mark.parametrize(
    "words",
    [["data.latents=online"], ["engine.offload=optimizer"]],
)
def test_encoders_and_offloading_take_time(words):
    assert speed(run(*words)).step_s.mid > speed(run()).step_s.mid


def test_nothing_is_predicted_of_unknown_devices():
    assert speed(run("cluster.accelerator=null")) is None
    assert speed(run("cluster.device=cpu")) is None


def test_accelerators_that_cannot_be_are_refused_with_ones_that_can():
    with pytest.raises(BadInput, match=r"cluster\.accelerator=a1000 is none of v100_32gb, "):
        speed(run("cluster.accelerator=a1000"))
    with pytest.raises(BadInput, match=r"does not compute\. Give engine\.precision=fp16"):
        speed(run("cluster.accelerator=v100_32gb"))
    assert speed(run("cluster.accelerator=v100_32gb", "engine.precision=fp16")) is not None


def test_a_network_of_which_nothing_is_known_must_be_told():
    lonely = "cluster.accelerator=h100_80gb_pcie"
    assert ACCELERATORS["h100_80gb_pcie"].network_gb_per_s is None
    with pytest.raises(BadInput, match=r"Give cluster\.network_gb_per_s, .*example 25"):
        speed(run(lonely))
    assert speed(run(lonely, "cluster.network_gb_per_s=25")) is not None


def test_fp32_is_slower():
    cfg = run()
    full = replace(cfg, engine=replace(cfg.engine, precision="fp32"))
    assert speed(full).step_s.mid > speed(cfg).step_s.mid
