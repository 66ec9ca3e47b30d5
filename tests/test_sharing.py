"""Reads that pods share while in flight: only where Vault cannot tell the pods apart (docs/contract.md section 3)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from provider.errors import MountFailed
from provider.sessions import shared
from provider.spc import ObjectSpec, Pod
from tests.stand.simnode import STATIC, Files, Node, Stage, credential, wanted
from tests.stand.simtime import simulated
from tests.stand.simvault import Role

PODS = "abcdef"
OLD = wanted("old", "old/app", "password")


async def together(
    stage: Stage, node: Node, pods: Sequence[Pod], wish: ObjectSpec, *, auths: Sequence[str] = ("kubernetes",)
) -> list[Files]:
    """What each pod gets of ``wish``, when all of them ask while the first answer is held back.

    Each is logged in before and Vault's engines are known, so that the one request in question is the read.
    """
    arranged = [(pod, auths[number % len(auths)]) for number, pod in enumerate(pods)]
    for pod, auth in arranged:
        await node.mount(pod, wish, auth=auth)
    await asyncio.sleep(1)
    stage.vault.seen.clear()
    with stage.vault.hold(wish.request.path):
        mounts = [asyncio.create_task(node.mount(pod, wish, auth=auth)) for pod, auth in arranged]
        await asyncio.sleep(1)
    return list(await asyncio.gather(*mounts))


@pytest.mark.parametrize("wish", [STATIC, OLD], ids=["version 2", "version 1"])
def test_pods_of_one_principal_share_a_read(wish: ObjectSpec) -> None:
    """Six pods of one service account that read one kv path at one time cost Vault one read."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            stage.vault.kv["old/app"] = {"password": "pass-1"}
            pods = [stage.pod(name) for name in PODS]
            files = await together(stage, stage.node(), pods, wish)
            assert [*files[0].values()] == ["pass-1"]
            assert files == [files[0]] * 6
            assert stage.vault.count(wish.request.path) == 1

    scene()


@simulated
async def test_share_reads_off_sends_each() -> None:
    """With sharing off each pod's read is sent under its own token."""
    async with Stage() as stage:
        pods = [stage.pod(name) for name in PODS]
        await together(stage, stage.node(share_reads=False), pods, STATIC)
        reads = [seen.token for seen in stage.vault.seen if seen.path == STATIC.request.path]
        assert len(set(reads)) == len(reads) == 6


@simulated
async def test_only_what_is_in_flight_is_shared() -> None:
    """A read that comes after an answer is sent: nothing is remembered for other pods."""
    async with Stage() as stage:
        node, one, two = stage.node(), stage.pod("a"), stage.pod("b")
        await together(stage, node, [one, two], STATIC)
        stage.vault.kv["secret/data/app"]["data"]["password"] = "pass-2"
        assert await node.mount(two, STATIC) == {"static": "pass-2"}


@simulated
async def test_other_entities_do_not_share() -> None:
    """Pods of different service accounts, which Vault tells apart, read each for itself."""
    async with Stage() as stage:
        pods = [stage.pod(name, service_account=f"account-of-{name}") for name in PODS]
        await together(stage, stage.node(), pods, STATIC)
        assert stage.vault.count("secret/data/app") == 6


@simulated
async def test_without_an_entity_nothing_is_shared() -> None:
    """A token that says no entity says nothing of who is alike."""
    async with Stage() as stage:
        stage.vault.roles["app"] = Role(entity=False)
        await together(stage, stage.node(), [stage.pod(name) for name in PODS], STATIC)
        assert stage.vault.count("secret/data/app") == 6


@simulated
async def test_across_auth_mounts_nothing_is_shared() -> None:
    """One service account has another entity under another auth mount."""
    async with Stage() as stage:
        pods = [stage.pod(name) for name in PODS]
        await together(stage, stage.node(), pods, STATIC, auths=("kubernetes", "jwt"))
        assert stage.vault.count("secret/data/app") == 2


@simulated
async def test_other_policies_do_not_share() -> None:
    """Pods of one entity whose tokens carry different policies read each for itself."""
    async with Stage() as stage:
        node, one, two = stage.node(), stage.pod("a"), stage.pod("b")
        await node.mount(one, STATIC)
        stage.vault.policies["more"] = ()
        stage.vault.roles["app"] = Role(policies=("app", "default", "more"))
        await together(stage, node, [one, two], STATIC)
        assert stage.vault.count("secret/data/app") == 2


@simulated
async def test_leased_is_never_shared() -> None:
    """Six pods that ask for a database credential at one time get six."""
    async with Stage() as stage:
        node = stage.node()
        fresh = credential(fresh=True)[0]
        files = await together(stage, node, [stage.pod(name) for name in PODS], fresh)
        assert len({found["user"] for found in files}) == 6


