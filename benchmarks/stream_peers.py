"""Pipelines of other libraries, each at its best settings, in a process of their own.

Runs in the environment of `benchmarks/peers.txt`, because some of these libraries need older
versions than Kiln. Each line of standard input is a question, each line of output an answer.
"""

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from trainer.data.decode import decode_square

BATCH, SIDE_PX = 32, 256
SHARD_SAMPLES = 128
_SHUFFLE_SAMPLES = 1000
_REQUESTS = 16
_MEMBERS = {"pictures": ("jpg",), "latents": ("latent.npy", "text.npy")}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is loaded, from where, and how."""

    kind: str
    """'pictures' or 'latents'."""
    decoder: str
    """'equal' is Kiln's, 'own' is Pillow, which all of these libraries use or document."""
    where: str
    """Folder or s3:// URL, in the library's own format."""
    cache: str
    """Folder for what comes from a URL; empty at first."""
    workers: int
    """Processes of the DataLoader; 0 is none."""

    @property
    def remote(self) -> bool:
        """Whether it comes from a URL."""
        return self.where.startswith("s3://")


def pillow_square(content: bytes) -> NDArray[np.uint8]:
    """Decode, resize and crop as torchvision's `Resize` and `CenterCrop` do on Pillow pictures."""
    with Image.open(BytesIO(content)) as picture:
        scale = SIDE_PX / min(picture.size)
        width, height = (max(SIDE_PX, round(side * scale)) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - SIDE_PX) // 2, (height - SIDE_PX) // 2
    return np.asarray(resized.crop((left, top, left + SIDE_PX, top + SIDE_PX)))


def kiln_square(content: bytes) -> NDArray[np.uint8]:
    """Decode, resize and crop with Kiln's function."""
    return decode_square(bytes(content), SIDE_PX, name="a picture")


DECODERS = {"own": pillow_square, "equal": kiln_square}


