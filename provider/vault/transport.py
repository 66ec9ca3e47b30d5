"""Bytes to and from one Vault server, over aiohttp: connections, TLS, proxies, limits. No retries, no meaning."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import ssl
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from provider import __version__
from provider.clock import Clock
from provider.errors import AnswerLost, VaultUnavailable
from provider.redact import one_line
from provider.settings import MAX_CONNECTIONS, MAX_RESPONSE_BYTES, MIB
from provider.spc import VaultServer
from provider.telemetry.events import Telemetry, VaultRequest
from provider.vault.connections import DNS_CACHE_SECONDS, BoundedResolver, Lookups, bound
from provider.vault.failures import NotSent
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
# Idle connections are ours to close, before a load balancer does it (60 s is the common least) in the middle of a
# request. Shorter than kubelet's cadence, longer than a burst.
KEEPALIVE_SECONDS: Final = 30.0
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

_PROXY_ADVICE: Final = "check VAULT_PROXY_ADDR, HTTPS_PROXY and NO_PROXY in the provider's environment"
# Tells without a token whether a Vault is there; other statuses below 500 are those of standbys.
# Source: https://openbao.org/api-docs/system/health/
HEALTH: Final = "/v1/sys/health?standbyok=true&perfstandbyok=true"
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server at ``address`` answered. ``body`` is the JSON object, or None where there was no JSON object."""

    address: str
    status: int
    headers: Mapping[str, str]
    body: dict[str, Any] | None = field(repr=False)


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
        self._base = "http://localhost" if self._socket_path else server.address
        self._secure = parts.scheme == "https"
        self._proxy = ""
        if not self._socket_path:
            port = parts.port or (443 if self._secure else 80)
            self._proxy = proxy or _proxy_from_environment(parts.scheme, parts.hostname or "", port)
        self._pool: _Pool | None = None
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
        await self.watch.admit(asker)
        if asker.owner is None:
            return await self._send(method, path, headers, body, mount)
        while True:
            try:
                await self._turns.take(asker.owner)
            except Dismissed:
                await self.watch.admit(asker)
            else:
                break
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

    async def look(self) -> tuple[str, str]:
        """See whether Vault is there, over a connection of its own, since kept ones may lead nowhere by now.

        Returns:
            What is wrong with it and what to do about that; empty for nothing.

        Raises what ``send`` raises, but for VaultUnreachable.
        """
        pool = await self._current_pool()
        began, status = time.monotonic(), 0
        session = self._open_session(pool.context)
        try:
            answer = await self._exchange(session, "GET", HEALTH, {}, None)
            status = answer.status
        finally:
            self._telemetry.record(VaultRequest(self.server, "GET", "sys/", status, time.monotonic() - began))
            await session.close()
        return _trouble(answer)

    async def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, mount: str) -> Answer:
        pool = await self._current_pool()
        if self.server.namespace:
            headers = {"X-Vault-Namespace": self.server.namespace, **headers}
        began, status = time.monotonic(), 0
        failure: VaultUnavailable | None = None
        pool.in_flight += 1
        flight = self.watch.began(self.look)
        try:
            answer = await self._exchange(pool.session, method, path, headers, body)
            status = answer.status
            return answer
        except VaultUnavailable as error:
            failure = error
            raise
        finally:
            self._telemetry.record(VaultRequest(self.server, method, mount, status, time.monotonic() - began))
            self.watch.ended(flight, status, failure)
            pool.in_flight -= 1
            if pool.retired:
                await _retire(pool)

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        sent = {"User-Agent": f"vault-csi-provider/{__version__}", "X-Vault-Request": "true", **headers}
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            async with session.request(
                method,
                URL(self._base + path, encoded=True),
                headers=sent,
                data=body,
                allow_redirects=False,
                server_hostname=self.server.tls.server_name or None if self._secure else None,
            ) as response:
                return Answer(self.server.address, response.status, response.headers, await self._body(response))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failure = _failure(error, self.server.address)
        # Outside the handler, so without a cause: aiohttp's errors show in their repr the headers that were sent, the
        # token among them, and the proxy's password.
        raise failure

    async def _body(self, response: aiohttp.ClientResponse) -> dict[str, Any] | None:
        raw = bytearray()
        await _read_on(response, raw, LARGE_BODY_BYTES)
        if len(raw) <= LARGE_BODY_BYTES:
            return _parse(raw)
        await self._large_bodies.take(self.server)
        try:
            async with asyncio.timeout(LARGE_BODY_SECONDS):
                await _read_on(response, raw, MAX_RESPONSE_BYTES)
            if len(raw) > MAX_RESPONSE_BYTES:
                raise self._too_large(f"more than {MAX_RESPONSE_BYTES // MIB} MiB")
            if not await asyncio.to_thread(_may_be_parsed, raw):
                raise self._too_large(f"JSON of more than {MAX_JSON_MARKS:,} parts")
            return await asyncio.to_thread(_parse, raw)
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
            await _retire(pool)

    async def _current_pool(self) -> _Pool:
        if self._pool is not None and not self._due_for_check():
            return self._pool
        async with self._opening:
            if self._pool is not None and not self._due_for_check():
                return self._pool
            self._checked_at = self.clock.now()
            if not self._secure:
                self._pool = self._pool or _Pool(self._open_session(None), None)
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
            old, self._pool, self._marks = self._pool, _Pool(self._open_session(context), context), marks
            if old is not None:
                _log.info("TLS files for %s changed on disk; new connections use them", self.server.address)
                await _retire(old)
            return self._pool

    def _due_for_check(self) -> bool:
        return self._secure and self.clock.now() >= self._checked_at + TLS_CHECK_SECONDS

    def _open_session(self, context: ssl.SSLContext | None) -> aiohttp.ClientSession:
        proxy = _usable_proxy(self._proxy) if self._proxy else None
        connector: aiohttp.BaseConnector
        if self._socket_path:
            connector = aiohttp.UnixConnector(
                self._socket_path, limit=self._max_connections, keepalive_timeout=KEEPALIVE_SECONDS
            )
        else:
            connector = aiohttp.TCPConnector(
                limit=self._max_connections,
                keepalive_timeout=KEEPALIVE_SECONDS,
                ssl=context or True,
                resolver=BoundedResolver(self._lookups),
                ttl_dns_cache=DNS_CACHE_SECONDS,
            )
        bound(connector)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            proxy=proxy,
        )
        # docs/contract.md section 3: aiohttp sends a GET or PUT again by itself when a kept-alive connection drops;
        # where a path issues credentials, that is a second credential. There is no public switch for it; a test
        # counts requests, so that a release that renames this one is noticed.
        session._retry_connection = False
        return session


