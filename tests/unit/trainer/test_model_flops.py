from dataclasses import replace

import pytest
import torch

from trainer import model_flops
from trainer.config import TrainConfig
from trainer.data.sources import LatentBatch, PictureBatch
from trainer.frozen import compose
from trainer.model_flops import flops_counter, peak_flops

BASE = ["data.dataset=none", "run=none"]
SD2_512_GMAC = 402.1


def batch(num_images, height, width, tokens):
    ids = torch.arange(num_images)
    latents = torch.zeros(num_images, 4, height, width)
    text = torch.zeros(num_images, tokens, 8)
    mask = torch.ones(num_images, tokens, dtype=torch.bool)
    return LatentBatch(ids, ids, latents, latents, text, mask)


def test_a_batch_costs_what_its_images_do_at_their_size():
    cfg = compose(TrainConfig, "train", ["experiment=sd2_512", *BASE])
    count = flops_counter(cfg)
    one = count(batch(1, 64, 64, 77))
    assert one == pytest.approx(3 * 2 * SD2_512_GMAC * 1e9, rel=1e-3)
    assert count(batch(5, 64, 64, 77)) == 5 * one
    assert count(batch(1, 48, 80, 77)) != one
    assert count(batch(1, 64, 64, 20)) < one


def test_pictures_of_a_first_stage_are_not_counted():
    count = flops_counter(compose(TrainConfig, "train", ["experiment=scenes_autoencoder", *BASE]))
    ids = torch.arange(2)
    assert count(PictureBatch(ids, ids, torch.zeros(2, 3, 64, 64))) == 0


@pytest.mark.parametrize(
    ("name", "precision", "peak_tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("a device of tomorrow", "bf16", None),
    ],
)
def test_the_peak_is_the_device_makers_at_the_networks_precision(
    monkeypatch, name, precision, peak_tflops
):
    cfg = compose(TrainConfig, "train", ["experiment=sd2_512", *BASE])
    cfg = replace(cfg, engine=replace(cfg.engine, precision=precision))
    monkeypatch.setattr(model_flops.torch.cuda, "get_device_name", lambda: name)
    found = peak_flops(cfg)
    assert found == (None if peak_tflops is None else pytest.approx(peak_tflops * 1e12, rel=0.01))


def test_no_peak_is_known_of_a_cpu():
    assert peak_flops(compose(TrainConfig, "train", BASE)) is None
