import pytest

from data_prep.serve import serving
from tests.tiny_source import make_source


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A tiny painted source."""
    out = tmp_path_factory.mktemp("source")
    make_source(out)
    return out


@pytest.fixture(scope="session")
def served(source):
    """The same, being served; gives its folder."""
    with serving(source):
        yield source
