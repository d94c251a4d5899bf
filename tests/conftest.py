"""Fixtures for all tests."""

import os
import subprocess

import pytest
from hypothesis import settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("kiln", deadline=None)
settings.load_profile("kiln")


def skip_unless_ci(reason: str) -> None:
    """Skip a test that this machine cannot run; in CI, where everything can be had, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must be able to")
    pytest.skip(reason)


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder on a file system of 2 MB."""
    folder = tmp_path / "tiny_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        skip_unless_ci("a tiny tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
