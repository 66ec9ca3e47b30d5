"""What Vault's answers take in memory: counted, bounded for all mounts together, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import pickle
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace

import pytest

from provider.clock import SystemClock
from provider.errors import Code, MountFailed, ProviderError
from provider.redact import Sensitive
from provider.settings import TlsSettings
from provider.spc import ObjectSpec, Pod, SecretRequest, VaultServer
from provider.vault import Memory, NoRoom, Room, VaultSecret, VaultServers, adapter, memory, transport
from provider.vault.memory import (
    ALL_SMALL_ANSWERS_BYTES,
    KEPT_BYTES,
    LARGE_MOUNTS,
    LEASED_BYTES,
    MAX_ANSWERS_BYTES,
    SMALL_ANSWERS_BYTES,
    size_parsed,
)
from tests.stand.faulty import Answer, Faulty
from tests.stand.simnode import STATIC, Stage, credential, wanted
from tests.stand.simtime import simulated

LARGE = 2 * SMALL_ANSWERS_BYTES


def soon(seconds: float = 5) -> float:
    return asyncio.get_running_loop().time() + seconds


def refused(attempt: Callable[[], object]) -> NoRoom:
    with pytest.raises(NoRoom) as told:
        attempt()
    return told.value


def is_whole(told: Memory) -> bool:
    """Whether everything that was lent and held is back."""
    return (told.small.free, told.small._lent, told.places.free) == (ALL_SMALL_ANSWERS_BYTES, {}, LARGE_MOUNTS)


# --- one mount --------------------------------------------------------------------------------------------


async def test_a_usual_mount_needs_no_place() -> None:
    """However many there are: the answers of each are small."""
    shared = Memory()
    rooms = [shared.room("shop") for _ in range(200)]
    for room in rooms:
        for _ in range(50):
            room.check()
            room.take(2000)
    assert shared.places.free == LARGE_MOUNTS
    for room in rooms:
        room.close()
    assert is_whole(shared)


async def test_a_large_mount_has_a_place_at_once() -> None:
    """Where one is free nothing is read twice; and what it was lent as a small one is there for others."""
    shared = Memory()
    room = shared.room("shop")
    room.take(SMALL_ANSWERS_BYTES)
    room.take(LARGE)
    assert shared.places.free == LARGE_MOUNTS - 1
    assert shared.small.free == ALL_SMALL_ANSWERS_BYTES
    room.close()
    assert is_whole(shared)


async def test_no_mount_takes_more_than_any_may() -> None:
    """It is told what to do, and reads that are not sent yet are not worth sending."""
    room = Memory().room("shop")
    for _ in range(4):
        room.take(MAX_ANSWERS_BYTES // 4)
    room.check()
    error = refused(lambda: room.take(1))
    assert error.code is Code.FAILED_PRECONDITION
    assert not error.passing
    assert "more than 32 MiB in memory: name fewer or smaller secrets" in str(error)
    assert not refused(room.check).passing


async def test_one_answer_that_is_too_large() -> None:
    """It is known before it is parsed."""
    room = Memory().room("shop")
    assert not refused(lambda: room.check(MAX_ANSWERS_BYTES + 1)).passing


# --- many -------------------------------------------------------------------------------------------------


def placed(shared: Memory, *owners: str) -> list[Room]:
    """Mounts of these owners that have a place each."""
    rooms = [shared.room(owner) for owner in owners]
    for room in rooms:
        room.take(LARGE)
    return rooms


async def test_who_finds_no_place_waits_for_one() -> None:
    """The answer is let go, and has room once a mount has ended."""
    shared = Memory()
    rooms = placed(shared, "a", "b", "c")
    room = shared.room("d")
    room.take(1000)
    error = refused(lambda: room.take(LARGE))
    assert error.passing
    assert error.room is room
    assert refused(room.check).passing
    waiting = asyncio.create_task(room.widen(soon()))
    await asyncio.sleep(0)
    assert not waiting.done()
    rooms[0].close()
    await waiting
    room.check()
    room.take(LARGE)
    for held in (room, *rooms[1:]):
        held.close()
    assert is_whole(shared)


async def test_a_namespace_leaves_a_place_to_others() -> None:
    """A tenant's many large mounts have all places but one; another namespace's has that at once."""
    shared = Memory()
    placed(shared, *["tenant"] * (LARGE_MOUNTS - 1))
    assert refused(lambda: placed(shared, "tenant")).passing
    placed(shared, "other")


async def test_a_namespace_leaves_small_mounts_their_memory() -> None:
    """A tenant's thousands of mounts, each just small enough, come to half of it; others' still need no place."""
    shared = Memory()
    for _ in range(1000):
        try:
            shared.room("tenant").take(SMALL_ANSWERS_BYTES)
        except NoRoom:
            break
    lent = ALL_SMALL_ANSWERS_BYTES - shared.small.free
    assert lent <= ALL_SMALL_ANSWERS_BYTES // 2
    places = shared.places.free
    for _ in range(10):
        shared.room("other").take(SMALL_ANSWERS_BYTES)
    assert shared.places.free == places


async def test_who_waits_in_vain_is_told_so() -> None:
    """Before the mount's time is over, and that kubelet tries again."""
    shared = Memory()
    placed(shared, "a", "b", "c")
    room = shared.room("d")
    with pytest.raises(NoRoom, match=r"mounts of large secrets take all the memory.*kubelet tries again"):
        await room.widen(soon(1.05))


