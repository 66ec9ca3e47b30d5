"""The end of a pod: what shows that it is gone, what does not, and what is revoked then."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest

from provider.errors import KubernetesDenied, KubernetesUnavailable
from provider.spc import Pod
from tests.stand.simnode import NODE_NAME, OWN_POD, STATIC, Key, Stage, credential
from tests.stand.simtime import simulated
from tests.stand.simvault import Role

SWEEP = 60.0
"""The daemon's default --sweep-interval, in seconds."""
HOUR = 3600.0


@simulated
async def test_pod_that_is_gone_leaves_nothing() -> None:
    """After its end every token of a pod is revoked, and so every lease; pods that live keep theirs."""
    async with Stage() as stage:
        node, gone, alive = stage.node(), stage.pod("a"), stage.pod("b")
        await node.mount(gone, *credential(), STATIC)
        kept = await node.mount(alive, *credential())
        stage.remove(gone)
        await asyncio.sleep(3 * SWEEP)
        assert [token.jwt for token in stage.vault.live_tokens()] == ["shop/uid-of-b"]
        assert [lease.username for lease in stage.vault.live_leases()] == [kept["user"]]


@simulated
async def test_many_pods_come_and_go() -> None:
    """Of 200 pods that came and went nothing is left at Vault; while they lived each had one token."""
    async with Stage() as stage:
        node = stage.node()
        pods = [stage.pod(f"pod-{number}") for number in range(200)]
        await asyncio.gather(*(node.mount(pod, *credential()) for pod in pods))
        assert len(stage.vault.live_tokens()) == len(stage.vault.all_tokens) == 200
        for pod in pods:
            stage.remove(pod)
        await asyncio.sleep(3 * SWEEP)
        assert not stage.vault.live_tokens()
        assert not stage.vault.live_leases()
        assert not node.sessions.all()


@pytest.mark.usefixtures("collector_off")
@simulated
async def test_an_ended_session_is_not_left_to_the_garbage_collector() -> None:
    """What a pod had is forgotten with it, its tokens too: no cycle holds it until somebody looks for those."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential(), STATIC)
        (session,) = (weakref.ref(found) for found in node.sessions.all())
        assert session() is not None
        stage.remove(pod)
        await asyncio.sleep(3 * SWEEP)
        assert session() is None


@simulated
async def test_all_tokens_of_a_pod_are_revoked() -> None:
    """A pod that mounted under two roles has two sessions: its end revokes the tokens of both."""
    async with Stage() as stage:
        stage.vault.roles["other"] = Role()
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential(), volume="/one")
        await node.mount(pod, *credential(), volume="/two", role="other")
        stage.remove(pod)
        await asyncio.sleep(3 * SWEEP)
        assert stage.vault.logins == 2
        assert not stage.vault.live_tokens()


@simulated
async def test_one_absence_proves_nothing() -> None:
    """A pod that one listing lacked and the next has is not even looked for by name."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.cluster.unseen.add(pod.uid)
        await node.sweeper.sweep()
        stage.cluster.unseen.clear()
        await node.sweeper.sweep()
        stage.cluster.unseen.add(pod.uid)
        await node.sweeper.sweep()
        await asyncio.sleep(1)
        assert stage.cluster.confirmed == []
        assert len(stage.vault.live_tokens()) == 1


@simulated
async def test_mount_between_two_sweeps_proves_life() -> None:
    """A pod that the cache lacks, as new ones are, but that mounted since the first absence, is not gone."""
    async with Stage() as stage:
        node, pod = stage.node(sweep_interval=1e9), stage.pod("a")
        await node.mount(pod, STATIC)
        stage.cluster.unseen.add(pod.uid)
        for _ in range(5):
            await asyncio.sleep(30)
            await node.sweeper.sweep()
            await asyncio.sleep(30)
            await node.mount(pod, STATIC)
        assert stage.cluster.confirmed == []
        await asyncio.sleep(30)
        await node.sweeper.sweep()
        await asyncio.sleep(30)
        await node.sweeper.sweep()
        assert stage.cluster.confirmed == [pod.uid]


@simulated
async def test_failed_mount_proves_life_too() -> None:
    """A mount that fails shows that the pod is there as well as one that succeeds."""
    async with Stage() as stage:
        node, pod = stage.node(sweep_interval=1e9), stage.pod("a")
        await node.mount(pod, *credential())
        stage.cluster.unseen.add(pod.uid)
        await node.sweeper.sweep()
        await asyncio.sleep(30)
        stage.vault.breaks("secret/", 400)
        with pytest.raises(Exception, match="Vault refused"):
            await node.mount(pod, *credential(), STATIC)
        await node.sweeper.sweep()
        assert stage.cluster.confirmed == []


