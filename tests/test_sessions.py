"""Sessions on simulated time: credentials that stay alive, are few, and are asked for once.

The Vault is simulated (tests/stand/simvault.py); mounter, sessions and HTTP are the real ones.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from provider.errors import MountFailed
from provider.sessions import registry
from provider.spc import Pod
from tests.stand.simnode import CERTIFICATE, PRIVATE_KEY, STATIC, Node, Stage, credential, wanted
from tests.stand.simtime import simulated
from tests.stand.simvault import Creds, Role

MINUTE = 60.0
HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals are looked for once a minute: the 5 s are for a node that was suspended, and days have many of them."""
    monkeypatch.setattr(registry, "LONGEST_SLEEP_SECONDS", 60.0)


days = pytest.mark.usefixtures("patient")


def dead_seconds(stage: Stage, node: Node, pod: Pod, volume: str = "/volume") -> float:
    """For how long, so far, the file held a credential that was dead at Vault."""
    written = node.written[pod.uid, volume]
    ends = [at for at, _ in written[1:]] + [stage.world.now()]
    return sum(
        max(0.0, replaced - stage.vault.lease_of(files["user"]).ends)
        for (_, files), replaced in zip(written, ends, strict=True)
    )


# What is kept ---------------------------------------------------------------------------------------------------


@simulated
async def test_remount_gets_the_kept_response() -> None:
    """While a lease lives, re-mounts get the same files and versions, with no login and no new credential."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential(), STATIC)
        await node.remount(HOUR, pod, *credential(), STATIC)
        assert all(files == first for _, files in node.written[pod.uid, "/volume"])
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_static_secrets_are_read_on_every_mount() -> None:
    """What is not leased is read each time, so that a change at Vault is in the file after the next re-mount."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.kv["secret/data/app"]["data"]["password"] = "pass-2"
        assert await node.mount(pod, STATIC) == {"static": "pass-2"}
        assert stage.vault.count("secret/data/app") == 2


@days
@simulated
async def test_halves_stay_together() -> None:
    """User and password always come of one response, in every state that the volume ever had."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=300, max_ttl=600)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(3 * HOUR, pod, *credential())
        states = node.written[pod.uid, "/volume"]
        assert all(files["password"] == f"password-of-{files['user']}" for _, files in states)
        assert len({files["user"] for _, files in states}) > 5


@simulated
async def test_pods_do_not_share_credentials() -> None:
    """A leased response belongs to one pod: two pods of one service account get one each, under a token each."""
    async with Stage() as stage:
        node, one, two = stage.node(), stage.pod("a"), stage.pod("b")
        files = await asyncio.gather(node.mount(one, *credential()), node.mount(two, *credential()))
        assert files[0]["user"] != files[1]["user"]
        assert stage.vault.logins == 2


@simulated
async def test_volumes_of_one_pod_share_what_is_the_same() -> None:
    """Two classes of one pod with one role and path get one credential, under one login."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        one = await node.mount(pod, *credential(), volume="/one")
        two = await node.mount(pod, *credential(), STATIC, volume="/two")
        assert one["user"] == two["user"]
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@pytest.mark.parametrize("dropping", ["/one", "/two"])
def test_one_volume_letting_go_keeps_the_others(dropping: str) -> None:
    """When one class drops the path, the other volume keeps its credential, and it is still renewed."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, pod = stage.node(), stage.pod("a")
            first = await node.mount(pod, *credential(), volume="/one")
            await node.mount(pod, *credential(), volume="/two")
            await node.mount(pod, STATIC, volume=dropping)
            await asyncio.sleep(5 * HOUR)
            (other,) = {"/one", "/two"} - {dropping}
            assert await node.mount(pod, *credential(), volume=other) == first
            assert stage.vault.issued == 1
            assert stage.vault.lease_of(first["user"]).ends > stage.world.now()

    scene()


@simulated
async def test_what_no_volume_asks_for_is_not_renewed() -> None:
    """A path that the class dropped is let go: its lease is renewed no more and expires, and is not revoked early."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential(), STATIC)
        await node.mount(pod, STATIC)
        await node.remount(5 * HOUR, pod, STATIC)
        assert stage.vault.count("sys/leases/renew") == 0
        assert stage.vault.lease_of(first["user"]).ends == pytest.approx(HOUR, abs=5)
        assert stage.vault.count("auth/token/revoke-self") == 0


