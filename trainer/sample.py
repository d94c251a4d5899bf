"""Generate pictures from captions with a run's averaged weights."""

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.command import run_command
from trainer.config_tools import SampleConfig
from trainer.errors import BadInput
from trainer.gallery import Shown, reconstructions, write_gallery
from trainer.observe.countdown import Countdown
from trainer.observe.energy import open_meters
from trainer.observe.ledger import Ledger
from trainer.sampler import load_sampler

log = logging.getLogger(__name__)

CAPTIONS_FILE = "captions.txt"


def main(argv: Sequence[str]) -> int:
    """`kiln sample run=RUN captions=[...]`."""
    return run_command(run, SampleConfig, "sample", argv)


def run(cfg: SampleConfig) -> int:
    """Write pictures, a labelled grid and an index."""
    run_dir = Path(cfg.run)
    captions = read_captions(cfg)
    sampler = load_sampler(run_dir, device=cfg.device, threads=cfg.threads)
    meters = open_meters(tdp_w_per_core=sampler.cfg.logging.tdp_w_per_core)
    with Ledger(run_dir / "ledger.jsonl", stage="sample", meters=meters) as ledger:
        ledger.switch("evaluation")
        with Countdown(
            "sampling", len(captions) * cfg.sampling.num_steps, unit="steps"
        ) as countdown:
            pictures = sampler.sample(captions, cfg.sampling, on_steps=countdown.advance)
        samples = [Shown(*shown) for shown in zip(captions, pictures, strict=True)]
        pairs = reconstructions(sampler, cfg.num_reconstructions)
        path = write_gallery(Path(cfg.to or run_dir / "samples"), samples, pairs)
    log.info(
        "%d pictures after %d training images: %s", len(samples), sampler.state.images_seen, path
    )
    return 0


def read_captions(cfg: SampleConfig) -> list[str]:
    """Return the captions that the config means.

    Raises:
        BadInput: There are none, or they are given twice.
    """
    if cfg.captions and cfg.captions_file:
        raise BadInput("got both captions= and captions_file=. Give one of them.")
    if cfg.captions:
        return list(cfg.captions)
    path = Path(cfg.captions_file) if cfg.captions_file else Path(cfg.run) / CAPTIONS_FILE
    if not path.is_file():
        raise BadInput(
            f'got no captions, and {path} is not there. Give captions=["...","..."] or '
            "captions_file= a text file with one caption per line."
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    captions = [line for line in lines if line]
    if not captions:
        raise BadInput(f"{path} has no captions. Write one per line.")
    return captions
