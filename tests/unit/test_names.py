"""The flat top-level names are taken on package indexes: make sure they are ours."""

from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["trainer", "slurm", "data_prep", "conf"])
def test_top_level_names_are_ours(name):
    spec = find_spec(name)
    assert spec is not None, f"{name}: not importable; run `pip install -e .`"
    assert spec.origin is not None, f"{name}: a namespace package; its __init__.py is gone"
    assert Path(spec.origin).parent == ROOT / name, f"{name} comes from {spec.origin}"
