"""What two daemons on one node, a late key and a hostile Vault must not come to; on simulated time."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from provider.errors import KubernetesUnavailable, MountFailed, ProviderError
from provider.sessions import file, registry
from provider.state import _HEAD, _NONCE, MAX_FILE_BYTES, Entry, StateDir, StateUnusable
from tests.stand.simnode import CERTIFICATE, KEY, STATIC, Key, Stage, credential, wanted
from tests.stand.simtime import simulated
from tests.stand.simvault import Role

HOUR = 3600.0


@simulated
async def test_pod_that_the_old_daemon_mounts_late_is_renewed_by_the_new_one() -> None:
    """In a rolling update the old daemon mounts a pod after the new one opened the directory; its lease lives on.

    Nothing is mounted again: rotation may be off.
    """
    async with Stage() as stage:
        old, new = stage.node(kept=True), stage.node(kept=True)
        await new.mount(stage.pod("b"), STATIC)
        files = await old.mount(stage.pod("a"), *credential())
        await stage.killed(old)
        await asyncio.sleep(5 * HOUR)
        assert files["user"] in [lease.username for lease in stage.vault.live_leases()]


@simulated
async def test_pod_that_the_old_daemon_mounts_late_is_swept_by_the_new_one() -> None:
    """The same pod ends: the new daemon revokes what the old one was given for it, and removes its file."""
    async with Stage() as stage:
        old, new = stage.node(kept=True), stage.node(kept=True)
        await new.mount(stage.pod("b"), STATIC)
        pod = stage.pod("a")
        await old.mount(pod, *credential())
        await stage.killed(old)
        stage.remove(pod)
        await asyncio.sleep(600)
        assert stage.vault.live_leases() == []
        assert len(list(stage.state.glob("*.session"))) == 1


@simulated
async def test_token_of_a_daemon_that_dies_while_it_reads_is_revoked_at_the_pods_end() -> None:
    """What a login gave is written down before the mount is over: the next daemon knows it."""
    async with Stage() as stage:
        old, pod = stage.node(kept=True), stage.pod("a")
        await old.mount(stage.pod("b"), STATIC)  # the directory is open
        with stage.vault.hold("secret/data/app"):
            mounting = asyncio.create_task(old.mount(pod, STATIC))
            await asyncio.sleep(5)
            # As it lies there at a kill: the simulated end below would write on its way out.
            assert len(list(stage.state.glob("*.session"))) == 2
            await stage.killed(old)
            mounting.cancel()
            await asyncio.gather(mounting, return_exceptions=True)
        before = len(stage.vault.live_tokens())
        stage.node(kept=True)
        stage.remove(pod)
        await asyncio.sleep(600)
        assert (before, len(stage.vault.live_tokens())) == (2, 1)


@simulated
async def test_what_another_daemon_issued_since_wins_over_memory() -> None:
    """Both know the pod; one issues it a newer credential: the other's next mount brings that one."""
    async with Stage() as stage:
        pod = stage.pod("a")
        first, second = stage.node(kept=True), stage.node(kept=True)
        await first.mount(pod, *credential())
        await second.mount(pod, *credential())
        await asyncio.sleep(60)
        await first.mount(pod, STATIC)  # lets the credential go
        newer = await first.mount(pod, *credential())
        assert await second.mount(pod, *credential()) == newer
        assert stage.vault.issued == 2
        assert [(told.read, told.kept) for told in second.told] == [(0, 1), (0, 1)]