async def test_who_goes_away_while_it_waits_holds_nothing() -> None:
    """Its place is the next one's."""
    shared = Memory()
    rooms = placed(shared, "a", "b", "c")
    room = shared.room("d")
    waiting = asyncio.create_task(room.widen(soon()))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for held in (room, *rooms):
        held.close()
    assert is_whole(shared)


async def test_what_comes_after_the_mount_has_ended() -> None:
    """A late answer may be a credential, which is kept; a large one is not."""
    shared = Memory()
    room = shared.room("a")
    room.take(1000)
    room.close()
    room.take(1000, leased=True)
    refused(lambda: room.take(LARGE))
    assert is_whole(shared)


async def test_a_credential_that_was_issued_is_not_lost() -> None:
    """It has room where another answer has none, since it cannot be read once more; but only a small one."""
    shared = Memory()
    placed(shared, "a", "b", "c")
    room = shared.room("d")
    room.take(SMALL_ANSWERS_BYTES)
    room.take(5000, leased=True)
    refused(lambda: room.take(5000))
    refused(lambda: room.take(LEASED_BYTES + 1, leased=True))


async def test_nothing_is_ever_lost() -> None:
    """Whatever mounts do, all is there again when they have ended."""
    chance = random.Random(7)
    shared = Memory()
    rooms: list[Room] = []
    for _ in range(3000):
        if rooms and chance.random() < 0.3:
            rooms.pop(chance.randrange(len(rooms))).close()
            continue
        rooms.append(shared.room(chance.choice("abc")))
        room = chance.choice(rooms)
        try:
            room.take(chance.choice([500, 100_000, LARGE, MAX_ANSWERS_BYTES]), leased=chance.random() < 0.2)
        except NoRoom as error:
            if error.passing and chance.random() < 0.3:
                with contextlib.suppress(NoRoom):
                    await room.widen(soon(1.001))
    for room in rooms:
        room.close()
    assert is_whole(shared)


# --- sizes ------------------------------------------------------------------------------------------------


