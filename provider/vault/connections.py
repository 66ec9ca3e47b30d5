"""The connections to one server, shared by all who speak to it: its TLS, the way to it, and who has which of them."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import ssl
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from provider.clock import Clock
from provider.errors import VaultUnavailable
from provider.http import Allowance, Lookups, Origin, Pool
from provider.settings import TlsSettings
from provider.spc import VaultServer
from provider.turns import Turns
from provider.vault.proxies import is_secure, proxy_from_environment, usable_proxy
from provider.vault.tls import Fingerprint, fingerprint, make_context

_log = logging.getLogger(__name__)

# A server that does not accept a connection in this time is down, as far as a mount of a minute goes.
CONNECT_SECONDS: Final = 10.0
# Connections that the reads of classes leave to logins, renewals, revocations and look-ups: those are short, and what
# they keep alive must not hang on what a class reads.
RESERVED_CONNECTIONS: Final = 4
# Connections, an eighth of all at most, for reads that wait while others' hang.
LENDABLE_CONNECTIONS: Final = 8
# How often the TLS files are looked at, at most.
TLS_CHECK_SECONDS: Final = 1.0
# Connections to all servers together but the daemon's own Vault: eight servers of classes in full use. Each takes some
# 50 KiB of memory with TLS.
MAX_SHARED_CONNECTIONS: Final = 512
# Of the file descriptors that the daemon may have, one in so many is such a connection at most: while it is made it may
# be a socket for each of eight addresses, and three quarters are for all else, the driver, Kubernetes and state files.
DESCRIPTORS_EACH: Final = 32
# As many for a connection to the daemon's own Vault.
DESCRIPTORS_OF_OWN: Final = 4
# Whatever is looked at, this many at one time and in a second, and never more than one in so many descriptors.
MAX_LOOKS: Final = 64
DESCRIPTORS_OF_LOOK: Final = 64

# So many are enough for all of these, and what a process has on today's Linux.
MANY_DESCRIPTORS: Final = 65536

_HEADERS: Final = {"Accept": "application/json", "X-Vault-Request": "true"}


class Place(NamedTuple):
    """Where a server listens, whatever is below it: an address of a Vault without its path."""

    scheme: str
    host: str
    port: int
    socket_path: str

    @classmethod
    def of(cls, address: str) -> Place:
        """That of a VaultServer's address."""
        parts = urlsplit(address)
        if parts.scheme == "unix":
            return cls("unix", "", 0, parts.path)
        host = parts.hostname or ""
        with contextlib.suppress(ValueError):
            host = str(ipaddress.ip_address(host))  # 0:0::1 is ::1
        return cls(parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80), "")

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken there."""
        return self.scheme == "https"

    def __str__(self) -> str:
        if self.socket_path:
            return f"unix://{self.socket_path}"
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def tls_of(server: VaultServer) -> TlsSettings:
    """The TLS settings of a server, as far as they mean anything: without TLS they do not."""
    return server.tls if server.address.startswith("https:") else TlsSettings()


@dataclass(frozen=True, slots=True)
class Shares:
    """What connections to all servers share. ``turns`` are those of requests, owner by owner."""

    turns: Turns
    allowance: Allowance

    @classmethod
    def of(cls, descriptors: int) -> Shares:
        """Those of a process that may have so many file descriptors."""
        limit = max(1, min(MAX_SHARED_CONNECTIONS, descriptors // DESCRIPTORS_EACH))
        lendable = limit // 8
        return cls(Turns(limit - lendable, lendable), Allowance(limit))


class Connections:
    """Those to one server, at most ``limit``: kept alive, remade when TLS files change.

    ``tls`` is for the server, ``proxy_tls`` for an ``https`` proxy on the way to it: that is the operator's, whatever a
    class says. ``shares`` is None for the daemon's own Vault, whose connections are its own.
    """

    def __init__(
        self,
        place: Place,
        tls: TlsSettings,
        *,
        clock: Clock,
        proxy: str,
        proxy_tls: TlsSettings,
        lookups: Lookups,
        limit: int,
        shares: Shares | None,
    ) -> None:
        self._place = place
        self._clock = clock
        self._limit = limit
        self._lookups = lookups
        self._allowance = shares.allowance if shares else Allowance(limit)
        lendable = min(LENDABLE_CONNECTIONS, limit // 8)
        self.reads = Turns(max(1, limit - RESERVED_CONNECTIONS - lendable), lendable)
        """Where reads take turns, owner by owner: at all connections but RESERVED_CONNECTIONS and
        LENDABLE_CONNECTIONS."""
        shared = (shares.turns,) if shares else ()
        self.turns_of_reads = (self.reads, *shared)
        """What a read holds while it is under way, in this order."""
        self.turns_of_others = shared
        """What any other request holds."""
        self._server_name = tls.server_name
        self._proxy = ""
        if not place.socket_path:
            self._proxy = proxy or proxy_from_environment(place.scheme, place.host, place.port)
        # Of the server, and of the proxy; None where there is no TLS.
        self._tls = (tls if place.secure else None, proxy_tls if is_secure(self._proxy) else None)
        self._needs_tls = any(self._tls)
        self._expected = 0
        self._pool: Pool | None = None
        self._contexts: tuple[ssl.SSLContext | None, ...] = (None, None)
        self._marks: tuple[Fingerprint, ...] = ()
        self._checked_at = float("-inf")
        self._opening = asyncio.Lock()

    def expect(self, reads: int) -> None:
        """So many reads of one owner will follow the next request's answer, a login's: connect for them meanwhile."""
        self._expected = min(reads, self.reads.most)

    async def pool(self) -> Pool:
        """The connections as they are to be now. Raises VaultUnavailable where TLS files or the proxy are unusable."""
        pool = self._pool
        if pool is None or self._due_for_check():
            pool = await self._current()
        if self._expected:
            pool.expect(self._expected)
            self._expected = 0
        return pool

    async def another(self) -> Pool:
        """Connections of its own for whoever will close them. Raises what ``pool`` raises."""
        await self._current()
        return self._open(Allowance(1))

    def close(self) -> None:
        """Let go of the connections: idle ones now, each other one with its answer. A later request opens new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    async def _current(self) -> Pool:
        async with self._opening:
            if self._pool is not None and not self._due_for_check():
                return self._pool
            self._checked_at = self._clock.now()
            if not self._needs_tls:
                self._pool = self._pool or self._open(self._allowance)
                return self._pool
            marks = await asyncio.to_thread(self._look_at_files)
            if self._pool is not None and marks == self._marks:
                return self._pool
            try:
                contexts = await asyncio.to_thread(self._make_contexts)
            except VaultUnavailable as error:
                if self._pool is None:
                    self._checked_at = float("-inf")
                    raise
                # A file that is being replaced may be half there: what worked goes on working.
                _log.warning("TLS files for %s changed and cannot be used yet: %s", self._place, error.what)
                return self._pool
            old, self._contexts, self._marks = self._pool, contexts, marks
            self._pool = self._open(self._allowance)
            if old is not None:
                _log.info("TLS files for %s changed on disk; new connections use them", self._place)
                old.close()
            return self._pool

    def _due_for_check(self) -> bool:
        return self._needs_tls and self._clock.now() >= self._checked_at + TLS_CHECK_SECONDS

    def _look_at_files(self) -> tuple[Fingerprint, ...]:
        return tuple(fingerprint(tls) if tls else () for tls in self._tls)

    def _make_contexts(self) -> tuple[ssl.SSLContext | None, ...]:
        return tuple(make_context(tls) if tls else None for tls in self._tls)

    def _open(self, allowance: Allowance) -> Pool:
        place, (tls, proxy_tls) = self._place, self._contexts
        proxy = usable_proxy(self._proxy, proxy_tls) if self._proxy else None
        if proxy is not None:
            self._lookups.own(proxy.host)  # the operator's word, as the environment is
        origin = Origin(place.host or "localhost", place.port, tls, self._server_name, place.socket_path, proxy)
        return Pool(
            origin,
            lookups=self._lookups,
            limit=self._limit,
            connect_seconds=CONNECT_SECONDS,
            headers=_HEADERS,
            allowance=allowance,
        )
