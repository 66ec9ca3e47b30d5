"""What aiohttp leaves unbounded before an answer, bounded: the look-up of a name, and informational messages."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Final

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage

# The system's resolver may try for half a minute; a mount has better uses for its time, and kubelet tries again.
LOOKUP_SECONDS: Final = 5.0
# How long the addresses of a name are used again: what a failover by DNS takes anyway.
DNS_CACHE_SECONDS: Final = 30
# Vault sends no 1xx at all, a proxy perhaps one or two before an answer.
MAX_INFORMATIONAL: Final = 10


class BoundedResolver(aiohttp.ThreadedResolver):
    """The system's resolver, for LOOKUP_SECONDS at most. Raises OSError, in our words where time was up."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host``."""
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return await super().resolve(host, port, family)
        except TimeoutError as error:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer in {LOOKUP_SECONDS:g} s") from error
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error


def bound(connector: aiohttp.BaseConnector) -> None:
    """Make each new connection of ``connector`` one that fails after MAX_INFORMATIONAL informational messages.

    aiohttp reads on until an answer comes, and does nothing else while more messages have arrived already.
    There is no public way to give a connector its protocol; a test floods one, so that a release that renames this
    attribute is noticed.
    """
    connector._factory = functools.partial(_make_handler, loop=asyncio.get_running_loop())


def _make_handler(loop: asyncio.AbstractEventLoop) -> ResponseHandler:
    return _BoundedHandler(loop)


class _BoundedHandler(ResponseHandler):
    async def read(self) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
        for _ in range(MAX_INFORMATIONAL + 1):
            message, payload = await super().read()
            if not 100 <= message.code < 200 or message.code == 101:
                return message, payload
        raise HttpProcessingError(message="too many informational messages")
