from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_config
from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.models.costs import activation_bytes, backward_moments
from trainer.models.denoisers import denoiser_class, diffusers_options
from trainer.plan import make_plan
from trainer.plan_forecast import check_run
from trainer.plan_memory import (
    GIB,
    checkpoint_gib,
    largest_micro_batch,
    moments_per_weight,
    num_ranks,
    predict_memory,
    state_bytes,
    with_micro_batch,
)
from trainer.plan_options import with_stages

SD2 = ["experiment=sd2_512", "data.dataset=none"]


def sd2(*words):
    return compose(TrainConfig, "train", [*SD2, *words])


def on_nodes(cfg, nodes):
    return replace(cfg, cluster=replace(cfg.cluster, num_nodes=nodes))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_higher_stage_and_more_ranks_never_take_more(precision, checkpointing):
    cfg = sd2(
        f"engine.precision={precision}", f"engine.activation_checkpointing={checkpointing}",
        "batch.micro_batch_images=1",
    )  # fmt: skip
    for nodes in (1, 2, 4, 8, 16):
        sizes = [
            predict_memory(changed).device_bytes
            for _, changed in with_stages(on_nodes(cfg, nodes))
            if changed.engine.zero_stage
        ]
        assert sizes == sorted(sizes, reverse=True)
    for _, changed in with_stages(cfg):
        sizes = [predict_memory(on_nodes(changed, n)).device_bytes for n in (1, 2, 4, 8, 16)]
        assert sizes == sorted(sizes, reverse=True)


def test_activations_grow_with_the_micro_batch_and_shrink_when_they_are_made_again():
    cfg = sd2("engine.activation_checkpointing=false")
    sizes = [predict_memory(with_micro_batch(cfg, micro)).device_bytes for micro in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    again = replace(cfg, engine=replace(cfg.engine, activation_checkpointing=True))
    assert predict_memory(again).device_bytes < predict_memory(cfg).device_bytes


def test_the_parts_are_the_total():
    memory = predict_memory(sd2())
    parts = (
        memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.ema_bytes,
        memory.activations_bytes, memory.buffers_bytes, memory.runtime_bytes,
    )  # fmt: skip
    assert memory.device_bytes == pytest.approx(sum(parts))
    assert memory.host_bytes == memory.snapshot_bytes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_has_weights_of_2_bytes_and_masters_of_4(precision):
    cfg = sd2(f"engine.precision={precision}")
    memory = predict_memory(cfg)
    assert memory.weights_bytes == 2 * cfg.num_parameters
    assert memory.gradients_bytes <= 2 * cfg.num_parameters
    assert memory.optimizer_bytes == (4 + 4 + 4) * cfg.num_parameters / num_ranks(cfg)


def test_what_is_offloaded_leaves_the_device():
    here, away = predict_memory(sd2()), predict_memory(sd2("engine.offload=optimizer"))
    moved = here.optimizer_bytes + here.ema_bytes
    assert here.device_bytes - away.device_bytes == pytest.approx(moved)
    assert away.host_bytes - here.host_bytes == pytest.approx(moved)


def test_a_backward_pass_frees_activations_while_gradients_come():
    cfg = sd2("engine.activation_checkpointing=false")
    sizes = {
        "latent_height": 64,
        "latent_width": 64,
        "text_tokens": 77,
        "width_bytes": 2,
        "checkpointing": False,
    }
    moments = backward_moments(cfg.model, **sizes)
    kept, gradients = (
        [getattr(m, name) for m in moments] for name in ("kept_bytes", "num_gradients")
    )
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == activation_bytes(cfg.model, **sizes)
    assert gradients == sorted(gradients)
    assert gradients[-1] == pytest.approx(cfg.num_parameters, rel=0.002)  # norms and biases


@pytest.mark.parametrize("memory_gib", [8, 16, 32])
def test_the_largest_micro_batch_divides_fits_and_is_the_largest(memory_gib):
    cfg = sd2(f"cluster.device_memory_gib={memory_gib}", "cluster.num_nodes=2")
    largest = largest_micro_batch(cfg)
    per_rank = cfg.batch.global_batch_images // num_ranks(cfg)
    assert per_rank % largest == 0
    check_run(with_micro_batch(cfg, largest))
    larger = [micro for micro in range(largest + 1, per_rank + 1) if per_rank % micro == 0]
    for micro in larger[:1]:
        steps = per_rank // micro
        changed = with_micro_batch(cfg, micro)
        assert predict_memory(changed, accumulation_steps=steps).device_bytes > memory_gib * GIB


def test_nothing_fits_where_the_weights_alone_do_not():
    assert largest_micro_batch(sd2("cluster.device_memory_gib=1")) is None


def test_a_batch_that_does_not_divide_has_no_micro_batch():
    assert largest_micro_batch(tiny_config(cluster__ranks_per_node=3)) is None


def test_what_does_not_fit_is_refused_with_words_that_do():
    words = ["batch.micro_batch_images=16", "engine.activation_checkpointing=false"]
    small = ["cluster.device_memory_gib=16"]
    with pytest.raises(BadInput, match=r"of it activations, .*Try ([^.]|\.\w)+\.$") as refused:
        check_run(sd2(*words, *small))
    advice = str(refused.value).rpartition("Try ")[2].removesuffix(".").split()
    check_run(sd2(*words, *small, *advice))


ONE_GPU = ["cluster.num_nodes=1", "cluster.ranks_per_node=1"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["cluster.device_memory_gib=4"], "engine.zero_stage=2"),
        ([*ONE_GPU, "cluster.device_memory_gib=16"], "engine.offload=optimizer"),
        (["cluster.num_nodes=1", "cluster.device_memory_gib=4"], "engine.offload=optimizer"),
        ([*ONE_GPU, "engine.offload=optimizer", "cluster.device_memory_gib=4.5"], "num_nodes="),
        (
            [*ONE_GPU, "cluster.kind=local", "cluster.slurm=null", "cluster.device_memory_gib=2"],
            "device_memory_gib=",
        ),
        (["cluster.device_memory_gib=2"], "device_memory_gib="),
        (["cluster=local", "engine.precision=fp32"], "device_memory_gib="),
    ],
)
def test_states_that_do_not_fit_are_refused_with_words_that_do(words, advice):
    with pytest.raises(BadInput, match=r"Try ") as refused:
        check_run(sd2(*words))
    told = str(refused.value).rpartition("Try ")[2]
    typed = [word.strip(".,") for word in told.split() if "=" in word]
    assert any(advice in word for word in typed)
    check_run(sd2(*words, *typed))


