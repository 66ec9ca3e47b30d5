"""The Vaults that are asked: which connections lead to each, and who watches over it, however many classes name."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from weakref import WeakValueDictionary

from provider.clock import Clock
from provider.http import Lookups
from provider.settings import MAX_CONNECTIONS, MAX_POOLS, Settings, TlsSettings
from provider.spc import VaultServer
from provider.spc.addresses import AllowedAddresses
from provider.telemetry.events import Telemetry
from provider.turns import Turns
from provider.vault.client import Vault
from provider.vault.connections import (
    DESCRIPTORS_OF_LOOK,
    DESCRIPTORS_OF_OWN,
    MANY_DESCRIPTORS,
    MAX_LOOKS,
    Connections,
    Place,
    Shares,
    tls_of,
)
from provider.vault.looks import Looks
from provider.vault.redirects import followed
from provider.vault.transport import LARGE_BODIES, Transport
from provider.vault.watch import Watch


class VaultServers:
    """The Vaults in use: a transport for each *where*, and connections for each server.

    ``own`` is the daemon's own Vault, as its flags have it. Whatever classes name, its connections are its own; those
    to all others are a share of ``descriptors``, the files that this process may have open. Its TLS settings are the
    operator's, by which ``proxy`` is verified too.

    Past MAX_POOLS the least recently used lets its connections go; while anybody holds it, it is the one that ``get``
    gives, and opens new ones when it is asked again. ``allowed`` are the addresses that a redirect may lead to.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        proxy: str = "",
        max_connections: int = MAX_CONNECTIONS,
        telemetry: Telemetry | None = None,
        allowed: AllowedAddresses | None = None,
        own: VaultServer | None = None,
        descriptors: int = MANY_DESCRIPTORS,
    ) -> None:
        self._clock = clock
        self._allowed = allowed or AllowedAddresses(Settings())
        self._telemetry = telemetry or Telemetry()
        self._proxy = proxy
        self._own = own and self._key(own)
        self._proxy_tls = own.tls if own else TlsSettings()
        self._limit = max(1, min(max_connections, descriptors // DESCRIPTORS_OF_OWN))
        self._shares = Shares.of(descriptors)
        self._large_bodies, self._parsing = Turns(LARGE_BODIES), Turns(1)
        self._lookups = Lookups(self._allowed.hosts)
        self._looks = Looks(max(1, min(MAX_LOOKS, descriptors // DESCRIPTORS_OF_LOOK)))
        self._connections: WeakValueDictionary[tuple[Place, TlsSettings], Connections] = WeakValueDictionary()
        self._watches: WeakValueDictionary[VaultServer, Watch] = WeakValueDictionary()
        self._recent: OrderedDict[VaultServer, Transport] = OrderedDict()
        self._held: WeakValueDictionary[VaultServer, Transport] = WeakValueDictionary()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, server: VaultServer, owner: Hashable = None) -> Vault:
        """The client for ``server`` that a pod, the ``owner``, asks by.

        Its connections open at first use, and again after they were let go.
        """
        return Vault(self._transport(server), self._redirect, owner)

    async def close(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))  # first: looks open connections
        await asyncio.gather(*self._closing)
        for connections in self._connections.values():
            connections.close()
        self._recent.clear()

    def _transport(self, server: VaultServer) -> Transport:
        transport = self._held.get(server)
        if transport is None:
            transport = self._held[server] = Transport(
                server,
                self._connections_to(server),
                clock=self._clock,
                large_bodies=self._large_bodies,
                parsing=self._parsing,
                watch=self._watch(server),
                telemetry=self._telemetry,
            )
        self._recent[server] = transport
        self._recent.move_to_end(server)
        if len(self._recent) > MAX_POOLS:
            _, idle = self._recent.popitem(last=False)
            closing = asyncio.get_running_loop().create_task(self._let_go(idle))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return transport

    def _redirect(self, transport: Transport, location: str, path: str) -> Transport:
        """The transport that a redirect leads to: the same namespace and TLS settings elsewhere. Raises NotFollowed."""
        server = transport.server
        to = followed(location, server.address, path, self._allowed)
        return self._transport(server._replace(address=to, tls=self._allowed.tls_at(to, server.tls)))

    def _connections_to(self, server: VaultServer) -> Connections:
        """The connections to the server, whatever the namespace, and whatever is below its place."""
        key = self._key(server)
        connections = self._connections.get(key)
        if connections is None:
            connections = self._connections[key] = Connections(
                *key,
                clock=self._clock,
                proxy=self._proxy,
                proxy_tls=self._proxy_tls,
                lookups=self._lookups,
                limit=self._limit,
                shares=None if key == self._own else self._shares,
            )
        return connections

    def _watch(self, server: VaultServer) -> Watch:
        """The watch over the Vault that ``server`` is a namespace of.

        By how its TLS is verified too: who asks with a certificate that Vault refuses, or trusts another authority, may
        find nobody there while others do. All of them look in turn.
        """
        vault = server._replace(namespace="", tls=tls_of(server))
        watch = self._watches.get(vault)
        if watch is None:
            watch = self._watches[vault] = Watch(
                vault,
                clock=self._clock,
                telemetry=self._telemetry,
                looks=self._looks,
                queue=self._looks.at(Place.of(server.address)),
                own=self._key(server) == self._own,
            )
        return watch

    @staticmethod
    def _key(server: VaultServer) -> tuple[Place, TlsSettings]:
        return Place.of(server.address), tls_of(server)

    async def _let_go(self, idle: Transport) -> None:
        """Close what has not been used for longest; nobody looks any more at a Vault that only a class made up."""
        if not any(used.watch is idle.watch for used in self._recent.values()):
            await idle.watch.close()
        if not any(used.connections is idle.connections for used in self._recent.values()):
            idle.connections.close()