@simulated
async def test_changed_path_gets_what_it_asks_for() -> None:
    """A class that now names another path gets that path's credential at the next mount, and only that is renewed."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/other"] = Creds()
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        second = await node.mount(pod, *credential("database/creds/other"))
        assert stage.vault.lease_of(second["user"]).path == "database/creds/other"
        await asyncio.sleep(3 * HOUR)
        assert stage.vault.lease_of(second["user"]).ends > stage.world.now()
        assert stage.vault.lease_of(first["user"]).ends < stage.world.now()


@simulated
async def test_changed_arguments_get_another_certificate() -> None:
    """Requests that differ in their body are different: changed secretArgs are sent, at once."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, CERTIFICATE)
        args = wanted("certificate", "pki/issue/web", "certificate", method="POST", body='{"ttl":"1h"}')
        assert await node.mount(pod, args) != first
        assert stage.vault.count("pki/issue/web") == 2


@simulated
async def test_changed_role_lets_the_old_session_go() -> None:
    """With another role the pod logs in under it; token and lease of the old role are renewed no more."""
    async with Stage() as stage:
        stage.vault.roles["other"] = Role()
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        second = await node.mount(pod, *credential(), role="other")
        assert first["user"] != second["user"]
        await node.remount(5 * HOUR, pod, *credential(), role="other")
        old, new = stage.vault.all_tokens
        assert old.ends == pytest.approx(HOUR, abs=5)
        assert new.ends > stage.world.now()
        assert stage.vault.lease_of(second["user"]).ends > stage.world.now()


@simulated
async def test_role_changed_of_one_volume_keeps_the_others_session() -> None:
    """When one of two volumes moves to another role, the other's session goes on being renewed."""
    async with Stage() as stage:
        stage.vault.roles["other"] = Role()
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC, volume="/one")
        await node.mount(pod, STATIC, volume="/two")
        await node.mount(pod, STATIC, volume="/two", role="other")
        await asyncio.sleep(5 * HOUR)
        await node.mount(pod, STATIC, volume="/one")
        assert stage.vault.logins == 2


@simulated
async def test_failed_mount_lets_nothing_go() -> None:
    """A re-mount of a changed class that fails leaves the old files, so what they hold is still renewed."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        with pytest.raises(MountFailed):
            await node.mount(pod, wanted("nothing", "secret/data/nothing", "key"))
        await asyncio.sleep(3 * HOUR)
        assert stage.vault.lease_of(first["user"]).ends > stage.world.now()


@simulated
async def test_fresh_is_issued_on_every_mount() -> None:
    """``lease: fresh`` sends the request on each mount and keeps and renews nothing."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        users = [(await node.mount(pod, *credential(fresh=True)))["user"] for _ in range(3)]
        assert len(set(users)) == 3
        await asyncio.sleep(2 * HOUR)
        assert stage.vault.count("sys/leases/renew") == 0


@simulated
async def test_fresh_beside_kept() -> None:
    """A fresh and a kept object of one path do not mix: one changes with each mount, the other stays."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        fresh = wanted("fresh", "database/creds/app", "username", fresh=True)
        first = await node.mount(pod, *credential(), fresh)
        second = await node.mount(pod, *credential(), fresh)
        assert first["user"] == second["user"]
        assert len({first["user"], first["fresh"], second["fresh"]}) == 3


# refreshAfter ---------------------------------------------------------------------------------------------------


@simulated
async def test_refresh_after_sends_nothing() -> None:
    """Within refreshAfter of the last read a re-mount costs Vault no request at all; after it, one read."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        static = wanted("static", "secret/data/app", "password", refresh_after=300)
        await node.mount(pod, static)
        await asyncio.sleep(10)
        before = len(stage.vault.seen)
        stage.vault.kv["secret/data/app"]["data"]["password"] = "pass-2"
        for _ in range(4):
            await asyncio.sleep(70)
            assert await node.mount(pod, static) == {"static": "pass-1"}
        assert len(stage.vault.seen) == before
        await asyncio.sleep(70)
        assert await node.mount(pod, static) == {"static": "pass-2"}
        assert len(stage.vault.seen) == before + 1


