"""Sessions on simulated time: credentials that stay alive, are few, and are asked for once.

The Vault is simulated (tests/stand/simvault.py); mounter, sessions and HTTP are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random

import pytest
from cryptography import x509
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from provider.errors import Code, MountFailed, OutOfTime, ProviderError
from provider.sessions import registry
from provider.sessions.model import HeldToken
from provider.spc import Pod
from tests.stand.pki import Authority
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
        versions = node.versions[pod.uid, "/volume"]
        await node.remount(HOUR, pod, *credential(), STATIC)
        assert all(files == first for _, files in node.written[pod.uid, "/volume"])
        assert node.versions[pod.uid, "/volume"] == versions
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
@pytest.mark.parametrize("wrong_by", [-12 * HOUR, 3 * DAY])
async def test_certificate_is_kept_by_its_validity_where_the_nodes_date_is_wrong(wrong_by: float) -> None:
    """A date that is behind keeps it not past its end, one that is ahead has not one issued at every mount."""
    pem = Authority().server().cert_pem.decode()
    certificate = x509.load_pem_x509_certificate(pem.encode())
    validity = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.pem, stage.vault.certificates["pki/issue/web"] = pem, validity
        stage.clock.set_date(wrong_by)
        await node.remount(0.3 * validity, pod, CERTIFICATE)
        assert stage.vault.count("pki/issue/web") == 1
        await node.remount(0.4 * validity, pod, CERTIFICATE)
        assert stage.vault.count("pki/issue/web") == 2


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
async def test_renewal_point_of_the_daemon() -> None:
    """``--renew-percent`` 30 renews token and lease after 27 to 30 % of their hour, again and again."""
    async with Stage() as stage:
        node, pod = stage.node(renew_percent=30), stage.pod("a")
        await node.mount(pod, *credential())
        await asyncio.sleep(0.26 * HOUR)
        assert stage.vault.count("sys/leases/renew") == 0
        await asyncio.sleep(0.05 * HOUR)
        assert stage.vault.count("sys/leases/renew") == stage.vault.count("auth/token/renew-self") == 1
        await asyncio.sleep(2.7 * HOUR)
        assert stage.vault.count("sys/leases/renew") == pytest.approx(10, abs=1)


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
async def test_credential_that_is_gone_is_not_handed_out() -> None:
    """A lease that its renewal found gone is dead, whatever its TTL said: with Vault away the mount rather fails."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.vault.leases.clear()
        await asyncio.sleep(42 * MINUTE)
        await stage.vault.stop()
        with pytest.raises(MountFailed):
            await node.mount(pod, *credential())


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
async def test_volume_of_unknown_interval() -> None:
    """A volume that has shown no interval gets nothing that ends within twice 210 s; one that is mounted often does."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=HOUR, max_ttl=HOUR, renewable=False)
        node, pod = stage.node(), stage.pod("a")
        wish = credential(renew_percent=99)
        await node.remount(HOUR - 400, pod, *wish, volume="/often")
        often = await node.mount(pod, *wish, volume="/often")
        assert stage.vault.issued == 1
        assert await node.mount(pod, *wish, volume="/new") != often


@simulated
async def test_one_odd_gap_is_no_interval() -> None:
    """A night of suspension, or a quick retry, does not pass for the interval of a volume's re-mounts."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=DAY, max_ttl=DAY)
        stage.vault.creds["database/creds/app"] = Creds(ttl=10 * HOUR, max_ttl=10 * HOUR, renewable=False)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(600, pod, *credential())
        stage.world.suspend(5 * HOUR)
        await node.mount(pod, *credential())
        assert stage.vault.issued == 1


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


