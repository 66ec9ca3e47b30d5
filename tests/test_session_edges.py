"""Sessions at their edges: uses that run out, late answers, retries that look like rotation, what is left over.

In simulated time, over simulated nodes before a simulated Vault that keeps its own dates.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest

from provider.errors import KubernetesUnavailable, ProviderError
from provider.spc import ObjectSpec, Pod
from provider.state import ASIDE_SECONDS, StateDir
from tests.stand.simnode import KEY, STATIC, Key, Node, Stage, credential, wanted
from tests.stand.simtime import simulated
from tests.stand.simvault import Creds, Role

HOUR = 3600.0
REMOUNT = 75.0


def certificate(percent: float) -> ObjectSpec:
    return wanted("certificate", "pki/issue/web", "certificate", method="POST", body="{}", renew_percent=percent)


# -- uses of a token -----------------------------------------------------------------------------------------------


@simulated
async def test_two_credentials_under_tokens_of_two_uses() -> None:
    """Vault gives no lease under a token's last use, so each of the two has a token of its own, and is kept."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=2)
        stage.vault.creds["database/creds/other"] = Creds()
        node, pod = stage.node(), stage.pod("a")
        both = [wanted("a", "database/creds/app", "username"), wanted("b", "database/creds/other", "username")]
        first = await node.mount(pod, *both)
        for _ in range(4):
            await asyncio.sleep(REMOUNT)
            assert await node.mount(pod, *both) == first
        assert (stage.vault.logins, stage.vault.issued) == (2, 2)


@simulated
async def test_last_use_is_not_spent_where_leases_hang_on_the_token() -> None:
    """A short credential is issued again and again under tokens of three uses; the long one beside it is never dead."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=3, ttl=24 * HOUR)
        stage.vault.creds["database/creds/short"] = Creds(ttl=900, max_ttl=900, renewable=False)
        stage.vault.creds["database/creds/long"] = Creds(ttl=10 * HOUR, max_ttl=10 * HOUR)
        node, pod = stage.node(), stage.pod("a")
        both = [wanted(name, f"database/creds/{name}", "username") for name in ("short", "long")]
        for _ in range(40):
            files = await node.mount(pod, *both)
            for name in files:
                assert stage.vault.lease_of(files[name]).ends > stage.world.now() + REMOUNT, name
            await asyncio.sleep(REMOUNT)


@simulated
async def test_uses_are_remembered_over_a_restart() -> None:
    """What a token has left is in the file, so that no credential of a used-up token is handed out."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=8)
        node, pod = stage.node(kept=True), stage.pod("a")
        for _ in range(4):
            await node.mount(pod, *credential(), STATIC)
            await asyncio.sleep(REMOUNT)
        await stage.killed(node)
        node = stage.node(kept=True)
        for _ in range(8):
            files = await node.mount(pod, *credential(), STATIC)
            assert stage.vault.lease_of(files["user"]).ends > stage.world.now()
            await asyncio.sleep(REMOUNT)


@simulated
async def test_last_use_is_not_taken_from_a_lease_on_its_way() -> None:
    """Static reads beside it go out under another token: each pod has one credential, and nothing is left of it."""
    async with Stage() as stage:
        stage.vault.kv["secret/data/b"] = {"data": {"password": "b"}, "metadata": {}}
        other = wanted("b", "secret/data/b", "password")
        for uses in (2, 3):
            stage.vault.roles["app"] = Role(num_uses=uses)
            node = stage.node()
            for number in range(5):
                pod = stage.pod(f"{uses}-{number}")
                before = stage.vault.issued
                files = await node.mount(pod, *credential(), STATIC, other)
                assert stage.vault.issued == before + 1
                assert stage.vault.lease_of(files["user"]).ends > stage.world.now() + 60
                stage.remove(pod)
            await asyncio.sleep(300)
            assert not stage.vault.live_leases()


@simulated
async def test_tokens_of_few_uses_are_used_up() -> None:
    """What was read first and turned out static holds no last use back: one token lives at a time, or two."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=10)
        node, pod = stage.node(), stage.pod("a")
        for number in range(30):
            stage.vault.kv[f"secret/data/{number}"] = {"data": {"password": "x"}, "metadata": {}}
        every = [wanted(str(number), f"secret/data/{number}", "password") for number in range(30)]
        for _ in range(4):
            await node.mount(pod, *every)
            await asyncio.sleep(REMOUNT)
            assert len(stage.vault.live_tokens()) <= 2


@simulated
async def test_uses_that_never_went_out_are_not_counted() -> None:
    """Mounts that fail while Vault is known to be away use nothing up: at the pod's end its token is revoked."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=4)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        await stage.vault.stop()
        for _ in range(10):
            with pytest.raises(ProviderError):
                await node.mount(pod, STATIC)
            await asyncio.sleep(5)
        await stage.vault.start()
        (token,) = stage.vault.live_tokens()
        stage.remove(pod)
        await asyncio.sleep(300)
        assert token.ends < stage.world.now()


# -- time ----------------------------------------------------------------------------------------------------------


