"""Sessions across restarts: what is written, what is taken up, and two daemons on one state directory."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.redact import Sensitive
from provider.sessions import registry
from provider.sessions.lifetime import Lifetime
from provider.sessions.model import HeldToken, Identity, Kept
from provider.sessions.snapshot import Snapshot, dump, load, merge
from provider.settings import TlsSettings
from provider.spc import Login, Pod, SecretRequest, VaultServer
from provider.state import Entry, StateDir
from provider.vault import Auth, VaultSecret
from tests.stand.simnode import CERTIFICATE, KEY, PRIVATE_KEY, STATIC, Key, Stage, credential
from tests.stand.simtime import simulated
from tests.stand.simvault import Creds, Role
from tests.test_audit import no_file_larger_than

HOUR = 3600.0


class Readings:
    """A clock that stands still, where it is put."""

    def __init__(self, now: float = 1000.0, wall: float = 1_700_000_000.0, epoch: str = "boot-1") -> None:
        self.readings = (now, wall, epoch)

    def now(self) -> float:
        return self.readings[0]

    def wall(self) -> float:
        return self.readings[1]

    def epoch(self) -> str:
        return self.readings[2]


# A snapshot and back ----------------------------------------------------------------------------------------------

times = st.floats(0, 1e9)
lives = st.builds(
    Lifetime,
    times,
    st.floats(0, 1e9),
    st.one_of(times, st.just(math.inf)),
    st.booleans(),
    st.booleans(),
    st.one_of(times, st.just(math.inf)),
)
names = st.text(max_size=12)
auths = st.builds(
    Auth,
    names.map(Sensitive),
    names,
    times,
    st.booleans(),
    names,
    st.lists(names, max_size=3).map(tuple),
    st.integers(0, 9),
)
requests = st.builds(
    SecretRequest,
    st.sampled_from(["GET", "POST"]),
    names,
    st.lists(st.tuples(names, names), max_size=2).map(tuple),
    st.one_of(st.none(), names.map(Sensitive)),
)
secrets = st.builds(
    VaultSecret, st.dictionaries(names, st.one_of(names, st.integers(), st.none())), names, times, st.booleans()
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    pod = Pod(*(draw(names) for _ in range(4)))
    tls = draw(st.builds(TlsSettings, names, names, names, names, names, st.booleans()))
    server, login = VaultServer(draw(names), draw(names), tls), Login(draw(names), draw(names), draw(st.none() | names))
    uses = st.one_of(st.none(), st.integers(0, 9))
    token = st.builds(HeldToken, auths, lives, st.just(-1), uses, st.booleans(), st.booleans())
    tokens = draw(st.lists(token, min_size=1, max_size=3))
    volumes = st.sets(names, max_size=3)
    kept = st.builds(Kept, requests, secrets, lives, st.sampled_from(tokens), volumes)
    return Snapshot(Identity(server, login, pod.uid), pod, tokens, draw(st.lists(kept, max_size=3)))


@given(snapshots())
def test_snapshot_comes_back_as_it_was(snapshot: Snapshot) -> None:
    """Dumped, written as JSON and loaded in the same boot, a session is equal in everything, its times unmoved."""
    clock = Readings()
    again = load(json.loads(json.dumps(dump(snapshot, clock))), clock)
    assert again == snapshot
    assert again.identity.key == snapshot.identity.key
    assert all(any(kept.token is token for token in again.tokens) for kept in again.kept)


def test_request_of_a_login_is_not_kept() -> None:
    """What only the process that logged in tells of is in no file, so that an older version reads a newer one's."""
    payload = _example()
    snapshot = load(payload, Readings())
    token = snapshot.tokens[0]
    token.auth = replace(token.auth, request_id="request-1")
    assert dump(snapshot, Readings()) == payload


@given(snapshots(), st.floats(0, 1e6), st.floats(0, 1e6))
def test_another_boot_moves_times_by_the_calendar(snapshot: Snapshot, now: float, away: float) -> None:
    """After a reboot each life has as much left as it had, less the time that passed by the calendar."""
    before, after = Readings(), Readings(now, 1_700_000_000.0 + away, "boot-2")
    again = load(dump(snapshot, before), after)
    for old, new in zip(snapshot.tokens, again.tokens, strict=True):
        left = old.life.expires_at - before.now() - away
        assert new.life.expires_at - now == pytest.approx(left, abs=1e-3)