@simulated
async def test_mount_given_up_while_it_reads_the_file_leaves_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubelet gives up while a mount takes over what another daemon wrote: both daemons mount the pod again at once."""
    async with Stage() as stage:
        pod, load, begun = stage.pod("a"), StateDir.load, asyncio.Event()
        old, new = stage.node(kept=True), stage.node(kept=True)
        await old.mount(pod, *credential())
        await new.mount(pod, *credential())
        await old.mount(pod, CERTIFICATE, volume="/other")
        (session,) = new.sessions.of_pod(pod.uid)
        assert session.file.is_behind()

        async def load_late(store: StateDir, key: str) -> Entry | None:
            begun.set()
            await asyncio.sleep(1)
            return await load(store, key)

        monkeypatch.setattr(StateDir, "load", load_late)
        given_up = asyncio.create_task(new.mount(pod, *credential()))
        await begun.wait()
        given_up.cancel()
        await asyncio.wait([given_up])
        monkeypatch.undo()
        began = stage.world.now()
        newer = await new.mount(pod, *credential())
        assert await old.mount(pod, *credential()) == newer
        assert stage.world.now() - began < 1


@simulated
async def test_mount_given_up_while_it_waits_for_the_disk_leaves_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes away while another's write keeps it from letting go lets go all the same."""
    async with Stage() as stage:
        pod, save, begun = stage.pod("a"), StateDir.save, asyncio.Event()
        old, new = stage.node(kept=True), stage.node(kept=True)
        await old.mount(pod, *credential())
        (session,) = old.sessions.of_pod(pod.uid)

        async def save_late(store: StateDir, key: str, entry: Entry, *, small: bool) -> None:
            begun.set()
            await asyncio.sleep(1)
            await save(store, key, entry, small=small)

        monkeypatch.setattr(StateDir, "save", save_late)
        holding = asyncio.create_task(session.file.hold(begun.wait))
        await asyncio.sleep(1)
        session._has.changed = True
        saving = asyncio.create_task(session.file.save())
        await begun.wait()
        await asyncio.sleep(0.5)
        holding.cancel()
        await asyncio.wait([holding, saving])
        assert holding.cancelled()
        monkeypatch.undo()
        await asyncio.sleep(1)
        began = stage.world.now()
        await new.mount(pod, *credential(), STATIC)
        assert stage.world.now() - began < 1


@simulated
async def test_write_that_is_given_up_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that was cancelled before the disk had it is not taken for done: the next daemon finds the credential."""
    async with Stage() as stage:
        old, pod, save = stage.node(kept=True), stage.pod("a"), StateDir.save
        await old.mount(pod, STATIC)
        (session,) = old.sessions.of_pod(pod.uid)

        async def save_never(store: StateDir, key: str, entry: Entry, **_: object) -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(StateDir, "save", save_never)
        session._has.changed = True
        with pytest.raises(asyncio.CancelledError):
            await session.file.flush()
        monkeypatch.setattr(StateDir, "save", save)
        assert session.file.changed
        await session.file.flush()
        assert not session.file.changed


@simulated
async def test_failed_listing_between_two_absences_starts_over() -> None:
    """Absent from two sweeps in a row means in a row: a sweep that could not look counts for nothing."""
    async with Stage() as stage:
        node, pod = stage.node(sweep_interval=1e9), stage.pod("a")
        await node.mount(pod, *credential())
        stage.cluster.unseen.add(pod.uid)
        for failure in (None, KubernetesUnavailable("away"), None):
            await asyncio.sleep(30)
            stage.cluster.failure = failure
            await node.sweeper.sweep()
        assert stage.cluster.confirmed == []


class LateKey(Key):
    """As the real source: it waits five seconds at most, and answers None until the key is there."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        super().__init__(None)
        self._stage = stage
        self._there_at = stage.world.now() + seconds
        self._gives_up_at = stage.world.now() + 5

    async def get(self) -> bytes | None:
        left = min(self._there_at, self._gives_up_at) - self._stage.world.now()
        await asyncio.sleep(max(0.0, left))
        return KEY if self._stage.world.now() >= self._there_at else None


