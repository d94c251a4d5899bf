"""Pictures that commands make of a run go to its W&B run."""

from dataclasses import replace

from tests.unit.observe.test_sinks import history, wandb_files
from tests.unit.trainer import test_evaluate, test_sample
from trainer import evaluate, sample
from trainer.config import TrainConfig
from trainer.frozen import read_yaml, write_yaml

CAPTIONS = ["a red circle", "a blue ring"]


def test_samples_and_evaluations_show_their_pictures_in_wandb(tiny_run):
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    offline = replace(cfg, logging=replace(cfg.logging, wandb="offline"))
    write_yaml(offline, tiny_run / "config.yaml")
    assert sample.run(test_sample.config(tiny_run, f"prompts={CAPTIONS}")) == 0
    elsewhere = f"out={tiny_run / 'elsewhere'}"
    assert sample.run(test_sample.config(tiny_run, "prompts=[a star]", elsewhere)) == 0
    assert evaluate.run(test_evaluate.config(tiny_run)) == 0
    first, second = (history(file) for file in wandb_files(tiny_run))
    assert len(first) == 8 + 1
    assert (first[-1]["images_seen"], first[-1]["samples.captions"]) == (64, CAPTIONS)
    assert "eval/shape_and_colour_frac" in second[0]
    lines = (tiny_run / "captions.txt").read_text().splitlines()
    assert second[1]["samples.captions"] == [f"wrong: {line}" for line in lines]
    assert len(list(tiny_run.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2 + 12