def in_memory(value: object, seen: set[int]) -> int:
    """Bytes of a value and all below it, each object once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    below = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return sys.getsizeof(value) + sum(in_memory(item, seen) for item in below)


SHAPES = {
    "empty lists": b"[" + b"[]," * 5000 + b"[]]",
    "objects of one": b"[" + b'{"":1},' * 5000 + b"{}]",
    "nested objects": b'{"":' * 300 + b"1" + b"}" * 300,
    "lists of one": b"[" + b"[[0]]," * 5000 + b"0]",
    "many keys": json.dumps({str(number): str(number) for number in range(5000)}).encode(),
    "short texts": json.dumps([f"{number:03}" for number in range(1000)] * 3, separators=(",", ":")).encode(),
    "numbers": json.dumps([number + 0.5 for number in range(5000)], separators=(",", ":")).encode(),
    "one text": json.dumps("x" * 100_000).encode(),
    "one wide text": json.dumps("x" * 100_000 + "\N{GRINNING FACE}", ensure_ascii=False).encode(),
    "one wide text, escaped": json.dumps("x" * 100_000 + "\N{GRINNING FACE}").encode(),
    "short wide texts": json.dumps([f"\N{WHITE SMILING FACE}{number}" for number in range(3000)]).encode(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_json_takes_is_known_before(shape: str) -> None:
    """No shape of JSON takes much more than is reckoned, nor the usual ones much less."""
    raw = SHAPES[shape]
    taken = in_memory(json.loads(raw), set())
    assert size_parsed(bytearray(raw)) >= 0.85 * taken
    assert size_parsed(bytearray(raw)) <= 12 * taken


# --- mounts -----------------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes more than some kilobytes is large."""
    monkeypatch.setattr(memory, "SMALL_ANSWERS_BYTES", 6_000)
    monkeypatch.setattr(memory, "MAX_ANSWERS_BYTES", 60_000)
    monkeypatch.setattr(memory, "REMEMBERED_BYTES", 30_000)


def large(stage: Stage, name: str, size: int = 4_000) -> None:
    stage.vault.kv[f"secret/data/{name}"] = {"data": {"key": name, "more": "x" * size}, "metadata": {}}


async def mounted_together(stage: Stage, *, share_reads: bool) -> None:
    """Twelve pods mount two volumes each, all at once, of a credential and the same five large secrets."""
    names = [f"large-{number}" for number in range(5)]
    for name in names:
        large(stage, name)
    node = stage.node(share_reads=share_reads)
    pods = [stage.pod(f"pod-{number}") for number in range(12)]
    await asyncio.gather(*(node.mount(pod, wanted("a", "secret/data/app", "password")) for pod in pods))
    chance = random.Random(1)
    mounts = []
    for pod in pods:
        for volume in ("/one", "/two"):
            chance.shuffle(names)
            files = [wanted(name, f"secret/data/{name}", "key") for name in names]
            mounts.append(node.mount(pod, *credential(), *files, volume=volume))
    began = stage.world.now()
    for mounted in await asyncio.gather(*mounts):
        assert {mounted[name] for name in names} == set(names)
    assert stage.world.now() - began < 10
    assert stage.vault.issued == len(pods)
    assert is_whole(node.sessions._memory)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("share_reads", [True, False])
def test_large_mounts_that_share_reads_do_not_wait_for_each_other(share_reads: bool) -> None:
    """Many more than there are places, of one namespace, each with reads that others wait for: all succeed, in no time
    of the simulation to speak of, and what is issued is issued once.
    """

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            await mounted_together(stage, share_reads=share_reads)

    scene()


@pytest.mark.usefixtures("little")
@simulated
async def test_volumes_of_one_pod_count_what_they_share() -> None:
    """Both hold the answer that one of them asked for, each as long as its own mount takes."""
    async with Stage() as stage:
        large(stage, "large", 8_000)
        large(stage, "slow", 1)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, wanted("a", "secret/data/app", "password"))
        files = [wanted(name, f"secret/data/{name}", "key") for name in ("large", "slow")]
        with stage.vault.hold("secret/data/slow"):
            mounts = [asyncio.create_task(node.mount(pod, *files, volume=volume)) for volume in ("/one", "/two")]
            await asyncio.sleep(1)
            assert stage.vault.count("secret/data/large") == 1
            assert node.sessions._memory.places.free == LARGE_MOUNTS - 2
        await asyncio.gather(*mounts)
        assert is_whole(node.sessions._memory)