@simulated
async def test_cache_that_lags_is_not_believed() -> None:
    """A pod that two listings lack, and that is there when it is asked for by name, keeps its credentials."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.cluster.unseen.add(pod.uid)
        await asyncio.sleep(20 * SWEEP)
        assert pod.uid in stage.cluster.confirmed
        assert len(stage.vault.live_tokens()) == 1


@simulated
async def test_pod_of_the_same_name_is_another() -> None:
    """A StatefulSet's pod that was deleted and made again has another UID: the old one's token is revoked."""
    async with Stage() as stage:
        node, old = stage.node(), stage.pod("a")
        await node.mount(old, *credential())
        stage.remove(old)
        new = Pod(old.namespace, old.name, "uid-of-the-next", old.service_account)
        stage.cluster.pods[new.uid] = new
        files = await node.mount(new, *credential())
        await asyncio.sleep(3 * SWEEP)
        assert [lease.username for lease in stage.vault.live_leases()] == [files["user"]]


@simulated
async def test_confirmation_that_fails_revokes_nothing() -> None:
    """As long as nobody can confirm it, a pod that is absent is not gone; afterwards it is."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)

        def fail() -> None:
            raise KubernetesUnavailable("the API server does not answer")

        stage.cluster.before_confirming = fail
        await asyncio.sleep(5 * SWEEP)
        assert stage.cluster.confirmed
        assert len(stage.vault.live_tokens()) == 1
        stage.cluster.before_confirming = lambda: None
        await asyncio.sleep(2 * SWEEP)
        assert not stage.vault.live_tokens()


@pytest.mark.parametrize("fault", ["own pod missing", "own pod not found by name", "wrong node", "no answer"])
def test_listing_that_proves_nothing(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """A listing without the daemon's own pod, of another node, or failed revokes nothing, and says so."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node = stage.node(node_name="node-2" if fault == "wrong node" else NODE_NAME)
            pod = stage.pod("a")
            await node.mount(pod, *credential())
            stage.remove(pod)
            if fault == "own pod missing":
                stage.cluster.unseen.add(OWN_POD.uid)
            elif fault == "own pod not found by name":
                stage.cluster.complete = False
                stage.remove(OWN_POD)
            elif fault == "no answer":
                stage.cluster.failure = KubernetesUnavailable("no answer")
            await asyncio.sleep(5 * SWEEP)
            assert stage.cluster.listed >= 4
            assert len(stage.vault.live_tokens()) == 1
            assert "this sweep revokes nothing" in caplog.text

    scene()


@pytest.mark.parametrize("own", [{}, {"pod_name": "", "pod_namespace": ""}], ids=["own pod known", "own pod unknown"])
def test_pods_are_asked_for_by_name_where_the_listing_is_not_whole(own: dict[str, Any]) -> None:
    """A tenant's pods with much metadata make a listing too large: the end of pods is found all the same."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, gone, alive = stage.node(**own), stage.pod("a"), stage.pod("b")
            stage.cluster.complete = False
            stage.cluster.unseen.add(alive.uid)
            await node.mount(gone, *credential())
            kept = await node.mount(alive, *credential())
            stage.remove(gone)
            await asyncio.sleep(20 * SWEEP)
            assert [lease.username for lease in stage.vault.live_leases()] == [kept["user"]]
            # Asked for once more after two sweeps without it, as after a listing.
            assert stage.cluster.confirmed.count(gone.uid) == 3

    scene()


@simulated
async def test_absences_around_a_useless_listing_do_not_add_up() -> None:
    """After a listing that proved nothing, two new absences are needed."""
    async with Stage() as stage:
        node, pod = stage.node(sweep_interval=1e9), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)
        await asyncio.sleep(1)
        await node.sweeper.sweep()
        stage.cluster.failure = KubernetesUnavailable("no answer")
        await node.sweeper.sweep()
        stage.cluster.failure = None
        await node.sweeper.sweep()
        await asyncio.sleep(1)
        assert len(stage.vault.live_tokens()) == 1
        await node.sweeper.sweep()
        await asyncio.sleep(1)
        assert not stage.vault.live_tokens()


@simulated
async def test_own_pod_is_not_needed_where_it_is_unknown() -> None:
    """Without POD_NAME and POD_NAMESPACE the listing is believed as it is."""
    async with Stage() as stage:
        node, pod = stage.node(pod_name="", pod_namespace=""), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(OWN_POD)
        stage.remove(pod)
        await asyncio.sleep(3 * SWEEP)
        assert not stage.vault.live_tokens()