@simulated
async def test_life_is_counted_from_the_asking() -> None:
    """Where Vault answers late, what it gave has ended that much earlier; no file holds a dead credential."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=300, max_ttl=24 * HOUR)
        node, pod = stage.node(), stage.pod("a")

        async def mount_on() -> None:
            while stage.world.now() < 900:
                with contextlib.suppress(ProviderError):
                    await node.mount(pod, *credential())
                await asyncio.sleep(REMOUNT)

        mounting = asyncio.create_task(mount_on())
        with stage.vault.hold("database/creds"):
            await asyncio.sleep(170)
        await mounting
        written = node.written[pod.uid, "/volume"]
        assert written
        until = [at for at, _ in written[1:]] + [stage.world.now()]
        for (_, files), replaced in zip(written, until, strict=True):
            assert stage.vault.lease_of(files["user"]).ends >= replaced


@simulated
async def test_login_that_takes_longer_than_its_token_lives() -> None:
    """A mount whose token has ended, by our count, as it comes logs in once and uses it: Vault has the last word."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=2, max_ttl=2)
        node, pod = stage.node(), stage.pod("a")
        mounting = asyncio.create_task(node.mount(pod, STATIC))
        for _ in range(5):  # each login would take so long
            with stage.vault.hold("auth/kubernetes/login"):
                await asyncio.sleep(5)
            await asyncio.sleep(0)
        with pytest.raises(ProviderError):
            await mounting
        assert stage.vault.logins == 1


@simulated
async def test_credential_of_each_mount_outlives_its_next() -> None:
    """``lease: fresh`` too is issued under a token that will be there at the next re-mount."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=600, max_ttl=1200)
        stage.vault.creds["database/creds/app"] = Creds(ttl=HOUR)
        node, pod = stage.node(), stage.pod("a")
        for _ in range(40):
            files = await node.mount(pod, wanted("a", "database/creds/app", "username", fresh=True))
            await asyncio.sleep(REMOUNT)
            assert stage.vault.lease_of(files["a"]).ends > stage.world.now()


@simulated
async def test_class_that_changed_its_percent_gets_it() -> None:
    """A certificate is replaced by what the class says now, and not by what it said when that was issued."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, certificate(67))
        await asyncio.sleep(5 * HOUR)
        assert await node.mount(pod, certificate(67)) == first
        assert await node.mount(pod, certificate(10)) != first


@pytest.mark.parametrize("retries", [0, 1, 2, 3])
def test_retries_do_not_shorten_the_interval(retries: int) -> None:
    """Mounts that come within seconds of another are kubelet's retries, and tell nothing of when the next one comes."""

    @simulated
    async def run() -> None:
        async with Stage() as stage:
            stage.vault.creds["database/creds/app"] = Creds(ttl=120, max_ttl=120, renewable=False)
            node, pod = stage.node(), stage.pod("a")
            for _ in range(retries):
                await node.mount(pod, *credential())
                await asyncio.sleep(1)
            for _ in range(10):
                files = await node.mount(pod, *credential())
                await asyncio.sleep(REMOUNT)
                assert stage.vault.lease_of(files["user"]).ends > stage.world.now()

    run()


# -- rotation off --------------------------------------------------------------------------------------------------


@simulated
async def test_retry_is_no_sign_of_rotation() -> None:
    """Rotation is off, and kubelet asks once more for one pod's volume: another's credential is renewed still."""
    async with Stage() as stage:
        node, quiet, retried = stage.node(revoke=False), stage.pod("a"), stage.pod("b")
        files = await node.mount(quiet, *credential())
        for _ in range(3):
            await node.mount(retried, STATIC)
            await asyncio.sleep(2)
        await asyncio.sleep(5 * HOUR)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_sessions_taken_up_are_given_time() -> None:
    """After a restart nobody has mounted yet: what was taken up is renewed as if it had just been mounted."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=300, max_ttl=24 * HOUR)
        node, rotated, late = stage.node(kept=True, revoke=False), stage.pod("a"), stage.pod("b")
        await node.mount(rotated, STATIC)
        files = await node.mount(late, *credential())
        await asyncio.sleep(5)
        await stage.killed(node)
        node = stage.node(kept=True, revoke=False)
        for _ in range(12):
            await node.mount(rotated, STATIC)
            await asyncio.sleep(REMOUNT)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_no_list_of_pods_after_a_restart_ends_nobody() -> None:
    """The API server is away as a daemon starts, with rotation off: what an earlier one held is renewed."""
    async with Stage() as stage:
        node, pod, other = stage.node(kept=True), stage.pod("a"), stage.pod("b")
        files = await node.mount(pod, *credential())
        await node.mount(other, STATIC)
        await asyncio.sleep(5)
        await stage.killed(node)
        stage.cluster.failure = KubernetesUnavailable("away")
        node = stage.node(kept=True)
        await node.mount(other, STATIC)
        await node.mount(other, STATIC)
        await asyncio.sleep(3 * HOUR)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


# -- what is left over ---------------------------------------------------------------------------------------------


async def three_logins(node: Node, pod: Pod) -> None:
    """Each because Vault denies a read, and so in place of a token that works."""
    for _ in range(3):
        await asyncio.sleep(310)
        with pytest.raises(ProviderError):
            await node.mount(pod, STATIC, wanted("no", "denied/x", "y"))
    await asyncio.sleep(60)


@simulated
async def test_superseded_tokens_are_revoked_in_the_end() -> None:
    """A token that a new login replaced, and whose revocation was not answered, is revoked with the pod's others."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=32 * 24 * HOUR, max_ttl=32 * 24 * HOUR)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.breaks("auth/token/revoke-self", 503, "standby")
        await three_logins(node, pod)
        assert len(stage.vault.live_tokens()) > 1
        stage.vault.mend()
        stage.remove(pod)
        await asyncio.sleep(HOUR)
        assert not stage.vault.live_tokens()


