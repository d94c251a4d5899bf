"""Evaluate checkpoints of a run: loss, alignment, distances to real pictures, as parallel jobs."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trainer.build import build_parameterization
from trainer.claims import claimed, locked_folder, owner
from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.config_tools import SHORT_KEYS, EvaluateConfig
from trainer.curves import CURVES, check_curves, curve_passes, draw_curves
from trainer.data.publish import publish_bytes
from trainer.errors import BadInput
from trainer.frozen import read_yaml, thaw
from trainer.gallery import COLUMNS, grid, reconstructions, write_gallery
from trainer.judge import Judge, Verdict
from trainer.labels import label_of, png_bytes
from trainer.observe.countdown import Countdown
from trainer.observe.energy import open_meters
from trainer.observe.evaluations import FOLDER, merge, result_path, strip_path
from trainer.observe.ledger import Ledger
from trainer.observe.sinks import send_to_wandb
from trainer.runtime.checkpoint import newest_valid, verify
from trainer.runtime.rundir import checkpoint_root, complete, step_of
from trainer.runtime.weights import kind_of
from trainer.sampler import Sampler, load_sampler

log = logging.getLogger(__name__)

# What changes no number, or not what an evaluation is of.
_NO_SETTINGS = {
    *("run", "checkpoint", "weights", "again", "curves", "sampling", "num_reconstructions"),
    *("device", "threads"),
}


def main(argv: Sequence[str]) -> int:
    """`kiln evaluate RUN`."""
    return run_command(run, EvaluateConfig, "evaluate", argv, positional="run", short=SHORT_KEYS)


def run(cfg: EvaluateConfig) -> int:
    """Evaluate what has no evaluation yet; print the scores."""
    run_dir = Path(cfg.run)
    todo = undone(cfg)
    if not todo and cfg.curves is None:
        log.info(
            "%s: nothing to do, %s has an evaluation of these settings; again=true makes it anew",
            run_dir,
            f"checkpoint={cfg.checkpoint}",
        )
        return 0
    trained = read_yaml(TrainConfig, run_dir / "config.yaml")
    if isinstance(trained.objective, DenoisingConfig):  # of others the sampler says what is wrong
        check_curves(
            cfg,
            build_parameterization(trained.objective),
            caption_dropout=trained.objective.caption_dropout,
        )
    with _ledger(run_dir, tdp_w_per_core=trained.logging.tdp_w_per_core) as ledger:
        ledger.switch("evaluation")
        total = Judge.passes(cfg, len(todo)) + curve_passes(cfg)
        with Countdown("evaluation", total, unit="passes") as countdown:
            work = Work(cfg, trained, countdown, total)
            for folder in todo:
                work.evaluate(folder)
            while cfg.checkpoint == "latest" and todo and not work.done and not is_there(todo[0]):
                todo = chosen(cfg)  # it was deleted for a newer one
                work.evaluate(todo[0])
            if cfg.curves is not None:
                work.draw_curves()
            countdown.finish()
    for evaluation in work.done:
        _print_scores(evaluation)
    return 0


def undone(cfg: EvaluateConfig) -> list[Path]:
    """List those of the chosen checkpoints that have no evaluation of these settings yet."""
    return [folder for folder in chosen(cfg) if cfg.again or not is_done(cfg, folder)]


def chosen(cfg: EvaluateConfig) -> list[Path]:
    """List the checkpoints that a config means, the newest first.

    Raises:
        BadInput: There is none, or not that one.
    """
    read_yaml(TrainConfig, Path(cfg.run) / "config.yaml")
    root = checkpoint_root(Path(cfg.run))
    there = {step_of(folder): folder for folder in complete(root)}
    if not there:
        raise BadInput(
            f"{cfg.run} has no complete checkpoint; train it first: kiln train run={cfg.run} ..."
        )
    match cfg.checkpoint:
        case "all":
            return [there[step] for step in sorted(there, reverse=True)]
        case "latest":
            newest = newest_valid(root, {kind_of(cfg.weights)})
            if newest is None:
                raise BadInput(f"all checkpoints in {root} are damaged. Train the run further.")
            return [newest]
        case step:
            if step not in there:
                raise BadInput(
                    f"checkpoint={step} is not there; {root} has the steps "
                    f"{', '.join(map(str, sorted(there)))}. Give one of them, latest or all."
                )
            return [there[step]]


def is_done(cfg: EvaluateConfig, folder: Path) -> bool:
    """Whether a checkpoint has an evaluation of the config's settings."""
    path = _result(cfg, folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("sampling", "settings")} == settings(cfg)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_there(folder: Path) -> bool:
    """Whether a checkpoint is complete, and was not deleted."""
    return folder in complete(folder.parent)


