"""Laws of reading a run of adapters: drawn from, exported, begun from, on its own base alone."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from tests.exports import CAPTIONS, EPS, UNET, export_config, make_run, sampling
from tests.lora_base import LORA
from tests.tiny_run import OneRank, save_run
from trainer import export
from trainer.begin import check_begin, hold_base
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.frozen import freeze, read_yaml, thaw
from trainer.plan import make_plan, rows
from trainer.runtime.rundir import config_changes, freeze_config
from trainer.sampler import load_sampler

KINDS = {
    "transformer": {},
    "stock unet": {"model": UNET, "text": "clip", "padding": "max", "objective": EPS},
}


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    """A run whose export adapters sit on."""
    run = make_run(tmp_path / "here", **KINDS[request.param])
    export.run(export_config(run, tmp_path / "base"))
    return run


@pytest.fixture
def adapted(base, tmp_path):
    """A run of adapters that have moved, and its whole network."""
    return adapted_run(base, tmp_path / "adapted", start_from=tmp_path / "base")


def adapted_run(base, run, *, start_from):
    cfg = thaw(read_yaml(TrainConfig, base / "config.yaml"))
    cfg |= {"run": str(run), "start_from": str(start_from), "lora": LORA, "seed": 3}
    cfg = freeze(TrainConfig, cfg)
    hold_base(cfg, OneRank())
    return save_adapted(cfg, run)


def save_adapted(cfg, run):
    torch.manual_seed(0)
    net = build_model(cfg).eval()
    for param in net.parameters():
        if param.requires_grad:
            nn.init.normal_(param, std=0.2)
    shutil.move(run, run.with_name("held"))
    save_run(cfg, run, net)
    shutil.move(run.with_name("held") / "base.json", run)
    return run, net


def drawn(sampler):
    return sampler.sample(CAPTIONS, sampling(num_steps=3, guidance_scale=2.0)).astype(int)


def test_pictures_are_those_of_the_unmerged_network(adapted):
    run, net = adapted
    sampler = load_sampler(run, device="cpu", threads=1)
    pictures = drawn(sampler)
    assert abs(pictures - drawn(replace(sampler, model=net))).max() <= 1
    checkpoint = next((run / "checkpoints").glob("step_*"))
    assert abs(pictures - drawn(sampler.with_weights(run, checkpoint, "ema"))).max() == 0
    plain = load_sampler(run.parent / "base", device="cpu", threads=1)
    assert abs(pictures - drawn(plain)).max() > 5


def test_an_export_is_merged_and_has_the_adapters_beside(adapted, tmp_path):
    run, net = adapted
    out = tmp_path / "out"
    export.run(export_config(run, out))
    wanted = drawn(load_sampler(run, device="cpu", threads=1))
    assert abs(drawn(load_sampler(out, device="cpu", threads=1)) - wanted).max() <= 1
    facts = json.loads((out / "training.json").read_text())
    size = sum(p.numel() for name, p in net.named_parameters() if "lora_" not in name)
    assert facts["num_parameters"] == size
    assert facts["lora"] == LORA
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "LoRA of rank 3, merged into the weights of base" in (out / "README.md").read_text()


@pytest.mark.parametrize("base", ["stock unet"], indirect=True)
def test_diffusers_puts_the_exported_adapters_on_the_base(adapted, tmp_path):
    run, _ = adapted
    export.run(export_config(run, tmp_path / "out"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 12, 16)
    plain = pipeline.unet(x, 500, text).sample
    pipeline.load_lora_weights(tmp_path / "out" / "lora")
    found, wanted = pipeline.unet(x, 500, text).sample, merged(x, 500, text).sample
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 0.01


def test_another_run_begins_with_the_merged_weights(adapted, tmp_path):
    run, _ = adapted
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    heir = build_model(replace(cfg, run=str(tmp_path / "heir"), start_from=str(run), lora=None))
    sampler = load_sampler(run, device="cpu", threads=1)
    for name, param in sampler.model.state_dict().items():
        assert torch.equal(heir.state_dict()[name], param), name
    assert all(param.requires_grad for param in heir.parameters())


@pytest.mark.parametrize("base", ["transformer"], indirect=True)
def test_the_base_may_move_but_not_change(adapted, tmp_path):
    run, _ = adapted
    wanted = drawn(load_sampler(run, device="cpu", threads=1))
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(BadInput, match="base', which is no folder"):
        load_sampler(run, device="cpu", threads=1)
    cfg = replace(read_yaml(TrainConfig, run / "config.yaml"), start_from=str(moved))
    assert "start_from" in config_changes(run, cfg)[0]
    check_begin(cfg)
    freeze_config(run, cfg)
    assert abs(drawn(load_sampler(run, device="cpu", threads=1)) - wanted).max() == 0
    (weights,) = (moved / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match=r"moved has weights with fingerprint .* were trained on"):
        load_sampler(run, device="cpu", threads=1)
    with pytest.raises(BadInput, match=r"moved has weights with fingerprint .* were trained on"):
        check_begin(cfg)
    (run / "base.json").unlink()
    with pytest.raises(BadInput, match=r"its base.json, which says on which weights, is not there"):
        load_sampler(run, device="cpu", threads=1)


@pytest.mark.parametrize("base", ["transformer"], indirect=True)
def test_a_run_without_a_checkpoint_is_no_base(base, tmp_path):
    shutil.rmtree(base / "checkpoints")
    with pytest.raises(BadInput, match=r"has no complete checkpoint. Train it first"):
        adapted_run(base, tmp_path / "adapted", start_from=base)


def test_plans_count_what_is_trained(adapted):
    run, net = adapted
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    whole = replace(cfg, lora=None)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    plan, gib = make_plan(cfg), 2**30
    assert plan.weights_gib * gib == pytest.approx(4 * (whole.num_parameters + 2 * trained))
    assert plan.states_gib * gib == pytest.approx(16 * trained)
    assert "frozen; " in dict(rows(cfg, plan))["model"]
    bad = replace(cfg, lora=replace(cfg.lora, targets=("nothing",)))
    with pytest.raises(BadInput, match="Give ends of their names: "):
        make_plan(bad)
