import io
import time

import pytest
from rich.console import Console

from tests.latents_without_encoders import make_dataset
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.plan_forecast import check_run, forecast
from trainer.plan_memory import largest_micro_batch
from trainer.plan_options import NUM_SHOWN, options
from trainer.plan_page import page

SD2 = ["experiment=sd2_512", "data.dataset=none"]
MONEY = ["accounts.price_per_gpu_hour=2", "accounts.grid=USA"]


def shown(*words):
    cfg, out = compose(TrainConfig, "train", [*SD2, *words]), io.StringIO()
    page(cfg, Console(file=out, width=300))
    return cfg, out.getvalue()


def test_figures_on_the_page_are_those_of_the_functions():
    cfg, text = shown(*MONEY)
    made = forecast(cfg)
    for number in (
        f"{made.memory.device_bytes / 2**30:,.2f} GiB of 79 GiB",
        f"{made.speed.images_per_s.mid / 128:,.1f} per GPU",
        f"{largest_micro_batch(cfg)} images fit",
        f"checkpoint.every_images={made.needs.best_interval_images}",
        f"{made.needs.num_failures:,.1f} expected",
        f"{float(f'{made.needs.gpu_cost.mid:.3g}'):,.10g} (",
        f"{float(f'{made.needs.kg_co2e.mid:.3g}'):,.10g} (",
    ):
        assert number in text, number


def test_a_plan_comes_in_seconds_without_a_dataset_and_plain_when_piped(capsys):
    began_s = time.process_time()
    assert main(["plan", "experiment=sd2_512", "cluster.num_nodes=16"]) == 0
    assert time.process_time() - began_s < 10
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "give data.dataset=DIR" in out
    assert "give accounts.price_per_gpu_hour" in out


def test_alternatives_fit_are_sorted_and_can_be_typed():
    cfg, text = shown()
    made = forecast(cfg)
    found = options(cfg, made.failures, steps=made.plan.total_steps)
    assert [each.rank for each in found] == sorted(each.rank for each in found)
    for option in found[:NUM_SHOWN]:
        typed = compose(TrainConfig, "train", [*SD2, *option.words])
        check_run(typed)
        assert forecast(typed).needs.gpu_hours == option.needs.gpu_hours
        assert f"{float(f'{option.needs.gpu_hours.mid:.3g}'):,.10g}  " in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cluster.accelerator=null"], "give cluster.accelerator=NAME, one of v100_32gb"),
        (["cluster=local", "engine.precision=fp32"], "cluster.device=cpu"),
    ],
)
def test_without_a_device_the_page_says_what_to_give(words, says):
    _, text = shown(*words, "cluster.device_memory_gib=99")
    assert says in text
    assert "Alternatives" not in text


def test_a_run_that_never_ends_is_said_to_and_has_no_hours():
    _, text = shown("cluster.mttf_gpu_h=0.04")
    assert "does not finish with these failures: one every " in text
    assert "wall time" not in text
    assert "GPU hours" not in text


def test_a_word_that_is_no_pair_is_answered_with_the_command_that_was_typed(capsys):
    assert main(["plan", "experiment=sd2_512", "data.dataset", "/nope"]) == 2
    assert "`kiln plan --help` lists the keys" in capsys.readouterr().err


def test_an_autoencoder_has_a_plan_without_speed(capsys):
    assert main(["plan", "experiment=scenes_autoencoder"]) == 0
    assert "nothing is predicted" in " ".join(capsys.readouterr().out.split())


def test_of_a_dataset_the_manifest_is_read(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "data", shard_counts=(10, 10))
    assert main(["plan", f"data.dataset={dataset}", "cluster.device_memory_gib=99"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "20 samples" in out or "has no latents" in out


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["batch.micro_batch_images=48"], "Try batch.micro_batch_images=16 or batch.global_batch"),
        (["batch.micro_batch_images=1024"], "Try batch.micro_batch_images=16."),
        (["cluster.device_memory_gib=4"], "Try "),
        (["cluster.time_limit_min=10"], "Try cluster.time_limit_min=21."),
        (["cluster.time_limit_min=3", "cluster.accelerator=null"], "Try cluster.time_limit_min=12"),
        (["cluster.time_limit_min=21", "cluster.warn_before_kill_s=1"], "warn_before_kill_s=6."),
        (["cluster.accelerator=a100"], "is none of"),
        (["accounts.grid=Germany"], "Did you mean DEU"),
    ],
)
def test_what_cannot_work_is_refused_with_a_value(words, refusal, capsys):
    assert main(["plan", *SD2, *words]) == 2
    assert refusal in capsys.readouterr().err
