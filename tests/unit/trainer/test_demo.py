from data_prep.scenes import is_held_out, parse
from trainer.config import DemoConfig
from trainer.demo import _WISHES, out_dir, pipeline_of
from trainer.frozen import compose
from trainer.pipeline_stages import stages_of


def test_the_wishes_of_the_demo_are_captions_that_training_never_sees():
    assert all(is_held_out(parse(wish)) for wish in _WISHES)


def test_the_steps_are_the_commands_in_the_order_of_the_data():
    stages = stages_of(pipeline_of(compose(DemoConfig, "demo", [])))
    assert [stage.name for stage in stages] == [
        "prepare",
        "encode",
        "train",
        "evaluate",
        "sample",
        "report",
    ]


def test_everything_goes_to_a_folder_named_after_the_data():
    assert str(out_dir(compose(DemoConfig, "demo", []))) == "demo/scenes"
    assert str(out_dir(compose(DemoConfig, "demo", ["data=/pictures/pets"]))) == "demo/pets"
    assert str(out_dir(compose(DemoConfig, "demo", ["out=here"]))) == "here"