@simulated
async def test_short_lease_is_replaced_in_time() -> None:
    """Where a third of a TTL is shorter than the re-mount interval, its maximum is still found in time."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=150, max_ttl=350)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(8 * HOUR, pod, *credential())
        assert dead_seconds(stage, node, pod) == 0.0


# Days at kubelet's cadence ----------------------------------------------------------------------------------------

# A pod's auth role and database role, and the least time, in seconds, that passes between two credentials: that a
# maximum TTL is near is known no earlier than one TTL before it, or a renewal point where that is all there is.
SHAPES: dict[str, tuple[Role, Creds, float]] = {
    "defaults": (Role(ttl=HOUR, max_ttl=DAY), Creds(ttl=HOUR, max_ttl=DAY), 23 * HOUR),
    "long-token": (Role(ttl=32 * DAY, max_ttl=32 * DAY), Creds(ttl=HOUR, max_ttl=DAY), 23 * HOUR),
    "short-lease": (Role(ttl=HOUR, max_ttl=10 * DAY), Creds(ttl=10 * MINUTE, max_ttl=HOUR), 50 * MINUTE),
    "short-token": (Role(ttl=20 * MINUTE, max_ttl=2 * HOUR), Creds(ttl=HOUR, max_ttl=DAY), 100 * MINUTE),
    "batch-token": (Role(ttl=HOUR, max_ttl=HOUR, batch=True), Creds(ttl=HOUR, max_ttl=DAY), 0.6 * HOUR),
    "not-renewable": (Role(ttl=HOUR, max_ttl=10 * DAY), Creds(HOUR, HOUR, renewable=False), 0.67 * HOUR),
}


@days
@settings(
    max_examples=2,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
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


# What goes wrong ------------------------------------------------------------------------------------------------


@simulated
async def test_vault_away_past_the_renewal_point() -> None:
    """Vault away for longer than the renewal point but shorter than the lease: renewed when back, nothing new."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(30 * MINUTE)
        await stage.vault.stop()
        await asyncio.sleep(28 * MINUTE)
        assert await node.mount(pod, *credential()) == first
        await stage.vault.start()
        await asyncio.sleep(4 * HOUR)
        assert await node.mount(pod, *credential()) == first
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)
        assert dead_seconds(stage, node, pod) == 0


@simulated
async def test_vault_silent_past_the_renewal_point() -> None:
    """A Vault that takes requests and does not answer is asked again: the lease is renewed once it answers."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        stage.vault.breaks("sys/leases/renew", 503, "Vault is sealed")
        with stage.vault.hold("auth/token/renew-self"):
            await asyncio.sleep(50 * MINUTE)
        stage.vault.mend()
        await asyncio.sleep(2 * HOUR)
        assert await node.mount(pod, *credential()) == first
        assert stage.vault.issued == 1


@simulated
async def test_vault_away_when_a_credential_is_due() -> None:
    """A re-mount that would replace a credential keeps the old one while Vault is away and the old one lives."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=HOUR, max_ttl=HOUR, renewable=False)
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(45 * MINUTE)
        await stage.vault.stop()
        assert await node.mount(pod, *credential()) == first
        assert [(told.read, told.kept) for told in node.told] == [(1, 0), (0, 1)]
        await stage.vault.start()
        assert await node.mount(pod, *credential()) != first


@simulated
async def test_vault_away_when_a_credential_is_dead() -> None:
    """A dead credential is not handed out: the mount fails, and the code is that of an unreachable Vault."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.vault.stop()
        await asyncio.sleep(61 * MINUTE)
        with pytest.raises(MountFailed) as failed:
            await node.mount(pod, *credential())
        assert failed.value.code is Code.FAILED_PRECONDITION


@simulated
async def test_storage_lost_is_found_by_a_static_object() -> None:
    """After Vault lost its storage, one re-mount logs in and issues anew, none of its files from before."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential(), STATIC)
        await asyncio.sleep(5 * MINUTE)
        stage.vault.lose_storage()
        second = await node.mount(pod, *credential(), STATIC)
        assert second["user"] != first["user"]
        assert stage.vault.lease_of(second["user"]).ends > stage.world.now()
        assert (stage.vault.logins, stage.vault.issued) == (2, 2)


@simulated
async def test_storage_lost_is_found_by_a_renewal() -> None:
    """Without a static object the next renewal finds out, and the re-mount after it brings a new credential."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.vault.lose_storage()
        await asyncio.sleep(45 * MINUTE)
        files = await node.mount(pod, *credential())
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_token_found_gone_while_a_read_is_under_way() -> None:
    """A read that is denied since its token died meanwhile logs in, though the token was already forgotten."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.vault.breaks("secret/", 403, "permission denied")
        with stage.vault.hold("secret/"):
            reading = asyncio.create_task(node.mount(pod, STATIC))
            await asyncio.sleep(1)
            stage.vault.lose_storage()
            stage.vault.mend()
            stage.world.suspend(50 * MINUTE)
            await asyncio.sleep(20)
            assert stage.vault.count("auth/token/renew-self") == 1
        assert await reading == {"static": "pass-1"}
        assert stage.vault.logins == 2


