"""The HTTP client's connections: how they come about, and that nothing that fails costs one of their places."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from provider.http import (
    Allowance,
    ConnectFailed,
    ExchangeBroken,
    HttpFailure,
    LookupFailed,
    Lookups,
    Origin,
    Pool,
    Proxy,
    ProxyFailed,
    Response,
    TlsFailed,
    lookups,
)
from provider.http.connection import Connection
from tests.stand.pki import Authority
from tests.stand.process import free_port
from tests.stand.wire import (
    OK,
    SECRET,
    Server,
    answering,
    assert_one_place,
    both_loops,
    get,
    on_loops,
    pool_of,
    serving,
    settle,
)

PASSWORD = "Basic Y2FuYXJ5OnBhc3N3b3Jk"  # what must be shown nowhere


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server_tls(authority: Authority, tmp_path: Path) -> ssl.SSLContext:
    """A server's, for loopback and vault.internal."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = ("127.0.0.1", "localhost", "vault.internal")
    context.load_cert_chain(*authority.server(names).write(tmp_path, "server"))
    return context


@pytest.fixture
def client_tls(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())


@pytest.fixture
def stranger() -> ssl.SSLContext:
    """A client that trusts another authority."""
    return ssl.create_default_context(cadata=Authority("other").pem.decode())


