"""What do the guards of a download cost, against urllib's own opener?"""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

from benchmarks.harness import Case, claim_at_least, measure, write_result
from data_prep.config import PrepareConfig
from data_prep.guard import GuardedOpener
from trainer.frozen import compose

NUM_PICTURES = 3000
NUM_THREADS = 32
BODY_BYTES = 20_000
# One thread and as little Python as possible, so that the client is what is measured.
_SERVER = """
import asyncio, sys
body = bytes(int(sys.argv[1]))
found = b"HTTP/1.1 200 OK\\r\\nContent-Type: image/jpeg\\r\\nContent-Length: %d\\r\\n" % len(body)
missing = b"HTTP/1.1 404 Not Found\\r\\nContent-Length: 0\\r\\n"
class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.received = transport, b""
    def data_received(self, data):
        self.received += data
        while b"\\r\\n\\r\\n" in self.received:
            request, _, self.received = self.received.partition(b"\\r\\n\\r\\n")
            ends = b"connection: close" in request.lower()
            start = found + b"\\r\\n" + body if b" /p" in request else missing + b"\\r\\n"
            self.transport.write(start)
            if ends:
                self.transport.close()
async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def served() -> Iterator[str]:
    """Serve pictures from another process; give the URL."""
    command = [sys.executable, "-c", _SERVER, str(BODY_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def pictures_per_s(
    opener: urllib.request.OpenerDirector, base: str, clock: Callable[[], float]
) -> float:
    """Fetch all pictures as img2dataset does; give their number per second of a clock."""

    def fetch(number: int) -> int:
        request = urllib.request.Request(f"{base}/p{number}.jpg")
        with opener.open(request, timeout=10) as answer:
            return len(answer.read())

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        started_s = clock()
        assert set(threads.map(fetch, range(NUM_PICTURES))) == {BODY_BYTES}
        return NUM_PICTURES / (clock() - started_s)


def main() -> None:
    """Measure and write the result."""
    words = ["rows=x", "dataset=x", "download.allow_hosts=[127.0.0.1]"]
    cfg = compose(PrepareConfig, "prepare", words).download
    with served() as base, closing(GuardedOpener(cfg)) as guarded:
        plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        case = f"{NUM_PICTURES} pictures of {BODY_BYTES // 1000} kB, {NUM_THREADS} threads"
        named = partial(Case, case=case, unit="pictures/s")
        cases = [
            named(system=system, metric=metric, run=partial(pictures_per_s, opener, base, clock))
            for metric, clock in (("fetched", time.perf_counter), ("per CPU s", time.process_time))
            for system, opener in (("urllib", plain), ("kiln", guarded))
        ]
        rows = measure(cases)
    urllib_rate, kiln_rate = rows[0].median, rows[1].median
    write_result(
        "guard",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_least(
                "With all guards on, pictures come as fast as through urllib's own opener",
                measured=kiln_rate / urllib_rate,
                target=0.95,
            )
        ],
    )


if __name__ == "__main__":
    main()
