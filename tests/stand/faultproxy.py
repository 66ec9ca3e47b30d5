"""A proxy before a real server that fails as told: what networks, load balancers and ailing servers do to a client.

`python -m tests.stand.faultproxy DIRECTORY HOST PORT` is the proxy itself, in a process of its own. What is not told
to fail passes through unchanged. Everything that arrives is counted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http
import json
import shutil
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.stand.pki import Certificate
from tests.stand.process import Process, StandError, free_port
from tests.stand.waiting import eventually

_ROOT = Path(__file__).parents[2]
_CONTROL = "control"
_MAX_HEAD = 1024 * 1024


@dataclass(frozen=True)
class Seen:
    """A request that arrived: its `path` has no query; `at` is a `time.monotonic()`, which is one for all processes."""

    method: str
    path: str
    at: float


class FaultProxy:
    """A proxy process before the server at `address` (`http://host:port`), used as a context manager."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"the proxy reads requests, so it takes http://host:port and not {address}")
        self._upstream = (parts.hostname, parts.port)
        self._directory = Path()
        self._process: Process | None = None
        self._control: socket.socket | None = None
        self._tls = False
        self.port = free_port()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="stand-faults-"))
        try:
            argv = [sys.executable, "-m", __name__, str(self._directory), self._upstream[0], str(self._upstream[1])]
            process = self._process = Process(argv, log=self._directory / "proxy.log", cwd=_ROOT)
            path = self._directory / _CONTROL
            eventually(lambda: path.exists() or not process.running, "the proxy listens")
            if not process.running:
                raise StandError(f"the proxy ended at its start:\n{process.log_tail()}")
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._control.settimeout(30)
            self._control.connect(str(path))
            self.listen()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, or `https://` while it speaks TLS; it stands for the server's."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # Connections --------------------------------------------------------------------------------------

    def listen(self, certificate: Certificate | None = None, *, client_ca_pem: bytes = b"") -> None:
        """Accept connections, with TLS where there is a `certificate`; those that were open are closed.

        `client_ca_pem` makes it demand a client certificate.
        """
        self._tls = certificate is not None
        files = [str(path) for path in certificate.write(self._directory, "server")] if certificate else []
        self._ask("listen", self.port, files, client_ca_pem.decode())

    def refuse(self) -> None:
        """Refuse connections, and reset those that are open, until `listen`."""
        self._ask("refuse")

    def hang(self) -> None:
        """Accept connections and requests, and answer nothing, until `heal`."""
        self._ask("hang")

    def drop(self) -> None:
        """Reset each connection as soon as it is there, as a load balancer without a backend does, until `heal`."""
        self._ask("drop")

    # Requests -----------------------------------------------------------------------------------------

    def stall(self, path: str, *, times: int | None = None) -> None:
        """Never answer requests for paths that begin so (without `/v1/`); as all of these, the next `times` or all."""
        self._ask("fault", path, times, {"kind": "stall"})

    def reset(self, path: str, *, times: int | None = None) -> None:
        """Pass the request on, and reset the connection instead of answering."""
        self._ask("fault", path, times, {"kind": "reset"})

    def reset_within(self, path: str, *, times: int | None = None) -> None:
        """Pass the request on, and reset the connection in the middle of the answer's body."""
        self._ask("fault", path, times, {"kind": "reset within"})

    def drip(self, path: str, *, seconds: float, times: int | None = None) -> None:
        """Answer byte by byte, in so many seconds."""
        self._ask("fault", path, times, {"kind": "drip", "seconds": seconds})

    def truncate(self, path: str, *, times: int | None = None) -> None:
        """Answer the first half of the body as if it were all of it."""
        self._ask("fault", path, times, {"kind": "truncate"})

    def retype(self, path: str, content_type: str, *, times: int | None = None) -> None:
        """Answer what the server does, as of another Content-Type."""
        self._ask("fault", path, times, {"kind": "retype", "type": content_type})

    def answer(
        self,
        path: str,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        times: int | None = None,
    ) -> None:
        """Answer this, and pass nothing on."""
        told = {"status": status, "body": base64.b64encode(body).decode(), "headers": dict(headers or {})}
        self._ask("fault", path, times, {"kind": "answer", **told})

    def heal(self) -> None:
        """Pass everything on again; requests that were stalled stay so, as their time is over."""
        self._ask("heal")

    # What arrived -------------------------------------------------------------------------------------

    def connections(self) -> list[float]:
        """When connections came since the last `forget`, but for those that were refused: the kernel does that."""
        return [float(at) for at in self._ask("connections")]

    def seen(self, path: str = "") -> list[Seen]:
        """The requests since the last `forget` whose path begins so (without `/v1/`)."""
        return [Seen(*found) for found in self._ask("seen") if str(found[1]).startswith(path)]

    def count(self, path: str = "") -> int:
        """How many those are."""
        return len(self.seen(path))

    def forget(self) -> None:
        """Begin the counts anew."""
        self._ask("forget")

    def _ask(self, *question: object) -> Any:
        assert self._control is not None  # Used as a context manager.
        self._control.sendall(json.dumps(question).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._control.recv(65536)
            if not received:
                raise StandError("the proxy ended")
            answer += received
        return json.loads(answer)


# The process -------------------------------------------------------------------------------------------


@dataclass
class _Fault:
    path: str
    left: float
    told: dict[str, Any]


class _Proxy:
    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._faults: list[_Fault] = []
        self._hangs = self._drops = False
        self._open: set[asyncio.StreamWriter] = set()
        self._connections: list[float] = []
        self._seen: list[tuple[str, str, float]] = []

    async def tell(self, what: str, *arguments: Any) -> Any:
        """Do what the control connection says, and give what it asks for."""
        match what:
            case "listen":
                await self._close()
                self._hangs = self._drops = False
                await self._listen(*arguments)
            case "refuse":
                await self._close()
            case "hang":
                self._hangs = True
            case "drop":
                self._drops = True
                for writer in list(self._open):
                    _reset(writer)
            case "fault":
                path, times, told = arguments
                self._faults.insert(0, _Fault(path, float("inf") if times is None else times, told))
            case "heal":
                self._faults.clear()
                self._hangs = self._drops = False
            case "connections":
                return self._connections
            case "seen":
                return self._seen
            case "forget":
                self._connections.clear()
                self._seen.clear()
        return None

    async def _listen(self, port: int, files: list[str], client_ca: str) -> None:
        context = None
        if files:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*files)
            if client_ca:
                context.load_verify_locations(cadata=client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", port, ssl=context, backlog=1024, limit=_MAX_HEAD
        )

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(time.monotonic())
        if self._drops:
            _reset(writer)
            return
        self._open.add(writer)
        try:
            # The client may go away at any point, that is its right.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take a request and answer it; whether the connection lives on."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        body = await reader.readexactly(int(_fields(head).get("content-length", "0")))
        path = target.partition("?")[0].removeprefix("/v1/")
        self._seen.append((method, path, time.monotonic()))
        told = self._due(path)
        if self._hangs or told.get("kind") == "stall":
            await reader.read()  # until the client gives up
            return False
        if told.get("kind") == "answer":
            return await _send(writer, told["status"], told["headers"], base64.b64decode(told["body"]))
        status, headers, answer = await self._pass_on(head, body)
        match told.get("kind"):
            case "reset":
                _reset(writer)
                return False
            case "reset within":
                await _send(writer, status, headers, answer, len(answer) // 2)
                _reset(writer)
                return False
            case "drip":
                return await _send(writer, status, headers, answer, pause=told["seconds"] / max(1, len(answer)))
            case "truncate":
                answer = answer[: len(answer) // 2]
            case "retype":
                headers["Content-Type"] = told["type"]
        return await _send(writer, status, headers, answer)

    def _due(self, path: str) -> dict[str, Any]:
        for fault in self._faults:
            if fault.left > 0 and path.startswith(fault.path):
                fault.left -= 1
                return fault.told
        return {}

    async def _pass_on(self, head: bytes, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The server's answer to the same request, over a connection of its own."""
        reader, writer = await asyncio.open_connection(*self._upstream, limit=_MAX_HEAD)
        try:
            writer.write(head.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            fields = _fields(answer)
            content = await reader.read()
        finally:
            writer.close()
        if fields.get("transfer-encoding") == "chunked":
            content = _joined(content)
        kept = {name.title(): text for name, text in fields.items() if name in ("content-type", "location")}
        return int(answer.split(b" ", 2)[1]), kept, content


async def _send(
    writer: asyncio.StreamWriter,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    size: int | None = None,
    *,
    pause: float = 0.0,
) -> bool:
    """Answer with `body`, or the first `size` bytes of it."""
    reason = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else "Told"
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))} | dict(headers)
    if status == http.HTTPStatus.NO_CONTENT:
        del fields["Content-Length"]
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {text}" for name, text in fields.items()), "", ""]
    head, content = "\r\n".join(lines).encode(), body[:size]
    if not pause:
        writer.write(head + content)
        await writer.drain()
        return True
    writer.write(head)
    for byte in content:
        writer.write(bytes((byte,)))
        await writer.drain()
        await asyncio.sleep(pause)
    return True


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines if line)}


def _joined(chunks: bytes) -> bytes:
    body = b""
    while True:
        size, _, chunks = chunks.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return body
        body += chunks[:length]
        chunks = chunks[length + 2 :]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, after what was written before."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _run(directory: Path, host: str, port: int) -> None:
    proxy = _Proxy((host, port))

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(json.dumps(await proxy.tell(*json.loads(line))).encode() + b"\n")
        writer.close()

    # Renamed into place, so that who finds it can dial it.
    fresh = directory / f"{_CONTROL}.new"
    async with await asyncio.start_unix_server(control, fresh, limit=64 * _MAX_HEAD):
        fresh.rename(directory / _CONTROL)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(_run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
