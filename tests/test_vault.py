"""The vault room: connections, retries and Vault's answers, against a real OpenBao and against one that fails."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import math
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from provider.clock import SystemClock
from provider.errors import (
    AccessDenied,
    AnswerLost,
    LoginDenied,
    ProviderError,
    RequestRefused,
    SecretNotFound,
    VaultUnavailable,
)
from provider.http import lookups
from provider.redact import Sensitive
from provider.settings import MAX_CONNECTIONS, MAX_POOLS, MIB, TlsSettings
from provider.spc import Login, SecretRequest, VaultServer
from provider.telemetry.events import Event, Telemetry, VaultRequest
from provider.turns import Turns
from provider.vault import (
    EngineMount,
    LeaseGone,
    RenewalFailed,
    RenewalRefused,
    Vault,
    VaultSecret,
    VaultServers,
    adapter,
    transport,
)
from provider.vault.failures import NotSent
from provider.vault.watch import Asker
from tests.stand.ecommerce import EcommerceStand
from tests.stand.faulty import Answer, Cut, Faulty, refusal, secret, token
from tests.stand.openbao import OpenBao
from tests.stand.process import free_port

TOKEN = Sensitive("hvs.of-a-test-that-may-read")
LOGIN = Login("kubernetes", "shop", None)
LOGIN_NESTED = Login("my/k8s", "shop", None)

Call = Callable[[Vault], Awaitable[object]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries a twentieth as long; how many there are stays."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture(scope="module")
def shop() -> Iterator[EcommerceStand]:
    with EcommerceStand() as stand:
        bao = stand.openbao
        bao.mount_kv("old", version=1)
        bao.enable_pki()
        bao.pki_role("web", ["shop.example"])
        yield stand


@pytest.fixture
async def servers() -> AsyncIterator[VaultServers]:
    opened = VaultServers(clock=SystemClock())
    yield opened
    await opened.close()
    await asyncio.sleep(0.01)  # the servers learn of it


@pytest.fixture
def vault(servers: VaultServers, faulty: Faulty) -> Vault:
    """The client of the faulty server."""
    return servers.get(at(faulty.address))


@pytest.fixture
def real(servers: VaultServers, shop: EcommerceStand) -> Vault:
    """The client of the real server."""
    return servers.get(at(shop.openbao.address))


@pytest.fixture
def root(shop: EcommerceStand) -> Sensitive[str]:
    return Sensitive(shop.openbao.root_token)


def at(address: str, namespace: str = "") -> VaultServer:
    return VaultServer(address, namespace, TlsSettings())


def within(seconds: float = 20) -> float:
    """A deadline."""
    return asyncio.get_running_loop().time() + seconds


def get(path: str, *query: tuple[str, str]) -> SecretRequest:
    return SecretRequest("GET", path, query)


def with_body(method: str, path: str, body: object) -> SecretRequest:
    return SecretRequest(method, path, (), Sensitive(json.dumps(body)))


async def read(vault: Vault, request: SecretRequest | str = "x", token: Sensitive[str] = TOKEN) -> VaultSecret:
    wanted = get(request) if isinstance(request, str) else request
    async with asyncio.timeout(20):
        return await vault.read(wanted, token, within())


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until ``holds()``, and fail where that takes more than 10 s."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to hold")


@contextlib.asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """A server that answers the first request of each connection with these bytes, and then keeps it open."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()
        writer.close()

    async with serving(serve) as address:
        yield address


@contextlib.asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]],
) -> AsyncIterator[str]:
    """The address of a server that does this with each connection."""
    server = await asyncio.start_server(serve, "127.0.0.1")
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def child_token(bao: OpenBao, **fields: object) -> Sensitive[str]:
    """A new service token under root."""
    return Sensitive(str(bao.api("POST", "auth/token/create", fields)["auth"]["client_token"]))


