"""A server that speaks Vault's protocol and fails as told, for what a real OpenBao cannot be made to do.

Raw sockets, so that a dropped connection is a dropped connection. Every request that arrives is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import http
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.stand.pki import Certificate
from tests.stand.process import StandError, free_port


class Cut(enum.Enum):
    """Where the connection is dropped, without a word before."""

    NOWHERE = enum.auto()
    BEFORE = enum.auto()
    """The request was received whole; not one byte of the answer is sent."""
    WITHIN = enum.auto()
    """Half of the answer's body is sent."""
    AFTER = enum.auto()
    """The answer is sent whole; the idle connection is closed, though it was to be kept alive."""


@dataclass(frozen=True)
class Arrival:
    """A request that came in. `path` is as sent, with the query; `at` is a `time.monotonic()`.

    `connection` numbers the connections from 1; `client` is the common name of the client's certificate.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    connection: int
    client: str
    at: float


@dataclass(frozen=True)
class Answer:
    """What is answered: `body` raw where it is bytes, else as JSON.

    It waits until `together` requests of its script have arrived, then for `stall` seconds.
    """

    status: int = 200
    body: object = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: Cut = Cut.NOWHERE
    stall: float = 0
    together: int = 1

    @property
    def payload(self) -> bytes:
        """The body's bytes."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def secret(data: Mapping[str, object] | None = None, **fields: object) -> Answer:
    """A read's answer: `data` in Vault's envelope, of which `fields` replace others (`lease_id`)."""
    envelope = {"request_id": "1", "lease_id": "", "renewable": False, "lease_duration": 0, "data": data}
    return Answer(body=envelope | {"wrap_info": None, "warnings": None, "auth": None} | fields)


def token(client_token: str, **fields: object) -> Answer:
    """A login's answer, or a renewal's: a service token of an hour, of which `fields` replace others."""
    auth: dict[str, object] = {
        "client_token": client_token,
        "accessor": "accessor",
        "lease_duration": 3600,
        "renewable": True,
        "entity_id": "entity",
        "policies": ["default", "shop"],
        "token_policies": ["default", "shop"],
        "token_type": "service",
        "num_uses": 0,
    }
    return Answer(body={"auth": auth | fields, "data": None, "lease_id": ""})


def refusal(status: int, *errors: str, **headers: str) -> Answer:
    """An error as Vault words one; `Retry_After="1"` is the header Retry-After."""
    return Answer(status, {"errors": list(errors)}, {name.replace("_", "-"): text for name, text in headers.items()})


Reply = Answer | Callable[[Arrival], Answer]


@dataclass
class _Script:
    replies: list[Reply]
    arrived: asyncio.Condition
    count: int = 0


class Faulty:
    """The server, used as a context manager, on a thread of its own; what has no script answers 404 as Vault does.

    HTTP on 127.0.0.1; HTTPS with `certificate`, which may be replaced between `stop` and `start`; `client_ca_pem`
    makes it demand a client certificate.
    """

    def __init__(self, *, certificate: Certificate | None = None, client_ca_pem: bytes | None = None) -> None:
        self.certificate = certificate
        self.client_ca_pem = client_ca_pem
        self.arrivals: list[Arrival] = []
        """Every request so far, in order."""
        self.most_connections = 0
        """The most connections that were open at one time."""
        self._serving: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._scripts: dict[tuple[str, str], _Script] = {}
        self._port = free_port()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve, on the same port as before, and return when connections are accepted."""
        listener = socket.create_server(("127.0.0.1", self._port), backlog=1024)
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(listener, started)), name="stand-faulty", daemon=True
        )
        self._thread.start()
        if not started.wait(10):
            raise StandError("the faulty server did not start within 10 s")

    def stop(self) -> None:
        """Close the port and all connections; scripts and arrivals stay for the next `start`."""
        if self._thread is None:
            return
        assert self._loop is not None
        assert self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    @property
    def port(self) -> int:
        """The TCP port."""
        return self._port

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, or `https://` with a certificate."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self._port}"

    def on(self, path: str, *replies: Reply, method: str = "") -> None:
        """Answer requests for `path` (without `/v1/` and query) with each of `replies` once, the last for ever.

        With `method` those of one method only, and before a script without. Replaces what was told before.
        """
        self._scripts[method, path] = _Script(list(replies), asyncio.Condition())

    def count(self, path: str, method: str = "") -> int:
        """How many requests came for `path` (without `/v1/` and query), or with `method` only."""
        return sum(_name(seen.path) == path and method in ("", seen.method) for seen in list(self.arrivals))

    # Serving ------------------------------------------------------------------------------------------

    async def _run(self, listener: socket.socket, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._serve, sock=listener, ssl=self._tls(), limit=1024 * 1024)
        started.set()
        await self._stopping.wait()
        server.close()
        await asyncio.sleep(0.01)  # a connection that was just accepted gets its task
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # their transports close

    def _tls(self) -> ssl.SSLContext | None:
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            context.load_cert_chain(*self.certificate.write(Path(directory), "server"))
        if self.client_ca_pem is not None:
            context.load_verify_locations(cadata=self.client_ca_pem.decode())
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._connections += 1
        number = self._connections
        self.most_connections = max(self.most_connections, len(self._serving))
        try:
            # The client may go away at any point, that is its right; and the server may stop.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer, number):
                    pass
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        """Take one request and answer it; returns whether the connection lives on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        arrival = Arrival(method, path, headers, body, number, _client(writer), time.monotonic())
        self.arrivals.append(arrival)
        answer = await self._answer(arrival)
        await asyncio.sleep(answer.stall)
        if answer.cut is Cut.BEFORE:
            return False
        payload = answer.payload
        fields = {"Content-Type": "application/json", "Content-Length": str(len(payload))} | dict(answer.headers)
        reason = http.HTTPStatus(answer.status).phrase if answer.status in set(http.HTTPStatus) else "Told"
        lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{name}: {text}" for name, text in fields.items()), "", ""]
        sent = payload[: len(payload) // 2] if answer.cut is Cut.WITHIN else payload
        writer.write("\r\n".join(lines).encode() + sent)  # at once, so that no delayed acknowledgement is waited for
        await writer.drain()
        if answer.cut is Cut.NOWHERE:
            return True
        writer.close()
        await writer.wait_closed()  # what was written is sent first
        return False

    async def _answer(self, arrival: Arrival) -> Answer:
        name = _name(arrival.path)
        script = self._scripts.get((arrival.method, name)) or self._scripts.get(("", name))
        if script is None:
            return refusal(404)
        async with script.arrived:
            script.count += 1
            script.arrived.notify_all()
            reply = script.replies.pop(0) if len(script.replies) > 1 else script.replies[0]
            answer = reply(arrival) if callable(reply) else reply
            await script.arrived.wait_for(lambda: script.count >= answer.together)
        return answer


def _name(path: str) -> str:
    """The path as scripts know it."""
    return path.partition("?")[0].partition("/v1/")[2]


def _client(writer: asyncio.StreamWriter) -> str:
    certificate = writer.get_extra_info("peercert") or {}
    return next((text for part in certificate.get("subject", ()) for name, text in part if name == "commonName"), "")