@simulated
async def test_mounts_wait_for_a_key_that_is_later_than_versions_wait_for_it() -> None:
    """After a restart the key comes after 15 s: the mount waits, and costs neither a login nor a credential."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        first = await node.mount(pod, *credential())
        await stage.killed(node)
        again = await stage.node(kept=True, key=LateKey(stage, 15)).mount(pod, *credential())
        assert again == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_state_directory_that_becomes_usable_later_is_used() -> None:
    """A directory that is no directory at first costs a warning; once it is one, sessions are kept in it."""
    async with Stage() as stage:
        stage.state.write_text("in the way")
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        stage.state.unlink()
        await asyncio.sleep(registry.LOOK_FOR_FILES_SECONDS + 1)
        await node.mount(stage.pod("b"), STATIC)
        assert len(list(stage.state.glob("*.session"))) == 1


@simulated
async def test_pods_that_cannot_log_in_take_no_place() -> None:
    """A thousand mounts under a role that does not exist leave every session of other pods where it is."""
    async with Stage() as stage:
        node, pod = stage.node(cache_size=2), stage.pod("a")
        first = await node.mount(pod, *credential())
        for number in range(5):
            with pytest.raises(ProviderError):
                await node.mount(stage.pod("hostile"), STATIC, role=f"none-{number}", volume=f"/{number}")
        assert await node.mount(pod, *credential()) == first
        assert len(node.sessions.all()) == 1


@simulated
async def test_prompt_remount_does_not_take_up_what_is_let_go() -> None:
    """With --cache-size 0 and a state directory each mount logs in, also one that comes while the last is let go."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True, cache_size=0), stage.pod("a")
        for _ in range(5):
            await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        assert stage.vault.logins == 5
        assert stage.vault.under_dead_tokens == 0
        assert stage.vault.live_tokens() == []
        assert list(stage.state.glob("*.session")) == []


@simulated
async def test_lease_that_is_not_kept_still_holds_its_token() -> None:
    """``lease: fresh``: what it was issued is in the pod's files, so its token outlives the next login."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=HOUR, max_ttl=HOUR)
        node, pod = stage.node(), stage.pod("a")
        files = await node.mount(pod, *credential(fresh=True))
        held = stage.vault.lease_of(files["user"])
        await asyncio.sleep(0.9 * HOUR)  # the token was capped: the next mount logs in
        await node.mount(pod, *credential("database/creds/app"))
        await asyncio.sleep(10)
        assert stage.vault.logins == 2
        assert held in stage.vault.live_leases()


@simulated
async def test_renewal_that_fails_on_a_bug_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody thought of leaves nothing due for ever: the daemon does not spin, and the lease lives in the end."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        files = await node.mount(pod, *credential())
        calls = 0

        async def broken(*_: object) -> float:
            nonlocal calls
            calls += 1
            raise ValueError("a header that no client accepts")

        (session,) = node.sessions.all()
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(type(session._vault), "renew_token", broken)
            await asyncio.sleep(0.8 * HOUR)
            assert 1 <= calls < 100
        await asyncio.sleep(HOUR)
        assert stage.vault.lease_of(files["user"]) in stage.vault.live_leases()
        assert any("renewal failed on a bug" in record.message for record in caplog.records)


@simulated
async def test_revocation_that_never_succeeds_ends_after_a_day() -> None:
    """A token without an end, at a Vault that only fails: the task is given up, and its session forgotten."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=0, max_ttl=0)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.breaks("auth/token/revoke-self", 500)
        stage.remove(pod)
        await asyncio.sleep(20 * HOUR)
        assert node.sessions._ending
        await asyncio.sleep(6 * HOUR)
        assert not node.sessions._ending


@simulated
async def test_failed_mount_of_a_known_pod_keeps_its_session() -> None:
    """Only a session that never logged in is dropped at once: a denied read leaves what the pod has."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        with pytest.raises(MountFailed):
            await node.mount(pod, wanted("x", "forbidden/path", "k"))
        assert await node.mount(pod, *credential()) == first


async def test_a_file_opens_under_the_derived_key_alone(tmp_path: Path) -> None:
    """The HMAC key itself does not open a session's file, and may have any length that a key file may have."""
    directory = f"{tmp_path}/state"
    store = StateDir(directory, KEY)
    await store.save("0" * 32, Entry(1, {"a": "b"}))
    raw = (store._path / f"{'0' * 32}.session").read_bytes()
    head, nonce, sealed = raw[:_HEAD], raw[_HEAD : _HEAD + _NONCE], raw[_HEAD + _NONCE :]
    with pytest.raises(InvalidTag):
        AESGCM(KEY).decrypt(nonce, sealed, head + f"{'0' * 32}.session".encode())
    short = StateDir(f"{tmp_path}/short", b"twenty bytes of key!")
    await short.save("0" * 32, Entry(1, {"a": "b"}))
    assert (await short.load("0" * 32)) == Entry(1, {"a": "b"})


