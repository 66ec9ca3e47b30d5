"""Limits of docs/security.md that are reached here, since no other test of the part that keeps them does."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest

from provider.errors import InvalidClass
from provider.http import Proxy, ProxyFailed
from provider.server.server import MAX_REQUEST_BYTES
from provider.settings import MIB
from provider.v1alpha1 import service_pb2 as pb
from tests.spc_classes import parse_class
from tests.stand.wire import get, pool_of
from tests.test_server import PASSWORD, Mounting, refusal, serving


@pytest.mark.parametrize(("size", "code"), [(-MIB, "INVALID_ARGUMENT"), (MIB, "RESOURCE_EXHAUSTED")])
async def test_a_request_of_the_driver_is_bounded(tmp_path: Path, size: int, code: str) -> None:
    """What comes through the socket is read up to the limit; over it gRPC refuses it unread."""
    request = pb.MountRequest(attributes=" " * (MAX_REQUEST_BYTES + size), permission="420")
    async with serving(tmp_path / "s", Mounting(PASSWORD)) as stub:
        found, _ = await refusal(stub.Mount(request))
    # What is still being sent when it is refused may be cut off instead.
    assert found.name == code or (size > 0 and found.name == "UNAVAILABLE")


def test_a_duration_is_bounded() -> None:
    """The text of a duration has 64 characters at most, whatever it comes to."""
    assert parse_class(refreshAfter="1s" * 32).objects[0].refresh_after == 32
    with pytest.raises(InvalidClass, match="is not a duration"):
        parse_class(refreshAfter="1s" * 33)


async def test_a_proxys_answer_is_bounded() -> None:
    """What a proxy says instead of leading on is not read to its end, which may never come."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        proxy = Proxy("127.0.0.1", server.sockets[0].getsockname()[1], None, "")
        pool = pool_of(8200, host="vault.internal", tls=ssl.create_default_context(), proxy=proxy)
        with pytest.raises(ProxyFailed, match="it answered 407"):
            await get(pool)
        pool.close()
