"""How many pictures and latents per second does the stream give, beside other libraries'?"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Claim, Row, claim_at_least, measure, write_result
from benchmarks.stream_data import ENCODING, publish_latents, publish_pictures
from benchmarks.stream_kiln import kiln
from benchmarks.throttled import throttled
from tests.s3_server import BUCKET, S3Server

PEERS_PREFIX = Path(os.environ.get("KILN_PEERS", f"{sys.prefix}-peers"))
PICTURES = int(os.environ.get("KILN_BENCH_PICTURES", "1024"))
"""On disk."""
LATENTS = int(os.environ.get("KILN_BENCH_LATENTS", "3072"))
"""On disk, where an epoch of fewer would be over at once."""
FEW = int(os.environ.get("KILN_BENCH_FEW", "512"))
"""Of each, on S3."""
ROUNDS = int(os.environ.get("KILN_BENCH_REPETITIONS", "3"))
BATCH, SIDE_PX = 32, 256
LATENCY_S, BYTES_PER_S = 0.02, 400e6
WORKERS = (0, 1, 2)
ATTEMPTS = 5
KILN = "kiln"
PEERS = ("webdataset", "mosaicml-streaming", "litdata", "Dataset of files")
_UNITS = {"pictures": "images/s", "latents": "samples/s"}
_DECODERS = {"equal": "equal decoder", "own": "own decoder", "": ""}

Epochs = list[tuple[int, float]]
"""Samples and seconds of each epoch."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What all systems are asked."""

    kind: str
    """'pictures' or 'latents'."""
    decoder: str
    """'equal', 'own', or '' for latents."""
    remote: bool

    @property
    def what(self) -> str:
        """The question in words."""
        data = "latents + text" if self.kind == "latents" else f"JPEG to {SIDE_PX} px"
        place = (
            f"S3 at {1000 * LATENCY_S:.0f} ms, {BYTES_PER_S / 1e6:.0f} MB/s"
            if self.remote
            else "local disk"
        )
        return ", ".join(filter(None, (data, _DECODERS[self.decoder], place)))


QUESTIONS = (
    Question(kind="latents", decoder="", remote=False),
    Question(kind="pictures", decoder="equal", remote=False),
    Question(kind="pictures", decoder="own", remote=False),
    Question(kind="latents", decoder="", remote=True),
    Question(kind="pictures", decoder="equal", remote=True),
)


class Peer:
    """A process of the peers' environment that loads when it is asked to."""

    def __init__(self, system: str, log: Path) -> None:
        """Start it; `log` gets what it says besides."""
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [PEERS_PREFIX / "bin" / "python", "-m", "benchmarks.stream_peers", system],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()
        self.workers: dict[Question, int] = {}

    def ask(self, **question: Any) -> Any:
        """Ask, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass(frozen=True)
class Runs:
    """All systems on the same data; remembers what a second epoch from a warm cache gave."""

    folder: Path
    peers: dict[str, Peer]
    warm: list[float] = field(default_factory=list)

    def local(self, question: Question, system: str) -> float:
        """Load some epochs from disk; give the rate."""
        epochs = 2 if question.kind == "latents" else 1
        if system == KILN:
            return _rate(_kiln(question, self._where(question, system), Path(), epochs))
        peer = self.peers[system]
        return _rate(self._peer(question, system, peer.workers[question], "", epochs))

    def cold(self, question: Question, system: str) -> float:
        """Load an epoch with an empty cache, then one more; give the rate of the first."""
        first, second = self._cold_and_warm(question, system, None)
        self.warm.append(_rate([second]))
        return _rate([first])

    def choose_workers(self, question: Question) -> None:
        """Try all numbers of workers for every peer, and keep the best of each."""
        for system, peer in self.peers.items():
            rates = {}
            if question.remote:
                for workers in (WORKERS[0], WORKERS[-1]):
                    rates[workers] = _rate(self._cold_and_warm(question, system, workers))
            else:
                for workers in WORKERS:
                    # The first epoch starts the workers.
                    rates[workers] = _rate(self._peer(question, system, workers, "", 2)[1:])
            peer.workers[question] = max(rates, key=rates.__getitem__)
            tried = ", ".join(f"{workers}: {rate:.0f}/s" for workers, rate in rates.items())
            print(f"{question.what}: {system} with workers {tried}", file=sys.stderr)
            if not question.remote:
                for workers in set(WORKERS) - {peer.workers[question]}:
                    peer.ask(do="close", job=self._job(question, system, workers, ""))

    def _cold_and_warm(self, question: Question, system: str, workers: int | None) -> Epochs:
        cache = Path(tempfile.mkdtemp(dir=self.folder))
        if system == KILN:
            found = _kiln(question, self._where(question, system), cache, 2)
        else:
            peer = self.peers[system]
            workers = peer.workers[question] if workers is None else workers
            found = self._peer(question, system, workers, str(cache), 2)
            peer.ask(do="close", job=self._job(question, system, workers, str(cache)))
        shutil.rmtree(cache, ignore_errors=True)
        return found

    def _peer(
        self, question: Question, system: str, workers: int, cache: str, epochs: int
    ) -> Epochs:
        job = self._job(question, system, workers, cache)
        for _ in range(ATTEMPTS):
            found: Epochs | None = self.peers[system].ask(do="epochs", job=job, epochs=epochs)
            if found is not None:
                break
            # mosaicml-streaming 0.13 now and then reads a shard before all of it is there.
            print(f"{question.what}: {system} died, and is asked again", file=sys.stderr)
            if cache:
                shutil.rmtree(cache)
                Path(cache).mkdir()
        assert found is not None, f"{system} died {ATTEMPTS} times: {question}"
        on_disk = LATENTS if question.kind == "latents" else PICTURES
        expected = FEW if question.remote else on_disk
        assert all(samples == expected for samples, _ in found), (system, question, found)
        return found

    def _job(self, question: Question, system: str, workers: int, cache: str) -> dict[str, Any]:
        return {
            "kind": question.kind,
            "decoder": question.decoder or "equal",
            "where": self._where(question, system),
            "cache": cache,
            "workers": workers,
        }

    def _where(self, question: Question, system: str) -> str:
        few = "few-" if question.remote else ""
        root = f"s3://{BUCKET}" if question.remote else str(self.folder)
        return f"{root}/{_name(system, few + question.kind)}"


def _name(system: str, data: str) -> str:
    """Where a system finds its format of the data."""
    if system == KILN:
        return data
    if system == "webdataset":
        return f"{data}/encodings/{ENCODING}" if "latents" in data else f"{data}/shards"
    return f"{system.replace(' ', '-')}-{data}"


def _kiln(question: Question, where: str, cache: Path, epochs: int) -> Epochs:
    found: Epochs = []
    options: dict[str, Any] = {"kind": question.kind, "batch": BATCH, "side_px": SIDE_PX}
    started_s = time.perf_counter()  # opening it belongs to the first epoch
    with kiln(where, cache=cache, **options) as epoch:
        for number in range(epochs):
            samples = sum(len(batch.ids_B) for batch in epoch(number))
            found.append((samples, time.perf_counter() - started_s))
            started_s = time.perf_counter()
    return found


def _rate(epochs: Epochs) -> float:
    return sum(samples for samples, _ in epochs) / sum(seconds for _, seconds in epochs)


def make_data(folder: Path, peers: Mapping[str, Peer]) -> None:
    """Publish the data, and convert it to the peers' formats."""
    files = {data: folder / _name("Dataset of files", data) for data in _DATA}
    publish_pictures(folder / "pictures", files["pictures"], PICTURES)
    publish_latents(folder / "latents", files["latents"], LATENTS)
    publish_pictures(folder / "few-pictures", files["few-pictures"], FEW)
    publish_latents(folder / "few-latents", files["few-latents"], FEW)
    for system in ("mosaicml-streaming", "litdata"):
        for data, source in files.items():
            out = folder / _name(system, data)
            kind = data.removeprefix("few-")
            failed = peers[system].ask(do="convert", files=str(source), out=str(out), kind=kind)
            assert not failed, (system, data)