def collate(job: Job) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    """Make samples a batch in the worker, in the small types that go between processes fastest."""
    decode = DECODERS[job.decoder]

    def pictures(samples: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(np.stack([decode(content) for (content,) in samples])),)

    def latents(samples: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        texts = [torch.as_tensor(text) for _, text in samples]
        return (
            torch.from_numpy(np.stack([np.asarray(latent) for latent, _ in samples])),
            torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
            torch.tensor([len(text) for text in texts]),
        )

    return {"pictures": pictures, "latents": latents}[job.kind]


def finish(batch: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Make of a batch in the main process what a training step takes: fp32 as Kiln's."""
    if len(batch) == 1:
        return (batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1.0,)
    moments, text, lengths = batch
    mask = torch.arange(text.shape[1])[None] < lengths[:, None]
    return moments[:, 0].float(), moments[:, 1].float(), text.float(), mask


def _options(job: Job) -> dict[str, Any]:
    return {"num_workers": job.workers, "persistent_workers": job.workers > 0}


def _read_sample(files: Path, key: str, kind: str) -> tuple[Any, ...]:
    paths = [files / f"{key}.{member}" for member in _MEMBERS[kind]]
    return tuple(path.read_bytes() if kind == "pictures" else np.load(path) for path in paths)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _keys(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


def _bucket(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.netloc, parts.path.strip("/")


def _list_bucket(url: str) -> Iterator[str]:
    import boto3

    bucket, prefix = _bucket(url)
    pages = boto3.client("s3").get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        yield from (found["Key"] for found in page["Contents"])


class Files(Dataset[tuple[Any, ...]]):
    """Files `KEY.MEMBER` of a folder, or of a URL: then fetched many at a time, and kept."""

    def __init__(self, job: Job) -> None:
        """List the files."""
        self._job, self._client = job, None
        names = _list_bucket(job.where) if job.remote else _names(Path(job.where))
        self._local = Path(job.cache if job.remote else job.where)
        self._keys = _keys(Path(name).name for name in names)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._keys)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        """Read a sample."""
        return _read_sample(self._local, self._keys[number], self._job.kind)

    def __getitems__(self, numbers: list[int]) -> list[tuple[Any, ...]]:
        """Read the samples of a batch."""
        if self._job.remote:
            self._fetch([self._keys[number] for number in numbers])
        return [self[number] for number in numbers]

    def _fetch(self, keys: list[str]) -> None:
        import boto3
        from botocore.config import Config

        if self._client is None:
            self._client = boto3.client("s3", config=Config(max_pool_connections=_REQUESTS))
        client: Any = self._client
        bucket, prefix = _bucket(self._job.where)
        names = [f"{key}.{member}" for key in keys for member in _MEMBERS[self._job.kind]]

        def get(name: str) -> None:
            content = client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
            (self._local / f"{name}.new").write_bytes(content)
            (self._local / f"{name}.new").rename(self._local / name)

        missing = [name for name in names if not (self._local / name).exists()]
        with ThreadPoolExecutor(_REQUESTS) as threads:
            list(threads.map(get, missing))


def open_files(job: Job) -> Iterable[Any]:
    """Load files with torch's own tools."""
    return DataLoader(Files(job), BATCH, shuffle=True, collate_fn=collate(job), **_options(job))


def open_webdataset(job: Job) -> Iterable[Any]:
    """Load Kiln's tars; from a URL with webdataset's own curl, and its cache of shards."""
    import boto3
    import webdataset as wds

    options: dict[str, Any] = {"shardshuffle": 100}
    if job.remote:
        client = boto3.client("s3")
        bucket, _ = _bucket(job.where)
        names = sorted(name for name in _list_bucket(job.where) if name.endswith(".tar"))
        urls = [
            client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": name})
            for name in names
        ]
        options["cache_dir"] = job.cache
    else:
        urls = sorted(str(path) for path in Path(job.where).glob("*.tar"))
    samples = wds.WebDataset(urls, empty_check=False, **options).shuffle(_SHUFFLE_SAMPLES)
    if job.kind == "latents":
        samples = samples.decode()
    batches = samples.to_tuple(*_MEMBERS[job.kind]).batched(BATCH, collation_fn=collate(job))
    loader: Iterable[Any] = wds.WebLoader(batches, batch_size=None, **_options(job))
    return loader


def _streaming() -> Any:
    # Its vision part needs torchvision, whose wheels fit one build of torch only.
    sys.modules["streaming.vision"] = ModuleType("streaming.vision")
    import streaming

    return streaming


_MDS_COLUMNS = {
    "pictures": {"jpg": "bytes"},
    "latents": {"latent.npy": "ndarray:float16:2,4,32,32", "text.npy": "ndarray:float16"},
}


def convert_mds(files: Path, out: Path, kind: str) -> None:
    """Write MDS with the types that it reads fastest: of known type, and shape where it is one."""
    keys = _keys(_names(files))
    sizes = [(files / name).stat().st_size for name in _names(files)]
    limit = sum(sizes) // (len(keys) // SHARD_SAMPLES) + 1
    columns = _MDS_COLUMNS[kind]
    with _streaming().MDSWriter(out=str(out), columns=columns, size_limit=limit) as writer:
        for key in keys:
            writer.write(dict(zip(columns, _read_sample(files, key, kind), strict=True)))


def open_mds(job: Job) -> Iterable[Any]:
    """Load MDS shards."""
    streaming = _streaming()
    where = {"remote": job.where, "local": job.cache} if job.remote else {"local": job.where}
    data = streaming.StreamingDataset(**where, shuffle=True, batch_size=BATCH)
    batch = collate(job)

    def of_dicts(samples: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
        return batch([tuple(sample[name] for name in _MEMBERS[job.kind]) for sample in samples])

    return DataLoader(data, BATCH, collate_fn=of_dicts, **_options(job))


def convert_litdata(files: Path, out: Path, kind: str) -> None:
    """Write litdata's optimized chunks, with bytes of pictures and tensors of latents."""
    import litdata

    writer = litdata.streaming.Cache(str(out), chunk_size=SHARD_SAMPLES)
    for number, key in enumerate(_keys(_names(files))):
        sample = _read_sample(files, key, kind)
        writer[number] = [
            torch.from_numpy(member) if kind == "latents" else member for member in sample
        ]
    writer.done()
    writer.merge()


def open_litdata(job: Job) -> Iterable[Any]:
    """Load litdata's chunks."""
    import litdata

    where: dict[str, Any] = {"input_dir": job.where}
    if job.remote:
        # Its faster client refuses a server without TLS, such as one on loopback.
        litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        where["cache_dir"] = job.cache
    data = litdata.StreamingDataset(**where, shuffle=True, drop_last=False)
    loader: Iterable[Any] = litdata.StreamingDataLoader(
        data, batch_size=BATCH, collate_fn=collate(job), **_options(job)
    )
    return loader


Convert = Callable[[Path, Path, str], None]
PEERS: dict[str, tuple[str, Convert | None, Callable[[Job], Iterable[Any]]]] = {
    "webdataset": ("webdataset", None, open_webdataset),
    "mosaicml-streaming": ("mosaicml-streaming", convert_mds, open_mds),
    "litdata": ("litdata", convert_litdata, open_litdata),
    "Dataset of files": ("torch", None, open_files),
}
"""System -> (package, how to make its format of files, how to load it)."""


def run_epoch(loader: Iterable[Any]) -> int:
    """Run through an epoch; give its samples."""
    return sum(len(finish(batch)[0]) for batch in loader)


def serve(system: str, job: Job, pipe: Connection) -> None:
    """Run as many epochs of one job as are asked for; give the samples and seconds of each."""
    loader = None
    for epochs in iter(pipe.recv, 0):
        found = []
        for _ in range(epochs):
            started_s = time.perf_counter()
            # Opening counts: it is what the first epoch waits for.
            loader = PEERS[system][2](job) if loader is None else loader
            found.append((run_epoch(loader), time.perf_counter() - started_s))
        pipe.send(found)


def _shared_memory() -> set[str]:
    """Name what mosaicml-streaming keeps in shared memory: a number and a word."""
    return {path.name for path in Path("/dev/shm").glob("[0-9]" * 6 + "_*")}


class Jobs:
    """Every job in a process of its own, so that none finds what another one left behind."""

    def __init__(self, system: str) -> None:
        """Import what they need before they part."""
        import boto3  # noqa: F401

        self._system = system
        self._context = multiprocessing.get_context("fork")
        self._running: dict[Job, tuple[Any, Connection, set[str]]] = {}
        if system == "mosaicml-streaming":
            _streaming().base.util.clean_stale_shared_memory()
        elif system != "Dataset of files":
            import_module(system)

    def run(self, job: Job, epochs: int) -> Any:
        """Run epochs of a job, which stays open; None if its process died."""
        before = _shared_memory()
        if job not in self._running:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(self._system, job, theirs))
            process.start()
            theirs.close()
            self._running[job] = process, ours, set()
        _, pipe, prefixes = self._running[job]
        pipe.send(epochs)
        try:
            found = pipe.recv()
        except EOFError:
            found = None
        if not prefixes:
            prefixes.update(name[:7] for name in _shared_memory() - before)
        if found is None:
            self.close(job)
        return found

    def close(self, job: Job) -> None:
        """End a job."""
        process, pipe, prefixes = self._running.pop(job)
        with suppress(BrokenPipeError):
            pipe.send(0)
        process.join(10)
        process.kill()
        # The next one with the same number would believe what it finds, and read half a shard.
        for name in _shared_memory():
            if name[:7] in prefixes:
                Path("/dev/shm", name).unlink(missing_ok=True)

    def close_all(self) -> None:
        """End all jobs."""
        for job in list(self._running):
            self.close(job)


def answer(system: str, jobs: Jobs, question: dict[str, Any]) -> Any:
    """Do what one line asks: `convert` files, run `epochs` of a job, or `close` it."""
    if question["do"] == "convert":
        convert = PEERS[system][1]
        assert convert is not None
        context = multiprocessing.get_context("fork")
        words = (Path(question["files"]), Path(question["out"]), question["kind"])
        process = context.Process(target=convert, args=words)
        process.start()
        process.join()
        return process.exitcode
    job = Job(**question["job"])
    return jobs.close(job) if question["do"] == "close" else jobs.run(job, question["epochs"])


def main(system: str) -> None:
    """Answer until the input ends; nothing but answers goes to standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    package, jobs = PEERS[system][0], Jobs(system)
    print(json.dumps({package: version(package)}), file=answers)
    try:
        for line in sys.stdin:
            print(json.dumps(answer(system, jobs, json.loads(line))), file=answers)
    finally:
        jobs.close_all()


if __name__ == "__main__":
    main(sys.argv[1])