@pytest.mark.parametrize("path", ["auth/token/lookup-self", "cubbyhole/app"])
def test_what_each_token_sees_otherwise_is_never_shared(path: str) -> None:
    """Paths that answer each token alike in shape and not in content give each of six pods its own."""

    @simulated
    async def scene() -> None:
        async with Stage() as stage:
            whole = wanted("own", path)
            files = await together(stage, stage.node(), [stage.pod(name) for name in PODS], whole)
            assert len({found["own"] for found in files}) == 6
            assert stage.vault.count(path) == 6

    scene()


@simulated
async def test_unknown_engine_is_not_shared() -> None:
    """Where the token may not know which engine it reads from, each read is sent, and the question not repeated."""
    async with Stage() as stage:
        stage.vault.tells_engines = False
        await together(stage, stage.node(), [stage.pod(name) for name in PODS], STATIC)
        assert stage.vault.count("secret/data/app") == 6
        assert stage.vault.count("sys/internal/ui/mounts/") == 0


@simulated
async def test_engine_that_was_replaced_is_noticed() -> None:
    """What is known of a mount is asked again after a while: a path that is kv no more is shared no more."""
    async with Stage() as stage:
        node, pods = stage.node(), [stage.pod(name) for name in PODS]
        await together(stage, node, pods, STATIC)
        stage.vault.engines["secret/"] = ("generic", "")
        await asyncio.sleep(11 * 60)
        await together(stage, node, pods, STATIC)
        assert stage.vault.count("secret/data/app") == 6


@simulated
async def test_only_gets_are_shared() -> None:
    """A write to a kv path is sent for each pod."""
    async with Stage() as stage:
        post = wanted("static", "secret/data/app", "password", method="POST", body='{"version":1}')
        await together(stage, stage.node(), [stage.pod(name) for name in PODS], post)
        assert stage.vault.count("secret/data/app", "POST") == 6


@simulated
async def test_failure_under_anothers_token_is_not_shared() -> None:
    """When the shared read fails, who joined it reads for itself: the token that failed was not its own."""
    async with Stage() as stage:
        node, pods = stage.node(), [stage.pod(name) for name in PODS]
        for pod in pods:
            await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        stage.vault.seen.clear()
        with stage.vault.hold("secret/data/app"):
            stage.vault.breaks("secret/data/app", 400, "for the first only")
            mounts = [asyncio.create_task(node.mount(pod, STATIC)) for pod in pods]
            await asyncio.sleep(1)
            stage.vault.mend()
        ends = await asyncio.gather(*mounts, return_exceptions=True)
        assert [type(end) for end in ends] == [MountFailed, *[dict] * 5]
        assert stage.vault.count("secret/data/app") == 6


@simulated
async def test_pod_that_goes_away_takes_no_other_along() -> None:
    """When the pod whose mount sent the shared read gives up, the others still get its answer."""
    async with Stage() as stage:
        node, one, two = stage.node(), stage.pod("a"), stage.pod("b")
        for pod in (one, two):
            await node.mount(pod, STATIC)
        await asyncio.sleep(1)
        stage.vault.seen.clear()
        with stage.vault.hold("secret/data/app"):
            first = asyncio.create_task(node.mount(one, STATIC))
            await asyncio.sleep(0.1)
            second = asyncio.create_task(node.mount(two, STATIC))
            await asyncio.sleep(1)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
        assert await second == {"static": "pass-1"}
        assert stage.vault.count("secret/data/app") == 1


@simulated
async def test_engines_that_are_known_are_bounded() -> None:
    """However many engines classes name, no more than so many are remembered; those in use are learnt anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared, "MAX_ENGINES", 3)
        async with Stage() as stage:
            node, pod = stage.node(), stage.pod("a")
            every = stage.vault.engines.pop("old/")
            for number in range(10):
                stage.vault.engines[f"old/{number}/"] = every
                stage.vault.engines["old/"] = stage.vault.engines.pop("old/", every)  # behind those within it
                stage.vault.kv[f"old/{number}/app"] = {"password": str(number)}
                wish = wanted("old", f"old/{number}/app", "password")
                assert await node.mount(pod, wish) == {"old": str(number)}
                await asyncio.sleep(1)
                known = node.sessions._shared._engines
                assert 1 <= sum(map(len, known.values())) <= 3


@simulated
async def test_what_is_asked_and_not_told_is_bounded() -> None:
    """Reads below ever other first elements neither keep a thousand questions under way nor are remembered for long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared, "MAX_ASKING", 3)
        patched.setattr(shared, "MAX_UNTOLD", 5)
        async with Stage() as stage:
            node, pod = stage.node(), stage.pod("a")
            stage.vault.policies["app"] += ("hidden",)
            for number in range(20):
                stage.vault.kv[f"hidden{number}/app"] = {"password": str(number)}
            every = [wanted(str(number), f"hidden{number}/app", "password") for number in range(20)]
            reads = node.sessions._shared
            with stage.vault.hold("sys/internal/ui/mounts"):
                await node.mount(pod, *every)
                assert len(reads._asking) == 3
            for one in every:
                await node.mount(pod, one)
                await asyncio.sleep(1)
                assert len(reads._untold) <= 5
            assert not reads._asking
            assert stage.vault.count("sys/internal/ui/mounts") >= 20
