"""Take image-text URLs all the way to generated pictures and a report, with everyday commands."""

import time
from collections.abc import Sequence
from pathlib import Path

from trainer.command import run_command
from trainer.config import DemoConfig
from trainer.config_pipeline import PipelineConfig
from trainer.errors import BadInput
from trainer.frozen import compose_dict, freeze
from trainer.pipeline_local import Here
from trainer.pipeline_stages import stages_of

# Combinations that the painter holds out: training never sees them.
_WISHES = (
    "a large orange cross in the middle, on a black background",
    "a small yellow ring on the right, on a blue background",
    "a large black star in the middle, on a white background",
    "a large white triangle on the left, on a blue background",
)


# Roughly how long each command takes on two cores; only for the estimate of the time left.
_ABOUT_S = {
    "prepare": 60,
    "encode": 90,
    "train": 420,
    "evaluate": 90,
    "sample": 15,
    "report": 5,
}


def pipeline_of(cfg: DemoConfig) -> PipelineConfig:
    """Return the commands between making the source and reading the report, as a pipeline."""
    out = out_dir(cfg)
    autoencoder = cfg.first_stage or ("scenes" if cfg.data == "scenes" else "emoji")
    fields = compose_dict("pipeline", ["name=demo", "rows=-"])
    words = {
        "prepare": (
            f"image_side_px={cfg.image_side_px}",
            f"shard_rows={cfg.shard_rows}",
            "min_image_side_px=16",
            "resize_mode=center_crop",
            "encode_format=png",
            # The demo's own server; loopback addresses are refused otherwise.
            "download.allow_hosts=[127.0.0.1]",
            "download.timeout_s=2",
        ),
        "train": (f"total_images={cfg.total_images}", *cfg.train),
        "evaluate": cfg.evaluate,
        "sample": (
            f"out={out}/run/wishes",
            *([f"prompts=[{','.join(map(repr, _WISHES))}]"] if cfg.data == "scenes" else []),
        ),
    }
    for name, more in words.items():
        fields[name]["words"] = more
    for name in ("prepare", "encode"):  # every step begins at once, as it is quick to do again
        fields[name]["recheck"] = "sizes"
    return freeze(
        PipelineConfig,
        fields
        | {
            "run": f"{out}/run",
            "rows": f"{out}/source/rows.parquet",
            "dataset": f"{out}/dataset",
            "encoders": (
                f"autoencoder={autoencoder}",
                f"encoders.image_side_px={cfg.image_side_px}",
            ),
            "stages": tuple(_ABOUT_S),
            "gates": {},
        },
    )


def run(cfg: DemoConfig) -> int:
    """Run every step; what is finished says so and is not repeated."""
    out = out_dir(cfg)
    started_s = time.monotonic()
    here = Here(out)
    here.run("source", (*source_args(cfg), f"out={out / 'source'}"), left_s=680)
    with here.meanwhile("serve", (f"source={out / 'source'}",)):
        here.run_stages(stages_of(pipeline_of(cfg)), about_s=_ABOUT_S)
    minutes = (time.monotonic() - started_s) / 60
    here.console.print(
        f"\nDone in {minutes:.1f} minutes. The report: {(out / 'run/report.html').resolve()}"
    )
    return 0


def out_dir(cfg: DemoConfig) -> Path:
    """Where everything goes."""
    return Path(cfg.out) if cfg.out else Path("demo") / Path(cfg.data).resolve().name


def source_args(cfg: DemoConfig) -> tuple[str, ...]:
    """Return the words of `kiln source` that make the demo's pictures."""
    if cfg.data in {"scenes", "emoji"}:
        return (f"kind={cfg.data}", f"num_pictures={cfg.num_pictures}")
    if not Path(cfg.data).is_dir():
        raise BadInput(
            f"data={cfg.data} is neither scenes, emoji nor a folder. Give a folder of pictures "
            "with captions in X.txt beside X.jpg, or in captions.csv."
        )
    return ("kind=folder", f"pictures={cfg.data}", f"num_pictures={cfg.num_pictures}")


def main(argv: Sequence[str]) -> int:
    """`kiln demo [data=scenes|emoji|FOLDER] [key=value ...]`."""
    return run_command(run, DemoConfig, "demo", argv)