@simulated
async def test_node_suspended_for_an_hour() -> None:
    """After an hour of suspension, which no timer counted, what is due is renewed within seconds of waking."""
    async with Stage() as stage:
        stage.vault.creds["database/creds/app"] = Creds(ttl=2 * HOUR)
        stage.vault.roles["app"] = Role(ttl=2 * HOUR)
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential())
        await asyncio.sleep(30 * MINUTE)
        stage.world.suspend(HOUR)
        await asyncio.sleep(10)
        assert stage.vault.count("sys/leases/renew") == 1
        assert await node.mount(pod, *credential()) == first
        assert stage.vault.issued == 1


@simulated
async def test_node_suspended_for_longer_than_its_credential() -> None:
    """A credential that died while the node slept is replaced by the first re-mount, never handed out again."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.remount(10 * MINUTE, pod, *credential(), STATIC)
        stage.world.suspend(3 * HOUR)
        files = await node.mount(pod, *credential(), STATIC)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@pytest.mark.parametrize("seconds", [-10 * DAY, 10 * DAY])
def test_date_that_is_set(seconds: float) -> None:
    """Whoever sets the node's date moves no renewal: nothing dies, nothing is issued twice."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, pod = stage.node(kept=True), stage.pod("a")
            first = await node.mount(pod, *credential(), CERTIFICATE)
            stage.clock.set_date(seconds)
            await asyncio.sleep(5 * HOUR)
            assert await node.mount(pod, *credential(), CERTIFICATE) == first
            assert dead_seconds(stage, node, pod) == 0
            await stage.killed(node)
            assert await stage.node(kept=True).mount(pod, *credential(), CERTIFICATE) == first
            assert (stage.vault.logins, stage.vault.issued) == (1, 1)

    scene()


# Asked for once -------------------------------------------------------------------------------------------------


@simulated
async def test_caller_who_gives_up_joins_when_it_asks_again() -> None:
    """A driver that gives up while Vault is slow leaves no second credential behind when it asks again."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        with stage.vault.hold("database/"):
            first = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            second = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
        files = await second
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)
        assert files["user"] == stage.vault.all_leases[0].username


@simulated
async def test_caller_who_gives_up_finds_what_came_meanwhile() -> None:
    """An answer that came after its caller went away is kept, renewed, and given to who asks again."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        with stage.vault.hold("database/"):
            first = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
            first.cancel()
        await asyncio.sleep(2 * HOUR)
        files = await node.mount(pod, *credential())
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_caller_who_gives_up_at_the_login() -> None:
    """A login whose caller went away is not made again."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        with stage.vault.hold("auth/kubernetes/login"):
            first = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
            first.cancel()
            await asyncio.sleep(0)
            second = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
        await second
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_mount_out_of_time_leaves_no_second_credential() -> None:
    """A mount that runs out of its own time says so, and the next one gets the credential that it had asked for."""
    async with Stage() as stage:
        node, pod = stage.node(mount_timeout=60), stage.pod("a")
        with stage.vault.hold("database/"):
            with pytest.raises(OutOfTime):
                await node.mount(pod, *credential())
            again = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(30)
        await again
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_answer_that_never_comes_is_given_up() -> None:
    """After five minutes without an answer the request is given up, and a later mount sends it again."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        with stage.vault.hold("database/"):
            with pytest.raises(OutOfTime):
                await node.mount(pod, *credential())
            await asyncio.sleep(6 * MINUTE)
            again = asyncio.create_task(node.mount(pod, *credential()))
            await asyncio.sleep(1)
        await again
        assert stage.vault.count("database/creds/app") == 2


