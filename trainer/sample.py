"""Generate pictures from prompts with a run's weights; the same command again continues."""

import json
import logging
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.config_tools import SHORT_KEYS, SampleConfig
from trainer.ensemble import draw_variances, members, variance_name
from trainer.errors import BadInput
from trainer.frozen import read_yaml, thaw, write_yaml
from trainer.gallery import GRID_PICTURES, Shown, publish_gallery, reconstructions
from trainer.labels import Label, bytes_sha256, label_of
from trainer.models.text_encoders import TextEncoder
from trainer.observe.energy import open_meters
from trainer.observe.ledger import Ledger, next_attempt
from trainer.observe.sinks import send_to_wandb
from trainer.painting import read_known
from trainer.pictures import Wanted, Work, draw_pictures, is_done, require_room, wanted
from trainer.pipeline_folder import TRAINING, is_pipeline_folder
from trainer.runtime.local import run_ranks
from trainer.runtime.rundir import locked
from trainer.sampler import Pixels, Sampler, load_sampler
from trainer.watermark import check_watermark

log = logging.getLogger(__name__)

PROMPTS_FILE = "captions.txt"
RANK_CONFIG = "sample.yaml"


def main(argv: Sequence[str]) -> int:
    """`kiln sample RUN 'prompts=[...]'`."""
    return run_command(run, SampleConfig, "sample", argv, positional="run", short=SHORT_KEYS)


def run(cfg: SampleConfig) -> int:
    """Write pictures with their labels, a grid with captions and an index."""
    prompts, (side_px, tdp_w_per_core) = read_prompts(cfg), _facts(cfg)
    require_room(
        out_dir(cfg),
        num_pictures=len(prompts) * cfg.images_per_prompt,
        num_variances=len(prompts) if cfg.uncertainty else 0,
        side_px=side_px,
    )
    with _account(cfg, tdp_w_per_core=tdp_w_per_core):
        if cfg.ranks == 1:
            draw_share(cfg)
        else:
            _start_ranks(cfg)
    return 0


def out_dir(cfg: SampleConfig) -> Path:
    """Where the pictures go.

    Raises:
        BadInput: Nowhere, and an exported folder, which stays as it is, is sampled.
    """
    if cfg.out is None and is_pipeline_folder(Path(cfg.run)):
        raise BadInput(f"{cfg.run} is an exported folder. Give out= a folder for its pictures.")
    return Path(cfg.out) if cfg.out else Path(cfg.run) / "samples"


def draw_share(cfg: SampleConfig) -> None:
    """Draw what is missing of this part's share; write grid and index if nothing is missing."""
    run_dir, folder, prompts = Path(cfg.run), out_dir(cfg), read_prompts(cfg)
    sampler = load_sampler(run_dir, device=cfg.device, threads=cfg.threads, weights=cfg.weights)
    work = _work(cfg, sampler)
    _warn_of_cuts(sampler.text, [*prompts, cfg.sampling.negative])
    ensemble = members(sampler, run_dir, cfg.uncertainty) if cfg.uncertainty else []
    pictures = wanted(prompts, cfg.images_per_prompt)
    with locked(folder, f".lock-{cfg.part:04d}", doing="filled with pictures"):
        drawn = draw_pictures(work, pictures)
        if ensemble:
            draw_variances(work, prompts, ensemble)
        done = sum(is_done(work, picture) for picture in pictures)
    facts = f"{drawn} pictures drawn, {done} of {len(pictures)} are there"
    log.info("%s after %d training images: %s", facts, sampler.state.images_seen, folder)
    if done == len(pictures):
        _finish(cfg, work, pictures)


