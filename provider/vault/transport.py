"""Requests to one Vault server and its answers: TLS files, proxies, turns, limits. No retries, no meaning."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from provider.clock import Clock
from provider.errors import AnswerLost, VaultUnavailable
from provider.http import (
    ConnectFailed,
    ExchangeBroken,
    HttpFailure,
    LookupFailed,
    Lookups,
    Origin,
    Pool,
    ProxyFailed,
    Response,
    TlsFailed,
)
from provider.settings import MAX_CONNECTIONS, MAX_RESPONSE_BYTES, MIB
from provider.spc import VaultServer
from provider.telemetry.events import Telemetry, VaultRequest
from provider.vault.failures import NotSent
from provider.vault.proxies import PROXY_ADVICE, is_secure, proxy_from_environment, usable_proxy
from provider.vault.tls import Fingerprint, fingerprint, make_context
from provider.vault.turns import Dismissed, Turns
from provider.vault.watch import Asker, Watch

_log = logging.getLogger(__name__)

# A server that does not accept a connection in this time is down, as far as a mount of a minute goes.
CONNECT_SECONDS: Final = 10.0
# Connections that the reads of classes leave to logins, renewals, revocations and look-ups: those are short, and what
# they keep alive must not hang on what a class reads.
RESERVED_CONNECTIONS: Final = 4
# Connections, an eighth of all at most, for reads that wait while others' hang; and how long that is. Longer than any
# engine needs that is not hung itself.
LENDABLE_CONNECTIONS: Final = 8
OVERDUE_SECONDS: Final = 10.0
# How often the TLS files are looked at, at most.
TLS_CHECK_SECONDS: Final = 1.0
# Parsing a larger body than this would hold the loop for more than about 5 ms.
LARGE_BODY_BYTES: Final = 256 * 1024
# Larger bodies that are read to their end and parsed at one time, of all servers: each may take some 40 MiB meanwhile.
LARGE_BODIES: Final = 4
# A large body that has its turn keeps others waiting; 8 MiB in this time is slower than any network for a Vault.
LARGE_BODY_SECONDS: Final = 10.0
# Each of these characters is at most one more object in memory, of about 70 bytes: 20 MiB at this many. A secret of
# 1 MiB, the most that integrated storage keeps by default, has fewer unless nearly every fourth byte is one.
# Source: https://openbao.org/docs/configuration/storage/raft/ (max_entry_size)
MAX_JSON_MARKS: Final = 300_000
_JSON_MARKS: Final = b",[{:"

# Tells without a token whether a Vault is there; other statuses below 500 are those of standbys.
# Source: https://openbao.org/api-docs/system/health/
HEALTH: Final = "/v1/sys/health?standbyok=true&perfstandbyok=true"


@dataclass(slots=True, eq=False)
class Answer:
    """What the server at ``address`` answered. ``body`` is the JSON object, or None where there was no JSON object."""

    address: str
    status: int
    body: dict[str, Any] | None = field(repr=False)
    response: Response = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first header of this name; None where there is none."""
        return self.response.header(name)


