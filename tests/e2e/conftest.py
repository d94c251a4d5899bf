"""One small encoded dataset, made by the commands themselves, for all end-to-end tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_source import free_port


def kiln(*words: str, timeout_s: float = 300, code: int = 0) -> str:
    """Run a command as a user would and return all that it said."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, f"kiln {' '.join(words)} gave {done.returncode}:\n{said}"
    return said


@pytest.fixture(scope="session")
def encoded(tmp_path_factory) -> Path:
    """A published dataset of painted scenes with latents and text states."""
    root = tmp_path_factory.mktemp("encoded")
    small = ["num_pictures=48", "max_side_px=128", f"port={free_port()}"]
    kiln("source", "kind=scenes", f"out={root}/source", *small)
    server = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "serve", f"source={root}/source"]
    )
    try:
        kiln(
            "prepare",
            f"rows={root}/source/rows.parquet",
            f"dataset={root}/dataset",
            "image_side_px=64",
            "min_image_side_px=16",
            "resize_mode=center_crop",
            "shard_rows=20",
            "download.allow_hosts=[127.0.0.1]",
            "download.timeout_s=3",
            "wandb=off",
        )
    finally:
        server.terminate()
        server.wait()
    kiln("encode", f"dataset={root}/dataset", "wandb=off")
    return root / "dataset"
