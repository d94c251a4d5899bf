"""Small published datasets with chosen duplicates, made without a download."""

import cv2
import numpy as np

from data_prep.perceptual import phash
from data_prep.publish import make_sample
from data_prep.rows import Row, row_key
from tests.tiny_dataset import publish


def pixels(seed, *, side_px=96):
    """A smooth random picture; others have hashes far away."""
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(rough, (side_px, side_px), interpolation=cv2.INTER_CUBIC)


def sample(seed, caption="a picture", *, quality=95, side_px=96, url=None, flat=False):
    """A sample of picture number `seed`; equal arguments give equal bytes, but for the caption."""
    picture = np.full((64, 64, 3), seed, np.uint8) if flat else pixels(seed)
    picture = cv2.resize(picture, (side_px, side_px), interpolation=cv2.INTER_AREA)
    content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    url = url or f"https://example.com/{seed}-{quality}-{side_px}.jpg"
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    facts = {
        "width": side_px,
        "height": side_px,
        "original_width": side_px,
        "original_height": side_px,
        "source_sha256": f"{seed:064x}",
        "phash": phash(decoded),
    }
    return make_sample(Row(row_key(url, caption), url, caption, {}), content, facts, "jpg")


def dataset_of(folder, *shards):
    """Publish lists of samples as shards."""
    return publish(folder, [list(shard) for shard in shards])