class Transport:
    """The connections to one Vault server: at most MAX_CONNECTIONS, kept alive, remade when TLS files change.

    ``large_bodies`` are the turns at which bodies above LARGE_BODY_BYTES are read, and ``lookups`` find hosts: both are
    shared by all servers.
    """

    def __init__(
        self,
        server: VaultServer,
        *,
        clock: Clock,
        proxy: str,
        large_bodies: Turns,
        lookups: Lookups,
        watch: Watch,
        max_connections: int = MAX_CONNECTIONS,
        telemetry: Telemetry,
    ) -> None:
        self.server = server
        self.clock = clock
        self.watch = watch
        self._telemetry = telemetry
        self._max_connections = max_connections
        self._large_bodies = large_bodies
        self._lookups = lookups
        lendable = min(LENDABLE_CONNECTIONS, max_connections // 8)
        self._turns = Turns(max(1, max_connections - RESERVED_CONNECTIONS - lendable), lendable)
        watch.queues.add(self._turns)
        parts = urlsplit(server.address)
        self._socket_path = parts.path if parts.scheme == "unix" else ""
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._base = "" if self._socket_path else parts.path
        self._proxy = ""
        if not self._socket_path:
            self._proxy = proxy or proxy_from_environment(parts.scheme, self._host, self._port)
        self._needs_tls = self._secure or is_secure(self._proxy)
        self._headers = {"Accept": "application/json", "X-Vault-Request": "true"}
        if server.namespace:
            self._headers["X-Vault-Namespace"] = server.namespace
        self._expected = 0
        self._pool: Pool | None = None
        self._context: ssl.SSLContext | None = None
        self._marks: Fingerprint = ()
        self._checked_at = float("-inf")
        self._opening = asyncio.Lock()

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        *,
        mount: str,
        asker: Asker,
    ) -> Answer:
        """Send one request, once, and read its answer.

        ``path`` begins with a slash and is percent-encoded, query included. ``mount`` is what is told of it. Requests
        of an ``asker`` with an owner take turns, owner by owner, at all connections but RESERVED_CONNECTIONS and
        LENDABLE_CONNECTIONS; one without never waits for them.

        Raises:
            VaultUnreachable: Vault is known to be away; nothing was sent.
            NotSent: no connection came about.
            AnswerLost: the request went out, the answer did not come, or not whole.
            VaultUnavailable: TLS failed, or the answer is too large.
        """
        if not self.watch.believes:
            await self.watch.admit(asker)
        if asker.owner is None:
            return await self._send(method, path, headers, body, mount)
        if not self._turns.take_now(asker.owner):
            await self._wait_turn(asker)
        late = False

        def be_late() -> None:
            nonlocal late
            late = True
            self._turns.overdue(asker.owner)

        timer = asyncio.get_running_loop().call_later(OVERDUE_SECONDS, be_late)
        try:
            return await self._send(method, path, headers, body, mount)
        finally:
            timer.cancel()
            self._turns.give(asker.owner, overdue=late)

    async def _wait_turn(self, asker: Asker) -> None:
        while True:
            try:
                return await self._turns.take(asker.owner)
            except Dismissed:
                await self.watch.admit(asker)

    def expect(self, reads: int) -> None:
        """So many reads of one owner will follow the next request's answer, a login's: connect for them meanwhile."""
        self._expected = min(reads, self._turns.most)

    async def look(self) -> tuple[str, str]:
        """See whether Vault is there, over a connection of its own, since kept ones may lead nowhere by now.

        Returns:
            What is wrong with it and what to do about that; empty for nothing.

        Raises what ``send`` raises, but for VaultUnreachable.
        """
        await self._current_pool()
        began, status = time.monotonic(), 0
        pool = self._open_pool(self._context)
        try:
            answer = await self._exchange(pool, "GET", HEALTH, {}, None)
            status = answer.status
        finally:
            self._telemetry.record(VaultRequest(self.server, "GET", "sys/", status, time.monotonic() - began))
            pool.close()
        return _trouble(answer)

    async def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, mount: str) -> Answer:
        pool = self._pool
        if pool is None or self._due_for_check():
            pool = await self._current_pool()
        if self._expected:
            pool.expect(self._expected)
            self._expected = 0
        began, status = time.monotonic(), 0
        failure: VaultUnavailable | None = None
        flight = self.watch.began(self.look)
        try:
            answer = await self._exchange(pool, method, path, headers, body)
            status = answer.status
            return answer
        except VaultUnavailable as error:
            failure = error
            raise
        finally:
            self._telemetry.record(VaultRequest(self.server, method, mount, status, time.monotonic() - began))
            self.watch.ended(flight, status, failure)

    async def _exchange(
        self, pool: Pool, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        try:
            response = await pool.request(method, self._base + path, headers, body, limit=LARGE_BODY_BYTES)
            try:
                small = response.whole and len(response.body) <= LARGE_BODY_BYTES
                parsed = _parse(response.body) if small else await self._large(response)
            finally:
                response.close()
        except HttpFailure as error:
            raise _failure(error, self.server.address) from error
        return Answer(self.server.address, response.status, parsed, response)

    async def _large(self, response: Response) -> dict[str, Any] | None:
        """Read and parse what is left of a large answer, when it is its turn."""
        await self._large_bodies.take(self.server)
        limit = asyncio.timeout(LARGE_BODY_SECONDS)
        try:
            async with limit:
                await response.read_on(MAX_RESPONSE_BYTES)
            if len(response.body) > MAX_RESPONSE_BYTES:
                raise self._too_large(f"more than {MAX_RESPONSE_BYTES // MIB} MiB")
            if not await asyncio.to_thread(_may_be_parsed, response.body):
                raise self._too_large(f"JSON of more than {MAX_JSON_MARKS:,} parts")
            return await asyncio.to_thread(_parse, response.body)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ExchangeBroken(f"the rest of a large answer did not come in {LARGE_BODY_SECONDS:g} s") from error
        finally:
            self._large_bodies.give(self.server)

    def _too_large(self, size: str) -> VaultUnavailable:
        return VaultUnavailable(
            f"Vault at {self.server.address} answered {size}", "a volume holds at most 4 MiB; name a smaller secret"
        )

    async def close(self) -> None:
        """Let go of the connections: idle ones now, each other one with its answer. A later send opens new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    async def _current_pool(self) -> Pool:
        async with self._opening:
            if self._pool is not None and not self._due_for_check():
                return self._pool
            self._checked_at = self.clock.now()
            if not self._needs_tls:
                self._pool = self._pool or self._open_pool(None)
                return self._pool
            marks = await asyncio.to_thread(fingerprint, self.server.tls)
            if self._pool is not None and marks == self._marks:
                return self._pool
            try:
                context = await asyncio.to_thread(make_context, self.server.tls)
            except VaultUnavailable as error:
                if self._pool is None:
                    self._checked_at = float("-inf")
                    raise
                # A file that is being replaced may be half there: what worked goes on working.
                _log.warning("TLS files for %s changed and cannot be used yet: %s", self.server.address, error.what)
                return self._pool
            old, self._pool, self._context, self._marks = self._pool, self._open_pool(context), context, marks
            if old is not None:
                _log.info("TLS files for %s changed on disk; new connections use them", self.server.address)
                old.close()
            return self._pool

    def _due_for_check(self) -> bool:
        return self._needs_tls and self.clock.now() >= self._checked_at + TLS_CHECK_SECONDS

    def _open_pool(self, context: ssl.SSLContext | None) -> Pool:
        origin = Origin(
            self._host or "localhost",
            self._port,
            context if self._secure else None,
            self.server.tls.server_name,
            self._socket_path,
            usable_proxy(self._proxy, context) if self._proxy else None,
        )
        return Pool(
            origin,
            lookups=self._lookups,
            limit=self._max_connections,
            connect_seconds=CONNECT_SECONDS,
            headers=self._headers,
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


def _may_be_parsed(raw: bytearray) -> bool:
    return sum(raw.count(mark) for mark in _JSON_MARKS) <= MAX_JSON_MARKS


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
        return VaultUnavailable(
            f"TLS with Vault at {where} failed: {error}",
            "check vaultCACertPath, vaultTLSServerName, vaultTLSClientCertPath and Vault's certificate",
        )
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