@pytest.fixture(scope="module")
def loops_own() -> None:
    """What uvloop opens once, and keeps."""
    uvloop.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def no_file_left(loops_own: None) -> Iterator[None]:
    """No socket stays open."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


@contextlib.asynccontextmanager
async def proxying(
    to: int, *answers: bytes, tls: ssl.SSLContext | None = None, behind: bytes = b""
) -> AsyncIterator[Server]:
    """A proxy that leads every CONNECT to a loopback port, but answers its first with ``answers`` and closes.

    ``behind`` is sent in one packet with what it says of its success.
    """
    server = Server()
    left = list(answers)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        if left:
            writer.write(left.pop(0))
            await writer.drain()
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", to)
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n" + behind)
            await asyncio.gather(pump(reader, back), pump(there, writer))
        finally:
            if not back.is_closing():
                back.transport.abort()

    async with serving(serve, server, tls) as running:
        yield running


@both_loops
class TestSilence:
    async def test_the_kernel_looks_for_peers_that_are_gone(self) -> None:
        """An idle connection within 25 s, and so long one whose peer acknowledges nothing."""
        async with answering() as server:
            pool = pool_of(server.port)
            await get(pool)
            (connection,) = pool._live
            assert connection._transport is not None
            held = connection._transport.get_extra_info("socket")
            options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            idle, between, tries, unacknowledged = (
                held.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options
            )
            assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert idle + between * tries <= 25
            assert unacknowledged == 25_000


@both_loops
class TestExpecting:
    """Connections that are opened while the request before those they are for is under way."""

    async def test_they_are_there_when_they_are_needed(self) -> None:
        """The first answer comes only once all connections are there; those that are asked for next open none more."""
        server = Server()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                if "/login" in await server.request(reader):
                    async with asyncio.timeout(10):
                        while server.accepted < 5:  # noqa: ASYNC110  # the event loop tells nobody
                            await asyncio.sleep(0.001)
                writer.write(OK)

        async with serving(serve, server):
            pool = pool_of(server.port, limit=64)
            pool.expect(5)
            await get(pool, "/login")
            await asyncio.gather(*(get(pool) for _ in range(5)))
            assert server.accepted == 5
            # It was for that request alone.
            await get(pool, "/login")
            assert server.accepted == 5

    async def test_who_comes_before_them_waits_for_them(self) -> None:
        """Where the answer is faster than they are, nobody opens one more beside those that are on their way."""
        async with answering() as server:
            pool = pool_of(server.port, limit=64)
            pool.expect(5)
            await get(pool)
            await asyncio.gather(*(get(pool) for _ in range(5)))
            assert server.accepted == 5

    async def test_never_more_than_there_may_be(self) -> None:
        """The limit holds, and what is at rest or on its way already is not opened again."""
        async with answering() as server:
            pool = pool_of(server.port, limit=4)
            for _ in range(3):
                pool.expect(50)
                await asyncio.gather(*(get(pool) for _ in range(20)))
            assert (server.accepted, server.peak) == (4, 4)

    async def test_a_server_that_takes_no_more_is_asked_for_no_more(self) -> None:
        """Those that do not come about leave their places; who waited for one connects, and is told what is wrong."""
        async with answering() as server:
            pool = pool_of(server.port, limit=3)
            await get(pool)
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            listener.close()
            pool._origin = Origin("127.0.0.1", port)
            pool.expect(3)
            answers = await asyncio.gather(*(get(pool) for _ in range(4)), return_exceptions=True)
            assert isinstance(answers[0], Response)
            assert {type(answer) for answer in answers} == {Response, ConnectFailed}
            pool._origin = Origin("127.0.0.1", server.port)
            await asyncio.gather(*(get(pool) for _ in range(6)))
            assert (server.peak, pool._arriving) == (3, 0)

    async def test_closed_meanwhile(self) -> None:
        """What comes about after the pool was let go of is closed, and the pool serves on."""
        async with answering() as server:
            pool = pool_of(server.port, limit=3)
            pool.expect(3)
            first = asyncio.create_task(get(pool))
            while not server.heads:  # noqa: ASYNC110  # the event loop tells nobody
                await asyncio.sleep(0)
            pool.close()
            await first
            for response in await asyncio.gather(*(get(pool) for _ in range(6))):
                assert response.status == 200
            await settle()
            assert pool._open == 0


@both_loops
class TestPlaces:
    @pytest.mark.parametrize("way", ["plain", "tls", "tunnel", "addresses"])
    async def test_cancelled_at_any_moment(
        self,
        way: str,
        server_tls: ssl.SSLContext,
        client_tls: ssl.SSLContext,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whenever whoever asks gives up, its place is given back, once, and its sockets are closed."""
        await self._cancel_at_any_moment(way, server_tls, client_tls, monkeypatch)

    async def _at_any_moment_within_tls(
        self, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same by way of a proxy that is spoken to over TLS."""
        await self._cancel_at_any_moment("tls in tls", server_tls, client_tls, monkeypatch)

    # On the daemon's event loop alone: asyncio of Python 3.11 fails in closing TLS within TLS.
    test_cancelled_at_any_moment_within_tls = on_loops(_at_any_moment_within_tls, "uvloop")

    async def _cancel_at_any_moment(
        self, way: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if way == "addresses":
            monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.0.2", "127.0.0.1"))
        async with (
            answering(tls=None if way in ("plain", "addresses") else server_tls) as server,
            proxying(server.port, tls=server_tls if way == "tls in tls" else None) as proxy,
        ):
            origin: dict[str, Any] = {}
            if way not in ("plain", "addresses"):
                origin["tls"] = client_tls
            if way in ("tunnel", "tls in tls"):
                origin["proxy"] = Proxy("127.0.0.1", proxy.port, client_tls if way == "tls in tls" else None)
            pool = pool_of(server.port, host="many.test" if way == "addresses" else "127.0.0.1", **origin)
            moment = whole = 0
            while whole < 3:  # until it is done before it is cancelled
                asked = asyncio.create_task(get(pool))
                for _ in range(moment):
                    await asyncio.sleep(0)
                if asked.done():
                    whole += 1
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asked
                # What is under way closes by and by; the next comes at once.
                assert (await get(pool)).whole
                if moment % 2:  # half of the requests find no connection at rest
                    pool.close()
                moment += 1
            await assert_one_place(pool, server)
            pool.close()
            await settle()

    async def test_cancelled_while_waiting(self) -> None:
        """Whoever waits for a place and gives up takes none, and those behind have their turns."""
        async with answering() as server:
            pool = pool_of(server.port)
            for moment in range(12):
                asked = [asyncio.create_task(get(pool)) for _ in range(4)]
                for _ in range(moment):
                    await asyncio.sleep(0)
                asked[1].cancel()
                asked[2].cancel()
                done = await asyncio.gather(*asked, return_exceptions=True)
                assert isinstance(done[0], Response)
                assert isinstance(done[3], Response)
            await assert_one_place(pool, server)
            pool.close()

    @pytest.mark.parametrize("answer", [OK, b"junk"])
    async def test_cancelled_when_it_has_its_turn(self, answer: bytes) -> None:
        """A connection, or the place of one that is gone, is passed on by whoever was given it and gave up."""

        async def give_up(moment: int) -> None:
            with contextlib.suppress(ExchangeBroken):
                await get(pool)
            for _ in range(moment):
                await asyncio.sleep(0)
            second.cancel()

        for moment in range(8):
            async with answering(answer) as server:
                pool = pool_of(server.port)
                first = asyncio.create_task(give_up(moment))
                await asyncio.sleep(0)
                second, third = (asyncio.create_task(get(pool)) for _ in range(2))
                done = await asyncio.gather(first, second, third, return_exceptions=True)
                assert isinstance(done[1], asyncio.CancelledError) or moment
                assert isinstance(done[2], Response)
                await assert_one_place(pool, server)
                pool.close()

    async def test_spoiled_while_it_is_handed_on(self) -> None:
        """A connection to which something came unasked is nobody's, be it at rest or on its way to the next."""
        async with answering() as server:
            pool = pool_of(server.port)
            spoilt = (await get(pool))._connection
            spoilt.data_received(OK)
            assert (await get(pool)).whole
            assert server.accepted == 2

            async def spoil() -> None:
                (await get(pool))._connection.data_received(OK)

            await asyncio.gather(spoil(), get(pool))
            assert server.accepted == 3
            await assert_one_place(pool, server)
            pool.close()

    @pytest.mark.parametrize("way", ["plain", "tls", "tunnel"])
    async def test_server_that_speaks_first(
        self, way: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
    ) -> None:
        """Whether it is noticed before the request is sent or after, what is said unasked fails, and costs no place."""

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if server.accepted > 40:
                await rightly(_, writer)
            writer.write(b"SSH-2.0-OpenSSH_9\r\n")
            if server.accepted % 2:
                await asyncio.sleep(0.01)

        async def rightly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await server.request(reader)
                writer.write(OK)

        server_tls.maximum_version = ssl.TLSVersion.TLSv1_2  # there the server's word is the handshake's last
        tls = None if way == "plain" else server_tls
        async with serving(serve, server := Server(), tls), proxying(server.port) as proxy:
            through = Proxy("127.0.0.1", proxy.port) if way == "tunnel" else None
            pool = pool_of(server.port, tls=client_tls if tls else None, proxy=through)
            for _ in range(40):
                with pytest.raises((ConnectFailed, ExchangeBroken)):
                    await get(pool)
            assert (await get(pool)).whole
            pool.close()
            await settle()

    async def test_cancelled_when_the_answer_is_there(self) -> None:
        """An answer that comes as its asker gives up leaves the connection whole, to whoever has it by then."""
        others: list[asyncio.Task[Response]] = []

        def at_rest(connection: Connection) -> None:
            if not others:
                others.append(asyncio.create_task(connection.exchange(b"GET /2 HTTP/1.1\r\n\r\n", 10)))
                asked.cancel()

        async with answering() as server:
            connection = Connection(at_rest, lambda _: None)
            await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", server.port)
            asked = asyncio.create_task(connection.exchange(b"GET /1 HTTP/1.1\r\n\r\n", 10))
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert bytes((await others[0]).body) == b"ok"
            connection.abort()
            await settle()

    @pytest.mark.parametrize("end", [True, False])
    @pytest.mark.parametrize("answer", [b"", b"junk", OK[:30], OK + OK])
    async def test_failed_exchange(self, answer: bytes, end: bool) -> None:
        """A connection that fails is no more, and its place is the next one's, who may have waited for it."""
        async with answering(*[answer] * 3, end=end) as server:
            pool = pool_of(server.port)
            for _ in range(2):
                asked = [asyncio.create_task(get(pool)) for _ in range(3)]
                await asyncio.sleep(0.05)
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
            await get_until_it_answers(pool)
            await assert_one_place(pool, server)
            pool.close()

    async def test_idle_connection_goes_away(self) -> None:
        """A connection that the server closes while nothing is under way is not used again, and its place is free."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(OK)
            await asyncio.sleep(0.02)

        async with serving(serve, server := Server()):
            pool = pool_of(server.port)
            for accepted in (1, 2, 3):
                await get(pool)
                assert server.accepted == accepted
                await asyncio.sleep(0.2)
            pool.close()

    async def test_refused(self) -> None:
        """A server that takes no connection costs no place."""
        port = free_port()
        pool = pool_of(port)
        for _ in range(2):
            for done in await asyncio.gather(get(pool), get(pool), get(pool), return_exceptions=True):
                assert isinstance(done, ConnectFailed)
                assert str(done) == "Connection refused"
        async with answering(port=port) as server:
            await assert_one_place(pool, server)
            pool.close()

    async def test_late(self) -> None:
        """A connection that does not come about in time is given up, with its socket."""
        silent = socket.create_server(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        pool = pool_of(port, seconds=0.1, tls=ssl.create_default_context())
        for _ in range(2):
            for done in await asyncio.gather(get(pool), get(pool), return_exceptions=True):
                assert isinstance(done, ConnectFailed)
                assert str(done) == "no connection in 0.1 s"
        await settle()
        silent.close()

    async def test_tls_that_fails(self, server_tls: ssl.SSLContext, stranger: ssl.SSLContext) -> None:
        """A handshake that fails costs no place."""
        async with answering(tls=server_tls) as server:
            pool = pool_of(server.port, tls=stranger)
            for _ in range(3):
                with pytest.raises(TlsFailed, match=r"unable to get local issuer certificate"):
                    await get(pool)
            assert server.heads == []
            await settle()

    @pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\0\x02\x02\x28"])
    async def test_end_of_the_handshake(self, greeting: bytes, client_tls: ssl.SSLContext) -> None:
        """A server that ends the handshake, in whatever way, is a failure to connect."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(greeting)
            await writer.drain()
            writer.write_eof()
            await reader.read()

        async with serving(serve, server := Server()):
            pool = pool_of(server.port, tls=client_tls)
            for _ in range(3):
                with pytest.raises((ConnectFailed, TlsFailed)):
                    await get(pool)
            assert server.accepted == 3
            await settle()

    @pytest.mark.parametrize("name", ["a..b", ".b", "x" * 64, "bücher..x"])
    @pytest.mark.parametrize("tunnel", [False, True])
    async def test_name_that_no_certificate_can_have(
        self, name: str, tunnel: bool, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
    ) -> None:
        """A server's name that TLS cannot even ask for is a failure of TLS, and leaves no socket."""
        async with answering(tls=server_tls) as server, proxying(server.port) as proxy:
            way = Proxy("127.0.0.1", proxy.port) if tunnel else None
            pool = pool_of(server.port, tls=client_tls, server_name=name, proxy=way)
            for _ in range(3):
                with pytest.raises(TlsFailed, match=r"no certificate can be for its name"):
                    await get(pool)
            assert (server.accepted, proxy.accepted) == (0, 0)
            await settle()

    async def test_closed_pool(self) -> None:
        """A closed pool lets each connection go with its answer, and opens new ones for whoever still asks."""
        async with answering() as server:
            pool = pool_of(server.port)
            asked = asyncio.create_task(get(pool))
            await asyncio.sleep(0)
            pool.close()
            assert (await asked).whole
            assert (await get(pool)).whole
            assert server.accepted == 2
            await settle()

    async def test_bound(self) -> None:
        """There are never more connections than the limit, and as many as that."""
        async with answering() as server:
            pool = pool_of(server.port, limit=5)
            await asyncio.gather(*(get(pool) for _ in range(40)))
            assert (server.accepted, server.peak) == (5, 5)
            pool.close()


async def get_until_it_answers(pool: Pool) -> None:
    """Read until nothing is wrong any more."""
    for _ in range(20):
        with contextlib.suppress(HttpFailure, TimeoutError):
            await asyncio.wait_for(get(pool), 0.2)
            return
    pytest.fail("it never answered")


def addresses(*hosts: str) -> Callable[..., list[tuple[Any, ...]]]:
    """A resolver that knows these addresses of every name."""
    return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]