@given(snapshots(), st.floats(1, 1e6))
def test_a_calendar_set_back_lengthens_no_life(snapshot: Snapshot, back: float) -> None:
    """A reboot with a date before the snapshot's counts as no time passed, not as time won."""
    before, after = Readings(), Readings(5.0, 1_700_000_000.0 - back, "boot-2")
    for old, new in zip(snapshot.tokens, load(dump(snapshot, before), after).tokens, strict=True):
        assert new.life.expires_at - 5.0 == pytest.approx(old.life.expires_at - before.now(), abs=1e-3)


def _example() -> dict[str, Any]:
    token = HeldToken(Auth(Sensitive("hvs.x"), "a", 60, True, "e", ("p",), 0), _life(0), -1, None)
    kept = Kept(SecretRequest("GET", "x"), VaultSecret({"data": 1}, "x/1", 60, True), _life(0), token, {"/v"})
    identity = Identity(VaultServer("http://v", "", TlsSettings()), Login("kubernetes", "app", None), "uid")
    return dump(Snapshot(identity, Pod("n", "p", "uid", "sa"), [token], [kept]), Readings())


def _life(started: float, ttl: float = 60) -> Lifetime:
    return Lifetime.start(started, ttl, renewable=True, percent=67, luck=0)


def _places(found: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value below the response, which may be anything."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    below = [place for key, value in inner if key != "response" for place in _places(value, (*path, key))]
    return [path, *below] if path else below


# Fields that may be absent, as Python's defaults say.
OPTIONAL = {"lease_id", "lease_duration", "renewable"}
NEEDED = [
    place
    for place in _places(_example())
    if isinstance(place[-1], str) and not ("tls" in place[:-1] or ("secret" in place[:-1] and place[-1] in OPTIONAL))
]


@pytest.mark.parametrize("place", NEEDED, ids=str)
def test_what_lacks_anything_is_no_session(place: tuple[Any, ...]) -> None:
    """JSON that lacks any one field is a ValueError, no other error, and quotes nothing of it."""
    payload = copy.deepcopy(_example())
    inner = payload
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    with pytest.raises(ValueError, match="not a session") as refused:
        load(payload, Readings(epoch="boot-2"))
    assert "hvs.x" not in str(refused.value)


@given(st.recursive(st.none() | st.booleans() | st.text(), lambda inner: st.dictionaries(names, inner), max_leaves=5))
def test_any_other_json_is_no_session(garbage: Any) -> None:
    """Whatever JSON object it is, if it is not a session it is a ValueError."""
    with pytest.raises(ValueError, match="not a session"):
        load({"time": garbage, "server": garbage, "tokens": garbage}, Readings())


# Two daemons' views merged ------------------------------------------------------------------------------------------

REQUEST = SecretRequest("GET", "database/creds/app")
IDENTITY = Identity(VaultServer("http://v", "", TlsSettings()), Login("kubernetes", "app", None), "uid")
POD = Pod("n", "p", "uid", "sa")


def held(name: str, started: float = 0) -> HeldToken:
    return HeldToken(Auth(Sensitive(name), "", 60, True, "", (), 0), _life(started), -1, None)


def kept_of(token: HeldToken, user: str, started: float, *volumes: str) -> Kept:
    return Kept(REQUEST, VaultSecret({"data": user}, f"id-{user}", 60, True), _life(started), token, set(volumes))


def test_merge_takes_the_later_life_of_one_lease() -> None:
    """Of one credential that both hold, the renewal of the one counts for the other; volumes are joined."""
    mine, theirs = held("t"), held("t")
    my_kept, their_kept = kept_of(mine, "u", 0, "/one"), kept_of(theirs, "u", 0, "/two")
    their_kept.life.renewed(50, 60, percent=67, luck=0)
    theirs.life.renewed(50, 60, percent=67, luck=0)
    tokens, kept = merge([mine], {REQUEST: my_kept}, Snapshot(IDENTITY, POD, [theirs], [their_kept]))
    assert [token.life.expires_at for token in tokens] == [110]
    assert kept[REQUEST].life.expires_at == 110
    assert kept[REQUEST].volumes == {"/one", "/two"}
    assert kept[REQUEST].token is tokens[0]


def test_merge_keeps_my_later_life() -> None:
    """What I renewed later than the other wrote stays mine."""
    mine, theirs = held("t"), held("t")
    mine.life.renewed(50, 60, percent=67, luck=0)
    tokens, _ = merge([mine], {}, Snapshot(IDENTITY, POD, [theirs], []))
    assert [token.life.expires_at for token in tokens] == [110]


@pytest.mark.parametrize(("mine", "theirs", "left"), [(5, 2, 2), (2, 5, 2), (None, None, None)])
def test_merge_believes_in_the_fewer_uses(mine: int | None, theirs: int | None, left: int | None) -> None:
    """What either of two processes has spent of a token is gone for both."""
    my_token, their_token = held("t"), held("t")
    my_token.uses_left, their_token.uses_left = mine, theirs
    tokens, _ = merge([my_token], {}, Snapshot(IDENTITY, POD, [their_token], []))
    assert [token.uses_left for token in tokens] == [left]


@pytest.mark.parametrize("newer", ["mine", "theirs"])
def test_merge_takes_the_newer_of_two_credentials(newer: str) -> None:
    """Of two credentials for one request the newer is handed out; the tokens of both are known, oldest first."""
    old, new = held("old", 0), held("new", 30)
    mine, theirs = (new, old) if newer == "mine" else (old, new)
    my_kept = kept_of(mine, "u1", mine.life.started_at, "/one")
    their_kept = kept_of(theirs, "u2", theirs.life.started_at, "/two")
    tokens, kept = merge([mine], {REQUEST: my_kept}, Snapshot(IDENTITY, POD, [theirs], [their_kept]))
    assert [token.auth.token.reveal() for token in tokens] == ["old", "new"]
    assert kept[REQUEST].token is tokens[1]
    assert kept[REQUEST].volumes == {"/one", "/two"}


def test_merge_knows_what_either_found_dead() -> None:
    """A token that one of them found dead is dead for both, and one that bears leases bears them for both."""
    mine, theirs = held("t"), held("t")
    theirs.dead = theirs.bears_leases = True
    tokens, _ = merge([mine], {}, Snapshot(IDENTITY, POD, [theirs], []))
    assert (tokens[0].dead, tokens[0].bears_leases) == (True, True)


def test_merge_knows_what_either_found_ended() -> None:
    """A renewal that one of them saw refused is not tried again by the other."""
    mine, theirs = held("t"), held("t")
    theirs.life.refused()
    tokens, _ = merge([mine], {}, Snapshot(IDENTITY, POD, [theirs], []))
    assert tokens[0].life.final_end == 60


# Restarts -----------------------------------------------------------------------------------------------------------


@simulated
async def test_restart_costs_nothing() -> None:
    """After a kill and a restart a pod that had token and credential gets the same, with no request but its reads."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential(), CERTIFICATE, PRIVATE_KEY, STATIC)
        await asyncio.sleep(1)
        await stage.killed(node)
        stage.vault.seen.clear()
        node = stage.node(kept=True)
        assert await node.mount(pod, *credential(), CERTIFICATE, PRIVATE_KEY, STATIC) == first
        await asyncio.sleep(1)
        assert {seen.path for seen in stage.vault.seen} <= {"secret/data/app", "sys/internal/ui/mounts/secret/data/app"}


@simulated
async def test_restart_goes_on_renewing() -> None:
    """Renewal goes on after a restart, without any re-mount, from the points that were planned."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await stage.killed(node)
        await asyncio.sleep(50 * 60)
        node = stage.node(kept=True)
        await asyncio.sleep(5 * HOUR)
        assert await node.mount(pod, *credential()) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_restart_right_after_the_answer() -> None:
    """What Vault issued is in the file before its mount is answered: a kill at that moment loses nothing."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential(), CERTIFICATE)
        state = StateDir(str(stage.state), KEY)
        (name,) = state.keys()
        entry = await state.load(name)
        assert entry is not None
        users = [kept["secret"]["response"]["data"].get("username") for kept in entry.payload["kept"]]
        assert sorted(users, key=str) == sorted([None, first["user"]], key=str)


@simulated
async def test_credential_that_died_while_away() -> None:
    """What ended while no daemon ran is not handed out by the next one."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.killed(node)
        await asyncio.sleep(2 * HOUR)
        files = await stage.node(kept=True).mount(pod, *credential())
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_reboot_with_a_state_that_lasted() -> None:
    """On a directory that outlives a boot, what is left of each life is known by the calendar."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await stage.killed(node)
        await asyncio.sleep(20 * 60)
        stage.clock.reboot()
        node = stage.node(kept=True)
        assert await node.mount(pod, *credential()) == first
        await asyncio.sleep(3 * HOUR)
        assert await node.mount(pod, *credential()) == first
        assert stage.vault.issued == 1


@simulated
async def test_what_was_let_go_stays_so() -> None:
    """A credential that the class dropped before the restart is not renewed after it."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential(), STATIC)
        await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        await stage.killed(node)
        stage.node(kept=True)
        await asyncio.sleep(3 * HOUR)
        assert stage.vault.lease_of(first["user"]).ends < stage.world.now()
        assert stage.vault.live_tokens()


@simulated
async def test_second_volume_keeps_its_credential_over_a_restart() -> None:
    """After a restart one class dropping the path does not drop it for the volume that was not mounted since."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential(), volume="/one")
        await node.mount(pod, *credential(), volume="/two")
        await asyncio.sleep(1)
        await stage.killed(node)
        node = stage.node(kept=True)
        await node.mount(pod, STATIC, volume="/one")
        await asyncio.sleep(3 * HOUR)
        assert await node.mount(pod, *credential(), volume="/two") == first


@simulated
async def test_two_days_of_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarted every three hours over two days, a node costs no more credentials than one that runs on."""
    monkeypatch.setattr(registry, "LONGEST_SLEEP_SECONDS", 60.0)  # no suspension here; days have many 5 s
    async with Stage() as stage:
        pod = stage.pod("a")
        for _ in range(16):
            node = stage.node(kept=True)
            await node.remount(3 * HOUR, pod, *credential())
            states = node.written[pod.uid, "/volume"]
            assert all(stage.vault.lease_of(files["user"]).ends > at for at, files in states)
            await stage.killed(node)
        assert stage.vault.issued <= 4
        assert stage.vault.logins <= 4


# Two daemons at one time ----------------------------------------------------------------------------------------


@simulated
async def test_session_that_another_daemon_made_since() -> None:
    """A pod first mounted by another daemon after our start is found in the directory at its first mount here."""
    async with Stage() as stage:
        old, new, pod = stage.node(kept=True), stage.node(kept=True), stage.pod("a")
        await new.mount(stage.pod("b"), STATIC)
        first = await old.mount(pod, *credential(), STATIC)
        assert await new.mount(pod, *credential(), STATIC) == first
        assert (stage.vault.logins, stage.vault.issued) == (2, 1)


@simulated
async def test_two_daemons_at_the_same_moment() -> None:
    """A pod that two daemons mount at one time gets one login and one credential, the same from both."""
    async with Stage() as stage:
        one, two, pod = stage.node(kept=True), stage.node(kept=True), stage.pod("a")
        with stage.vault.hold("database/"):
            mounts = [asyncio.create_task(node.mount(pod, *credential(), CERTIFICATE)) for node in (one, two)]
            await asyncio.sleep(2)
        files = await asyncio.gather(*mounts)
        assert files[0] == files[1]
        assert (stage.vault.logins, stage.vault.issued, stage.vault.count("pki/issue/web")) == (1, 1, 1)


@simulated
async def test_overlap_renews_once() -> None:
    """While two daemons overlap, each renewal is made by one of them, and known to the other."""
    async with Stage() as stage:
        one, two, pod = stage.node(kept=True), stage.node(kept=True), stage.pod("a")
        first = await one.mount(pod, *credential())
        assert await two.mount(pod, *credential()) == first
        await asyncio.sleep(10 * HOUR)
        assert stage.vault.count("sys/leases/renew") <= 10 * HOUR / (0.6 * HOUR) + 1
        assert await one.mount(pod, *credential()) == await two.mount(pod, *credential()) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_overlap_replaces_once() -> None:
    """What is due for replacement is replaced by one of two daemons; the other hands out what that one got."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=HOUR, max_ttl=HOUR, renewable=False)
        one, two, pod = stage.node(kept=True), stage.node(kept=True), stage.pod("a")
        while stage.world.now() < 0.75 * HOUR:
            assert await one.mount(pod, *credential()) == await two.mount(pod, *credential())
            await asyncio.sleep(75)
        assert stage.vault.issued == 2


@simulated
async def test_rolling_update() -> None:
    """An old daemon that serves on while the new one begins damages nothing: no login, no credential, no revocation."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=10 * 60, max_ttl=10 * HOUR)
        old, pod = stage.node(kept=True), stage.pod("a")
        first = await old.mount(pod, *credential(), STATIC)
        await asyncio.sleep(600)
        new = stage.node(kept=True)
        for node in (old, new, old, new):
            assert await node.mount(pod, *credential(), STATIC) == first
            await asyncio.sleep(5)
        await stage.killed(old)
        await asyncio.sleep(3 * HOUR)
        assert await new.mount(pod, *credential(), STATIC) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)
        assert stage.vault.count("auth/token/revoke-self") == 0


