"""Units go through a real Ray and a real Spark as they go through our own processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.prepare import run
from data_prep.serve import serving
from tests.tiny_source import make_source, prepare_cfg, prepare_overrides, tree_hashes
from trainer.errors import BadInput

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny painted source, being served; gives its folder."""
    out = tmp_path_factory.mktemp("source")
    make_source(out)
    with serving(out):
        yield out


@pytest.fixture(scope="module", params=["ray", "pyspark"])
def package(request, tmp_path_factory):
    """A folder with one of the two; both are too large to be installed for all tests."""
    if request.param == "pyspark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed (Debian: default-jre-headless)")
    folder = tmp_path_factory.mktemp(request.param)
    words = ["install", "--quiet", "--target", str(folder), "--constraint", "constraints.txt"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, request.param],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {request.param}: {done.stderr.strip()[-200:]}")
    return request.param, folder


def prepare(source, dataset, package, *more):
    name, folder = package
    words = prepare_overrides(source, dataset, f"distributor={name}", "processes=2", *more)
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli", "prepare", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{folder}",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    )


def test_the_dataset_is_the_same(served, package, tmp_path):
    done = prepare(served, tmp_path / "distributed", package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(prepare_cfg(served, tmp_path / "here")) == 0
    assert tree_hashes(tmp_path / "distributed") == tree_hashes(tmp_path / "here")


def test_what_went_wrong_on_a_worker_is_said_here(served, package, tmp_path):
    scratch = tmp_path / "dataset" / ".work"
    scratch.mkdir(parents=True)
    (scratch / "00000").write_text("a file where a folder has to be")
    done = prepare(served, tmp_path / "dataset", package)
    assert done.returncode == 1
    assert "unit 00000 failed on" in done.stderr
    assert "FileExistsError" in done.stderr


def test_a_network_that_is_down_stops_it(source_that_times_out, package, tmp_path):
    done = prepare(source_that_times_out, tmp_path / "dataset", package)
    assert done.returncode == 1
    assert "failed alike" in done.stderr
    assert not list((tmp_path / "dataset").glob("units/*"))


@pytest.fixture(scope="module")
def source_that_times_out(tmp_path_factory):
    """A source whose server answers no request in time."""
    out = tmp_path_factory.mktemp("slow")
    kinds = ("missing", "truncated", "cut", "not_an_image", "opt_out", "duplicate", "redirect")
    no_other = [f"faults.{kind}_frac=0" for kind in kinds]
    make_source(out, "faults.slow_frac=1", "num_pictures=25", *no_other)
    with serving(out):
        yield out


@pytest.mark.parametrize("kind", ["ray", "pyspark"])
def test_a_package_that_is_not_there_is_named(served, kind, tmp_path):
    with pytest.raises(BadInput, match=f"pip install {kind}"):
        run(prepare_cfg(served, tmp_path / "dataset", f"distributor={kind}"))
