"""Features of real pictures are computed once, and whatever happens to the file is survived."""

import logging

import numpy as np
import pytest

from trainer.errors import BadInput
from trainer.quality.reference import reference_features


class Means:
    """Features that need no network: the mean colour."""

    width = 3

    def __init__(self, name="means", fingerprint="0123456789abcdef"):
        self.name, self.fingerprint = name, fingerprint

    def __call__(self, pictures):
        return pictures.mean((1, 2)).astype(np.float32)


class Source:
    """Pictures in batches of two; counts how often they are asked for."""

    def __init__(self, num_batches=3):
        self.asked, self.given, self.num_batches = 0, 0, num_batches

    def __call__(self):
        self.asked += 1
        for i in range(self.num_batches):
            self.given += 2
            yield np.random.default_rng(i).integers(0, 256, (2, 4, 4, 3), np.uint8)


def reference(folder, source, *, features=None, identity="photos", count=5):
    return reference_features(
        features or Means(), source, identity=identity, count=count, folder=folder
    )


def test_the_second_time_no_picture_is_needed(tmp_path):
    source = Source()
    once = reference(tmp_path / "new", source)
    again = reference(tmp_path / "new", source)
    assert source.asked == 1
    assert once.dtype == np.float32
    np.testing.assert_array_equal(once, again)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".npz"]


def test_as_many_pictures_as_asked_for_are_used_or_all(tmp_path):
    source = Source()
    every = reference(tmp_path, source, count=100)
    assert len(every) == 6
    np.testing.assert_array_equal(reference(tmp_path, source, count=3), every[:3])
    source.given = 0
    reference(tmp_path, source, count=2)
    assert source.given == 2  # no batch more than needed


@pytest.mark.parametrize(
    "change",
    [{"features": Means(fingerprint="f" * 16)}, {"identity": "others"}, {"count": 4}],
)
def test_another_network_other_pictures_and_another_count_have_another_file(tmp_path, change):
    source = Source()
    reference(tmp_path, source)
    reference(tmp_path, source, **change)
    assert source.asked == 2
    assert len(list(tmp_path.iterdir())) == 2


def damaged(content):
    yield content[: len(content) // 2]
    yield b""
    yield b"not a zip"
    yield content[:-60] + bytes(60)
    middle = len(content) // 2
    yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_file_is_computed_anew_with_a_warning(tmp_path, caplog):
    source = Source(num_batches=100)
    once = reference(tmp_path, source, count=200)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for number, wrong in enumerate(damaged(content), 1):
        file.write_bytes(wrong)
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(reference(tmp_path, source, count=200), once)
        assert len(caplog.records) == number
        assert "is damaged" in caplog.records[-1].message
        assert file.read_bytes() == content


def test_a_file_of_something_else_is_computed_anew(tmp_path, caplog):
    source = Source()
    once = reference(tmp_path, source)
    (file,) = tmp_path.iterdir()
    pickled = np.array([{"a": 1}], dtype=object)
    for wrong in ({"rows": np.zeros((5, 4), np.float32)}, {"x": once}, {"rows": pickled}):
        np.savez(file, **wrong)
        np.testing.assert_array_equal(reference(tmp_path, source), once)
    assert len(caplog.records) == 3


def test_a_failure_leaves_no_file(tmp_path):
    def broken():
        yield np.zeros((2, 4, 4, 3), np.uint8)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        reference(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_no_pictures_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'photos' is empty"):
        reference(tmp_path, Source(num_batches=0))
