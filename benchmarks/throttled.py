"""A loopback proxy that makes a server as far away and as narrow as an object store."""

import asyncio
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

HOST = "127.0.0.1"
_CHUNK_BYTES = 1 << 18


class _Link:
    """The one line that all answers share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def carry(self, num_bytes: int) -> None:
        """Wait until so many bytes are through."""
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + num_bytes / self._bytes_per_s
        await asyncio.sleep(self._free_s - now_s)


async def _requests(
    client: asyncio.StreamReader, server: asyncio.StreamWriter, latency_s: float
) -> None:
    with suppress(ConnectionError):
        while chunk := await client.read(_CHUNK_BYTES):
            await asyncio.sleep(latency_s)
            server.write(chunk)
            await server.drain()
    server.close()


async def _answers(server: asyncio.StreamReader, client: asyncio.StreamWriter, link: _Link) -> None:
    with suppress(ConnectionError):
        while chunk := await server.read(_CHUNK_BYTES):
            await link.carry(len(chunk))
            client.write(chunk)
            await client.drain()
    client.close()


def _serve(tell: Connection, port: int, latency_s: float, bytes_per_s: float) -> None:
    link = _Link(bytes_per_s)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(latency_s)  # a new connection costs a round trip, too
        theirs, ours = await asyncio.open_connection(HOST, port, limit=_CHUNK_BYTES)
        await asyncio.gather(_requests(reader, ours, latency_s), _answers(theirs, writer, link))

    async def run() -> None:
        server = await asyncio.start_server(accept, HOST, 0, backlog=1024, limit=_CHUNK_BYTES)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
    sys.exit()


@contextmanager
def throttled(port: int, *, latency_s: float, bytes_per_s: float) -> Iterator[int]:
    """Forward to a port of this machine from a process of its own; give the port to use instead.

    Every new connection and every request waits for `latency_s`; all answers together get
    `bytes_per_s`. Bytes pass as they are, so that signatures over the host's name hold.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, port, latency_s, bytes_per_s), daemon=True
    )
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()