@simulated
async def test_refresh_after_is_of_one_volume() -> None:
    """The first mount of a pod, and of another volume of it, always reads."""
    async with Stage() as stage:
        node = stage.node()
        static = wanted("static", "secret/data/app", "password", refresh_after=300)
        await node.mount(stage.pod("a"), static)
        await node.mount(stage.pod("a"), static, volume="/other")
        await node.mount(stage.pod("b"), static)
        assert stage.vault.count("secret/data/app") == 3


@simulated
async def test_refresh_after_does_not_answer_a_changed_class() -> None:
    """What memory holds for one path never answers another, and what was dropped is not remembered."""
    async with Stage() as stage:
        stage.vault.kv["secret/data/two"] = {"data": {"password": "of-two"}, "metadata": {}}
        node, pod = stage.node(), stage.pod("a")
        one = wanted("static", "secret/data/app", "password", refresh_after=300)
        two = wanted("static", "secret/data/two", "password", refresh_after=300)
        await node.mount(pod, one)
        assert await node.mount(pod, two) == {"static": "of-two"}
        assert await node.mount(pod, one) == {"static": "pass-1"}
        assert stage.vault.count("secret/data/app") == 2


@simulated
async def test_refresh_after_lowered_reads_again() -> None:
    """A class whose refreshAfter was lowered to nothing reads at the next mount."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, wanted("static", "secret/data/app", "password", refresh_after=300))
        await node.mount(pod, STATIC)
        assert stage.vault.count("secret/data/app") == 2


@simulated
async def test_strictest_refresh_after_holds() -> None:
    """Of two objects with one request the shorter refreshAfter decides, and both get the same answer."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        lax = wanted("lax", "secret/data/app", "password", refresh_after=3000)
        strict = wanted("strict", "secret/data/app", "password", refresh_after=100)
        await node.mount(pod, lax, strict)
        stage.vault.kv["secret/data/app"]["data"]["password"] = "pass-2"
        await asyncio.sleep(150)
        assert await node.mount(pod, lax, strict) == {"lax": "pass-2", "strict": "pass-2"}


@simulated
async def test_refresh_after_is_not_extended_by_answers_from_memory() -> None:
    """The time counts from the read, not from the last mount that memory answered."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.remount(HOUR, pod, wanted("static", "secret/data/app", "password", refresh_after=300))
        assert stage.vault.count("secret/data/app") >= 9


# Certificates ---------------------------------------------------------------------------------------------------


@days
@simulated
async def test_certificate_is_kept_until_its_percentage() -> None:
    """A certificate is the same, byte for byte, until renewPercent of its validity; then a new one with its key."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.remount(0.66 * DAY, pod, CERTIFICATE, PRIVATE_KEY)
        assert stage.vault.count("pki/issue/web") == 1
        await node.remount(0.02 * DAY, pod, CERTIFICATE, PRIVATE_KEY)
        assert stage.vault.count("pki/issue/web") == 2
        files = node.files[pod.uid, "/volume"]
        assert files["certificate"].removeprefix("cert-") == files["key"].removeprefix("key-")


@days
@simulated
async def test_certificate_percentage_of_the_object() -> None:
    """``renewPercent`` of an object decides for its certificate; of two objects with one request the smaller."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        late = wanted("certificate", "pki/issue/web", "certificate", method="POST", body="{}", renew_percent=90)
        soon = wanted("key", "pki/issue/web", "private_key", method="POST", body="{}", renew_percent=10)
        first = await node.mount(pod, late, soon)
        await asyncio.sleep(0.09 * DAY)
        assert await node.mount(pod, late, soon) == first
        await asyncio.sleep(0.02 * DAY)
        assert await node.mount(pod, late, soon) != first


@days
@simulated
async def test_certificate_survives_its_token() -> None:
    """A certificate without a lease hangs on no token: it stays when the login has to be made anew."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=1200, max_ttl=7200)
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, CERTIFICATE, STATIC)
        await node.remount(12 * HOUR, pod, CERTIFICATE, STATIC)
        assert node.files[pod.uid, "/volume"] == first
        assert stage.vault.logins > 5