@dataclass(slots=True)
class _Pool:
    session: aiohttp.ClientSession
    context: ssl.SSLContext | None
    in_flight: int = 0
    retired: bool = False


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


async def _retire(pool: _Pool) -> None:
    pool.retired = True
    if not pool.in_flight:
        await pool.session.close()


async def _read_on(response: aiohttp.ClientResponse, raw: bytearray, limit: int) -> None:
    """Add to ``raw`` what comes, to the end or until it is more than ``limit`` bytes."""
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > limit:
            return


def _may_be_parsed(raw: bytearray) -> bool:
    return sum(raw.count(mark) for mark in _JSON_MARKS) <= MAX_JSON_MARKS


def _parse(raw: bytearray) -> dict[str, Any] | None:
    if not raw:
        return None
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _failure(error: BaseException, where: str) -> VaultUnavailable:
    """What an error of aiohttp's means to whoever sent a request."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return NotSent(
            f"Vault at {where} is unreachable: the proxy answered {error.status} {one_line(error.message, 200)}",
            _PROXY_ADVICE,
        )
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return NotSent(f"Vault at {where} is unreachable: no connection to the proxy: {_reason(error)}", _PROXY_ADVICE)
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        # Under TLS 1.3 a server refuses the client's certificate only after the handshake.
        return VaultUnavailable(
            f"TLS with Vault at {where} failed: {_reason(error)}",
            "check vaultCACertPath, vaultTLSServerName, vaultTLSClientCertPath and Vault's certificate",
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return NotSent(
            f"Vault at {where} is unreachable: its host name cannot be looked up: {_reason(error)}",
            "check vaultAddress and this node's DNS",
        )
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return NotSent(
            f"Vault at {where} is unreachable: {_reason(error)}",
            "check vaultAddress, that Vault is up, and network policies from this node",
        )
    if isinstance(error, aiohttp.ClientResponseError):
        reason = "what it sent is not HTTP"  # aiohttp's text quotes it, and it may quote us
    elif isinstance(error, aiohttp.ClientPayloadError):
        reason = "its answer broke off"
    elif isinstance(error, TimeoutError) and error.errno is None:
        reason = f"the rest of a large answer did not come in {LARGE_BODY_SECONDS:g} s"
    else:
        reason = _reason(error)
    return AnswerLost(
        f"Vault at {where} did not answer to the end: {reason}",
        "check Vault's log and what is between it and this node; the next try of kubelet mounts anew",
    )


def _reason(error: BaseException) -> str:
    cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)  # event loops word it each in their own way
    return one_line(
        getattr(cause, "verify_message", "") or getattr(cause, "strerror", None) or str(cause) or type(cause).__name__,
        200,
    )


def _usable_proxy(text: str) -> URL:
    """The proxy's URL, which may hold a user and a password; as for Go's clients, a missing scheme means ``http``.

    Raises VaultUnavailable for what cannot be a proxy.
    """
    try:
        url = URL(text if "://" in text else f"http://{text}")
        if url.scheme not in ("http", "https") or not url.host or url.port is None:
            raise ValueError
    except ValueError:
        raise VaultUnavailable(
            "the proxy that VAULT_PROXY_ADDR or the environment names is no http:// or https:// URL", _PROXY_ADVICE
        ) from None
    return url


def _proxy_from_environment(scheme: str, host: str, port: int) -> str:
    """HTTPS_PROXY, HTTP_PROXY and NO_PROXY, any case, read as Go's clients read them; "" for none.

    Beyond ``urllib``: NO_PROXY may name networks (10.0.0.0/8) and ports, and this machine itself is never behind a
    proxy. Source: https://pkg.go.dev/golang.org/x/net/http/httpproxy
    """
    proxies = urllib.request.getproxies_environment()
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return ""
    for entry in proxies.get("no", "").lower().split(","):
        if _covers(entry.strip(), host, port, address):
            return ""
    return proxies.get(scheme, "")


def _covers(entry: str, host: str, port: int, address: _Address | None) -> bool:
    """Whether an entry of NO_PROXY stands for this host and port."""
    if entry == "*":
        return True
    name, _, number = entry.rpartition(":")
    if number.isdigit() and (":" not in name or name.endswith("]")) and name:
        if int(number) != port:
            return False
        entry = name
    if address is not None:
        try:
            return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    domain = entry.removeprefix("*")
    return bool(domain) and (host == domain or host.endswith(domain if domain.startswith(".") else f".{domain}"))


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