@both_loops
class TestWays:
    async def test_next_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An address that refuses, and one that does not answer, do not keep from the one that does."""
        async with answering() as server:
            hung = socket.socket()
            hung.bind(("127.0.0.3", server.port))
            hung.listen(0)
            fill = [socket.socket() for _ in range(4)]
            for one in fill:
                one.setblocking(False)
                one.connect_ex(("127.0.0.3", server.port))
            for hosts in (("127.0.0.2", "127.0.0.1"), ("127.0.0.3", "127.0.0.1"), ("127.0.0.3", "127.0.0.2")):
                monkeypatch.setattr(socket, "getaddrinfo", addresses(*hosts))
                pool = pool_of(server.port, host="many.test", seconds=2)
                if "127.0.0.1" in hosts:
                    await assert_one_place(pool, server)
                else:
                    with pytest.raises(ConnectFailed):
                        await get(pool)
                pool.close()
            for one in (*fill, hung):
                one.close()
            await settle()

    @pytest.mark.parametrize(
        ("host", "sent"),
        [
            ("bücher.test", "xn--bcher-kva.test:{port}"),
            ("vault.test", "vault.test:{port}"),
            ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]:{port}"),
        ],
    )
    async def test_host_header(self, host: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host is told as HTTP writes it: in ASCII, an IPv6 address in brackets, the port where it is special."""
        async with answering() as server:
            if ":" not in host:
                monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.0.1"))
            pool = pool_of(server.port, host=host)
            await get(pool)
            assert f"Host: {sent.format(port=server.port)}\r\n" in server.heads[0]
            pool.close()

    @pytest.mark.parametrize(("tls", "port", "sent"), [(False, 80, "v"), (True, 443, "v"), (False, 443, "v:443")])
    async def test_port_of_the_scheme(self, tls: bool, port: int, sent: str) -> None:
        """The scheme's own port is not told."""
        assert Origin("v", port, ssl.create_default_context() if tls else None).authority == sent

    @pytest.mark.parametrize("name", ["a" * 300, ".".join(["a" * 60] * 6)])
    async def test_name_that_no_certificate_can_be_for(self, name: str, client_tls: ssl.SSLContext) -> None:
        """A name that TLS cannot send is a failure of TLS, before anything is sent."""
        for pool in (pool_of(1, tls=client_tls, server_name=name), pool_of(1, tls=client_tls, host=name)):
            with pytest.raises(TlsFailed, match=r"no certificate can be for its name"):
                await get(pool)

    @pytest.mark.parametrize("host", ["é..b", "a..b", "x" * 64, "é" * 70])
    async def test_host_that_is_no_name(self, host: str) -> None:
        """What no resolver can be asked for is told as a failure to look it up."""
        with pytest.raises(LookupFailed, match=r"no host name"):
            await get(pool_of(1, host=host))

    async def test_unix_socket(self, tmp_path: Path) -> None:
        """A server's socket of this machine; one that is not there, or cannot be, is a failure to connect."""
        server = Server()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(OK)
            await reader.read()
            writer.close()

        path = str(tmp_path / "s")
        listener = await asyncio.start_unix_server(accept, path)
        pool = pool_of(80, host="localhost", socket_path=path)
        await get(pool)
        assert "Host: localhost\r\n" in server.heads[0]
        pool.close()
        listener.close()
        for wrong in (f"{tmp_path}/none", str(tmp_path), f"{tmp_path}/{'x' * 200}", "/a\0b", "/a\ud800"):
            pool = pool_of(80, host="localhost", socket_path=wrong)
            for _ in range(2):
                with pytest.raises(ConnectFailed):
                    await get(pool)
        await settle()


