"""The HTTP client: what it sends, what it takes for an answer, and that no failure costs one of its places."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import traceback
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from provider.http import (
    ConnectFailed,
    ExchangeBroken,
    HttpFailure,
    Response,
)
from provider.http.connection import MAX_FRAME_BYTES, MAX_HEADERS, MAX_INFORMATIONAL, Connection
from tests.stand.wire import (
    OK,
    SECRET,
    Server,
    answering,
    assert_one_place,
    both_loops,
    get,
    on_both_loops,
    pool_of,
    serving,
    settle,
)

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


async def turns() -> None:
    """Let the event loop do what is due, and see what has come."""
    for _ in range(10):
        await asyncio.sleep(0)


class Pair:
    """A connection of ours whose other end the test holds, so that it decides what comes in one piece."""

    def __init__(self, at_rest: Callable[[Connection], None] = lambda _: None) -> None:
        self.lost = 0
        self.connection = Connection(at_rest, self._lost)

    def _lost(self, _: Connection) -> None:
        self.lost += 1

    async def __aenter__(self) -> Pair:
        ours, self.end = socket.socketpair()
        self.end.setblocking(False)
        self.transport, _ = await asyncio.get_running_loop().create_connection(lambda: self.connection, sock=ours)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.connection.abort()
        await turns()
        self.end.close()

    async def send(self, *pieces: bytes) -> None:
        """Send each in a packet of its own, if they are still wanted."""
        for piece in pieces:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self.end, piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def exchange(self, *pieces: bytes, end: bool = False, limit: int = 1_000_000) -> Response:
        async with asyncio.timeout(20):
            asked = asyncio.create_task(self.connection.exchange(b"GET / HTTP/1.1\r\n\r\n", limit))
            await asyncio.sleep(0)
            await self.send(*pieces)
            if end:
                self.end.shutdown(socket.SHUT_WR)
            return await asked


ANSWERS = {
    "length": (OK, b"ok"),
    "chunks": (CHUNKED + b"2;a=b\r\nok\r\n3\r\nabc\r\n0\r\nX-Trailer: t\r\n\r\n", b"okabc"),
    "nothing": (b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n", b""),
    "none allowed": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", b""),
    "informational": (b"HTTP/1.1 103 Early Hints\r\nLink: l\r\n\r\n" + OK, b"ok"),
    "close": (HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "to the end": (b"HTTP/1.0 503 Busy\r\n\r\n<html>", b"<html>"),
    "upgrade offered": (HEAD + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nok", b"ok"),
}


@both_loops
class TestAnswers:
    @given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(1, 120), max_size=8))
    @on_both_loops
    async def test_cut_anywhere(self, name: str, cuts: list[int]) -> None:
        """However an answer is cut into packets, it is the same answer."""
        answer, body = ANSWERS[name]
        edges = [0, *sorted({cut for cut in cuts if cut < len(answer)}), len(answer)]
        pieces = [answer[start:end] for start, end in itertools.pairwise(edges)]
        async with Pair() as whole, Pair() as cut:
            for pair, sent in ((whole, [answer]), (cut, pieces)):
                response = await pair.exchange(*sent, end=name == "to the end")
                assert bytes(response.body) == body
                assert response.whole
                assert response.header("x-trailer") is None
                assert response.header("Link") is None
                await turns()
                assert pair.connection.usable is (name not in ("close", "old", "to the end"))

    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([answer for answer, _ in ANSWERS.values()]),
                st.sampled_from([HEAD, b"\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n", b"0\r\n\r\n", b"\0", b"\n"]),
            ),
            max_size=6,
        )
    )
    @example([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"])
    @on_both_loops
    async def test_garbage(self, pieces: list[bytes]) -> None:
        """Whatever comes, before the end of the connection it is an answer or a failure of HTTP, and nothing else."""
        async with Pair() as pair:
            with contextlib.suppress(HttpFailure):
                response = await pair.exchange(*pieces, end=True)
                assert response.whole
            await turns()
            assert pair.lost == 1

    @pytest.mark.parametrize(
        ("answer", "said"),
        {
            "another answer": (OK + OK, "more than it was asked"),
            "another's beginning": (OK + b"H", "more than it was asked"),
            "rest of a body": (OK + b"k", "not HTTP"),
            "behind the last": (ANSWERS["close"][0] + OK, "not HTTP"),
            "length and chunks": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok", "not HTTP"),
            "chunks and length": (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok", "not HTTP"),
            "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", "not HTTP"),
            "list of lengths": (HEAD + b"Content-Length: 2, 2\r\n\r\nok", "not HTTP"),
            "length of no number": (HEAD + b"Content-Length: -2\r\n\r\nok", "not HTTP"),
            "length past 64 bits": (HEAD + b"Content-Length: 18446744073709551618\r\n\r\nok", "not HTTP"),
            "space before a colon": (HEAD + b"Content-Length : 2\r\n\r\nok", "not HTTP"),
            "bare line feeds": (HEAD.replace(b"\r", b"") + b"Content-Length: 2\n\nok", "not HTTP"),
            "folded header": (HEAD + b"X: a\r\n Content-Length: 2\r\n\r\nok", "not HTTP"),
            "NUL in a header": (HEAD + b"X: a\0\r\nContent-Length: 2\r\n\r\nok", "not HTTP"),
            "size of no number": (CHUNKED + b"-2\r\nok\r\n0\r\n\r\n", "not HTTP"),
            "chunk too short": (CHUNKED + b"1\r\nok\r\n0\r\n\r\n", "not HTTP"),
            "body of 103": (b"HTTP/1.1 103 E\r\nContent-Length: 2\r\n\r\nok" + OK, "not HTTP"),
            "body of 204": (b"HTTP/1.1 204 N\r\nContent-Length: 2\r\n\r\nok", "not HTTP"),
            "HTTP/0.9": (b"<html>", "not HTTP"),
            "TLS": (b"\x15\x03\x01\0\x02\x02\x28", "not HTTP"),
            "101": (b"HTTP/1.1 101 S\r\n\r\n" + OK, "not HTTP"),
            "101 with upgrade": (b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "another protocol"),
            "informational": (b"HTTP/1.1 103 E\r\n\r\n" * (MAX_INFORMATIONAL + 1), "too many informational"),
            "headers": (HEAD + b"a:b\r\n" * (MAX_HEADERS + 1) + b"\r\n", f"more than {MAX_HEADERS} headers"),
            "headers of 103s": (
                b"".join((b"HTTP/1.1 103 E\r\n", b"a:b\r\n" * (MAX_HEADERS + 1), b"\r\n", OK)),
                f"more than {MAX_HEADERS} headers",
            ),
            "empty lines": (b"\r\n" * MAX_FRAME_BYTES, "headers are larger than"),
            "one header": (HEAD + b"a: " + b"b" * MAX_FRAME_BYTES, "headers are larger than"),
            "large headers": (HEAD + (b"a: " + b"b" * 999 + b"\r\n") * 66 + b"\r\n", "headers are larger than"),
        }.values(),
        ids=lambda value: None if isinstance(value, bytes) else value,
    )
    async def test_refused(self, answer: bytes, said: str) -> None:
        """What is no single, plain answer is none, and the next request has another connection and its own answer."""
        async with answering(answer) as server:
            pool = pool_of(server.port)
            with pytest.raises(ExchangeBroken, match=said) as told:
                await get(pool)
            assert SECRET not in "".join(traceback.format_exception(told.value))
            await assert_one_place(pool, server)
            assert server.accepted == 2
            pool.close()

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HT",
            HEAD,
            HEAD + b"Content-Length: 3\r\n\r\nok",
            CHUNKED + b"2\r\nok\r\n",
            CHUNKED + b"2\r\nok\r\n0\r\n",
            b"HTTP/1.1 103 Early Hints\r\n\r\n",
            HEAD + b"Transfer-Encoding: gzip\r\n\r\nok",
            HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\nok",
        ],
    )
    async def test_end_before_the_end(self, answer: bytes) -> None:
        """An answer that the end of the connection cuts is none: only one that tells no length may end with it."""
        async with answering(answer, end=True) as server:
            pool = pool_of(server.port)
            with pytest.raises(ExchangeBroken, match=r"closed the connection|broke off"):
                await get(pool)
            await assert_one_place(pool, server)
            pool.close()

    async def test_reset_is_no_end(self) -> None:
        """A body that tells no length is not whole where the connection was torn down instead of ended."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.request(reader)
            writer.write(HEAD + b"\r\nhalf")
            await asyncio.sleep(0.05)
            held = writer.get_extra_info("socket")
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        async with serving(serve, server := Server()):
            pool = pool_of(server.port)
            with pytest.raises(ExchangeBroken, match=r"broke off"):
                await get(pool)

    async def test_trailer_is_no_header(self) -> None:
        """What is behind the chunks is neither a header of this answer nor of the next."""
        async with answering(CHUNKED + b"2\r\nok\r\n0\r\nRetry-After: 9\r\nX: y\r\n\r\n") as server:
            pool = pool_of(server.port)
            for names in (["transfer-encoding"], ["content-length"]):
                response = await get(pool)
                assert [name.decode().lower() for name, _ in response.headers] == names
            assert server.accepted == 1
            pool.close()

    async def test_answer_that_comes_unasked(self) -> None:
        """A second answer in a later packet is nobody's: its connection is closed, the next request has its own."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await server.request(reader)
                writer.write(OK)
                if len(server.heads) == 1:
                    await asyncio.sleep(0.05)
                    writer.write(OK.replace(b"ok", b"no"))

        async with serving(serve, server := Server()):
            pool = pool_of(server.port)
            await get(pool)
            await asyncio.sleep(0.2)
            response = await get(pool)
            assert (bytes(response.body), server.accepted) == (b"ok", 2)
            pool.close()

    async def test_bytes_before_it_is_there(self) -> None:
        """What comes before the connection is told of, as it may in a tunnel, spoils it like what comes unasked."""
        connection = Connection(lambda _: None, lambda _: None)
        connection.data_received(OK)
        async with Pair() as pair:
            connection.connection_made(pair.transport)
            assert not connection.usable
            with pytest.raises(ConnectFailed):
                await connection.exchange(b"GET / HTTP/1.1\r\n\r\n", 10)

    @pytest.mark.parametrize("name", sorted({*ANSWERS} - {"close", "old", "to the end"}))
    async def test_connection_is_kept(self, name: str) -> None:
        """An answer with an end of its own leaves the connection to the next request."""
        async with answering(*[ANSWERS[name][0]] * 3) as server:
            pool = pool_of(server.port)
            for _ in range(4):
                await get(pool)
            assert server.accepted == 1
            pool.close()

    @pytest.mark.parametrize("name", ["close", "old"])
    async def test_connection_is_not_kept(self, name: str) -> None:
        """One that the server will close is not used again."""
        async with answering(ANSWERS[name][0]) as server:
            pool = pool_of(server.port)
            await get(pool)
            await assert_one_place(pool, server)
            assert server.accepted == 2
            pool.close()

    async def test_answer_before_the_request_is_gone(self) -> None:
        """Where a server answers and does not read, no second request is put behind the first."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is one that reads
            writer.write(OK)
            await asyncio.sleep(60)

        async with serving(serve, server := Server()):
            pool = pool_of(server.port)
            for _ in range(2):
                response = await pool.request("PUT", "/x", {}, b"x" * 30_000_000, limit=100)
                assert response.whole
            assert server.accepted == 2
            pool.close()