@simulated
async def test_revocation_that_is_refused_is_not_tried_again() -> None:
    """A superseded token that Vault will not revoke is left to expire, and asked for once."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.breaks("auth/token/revoke-self", 400, "no")
        await three_logins(node, pod)
        assert stage.vault.logins == 4
        assert stage.vault.count("auth/token/revoke-self") == 3


@simulated
async def test_pods_that_cannot_log_in_leave_no_files() -> None:
    """Neither while the daemon runs nor, where an earlier one left any, after its restart."""
    async with Stage() as stage:
        node = stage.node(kept=True)
        for number in range(5):
            with pytest.raises(ProviderError):
                await node.mount(stage.pod(f"denied-{number}"), STATIC, role="nope")
        await asyncio.sleep(1)
        assert not list(stage.state.glob("????????????????????????????????.*"))
        await stage.killed(node)
        (stage.state / f"{'0' * 32}.lock").touch()
        await stage.node(kept=True).mount(stage.pod("a"), STATIC)
        assert len(list(stage.state.glob("*.session"))) == len(list(stage.state.glob("?" * 32 + ".lock"))) == 1


def test_what_was_set_aside_goes_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was set aside stays for whoever looks into it, for a week; a lock that is held stays in any case."""
    state = StateDir(str(tmp_path / "state"), KEY)
    aside = tmp_path / "state" / f"{'0' * 32}.session.aside"
    aside.write_bytes(b"x")
    StateDir(str(tmp_path / "state"), KEY)
    assert aside.exists()

    async def held() -> None:
        async with state.lock("1" * 32):
            with monkeypatch.context() as patched:
                patched.setattr("time.time", lambda: aside.stat().st_mtime + ASIDE_SECONDS + 1)
                StateDir(str(tmp_path / "state"), KEY)
            assert (tmp_path / "state" / f"{'1' * 32}.lock").exists()

    asyncio.run(held())
    assert not aside.exists()


@simulated
async def test_credential_is_on_disk_while_another_read_hangs() -> None:
    """What a mount was given is in the file at once, though another volume of the pod still waits for its answer."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        with stage.vault.hold("totp/"):
            slow = asyncio.create_task(node.mount(pod, wanted("code", "totp/code/x", "code"), volume="/slow"))
            await asyncio.sleep(1)
            await node.mount(pod, *credential(), volume="/fast")
            await asyncio.sleep(1)
            shutil.copytree(stage.state, stage.directory / "copy")
        await asyncio.gather(slow, return_exceptions=True)
        copy = StateDir(str(stage.directory / "copy"), KEY)
        (key,) = copy.keys()
        entry = await copy.load(key)
        assert entry is not None
        assert len(entry.payload["kept"]) == 1


@simulated
async def test_stored_certificate_is_not_kept_where_its_engine_is_not_told() -> None:
    """Vault does not say just now which engine it is: what may be stored is read again, and its change seen."""
    async with Stage() as stage:
        stored = {"certificate": "old", "serial_number": "1", "expiration": 4_000_000_000}
        stage.vault.kv["old/app"] = stored
        node, pod, spec = stage.node(), stage.pod("a"), wanted("c", "old/app", "certificate")
        stage.vault.breaks("sys/internal", 503, "standby")
        assert await node.mount(pod, spec) == {"c": "old"}
        stage.vault.mend()
        stored["certificate"] = "new"
        await asyncio.sleep(REMOUNT)
        assert await node.mount(pod, spec) == {"c": "new"}


@simulated
async def test_what_a_pod_stored_in_its_cubbyhole_is_no_certificate() -> None:
    """Any pod may store there what looks like one, and ask for it in ever other ways: it would be kept each time."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.kv["old/cubbyhole/app"] = {"certificate": "c", "serial_number": "1", "expiration": 4_000_000_000}
        stage.vault.breaks("sys/internal", 403, "permission denied")
        await node.mount(pod, wanted("c", "old/cubbyhole/app", "certificate"))
        (session,) = node.sessions.all()
        assert session.view(idle=False).leases == ()


@simulated
async def test_without_a_key_pods_that_are_gone_are_revoked() -> None:
    """With a state directory and no HMAC key nothing is kept on disk; what is in memory is swept all the same."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True, key=Key(None)), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)
        await asyncio.sleep(200)
        assert not stage.vault.live_tokens()
        assert not stage.vault.live_leases()