@simulated
async def test_many_mounts_of_one_pod_at_once() -> None:
    """64 mounts of one pod at the same time make one login and one credential, the same for all."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        files = await asyncio.gather(
            *(node.mount(pod, *credential(), STATIC, CERTIFICATE, volume=f"/{number}") for number in range(64))
        )
        assert len({tuple(sorted(found.items())) for found in files}) == 1
        assert (stage.vault.logins, stage.vault.issued, stage.vault.count("pki/issue/web")) == (1, 1, 1)


@simulated
async def test_one_caller_who_goes_away_takes_nobody_along() -> None:
    """Of two mounts that wait for one answer, the cancelled one does not cancel the other."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        with stage.vault.hold("database/"):
            first = asyncio.create_task(node.mount(pod, *credential(), volume="/one"))
            second = asyncio.create_task(node.mount(pod, *credential(), volume="/two"))
            await asyncio.sleep(1)
            first.cancel()
            await asyncio.sleep(1)
        assert (await second)["user"] == stage.vault.all_leases[0].username


@simulated
async def test_caller_who_joined_and_went_away_hears_no_failure() -> None:
    """Nobody is left to hear that the read it joined failed; asyncio, which the stage listens to, does not complain."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        with stage.vault.hold("database/"):
            first = asyncio.create_task(node.mount(pod, *credential("database/creds/none"), volume="/one"))
            await asyncio.sleep(1)
            second = asyncio.create_task(node.mount(pod, *credential("database/creds/none"), volume="/two"))
            await asyncio.sleep(1)
            second.cancel()
            await asyncio.wait([second])
        await asyncio.wait([first])
        assert isinstance(first.exception(), MountFailed)
        gc.collect()


# 403 and tokens of other kinds ----------------------------------------------------------------------------------


async def denials(node: Node, pod: Pod, times: int, apart: float) -> None:
    """So many mounts that are to fail for want of permission."""
    for _ in range(times):
        with pytest.raises(MountFailed) as failed:
            await node.mount(pod, STATIC)
        assert failed.value.code is Code.PERMISSION_DENIED
        await asyncio.sleep(apart)


@pytest.mark.parametrize("policies", [("app", "default"), ("app",)], ids=["default", "without default"])
def test_policy_denial_does_not_log_in_at_each_retry(policies: tuple[str, ...]) -> None:
    """A first mount that policies deny does not log in again; later ones do once in five minutes, not at each."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            stage.vault.roles["app"] = Role(policies=policies)
            stage.vault.policies["app"] = ()
            node, pod = stage.node(), stage.pod("a")
            await denials(node, pod, 1, 0)
            assert stage.vault.logins == 1
            await denials(node, pod, 10, 30)
            assert stage.vault.logins == 2
            await asyncio.sleep(5 * MINUTE)
            await denials(node, pod, 1, 0)
            assert stage.vault.logins == 3

    scene()


@simulated
async def test_token_that_died_is_replaced_at_once() -> None:
    """A 403 under a token that Vault does not know any more costs one login, in the same mount, at any time."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, STATIC)
        for _ in range(3):
            stage.vault.lose_storage()
            assert await node.mount(pod, STATIC) == {"static": "pass-1"}
        assert stage.vault.logins == 4


@simulated
async def test_token_without_the_default_policy() -> None:
    """A token that may not look itself up, and died, is replaced; so is the lease that died with it."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(policies=("app",))
        node, pod = stage.node(), stage.pod("a")
        first = await node.mount(pod, *credential(), STATIC)
        stage.vault.lose_storage()
        second = await node.mount(pod, *credential(), STATIC)
        assert second["user"] != first["user"]
        assert stage.vault.lease_of(second["user"]).ends > stage.world.now()


@simulated
async def test_token_that_may_not_renew_itself() -> None:
    """Without the default policy nothing can be renewed: credentials are replaced in time all the same."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(policies=("app",))
        node, pod = stage.node(), stage.pod("a")
        await node.remount(5 * HOUR, pod, *credential(), STATIC)
        assert dead_seconds(stage, node, pod) == 0
        assert stage.vault.issued <= 10


@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_token_of_few_uses(uses: int) -> None:
    """A token of ``num_uses`` is used no more often than that; what dies with it is not handed out."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            stage.vault.roles["app"] = Role(num_uses=uses)
            stage.vault.kv["secret/data/b"] = {"data": {"password": "of-b"}, "metadata": {}}
            node, pod = stage.node(), stage.pod("a")
            for _ in range(4):
                files = await node.mount(pod, STATIC, wanted("b", "secret/data/b", "password"))
                assert files == {"static": "pass-1", "b": "of-b"}
            assert stage.vault.under_dead_tokens == 0
            assert stage.vault.count("auth/token/renew-self") == 0

    scene()