_DATA = ("pictures", "latents", "few-pictures", "few-latents")


@contextmanager
def bucket(folder: Path) -> Iterator[Callable[[str], None]]:
    """Serve S3 through a throttled proxy; gives what uploads a folder, past the proxy."""
    server: Any = S3Server(folder / "s3")
    try:
        client = server.client("writer")
        port = server.ports["s3"]
        with throttled(port, latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S) as near:
            url = f"http://127.0.0.1:{near}"
            os.environ.update(
                server.env()
                | {"AWS_ENDPOINT_URL_S3": url, "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
            )
            yield lambda name: client.put(f"{folder}/{name}/", f"{BUCKET}/{name}/", recursive=True)
    finally:
        server.close()


def cases(runs: Runs) -> Iterator[Case]:
    """Ask all systems each question, in turn."""
    for question in QUESTIONS:
        for system in (KILN, *runs.peers):
            case = partial(Case, case=question.what, system=system, unit=_UNITS[question.kind])
            if question.remote:
                yield case(metric="cold cache", run=partial(runs.cold, question, system))
                # Of the run just before.
                yield case(metric="warm cache", run=runs.warm.pop)
            else:
                yield case(metric="rate", run=partial(runs.local, question, system))


def claims(rows: list[Row]) -> Iterator[Claim]:
    """Compare Kiln with the best of the others in every case."""
    value = {(row.case, row.metric, row.system): row.median for row in rows}
    for question in QUESTIONS:
        target = 1.0 if question.decoder == "equal" else 1.2
        for metric in ("cold cache", "warm cache") if question.remote else ("rate",):
            best = max(PEERS, key=lambda peer: value[question.what, metric, peer])
            measured = value[question.what, metric, KILN] / value[question.what, metric, best]
            text = f"{question.what}, {metric}: Kiln's over that of the best peer, {best}"
            yield claim_at_least(text, measured=measured, target=target)


def described(row: Row, peers: Mapping[str, Peer], question: Question) -> Row:
    """Add the versions, and the workers that were best."""
    if row.system == KILN:
        packages = ("torch", "numpy", "opencv-python-headless")
        return replace(row, versions={package: version(package) for package in packages})
    peer = peers[row.system]
    return replace(
        row, metric=f"{row.metric}, {peer.workers[question]} worker(s)", versions=peer.versions
    )


def main() -> None:
    """Measure and write the result."""
    if not (PEERS_PREFIX / "bin" / "python").exists():
        sys.exit(f"{PEERS_PREFIX} is missing: `make bench NAME=stream` makes it")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upload = stack.enter_context(bucket(folder))
        peers = {system: Peer(system, folder / f"{system}.log") for system in PEERS}
        for peer in peers.values():
            stack.callback(peer.close)
        make_data(folder, peers)
        for data in ("few-pictures", "few-latents"):
            for system in (KILN, "mosaicml-streaming", "litdata", "Dataset of files"):
                upload(_name(system, data))
        runs = Runs(folder, peers)
        for question in QUESTIONS:
            runs.choose_workers(question)
        rows = measure(list(cases(runs)), repetitions=ROUNDS, warmups=0)
    asked = {question.what: question for question in QUESTIONS}
    write_result(
        "stream",
        question=str(__doc__),
        rows=[described(row, peers, asked[row.case]) for row in rows],
        claims=list(claims(rows)),
    )


if __name__ == "__main__":
    main()