@pytest.mark.parametrize("path", ["old/lookalike", "secret/data/lookalike"])
def test_stored_lookalike_is_not_kept(path: str) -> None:
    """A kv value whose keys look like an issued certificate is read on every mount like any other."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            stage.vault.kv[path] = {
                "certificate": "one",
                "serial_number": "1",
                "expiration": 4_000_000_000,
                "data": {"certificate": "one"},
            }
            whole = wanted("all", path)
            node, pod = stage.node(), stage.pod("a")
            first = await node.mount(pod, whole)
            stage.vault.kv[path]["certificate"] = "two"
            assert (await node.mount(pod, whole))["all"] == first["all"].replace(
                '"certificate":"one"', '"certificate":"two"', 1
            )

    scene()


# Renewal --------------------------------------------------------------------------------------------------------


@days
@simulated
async def test_renewed_without_any_remount() -> None:
    """With rotation off, token and lease are renewed in the background up to their maximum TTL."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=1200, max_ttl=30 * HOUR)
        stage.vault.creds["database/creds/app"] = Creds(ttl=600, max_ttl=24 * HOUR)
        node, pod = stage.node(), stage.pod("a")
        files = await node.mount(pod, *credential())
        await asyncio.sleep(24 * HOUR - 60)
        lease = stage.vault.lease_of(files["user"])
        assert lease.ends == pytest.approx(24 * HOUR, abs=5)
        assert lease.token.ends > 24 * HOUR
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_tokens_are_renewed_before_leases() -> None:
    """When both are due, the token's renewal goes out and is answered first: a lease lives no longer than it."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.world.suspend(50 * MINUTE)
        await asyncio.sleep(10)
        renewals = [seen.path for seen in stage.vault.seen if "renew" in seen.path]
        assert renewals == ["auth/token/renew-self", "sys/leases/renew"]


@simulated
async def test_older_token_is_renewed_while_a_lease_hangs_on_it() -> None:
    """After a second login, the first token is renewed for the sake of its lease, and both are revoked at the end."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        # A policy that was added: the read is denied under the old token, allowed under a new one.
        stage.vault.policies["app"] = ("database/",)
        stage.vault.roles["app"] = Role(policies=("app", "more", "default"))
        stage.vault.policies["more"] = ("secret/",)
        await node.mount(pod, *credential(), STATIC)
        assert stage.vault.logins == 2
        await asyncio.sleep(5 * HOUR)
        old, new = stage.vault.all_tokens
        assert stage.vault.lease_of(first["user"]).token is old
        assert stage.vault.lease_of(first["user"]).ends > stage.world.now()
        assert new.ends > stage.world.now()
        assert await node.mount(pod, *credential(), STATIC) == node.files[pod.uid, "/volume"]
        assert stage.vault.issued == 1
        stage.remove(pod)
        await asyncio.sleep(300)
        assert not stage.vault.live_tokens()


@simulated
async def test_superseded_token_without_leases_is_revoked() -> None:
    """A token on which nothing hangs is revoked when a new login takes its place."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.policies["app"] = ("database/",)
        stage.vault.roles["app"] = Role(policies=("more", "default"))
        stage.vault.policies["more"] = ("secret/",)
        await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        assert [token.ends > stage.world.now() for token in stage.vault.all_tokens] == [False, True]


@simulated
async def test_replaced_lease_is_left_to_expire() -> None:
    """After a capped renewal the next re-mount brings a new credential; the old one lives on to its own end."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=HOUR, max_ttl=1.5 * HOUR)
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(50 * MINUTE)
        second = await node.mount(pod, *credential())
        assert first["user"] != second["user"]
        await asyncio.sleep(MINUTE)
        assert stage.vault.lease_of(first["user"]).ends == pytest.approx(1.5 * HOUR, abs=5)
        assert stage.vault.count("auth/token/revoke-self") == 0