@simulated
async def test_lease_dies_with_the_last_use_of_its_token() -> None:
    """A token's last use revokes it and its leases (docs/contract.md section 3): the file holds a live credential."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(num_uses=3)
        node, pod = stage.node(), stage.pod("a")
        for _ in range(5):
            files = await node.mount(pod, *credential(), STATIC)
            assert stage.vault.lease_of(files["user"]).ends > stage.world.now()
            await asyncio.sleep(75)


@simulated
async def test_batch_token_is_neither_renewed_nor_revoked() -> None:
    """Nothing is asked of Vault that a batch token cannot do; a new login comes before it ends."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(batch=True)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(3 * HOUR, pod, *credential())
        assert stage.vault.count("auth/token/renew-self") == 0
        assert stage.vault.count("auth/token/revoke-self") == 0
        assert dead_seconds(stage, node, pod) == 0
        assert stage.vault.logins <= 6


@simulated
async def test_tokens_without_end() -> None:
    """A token of TTL 0 is not renewed, and its leases are."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"] = Role(ttl=0)
        await node.mount(pod, STATIC)
        await asyncio.sleep(3 * HOUR)
        assert await node.mount(pod, STATIC) == {"static": "pass-1"}
        assert (stage.vault.logins, stage.vault.count("auth/token/renew-self")) == (1, 0)


@simulated
async def test_logs_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """In a day of everything that goes wrong no token, JWT, password or key is in any line of the log, at any level."""
    caplog.set_level(logging.DEBUG)
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(ttl=HOUR, max_ttl=2 * HOUR)
        node, pod = stage.node(kept=True), stage.pod("a")
        wish = (*credential(), STATIC, CERTIFICATE, PRIVATE_KEY)
        await node.remount(5 * HOUR, pod, *wish)
        stage.vault.refuses_renewal = True
        await node.remount(HOUR, pod, *wish)
        stage.vault.lose_storage()
        await node.mount(pod, *wish)
        for status in (400, 403, 404, 500):
            stage.vault.breaks("", status)
            with contextlib.suppress(MountFailed):
                await node.mount(pod, *wish)
            await asyncio.sleep(HOUR)
        stage.vault.mend()
        await node.mount(pod, *wish)
        await stage.vault.stop()
        stage.remove(pod)
        await asyncio.sleep(HOUR / 2)
        canaries = {
            value for _, files in node.written[pod.uid, "/volume"] for name, value in files.items() if name != "user"
        }
        canaries |= {token.id for token in stage.vault.all_tokens} | {f"shop/{pod.uid}"}
        told = "".join(f"{record.getMessage()} {record.__dict__} {record.exc_text}" for record in caplog.records)
        assert "revocation failed" in told
        assert [canary for canary in canaries if canary in told] == []


# No room --------------------------------------------------------------------------------------------------------


@simulated
async def test_cache_of_nothing_leaves_no_token() -> None:
    """With ``cache_size`` 0 each mount logs in, and revokes its token when it is done, unless a lease hangs on it."""
    async with Stage() as stage:
        node, pod = stage.node(cache_size=0), stage.pod("a")
        for _ in range(3):
            await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        assert stage.vault.logins == 3
        assert not stage.vault.live_tokens()
        files = await node.mount(pod, *credential())
        await asyncio.sleep(1)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_pod_with_most_sessions_is_let_go_first() -> None:
    """A pod that mounts under ever other identities lets go of its own sessions, and of nobody else's."""
    async with Stage() as stage:
        node, victim, attacker = stage.node(cache_size=4), stage.pod("a"), stage.pod("b")
        files = await node.mount(victim, *credential())
        for number in range(20):
            stage.vault.roles[f"role-{number}"] = Role()
            await node.mount(attacker, STATIC, role=f"role-{number}")
        await asyncio.sleep(1)
        assert len(node.sessions.of_pod(attacker.uid)) == 3
        assert await node.mount(victim, *credential()) == files
        assert stage.vault.issued == 1