# A directory that is not as it should be ----------------------------------------------------------------------------


def session_file(stage: Stage) -> Path:
    (path,) = stage.state.glob("*.session")
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rename(path: Path) -> None:
    path.rename(path.with_name("f" * 32 + ".session"))


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(b"{}" * 100)


def make_later(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4] += 1
    path.write_bytes(raw)


@pytest.mark.parametrize("spoil", [truncate, rename, fill_with_garbage, make_later])
def test_spoiled_file_costs_one_login(spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    """A file that does not open is set aside with a warning; the daemon serves its pod anew, and all others as ever."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, pod, other = stage.node(kept=True), stage.pod("a"), stage.pod("b")
            await node.mount(pod, *credential())
            await asyncio.sleep(1)
            spoiled = session_file(stage)
            untouched = await node.mount(other, *credential())
            await stage.killed(node)
            spoil(spoiled)
            node = stage.node(kept=True)
            assert await node.mount(other, *credential()) == untouched
            files = await node.mount(pod, *credential())
            assert stage.vault.lease_of(files["user"]).ends > stage.world.now()
            assert stage.vault.issued == 3
            assert caplog.text.count("is set aside") == 1
            assert len(list(stage.state.glob("*.aside"))) == 1

    scene()


@pytest.mark.parametrize("at", ["start", "first mount"])
def test_sealed_garbage_is_set_aside(at: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file that opens and holds no session is set aside like a damaged one, whenever it is found."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, pod = stage.node(kept=True), stage.pod("a")
            await node.mount(pod, *credential())
            await asyncio.sleep(1)
            name = session_file(stage).stem
            await stage.killed(node)
            state = StateDir(str(stage.state), KEY)
            if at == "first mount":
                session_file(stage).unlink()
                node = stage.node(kept=True)
                await node.mount(stage.pod("b"), STATIC)
            await state.save(name, Entry(9, {"tokens": 3}))
            if at == "start":
                node = stage.node(kept=True)
            files = await node.mount(pod, *credential())
            assert stage.vault.lease_of(files["user"]).ends > stage.world.now()
            assert "its contents are not a session" in caplog.text

    scene()


@simulated
async def test_other_key_starts_anew() -> None:
    """With another HMAC key the files of before are set aside, and pods are served anew."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await stage.killed(node)
        node = stage.node(kept=True, key=Key(b"another key of the same length.."))
        assert await node.mount(pod, *credential()) != first


@simulated
async def test_directory_that_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    """Where the state directory cannot be made, mounts go on, sessions are kept in memory, and that is said."""
    async with Stage() as stage:
        stage.state.write_text("a file in its place")
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(3 * HOUR)
        assert await node.mount(pod, *credential()) == first
        assert "sessions are kept in memory only" in caplog.text


@simulated
async def test_directory_that_is_emptied() -> None:
    """A directory that somebody empties under the daemon costs nothing, and is filled again by and by."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(1)
        for path in stage.state.iterdir():
            path.unlink()
        await asyncio.sleep(HOUR)
        assert await node.mount(pod, *credential()) == first
        await stage.killed(node)
        assert await stage.node(kept=True).mount(pod, *credential()) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_directory_that_vanishes() -> None:
    """A directory that vanishes is made again by the next mount, and holds the session that this one was for."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(1)
        for path in stage.state.iterdir():
            path.unlink()
        stage.state.rmdir()
        assert await node.mount(pod, *credential()) == first
        await asyncio.sleep(1)
        assert session_file(stage).exists()
        await stage.killed(node)
        assert await stage.node(kept=True).mount(pod, *credential()) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_disk_that_is_full(caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be written, mounts and renewals go on, which is told once; then the session is written."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        with no_file_larger_than(10):
            first = await node.mount(pod, *credential(), STATIC)
            await asyncio.sleep(HOUR / 2)
        await asyncio.sleep(HOUR / 2)
        assert await node.mount(pod, *credential(), STATIC) == first
        assert caplog.text.count("File too large") == 1
        await stage.killed(node)
        assert await stage.node(kept=True).mount(pod, *credential(), STATIC) == first
        assert stage.vault.issued == 1


@simulated
async def test_no_secret_on_disk() -> None:
    """No token, JWT, password or private key is to be found in any file of the state directory."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        files = await node.mount(pod, *credential(), CERTIFICATE, PRIVATE_KEY, STATIC)
        await asyncio.sleep(1)
        canaries = [*files.values(), *stage.vault.tokens, pod.uid, "shop/", "database/creds"]
        raw = b"".join(path.read_bytes() for path in stage.state.iterdir())
        assert raw
        assert [canary for canary in canaries if canary.encode() in raw] == []


# The key --------------------------------------------------------------------------------------------------------------


@simulated
async def test_no_file_is_touched_before_the_key() -> None:
    """Until the HMAC key is there, mounts are served from Vault, and no file is made, read or set aside."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        await asyncio.sleep(1)
        await stage.killed(node)
        before = {path.name: path.stat() for path in stage.state.iterdir()}
        node = stage.node(kept=True, key=Key(None))
        await node.mount(pod, *credential())
        await asyncio.sleep(HOUR)
        assert {path.name: path.stat() for path in stage.state.iterdir()} == before


@simulated
async def test_key_that_comes_late_while_a_mount_waits() -> None:
    """The first mounts wait for the key within their time, so that a restart before it is there issues nothing."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await stage.killed(node)
        late = asyncio.Event()

        class Late(Key):
            async def get(self) -> bytes | None:
                await late.wait()
                return self.known

        node = stage.node(kept=True, key=Late())
        mount = asyncio.create_task(node.mount(pod, *credential()))
        await asyncio.sleep(10)
        late.set()
        assert await mount == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_key_that_comes_late_is_used_then() -> None:
    """Sessions made before the key came are written once it is there, merged with the file of the earlier process."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.killed(node)
        key = Key(None)
        node = stage.node(kept=True, key=key)
        second = await node.mount(pod, *credential())
        key.known = KEY
        await asyncio.sleep(HOUR)
        assert await node.mount(pod, *credential()) == second
        await stage.killed(node)
        node = stage.node(kept=True)
        assert await node.mount(pod, *credential()) == second
        stage.remove(pod)
        await asyncio.sleep(300)
        assert not stage.vault.live_tokens()


@simulated
async def test_mount_does_not_wait_for_ever_for_the_key() -> None:
    """A key that never comes costs the first mounts a part of their time, later ones none."""
    async with Stage() as stage:

        class Never(Key):
            async def get(self) -> bytes | None:
                await asyncio.sleep(5)
                return None

        node, pod = stage.node(kept=True, key=Never()), stage.pod("a")
        began = stage.world.now()
        await node.mount(pod, STATIC)
        assert stage.world.now() - began < 60
