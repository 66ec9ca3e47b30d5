"""Requests to one Vault server and its answers: turns and limits. No retries, no meaning."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from provider.clock import Clock
from provider.errors import AnswerLost, VaultUnavailable
from provider.http import (
    ConnectFailed,
    ExchangeBroken,
    HttpFailure,
    LookupFailed,
    Pool,
    ProxyFailed,
    Response,
    TlsFailed,
)
from provider.settings import MAX_RESPONSE_BYTES, MIB
from provider.spc import VaultServer
from provider.telemetry.events import Looked, Telemetry, VaultRequest
from provider.turns import Dismissed, Turns
from provider.vault.connections import Connections
from provider.vault.failures import NotSent
from provider.vault.memory import NoRoom, Room, count_marks, size_parsed
from provider.vault.proxies import PROXY_ADVICE
from provider.vault.watch import Asker, Watch

# How long a request may take before others get a place for it. Longer than any engine needs that is not hung itself.
OVERDUE_SECONDS: Final = 10.0
# Parsing a larger body than this holds the loop for more than about a millisecond, so there is one at a time.
SMALL_BODY_BYTES: Final = 32 * 1024
# A larger body than this waits at the server until it is its turn to be read: hundreds may be under way, on as many
# connections.
LARGE_BODY_BYTES: Final = 64 * 1024
# Such bodies that are read to their end at one time, of all servers: each may take 8 MiB, and one of them some 60 MiB
# while it is parsed.
LARGE_BODIES: Final = 4
# A large body that has its turn keeps others waiting; 8 MiB in this time is slower than any network for a Vault.
LARGE_BODY_SECONDS: Final = 10.0
# JSON_MARKS of one answer: 20 MiB of objects. A secret of 1 MiB, the most that integrated storage keeps by default, has
# fewer unless nearly every fourth byte is one.
# Source: https://openbao.org/docs/configuration/storage/raft/ (max_entry_size)
MAX_JSON_MARKS: Final = 300_000

# What Go's servers, and so Vault, answer to plain HTTP on a port of TLS.
_TLS_WANTED: Final = b"HTTP request to an HTTPS server"

# Tells without a token whether a Vault is there; other statuses below 500 are those of standbys.
# Source: https://openbao.org/api-docs/system/health/
HEALTH: Final = "/v1/sys/health?standbyok=true&perfstandbyok=true"


@dataclass(slots=True, eq=False)
class Request:
    """What is sent. ``path`` begins with a slash and is percent-encoded, query included.

    ``mount`` is what is told of it; ``room``, where it is a mount's, is where the answer is to be kept.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(repr=False)
    mount: str
    asker: Asker
    room: Room | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """What the server at ``address`` answered. ``body`` is the JSON object, or None where there was no JSON object.

    ``size`` is about what that takes in memory, in bytes.
    """

    address: str
    status: int
    body: dict[str, Any] | None = field(repr=False)
    size: int
    response: Response = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first header of this name; None where there is none."""
        return self.response.header(name)


class Transport:
    """One namespace of one Vault server, over ``connections`` that others of the same server share.

    ``large_bodies`` are the turns at which bodies above LARGE_BODY_BYTES are read, ``parsing`` those at which bodies
    above SMALL_BODY_BYTES are parsed: all servers share them.
    """

    def __init__(
        self,
        server: VaultServer,
        connections: Connections,
        *,
        clock: Clock,
        large_bodies: Turns,
        parsing: Turns,
        watch: Watch,
        telemetry: Telemetry,
    ) -> None:
        self.server = server
        self.connections = connections
        self.clock = clock
        self.watch = watch
        self._telemetry = telemetry
        self._large_bodies = large_bodies
        self._parsing = parsing
        watch.queues.add(connections.reads)
        parts = urlsplit(server.address)
        self._base = "" if parts.scheme == "unix" else parts.path
        self._headers = {"X-Vault-Namespace": server.namespace} if server.namespace else {}

    async def send(self, request: Request) -> Answer:
        """Send a request, once, and read its answer.

        Requests take turns, owner by owner: all of them with those to other servers, and reads with those to this one.

        Raises:
            VaultUnreachable: Vault is known to be away; nothing was sent.
            NotSent: no connection came about.
            AnswerLost: the request went out, the answer did not come, or not whole.
            VaultUnavailable: TLS failed, or the answer is too large.
            NoRoom: the request's room is too small for the answer; or was so for one before, and nothing was sent.
        """
        asker, room = request.asker, request.room
        if not self.watch.believes:
            await self.watch.admit(asker)
        queues = self.connections.turns_of_reads if asker.reads else self.connections.turns_of_others
        if not queues:
            return await self._send(request)
        held, late = 0, False

        def be_late() -> None:
            nonlocal late
            late = True
            for turns in queues:
                turns.overdue(asker.owner)

        timer: asyncio.TimerHandle | None = None
        try:
            for turns in queues:
                if not turns.take_now(asker.owner):
                    await self._wait_turn(turns, asker)
                held += 1
            if room is not None:
                room.check()
            timer = asyncio.get_running_loop().call_later(OVERDUE_SECONDS, be_late)
            return await self._send(request)
        finally:
            if timer is not None:
                timer.cancel()
            for turns in queues[:held]:
                turns.give(asker.owner, overdue=late)

    async def _wait_turn(self, turns: Turns, asker: Asker) -> None:
        while True:
            try:
                return await turns.take(asker.owner)
            except Dismissed:
                await self.watch.admit(asker)

    def expect(self, reads: int) -> None:
        """So many reads of one owner will follow the next request's answer, a login's: connect for them meanwhile."""
        self.connections.expect(reads)

    async def look(self) -> tuple[str, str]:
        """See whether Vault is there, over a connection of its own, since kept ones may lead nowhere by now.

        Returns:
            What is wrong with it and what to do about that; empty for nothing.

        Raises what ``send`` raises, but for VaultUnreachable.
        """
        pool = await self.connections.another()
        status = 0
        try:
            answer = await self._exchange(pool, Request("GET", HEALTH, {}, None, "sys/", Asker()))
            status = answer.status
        finally:
            self._telemetry.record(Looked(status))
            pool.close()
        return _trouble(answer)

    async def _send(self, request: Request) -> Answer:
        pool = await self.connections.pool()
        began, status = time.monotonic(), 0
        failure: VaultUnavailable | None = None
        flight = self.watch.began(self.look)
        try:
            answer = await self._exchange(pool, request)
            status = answer.status
            return answer
        except VaultUnavailable as error:
            failure = error
            raise
        except NoRoom as error:
            status = error.status
            raise
        finally:
            seconds = time.monotonic() - began
            self._telemetry.record(VaultRequest(request.method, request.mount, status, seconds))
            self.watch.ended(flight, status, failure)

    async def _exchange(self, pool: Pool, request: Request) -> Answer:
        headers = {**self._headers, **request.headers}
        try:
            response = await pool.request(
                request.method, self._base + request.path, headers, request.body, limit=LARGE_BODY_BYTES
            )
            try:
                if response.whole and len(response.body) <= SMALL_BODY_BYTES:
                    size, parsed = size_parsed(response.body), _parse(response.body)
                else:
                    size, parsed = await self._large(response, request.asker.owner or self.server, request.room)
            except NoRoom as error:
                error.status = response.status
                raise
            finally:
                response.close()
        except HttpFailure as error:
            raise _failure(error, self.server.address) from error
        if parsed is None and response.status == HTTPStatus.BAD_REQUEST and _TLS_WANTED in response.body:
            raise VaultUnavailable(
                f"Vault at {self.server.address} speaks TLS, and was spoken to without",
                "write https:// in vaultAddress, or in the daemon's --vault-addr",
            )
        return Answer(self.server.address, response.status, parsed, size, response)

    async def _large(self, response: Response, owner: Hashable, room: Room | None) -> tuple[int, dict[str, Any] | None]:
        """Read what is left of a large answer, and parse it, each when it is its turn; and about what it takes."""
        if response.whole and len(response.body) <= LARGE_BODY_BYTES:
            return await self._parse_in_turn(response.body, owner, room)
        await self._large_bodies.take(owner)
        try:
            if room is not None:
                room.check()
            try:
                async with asyncio.timeout(LARGE_BODY_SECONDS):
                    await response.read_on(MAX_RESPONSE_BYTES)
            except TimeoutError as error:
                raise ExchangeBroken(f"the rest of a large answer did not come in {LARGE_BODY_SECONDS:g} s") from error
            if len(response.body) > MAX_RESPONSE_BYTES:
                raise self._too_large(f"more than {MAX_RESPONSE_BYTES // MIB} MiB")
            return await self._parse_in_turn(response.body, owner, room)
        finally:
            self._large_bodies.give(owner)

    async def _parse_in_turn(
        self, raw: bytearray, owner: Hashable, room: Room | None
    ) -> tuple[int, dict[str, Any] | None]:
        """Parse it if its mount has room for it. Python's parser holds the loop, in a thread too: one at a time."""
        await self._parsing.take(owner)
        try:
            if room is not None:
                room.check()
            marks = await asyncio.to_thread(count_marks, raw)
            if marks > MAX_JSON_MARKS:
                raise self._too_large(f"JSON of more than {MAX_JSON_MARKS:,} parts")
            size = size_parsed(raw, marks)
            if room is not None:
                room.check(size)
            return size, await asyncio.to_thread(_parse, raw)
        finally:
            self._parsing.give(owner)

    def _too_large(self, size: str) -> VaultUnavailable:
        return VaultUnavailable(
            f"Vault at {self.server.address} answered {size}", "a volume holds at most 4 MiB; name a smaller secret"
        )