@simulated
async def test_refused_renewal_is_replaced_at_once() -> None:
    """A renewal that Vault refuses is followed by a fresh credential at the next re-mount, long before the end."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        stage.vault.refuses_renewal = True
        await asyncio.sleep(42 * MINUTE)
        assert stage.vault.count("sys/leases/renew") == 1
        assert await node.mount(pod, *credential()) != first


@simulated
async def test_lease_that_vault_revoked_is_replaced() -> None:
    """A lease that an operator revoked is found out by its renewal, and replaced at the next re-mount."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        stage.vault.leases.clear()
        await asyncio.sleep(42 * MINUTE)
        assert await node.mount(pod, *credential()) != first
        assert stage.vault.logins == 1


@simulated
async def test_lowered_maximum_is_seen_before_it_kills() -> None:
    """A maximum TTL that was lowered below the TTL caps a renewal: the next re-mount replaces."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.vault.cap = 10 * MINUTE
        await node.remount(5 * HOUR, pod, *credential())
        assert dead_seconds(stage, node, pod) == 0


@simulated
async def test_ending_token_brings_a_login_before_a_lease() -> None:
    """A lease that is new to a class is not issued under a token that ends before the next re-mounts."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=20 * MINUTE, max_ttl=20 * MINUTE)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        await asyncio.sleep(19.5 * MINUTE)
        files = await node.mount(pod, STATIC, *credential())
        await asyncio.sleep(90)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_too_short_for_its_volume_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A credential that ends before its volume is mounted again is told of, with the TTL to raise."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=30, max_ttl=30)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(5 * MINUTE, pod, *credential())
        told = [record for record in caplog.records if "raise its TTL" in record.getMessage()]
        assert told
        assert told[-1].__dict__["seconds_left"] <= told[-1].__dict__["interval_seconds"] <= 90


# Days at kubelet's cadence ----------------------------------------------------------------------------------------

# A pod's auth role and database role, and the least time, in seconds, that passes between two credentials: that a
# maximum TTL is near is known no earlier than one TTL before it, or a renewal point where that is all there is.
SHAPES: dict[str, tuple[Role, Creds, float]] = {
    # The lease is found to be at its maximum, and then its token, issued a moment before it: two for each 23 hours.
    "defaults": (Role(ttl=HOUR, max_ttl=DAY), Creds(ttl=HOUR, max_ttl=DAY), 23 * HOUR / 2),
    "long-token": (Role(ttl=32 * DAY, max_ttl=32 * DAY), Creds(ttl=HOUR, max_ttl=DAY), 23 * HOUR),
    "short-lease": (Role(ttl=HOUR, max_ttl=10 * DAY), Creds(ttl=10 * MINUTE, max_ttl=HOUR), 50 * MINUTE),
    "short-token": (Role(ttl=20 * MINUTE, max_ttl=2 * HOUR), Creds(ttl=HOUR, max_ttl=DAY), 100 * MINUTE),
    "batch-token": (Role(ttl=HOUR, max_ttl=HOUR, batch=True), Creds(ttl=HOUR, max_ttl=DAY), 0.6 * HOUR),
    "not-renewable": (Role(ttl=HOUR, max_ttl=10 * DAY), Creds(HOUR, HOUR, renewable=False), 0.67 * HOUR),
}


@days
@settings(
    max_examples=2,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(st.integers(0, 2**32))
def test_two_days_without_a_dead_credential(seed: int) -> None:
    """Over 48 h of re-mounts every 60 to 90 s, no file ever holds a dead credential, and few are issued.

    A pod of each shape of TTLs, all on one node; the number of credentials is near what the maximum TTLs demand.
    """

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node = stage.node()
            for name, (role, creds, _) in SHAPES.items():
                stage.vault.roles[name] = role
                stage.vault.creds[f"database/creds/{name}"] = creds
            pods = {name: stage.pod(name) for name in SHAPES}
            await asyncio.gather(
                *(
                    node.remount(2 * DAY, pod, *credential(f"database/creds/{name}"), role=name)
                    for name, pod in pods.items()
                )
            )
            assert {name: dead_seconds(stage, node, pod) for name, pod in pods.items()} == dict.fromkeys(SHAPES, 0.0)
            issued = {name: sum(lease.path.endswith(name) for lease in stage.vault.all_leases) for name in SHAPES}
            most = {name: 1 + 2 * DAY / apart for name, (_, _, apart) in SHAPES.items()}
            assert {name: count for name, count in issued.items() if count > most[name]} == {}

    random.seed(seed)
    scene()
