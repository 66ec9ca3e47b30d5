"""When a Vault is not asked any more: the rules alone, and the watch over a server that comes and goes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise

import pytest

from provider.clock import SystemClock
from provider.errors import Code, SecretNotFound, VaultUnavailable
from provider.redact import Sensitive
from provider.settings import MAX_POOLS, TlsSettings
from provider.spc import Login, SecretRequest, VaultServer
from provider.telemetry.events import BreakerChanged, Event, Looked, Telemetry, VaultRequest
from provider.vault import Vault, VaultServers, adapter, breaker, looks, watch
from provider.vault.breaker import FORGET_SECONDS, MAX_RECENT, PROBE_SECONDS, Breaker, State
from provider.vault.failures import VaultUnreachable
from provider.vault.looks import Looks
from tests.stand.faulty import Answer, Cut, Faulty, refusal, secret, token
from tests.stand.pki import Authority
from tests.stand.process import free_port

NOON = 1_800_000_000.0
TOKEN = Sensitive("hvs.of-a-test-that-may-read")
LOGIN = Login("kubernetes", "shop", None)
HEALTH = "sys/health"


def away(at: float = 100.0) -> Breaker:
    """A breaker of a Vault that refused a connection at this time."""
    known = Breaker("https://vault:8200")
    known.lose("connection refused", "check it", at, NOON)
    return known


class TestRules:
    def test_nothing_is_wrong_at_first(self) -> None:
        """Nobody looks at a Vault of which nothing is known."""
        known = Breaker("https://vault:8200")
        assert known.state is State.THERE
        assert known.next_probe() == math.inf

    def test_refused_connection_is_an_outage(self) -> None:
        """It is looked at soon, so that a listener that restarts keeps nobody for long, and then every second."""
        known = away(100.0)
        assert known.state is State.AWAY
        assert 100 < known.next_probe() <= 100.5
        now = known.next_probe()
        for _ in range(60):
            assert known.probe(now)
            known.lose("connection refused", "check it", now, NOON + 1)
            assert now + PROBE_SECONDS <= known.next_probe() <= now + PROBE_SECONDS + breaker.PROBE_JITTER_SECONDS
            now = known.next_probe()

    def test_doubt_is_settled_by_a_look(self) -> None:
        """What failed alone opens nothing: the look decides, and meanwhile nobody looks a second time."""
        for found in (True, False):
            known = Breaker("https://vault:8200")
            known.doubt(100.0, NOON)
            assert (known.state, known.in_question) == (State.DOUBTED, False)
            now = known.next_probe()
            assert 100 < now <= 100.5
            assert known.probe(now)
            assert known.in_question
            assert known.next_probe() == math.inf
            if found:
                known.find()
                assert (known.state, known.next_probe()) == (State.THERE, math.inf)
            else:
                known.lose("it is sealed", "unseal it", now, NOON)
                assert known.state is State.AWAY
                assert known.next_probe() >= now + PROBE_SECONDS

    def test_doubts_never_look_more_than_once_a_second(self) -> None:
        """However often a Vault fails and answers, a second lies between two looks."""
        known = Breaker("https://vault:8200")
        now, looks = 100.0, []
        while now < 110:
            known.doubt(now, NOON)
            if known.next_probe() <= now:
                assert known.probe(now)
                looks.append(now)
                known.find()
            now += 0.01
        assert len(looks) >= 8
        assert min(later - earlier for earlier, later in pairwise(looks)) >= PROBE_SECONDS - 1e-6

    def test_silence_is_looked_at_at_once(self) -> None:
        """A Vault that has been silent has had its time."""
        known = Breaker("https://vault:8200")
        known.doubt(100.0, NOON, at_once=True)
        assert known.next_probe() == 100.0

    def test_message(self) -> None:
        """It says which Vault, since the first failure, how many mounts it cost, why now, and what to do."""
        known = Breaker("https://vault:8200")
        known.doubt(100.0, NOON)
        known.lose("connection refused", "check it", 100.5, NOON + 0.5)
        known.lose("no answer", "look for it", 120.0, NOON + 20)
        assert str(known.refuse(1)) == (
            "Vault at https://vault:8200 is unreachable since 2027-01-15T08:00:00Z (1 mount refused): "
            "no answer: look for it"
        )
        assert "(2 mounts refused)" in known.refuse(2).what
        assert known.refuse(2).code is Code.FAILED_PRECONDITION

    def test_a_mount_counts_once(self) -> None:
        """All reads of a mount are told the same, so that its message is one sentence; renewals are not counted."""
        known = away()
        assert {known.refuse(7).what for _ in range(50)} == {known.refuse(7).what}
        assert "(1 mount refused)" in known.refuse(None).what
        assert "(2 mounts refused)" in known.refuse(8).what
        assert "(1 mount refused)" in known.refuse(7).what

    def test_many_mounts_are_counted_in_little_memory(self) -> None:
        """A long outage costs no more memory than a short one."""
        known = away()
        for mount in range(10_000):
            known.refuse(mount)
        assert known.refused == 10_000
        assert len(known._recent) == MAX_RECENT

    def test_the_next_outage_counts_anew(self) -> None:
        """What was refused before it was back is not of the next one."""
        known = away()
        known.refuse(1)
        known.find()
        known.lose("connection refused", "check it", 200.0, NOON + 100)
        assert "since 2027-01-15T08:01:40Z (1 mount refused)" in known.refuse(1).what

    def test_nobody_looks_where_nobody_asks(self) -> None:
        """An address that a class named once is looked at for a while only; what is asked for is looked at on."""
        known, asked = away(0.0), away(0.0)
        now = last = 0.0
        while now < 2 * FORGET_SECONDS:
            now += 1.0
            asked.want(now)
            assert asked.probe(now)
            if known.state is State.AWAY:
                known.probe(now)
                last = now
        assert FORGET_SECONDS <= last <= FORGET_SECONDS + 2
        assert known.next_probe() == math.inf


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries a twentieth as long."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as server:
        server.on("x", secret({"a": "1"}))
        server.on("auth/token/renew-self", Answer(body={"auth": {"lease_duration": 60}}))
        yield server


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
async def servers(events: list[Event]) -> AsyncIterator[VaultServers]:
    telemetry = Telemetry()
    telemetry.listen(events.append)
    opened = VaultServers(clock=SystemClock(), telemetry=telemetry)
    yield opened
    await opened.close()


@pytest.fixture
def vault(servers: VaultServers, faulty: Faulty) -> Vault:
    return servers.get(at(faulty.address))


def at(address: str, namespace: str = "") -> VaultServer:
    return VaultServer(address, namespace, TlsSettings())


def within(seconds: float = 20) -> float:
    return asyncio.get_running_loop().time() + seconds


async def read(vault: Vault, path: str = "x", token: Sensitive[str] = TOKEN) -> object:
    async with asyncio.timeout(20):
        return (await vault.read(SecretRequest("GET", path), token, within())).response["data"]


async def read_when_back(vault: Vault) -> object:
    """A read, tried again as kubelet does."""
    for _ in range(20):
        try:
            return await read(vault)
        except VaultUnreachable:
            await asyncio.sleep(0.1)
    pytest.fail("it is not asked again")


def changes(events: list[Event]) -> list[bool]:
    return [event.open for event in events if isinstance(event, BreakerChanged)]


class TestWatch:
    async def test_outage_and_return(
        self, vault: Vault, faulty: Faulty, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While nobody listens mounts are refused and renewals too, those at once; then all of them work again."""
        await read(vault)
        faulty.stop()
        await asyncio.sleep(0.05)  # the end of the kept connection arrives
        with pytest.raises(VaultUnreachable, match=r"is unreachable since .* .1 mount refused.: Connection refused: "):
            await read(vault)
        monkeypatch.setattr(watch, "PATIENCE_SECONDS", 60.0)  # for mounts alone
        with pytest.raises(VaultUnreachable, match=r"is unreachable since"):
            async with asyncio.timeout(30):
                await vault.renew_token(TOKEN, 60, within())
        monkeypatch.undo()
        assert changes(events) == [True]
        faulty.start()
        assert await read_when_back(vault) == {"a": "1"}
        assert (await vault.renew_token(TOKEN, 60, within())).ttl == 60
        assert changes(events) == [True, False]

    async def test_blip_fails_no_mount(self, vault: Vault, faulty: Faulty) -> None:
        """A listener that is gone for a moment costs a mount a moment, and a login is still sent once only."""
        faulty.on("auth/kubernetes/login", token("hvs.new"))
        faulty.stop()
        login = asyncio.create_task(vault.login(LOGIN, Sensitive("jwt"), within()))
        await asyncio.sleep(0.1)
        faulty.start()
        assert (await login).token == Sensitive("hvs.new")
        assert faulty.count("auth/kubernetes/login") == 1

    async def test_nothing_but_looks_goes_out(self, vault: Vault, faulty: Faulty, events: list[Event]) -> None:
        """In an outage of three seconds a hundred mounts that come at any time lead to a look a second."""
        faulty.stop()
        with pytest.raises(VaultUnreachable):
            await read(vault)
        events.clear()

        async def mount(number: int) -> None:
            await asyncio.sleep(number * 0.03)
            with pytest.raises(VaultUnreachable):
                await read(vault, token=Sensitive(f"hvs.of-pod-{number}"))

        await asyncio.gather(*(mount(number) for number in range(100)))
        assert not any(isinstance(event, VaultRequest) for event in events)
        looks = [event.status for event in events if isinstance(event, Looked)]
        assert looks in ([0] * number for number in range(2, 6))

    async def test_end_of_looking_is_told(
        self, vault: Vault, faulty: Faulty, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A Vault that nobody asks for any more is not away for ever to who counts those that are."""
        monkeypatch.setattr(breaker, "FORGET_SECONDS", 1.0)
        faulty.stop()
        with pytest.raises(VaultUnreachable):
            await read(vault)
        async with asyncio.timeout(20):
            while changes(events) != [True, False]:  # noqa: ASYNC110  # it comes in its own time
                await asyncio.sleep(0.05)

    async def test_namespaces_share_what_is_known(self, servers: VaultServers, faulty: Faulty) -> None:
        """What one namespace of a Vault found out holds for the others; other TLS settings find out by themselves.

        Without TLS its settings are nothing to find out.
        """
        faulty.stop()
        with pytest.raises(VaultUnreachable):
            await read(servers.get(at(faulty.address)))
        await asyncio.sleep(0.1)
        with pytest.raises(VaultUnreachable, match=r".2 mounts refused."):
            await read(servers.get(at(faulty.address, "team")))
        named = at(faulty.address)._replace(tls=TlsSettings(server_name="other"))
        with pytest.raises(VaultUnreachable, match=r".3 mounts refused."):
            await read(servers.get(named))
        secure = named._replace(address=faulty.address.replace("http:", "https:"))
        for server in (secure, secure._replace(tls=TlsSettings(server_name="another"))):
            with pytest.raises(VaultUnreachable, match=r".1 mount refused."):
                await read(servers.get(server))

    async def test_bogus_address_affects_nobody_else(self, servers: VaultServers, vault: Vault) -> None:
        """A class that names what is not there is refused alone."""
        bogus = servers.get(at(f"http://127.0.0.1:{free_port()}"))
        with pytest.raises(VaultUnreachable):
            await read(bogus)
        assert await read(vault) == {"a": "1"}

    async def test_many_bogus_addresses(self, servers: VaultServers, events: list[Event]) -> None:
        """Past the most servers that are kept, nobody looks any more at those that classes made up."""
        port = free_port()
        for number in range(MAX_POOLS + 20):
            bogus = servers.get(at(f"http://127.0.0.1:{port}/{number}"))
            with pytest.raises(VaultUnavailable):
                await bogus.engine_of("x", TOKEN, within())
            del bogus
        await asyncio.sleep(0.05)
        assert changes(events).count(True) == MAX_POOLS + 20
        assert changes(events).count(False) == 20

    async def test_tls_settings_make_no_more_looks(self, servers: VaultServers, events: list[Event]) -> None:
        """A Vault that classes name with thirty TLS settings and paths is looked at once a second, not thirty times.

        Each is told apart as before; and once one of them finds it back, so do all, each by a look of its own.
        """
        faulty = Faulty(certificate=Authority().server())
        faulty.start()
        faulty.stop()
        those = [
            servers.get(VaultServer(f"{faulty.address}/{number % 3}", "", TlsSettings(server_name=f"name-{number}")))
            for number in range(30)
        ]
        for vault in those:
            with pytest.raises(VaultUnavailable):
                await vault.engine_of("x", TOKEN, within(0))
        assert changes(events) == [True] * 30
        events.clear()
        await asyncio.sleep(3)
        assert 2 <= sum(isinstance(event, Looked) for event in events) <= 4
        faulty.start()  # nobody trusts it, but somebody is there
        async with asyncio.timeout(10):
            while changes(events) != [False] * 30:  # noqa: ASYNC110  # it comes in its own time
                await asyncio.sleep(0.05)
        faulty.stop()

    async def test_own_settings_are_looked_at_in_between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many others look at the daemon's own Vault, every other look is by the daemon's own settings."""
        monkeypatch.setattr(looks, "PROBE_SECONDS", 0.01)
        queue = Looks(64).at("there")
        order: list[str] = []

        def looking(name: str) -> Callable[[], bool]:
            def begin() -> bool:
                order.append(name)
                asyncio.get_running_loop().call_soon(lambda: queue.ask(begin, own=name == "own"))
                return True

            return begin

        for name in ("a", "b", "c", "own", "d"):
            queue.ask(looking(name), own=name == "own")
        async with asyncio.timeout(10):
            while len(order) < 9:  # noqa: ASYNC110  # it comes in its own time
                await asyncio.sleep(0.01)
        assert order[:9] == ["a", "own", "b", "own", "c", "own", "d", "own", "a"]

    async def test_looks_everywhere_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of looks at many servers so many go out in a second, and no more until they are over; own ones always."""
        monkeypatch.setattr(looks, "PROBE_SECONDS", 0.3)
        every = Looks(3)
        ends: list[Callable[[], None]] = []
        queues = [every.at(number) for number in range(10)]

        def begin() -> bool:
            ends.append(every.began())
            return True

        for queue in queues:
            queue.ask(begin, own=False)
        await asyncio.sleep(0.7)
        assert len(ends) == 3  # none has ended
        queues[9].ask(begin, own=True)
        await asyncio.sleep(0.7)
        assert len(ends) == 4
        for end_look in ends[:4]:
            end_look()
        await asyncio.sleep(0.7)
        assert len(ends) == 4 + 3

    async def test_sealed(self, vault: Vault, faulty: Faulty) -> None:
        """Answers of 503 and a look that says sealed are an outage, that says so."""
        faulty.on("x", refusal(503, "Vault is sealed"))
        faulty.on(HEALTH, Answer(503, {"initialized": True, "sealed": True}))
        with pytest.raises(VaultUnreachable, match=r"is unreachable since .* it is sealed: unseal it"):
            await read_until_refused(vault)

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (Answer(503, b"<html>no backend</html>"), r"in front of it answers 503"),
            (Answer(502, b""), r"in front of it answers 502"),
            (Answer(501, {"initialized": False, "sealed": True}), r"it is not initialized: initialize it"),
            (Answer(cut=Cut.BEFORE), r"it closed the connection"),
        ],
    )
    async def test_load_balancer_without_vault(self, vault: Vault, faulty: Faulty, answer: Answer, said: str) -> None:
        """What stands where Vault was is no Vault: it is an outage as soon as a look is answered so too."""
        faulty.on("x", answer)
        faulty.on(HEALTH, answer)
        with pytest.raises(VaultUnreachable, match=said):
            await read_until_refused(vault)

    @pytest.mark.parametrize("health", [200, 429, 472, 473, 403, 404, 307])
    async def test_failing_path_is_no_outage(self, vault: Vault, faulty: Faulty, health: int) -> None:
        """A path that always fails, or breaks off, refuses nobody: a Vault that answers a look at all is there."""
        faulty.on("bad", refusal(503))
        faulty.on("broken", Answer(cut=Cut.WITHIN, body={"data": "1" * 100}))
        faulty.on(HEALTH, Answer(health, {"initialized": True, "sealed": False}))
        for _ in range(3):
            for path in ("bad", "broken"):
                with pytest.raises(VaultUnavailable) as told:
                    await read(vault, path)
                assert not isinstance(told.value, VaultUnreachable)
        await asyncio.sleep(0.6)
        assert faulty.count(HEALTH) >= 1
        assert await read(vault) == {"a": "1"}

    async def test_refusals_are_no_doubt(self, vault: Vault, faulty: Faulty) -> None:
        """Who is told no has been answered: nobody looks."""
        for _ in range(5):
            with pytest.raises(SecretNotFound):
                await read(vault, "nothing")
        await asyncio.sleep(0.6)
        assert faulty.count(HEALTH) == 0

    async def test_vault_that_hangs(
        self, vault: Vault, faulty: Faulty, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Connections accepted and nothing answered: mounts are refused soon, those waiting for a turn too.

        What is under way stays: its answer may hold a credential, and is taken when Vault goes on.
        """
        monkeypatch.setattr(watch, "SILENT_SECONDS", 0.2)
        monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
        faulty.on("slow", Answer(body={"data": {"a": "late"}}, stall=3.0))
        faulty.on("hangs", Answer(stall=3600))
        faulty.on(HEALTH, Answer(stall=3600))
        slow = asyncio.create_task(read(vault, "slow"))
        hung = [asyncio.create_task(read(vault, "hangs")) for _ in range(60)]
        for _ in range(500):
            if any(task.done() for task in hung):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert changes(events) == [True]
        assert sum(task.done() for task in hung) == 60 - 44
        with pytest.raises(VaultUnreachable, match=r"accepts connections and does not answer"):
            await read(vault, token=Sensitive("hvs.of-another-pod"))
        faulty.on(HEALTH, Answer(body={}))
        assert await slow == {"a": "late"}
        assert await read_when_back(vault) == {"a": "1"}
        await end(*hung)

    async def test_slow_engine_is_no_outage(
        self, vault: Vault, faulty: Faulty, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reads that hang for ever are looked at, and as Vault answers that, refuse nobody."""
        monkeypatch.setattr(watch, "SILENT_SECONDS", 0.1)
        faulty.on("hangs", Answer(stall=3600))
        hung = asyncio.create_task(read(vault, "hangs"))
        await asyncio.sleep(0.5)
        assert faulty.count(HEALTH) >= 1
        assert await read(vault) == {"a": "1"}
        assert changes(events) == []
        await end(hung)

    async def test_nobody_listens_to_a_vault_that_answers(
        self, vault: Vault, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as anybody is answered, who waits long is no reason to look."""
        monkeypatch.setattr(watch, "SILENT_SECONDS", 0.3)
        faulty.on("hangs", Answer(stall=3600))
        hung = asyncio.create_task(read(vault, "hangs"))
        for _ in range(20):
            await read(vault)
            await asyncio.sleep(0.05)
        assert faulty.count(HEALTH) == 0
        await end(hung)

    async def test_who_comes_during_a_look_waits_for_it(
        self, vault: Vault, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While it is in question whether Vault hangs, nobody else is sent into it."""
        monkeypatch.setattr(watch, "SILENT_SECONDS", 0.1)
        monkeypatch.setattr(watch, "LOOK_SECONDS", 1.0)
        faulty.on("hangs", Answer(stall=3600))
        faulty.on(HEALTH, Answer(stall=3600))
        hung = asyncio.create_task(read(vault, "hangs"))
        for _ in range(500):
            if faulty.count(HEALTH):
                break
            await asyncio.sleep(0.01)
        with pytest.raises(VaultUnreachable):
            await read(vault)
        assert faulty.count("x") == 0
        await end(hung)

    async def test_closing_ends_the_looks(self, servers: VaultServers, faulty: Faulty) -> None:
        """After the end of the daemon's parts nothing is left that would go on."""
        faulty.stop()
        with pytest.raises(VaultUnreachable):
            await read(servers.get(at(faulty.address)))
        await servers.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def read_until_refused(vault: Vault) -> None:
    """Reads that may fail as in passing troubles, with time in which it is looked at, until one is refused."""
    for _ in range(20):
        try:
            await read(vault)
        except VaultUnreachable:
            raise
        except VaultUnavailable:
            await asyncio.sleep(0.1)


async def end(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