@pytest.mark.usefixtures("little")
@simulated
async def test_what_volumes_remember_is_bounded() -> None:
    """Where there is no memory for it, a volume's secrets are read at each mount; what is given up is there again."""
    async with Stage() as stage:
        for name in ("one", "two"):
            large(stage, name, 10_000)
        node, pod = stage.node(), stage.pod("a")
        loans = node.sessions._memory.remembered
        for _ in range(3):
            for name in ("one", "two"):
                await node.mount(pod, wanted(name, f"secret/data/{name}", "key", refresh_after=3600), volume=name)
        assert [stage.vault.count(f"secret/data/{name}") for name in ("one", "two")] == [1, 3]
        assert 10_000 < loans.free < 20_000
        for name in ("one", "two"):
            await node.mount(pod, wanted("a", "secret/data/app", "password"), volume=name)
        assert (loans.free, loans._lent) == (30_000, {})


def certificate(number: int) -> ObjectSpec:
    """One of its own for each number: another request is another credential."""
    return wanted("certificate", "pki/issue/web", "certificate", method="POST", body=f'{{"number": {number}}}')


@simulated
async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever other requests, in mounts that never succeed, fill no node: nor do they take another namespace's memory."""
    monkeypatch.setattr(memory, "KEPT_BYTES", 40_000)
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        loans = node.sessions._memory.kept
        for number in range(40):
            with pytest.raises(MountFailed):
                await node.mount(pod, certificate(number), wanted("none", "secret/data/none"))
        with pytest.raises(MountFailed, match="the credentials of namespace shop take all the memory"):
            await node.mount(pod, certificate(40))
        assert 20_000 <= loans.free < 25_000
        other = Pod("bank", "b", "uid-of-b", "bank")
        stage.cluster.pods[other.uid] = other
        assert await node.mount(other, *credential()) == await node.mount(other, *credential())
        stage.remove(pod)
        stage.remove(other)
        await asyncio.sleep(300)
        assert (loans.free, loans._lent) == (40_000, {})


@simulated
async def test_who_has_all_there_is_to_keep_may_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential whose time has come makes room for its successor."""
    monkeypatch.setattr(memory, "KEPT_BYTES", 25_000)
    async with Stage() as stage:
        stage.vault.certificates["pki/issue/web"] = 7 * 86400.0
        node, pod = stage.node(), stage.pod("a")
        loans = node.sessions._memory.kept
        held = [replace(certificate(number), name=f"file-{number}") for number in range(3)]
        files = await node.mount(pod, *held)
        with pytest.raises(MountFailed, match="take all the memory"):
            await node.mount(pod, certificate(9), volume="/other")
        # Others take what they may of the rest.
        for number in range(4):
            other = Pod(f"other-{number}", "b", f"uid-of-other-{number}", "bank")
            stage.cluster.pods[other.uid] = other
            with contextlib.suppress(MountFailed):
                await node.mount(other, certificate(0), wanted("none", "secret/data/none"))
        free = loans.free
        await node.remount(6 * 86400.0, pod, *held)
        later = await node.mount(pod, *held)
        assert not set(later.values()) & set(files.values())
        assert loans.free == pytest.approx(free, abs=100)


@simulated
async def test_requests_that_gave_nothing_to_keep_are_not_kept_themselves() -> None:
    """Each may bring a body of a megabyte, another one each time."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.policies["app"] += ("tools/",)
        stage.vault.kv["tools/hash"] = {"sum": "x"}
        for number in range(3):
            body = json.dumps({"input": "canary" * 1000 + str(number)})
            await node.mount(pod, wanted("sum", "tools/hash", "sum", method="POST", body=body))
        (session,) = node.sessions.all()
        assert len(session._has._static) == 3
        assert "canary" not in repr(pickle.dumps((session._has._static, session._has._volumes)))


@simulated
async def test_what_another_process_kept_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart changes nothing of it; where it has come to be too much, the rest is let go, and the log says so."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *(replace(certificate(number), name=f"file-{number}") for number in range(10)))
        before = KEPT_BYTES - node.sessions._memory.kept.free
        await stage.killed(node)
        for size in (KEPT_BYTES, before):
            monkeypatch.setattr(memory, "KEPT_BYTES", size)
            node = stage.node(kept=True)
            await asyncio.sleep(60)
            (session,) = node.sessions.views()
            assert len(session.leases) == (10 if size == KEPT_BYTES else 5)
            taken = size - node.sessions._memory.kept.free
            assert taken == pytest.approx(before if size == KEPT_BYTES else before / 2, rel=0.1)
            await stage.killed(node)


