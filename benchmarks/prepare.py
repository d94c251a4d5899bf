"""Is a guarded, checked and accounted download as fast as img2dataset's, and in how much memory?"""

import asyncio
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Case, claim_at_least, claim_at_most, measure, write_result

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
HOST = "127.0.0.1"
ROWS = int(os.environ.get("KILN_BENCH_ROWS", "4000"))
REPETITIONS = int(os.environ.get("KILN_BENCH_REPETITIONS", "3"))
PROCESSES = (1, 2, 4)
SIDE_PX, QUALITY, THREADS, TIMEOUT_S, SHARDS = 256, 95, 32, 10, 4
SOURCES = (10_000, 1_000_000)
"""Rows of the sources for the peak memory; of each as many are downloaded."""
UNIT_ROWS, UNITS = 500, 4
_THEIRS = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"


def painted(seed: int) -> bytes:
    """Make a JPEG of 640 x 480 px that costs what a photo costs: noise at every scale."""
    dice = np.random.default_rng(seed)
    pixels = np.zeros((480, 640, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = dice.normal(0, 1 / cells, (cells, cells, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    low, high = float(pixels.min()), float(pixels.max())
    grey = ((pixels - low) * (255 / (high - low))).astype(np.uint8)
    return cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def pictures() -> list[bytes]:
    """Give painted pictures, and real photos where they are."""
    return [painted(seed) for seed in range(64)] + [
        path.read_bytes() for path in sorted(PHOTOS.rglob("*.jpg"))[:64]
    ]


def serve(tell: Connection) -> None:
    """Answer `GET /NUMBER.jpg` from memory, for ever."""
    bodies = [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
        for body in pictures()
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                path = request.split(b" ", 2)[1]
                if path.endswith(b".jpg"):
                    writer.write(bodies[int(path[1:-4]) % len(bodies)])
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                if b"connection: close" in request.lower():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, HOST, 0, backlog=1024)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def serving() -> Iterator[int]:
    """Serve the pictures from a process of their own; give the port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def write_rows(folder: Path, port: int, num_rows: int) -> Path:
    """Write a source; give its parquet."""
    path = folder / f"{num_rows}.parquet"
    urls = [f"http://{HOST}:{port}/{number}.jpg" for number in range(num_rows)]
    texts = [f"the caption of picture {number}, in a few words" for number in range(num_rows)]
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), path)
    return path


def kiln_command(
    rows: Path, out: Path, *, processes: int, shard_rows: int, parts: int = 1
) -> list[str]:
    """Give the command of Kiln with all that it checks by default."""
    words = {
        "rows": rows,
        "dataset": out,
        "shard_rows": shard_rows,
        "image_side_px": SIDE_PX,
        "resize_mode": "keep_ratio",
        "encode_quality": QUALITY,
        "processes": processes,
        "threads": THREADS,
        "parts": parts,
        "wandb": "off",
        "download.timeout_s": TIMEOUT_S,
        "download.allow_hosts": f"[{HOST}]",
    }
    command = [sys.executable, "-m", "trainer.cli", "prepare"]
    return command + [f"{name}={value}" for name, value in words.items()]


def img2dataset_command(rows: Path, out: Path, *, processes: int, shard_rows: int) -> list[str]:
    """Give the command of img2dataset with the same settings."""
    words = {
        "url_list": str(rows),
        "input_format": "parquet",
        "url_col": "URL",
        "caption_col": "TEXT",
        "output_format": "webdataset",
        "output_folder": str(out),
        "number_sample_per_shard": shard_rows,
        "image_size": SIDE_PX,
        "resize_mode": "keep_ratio",
        "encode_quality": QUALITY,
        "min_image_size": 32,
        "max_aspect_ratio": 4,
        "processes_count": processes,
        "thread_count": THREADS,
        "timeout": TIMEOUT_S,
        "retries": 0,
        "extract_exif": False,
        "enable_wandb": False,
    }
    return [sys.executable, "-c", _THEIRS, json.dumps(words)]


def kept_by_kiln(out: Path) -> int:
    """Count what Kiln published."""
    return sum(json.loads(path.read_text())["shard"]["count"] for path in out.glob("units/*.json"))


def kept_by_img2dataset(out: Path) -> int:
    """Count what img2dataset wrote."""
    return sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))


SYSTEMS = {
    "kiln": (kiln_command, kept_by_kiln),
    "img2dataset": (img2dataset_command, kept_by_img2dataset),
}


class Runs:
    """Runs commands, and keeps the CPU time that the last one took."""

    def __init__(self, folder: Path, port: int) -> None:
        """Make sources in `folder`."""
        self._folder = folder
        self._port = port
        self.cpu_s = 0.0

    def seconds(self, system: str, *, processes: int) -> float:
        """Run a command to its end; return its seconds."""
        make, _ = SYSTEMS[system]
        rows, out = write_rows(self._folder, self._port, ROWS), self._folder / "out"
        command = make(rows, out, processes=processes, shard_rows=ROWS // SHARDS)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_s = time.perf_counter()
        with self._running(system, command, out, num_kept=ROWS) as process:
            process.wait()
            taken_s = time.perf_counter() - started_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        return taken_s

    def peak_mib(self, *, num_rows: int) -> float:
        """Download a few units of a source of many; return the most memory of all processes."""
        rows, out = write_rows(self._folder, self._port, num_rows), self._folder / "out"
        parts = num_rows // (UNIT_ROWS * UNITS)
        command = kiln_command(rows, out, processes=2, shard_rows=UNIT_ROWS, parts=parts)
        peak = 0.0
        with self._running("kiln", command, out, num_kept=UNIT_ROWS * UNITS) as process:
            while process.poll() is None:
                peak = max(peak, _tree_mib(process.pid))
                time.sleep(0.05)
        return peak

    @contextmanager
    def _running(
        self, system: str, command: list[str], out: Path, *, num_kept: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        with (self._folder / "said").open("w+") as said:
            with subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=said, env=_environment()
            ) as process:
                yield process
            if process.returncode or SYSTEMS[system][1](out) != num_kept:
                said.seek(0)
                raise RuntimeError(f"{system} kept not all rows:\n{said.read()[-3000:]}")
        shutil.rmtree(out)


def _environment() -> dict[str, str]:
    # The same for both: no look-up of newer versions, no threads beyond those that are asked for.
    return os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}


def _tree_mib(pid: int) -> float:
    """Add up the memory of a process and its children; what they share counts once."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        command = psutil.Process(pid)
        for each in (command, *command.children(recursive=True)):
            with suppress(OSError, IndexError, psutil.Error):
                text = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="utf-8")
                total += int(text.split("\nPss:")[1].split()[0]) / 1024
    return total


def memory_case(num_rows: int) -> str:
    """Name a case."""
    return f"{UNIT_ROWS * UNITS:,} of {num_rows:,} rows, 2 processes"


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as name, serving() as port:
        runs = Runs(Path(name), port)
        cases = []
        for processes in PROCESSES:
            for system in SYSTEMS:
                what = f"{ROWS:,} pictures, {processes} process(es)"
                case = partial(Case, case=what, system=system, packages=("img2dataset",))
                run = partial(runs.seconds, system, processes=processes)
                cases.append(case(metric="whole command", unit="s", run=run))
                # Of the run just before.
                cases.append(case(metric="CPU time", unit="s", run=lambda: runs.cpu_s))
        for num_rows in SOURCES:
            case = partial(Case, case=memory_case(num_rows), system="kiln")
            run = partial(runs.peak_mib, num_rows=num_rows)
            cases.append(case(metric="peak memory", unit="MiB", run=run))
        rows = measure(cases, repetitions=REPETITIONS, warmups=0)
    value = {(row.case, row.system, row.metric): row.median for row in rows}
    claims = []
    for processes in PROCESSES:
        for metric in ("whole command", "CPU time"):
            what = f"{ROWS:,} pictures, {processes} process(es)"
            claims.append(
                claim_at_least(
                    f"{metric}, {processes} process(es): img2dataset's over Kiln's",
                    measured=value[what, "img2dataset", metric] / value[what, "kiln", metric],
                    target=1.0,
                )
            )
    few, many = (value[memory_case(num_rows), "kiln", "peak memory"] for num_rows in SOURCES)
    claims.append(
        claim_at_most(
            "Memory is flat: a hundred times the rows need as much, but for 10 %",
            measured=many / few,
            target=1.1,
        )
    )
    write_result("prepare", question=str(__doc__), rows=rows, claims=claims)


if __name__ == "__main__":
    main()