async def test_session_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    """The directory is memory of the node: what could not be read again is not written, and the old file stays."""
    store = StateDir(f"{tmp_path}/state", KEY)
    await store.save("0" * 32, Entry(1, {"a": "b"}))
    with pytest.raises(StateUnusable, match="more than"):
        await store.save("0" * 32, Entry(2, {"a": "b" * MAX_FILE_BYTES}))
    assert (await store.load("0" * 32)) == Entry(1, {"a": "b"})


def test_state_directory_behind_a_link_is_refused(tmp_path: Path) -> None:
    """A link could lead to a directory of somebody else's, whose mode would be changed."""

    os.mkdir(f"{tmp_path}/elsewhere", 0o755)
    os.symlink(f"{tmp_path}/elsewhere", f"{tmp_path}/state")
    with pytest.raises(StateUnusable, match="is no directory"):
        StateDir(f"{tmp_path}/state", KEY)
    assert os.stat(f"{tmp_path}/elsewhere").st_mode & 0o777 == 0o755


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    """What a daemon was writing when it died goes at the next start; what may be written right now stays."""

    directory = Path(f"{tmp_path}/state")
    directory.mkdir(mode=0o700)
    old, young = directory / f"{'0' * 32}.session.7.new", directory / f"{'1' * 32}.session.8.new"
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    StateDir(str(directory), KEY)
    assert not old.exists()
    assert young.exists()


@simulated
async def test_token_that_may_not_revoke_itself_is_not_called_revoked(caplog: pytest.LogCaptureFixture) -> None:
    """A role without the default policy: the 403 to revoke-self proves nothing, so the log says what is left behind."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"] = Role(policies=("app",))
        await node.mount(pod, *credential())
        stage.remove(pod)
        with caplog.at_level(logging.INFO):
            await asyncio.sleep(300)
        told = [record.getMessage() for record in caplog.records]
        assert any("cannot be revoked and is left to expire" in line for line in told)
        accessors = {getattr(record, "accessor", "") for record in caplog.records if "revoked" in record.getMessage()}
        assert accessors == {f"accessor-{token.id.removeprefix('hvs.')}" for token in stage.vault.live_tokens()}
        assert not any("revoked the token" in line for line in told)
        assert stage.vault.live_leases()


@simulated
async def test_token_that_may_not_renew_itself_lives_on_to_its_end() -> None:
    """Without the default policy a renewal's 403 says nothing of the token: what hangs on it lives to its own end."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"] = Role(policies=("app",))
        first = await node.mount(pod, *credential())
        await asyncio.sleep(0.75 * HOUR)
        (session,) = node.sessions.all()
        assert session.view(idle=False).token_left > 0
        again = await node.mount(pod, *credential())
        assert again != first
        assert stage.vault.lease_of(first["user"]) in stage.vault.live_leases()


@simulated
async def test_session_that_ended_writes_nothing() -> None:
    """A renewal that was waiting for the file when its pod ended does not bring the removed file back."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        (session,) = node.sessions.all()
        await session.revoke()
        session._has.changed = True
        await session.file.catch_up()
        assert list(stage.state.glob("*.session")) == []


@pytest.mark.parametrize(("limit", "small"), [("", True), ("FEW_TOKENS", False), ("SMALL_BYTES", False)])
@simulated
async def test_only_a_small_session_is_said_to_be_small(
    monkeypatch: pytest.MonkeyPatch, limit: str, small: bool
) -> None:
    """A session with many tokens, or with large credentials, is not to be written on the event loop."""
    said: list[bool] = []
    save = StateDir.save

    async def watched(store: StateDir, key: str, entry: Entry, *, small: bool) -> None:
        said.append(small)
        await save(store, key, entry, small=small)

    monkeypatch.setattr(StateDir, "save", watched)
    if limit:
        monkeypatch.setattr(file, limit, 0)
    async with Stage() as stage:
        await stage.node(kept=True).mount(stage.pod("a"), *credential())
        assert said[-1] == small