def _trouble(answer: Answer) -> tuple[str, str]:
    """What an answer of sys/health says is wrong, and what to do; one that is not Vault's comes from what hides it."""
    if answer.status < 500:
        return "", ""
    if answer.body and answer.body.get("sealed") is True and answer.body.get("initialized") is True:
        return "it is sealed", "unseal it; kubelet tries again by itself"
    if answer.body and answer.body.get("initialized") is False:
        return "it is not initialized", "initialize it; kubelet tries again by itself"
    return (
        f"it or what is in front of it answers {answer.status}",
        "check Vault and any load balancer in front of it; kubelet tries again by itself",
    )


def _parse(raw: bytearray) -> dict[str, Any] | None:
    if not raw:
        return None
    try:
        found = json.loads(raw.decode())  # text: whoever gets bytes looks for other encodings first
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _failure(error: HttpFailure, where: str) -> VaultUnavailable:
    """What a failure means to whoever sent a request."""
    if isinstance(error, ProxyFailed):
        return NotSent(f"Vault at {where} is unreachable: the proxy does not lead to it: {error}", PROXY_ADVICE)
    if isinstance(error, TlsFailed):
        advice = (
            "check that Vault's CA is the one given, by the daemon's --vault-tls-ca-cert (the chart's vaultCA) or the "
            "class's vaultCACertPath; and vaultTLSServerName, vaultTLSClientCertPath and Vault's certificate"
        )
        # What OpenSSL says of plain HTTP.
        if "WRONG_VERSION_NUMBER" in str(error) or "HTTP_REQUEST" in str(error):
            advice = "there is no TLS, it seems: check the port, or write http:// in vaultAddress or --vault-addr"
        return VaultUnavailable(f"TLS with Vault at {where} failed: {error}", advice)
    if isinstance(error, LookupFailed):
        return NotSent(
            f"Vault at {where} is unreachable: its host name cannot be looked up: {error}",
            "check vaultAddress and this node's DNS",
        )
    if isinstance(error, ConnectFailed):
        return NotSent(
            f"Vault at {where} is unreachable: {error}",
            "check vaultAddress, that Vault is up, and network policies from this node",
        )
    return AnswerLost(
        f"Vault at {where} did not answer to the end: {error}",
        "check Vault's log and what is between it and this node; the next try of kubelet mounts anew",
    )