@pytest.mark.usefixtures("little")
@simulated
async def test_reads_that_could_have_no_room_are_not_sent() -> None:
    """A class of a thousand large secrets fails, says so, and has cost Vault little; the pod's other volumes mount."""
    async with Stage() as stage:
        for number in range(1000):
            large(stage, f"large-{number}")
        node, pod = stage.node(), stage.pod("a")
        files = [wanted(f"file-{number}", f"secret/data/large-{number}", "key") for number in range(1000)]
        with pytest.raises(
            MountFailed, match=r"come to more than .* in memory .*name fewer or smaller secrets"
        ) as told:
            await node.mount(pod, *files)
        assert told.value.code is Code.FAILED_PRECONDITION
        assert stage.vault.count("secret/data/large") < 200
        assert is_whole(node.sessions._memory)
        assert await node.mount(pod, files[0], volume="/other") == {"file-0": "large-0"}


WITHOUT = {
    "a secret that is not there": wanted("bad", "secret/data/none", "password"),
    "a key that is not there": wanted("bad", "secret/data/app", "none"),
    "an engine that is not there": wanted("bad", "none/app", "password"),
}


@pytest.mark.usefixtures("collector_off")
@pytest.mark.parametrize("why", WITHOUT)
@simulated
async def test_a_mount_that_fails_leaves_nothing_to_the_garbage_collector(why: str) -> None:
    """Errors come with frames, and frames with what was read; neither may be in a cycle with the other."""
    async with Stage() as stage:
        node = stage.node()
        pod, other = stage.pod("a"), stage.pod("b")
        await node.mount(other, STATIC)  # what is learnt once
        before = left_of_mounts()
        for _ in range(3):
            with pytest.raises(MountFailed) as told:
                await node.mount(pod, STATIC, WITHOUT[why])
            del told
        assert left_of_mounts() <= before


@pytest.mark.usefixtures("collector_off")
@simulated
async def test_a_mount_without_vault_leaves_nothing_to_the_garbage_collector() -> None:
    """Nor does one whose reads others would have shared."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        await asyncio.sleep(1)  # until its engine is known, whose reads are shared
        await stage.vault.stop()
        left = []
        for _ in range(3):
            with pytest.raises(MountFailed) as told:
                await node.mount(pod, STATIC)
            del told
            left.append(left_of_mounts())
        await stage.vault.start()
        assert max(left[1:]) <= left[0]  # the first may be kept, for who asks what is wrong


def left_of_mounts() -> int:
    """How many answers of Vault and errors there are, those that nobody can reach included."""
    return sum(isinstance(found, VaultSecret | ProviderError) for found in gc.get_objects())


NO_RESPONSE = {"message": "canary"}
OF_CERTIFICATE = {"auth": {"client_token": "hvs.canary", "metadata": {"cert_name": "node"}}}


@pytest.mark.parametrize(
    ("status", "body"),
    [(status, {"errors": ["no"], "data": {"long": "canary"}}) for status in (400, 403, 404, 503)]
    + [(200, NO_RESPONSE), (200, OF_CERTIFICATE)],
)
async def test_an_error_does_not_hold_the_answer(status: int, body: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are kept until their mount ends, which may have a thousand: not with all that Vault said."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)
    servers = VaultServers(clock=SystemClock())
    with Faulty() as faulty:
        faulty.on("x", Answer(status, body))
        faulty.on("auth/token/revoke-self", Answer(204, b""))
        vault = servers.get(VaultServer(faulty.address, "", TlsSettings()))
        with pytest.raises(ProviderError) as told:
            await vault.read(SecretRequest("GET", "x"), Sensitive("hvs.token"), soon())
        await servers.close()
    assert told.value.__cause__ is told.value.__context__ is None
    # The first frame is this one.
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(told.value.__traceback__)][1:]
    assert "canary" not in repr([value for local in frames for value in local.values()])
    assert not any(isinstance(value, transport.Answer) for local in frames for value in local.values())
