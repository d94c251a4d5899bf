"""The words of a pipeline in small, and what is done to its datasets."""

from pathlib import Path

from data_prep import sources
from data_prep.config import SourceConfig
from tests.tiny import SMALL_NETWORK
from tests.tiny_source import free_port
from trainer.frozen import compose

NETWORK = (*SMALL_NETWORK, "total_images=16")
EVALUATION = (
    "num_captions=2",
    "num_unseen_pairs=0",
    "num_loss_pairs=2",
    "num_loss_times=1",
    "sampling.num_steps=1",
    "features=none",
    "num_reconstructions=0",
)
DOWNLOAD = (
    "shard_rows=4",
    "image_side_px=64",
    "min_image_side_px=16",
    "resize_mode=center_crop",
    "download.allow_hosts=[127.0.0.1]",
    "download.timeout_s=2",
    "wandb=off",
)


def make_source(out: Path, num_pictures: int, *more: str) -> Path:
    """Paint pictures without faults, but for those that are given."""
    faults = [f"faults.{kind}_frac=0" for kind in ("slow", "truncated", "cut", "not_an_image")]
    words = [f"out={out}", f"num_pictures={num_pictures}", "max_side_px=96", "processes=1"]
    words += ["kind=scenes", f"port={free_port()}", *faults, *more]
    assert sources.run(compose(SourceConfig, "source", words)) == 0
    return out


def words(source: Path, run: Path, *more: str) -> list[str]:
    """Give the words of `kiln pipeline` for a tiny network on such a source."""
    told = {
        "prepare": DOWNLOAD,
        "encode": ("wandb=off", "probe_s=0"),
        "train": NETWORK,
        "evaluate": EVALUATION,
    }
    return [
        run.name,
        f"run={run}",
        f"rows={source}/rows.parquet",
        *(f"{name}.words=[{','.join(map(repr, each))}]" for name, each in told.items()),
        "prepare.cpus=1",
        *more,
    ]


def flip(path: Path) -> Path:
    """Change a byte in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


def tars(dataset: Path) -> dict[str, tuple[int, bytes]]:
    """When each tar of a dataset and its encodings was made, and what is in it."""
    return {
        path.relative_to(dataset).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(dataset.rglob("*.tar"))
    }


def made_anew(
    before: dict[str, tuple[int, bytes]], after: dict[str, tuple[int, bytes]]
) -> set[str]:
    """Name the tars that were written since."""
    return {name for name in before if after[name][0] != before[name][0]}


def contents(found: dict[str, tuple[int, bytes]]) -> dict[str, bytes]:
    """Give what is in each tar."""
    return {name: content for name, (_, content) in found.items()}