@both_loops
class TestProxies:
    async def test_plain(self) -> None:
        """Of a plain server the proxy is told the whole URL, and the password; CONNECT is not asked."""
        async with answering() as server:
            pool = pool_of(8200, host="vault.internal", proxy=Proxy("127.0.0.1", server.port, None, PASSWORD))
            await assert_one_place(pool, server)
            assert server.heads[0].startswith(
                "GET http://vault.internal:8200/x HTTP/1.1\r\nHost: vault.internal:8200\r\n"
            )
            assert f"\r\nProxy-Authorization: {PASSWORD}\r\n" in server.heads[0]
            pool.close()

    @pytest.mark.parametrize("secure", [False, True])
    @pytest.mark.parametrize(("host", "told"), [("vault.internal", "vault.internal:8200"), ("::1", "[::1]:8200")])
    async def test_tunnel(
        self, secure: bool, host: str, told: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
    ) -> None:
        """Through the tunnel goes TLS with the server itself, within the proxy's own if it has that."""
        async with (
            answering(tls=server_tls) as server,
            proxying(server.port, tls=server_tls if secure else None) as proxy,
        ):
            way = Proxy("127.0.0.1", proxy.port, client_tls if secure else None, PASSWORD)
            pool = pool_of(8200, host=host, tls=client_tls, server_name="vault.internal", proxy=way)
            await assert_one_place(pool, server)
            assert proxy.heads == [
                f"CONNECT {told} HTTP/1.1\r\nHost: {told}\r\nProxy-Authorization: {PASSWORD}\r\n\r\n"
            ]
            assert not any("Proxy-Authorization" in head for head in server.heads)
            assert SECRET not in proxy.heads[0]
            pool.close()
            await settle()

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (b"", "it closed the connection"),
            (b"SSH-2.0-OpenSSH_9\r\n", "what it sent is not HTTP"),
            (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "it answered 407"),
            (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n" + b"x" * 1_000_000, "it answered 407"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "it answered more than it was asked"),
            (b"HTTP/1.1 200 OK\r\n\r\nabc", "it answered more than it was asked"),
            (b"HTTP/1.1 101 Switching\r\n\r\n", "what it sent is not HTTP"),
        ],
    )
    async def test_refusal(
        self, answer: bytes, said: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
    ) -> None:
        """A proxy that does not lead on is a failure of its own, told without its password, and costs no place."""
        async with answering(tls=server_tls) as server, proxying(server.port, answer, answer) as proxy:
            pool = pool_of(server.port, tls=client_tls, proxy=Proxy("127.0.0.1", proxy.port, None, PASSWORD))
            for _ in range(2):
                with pytest.raises(ProxyFailed) as told:
                    await get(pool)
                assert str(told.value) == said
                assert PASSWORD not in "".join(traceback.format_exception(told.value))
            await assert_one_place(pool, server)
            pool.close()
            await settle()

    @pytest.mark.parametrize("headers", [b"Content-Length: 0\r\n", b"Content-Length: 7\r\n", b"Connection: close\r\n"])
    async def test_length_of_a_tunnel(
        self, headers: bytes, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
    ) -> None:
        """A length in the answer that opens the tunnel means nothing (RFC 9110 section 9.3.6)."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n")
            await writer.start_tls(server_tls)
            await server.request(reader)
            writer.write(OK)
            await reader.read()

        async with serving(serve, server := Server()):
            pool = pool_of(8200, host="vault.internal", tls=client_tls, proxy=Proxy("127.0.0.1", server.port))
            assert (await get(pool)).body == b"ok"
            pool.close()
            await settle()

    async def test_tls_of_the_proxy_fails(
        self, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, stranger: ssl.SSLContext
    ) -> None:
        """A proxy whose certificate nobody vouches for is told as what failed; it is not asked for anything."""
        async with answering(tls=server_tls) as server, proxying(server.port, tls=server_tls) as proxy:
            for tls in (client_tls, None):
                pool = pool_of(server.port, tls=tls, proxy=Proxy("127.0.0.1", proxy.port, stranger, PASSWORD))
                with pytest.raises(TlsFailed, match=r"at the proxy: .*certificate"):
                    await get(pool)
            assert proxy.heads == []
            await settle()

    async def test_proxy_is_away(self, client_tls: ssl.SSLContext) -> None:
        """No connection to the proxy, or no name of it, is the proxy's failure."""
        for host in ("127.0.0.1", "a..b"):
            for tls in (client_tls, None):
                pool = pool_of(8200, host="vault.internal", tls=tls, proxy=Proxy(host, free_port()))
                with pytest.raises(ProxyFailed):
                    await get(pool)

    async def test_shows_no_password(self) -> None:
        """A proxy's password is in no representation of it."""
        assert PASSWORD not in repr(Origin("v", 1, proxy=Proxy("p", 1, None, PASSWORD)))


