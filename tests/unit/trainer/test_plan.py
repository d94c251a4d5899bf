from dataclasses import replace

import pytest

from tests.tiny import tiny_config
from trainer.config_accounts import AccountsConfig
from trainer.errors import BadInput
from trainer.plan import make_plan
from trainer.plan_page import main


def test_arithmetic():
    cfg = tiny_config(
        batch__global_batch_images=24,
        batch__micro_batch_images=4,
        cluster__ranks_per_node=2,
        total_images=100,
    )
    plan = make_plan(cfg)
    assert (plan.num_ranks, plan.accumulation_steps, plan.images_per_step) == (2, 3, 24)
    assert plan.total_steps == 5  # the last step is a whole one
    assert plan.checkpoint_every_steps == 1


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "advice"),
    [
        (256, 16, 3, ["global=240", "global=288"]),
        (8, 16, 1, ["micro=8", "global=16"]),
        (7, 2, 1, ["micro=1", "global=6", "global=8"]),
        (2048, 1024, 128, ["micro=16", "global=131072"]),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_ones_that_do(batch, micro, ranks, advice):
    given = {
        "batch__global_batch_images": batch,
        "batch__micro_batch_images": micro,
        "cluster__ranks_per_node": ranks,
    }
    with pytest.raises(BadInput) as refused:
        make_plan(tiny_config(**given))
    words = str(refused.value).rpartition("Try ")[2].removesuffix(".").split(" or ")
    assert words == [f"batch.{word.replace('=', '_batch_images=')}" for word in advice]
    for word in words:
        key, value = word.split("=")
        make_plan(tiny_config(**given | {key.replace(".", "__"): int(value)}))


def test_what_cannot_fit_is_refused_and_sharding_helps():
    big = {"model__num_parameters": 2**28, "cluster__ranks_per_node": 2}
    with pytest.raises(BadInput, match=r"take 4\.5 GiB per rank at engine.zero_stage=0"):
        make_plan(tiny_config(**big, engine__zero_stage=0, cluster__device_memory_gib=4))
    memory = [
        (plan := make_plan(tiny_config(**big, engine__zero_stage=s, cluster__device_memory_gib=99)))
        and plan.weights_gib + plan.states_gib
        for s in (0, 1, 2, 3)
    ]
    assert memory == sorted(memory, reverse=True)
    # ZeRO-3 shards everything: 4 + 4 + 12 + 4 bytes per parameter over two ranks.
    assert memory[3] == pytest.approx(2**28 * 24 / 2 / 2**30)


def test_a_grid_that_nobody_knows_is_refused_before_anything_is_trained():
    make_plan(replace(tiny_config(), accounts=AccountsConfig(grid="DEU")))
    with pytest.raises(BadInput, match=r"accounts\.grid=Germany is none .*Did you mean DEU"):
        make_plan(replace(tiny_config(), accounts=AccountsConfig(grid="Germany")))


def test_the_plan_of_the_real_thing_prints_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=sd2_256", "data.dataset=laion"]) == 0
    out = capsys.readouterr().out
    assert "128 on 16 node(s)" in out
    assert "550,000 for 1,126,400,000 images" in out
    assert not list(tmp_path.iterdir())
