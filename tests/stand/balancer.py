"""A TCP load balancer before the nodes of a Vault cluster, as operators put one: to the active node, by its health.

`python -m tests.stand.balancer DIRECTORY HOST:PORT...` is the balancer itself, a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.stand.process import Process, StandError
from tests.stand.waiting import eventually

_ROOT = Path(__file__).parents[2]
_PORT_FILE = "port"
_PROBE_SECONDS = 0.1
"""Between two looks at a node's health."""
_PROBE_TIMEOUT = 1.0
_ACTIVE = b"HTTP/1.1 200 "
"""What the health of an active node begins with; a standby answers 429."""


class Balancer:
    """A balancer before nodes (`HOST:PORT`, plain HTTP), used as a context manager.

    While no node is active a connection is closed as soon as it is accepted. Connections to a node that is active no
    more are cut, so that a client's idle connection does not end at a node that was demoted.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = tuple(nodes)
        self._directory = Path()
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="stand-balancer-"))
        try:
            argv = [sys.executable, "-m", __name__, str(self._directory), *self._nodes]
            process = self._process = Process(argv, log=self._directory / "balancer.log", cwd=_ROOT)
            found = self._directory / _PORT_FILE
            eventually(lambda: found.exists() or not process.running, "the balancer listens")
            if not process.running:
                raise StandError(f"the balancer ended at its start:\n{process.log_tail()}")
            self.address = f"http://127.0.0.1:{found.read_text()}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


# The process -------------------------------------------------------------------------------------------


class _Node:
    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self.where = (host, int(port))
        self.active = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def watch(self) -> None:
        """Know for ever whether it is active."""
        while True:
            self.active = await self._is_active()
            if not self.active:
                for writer in self._writers:
                    writer.transport.abort()
            await asyncio.sleep(_PROBE_SECONDS)

    async def _is_active(self) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_PROBE_TIMEOUT):
                reader, writer = await asyncio.open_connection(*self.where)
                try:
                    writer.write(b"GET /v1/sys/health HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
                    return (await reader.read(len(_ACTIVE))) == _ACTIVE
                finally:
                    writer.close()
        return False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry a client's bytes to the node and back until either ends."""
        try:
            there, back = await asyncio.open_connection(*self.where)
        except OSError:
            return
        both = {writer, back}
        self._writers |= both
        try:
            await asyncio.wait(
                [asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()


async def _serve(directory: Path, nodes: Sequence[_Node]) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node = next((node for node in nodes if node.active), None)
        if node is not None:
            await node.carry(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port_file = directory / f"{_PORT_FILE}.new"
    port_file.write_text(str(server.sockets[0].getsockname()[1]))
    port_file.rename(directory / _PORT_FILE)
    await asyncio.gather(*(node.watch() for node in nodes))


def main(directory: str, *nodes: str) -> None:
    """Be the balancer until killed."""
    asyncio.run(_serve(Path(directory), [_Node(address) for address in nodes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
