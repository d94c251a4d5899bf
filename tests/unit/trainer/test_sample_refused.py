"""What `kiln sample` refuses or warns of, and that it says what to do."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.unit.trainer.test_sample import CAPTIONS, config, load
from trainer import sample as command
from trainer.config import TrainConfig
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.processes import VpTable
from trainer.drawing import check_sampling
from trainer.errors import BadInput, BadWorld
from trainer.frozen import freeze, read_yaml, thaw, write_yaml
from trainer.pictures import draw_pictures, require_room, wanted
from trainer.sample import _work


def set_config(run, section, **changes):
    data = thaw(read_yaml(TrainConfig, run / "config.yaml"))
    data[section].update(changes)
    write_yaml(freeze(TrainConfig, data), run / "config.yaml")


def test_a_prompt_over_the_token_limit_is_warned_of_with_what_is_cut(tiny_run, tmp_path, caplog):
    long = "a small red circle on the left " * 5 + "the end"
    words = [f'prompts=["{long}"]', f"out={tmp_path}", "num_reconstructions=0"]
    with caplog.at_level(logging.WARNING):
        command.run(config(tiny_run, *words))
    (said,) = [row.getMessage() for row in caplog.records if "longer than" in row.getMessage()]
    read, cut = said.split("It reads: ")[1].rstrip("]").split(" [and not: ")
    assert "32 tokens" in said
    assert f"{read} {cut}" == long
    assert cut.endswith("the end")


class Broken(nn.Module):
    """A network that gives NaN when it is asked for the fourth time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, time_B, text_BLD, mask_BL):
        self.calls += 1
        return torch.full_like(x, math.nan) if self.calls == 4 else torch.zeros_like(x)


def test_nan_names_the_step_and_leaves_finished_pictures(tiny_run, tmp_path):
    cfg = config(
        tiny_run, f"out={tmp_path}", "sampling.batch_images=1", "sampling.guidance_scale=1"
    )
    work = _work(cfg, replace(load(tiny_run), model=Broken()))
    with pytest.raises(BadWorld, match=r"step 2 of sampling\.solver=ddim .* not finite"):
        draw_pictures(work, wanted(CAPTIONS, 1))  # the second picture, its second step
    assert [path.name for path in sorted(tmp_path.glob("sample_*.png"))] == ["sample_0000.png"]


def test_more_pictures_than_disk_are_refused_with_the_numbers_before_any_is_drawn(
    tiny_run, tmp_path
):
    words = ["prompts=[a]", f"out={tmp_path / 'o'}", "images_per_prompt=1000000000000"]
    with pytest.raises(BadInput, match=r"need up to \d+\.\d GB in .* GB are free\. Give out="):
        command.run(config(tiny_run, *words))
    assert not (tmp_path / "o").exists()


def test_what_is_there_needs_no_more_room(tmp_path):
    require_room(tmp_path / "not" / "yet", num_pictures=3, side_px=64, num_variances=3)
    (tmp_path / "sample_0000.json").write_text("{}")
    require_room(tmp_path, num_pictures=1, side_px=10_000_000)
    with pytest.raises(BadInput, match="1 of them still to draw"):
        require_room(tmp_path, num_pictures=2, side_px=10_000_000)


def test_guidance_needs_a_network_that_has_seen_the_empty_caption(tiny_run, tmp_path):
    set_config(tiny_run, "objective", caption_dropout=0.0)
    words = ["prompts=[a ring]", f"out={tmp_path / 'o'}", "num_reconstructions=0"]
    for more in ([], ["sampling.negative=a star"]):
        with pytest.raises(BadInput, match=r"caption_dropout=0 .*guidance=1"):
            command.run(config(tiny_run, *words, *more))
    assert command.run(config(tiny_run, *words, "sampling.guidance_scale=1")) == 0


def test_more_steps_than_levels_are_refused(tiny_run):
    table = Parameterization(VpTable(num_levels=10), "eps", 1.0)
    check = {"caption_dropout": 0.1}
    check_sampling(table, config(tiny_run, "sampling.num_steps=10").sampling, **check)
    with pytest.raises(BadInput, match=r"Try sampling\.num_steps=10\."):
        check_sampling(table, config(tiny_run, "sampling.num_steps=11").sampling, **check)
    late = config(tiny_run, "sampling.num_steps=7", "sampling.first_time=0.6").sampling
    with pytest.raises(BadInput, match=r"6 of them up to t=0\.6.*num_steps=6"):
        check_sampling(table, late, **check)


@pytest.mark.parametrize("solver", ["euler_maruyama", "predictor_corrector"])
def test_solvers_that_cannot_begin_in_pure_noise_are_refused(tiny_run, tmp_path, solver):
    words = ["prompts=[a ring]", f"out={tmp_path}", f"sampling.solver={solver}"]
    with pytest.raises(BadInput, match=r"infinite at t=1 .*first_time=0\.999.*solver=ddpm"):
        command.run(config(tiny_run, *words))
    assert command.run(config(tiny_run, *words, "sampling.first_time=0.9")) == 0


def test_an_unknown_solver_is_answered_with_the_known_ones(tiny_run):
    with pytest.raises(BadInput, match=r"sampling\.solver='dpm'.*'ddpm', 'ddim'.*or 'dopri5'"):
        config(tiny_run, "sampling.solver=dpm")


def test_a_negative_prompt_without_guidance_is_refused(tiny_run):
    with pytest.raises(BadInput, match="Try guidance_scale=4"):
        config(tiny_run, "sampling.negative=x", "sampling.guidance_scale=1")


def test_text_that_is_not_utf_8_is_refused(tiny_run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(BadInput, match="Save it as UTF-8"):
        command.read_prompts(config(tiny_run, f"prompts_file={tmp_path / 'latin.txt'}"))
    with pytest.raises(BadInput, match="not UTF-8"):
        command.read_prompts(replace(config(tiny_run), prompts=("gr\udcf6\udcdfer",)))


def test_a_watermark_on_pictures_too_small_for_it_is_refused(tiny_run, tmp_path):
    with pytest.raises(BadInput, match="32x32 px"):
        command.run(config(tiny_run, "prompts=[a]", f"out={tmp_path}", "watermark=kiln"))


def test_an_ensemble_of_one_is_refused(tiny_run):
    with pytest.raises(BadInput, match=r"uncertainty\.count=1"):
        config(tiny_run, "uncertainty={over:seeds,count:1}")