@pytest.mark.parametrize("gib", [0.5, 1, 1.5])
def test_where_no_cuda_context_fits_only_the_memory_is_to_be_changed(gib):
    words = ["experiment=pixart_256", "data.dataset=none"]
    with pytest.raises(BadInput, match=r"A CUDA context alone takes 1\.5 GiB\. Try ") as refused:
        check_run(compose(TrainConfig, "train", [*words, f"cluster.device_memory_gib={gib}"]))
    told = str(refused.value).rpartition("Try ")[2]
    typed = [word.strip(".,") for word in told.split() if "=" in word]
    assert [word.partition("=")[0] for word in typed] == ["cluster.device_memory_gib"]
    check_run(compose(TrainConfig, "train", [*words, *typed]))


ADAFACTOR = ["optim.kind=adafactor", "engine.zero_stage=0", "engine.precision=fp32"]


@pytest.mark.parametrize("word", ["model=transformer_tiny", "model=unet_tiny", SD2[0]])
def test_adafactor_remembers_what_torch_makes_of_the_real_network(word):
    cfg = compose(TrainConfig, "train", [word, "data.dataset=none", *ADAFACTOR, "cluster=local"])
    with torch.device("meta"):
        network = denoiser_class(cfg.model)(**diffusers_options(cfg.model))
    shapes = [param.shape for param in network.parameters()]
    remembered = sum(
        shape.numel() // shape[-1] + shape.numel() // shape[-2] if len(shape) > 1 else shape.numel()
        for shape in shapes
    )
    total = sum(shape.numel() for shape in shapes)
    # Tables that are no layer, such as PixArt's shifts, count as vectors.
    assert moments_per_weight(cfg) == pytest.approx(remembered / total, rel=0.01, abs=0.003)


def test_adafactor_takes_less_memory_and_smaller_checkpoints_and_starts_where_adamw_does_not_fit():
    words = [*ADAFACTOR, "batch.micro_batch_images=1", "engine.activation_checkpointing=true"]
    ours, adamw = sd2(*words), sd2(*words, "optim.kind=adamw")
    assert state_bytes(ours)[2] < state_bytes(adamw)[2] / 2
    assert checkpoint_gib(ours) < checkpoint_gib(adamw)
    between = sd2(*words, "cluster.device_memory_gib=12")
    make_plan(between)
    with pytest.raises(BadInput, match="optimizer and EMA take"):
        make_plan(sd2(*words, "cluster.device_memory_gib=12", "optim.kind=adamw"))