@simulated
async def test_session_that_ends_while_another_is_confirmed() -> None:
    """A session that is let go while the sweep waits for the API server does not stop the sweep for ever."""
    async with Stage() as stage:
        node = stage.node(sweep_interval=1e9)
        pods = [stage.pod(name) for name in "ab"]
        for pod in pods:
            await node.mount(pod, STATIC)
            stage.remove(pod)
        await asyncio.sleep(1)
        await node.sweeper.sweep()
        stage.cluster.before_confirming = lambda: node.sessions.end(pods[1].uid)
        await node.sweeper.sweep()
        await asyncio.sleep(1)
        assert not stage.vault.live_tokens()


# Where nobody can say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["denied", "no node name"])
def test_where_pods_cannot_be_listed(why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without permission or node name that is said once; sessions idle out by themselves, unrevoked."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            stage.cluster.failure = KubernetesDenied("listing pods is forbidden")
            node = stage.node(node_name="" if why == "no node name" else NODE_NAME)
            gone, alive = stage.pod("a"), stage.pod("b")
            await node.mount(gone, *credential())
            await node.remount(5 * HOUR, alive, *credential())
            assert caplog.text.count("pods that are gone cannot be found") == 1
            assert [token.jwt for token in stage.vault.live_tokens()] == ["shop/uid-of-b"]
            assert stage.vault.count("auth/token/revoke-self") == 0
            assert len(node.sessions.all()) == 1

    scene()


@simulated
async def test_session_that_idles_out_is_told_so() -> None:
    """Whoever looks sees that what is left to end is renewed no more, as long as it lives, and of which pod."""
    async with Stage() as stage:
        stage.cluster.failure = KubernetesDenied("listing pods is forbidden")
        stage.vault.roles["app"] = Role(ttl=HOUR, max_ttl=24 * HOUR)
        node, gone, alive = stage.node(), stage.pod("a"), stage.pod("b")
        await node.mount(gone, *credential())
        await node.remount(50 * 60, alive, *credential())

        def told() -> dict[str, tuple[bool, bool, bool]]:
            views = {view.who.pod.uid: view for view in node.sessions.views()}
            return {uid: (view.idle, view.token_renewed, view.leases[0].renewed) for uid, view in views.items()}

        assert told() == {gone.uid: (False, True, True), alive.uid: (False, True, True)}
        await node.remount(20 * 60, alive, *credential())
        assert told() == {gone.uid: (True, False, False), alive.uid: (False, True, True)}


@simulated
async def test_where_no_remounts_come_nothing_idles_out() -> None:
    """With rotation off no re-mount shows that a pod lives: where pods cannot be listed all are kept alive."""
    async with Stage() as stage:
        stage.cluster.failure = KubernetesDenied("listing pods is forbidden")
        node, pod = stage.node(), stage.pod("a")
        files = await node.mount(pod, *credential())
        await asyncio.sleep(10 * HOUR)
        assert stage.vault.lease_of(files["user"]).ends > stage.world.now()


@simulated
async def test_permission_that_is_given_later(caplog: pytest.LogCaptureFixture) -> None:
    """Once listing is allowed, pods that are gone are found; if it is denied again, that is said again."""
    async with Stage() as stage:
        stage.cluster.failure = KubernetesDenied("listing pods is forbidden")
        node, pod, other = stage.node(), stage.pod("a"), stage.pod("b")
        await node.mount(pod, *credential())
        await node.mount(other, *credential())
        await asyncio.sleep(3 * SWEEP)
        stage.cluster.failure = None
        stage.remove(pod)
        await asyncio.sleep(3 * SWEEP)
        assert len(stage.vault.live_tokens()) == 1
        stage.cluster.failure = KubernetesDenied("listing pods is forbidden")
        await asyncio.sleep(3 * SWEEP)
        assert caplog.text.count("pods that are gone cannot be found") == 2


@simulated
async def test_revoke_never() -> None:
    """With --revoke=never nobody is asked, and no token is revoked at a pod's end."""
    async with Stage() as stage:
        node, pod = stage.node(revoke=False), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)
        await asyncio.sleep(5 * SWEEP)
        assert stage.cluster.listed == 0
        assert len(stage.vault.live_tokens()) == 1


@simulated
async def test_idle_node_asks_nobody() -> None:
    """Without a session the API server is not asked."""
    async with Stage() as stage:
        stage.node()
        await asyncio.sleep(5 * SWEEP)
        assert stage.cluster.listed == 0


# Revocation -------------------------------------------------------------------------------------------------------