@both_loops
class TestSending:
    @pytest.mark.parametrize("bad", ["\r", "\n", "\0", "a\r\nX-Vault-Token: b"])
    async def test_injection(self, bad: str) -> None:
        """A line break in a header, its name, the method or the path is refused, nothing is sent, no place is taken."""
        async with answering() as server:
            pool = pool_of(server.port)
            for method, path, headers in (
                ("GET", "/x", {"X-A": f"a{bad}b"}),
                ("GET", "/x", {f"X-A{bad}": "a"}),
                ("GET", f"/x{bad}", {}),
                (f"GET{bad}", "/x", {}),
                ("GET", "/x y", {}),
            ):
                with pytest.raises(ValueError, match=r"has a line break"):
                    await pool.request(method, path, headers, limit=10)
            with pytest.raises(ValueError, match=r"has a line break"):
                pool_of(server.port, host=f"v{bad}")
            with pytest.raises(ValueError, match=r"has a line break"):
                Pool(Origin("v", 1), lookups=Lookups(), limit=1, connect_seconds=1, headers={"X-Vault-Namespace": bad})
            assert server.accepted == 0
            await assert_one_place(pool, server)
            pool.close()

    async def test_sent_once(self) -> None:
        """What goes out is one request, whole, and never again, whatever becomes of it."""
        async with answering(OK, b"", end=False) as server:
            pool = pool_of(server.port)
            await pool.request("PUT", "/x?y=z", {"X-A": "b"}, b'{"a": 1}', limit=10)
            assert server.heads[0].splitlines()[0] == "PUT /x?y=z HTTP/1.1"
            assert "\r\nX-A: b\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n" in server.heads[0]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.request("DELETE", "/x", {}, limit=10), 0.1)
            assert server.heads[1].endswith("\r\nContent-Length: 0\r\n\r\n")
            await asyncio.sleep(0.1)
            assert len(server.heads) == 2
            pool.close()

    async def test_leaves_no_garbage(self) -> None:
        """Neither an answer nor a failure leaves a ring of references, which would wait for a collection with a token
        in it."""
        async with answering(OK, b"junk", OK[:30]) as server:
            pool = pool_of(server.port)
            gc.collect()
            gc.disable()
            try:
                assert (await get(pool)).whole
                broken = await failing(pool)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(get(pool), 0.1)
                pool.close()
                await settle()
                assert broken() is None
                kinds = (Connection, Response, HttpFailure)
                assert [left for left in gc.get_objects() if isinstance(left, kinds)] == []
                refused = await failing(pool_of(free_port()))
                assert refused() is None
            finally:
                gc.enable()


