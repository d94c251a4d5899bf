"""Write the story of a run as one self-contained HTML file."""

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from slurm.attempts import read_attempts
from trainer.command import run_command
from trainer.config_accounts import stated
from trainer.config_tools import ReportConfig
from trainer.data.manifest import load_manifest
from trainer.errors import BadInput
from trainer.observe.carbon import rates
from trainer.observe.figure_words import HEAD, figure_rows
from trainer.observe.figures import Figures, derive, work_on
from trainer.observe.report_compare import Told, render_several
from trainer.observe.report_data import Data, page_data
from trainer.observe.report_numbers import images_seen
from trainer.observe.report_page import render
from trainer.observe.report_serve import PageServer, state_of
from trainer.observe.story import DatasetFacts, Story, read_config, read_story
from trainer.place import place
from trainer.run_account import run_account

log = logging.getLogger(__name__)

_PACKAGES = ("kiln", "torch", "deepspeed", "diffusers", "transformers", "img2dataset", "numpy")


def main(argv: Sequence[str]) -> int:
    """`kiln report run=RUN_DIR`."""
    words = ["serve=true" if word == "--serve" else word for word in argv]
    return run_command(run, ReportConfig, "report", words)


def run(cfg: ReportConfig) -> int:
    """Write the page, or serve it."""
    return serve_report(cfg) if cfg.serve else write_report(cfg)


def serve_report(cfg: ReportConfig) -> int:
    """Serve the page until interrupted."""
    tell(cfg)
    with report_server(cfg) as server:
        try:
            log.info("the report is at %s; Ctrl-C stops it", server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("stopped")
    return 0


def report_server(cfg: ReportConfig) -> PageServer:
    """Make a server that reads the runs anew for each answer."""

    def page() -> str:
        told = tell(cfg)
        return page_of(told, state_of([story for story, _ in told]))

    def data() -> Data:
        stories = [story for story, _ in tell(cfg)]
        return page_data(stories, state_of(stories))

    return PageServer(cfg.port, page, data)


def write_report(cfg: ReportConfig) -> int:
    """Write the page and say where it is."""
    told = tell(cfg)
    name = "report.html" if len(told) == 1 else "comparison.html"
    page = Path(cfg.output) if cfg.output else told[0][0].run_dir / name
    partial = page.with_name(f"{page.name}.partial")
    partial.write_text(page_of(told), encoding="utf-8")
    partial.replace(page)
    for story, figures in told:
        _print_figures(story, figures)
    log.info("report: %s", page)
    return 0


def _print_figures(story: Story, figures: Figures) -> None:
    """Show what the page tells of energy, carbon and cost; what that assumes is there."""
    if not figures.by_key:
        return
    table = Table(*HEAD[:3], title=f"What {story.name} took", box=SIMPLE)
    table.columns[1].justify = "right"
    for name, value, known, _ in figure_rows(figures.by_key.values()):
        table.add_row(name, value, known)
    Console().print(table)


def tell(cfg: ReportConfig) -> list[Told]:
    """Read the runs, and derive the figures of their accounts.

    Raises:
        BadInput: A folder is no run, or a file is damaged.
    """
    runs = [cfg.run] if isinstance(cfg.run, str) else cfg.run
    if not runs:
        raise BadInput("run=[] names no run. Give run= a folder, or several as run=[A,B].")
    told = []
    for run_dir in map(Path, runs):
        dataset_dir = _dataset_dir(cfg, run_dir)
        story = read_story(
            run_dir,
            ledger=run_account(run_dir, dataset_dir),
            dataset=None if dataset_dir is None else dataset_facts(dataset_dir),
            versions=_versions(),
            endings=_endings(run_dir),
        )
        told.append((story, _figures(cfg, story)))
    return told


def page_of(told: Sequence[Told], live_state: str | None = None) -> str:
    """Return the page of one run, or of several."""
    if len(told) > 1:
        return render_several(told, live_state=live_state)
    ((story, figures),) = told
    return render(story, figures, live_state=live_state)


def _figures(cfg: ReportConfig, story: Story) -> Figures:
    assumed = stated(story.config.get("accounts", {}), cfg.accounts)
    carbon, price = rates(assumed)
    work = work_on(
        story.config.get("cluster", {}),
        images=images_seen(story),
        kept_samples=story.dataset.rows_kept if story.dataset else 0,
    )
    return derive(story.ledger, work, assumed, carbon=carbon, price=price)


def dataset_facts(dataset_dir: Path) -> DatasetFacts | None:
    """Read what the report says of a dataset; None, with a warning, when it cannot be read."""
    try:
        manifest = load_manifest(dataset_dir)
    except BadInput as error:
        log.warning("the report goes without the dataset: %s", error)
        return None
    return DatasetFacts(
        fingerprint=manifest.fingerprint,
        rows_in=manifest.rows_in,
        rows_kept=manifest.rows_kept,
        rejected=manifest.rejected,
        num_shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        provenance=manifest.provenance,
    )


def _dataset_dir(cfg: ReportConfig, run_dir: Path) -> Path | None:
    named = cfg.dataset or read_config(run_dir).get("data", {}).get("dataset")
    return place(named) if named else None


def _endings(run_dir: Path) -> dict[int, str]:
    return {each.number: each.end.cause for each in read_attempts(run_dir) if each.end}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
