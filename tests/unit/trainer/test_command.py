"""Laws of what a command line may leave out."""

from trainer.command import long_words
from trainer.config_tools import SHORT_KEYS, SampleConfig
from trainer.frozen import compose


def full(*argv):
    return long_words(argv, positional="run", short=SHORT_KEYS)


def test_the_first_word_without_an_equals_sign_is_the_run():
    assert full("seed=1", "runs/a") == ["sampling.seed=1", "run='runs/a'"]
    assert full("runs/a", "runs/b") == ["run='runs/a'", "runs/b"]  # which composing refuses


def test_any_folder_name_survives():
    for name in ("it's here", "a,b[c]", "ünï {x}", "runs/2026-11-28/x.y"):
        assert compose(SampleConfig, "sample", full(name)).run == name


def test_short_keys_mean_the_long_ones_which_go_on_working():
    words = ["solver=dpm_2m", "steps=20", "guidance=3", "negative=text", "seed=4", "grid=uniform"]
    short = compose(SampleConfig, "sample", full("r", *words, "batch=5"))
    long = [
        *("sampling.solver=dpm_2m", "sampling.num_steps=20", "sampling.guidance_scale=3"),
        *("sampling.negative=text", "sampling.seed=4", "sampling.grid=uniform"),
        *("sampling.batch_images=5", "run=r"),
    ]
    assert short == compose(SampleConfig, "sample", full(*long))


def test_without_short_keys_words_stay_as_they_are():
    words = ["a=1", "b.c=[x=y]", "~d"]
    assert long_words(words, positional=None) == words
