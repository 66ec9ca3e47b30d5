"""What is sent to Vault again, and where to: lost answers of known engines, and redirects that the operator allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from provider.clock import SystemClock
from provider.errors import AnswerLost, ProviderError, VaultUnavailable
from provider.redact import Sensitive
from provider.sessions.shared import SharedReads
from provider.settings import Settings, TlsSettings
from provider.spc import Login, SecretRequest, VaultServer
from provider.spc.addresses import AllowedAddresses
from provider.telemetry.events import Telemetry
from provider.vault import Auth, Vault, VaultSecret, VaultServers, VaultUnreachable, adapter, watch
from tests.stand.faulty import Answer, Cut, Faulty, secret, token
from tests.stand.pki import Authority

TOKEN = Sensitive("hvs.of-a-test-that-may-read")
LOGIN = Login("kubernetes", "shop", None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries a twentieth as long; how many there are stays."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture
async def servers() -> AsyncIterator[VaultServers]:
    opened = VaultServers(clock=SystemClock())
    yield opened
    await opened.close()


def at(address: str) -> VaultServer:
    return VaultServer(address, "", TlsSettings())


def within(seconds: float = 20) -> float:
    return asyncio.get_running_loop().time() + seconds


def auth(*, entity: str = "entity", uses: int = 0) -> Auth:
    return Auth(TOKEN, "accessor", 3600, True, entity, ("default",), uses)


def engine(path: str, kind: str) -> Answer:
    return Answer(body={"data": {"path": path, "type": kind, "options": None}})


class Reads:
    """Reads as sessions send them, where the engine behind a path is known."""

    def __init__(self, vault: Vault, *, enabled: bool = True) -> None:
        self._vault = vault
        self._shared = SharedReads(SystemClock(), Telemetry(), enabled=enabled)

    async def learn(self, path: str) -> None:
        await self._shared.engine(self._vault, path, TOKEN, within())

    async def read(self, path: str, method: str = "GET", pod: Auth | None = None) -> VaultSecret:
        async with asyncio.timeout(20):
            return await self._shared.read(self._vault, SecretRequest(method, path), pod or auth(), within())

    async def close(self) -> None:
        await self._shared.close()


class TestLostAnswers:
    @pytest.mark.parametrize("enabled", [True, False], ids=["shared", "each its own"])
    @pytest.mark.parametrize("entity", ["entity", ""])
    async def test_kv_is_read_again(self, servers: VaultServers, faulty: Faulty, enabled: bool, entity: str) -> None:
        """A read of kv changes nothing, so it is sent again where its answer was lost, before or within it."""
        faulty.on("sys/internal/ui/mounts/kv/app", engine("kv/", "kv"))
        broken = Answer(body={"data": {"a": "1" * 100}}, cut=Cut.WITHIN)
        faulty.on("kv/app", Answer(cut=Cut.BEFORE), broken, secret({"a": "1"}))
        reads = Reads(servers.get(at(faulty.address)), enabled=enabled)
        await reads.learn("kv/app")
        assert (await reads.read("kv/app", pod=auth(entity=entity))).response["data"] == {"a": "1"}
        assert faulty.count("kv/app") == 3

    @pytest.mark.parametrize(
        ("kind", "method", "uses", "known"),
        [
            ("database", "GET", 0, True),
            ("kv", "POST", 0, True),
            ("kv", "GET", 5, True),
            ("kv", "GET", 0, False),
        ],
        ids=["another engine", "a write", "a token of few uses", "an engine that nobody knows"],
    )
    async def test_anything_else_is_not(
        self, servers: VaultServers, faulty: Faulty, kind: str, method: str, uses: int, known: bool
    ) -> None:
        """What may have issued something, or has cost a use, is sent once."""
        faulty.on("sys/internal/ui/mounts/kv/app", engine("kv/", kind))
        faulty.on("kv/app", Answer(cut=Cut.BEFORE), secret({"a": "1"}))
        reads = Reads(servers.get(at(faulty.address)))
        if known:
            await reads.learn("kv/app")
        with pytest.raises(AnswerLost):
            await reads.read("kv/app", method, auth(uses=uses))
        assert faulty.count("kv/app") == 1
        await reads.close()

    async def test_engine_is_learnt_where_nothing_is_shared(self, servers: VaultServers, faulty: Faulty) -> None:
        """With sharing off the first read of a mount still teaches what it is, once."""
        faulty.on("sys/internal/ui/mounts/kv/app", engine("kv/", "kv"))
        faulty.on("kv/app", secret({}), Answer(cut=Cut.BEFORE), secret({"a": "1"}))
        reads = Reads(servers.get(at(faulty.address)), enabled=False)
        await reads.read("kv/app")
        for _ in range(1000):
            if faulty.count("sys/internal/ui/mounts/kv/app"):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert (await reads.read("kv/app")).response["data"] == {"a": "1"}
        assert faulty.count("sys/internal/ui/mounts/kv/app") == 1

    async def test_who_waited_for_a_shared_read_does_not_wait_again(
        self, servers: VaultServers, faulty: Faulty
    ) -> None:
        """While Vault is away all who joined a read are refused together, each within its second."""
        faulty.on("sys/internal/ui/mounts/kv/app", engine("kv/", "kv"))
        reads = Reads(servers.get(at(faulty.address)))
        await reads.learn("kv/app")
        faulty.stop()
        await asyncio.sleep(0.05)  # the end of the kept connection arrives
        began = asyncio.get_running_loop().time()
        ends = await asyncio.gather(*(reads.read("kv/app") for _ in range(10)), return_exceptions=True)
        assert [type(end) for end in ends] == [VaultUnreachable] * 10
        assert len({id(end) for end in ends}) == 10
        assert asyncio.get_running_loop().time() - began < 2 * watch.PATIENCE_SECONDS


def elsewhere(server: Faulty, path: str = "/v1/x") -> dict[str, str]:
    return {"Location": f"{server.address}{path}"}


class TestRedirects:
    @pytest.fixture
    def active(self) -> Iterator[Faulty]:
        with Faulty() as server:
            server.on("x", secret({"a": "1"}))
            server.on("auth/kubernetes/login", token("hvs.new"))
            yield server

    @pytest.fixture
    async def standby(self, faulty: Faulty, active: Faulty) -> AsyncIterator[Vault]:
        """A standby, where the operator allows the active node besides."""
        opened = servers_that_allow(faulty.address, active.address)
        yield opened.get(at(faulty.address))
        await opened.close()

    @pytest.mark.parametrize("status", [307, 308])
    @pytest.mark.parametrize("base", ["", "/base"])
    async def test_read_is_followed_with_its_token(
        self, standby: Vault, faulty: Faulty, active: Faulty, status: int, base: str
    ) -> None:
        """A standby's redirect to an allowed address is followed with token, namespace header and query."""
        faulty.on("x", Answer(status, b"", elsewhere(active, f"{base}/v1/x?version=2")))
        request = SecretRequest("GET", "x", (("version", "2"),))
        assert (await standby.read(request, TOKEN, within())).response["data"] == {"a": "1"}
        assert active.arrivals[0].path == f"{base}/v1/x?version=2"
        assert active.arrivals[0].headers["x-vault-token"] == TOKEN.reveal()

    async def test_login_is_followed_with_its_body(self, standby: Vault, faulty: Faulty, active: Faulty) -> None:
        """Method and body are kept, and each is sent once."""
        path = "auth/kubernetes/login"
        faulty.on(path, Answer(307, b"", elsewhere(active, f"/v1/{path}")))
        assert (await standby.login(LOGIN, Sensitive("the-jwt"), within())).token == Sensitive("hvs.new")
        assert [(seen.method, seen.body) for seen in active.arrivals] == [("POST", faulty.arrivals[0].body)]
        assert b"the-jwt" in active.arrivals[0].body

    async def test_path_as_another_client_would_write_it(self, standby: Vault, faulty: Faulty, active: Faulty) -> None:
        """A path with escapes is the same path however it is escaped, and goes out as we write it."""
        path = "kv/it's (ü)"
        faulty.on(quote(path, safe="/-._~!$&'()*+,;=:@"), Answer(307, b"", elsewhere(active, "/v1/" + quote(path))))
        active.on(quote(path, safe="/-._~!$&'()*+,;=:@"), secret({"a": "2"}))
        assert (await read(standby, path)).response["data"] == {"a": "2"}

    async def test_relative_location(self, standby: Vault, faulty: Faulty) -> None:
        """A redirect to the same address is followed too, three times at most."""
        faulty.on("x", *[Answer(307, b"", {"Location": "/v1/x"})] * 3, secret({"a": "3"}))
        assert (await read(standby)).response["data"] == {"a": "3"}
        faulty.on("x", Answer(307, b"", {"Location": "/v1/x?password=canary"}))
        with pytest.raises(VaultUnavailable, match=r"redirects .307. to /v1/x,") as told:
            await read(standby)
        assert "canary" not in str(told.value)
        faulty.on("x", *[Answer(307, b"", {"Location": "/v1/x"})] * 4)
        with pytest.raises(VaultUnavailable, match=r"redirects .307. to /v1/x.*3 redirects led here"):
            await read(standby)
        assert faulty.count("x") == 9

    @pytest.mark.parametrize(
        "location",
        [
            "{active}/v1/y",
            "{active}/v1/x?version=1",
            "{active}/v1/x/../y",
            "{active}/x",
            "{active}",
            "{user}/v1/x",
            "/v1/y",
            "//[/v1/x",
            "ftp://127.0.0.1/v1/x",
            "",
        ],
    )
    async def test_other_requests_are_not_followed(
        self, standby: Vault, faulty: Faulty, active: Faulty, location: str
    ) -> None:
        """The token is sent for what it was sent for: to another path, or under another's name, it does not go."""
        active.on("y", secret({}))
        user = active.address.replace("://", "://user@")
        faulty.on("x", Answer(307, b"", {"Location": location.format(active=active.address, user=user)}))
        with pytest.raises(VaultUnavailable, match=r"redirects .307.*the token is not sent.*set vaultAddress"):
            await read(standby)
        assert active.arrivals == []

    @pytest.mark.parametrize("status", [301, 302, 303])
    async def test_other_redirects_are_not_followed(
        self, standby: Vault, faulty: Faulty, active: Faulty, status: int
    ) -> None:
        """Those that change a method are no standby's."""
        faulty.on("x", Answer(status, b"", elsewhere(active)))
        with pytest.raises(VaultUnavailable, match=rf"redirects .{status}."):
            await read(standby)
        assert active.arrivals == []

    async def test_refusal_names_flag_and_value(self, faulty: Faulty, active: Faulty) -> None:
        """An address that is not on the list, or no list at all: what would have allowed it is said."""
        faulty.on("x", Answer(307, b"", elsewhere(active)))
        for allowed in ((faulty.address,), ()):
            opened = servers_that_allow(*allowed)
            with pytest.raises(VaultUnavailable) as told:
                await read(opened.get(at(faulty.address)))
            assert f"--allowed-vault-addresses={active.address} would allow it" in str(told.value)
            await opened.close()
        assert active.arrivals == []

    async def test_second_hop_is_judged_too(self, standby: Vault, faulty: Faulty, active: Faulty) -> None:
        """Who is allowed does not allow others."""
        with Faulty() as third:
            third.on("x", secret({}))
            active.on("x", Answer(307, b"", elsewhere(third)))
            faulty.on("x", Answer(307, b"", elsewhere(active)))
            with pytest.raises(
                VaultUnavailable, match=rf"Vault at {active.address} redirects .307. to {third.address}"
            ):
                await read(standby)
            assert third.arrivals == []

    async def test_never_from_https_to_http(self, active: Faulty, tmp_path: Path) -> None:
        """TLS settings are kept: from https the token goes to https only, verified alike, whatever is allowed."""
        ours = Authority()
        (tmp_path / "ca.crt").write_bytes(ours.pem)
        tls = TlsSettings(ca_cert=str(tmp_path / "ca.crt"))
        with (
            Faulty(certificate=ours.server()) as first,
            Faulty(certificate=ours.server()) as good,
            Faulty(certificate=Authority("other").server()) as other,
        ):
            opened = servers_that_allow(active.address, good.address, other.address)
            vault = opened.get(VaultServer(first.address, "", tls))
            good.on("x", secret({"a": "good"}))
            other.on("x", secret({}))
            for target, said in ((active, r"from https only https"), (other, r"TLS with Vault at")):
                first.on("x", Answer(307, b"", elsewhere(target)))
                with pytest.raises(VaultUnavailable, match=said):
                    await read(vault)
                assert target.arrivals == []
            first.on("x", Answer(307, b"", elsewhere(good)))
            assert (await read(vault)).response["data"] == {"a": "good"}
            await opened.close()

    async def test_active_node_that_is_away(self, standby: Vault, faulty: Faulty, active: Faulty) -> None:
        """The node that is named is the one that the error is about, and the standby stays as it is."""
        active.stop()
        faulty.on("x", Answer(307, b"", elsewhere(active)))
        faulty.on("y", secret({"a": "1"}))
        with pytest.raises(ProviderError, match=rf"Vault at {active.address} is unreachable"):
            await read(standby)
        assert (await read(standby, "y")).response["data"] == {"a": "1"}


async def test_operators_certificate_is_not_shown_to_what_a_pattern_matches() -> None:
    """A redirect to a server that no flag names by itself goes on without the operator's client certificate."""
    operators = TlsSettings(client_cert="/operator.crt", client_key="/operator.key")
    settings = Settings(
        vault_addr="https://a.example.com:8200", tls=operators, allowed_vault_addresses=("*.example.com",)
    )
    servers = VaultServers(clock=SystemClock(), allowed=AllowedAddresses(settings))
    first = servers.get(VaultServer(settings.vault_addr, "", operators)).transport
    second = servers._redirect(first, "https://b.example.com:8200/v1/x", "/v1/x")
    assert (second.server.address, second.server.tls) == ("https://b.example.com:8200", TlsSettings())
    await servers.close()


def servers_that_allow(*addresses: str) -> VaultServers:
    settings = Settings(vault_addr="https://vault.invalid:8200", allowed_vault_addresses=addresses)
    return VaultServers(clock=SystemClock(), allowed=AllowedAddresses(settings))


async def read(vault: Vault, path: str = "x") -> VaultSecret:
    async with asyncio.timeout(20):
        return await vault.read(SecretRequest("GET", path), TOKEN, within())
