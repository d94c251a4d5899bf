"""Tars as others write them."""

import io
import json
import tarfile

from tests.tiny_dataset import sample


def picture(number, **options):
    """The bytes of a small PNG."""
    return sample(number, **options).members["png"]


def write_tar(path, members, *, format=tarfile.GNU_FORMAT):
    """Write (name, content) in the given order; a name that ends with a slash is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size, info.mtime, info.uname = len(content), 1700000000, "someone"
                tar.addfile(info, io.BytesIO(content))
    return path


def img2dataset_tar(path, number, count, *, body=None):
    """A shard in the layout of img2dataset's webdataset output: 000170003.jpg, .json, .txt."""
    members = []
    for row in range(count):
        key, text = f"{number:05d}{row:04d}", f"picture {number}-{row}"
        facts = {"caption": text, "key": key, "status": "success", "original_width": 640}
        content = picture(100 * number + row) if body is None else body(row)
        members += [
            (f"{key}.jpg", content),
            (f"{key}.json", json.dumps(facts).encode()),
            (f"{key}.txt", text.encode()),
        ]
    return write_tar(path, members)