@both_loops
class TestAllowance:
    """Several pools that have so many connections together."""

    async def test_what_rests_makes_room(self) -> None:
        """A connection too many closes the one that has rested for longest, in whichever pool, and no other."""
        async with answering() as first, answering() as second:
            allowance = Allowance(3)
            one, other = (pool_of(server.port, limit=3, allowance=allowance) for server in (first, second))
            await asyncio.gather(*(get(one) for _ in range(3)))
            await asyncio.gather(*(get(other) for _ in range(2)))
            assert (first.accepted, second.accepted, allowance.spare) == (3, 2, 0)
            await settle()
            assert allowance.spare == 0
            await get(one)
            await get(other)
            assert (first.accepted, second.accepted) == (3, 2)  # one of each is there still
            await asyncio.gather(*(get(one) for _ in range(3)))
            assert first.accepted == 5
            one.close()
            other.close()
            await settle()
            assert allowance.spare == 3

    async def test_none_is_opened_ahead_beyond_it(self) -> None:
        """What is expected is no reason to close what rests, nor to have more than there may be."""
        async with answering() as server:
            allowance = Allowance(4)
            pool = pool_of(server.port, limit=64, allowance=allowance)
            pool.expect(50)
            await get(pool)
            await settle()
            assert server.accepted == 4
            assert allowance.spare == 0
            pool.close()
            await settle()


