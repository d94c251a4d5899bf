"""Write the story of a run as one self-contained HTML file."""

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.command import run_command
from trainer.config_tools import ReportConfig
from trainer.data.manifest import load_manifest
from trainer.errors import BadInput
from trainer.observe.report_page import render
from trainer.observe.story import DatasetFacts, read_config, read_story
from trainer.place import place
from trainer.run_account import run_account

log = logging.getLogger(__name__)

_PACKAGES = ("kiln", "torch", "deepspeed", "diffusers", "transformers", "img2dataset", "numpy")


def main(argv: Sequence[str]) -> int:
    """`kiln report run=RUN_DIR`."""
    return run_command(write_report, ReportConfig, "report", argv)


def write_report(cfg: ReportConfig) -> int:
    """Write the page and say where it is."""
    run_dir = Path(cfg.run)
    dataset_dir = _dataset_dir(cfg)
    story = read_story(
        run_dir,
        ledger=run_account(run_dir, dataset_dir),
        dataset=None if dataset_dir is None else dataset_facts(dataset_dir),
        versions=_versions(),
    )
    page = Path(cfg.output) if cfg.output else run_dir / "report.html"
    partial = page.with_name(f"{page.name}.partial")
    partial.write_text(render(story), encoding="utf-8")
    partial.replace(page)
    log.info("report: %s", page)
    return 0


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


def _dataset_dir(cfg: ReportConfig) -> Path | None:
    named = cfg.dataset or read_config(Path(cfg.run)).get("data", {}).get("dataset")
    return place(named) if named else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