@both_loops
class TestLargeAnswers:
    BODY = b"x" * 30_000_000
    ANSWER = HEAD + b"Content-Length: 30000000\r\n\r\n" + BODY

    async def test_it_waits_at_the_limit(self) -> None:
        """Past the limit nothing is read but what is on its way already; read on, it comes whole and all of it."""
        async with answering(self.ANSWER) as server:
            pool = pool_of(server.port)
            response = await get(pool, limit=100_000)
            assert 100_000 < len(response.body) < 1_000_000
            held = len(response.body)
            await asyncio.sleep(0.1)
            assert len(response.body) == held
            await response.read_on(2_000_000)
            assert 2_000_000 < len(response.body) < 3_000_000
            await response.read_on(30_000_000)
            assert response.whole
            assert response.body == self.BODY
            await assert_one_place(pool, server)
            assert server.accepted == 1
            pool.close()

    async def test_doing_without_the_rest(self) -> None:
        """An answer closed at the limit gives its place back, and cannot be read on."""
        async with answering(self.ANSWER) as server:
            pool = pool_of(server.port)
            response = await get(pool, limit=100)
            response.close()
            with pytest.raises(ExchangeBroken, match=r"closed"):
                await response.read_on(1000)
            assert not response.whole
            await assert_one_place(pool, server)
            pool.close()

    @pytest.mark.parametrize("length", [b"Content-Length: 30000000\r\n", b""])
    async def test_closed_is_not_whole(self, length: bytes) -> None:
        """Neither with a length nor without is an answer whole that we ended ourselves."""
        async with answering(HEAD + length + b"\r\n" + self.BODY) as server:
            pool = pool_of(server.port)
            response = await get(pool, limit=100)
            response.close()
            await settle()
            assert not response.whole

    async def test_larger_already(self) -> None:
        """What is larger than the next limit too is not read on, nor waited for."""
        async with Pair() as pair:
            response = await pair.exchange(HEAD + b"Content-Length: 9\r\n\r\nabcdef", limit=2)
            async with asyncio.timeout(20):
                await response.read_on(5)
            assert bytes(response.body) == b"abcdef"

    async def test_lost_meanwhile(self) -> None:
        """A connection that goes away before it is read on is a failure then, not a wait."""
        async with Pair() as pair:
            response = await pair.exchange(self.ANSWER[:200_000], limit=100)
            pair.connection.abort()
            with pytest.raises(ExchangeBroken, match=r"closed"):
                await response.read_on(1_000_000)

    async def test_cancelled_while_it_is_read_on(self) -> None:
        """Whoever gives up on the rest gives the place back."""
        async with answering(self.ANSWER[:5_000_000]) as server:
            pool = pool_of(server.port)
            response = await get(pool, limit=100)
            reading = asyncio.create_task(response.read_on(30_000_000))
            await asyncio.sleep(0.05)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await assert_one_place(pool, server)
            pool.close()
