"""Laws of what a picture says about itself."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.unit.trainer.test_sample import config, load
from trainer.labels import (
    DRAWN,
    EDITED,
    XMP,
    is_complete,
    label_of,
    png_bytes,
    publish_labelled,
    xmp_packet,
)
from trainer.runtime.rundir import complete
from trainer.runtime.weights import weights_fingerprint

HARD = "a <b>\"ring\"</b> & 'cross' ]]> größer 猫 \U0001f600\x00\x1b"
PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
SPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "x": "adobe:ns:meta/",
}


@pytest.fixture
def label(tiny_run):
    sampling = replace(config(tiny_run).sampling, negative=f"no {HARD[:-2]}")
    return {"prompt": HARD, "number": 3, "repeat": 0, **label_of(load(tiny_run), sampling)}


def texts(tmp_path, label):
    path = tmp_path / "picture.png"
    path.write_bytes(png_bytes(PIXELS, label))
    with Image.open(path) as picture:
        assert (np.asarray(picture) == PIXELS).all()
        return dict(picture.text)


def test_a_png_says_what_its_sidecar_says(tmp_path, label):
    publish_labelled(tmp_path, "x", label, {"x.png": png_bytes(PIXELS, label)})
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    said = texts(tmp_path, label)
    for key, value in label.items():
        assert found[key] == value
        if key not in {"prompt", "negative"}:
            assert said[key] == value or json.loads(said[key]) == value
    assert said["prompt"] == HARD.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")


def test_a_label_names_model_data_and_settings(tiny_run, label):
    (checkpoint,) = complete(tiny_run / "checkpoints")
    assert label["weights_sha256"] == weights_fingerprint(tiny_run, "ema", checkpoint)
    assert (label["step"], label["images_seen"]) == (8, 64)
    assert len(label["dataset_fingerprint"]) >= 16
    assert (label["solver"], label["steps"], label["guidance"]) == ("ddim", 2, 4.0)
    assert "Kiln" in label["software"]


def test_xmp_is_xml_with_the_iptc_source_type_whatever_the_prompt(tmp_path, label):
    packet = texts(tmp_path, label)[XMP]
    tree = ElementTree.fromstring(packet)
    assert tree.tag == "{adobe:ns:meta/}xmpmeta"
    assert tree.find(".//Iptc4xmpExt:DigitalSourceType", SPACES).text == DRAWN
    told = tree.find(".//dc:description/rdf:Alt/rdf:li", SPACES).text
    assert told == HARD.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    information = tree.find(".//Iptc4xmpExt:AIPromptInformation", SPACES).text
    assert information.startswith(told)
    assert label["negative"] in information


def test_a_picture_made_from_a_picture_is_a_composite(tiny_run):
    edited = label_of(load(tiny_run), config(tiny_run).sampling, edited=True)
    assert EDITED in xmp_packet(edited)


def test_what_only_changes_speed_is_not_in_the_label(tiny_run):
    sampler = load(tiny_run)
    few = config(tiny_run, "sampling.batch_images=1", "sampling.guidance_split=true").sampling
    assert label_of(sampler, few) == label_of(sampler, config(tiny_run).sampling)


def test_files_are_complete_until_they_or_the_request_change(tmp_path, label):
    data = png_bytes(PIXELS, label)
    publish_labelled(tmp_path, "x", label, {"x.png": data})
    assert is_complete(tmp_path, "x", label)
    assert is_complete(tmp_path, "x", {**label, "software": "another version"})
    assert not is_complete(tmp_path, "x", {**label, "seed": 1})
    (tmp_path / "x.png").write_bytes(data[:-1])
    assert not is_complete(tmp_path, "x", label)
    (tmp_path / "x.png").unlink()
    assert not is_complete(tmp_path, "x", label)
    (tmp_path / "x.json").write_text("{")
    assert not is_complete(tmp_path, "x", label)
    assert not is_complete(tmp_path, "y", label)