def settings(cfg: EvaluateConfig) -> dict[str, Any]:
    """Return what an evaluation's numbers depend on, beside the weights."""
    told = thaw(cfg)
    rest = {key: value for key, value in told.items() if key not in _NO_SETTINGS}
    return {"sampling": told["sampling"], "settings": rest}


class Work:
    """What one process does to a run's checkpoints."""

    def __init__(
        self, cfg: EvaluateConfig, trained: TrainConfig, countdown: Countdown, total: int
    ) -> None:
        self._cfg, self._trained = cfg, trained
        self._countdown, self._total = countdown, total
        """Take what to do, and where to say how far it is, of a total."""
        self._run = Path(cfg.run)
        self._sampler: Sampler | None = None
        self._judge: Judge | None = None
        self.done: list[dict[str, Any]] = []
        """The evaluations that were made."""

    def evaluate(self, folder: Path) -> None:
        """Evaluate a checkpoint, unless somebody else does, or it is deleted meanwhile."""
        claim = _result(self._cfg, folder).with_suffix(".claim")
        with claimed(claim) as mine:
            if not mine:
                log.info("%s is being evaluated by %s", folder, owner(claim))
                self._skip()
                return
            if is_done(self._cfg, folder) and not self._cfg.again:
                log.info("%s was evaluated meanwhile", folder)
                self._skip()
                return
            sampler = self._load(folder)
            if sampler is not None:
                verdict = self._open(sampler).judge(sampler)
                self._publish(sampler, verdict)

    def draw_curves(self) -> None:
        """Draw quality against steps and guidance, of the newest checkpoint that was chosen."""
        folder = chosen(self._cfg)[0]
        claim = self._run / FOLDER / CURVES / ".claim"
        with claimed(claim) as mine:
            if not mine:
                log.info("the curves are being drawn by %s", owner(claim))
                return
            sampler = self._load(folder)
            if sampler is not None:
                draw_curves(self._cfg, sampler, self._open(sampler), self._countdown.advance)

    def _open(self, sampler: Sampler) -> Judge:
        if self._judge is None:
            self._judge = Judge(self._cfg, sampler, self._countdown.advance)
        return self._judge

    def _load(self, folder: Path) -> Sampler | None:
        """Load a checkpoint's weights; None, with a warning, if training deleted it meanwhile."""
        cfg = self._cfg
        try:
            problem = verify(folder, {kind_of(cfg.weights)})
            if problem is None and self._sampler is not None:
                self._sampler = self._sampler.with_weights(self._run, folder, cfg.weights)
            elif problem is None:
                self._sampler = load_sampler(
                    self._run,
                    device=cfg.device,
                    threads=cfg.threads,
                    checkpoint=folder,
                    weights=cfg.weights,
                )
        except (BadInput, OSError) as error:
            if is_there(folder):
                raise
            problem = str(error)
        if problem is None:
            return self._sampler
        if not is_there(folder):
            problem = "training deleted it meanwhile; a larger checkpoint.keep_last keeps more"
        elif cfg.checkpoint != "all":
            raise BadInput(f"{folder} is damaged ({problem}). Give another checkpoint=.")
        log.warning("%s is not evaluated: %s", folder, problem)
        self._skip()
        return None

    def _skip(self) -> None:
        """Expect less, for the time left."""
        self._total -= Judge.passes(self._cfg, 2) - Judge.passes(self._cfg, 1)
        self._countdown.expect(self._total)

    def _publish(self, sampler: Sampler, verdict: Verdict) -> None:
        cfg, step = self._cfg, sampler.state.step
        evaluation = {
            "step": step,
            "images_seen": sampler.state.images_seen,
            "weights": cfg.weights,
            "num_captions": len(verdict.shown),
            "interval": "95 %: Wilson's for shares, by half-samples for others",
            **settings(cfg),
            **verdict.facts,
        }
        # Not sorted: the first score is the one that a report puts first.
        text = f"{json.dumps(evaluation, indent=1, allow_nan=False)}\n".encode()
        pairs = reconstructions(sampler, cfg.num_reconstructions)
        label = label_of(sampler, cfg.sampling)
        strip = png_bytes(np.asarray(grid(verdict.shown[:COLUMNS])), label)
        with locked_folder(self._run / FOLDER):
            publish_bytes(strip_path(self._run, step, cfg.weights), strip)
            publish_bytes(result_path(self._run, step, cfg.weights), text)
            newest = self._run / "evaluation.json"
            if step >= _step_of(newest):
                shown = write_gallery(self._run / "samples", verdict.shown, pairs, label=label)
                lines = "".join(f"{shown.caption}\n" for shown in verdict.shown)
                publish_bytes(self._run / "captions.txt", lines.encode())
                publish_bytes(newest, text)
                log.info("%d pictures: %s", len(verdict.shown), shown)
            rows = merge(self._run)
        self.done.append(evaluation)
        if rows is None:
            log.info("the run is being trained, and its metrics take the numbers in meanwhile")
            return
        logging_ = self._trained.logging
        send_to_wandb(
            self._run,
            config=thaw(self._trained),
            wandb=logging_.wandb,
            project=logging_.wandb_project,
        )