@simulated
async def test_least_recently_mounted_is_let_go() -> None:
    """Past ``cache_size`` the pod that mounted longest ago is let go, its token revoked; the others stay."""
    async with Stage() as stage:
        node = stage.node(cache_size=2)
        one, two, three = (stage.pod(name) for name in "abc")
        await node.mount(one, STATIC)
        await node.mount(two, STATIC)
        await node.mount(one, STATIC)
        await node.mount(three, STATIC)
        await asyncio.sleep(1)
        assert [token.jwt for token in stage.vault.live_tokens()] == ["shop/uid-of-a", "shop/uid-of-c"]
        await node.mount(one, STATIC)
        assert stage.vault.logins == 3


@simulated
async def test_failed_mounts_are_let_go_too() -> None:
    """A mount that failed does not stay past ``cache_size`` either."""
    async with Stage() as stage:
        node, pod = stage.node(cache_size=0), stage.pod("a")
        with pytest.raises(MountFailed):
            await node.mount(pod, wanted("nothing", "secret/data/nothing", "key"))
        await asyncio.sleep(1)
        assert not stage.vault.live_tokens()


def held_tokens() -> int:
    """How many tokens this process holds in memory."""
    gc.collect()
    return sum(isinstance(found, HeldToken) for found in gc.get_objects())


@days
@simulated
async def test_what_is_over_is_forgotten() -> None:
    """A pod that lives for long does not gather dead tokens: a session holds as much after days as after hours."""
    async with Stage() as stage:
        before = held_tokens()
        stage.vault.roles["app"] = Role(ttl=10 * MINUTE, max_ttl=10 * MINUTE)
        node, pod = stage.node(), stage.pod("a")
        await node.remount(DAY, pod, STATIC)
        assert stage.vault.logins > 100
        assert held_tokens() - before <= 5


@simulated
async def test_a_static_read_that_hangs_is_joined_by_no_later_mount() -> None:
    """Its mount ends without it: behind a connection that is dead, the next one asks anew, and so does another pod."""
    async with Stage() as stage:
        node, pod, other = stage.node(mount_timeout=10), stage.pod("a"), stage.pod("b")
        for _ in range(2):
            await node.mount(pod, STATIC)  # until it is known to be static, and its engine
            await asyncio.sleep(1)
        stage.vault.seen.clear()
        with stage.vault.hold("secret/data/app"):
            for number in (1, 2):
                with pytest.raises(ProviderError):
                    await node.mount(pod, STATIC)
                with pytest.raises(ProviderError):
                    await node.mount(other, STATIC)
                assert stage.vault.count("secret/data/app") == 2 * number


@simulated
async def test_a_lease_that_its_engine_cannot_renew_now_is_renewed_later() -> None:
    """Its database was away for a moment, and nobody mounts the pod again: the credential lives on."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        files = await node.mount(pod, *credential())
        stage.vault.breaks("sys/leases/renew", 400, "failed to renew entry: resp: (nil) err: failed to connect")
        await asyncio.sleep(2800)
        stage.vault.mend()
        await asyncio.sleep(4 * HOUR)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_a_lease_that_its_engine_never_renews_is_replaced_in_time() -> None:
    """Its role is gone, or its database user: Vault's words are those of a database that is away for a moment."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.breaks("sys/leases/renew", 400, "failed to renew entry: resp: (nil) err: could not find role")
        end = stage.world.now() + 3 * HOUR
        while stage.world.now() < end:
            files = await node.mount(pod, *credential())
            assert stage.vault.lease_of(files["user"]).ends > stage.world.now() + 75
            await asyncio.sleep(75)
        assert stage.vault.issued <= 5


@simulated
async def test_what_is_taken_up_is_not_written_again() -> None:
    """A restart, or another daemon's credential, costs no write of what was just read."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        await asyncio.sleep(1)
        await stage.killed(node)
        node = stage.node(kept=True)
        await asyncio.sleep(60)
        (session,) = node.sessions.all()
        assert session.view(idle=False).leases
        assert not session.file.changed