class Resolver:
    """A system's resolver that a test holds up: names that begin with ``hang`` are answered when it says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.hangs = "hang"
        monkeypatch.setattr(socket, "getaddrinfo", self._ask)

    def _ask(self, host: str, *_: object, **__: object) -> list[Any]:
        self.asked.append(host)
        if host.startswith(self.hangs):
            self.go_on.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", 0)) for number in range(1, 101)]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    opened = Resolver(monkeypatch)
    yield opened
    opened.go_on.set()


class TestNames:
    async def test_own_names_wait_for_nobody(self, resolver: Resolver) -> None:
        """While names that hang take every place, a name of the operator's is found, one that was never found too."""
        names = Lookups(["vault.test"])
        hung = [asyncio.create_task(names.find(f"hang-{number}", 1)) for number in range(100)]
        await settle()
        assert len(resolver.asked) == lookups.MAX_LOOKUPS == 32
        async with asyncio.timeout(4):
            assert (await names.find("vault.test", 8200))[0][4] == ("127.0.0.1", 8200)
            names.own("proxy.test")
            await names.find("proxy.test", 1)
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)

    async def test_nobody_waits_behind_who_has_left(self, resolver: Resolver) -> None:
        """Names whose askers have gone are not asked for: who comes later has the first place that is free."""
        names = Lookups()
        hung = [asyncio.create_task(names.find(f"hang-{number}", 1)) for number in range(200)]
        await settle()
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        later = asyncio.create_task(names.find("vault.test", 1))
        again = asyncio.create_task(names.find("hang-150", 1))  # its asker is a new one
        await settle()
        resolver.go_on.set()
        await later
        with pytest.raises(socket.gaierror, match="no name server"):
            await again
        assert len(resolver.asked) == 32 + 2

    async def test_those_that_wait_are_bounded(self, resolver: Resolver) -> None:
        """Past 512 names another is refused at once, unless it is the operator's or was found before."""
        names = Lookups(["vault.test"])
        await names.find("known.test", 1)
        hung = [asyncio.create_task(names.find(f"hang-{number}", 1)) for number in range(lookups.MAX_ASKED)]
        await settle()
        with pytest.raises(socket.gaierror, match="too many other names"):
            await names.find("other.test", 1)
        for host in ("vault.test", "known.test"):
            await names.find(host, 1)
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)

    async def test_stale_addresses_serve_while_news_hangs(
        self, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A name that was found keeps its addresses while asking anew hangs, for a while, and only the first waits."""
        monkeypatch.setattr(lookups, "KEPT_SECONDS", 0.0)
        monkeypatch.setattr(lookups, "LOOKUP_SECONDS", 0.3)
        monkeypatch.setattr(lookups, "REFRESH_SECONDS", 0.2)
        names = Lookups()
        await names.find("vault.test", 1)
        resolver.hangs = "vault"
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(50):
            assert (await names.find("vault.test", 1))[0][4] == ("127.0.0.1", 1)
        assert loop.time() - began < 5  # and not fifty times 0.2 s
        assert resolver.asked == ["vault.test"] * 2
        monkeypatch.setattr(lookups, "STALE_SECONDS", 0.0)
        with pytest.raises(socket.gaierror, match="no answer in"):
            await names.find("vault.test", 1)

    async def test_own_names_are_not_forgotten_for_others(
        self, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many names classes make up, one of the operator's is not asked for again because of them."""
        monkeypatch.setattr(lookups, "MAX_NAMES", 3)
        names = Lookups(["vault.test"])
        for host in ("vault.test", "a", "b", "c", "d", "vault.test", "b", "a"):
            await names.find(host, 1)
        assert resolver.asked == ["vault.test", "a", "b", "c", "d", "a"]

    async def test_addresses_of_a_name_are_bounded(self, resolver: Resolver) -> None:
        """Of a name with a hundred addresses the first eight are used: each may be a socket."""
        found = await Lookups().find("many.test", 1)
        assert [place[0] for *_, place in found] == [f"127.0.0.{number}" for number in range(1, 9)]


async def failing(pool: Pool) -> weakref.ref[HttpFailure]:
    """How a request failed, for as long as it is referred to."""
    try:
        await get(pool)
    except HttpFailure as error:
        return weakref.ref(error)
    pytest.fail("it answered")


async def test_addresses_are_used_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is asked of the system once in KEPT_SECONDS, whatever the port; then again."""
    asked: list[str] = []

    def ask(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    kept = Lookups()
    found = [await kept.find("vault.test", port) for port in (1, 2)]
    assert [address[0][4] for address in found] == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert asked == ["vault.test"]
    monkeypatch.setattr(lookups, "KEPT_SECONDS", 0.0)
    again = Lookups()
    for _ in range(2):
        await again.find("vault.test", 1)
    assert len(asked) == 3