class TestConnections:
    @pytest.mark.parametrize("method", ["GET", "PUT"])
    async def test_request_is_not_sent_again_when_a_kept_connection_drops(
        self, vault: Vault, faulty: Faulty, method: str
    ) -> None:
        """A kept-alive connection that drops under a GET or PUT costs one arrival, not two: it may have issued."""
        faulty.on("x", secret({"a": "1"}), Answer(cut=Cut.BEFORE))
        await read(vault, SecretRequest(method, "x"))
        with pytest.raises(AnswerLost, match=r"did not answer to the end"):
            await read(vault, SecretRequest(method, "x"))
        first, second = faulty.arrivals
        assert first.connection == second.connection  # it was a kept one, or this proves nothing

    async def test_answer_cut_short_is_lost(self, vault: Vault, faulty: Faulty) -> None:
        """Half an answer is no answer, and the read is not sent again."""
        faulty.on("x", Answer(body={"data": {"a": "1" * 100}}, cut=Cut.WITHIN))
        with pytest.raises(AnswerLost):
            await read(vault)
        assert faulty.count("x") == 1

    async def test_idle_connection_that_was_closed_is_not_used(self, vault: Vault, faulty: Faulty) -> None:
        """A connection that the server closed while idle costs nothing: the next read opens another."""
        faulty.on("x", Answer(body={"data": {"a": "1"}}, cut=Cut.AFTER))
        await read(vault)
        await asyncio.sleep(0.05)  # the end of the connection arrives
        await read(vault)
        assert [seen.connection for seen in faulty.arrivals] == [1, 2]

    async def test_at_most_64_connections(self, vault: Vault, faulty: Faulty) -> None:
        """200 reads and 20 logins at once go through 64 connections at most: 52 are for reads."""
        faulty.on("x", Answer(body={"data": {}}, together=52, stall=0.2))
        faulty.on("auth/kubernetes/login", replace(token("hvs.new"), together=12, stall=0.2))
        reads = [read(vault, token=Sensitive(f"hvs.of-pod-{number}")) for number in range(200)]
        await asyncio.gather(*reads, *(vault.login(LOGIN, Sensitive("jwt"), within()) for _ in range(20)))
        assert faulty.count("x") == 200
        assert faulty.most_connections == MAX_CONNECTIONS == 64

    async def test_hung_reads_leave_room(self, vault: Vault, faulty: Faulty) -> None:
        """Whatever one pod's reads hang on, 45 of them at most: others' reads, logins and renewals are answered."""
        faulty.on("hangs", Answer(stall=3600))
        faulty.on("x", secret({"a": "1"}))
        faulty.on("auth/token/renew-self", Answer(body={"auth": {"lease_duration": 60}}))
        hung = [asyncio.create_task(read(vault, "hangs")) for _ in range(100)]
        await eventually(lambda: faulty.count("hangs") == 45)
        assert (await read(vault, token=Sensitive("hvs.of-another-pod"))).response["data"] == {"a": "1"}
        assert (await vault.renew_token(TOKEN, 60, within())).ttl == 60
        assert faulty.count("hangs") == 45
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        await asyncio.gather(*(read(vault) for _ in range(100)))

    async def test_many_pods_that_hang_leave_renewals_alone(self, vault: Vault, faulty: Faulty) -> None:
        """Where reads of many pods hang, renewals, revocations, look-ups and logins still find a connection."""
        faulty.on("hangs", Answer(stall=3600))
        faulty.on("auth/kubernetes/login", token("hvs.new"))
        for path in (
            "auth/token/lookup-self",
            "auth/token/revoke-self",
            "sys/leases/renew",
            "sys/internal/ui/mounts/x",
        ):
            faulty.on(path, secret({}))
        pods = [Sensitive(f"hvs.of-pod-{number}") for number in range(64)]
        hung = [asyncio.create_task(read(vault, "hangs", pod)) for pod in pods for _ in range(4)]
        await eventually(lambda: faulty.count("hangs") == 52)
        async with asyncio.timeout(20):
            await vault.login(LOGIN, Sensitive("jwt"), within())
            assert await vault.token_lives(TOKEN, within())
            await vault.renew_lease(TOKEN, "lease", 60, within())
            await vault.engine_of("x", TOKEN, within())
            await vault.revoke_token(TOKEN, within())
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)

    async def test_few_pods_that_hang_leave_others_alone(
        self, vault: Vault, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Six pods whose reads all hang fill every place, and still others' reads are answered, after a while.

        No more connections are made for it than there may be.
        """
        monkeypatch.setattr(transport, "OVERDUE_SECONDS", 0.3)
        faulty.on("hangs", Answer(stall=3600))
        faulty.on("x", secret({"a": "1"}))
        pods = [Sensitive(f"hvs.of-pod-{number}") for number in range(6)]
        hung = []
        for pod in pods:
            hung += [asyncio.create_task(read(vault, "hangs", pod)) for _ in range(64)]
            await asyncio.sleep(0.05)
        await eventually(lambda: faulty.count("hangs") >= 52)
        others = [Sensitive(f"hvs.of-other-{number}") for number in range(20)]
        answers = await asyncio.gather(*(read(vault, token=other) for other in others for _ in range(5)))
        assert len(answers) == 100
        assert faulty.most_connections <= 64
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)

    async def test_small_mount_does_not_wait_for_a_large_one(self, vault: Vault, faulty: Faulty) -> None:
        """A pod that reads three paths beside one that reads 200 takes its turns: it does not come after all 200."""
        faulty.on("large", Answer(body={"data": {}}, stall=0.02))
        faulty.on("small", Answer(body={"data": {}}, stall=0.02))
        other = Sensitive("hvs.of-another-pod")
        large = [read(vault, "large") for _ in range(200)]
        await asyncio.gather(*large, *(read(vault, "small", other) for _ in range(3)))
        order = [seen.path for seen in faulty.arrivals]
        assert len(order) == 203
        assert max(place for place, path in enumerate(order) if path == "/v1/small") < 70

    async def test_reads_of_a_mount_go_at_once(self, vault: Vault, faulty: Faulty) -> None:
        """45 reads under one token are all under way before the first is answered."""
        faulty.on("x", Answer(body={"data": {}}, together=45))
        await asyncio.gather(*(read(vault) for _ in range(45)))
        assert faulty.count("x") == 45

    async def test_connections_are_kept(self, vault: Vault, faulty: Faulty) -> None:
        """Reads one after the other need one connection."""
        faulty.on("x", secret({}))
        for _ in range(5):
            await read(vault)
        assert {seen.connection for seen in faulty.arrivals} == {1}

    async def test_closed_client_opens_again(self, vault: Vault, faulty: Faulty) -> None:
        """Closing lets connections go; a later read opens new ones, and reads under way keep theirs."""
        faulty.on("x", secret({}))
        faulty.on("slow", Answer(body={"data": {"a": "1"}}, stall=0.1))
        slow = asyncio.create_task(read(vault, "slow"))
        await eventually(lambda: faulty.count("slow"))
        vault.transport.connections.close()
        await read(vault)
        assert (await slow).response["data"] == {"a": "1"}
        assert [seen.connection for seen in faulty.arrivals] == [1, 2]

    async def test_number_of_servers_is_bounded(self, servers: VaultServers, faulty: Faulty) -> None:
        """Past 64 servers the least recently used one's connections are closed, and open again when it is used.

        Whoever still holds it has the client that others get, so that one server never has two.
        """
        faulty.on("x", secret({}))
        oldest = servers.get(at(faulty.address))
        await read(oldest)
        for number in range(MAX_POOLS):
            servers.get(at(f"http://127.0.0.1:{number + 1}"))
        await asyncio.sleep(0.05)  # the task that closes them runs
        again = servers.get(at(faulty.address))
        assert again.transport is oldest.transport
        await read(again)
        assert [seen.connection for seen in faulty.arrivals] == [1, 2]

    async def test_equal_servers_share_a_client(self, servers: VaultServers) -> None:
        """One *where*, one transport: address, namespace and TLS settings make it."""
        first, second = (servers.get(at("http://127.0.0.1:1")) for _ in range(2))
        assert first.transport is second.transport
        assert servers.get(at("http://127.0.0.1:1", "team")).transport is not first.transport

    async def test_namespaces_share_connections(self, servers: VaultServers, faulty: Faulty) -> None:
        """A pod whose reads in many namespaces, below many paths, all hang has 45 connections to that Vault, not more.

        Neither do TLS settings make it another server where there is no TLS.
        """
        faulty.on("x", secret({"a": "1"}))
        faulty.on("hangs", Answer(stall=3600))
        hung = []
        for number in range(10):
            tls = TlsSettings(server_name=f"name-{number}")
            server = VaultServer(f"{faulty.address}/n{number}", f"team-{number}", tls)
            vault = servers.get(server, "attacker")
            tokens = [Sensitive(f"hvs.of-{number}-{read}") for read in range(20)]
            hung += [asyncio.create_task(read(vault, "hangs", token)) for token in tokens]
        await eventually(lambda: len(faulty.arrivals) >= 45)
        await asyncio.sleep(0.1)
        assert len(faulty.arrivals) == faulty.most_connections == 45
        other = servers.get(at(faulty.address), "victim")
        assert (await read(other)).response["data"] == {"a": "1"}
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)

    async def test_unix_address(self, servers: VaultServers, tmp_path: Path) -> None:
        """``unix://`` is a Vault's socket: a real OpenBao is read through it, and a missing one is unreachable."""
        with OpenBao(storage="inmem") as bao:
            vault = servers.get(at(bao.unix_address))
            answer = await read(vault, "auth/token/lookup-self", Sensitive(bao.root_token))
            assert answer.response["data"]["path"] == "auth/token/root"
        missing = servers.get(at(f"unix://{tmp_path}/none.sock"))
        with pytest.raises(VaultUnavailable, match=r"none.sock is unreachable"):
            await read(missing)

    async def test_unreachable_server(self, servers: VaultServers) -> None:
        """Nobody listening: the message names the address and what to check."""
        address = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(VaultUnavailable, match=rf"{address} is unreachable.*check vaultAddress"):
            await read(servers.get(at(address)))

    async def test_unknown_host(self, servers: VaultServers) -> None:
        """A host name that does not resolve is told as such."""
        with pytest.raises(
            NotSent, match=r"vault.invalid:8200 is unreachable.*cannot be looked up.*check vaultAddress"
        ):
            await servers.get(at("http://vault.invalid:8200")).read(get("x"), TOKEN, within(0))

    async def test_one_pod_leaves_others_connections(self, faulty: Faulty) -> None:
        """A pod whose reads at many servers, under many tokens, all hang leaves some to other pods, at any server.

        All servers have a part of the process's descriptors together; the daemon's own Vault has its own connections,
        but not for a class's TLS settings. Logins, renewals and revocations count too.
        """
        with contextlib.ExitStack() as stack:
            hanging = [stack.enter_context(Faulty()) for _ in range(4)]
            own = stack.enter_context(Faulty())
            servers = VaultServers(clock=SystemClock(), own=at(own.address), descriptors=1024)
            hung = []
            for server in hanging:
                for path in ("hangs", "auth/kubernetes/login", "auth/token/renew-self"):
                    server.on(path, Answer(stall=3600))
                vault = servers.get(at(server.address), "attacker")
                for number in range(20):
                    credential = Sensitive(f"hvs.of-{server.port}-{number}")
                    calls = [read(vault, "hangs", credential), vault.login(LOGIN, credential, within())]
                    calls.append(vault.renew_token(credential, 60, within()))
                    hung += [asyncio.create_task(call) for call in calls]
            arrived = [server.arrivals for server in hanging]
            await eventually(lambda: sum(map(len, arrived)) >= 24)
            await asyncio.sleep(0.2)
            assert sum(server.most_connections for server in hanging) == 24  # seven eighths of what is not lent
            for server in (faulty, own):
                server.on("x", secret({"a": "1"}))
                victim = servers.get(at(server.address), "victim")
                assert (await read(victim)).response["data"] == {"a": "1"}
            own.on("x", Answer(body={"data": {}}, together=45))
            many = servers.get(at(own.address), "attacker")
            await asyncio.gather(*(read(many) for _ in range(45)))
            for task in hung:
                task.cancel()
            await asyncio.gather(*hung, return_exceptions=True)
            await servers.close()

    async def test_what_rests_is_bounded_over_all_servers(self) -> None:
        """Connections that are kept to all servers come to no more than may be open: the oldest are closed."""
        with contextlib.ExitStack() as stack:
            those = [stack.enter_context(Faulty()) for _ in range(6)]
            servers = VaultServers(clock=SystemClock(), descriptors=640)  # 20 connections
            before = len(os.listdir("/proc/self/fd"))
            for number, server in enumerate(those):
                server.on("x", Answer(body={"data": {}}, together=8))
                vault = servers.get(at(server.address), f"pod-{number}")
                await asyncio.gather(*(read(vault) for _ in range(8)))
            await asyncio.sleep(0.1)
            pools = [transport.connections._pool for transport in servers._recent.values()]
            assert sum([len(pool._live) for pool in pools if pool is not None]) == 20
            assert len(os.listdir("/proc/self/fd")) <= before + 2 * 20  # this process has the servers' ends too
            await servers.close()

    async def test_host_that_is_no_name(self, servers: VaultServers) -> None:
        """What cannot be a name at all is no fault of ours, but one of the address."""
        address = f"http://{'a' * 70}.example:8200"
        with pytest.raises(VaultUnavailable, match=r"is unreachable.*cannot be looked up"):
            await servers.get(at(address)).read(get("x"), TOKEN, within(0))

    async def test_name_server_that_does_not_answer(
        self, servers: VaultServers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A look-up is given up after its time, and the name is told apart from a server that is down."""
        go_on = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (go_on.wait(20), [])[1])
        monkeypatch.setattr(lookups, "LOOKUP_SECONDS", 0.05)
        async with asyncio.timeout(20):
            with pytest.raises(NotSent, match=r"vault.example:8200 is unreachable.*looked up: no answer in 0.05 s"):
                await servers.get(at("http://vault.example:8200")).read(get("x"), TOKEN, within(0))
        go_on.set()

    async def test_names_that_hang_leave_others_alone(
        self, servers: VaultServers, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Look-ups that hang hold 32 threads at most, one a name; a name in use is found beside them.

        Where it is not found for a while, it is where it was.
        """
        go_on, resolve = threading.Event(), socket.getaddrinfo
        hung: list[str] = []
        found: list[str] = []

        def ask(host: str, *arguments: object, **named: object) -> object:
            if host != "localhost":
                hung.append(host)
                go_on.wait(20)
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            found.append(host)
            return resolve("127.0.0.1", *arguments, **named)  # type: ignore[arg-type]  # as they were given

        def fail(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")

        monkeypatch.setattr(socket, "getaddrinfo", ask)
        monkeypatch.setattr(lookups, "LOOKUP_SECONDS", 0.5)
        monkeypatch.setattr(lookups, "KEPT_SECONDS", 0.0)
        faulty.on("x", Answer(body={"data": {"a": "1"}}, cut=Cut.AFTER))  # each read takes another connection
        known = f"http://localhost:{faulty.port}"
        await read(servers.get(at(known)))
        bogus = [f"http://name-{number % 50}.example:{8200 + number // 50}" for number in range(60)]
        tries = [servers.get(at(address)).read(get("x"), TOKEN, within(0)) for address in bogus]
        ends = asyncio.gather(*tries, return_exceptions=True)
        await eventually(lambda: len(hung) == 32)
        assert (await read(servers.get(at(known)))).response["data"] == {"a": "1"}
        assert found == ["localhost"] * 2
        assert {type(end) for end in await ends} == {NotSent}
        assert len(hung) == len(set(hung)) == 32
        monkeypatch.setattr(socket, "getaddrinfo", fail)
        assert (await read(servers.get(at(known)))).response["data"] == {"a": "1"}
        go_on.set()


class TestRequests:
    async def test_headers(self, servers: VaultServers, faulty: Faulty) -> None:
        """Token, namespace and X-Vault-Request are sent; the base path of an address comes before ``/v1/``."""
        faulty.on("x", secret({}))
        await read(servers.get(at(faulty.address + "/base/path", "team/blue")))
        arrival = faulty.arrivals[0]
        assert arrival.path == "/base/path/v1/x"
        assert arrival.headers["x-vault-token"] == TOKEN.reveal()
        assert arrival.headers["x-vault-namespace"] == "team/blue"
        assert arrival.headers["x-vault-request"] == "true"
        assert arrival.headers["user-agent"].startswith("vault-csi-provider/")
        assert "content-type" not in arrival.headers
        await read(servers.get(at(faulty.address)))
        assert "x-vault-namespace" not in faulty.arrivals[1].headers

    async def test_token_of_the_environment_is_never_sent(
        self, vault: Vault, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """hvac's habit of reading VAULT_TOKEN and ~/.vault-token is off: a login carries no token."""
        monkeypatch.setenv("VAULT_TOKEN", "hvs.of-the-environment")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".vault-token").write_text("hvs.of-the-home-directory")
        faulty.on("auth/kubernetes/login", token("hvs.new"))
        faulty.on("x", secret({}))
        await vault.login(LOGIN, Sensitive("jwt"), within())
        await read(vault)
        login, reading = faulty.arrivals
        assert "x-vault-token" not in login.headers
        assert reading.headers["x-vault-token"] == TOKEN.reveal()
        assert not any(name in str(seen.headers) for name in ("environment", "home-dir") for seen in faulty.arrivals)

    async def test_cookies_are_not_kept(self, vault: Vault, faulty: Faulty) -> None:
        """What a load balancer sets for one pod is not sent for the next."""
        faulty.on("x", Answer(body={"data": {}}, headers={"Set-Cookie": "session=1; Path=/"}))
        await read(vault)
        await read(vault)
        assert "cookie" not in faulty.arrivals[1].headers

    @pytest.mark.parametrize(
        "path", ["with space", "per%20cent", "ünïcode/键", "a#b", "a?b", "a&b=c+d;e,f", "~'()!*@:"]
    )
    async def test_paths_are_percent_encoded(
        self, real: Vault, shop: EcommerceStand, root: Sensitive[str], path: str
    ) -> None:
        """Any text can be a path's element: what was written under it is read under it."""
        await real.read(with_body("POST", f"old/{path}", {"name": path}), root, within())
        assert (await read(real, f"old/{path}", root)).response["data"] == {"name": path}
        names = shop.openbao.api("LIST", "old")["data"]["keys"]
        assert path.partition("/")[0] in {name.rstrip("/") for name in names}

    async def test_query(self, vault: Vault, faulty: Faulty, real: Vault, root: Sensitive[str]) -> None:
        """A query's values are encoded, in their order, and mean to OpenBao what they say."""
        faulty.on("x", secret({}))
        await read(vault, get("x", ("b", "1&c=2"), ("a", "ü #?%")))
        assert faulty.arrivals[0].path == "/v1/x?b=1%26c%3D2&a=%C3%BC+%23%3F%25"
        for number in (1, 2):
            await real.read(with_body("POST", "secret/data/q", {"data": {"n": number}}), root, within())
        first = await read(real, get("secret/data/q", ("version", "1")), root)
        assert first.response["data"]["data"] == {"n": 1}

    @pytest.mark.parametrize("method", ["PUT", "POST"])
    async def test_body_keeps_its_json_types(self, real: Vault, root: Sensitive[str], method: str) -> None:
        """Numbers, booleans, null and maps of secretArgs arrive as such."""
        body = {"number": 1, "float": 1.5, "yes": True, "none": None, "map": {"a": [1, "1"]}, "text": "1"}
        written = await real.read(with_body(method, "old/types", body), root, within())
        assert written.response == {}  # 204
        assert (await read(real, "old/types", root)).response["data"] == body

    async def test_list_method(self, real: Vault, root: Sensitive[str]) -> None:
        """LIST is a method like another."""
        await real.read(with_body("POST", "old/listed/one", {"a": "1"}), root, within())
        assert (await read(real, SecretRequest("LIST", "old/listed"), root)).response["data"] == {"keys": ["one"]}

    async def test_post_that_answers(self, real: Vault, root: Sensitive[str]) -> None:
        """A POST with a body can be a read: OpenBao's random bytes, as many as asked for."""
        answer = await read(real, with_body("POST", "sys/tools/random", {"bytes": 3, "format": "hex"}), root)
        assert len(answer.response["data"]["random_bytes"]) == 6

    async def test_namespaces(self, servers: VaultServers, shop: EcommerceStand, root: Sensitive[str]) -> None:
        """The namespace decides which secret a path is."""
        bao = shop.openbao
        bao.api("POST", "sys/namespaces/blue")
        bao.mount_kv("kv", namespace="blue")
        bao.write_kv("kv/data/app", {"color": "blue"}, namespace="blue")
        answer = await read(servers.get(at(bao.address, "blue")), "kv/data/app", root)
        assert answer.response["data"]["data"] == {"color": "blue"}
        with pytest.raises(SecretNotFound):
            await read(servers.get(at(bao.address)), "kv/data/app", root)


class TestRetries:
    @pytest.mark.parametrize("status", [412, 429, 472, 473, 500, 502, 503, 504])
    async def test_passing_troubles_are_retried(self, vault: Vault, faulty: Faulty, status: int) -> None:
        """docs/contract.md section 3: after these the same request is sent again, and its answer counts."""
        faulty.on("x", refusal(status, "wait"), secret({"a": "1"}))
        assert (await read(vault)).response["data"] == {"a": "1"}
        assert faulty.count("x") == 2

    async def test_what_a_server_cannot_do_is_not_asked_again(self, vault: Vault, faulty: Faulty) -> None:
        """501 says that it would not work the next time either."""
        faulty.on("x", refusal(501, "not implemented"), secret({}))
        with pytest.raises(VaultUnavailable, match=r"answered 501"):
            await read(vault)
        assert faulty.count("x") == 1

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(400, RequestRefused), (403, AccessDenied), (404, SecretNotFound), (405, RequestRefused)],
    )
    async def test_refusals_are_not_retried(
        self, vault: Vault, faulty: Faulty, status: int, kind: type[ProviderError]
    ) -> None:
        """A refusal is an answer; it quotes Vault's own words."""
        faulty.on("x", refusal(status, "that is\nnot on"), secret({}))
        with pytest.raises(kind, match=r'GET x|nothing at x.*"that is not on"'):
            await read(vault)
        assert faulty.count("x") == 1

    async def test_no_part_of_a_query_is_quoted(self, vault: Vault, faulty: Faulty) -> None:
        """A path's query may hold a secret, too, which Vault's words repeat."""
        faulty.on("x", refusal(400, "no such thing as canary-of-a-query"))
        with pytest.raises(RequestRefused, match="no such thing as") as told:
            await vault.read(SecretRequest("GET", "x", (("key", "canary-of-a-query"),)), TOKEN, within())
        assert "canary" not in str(told.value)

    @pytest.mark.parametrize(("values", "quoted"), [(150, True), (250, False)])
    async def test_words_in_which_too_much_would_have_to_be_hidden(
        self, vault: Vault, faulty: Faulty, values: int, quoted: bool
    ) -> None:
        """Tens of thousands of values, each looked for, would hold the loop for seconds: nothing is quoted then."""
        faulty.on("x", refusal(400, "that is not on"))
        with pytest.raises(RequestRefused) as told:
            await vault.read(
                with_body("POST", "x", {"v": [f"value-{number}" for number in range(values)]}), TOKEN, within()
            )
        assert ("that is not on" in str(told.value)) == quoted

    @pytest.mark.parametrize("length", [10, 400, 1203, 60_000, 70_000])
    @pytest.mark.parametrize("between", ["", " ", "\n"])
    async def test_no_part_of_a_secret_is_quoted(self, vault: Vault, faulty: Faulty, length: int, between: str) -> None:
        """However often Vault repeats what it was sent, whatever its length, no beginning of it is left at a cut."""
        body = ("Pw-" + f"q7Zk  {between}" * length)[:length].strip() + "!"
        faulty.on("x", refusal(400, between.join([body] * (200_000 // length))))
        with pytest.raises(RequestRefused) as told:
            await read(vault, with_body("PUT", "x", {"password": body}))
        assert "Pw-" not in str(told.value)
        assert "q7Zk" not in str(told.value)

    async def test_words_without_an_end(self, vault: Vault, faulty: Faulty) -> None:
        """Of megabytes of single letters no more is taken apart than is looked through."""
        faulty.on("x", refusal(400, "no such field", *["\u0100 " * 300_000] * 3))
        tracemalloc.start()
        try:
            with pytest.raises(RequestRefused, match="no such field"):
                await read(vault)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 40 * MIB  # the answer itself, as bytes and as text, is half of it

    async def test_tries_are_bounded(self, vault: Vault, faulty: Faulty) -> None:
        """A server that stays ill is asked five times, long before the deadline."""
        faulty.on("x", refusal(500, "internal error"))
        with pytest.raises(VaultUnavailable, match=r'answered 500 ."internal error".*check Vault'):
            await read(vault)
        assert faulty.count("x") == adapter.MAX_TRIES == 5

    async def test_deadline_ends_the_tries(self, vault: Vault, faulty: Faulty) -> None:
        """No wait goes beyond the deadline: at it, the last failure is the answer."""
        faulty.on("x", refusal(500))
        with pytest.raises(VaultUnavailable):
            await vault.read(get("x"), TOKEN, within(0))
        assert faulty.count("x") == 1

    async def test_retry_after_is_honoured(self, vault: Vault, faulty: Faulty) -> None:
        """No second request arrives before the server's Retry-After has passed, by the server's own clock."""
        faulty.on("x", refusal(429, Retry_After="1"), secret({}))
        await read(vault)
        first, second = faulty.arrivals
        assert second.at - first.at >= 1

    async def test_retry_after_beyond_the_deadline_fails_at_once(self, vault: Vault, faulty: Faulty) -> None:
        """Who would have to wait longer than there is time is told so now."""
        faulty.on("x", refusal(429, "slow down", Retry_After="3600"))
        with pytest.raises(VaultUnavailable, match=r'throttles requests .429. ."slow down"'):
            await read(vault)
        assert faulty.count("x") == 1

    async def test_retry_after_may_be_a_date(self, vault: Vault, faulty: Faulty) -> None:
        """A Retry-After in HTTP's other form is honoured alike: an hour from now is beyond the deadline."""
        faulty.on("x", refusal(503, "standby", Retry_After=formatdate(time.time() + 3600, usegmt=True)), secret({}))
        with pytest.raises(VaultUnavailable, match=r'answered 503 ."standby"'):
            await read(vault)
        assert faulty.count("x") == 1

    @pytest.mark.parametrize("status", [408, 425, 505, 507, 599])
    @pytest.mark.parametrize(
        ("path", "call"),
        [
            ("x", lambda vault: vault.read(get("x"), TOKEN, within())),
            ("auth/kubernetes/login", lambda vault: vault.login(LOGIN, Sensitive("jwt"), within())),
            ("auth/token/renew-self", lambda vault: vault.renew_token(TOKEN, 60, within())),
            ("sys/leases/renew", lambda vault: vault.renew_lease(TOKEN, "lease", 60, within())),
            ("auth/token/revoke-self", lambda vault: vault.revoke_token(TOKEN, within())),
            ("auth/token/lookup-self", lambda vault: vault.token_lives(TOKEN, within())),
            ("sys/internal/ui/mounts/x", lambda vault: vault.engine_of("x", TOKEN, within())),
        ],
        ids=["read", "login", "renew token", "renew lease", "revoke", "lookup", "engine"],
    )
    async def test_troubles_are_no_refusals(
        self, vault: Vault, faulty: Faulty, status: int, path: str, call: Call
    ) -> None:
        """A server in trouble denies nothing and ends nothing: whatever was asked, Vault is unavailable."""
        faulty.on(path, refusal(status, "not now"))
        with pytest.raises(VaultUnavailable, match=rf'answered {status} ."not now"'):
            await call(vault)
        assert faulty.count(path) == 1

    async def test_page_of_a_load_balancer_in_trouble(self, vault: Vault, faulty: Faulty) -> None:
        """A status of 500 or more is told as such whoever worded it."""
        faulty.on("x", Answer(505, b"<html>no</html>", {"Content-Type": "text/html"}))
        with pytest.raises(VaultUnavailable, match=r"answered 505: check"):
            await read(vault)

    @pytest.mark.parametrize(
        "odd", ["soon", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT"]
    )
    async def test_odd_retry_after_is_no_harm(self, vault: Vault, faulty: Faulty, odd: str) -> None:
        """A Retry-After that is no number of seconds leaves the ordinary backoff."""
        faulty.on("x", refusal(503, Retry_After=odd), secret({}))
        await read(vault)
        assert faulty.count("x") == 2

    async def test_what_was_not_sent_is_retried(
        self, vault: Vault, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a connection nothing was sent, so even a login is tried again, until the server is there."""
        monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.5)
        faulty.on("auth/kubernetes/login", token("hvs.new"))
        faulty.stop()
        login = asyncio.create_task(vault.login(LOGIN, Sensitive("jwt"), within()))
        await asyncio.sleep(0.02)
        faulty.start()
        assert (await login).token == Sensitive("hvs.new")
        assert faulty.count("auth/kubernetes/login") == 1

    @pytest.mark.parametrize(
        ("path", "call"),
        [
            ("x", lambda vault: vault.read(get("x"), TOKEN, within())),
            ("x", lambda vault: vault.read(with_body("POST", "x", {}), TOKEN, within())),
            ("auth/kubernetes/login", lambda vault: vault.login(LOGIN, Sensitive("jwt"), within())),
        ],
        ids=["read", "write", "login"],
    )
    async def test_what_may_have_issued_is_not_sent_again(
        self, vault: Vault, faulty: Faulty, path: str, call: Call
    ) -> None:
        """A lost answer may have held a credential or a token: another request would make a second."""
        faulty.on(path, Answer(cut=Cut.BEFORE), token("hvs.second"))
        with pytest.raises(AnswerLost):
            await call(vault)
        assert faulty.count(path) == 1

    @pytest.mark.parametrize(
        ("path", "call"),
        [
            ("auth/token/renew-self", lambda vault: vault.renew_token(TOKEN, 60, within())),
            ("sys/leases/renew", lambda vault: vault.renew_lease(TOKEN, "lease", 60, within())),
            ("auth/token/lookup-self", lambda vault: vault.token_lives(TOKEN, within())),
            ("auth/token/revoke-self", lambda vault: vault.revoke_token(TOKEN, within())),
            ("sys/internal/ui/mounts/x", lambda vault: vault.engine_of("x", TOKEN, within())),
        ],
        ids=["renew token", "renew lease", "lookup", "revoke", "engine"],
    )
    async def test_what_issues_nothing_is_sent_again(self, vault: Vault, faulty: Faulty, path: str, call: Call) -> None:
        """A lost answer to what changes nothing more the second time is asked for again."""
        faulty.on(path, Answer(cut=Cut.BEFORE), secret({}, lease_duration=60, auth={"lease_duration": 60}))
        await call(vault)
        assert faulty.count(path) == 2

    async def test_sealed(self, servers: VaultServers, root: Sensitive[str]) -> None:
        """A sealed OpenBao is called that, after the tries, and answers once it is unsealed."""
        with OpenBao() as bao:
            vault = servers.get(at(bao.address))
            bao.seal()
            with pytest.raises(VaultUnavailable, match=r"is sealed.*unseal it"):
                await read(vault, "secret/data/x", Sensitive(bao.root_token))
            bao.unseal()
            with pytest.raises(SecretNotFound):
                await read(vault, "secret/data/x", Sensitive(bao.root_token))


class TestStrangeAnswers:
    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    async def test_redirects_are_not_followed(self, vault: Vault, faulty: Faulty, status: int) -> None:
        """The token goes to no other host, whatever the answer says; the message names where it would have gone."""
        with Faulty() as elsewhere:
            elsewhere.on("x", secret({"a": "1"}))
            faulty.on("x", Answer(status, b"", {"Location": f"{elsewhere.address}/v1/x"}))
            with pytest.raises(VaultUnavailable, match=rf"redirects .{status}. to {elsewhere.address}.*vaultAddress"):
                await read(vault)
            faulty.on("auth/kubernetes/login", Answer(status, b"", {"Location": f"{elsewhere.address}/v1/x"}))
            with pytest.raises(VaultUnavailable, match=r"redirects"):
                await vault.login(LOGIN, Sensitive("jwt"), within())
            assert elsewhere.arrivals == []
        assert faulty.count("x") == 1

    @pytest.mark.parametrize("status", [200, 400, 403])
    async def test_html_is_not_vault(self, vault: Vault, faulty: Faulty, status: int) -> None:
        """A page of a load balancer or of a portal is told apart from Vault's answer."""
        faulty.on("x", Answer(status, b"<html>Sign in</html>", {"Content-Type": "text/html"}))
        with pytest.raises(VaultUnavailable, match=rf"{status}, text/html. is not Vault's API.*vaultAddress"):
            await read(vault)

    @pytest.mark.parametrize(
        "body", [b'{"data": {"a": "1', b"[1]", b'"text"', b"null", b"", b"\xff\xfe{}", b"[" * 100_000], ids=range(7)
    )
    async def test_what_is_no_json_object_is_not_vault(self, vault: Vault, faulty: Faulty, body: bytes) -> None:
        """Only a JSON object is an answer."""
        faulty.on("x", Answer(body=body))
        with pytest.raises(VaultUnavailable, match=r"is not Vault's API"):
            await read(vault)

    async def test_large_answers_take_turns(self, servers: VaultServers) -> None:
        """Of all the large answers that servers send at once, at most four are read to their end at one time."""
        size = 7 * MIB
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        taken = most = ended = 0
        may_end = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal taken, most, ended
            writer.transport.set_write_buffer_limits(0)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head + b'{"data": {"a": "'.ljust(size - 4, b"x"))
            await writer.drain()  # only a client that reads on takes so much
            taken += 1
            most = max(most, taken - ended)
            await may_end.wait()
            ended += 1
            writer.write(b'"}}\n')
            writer.close()

        async with serving(serve) as address:
            vaults = [servers.get(at(address), f"pod-{number}") for number in range(8)]
            reads = [asyncio.create_task(read(vault)) for vault in vaults]
            await eventually(lambda: taken == 4)
            await asyncio.sleep(0.2)  # a fifth would have come to its end by now
            may_end.set()
            answers = await asyncio.gather(*reads)
        assert len(answers) == ended == 8
        assert most == 4

    async def test_large_answer_that_dawdles(self, servers: VaultServers, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large answer that does not get on is given up, so that others have their turn."""
        monkeypatch.setattr(transport, "LARGE_BODY_SECONDS", 0.05)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 300_000
        async with raw_server(answer) as address:
            for _ in range(6):
                with pytest.raises(AnswerLost, match=r"rest of a large answer did not come in 0.05 s"):
                    await read(servers.get(at(address)))

    async def test_answers_of_too_many_parts(self, vault: Vault, faulty: Faulty) -> None:
        """JSON that would be many times larger in memory is refused before it is parsed; as much text is not."""
        faulty.on("x", Answer(body=b'{"data": {"a": [' + b"[]," * 160_000 + b"[]]}}"))
        with pytest.raises(VaultUnavailable, match=r"JSON of more than 300,000 parts.*smaller secret"):
            await read(vault)
        faulty.on("x", Answer(body=b'{"data": {"a": [' + b"[]," * 140_000 + b"[]]}}"))
        assert len((await read(vault)).response["data"]["a"]) == 140_001

    async def test_few_informational_messages(self, servers: VaultServers) -> None:
        """What may come before an answer does not matter."""
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + b'{"data": {"a": "1"}}'
        async with raw_server(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10 + answer) as address:
            assert (await read(servers.get(at(address)))).response["data"] == {"a": "1"}

    async def test_flood_of_informational_messages(self, servers: VaultServers) -> None:
        """A server that sends nothing but such is left after a few, and not waited for until the deadline."""
        async with raw_server(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 11) as address:
            with pytest.raises(AnswerLost, match=r"did not answer to the end"):
                await read(servers.get(at(address)))

    @pytest.mark.parametrize(
        "chunk", [b"1\r\nx\r\n", b"1;" + b"e" * 4000 + b"\r\nx\r\n", b"1;a=" + b"b;" * 2000 + b"\r\nx\r\n"]
    )
    async def test_flood_of_chunks(self, servers: VaultServers, chunk: bytes) -> None:
        """A body in chunks of a byte, or with long extensions, is left long before its size is too much."""
        sent = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    writer.write(chunk * (65536 // len(chunk)))
                    await writer.drain()
                    sent += 65536
            writer.close()

        async with serving(serve) as address:
            with pytest.raises(AnswerLost, match=r"its answer has more frame than body|not HTTP"):
                await read(servers.get(at(address)))
        assert sent < 8 * MIB

    async def test_chunks_of_a_server(self, servers: VaultServers) -> None:
        """An answer in chunks as Go's servers make them is read, the largest that is read at all."""
        body = b'{"data": {"a": "' + b"x" * (7 * MIB) + b'"}}'
        parts = [body[at : at + 2048] for at in range(0, len(body), 2048)]
        answer = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        async with raw_server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + answer) as address:
            assert len((await read(servers.get(at(address)))).response["data"]["a"]) == 7 * MIB

    async def test_204_is_an_empty_answer(self, vault: Vault, faulty: Faulty) -> None:
        """A write that answers nothing has succeeded."""
        faulty.on("x", Answer(204, b""))
        assert (await read(vault, with_body("PUT", "x", {}))).response == {}

    async def test_large_answers(self, vault: Vault, faulty: Faulty) -> None:
        """5 MiB are read; 10 MiB are refused without being read to their end, and the client goes on working."""
        faulty.on("x", Answer(body={"data": {"a": "x" * 5 * MIB}}), Answer(body={"data": {"a": "x" * 10 * MIB}}))
        assert len((await read(vault)).response["data"]["a"]) == 5 * MIB
        with pytest.raises(VaultUnavailable, match=r"answered more than 8 MiB.*smaller secret"):
            await read(vault)
        faulty.on("x", secret({}))
        await read(vault)

    async def test_compressed_answers(self, vault: Vault, faulty: Faulty) -> None:
        """Compression is not asked for; who compresses all the same is told so, and nothing is unpacked."""
        packed = gzip.compress(b'{"data": {"a": "1"}}')
        faulty.on("x", Answer(body=packed, headers={"Content-Encoding": "gzip"}))
        with pytest.raises(VaultUnavailable, match=r"\(200, application/json, compressed by gzip\) is not Vault's API"):
            await read(vault)
        assert faulty.arrivals[0].headers["accept-encoding"] == "identity"

    @pytest.mark.parametrize("odd", ["a lot", -1, True, None, 1e300, [1], 10**400, math.inf, -math.inf, math.nan])
    async def test_odd_durations_count_as_none(self, vault: Vault, faulty: Faulty, odd: object) -> None:
        """What Vault should not say does not reach the arithmetic."""
        faulty.on("x", secret({}, lease_id="l", lease_duration=odd, renewable=None))
        answer = await read(vault)
        assert (answer.leased, answer.lease_duration, answer.renewable) == (True, 0, False)
        faulty.on("auth/kubernetes/login", token("hvs.new", lease_duration=odd, num_uses=odd, policies=None))
        auth = await vault.login(LOGIN, Sensitive("jwt"), within())
        assert (auth.ttl, auth.num_uses, auth.policies) == (0, 0, ("default", "shop"))

    @pytest.mark.parametrize("odd", ["a lot", -1, True, None, 1e300, [1], 10**400, math.inf, math.nan])
    async def test_a_renewal_that_does_not_say_has_ended_nothing(
        self, vault: Vault, faulty: Faulty, odd: object
    ) -> None:
        """Nor does one that says nothing at all: what is renewed lives as long as it did."""
        faulty.on("auth/token/renew-self", Answer(204, b""))
        with pytest.raises(VaultUnavailable, match="has none of the fields"):
            await vault.renew_token(TOKEN, 60, within())
        faulty.on("sys/leases/renew", Answer(204, b""))
        with pytest.raises(RenewalRefused, match="renewed nothing"):
            await vault.renew_lease(TOKEN, "lease", 60, within())
        for answer in ({"message": "ok"}, {"auth": odd, "lease_duration": odd}, {"auth": {"lease_duration": odd}}):
            faulty.on("auth/token/renew-self", Answer(body=answer))
            faulty.on("sys/leases/renew", Answer(body=answer))
            with pytest.raises(VaultUnavailable, match="has none of the fields"):
                await vault.renew_token(TOKEN, 60, within())
            with pytest.raises(VaultUnavailable, match="has none of the fields"):
                await vault.renew_lease(TOKEN, "lease", 60, within())

    @pytest.mark.parametrize("status", [400, 403, 404, 405])
    async def test_json_of_a_gateway_is_no_verdict(self, vault: Vault, faulty: Faulty, status: int) -> None:
        """By it a secret would count as not there, or the pod's token as dead."""
        page = Answer(status, {"message": "no Route matched with those values"})
        faulty.on("x", page)
        faulty.on("auth/token/lookup-self", page)
        for asked in (read(vault), vault.token_lives(TOKEN, within())):
            with pytest.raises(VaultUnavailable, match="is not Vault's API"):
                await asked
        faulty.on("auth/token/revoke-self", Answer(200, {"message": "maintenance"}))
        with pytest.raises(VaultUnavailable, match="what answered a revocation"):
            await vault.revoke_token(TOKEN, within())
        faulty.on("x", Answer(200, {"message": "maintenance"}))
        with pytest.raises(VaultUnavailable, match=r"what answered GET x at .* has none of the fields of Vault"):
            await read(vault)

    @pytest.mark.parametrize("words", ["failed to renew entry: resp: (nil) err: failed to connect", "past the max TTL"])
    async def test_an_engine_that_cannot_renew_now(self, vault: Vault, faulty: Faulty, words: str) -> None:
        """As while its database is away, unlike a lease at its maximum: it is to be asked once more."""
        faulty.on("sys/leases/renew", refusal(400, words))
        with pytest.raises(RenewalFailed if "connect" in words else RenewalRefused):
            await vault.renew_lease(TOKEN, "lease", 60, within())

    async def test_login_without_token(self, vault: Vault, faulty: Faulty) -> None:
        """An answer that asks for a second factor holds no token, and is told as that."""
        faulty.on("auth/kubernetes/login", token("", mfa_requirement={"mfa_request_id": "1"}), Answer(body={}))
        for _ in range(2):
            with pytest.raises(LoginDenied, match=r"holds no token.*MFA"):
                await vault.login(LOGIN, Sensitive("jwt"), within())

    @pytest.mark.parametrize("odd", ["hvs.two\nlines", "hvs.with space", "hvs.ünicode", "hvs.nul\0", "\x7f"])
    async def test_login_with_a_token_that_is_no_header(self, vault: Vault, faulty: Faulty, odd: str) -> None:
        """A token that could not be sent is none: the login fails, and says why without showing it."""
        faulty.on("auth/kubernetes/login", token(odd))
        with pytest.raises(LoginDenied, match=r"not printable ASCII") as told:
            await vault.login(LOGIN, Sensitive("jwt"), within())
        assert odd not in str(told.value)

    async def test_login_of_the_providers_own_certificate(self, vault: Vault, faulty: Faulty) -> None:
        """The cert method logs in whoever holds the connection: no pod is given that token, and it is revoked."""
        own = token("hvs.of-the-provider", metadata={"cert_name": "node", "common_name": "node"})
        faulty.on("auth/kubernetes/login", own)
        faulty.on("auth/cert/login", own)
        faulty.on("auth/token/revoke-self", Answer(204, b""))
        with pytest.raises(LoginDenied, match=r"kubernetes/ is of the cert method.*name a mount of the kubernetes"):
            await vault.login(LOGIN, Sensitive("jwt"), within())
        with pytest.raises(RequestRefused, match=r"POST auth/cert/login is a login of the provider's own") as told:
            await read(vault, with_body("POST", "auth/cert/login", {}))
        assert "hvs." not in str(told.value)
        revoked = [seen for seen in faulty.arrivals if seen.path.endswith("revoke-self")]
        assert [seen.headers["x-vault-token"] for seen in revoked] == ["hvs.of-the-provider"] * 2

    async def test_what_a_login_gives_is_bounded(self, vault: Vault, faulty: Faulty) -> None:
        """It is kept for each session, so that a Vault of a tenant's could fill the node with it."""
        long = "x" * 100_000
        faulty.on("auth/kubernetes/login", token("hvs.new", accessor=long, entity_id=long))
        auth = await vault.login(LOGIN, Sensitive("jwt"), within())
        assert (auth.accessor, auth.entity_id) == ("", "")
        faulty.on("auth/kubernetes/login", token("hvs." + long))
        with pytest.raises(LoginDenied, match="too long"):
            await vault.login(LOGIN, Sensitive("jwt"), within())
        for policies in ([long], ["p"] * 100_000):
            faulty.on("auth/kubernetes/login", token("hvs.new", policies=policies))
            with pytest.raises(LoginDenied, match=r"policies of the token come to more than 16 KiB"):
                await vault.login(LOGIN, Sensitive("jwt"), within())

    async def test_reprs_show_no_secret(self, vault: Vault, faulty: Faulty) -> None:
        """Neither an answer nor what a login gave shows its secret to whoever prints it."""
        faulty.on("x", secret({"a": "canary"}, lease_id="lease/1"))
        faulty.on("auth/kubernetes/login", token("canary"))
        request = with_body("GET", "x", {"pin": "canary"})
        bare = transport.Transport(
            vault.server,
            vault.transport.connections,
            clock=SystemClock(),
            large_bodies=Turns(1),
            parsing=Turns(1),
            watch=vault.watch,
            telemetry=Telemetry(),
        )
        raw = await bare.send(transport.Request("GET", "/v1/x", {}, None, "x/", Asker()))
        auth = await vault.login(LOGIN, Sensitive("jwt"), within())
        answer = await read(vault, request)
        shown = [repr(part) for part in (raw, auth, answer, request)]
        assert "canary" not in "".join(shown)
        assert "lease/1" in shown[2]


class TestTelling:
    """What is recorded of the requests (metrics are made of it)."""

    @pytest.fixture
    def events(self) -> list[Event]:
        return []

    @pytest.fixture
    async def vault(self, faulty: Faulty, events: list[Event]) -> AsyncIterator[Vault]:
        telemetry = Telemetry()
        telemetry.listen(events.append)
        opened = VaultServers(clock=SystemClock(), telemetry=telemetry)
        yield opened.get(at(faulty.address, "team"))
        await opened.close()

    @pytest.mark.parametrize(
        ("method", "mount", "path", "call"),
        [
            ("POST", "auth/my/k8s/", "auth/my/k8s/login", lambda v: v.login(LOGIN_NESTED, Sensitive("jwt"), within())),
            ("GET", "kv/", "kv/data/canary", lambda v: v.read(get("kv/data/canary"), TOKEN, within())),
            ("GET", "kv/", "kv", lambda v: v.read(get("kv"), TOKEN, within())),
            (
                "GET",
                "team/kv/",
                "team/kv/data/canary",
                lambda v: v.read(get("team/kv/data/canary"), TOKEN, within(), mount="team/kv/"),
            ),
            ("GET", "auth/token/", "auth/token/canary", lambda v: v.read(get("auth/token/canary"), TOKEN, within())),
            ("GET", "", "k" * 600 + "/x", lambda v: v.read(get("k" * 600 + "/x"), TOKEN, within())),
            ("POST", "auth/token/", "auth/token/renew-self", lambda v: v.renew_token(TOKEN, 60, within())),
            ("PUT", "sys/", "sys/leases/renew", lambda v: v.renew_lease(TOKEN, "canary", 60, within())),
            ("POST", "auth/token/", "auth/token/revoke-self", lambda v: v.revoke_token(TOKEN, within())),
            ("GET", "auth/token/", "auth/token/lookup-self", lambda v: v.token_lives(TOKEN, within())),
            ("GET", "sys/", "sys/internal/ui/mounts/kv/canary", lambda v: v.engine_of("kv/canary", TOKEN, within())),
        ],
    )
    async def test_each_request_is_told(
        self, vault: Vault, faulty: Faulty, events: list[Event], method: str, mount: str, path: str, call: Call
    ) -> None:
        """Method, mount, status and seconds of each request that goes out, and nothing of the secret's path."""
        auth = {"client_token": "hvs.new", "lease_duration": 60}
        faulty.on(path, refusal(503), replace(secret(None, auth=auth, lease_duration=60), stall=0.05))
        await call(vault)
        first, second = (event for event in events if isinstance(event, VaultRequest))
        assert (first.method, first.mount, first.status) == (method, mount, 503)
        assert (second.method, second.mount, second.status) == (method, mount, 200)
        assert 0.05 <= second.seconds < 20
        assert "canary" not in repr(events)

    async def test_request_without_an_answer_is_told(self, vault: Vault, faulty: Faulty, events: list[Event]) -> None:
        """A request that got no answer has status 0, whether it was lost, never sent, or given up."""
        faulty.on("x", Answer(cut=Cut.BEFORE), Answer(stall=3600))
        with pytest.raises(AnswerLost):
            await read(vault)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await vault.read(get("x"), TOKEN, within())
        vault.transport.connections.close()
        faulty.stop()
        with pytest.raises(VaultUnavailable):
            await vault.read(get("x"), TOKEN, within(0))
        assert [(event.mount, event.status) for event in events if isinstance(event, VaultRequest)] == [("x/", 0)] * 3

    @pytest.mark.parametrize(
        ("said", "known"), [("1f-2", "1f-2"), (None, ""), (7, ""), ("a" * 64, "a" * 64), ("a" * 65, "")]
    )
    async def test_request_id(self, vault: Vault, faulty: Faulty, said: object, known: str) -> None:
        """An answer says which request of Vault's audit log it was, unless what it says is no such name."""
        faulty.on("x", secret({"a": "1"}, request_id=said))
        assert (await read(vault)).request_id == known
        for path in ("auth/kubernetes/login", "auth/token/renew-self", "sys/leases/renew"):
            auth = {"client_token": "hvs.new", "lease_duration": 60}
            faulty.on(path, Answer(body={"auth": auth, "lease_duration": 60, "request_id": said}))
        assert (await vault.login(LOGIN, Sensitive("jwt"), within())).request_id == known
        assert (await vault.renew_token(TOKEN, 60, within())).request_id == known
        assert (await vault.renew_lease(TOKEN, "lease", 60, within())).request_id == known


class TestLives:
    async def test_renew_token(self, real: Vault, shop: EcommerceStand) -> None:
        """renew-self gives the seconds asked for, within the token's maximum; a dead token is gone."""
        own = child_token(shop.openbao, ttl="60s", explicit_max_ttl="120s")
        assert (await real.renew_token(own, 90, within())).ttl == 90
        assert 100 < (await real.renew_token(own, 3600, within())).ttl <= 120  # capped, and answered 200
        await real.revoke_token(own, within())
        with pytest.raises(LeaseGone):
            await real.renew_token(own, 60, within())

    async def test_revoke_token(self, real: Vault, shop: EcommerceStand) -> None:
        """revoke-self ends the token and the leases under it; revoking it again is no error."""
        own = child_token(shop.openbao, policies=["ecommerce-policy"])
        await read(real, "database/creds/ecommerce-readonly", own)
        assert len(shop.openbao.leases("database/creds")) == 1
        assert await real.token_lives(own, within())
        await real.revoke_token(own, within())
        assert not await real.token_lives(own, within())
        await eventually(lambda: shop.openbao.leases("database/creds") == [])
        await real.revoke_token(own, within())

    async def test_batch_tokens(self, real: Vault, shop: EcommerceStand) -> None:
        """Batch tokens can be neither renewed nor revoked, and live on."""
        own = child_token(shop.openbao, type="batch", ttl="60s", policies=["default"])
        with pytest.raises(RenewalRefused, match=r"Vault answered 400"):
            await real.renew_token(own, 60, within())
        with pytest.raises(RenewalRefused, match=r"Vault answered 400"):
            await real.revoke_token(own, within())
        assert await real.token_lives(own, within())

    async def test_token_that_may_not_revoke_itself(self, real: Vault, shop: EcommerceStand) -> None:
        """Without the default policy a 403 does not say that the token is gone; where the caller knows, it is told."""
        own = child_token(shop.openbao, policies=["ecommerce-policy"], no_default_policy=True)
        with pytest.raises(RenewalRefused, match=r"may not revoke itself"):
            await real.revoke_token(own, within(), may_lookup=False)
        shop.openbao.api("POST", "auth/token/revoke", {"token": own.reveal()})
        await real.revoke_token(own, within())

    async def test_renew_lease(self, real: Vault, shop: EcommerceStand) -> None:
        """A database lease is renewable, for the seconds asked for; once revoked it is gone."""
        own = child_token(shop.openbao, policies=["ecommerce-policy", "default"])
        answer = await read(real, "database/creds/ecommerce-readonly", own)
        assert (answer.leased, answer.lease_duration, answer.renewable) == (True, 3600, True)
        assert answer.certificate_end is None
        assert (await real.renew_lease(own, answer.lease_id, 1800, within())).ttl == 1800
        shop.openbao.api("POST", "sys/leases/revoke", {"lease_id": answer.lease_id, "sync": True})
        with pytest.raises(LeaseGone, match=r"lease not found"):
            await real.renew_lease(own, answer.lease_id, 1800, within())
        await real.revoke_token(own, within())

    async def test_renewal_without_permission(self, real: Vault, shop: EcommerceStand) -> None:
        """A renewal that a policy denies is refused, which does not say that the lease is gone."""
        own = child_token(shop.openbao, policies=["ecommerce-policy"], no_default_policy=True)
        answer = await read(real, "database/creds/ecommerce-readonly", own)
        with pytest.raises(RenewalRefused, match=r"403"):
            await real.renew_lease(own, answer.lease_id, 1800, within())
        shop.openbao.api("POST", "auth/token/revoke", {"token": own.reveal()})

    async def test_certificate(self, real: Vault, root: Sensitive[str]) -> None:
        """A certificate of a PKI engine has no lease, but an end: an hour from now by its role."""
        request = with_body("POST", "pki/issue/web", {"common_name": "shop.example"})
        answer = await read(real, request, root)
        assert not answer.leased
        assert answer.certificate_end == answer.response["data"]["expiration"]
        assert answer.certificate_end is not None
        assert time.time() + 3000 < answer.certificate_end < time.time() + 3900

    @pytest.mark.parametrize(
        "data",
        [
            None,
            [],
            {"expiration": 2_000_000_000},
            {"expiration": 2_000_000_000, "serial_number": "1"},
            {"certificate": "c", "serial_number": "1"},
            *(
                {"expiration": odd, "certificate": "c", "serial_number": "1"}
                for odd in ("2000", True, None, 0, -1, 1e12, 10**400, math.inf, -math.inf, math.nan)
            ),
        ],
    )
    def test_what_is_no_certificate(self, data: object) -> None:
        """Only expiration, serial number and certificate together make one, with an end that is a time."""
        assert VaultSecret({"data": data}).certificate_end is None

    async def test_kv_has_no_lease(self, real: Vault, root: Sensitive[str]) -> None:
        """KV version 1 answers a duration without a lease: nothing is to be kept for it."""
        await real.read(with_body("POST", "old/plain", {"a": "1"}), root, within())
        answer = await read(real, "old/plain", root)
        assert answer.response["lease_duration"] > 0
        assert not answer.leased

    async def test_engines(self, real: Vault, shop: EcommerceStand, root: Sensitive[str]) -> None:
        """Any path below a mount tells its engine, to whoever may know it; else there is no answer, and no error."""
        assert await real.engine_of("secret/app/ü x", root, within()) == EngineMount("secret/", "kv", "2")
        assert await real.engine_of("old/app", root, within()) == EngineMount("old/", "kv", "1")
        assert await real.engine_of("pki/issue/web", root, within()) == EngineMount("pki/", "pki", "")
        assert await real.engine_of("nowhere/app", root, within()) is None
        stranger = child_token(shop.openbao, policies=["default"])
        assert await real.engine_of("secret/app", stranger, within()) is None

    @pytest.mark.parametrize(
        "data",
        [
            None,
            {},
            {"path": 1},
            {"path": ""},
            {"path": "other/", "type": "kv"},
            {"path": "kv/x/y/", "type": "kv"},
            {"path": "kv/", "type": ["kv"]},
            {"path": "kv/", "type": "kv" * 300},
            {"path": "kv/", "type": "kv", "options": {"version": "2" * 600}},
        ],
    )
    async def test_odd_engine_answers(self, vault: Vault, faulty: Faulty, data: object) -> None:
        """An answer that names no mount of this path names no engine, nor one with texts that no mount has."""
        faulty.on("sys/internal/ui/mounts/kv/x", Answer(body={"data": data}), Answer(body={}))
        assert await vault.engine_of("kv/x", TOKEN, within()) is None
        assert await vault.engine_of("kv/x", TOKEN, within()) is None

    async def test_mount_paths_are_bounded(self, vault: Vault, faulty: Faulty) -> None:
        """A mount's path has 512 characters at most, even where the request's path begins with it."""
        for length, known in ((512, True), (513, False)):
            mount = "m" * (length - 1) + "/"
            faulty.on(f"sys/internal/ui/mounts/{mount}x", Answer(body={"data": {"path": mount, "type": "kv"}}))
            answer = await vault.engine_of(f"{mount}x", TOKEN, within())
            assert answer == (EngineMount(mount, "kv", "") if known else None)

    async def test_deleted_version(self, real: Vault, root: Sensitive[str]) -> None:
        """A KV version 2 secret whose current version was deleted is told apart from one that never was."""
        await real.read(with_body("POST", "secret/data/gone", {"data": {"a": "1"}}), root, within())
        await real.read(SecretRequest("DELETE", "secret/data/gone"), root, within())
        with pytest.raises(SecretNotFound, match=r"current version of secret/data/gone is deleted.*undelete"):
            await read(real, "secret/data/gone", root)
        with pytest.raises(SecretNotFound, match=r"has nothing at secret/data/never"):
            await read(real, "secret/data/never", root)

    async def test_version_that_is_not_there(self, real: Vault, root: Sensitive[str]) -> None:
        """The version that was asked for is told, and nothing else of a query, which may hold a secret."""
        await real.read(with_body("POST", "secret/data/once", {"data": {"a": "1"}}), root, within())
        asked = SecretRequest("GET", "secret/data/once", (("version", "7"), ("other", "canary")))
        with pytest.raises(SecretNotFound, match=r"has nothing at secret/data/once\?version=7") as told:
            await real.read(asked, root, within())
        assert "canary" not in f"{told.value} {asked}"