def _result(cfg: EvaluateConfig, folder: Path) -> Path:
    return result_path(Path(cfg.run), int(folder.name.removeprefix("step_")), cfg.weights)


def _step_of(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


@contextmanager
def _ledger(run_dir: Path, *, tdp_w_per_core: float) -> Iterator[Ledger]:
    """Open an account of this process alone: others may evaluate, and training may go on."""
    folder = run_dir / "ledger"
    folder.mkdir(exist_ok=True)
    number = 0
    while True:
        path = folder / f"evaluate-{number:04d}.jsonl"
        try:
            path.touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    meters = open_meters(tdp_w_per_core=tdp_w_per_core)
    with Ledger(path, stage="evaluate", attempt=number, meters=meters) as ledger:
        yield ledger


def _print_scores(evaluation: dict[str, Any]) -> None:
    columns = ("value", "chance", "reconstructed", "real")
    title = f"After {evaluation['images_seen']:,} training images"
    table = Table("score", "this run", "chance", "rebuilt", "real", "of", title=title, box=SIMPLE)
    table.columns[1].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, facts in evaluation["scores"].items():
        cells = [_cell(name, facts, column) for column in columns]
        table.add_row(name.removesuffix("_frac").replace("_", " "), *cells, str(facts["count"]))
    Console().print(table)


def _cell(name: str, facts: dict[str, float], column: str) -> str:
    if column not in facts:
        return "-"
    scale, form = (100, "{:.0f}") if name.endswith("_frac") else (1, "{:.4g}")
    text = form.format(scale * facts[column]) + (" %" if scale == 100 else "")
    if column == "value" and "low" in facts:  # the other intervals are in evaluation.json
        text += f" ({form.format(scale * facts['low'])}-{form.format(scale * facts['high'])})"
    return text