@simulated
async def test_revocation_is_tried_until_it_succeeds() -> None:
    """A Vault that is away when a pod ends is told when it is back, minutes later."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.vault.stop()
        stage.remove(pod)
        await asyncio.sleep(20 * SWEEP)
        await stage.vault.start()
        assert len(stage.vault.live_tokens()) == 1
        await asyncio.sleep(2 * SWEEP)
        assert not stage.vault.live_tokens()


@simulated
async def test_revocation_ends_with_the_token() -> None:
    """Revocation is tried, with growing pauses, until the token's own expiry and not after."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)
        stage.vault.breaks("auth/token/revoke-self", 503, "Vault is sealed")
        await asyncio.sleep(HOUR + 2 * SWEEP)
        tries = stage.vault.count("auth/token/revoke-self")
        assert 50 < tries < 1000
        await asyncio.sleep(HOUR)
        assert stage.vault.count("auth/token/revoke-self") == tries
        assert stage.vault.count("auth/token/renew-self") == 0


@simulated
async def test_batch_token_is_tried_once() -> None:
    """A batch token cannot be revoked; that is learnt by one request."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(batch=True)
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        stage.remove(pod)
        await asyncio.sleep(10 * SWEEP)
        assert stage.vault.count("auth/token/revoke-self") == 1


@pytest.mark.parametrize("path", ["auth/kubernetes/login", "database/"])
def test_what_is_under_way_at_the_end_is_revoked_too(path: str) -> None:
    """A token or a credential whose answer comes after its pod's end was noticed is revoked with the rest."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            node, pod = stage.node(), stage.pod("a")
            with stage.vault.hold(path):
                mount = asyncio.create_task(node.mount(pod, *credential()))
                await asyncio.sleep(1)
                mount.cancel()
                stage.remove(pod)
                await asyncio.sleep(3 * SWEEP)
            await asyncio.sleep(SWEEP)
            assert stage.vault.logins == 1
            assert not stage.vault.live_tokens()
            assert not stage.vault.live_leases()

    scene()


@simulated
async def test_termination_revokes_nothing() -> None:
    """On SIGTERM every credential stays: the pods live on."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.killed(node)
        assert len(stage.vault.live_leases()) == 1
        assert stage.vault.count("auth/token/revoke-self") == 0


# With a state directory -------------------------------------------------------------------------------------------


@simulated
async def test_pods_that_died_while_the_daemon_was_away() -> None:
    """Sessions of an earlier process whose pods are gone are swept by the next one, and their files removed."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True), stage.pod("a")
        await node.mount(pod, *credential())
        await stage.killed(node)
        stage.remove(pod)
        stage.node(kept=True)
        await asyncio.sleep(3 * SWEEP)
        assert not stage.vault.live_tokens()
        assert not list(stage.state.glob("*.session*"))


@simulated
async def test_only_one_of_two_daemons_sweeps() -> None:
    """Of two daemons on one state directory the first to hold its lock sweeps, until it ends; then the other."""
    async with Stage() as stage:
        old, pod = stage.node(kept=True), stage.pod("a")
        await old.mount(pod, *credential())
        await asyncio.sleep(SWEEP)
        new = stage.node(kept=True)
        await new.mount(pod, *credential())
        assert old.sessions.may_sweep()
        assert not new.sessions.may_sweep()
        await stage.killed(old)
        assert new.sessions.may_sweep()


@simulated
async def test_nothing_is_swept_before_the_state_is_known() -> None:
    """While the HMAC key is waited for, and with it the sessions of an earlier process, nothing is swept."""
    async with Stage() as stage:
        node, pod = stage.node(kept=True, key=Key(None)), stage.pod("a")
        assert not node.sessions.may_sweep()
        mounting = asyncio.create_task(node.mount(pod, *credential()))
        await asyncio.sleep(1)
        assert not node.sessions.may_sweep()
        assert stage.cluster.listed == 0
        await mounting
        assert node.sessions.may_sweep()


@simulated
async def test_what_another_daemon_was_given_ends_with_the_pod() -> None:
    """A new login is in the file alone, whose daemon is gone; whoever finds the pod gone looks there before."""
    async with Stage() as stage:
        one = stage.node(kept=True)
        pod = stage.pod("a")
        await one.mount(pod, STATIC)
        await asyncio.sleep(1)
        two = stage.node(kept=True)
        await asyncio.sleep(60)
        assert two.sessions.all()
        stage.vault.live_tokens()[0].revoked = stage.world.now()
        files = await one.mount(pod, *credential())
        await asyncio.sleep(1)
        await stage.killed(one)
        stage.remove(pod)
        await asyncio.sleep(10 * SWEEP)
        assert stage.vault.lease_of(files["user"]).ends < stage.world.now()
        assert not stage.vault.live_tokens()