def read_prompts(cfg: SampleConfig) -> list[str]:
    """Return the prompts that the config means.

    Raises:
        BadInput: There are none, they are given twice, or are no Unicode text.
    """
    if cfg.prompts and cfg.prompts_file:
        raise BadInput("got both prompts= and prompts_file=. Give one of them.")
    if cfg.prompts:
        broken = [prompt for prompt in cfg.prompts if not _is_unicode(prompt)]
        if broken:
            raise BadInput(f"prompts= has {broken[0]!r}, which is not UTF-8. Write it anew.")
        return list(cfg.prompts)
    path = Path(cfg.prompts_file) if cfg.prompts_file else Path(cfg.run) / PROMPTS_FILE
    if not path.is_file():
        raise BadInput(
            f'got no prompts, and {path} is not there. Give prompts=["...","..."] or '
            "prompts_file= a text file with one prompt per line."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadInput(f"{path} has no prompts. Write one per line.")
    return prompts


def _facts(cfg: SampleConfig) -> tuple[int, float]:
    """Return the pictures' side and a core's watts, without loading any weights."""
    folder = Path(cfg.run)
    if is_pipeline_folder(folder):
        told = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        return int(told["encoders"]["image_side_px"]), 0.0
    trained = read_yaml(TrainConfig, folder / "config.yaml")
    return trained.encoders.image_side_px, trained.logging.tdp_w_per_core


def _work(cfg: SampleConfig, sampler: Sampler) -> Work:
    """Check everything that can be checked before the first step."""
    sampling = replace(cfg.sampling, first_time=cfg.strength) if cfg.init else cfg.sampling
    sampler.check(sampling)
    if cfg.watermark is not None:
        check_watermark(cfg.watermark, sampler.image_side_px)
    known, given = None, {}
    if cfg.init:
        mask = Path(cfg.mask) if cfg.mask else None
        known = read_known(sampler, Path(cfg.init), mask)
        given = {"init_sha256": bytes_sha256(Path(cfg.init))}
        if mask:
            given["mask_sha256"] = bytes_sha256(mask)
    label: Label = {
        **label_of(sampler, sampling, edited=cfg.init is not None),
        **given,
        **({"watermark": cfg.watermark} if cfg.watermark else {}),
    }
    return Work(
        folder=out_dir(cfg),
        sampler=sampler,
        sampling=sampling,
        known=known,
        label=label,
        watermark=cfg.watermark,
        part=cfg.part,
        parts=cfg.parts,
    )


def _warn_of_cuts(text: TextEncoder, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        read, cut = text.split(prompt)
        if cut:
            log.warning(
                "a prompt is longer than the text encoder's %d tokens. It reads: %s [and not: %s]",
                text.max_tokens,
                read.strip(),
                cut.strip(),
            )


def _finish(cfg: SampleConfig, work: Work, pictures: Sequence[Wanted]) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(work.folder, ".lock-grid", doing="finished"))
        except BadInput:
            return  # another part found everything there, too, and writes the same
        entries = []
        for picture in pictures:
            entry = {"caption": picture.prompt, "picture": f"{picture.name}.png", "ok": None}
            if cfg.uncertainty and not picture.repeat:
                entry["variance"] = f"{variance_name(picture)}.png"
            entries.append(entry)
        shown = [
            Shown(picture.prompt, _pixels(work.folder / f"{picture.name}.png"))
            for picture in pictures[:GRID_PICTURES]
        ]
        has_data = work.sampler.trained is not None  # an exported folder knows no dataset
        pairs = reconstructions(work.sampler, cfg.num_reconstructions) if has_data else []
        path = publish_gallery(work.folder, entries, shown, pairs, label=work.label)
    log.info("%s", path)
    trained = work.sampler.trained
    if trained is not None and work.folder == Path(cfg.run) / "samples":
        send_to_wandb(
            Path(cfg.run),
            config=thaw(trained),
            wandb=trained.logging.wandb,
            project=trained.logging.wandb_project,
        )


def _start_ranks(cfg: SampleConfig) -> None:
    """Let several processes share this part; the last to end finds all there."""
    notes = out_dir(cfg) / f".ranks-{cfg.part:04d}"
    notes.mkdir(parents=True, exist_ok=True)
    write_yaml(cfg, notes / RANK_CONFIG)
    code = run_ranks(
        "trainer.sample_rank",
        [str(notes / RANK_CONFIG)],
        num_ranks=cfg.ranks,
        log_dir=notes,
        env={"OMP_NUM_THREADS": "1"},
    )
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    shutil.rmtree(notes)


@contextmanager
def _account(cfg: SampleConfig, *, tdp_w_per_core: float) -> Iterator[None]:
    """Count seconds and joules into the run's account; parts have files of their own."""
    folder = out_dir(cfg) if is_pipeline_folder(Path(cfg.run)) else Path(cfg.run)
    own = "ledger.jsonl" if cfg.parts == 1 else f"ledger/sample-{cfg.part:04d}.jsonl"
    meters = open_meters(tdp_w_per_core=tdp_w_per_core)
    attempt = next_attempt(folder, "sample", cfg.part)
    with Ledger(
        folder / own, stage="sample", attempt=attempt, rank=cfg.part, meters=meters
    ) as ledger:
        ledger.switch("evaluation")
        yield


def _pixels(path: Path) -> Pixels:
    with Image.open(path) as picture:
        return np.asarray(picture)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
