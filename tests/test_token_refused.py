"""Tokens that Vault does not renew though it knows them: an auth method that cannot look at the pod's own just now."""

from __future__ import annotations

import asyncio

from tests.stand.simnode import Stage, credential
from tests.stand.simtime import simulated

RENEWAL = "auth/token/renew-self"
WORDS = "failed to renew entry: failed to validate token: permission denied"
MINUTE = 60.0
HOUR = 3600.0
TTL = HOUR
"""Of the stage's tokens, in seconds."""


@simulated
async def test_token_that_is_not_renewed_for_a_while_lives_on() -> None:
    """Refused with 403 for ten minutes, from before its renewal until after: then renewed, and nothing issued anew."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"].ttl = TTL
        first = await node.mount(pod, *credential())
        await node.remount(35 * MINUTE, pod, *credential())
        stage.vault.breaks(RENEWAL, 403, WORDS)
        await node.remount(10 * MINUTE, pod, *credential())
        stage.vault.mend()
        await node.remount(2 * HOUR, pod, *credential())
        assert node.files[pod.uid, "/volume"] == first
        assert stage.vault.lease_of(first["user"]).ends > stage.world.now()
        assert (stage.vault.logins, stage.vault.issued) == (1, 1)


@simulated
async def test_token_that_is_never_renewed_is_replaced_before_its_end() -> None:
    """Refused with 403 for good: a re-mount before the token's end brings a credential under another one."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"].ttl = TTL
        first = await node.mount(pod, *credential())
        old = stage.vault.lease_of(first["user"])
        stage.vault.breaks(RENEWAL, 403, WORDS)
        await node.remount(TTL + MINUTE, pod, *credential())
        replaced = [at for at, files in node.written[pod.uid, "/volume"] if files != first]
        assert replaced
        assert replaced[0] < old.ends
        assert (stage.vault.logins, stage.vault.issued) == (2, 2)


@simulated
async def test_token_that_was_not_renewed_is_revoked_at_the_end_of_its_pod() -> None:
    """As for a pod that is gone, whose own token is worth nothing any more: what it was given does not stay behind."""
    async with Stage() as stage:
        node, pod = stage.node(), stage.pod("a")
        stage.vault.roles["app"].ttl = TTL
        await node.mount(pod, *credential())
        await asyncio.sleep(30 * MINUTE)
        stage.vault.breaks(RENEWAL, 403, WORDS)
        await asyncio.sleep(15 * MINUTE)
        stage.remove(pod)
        await asyncio.sleep(5 * MINUTE)
        assert stage.vault.live_tokens() == []
        assert stage.vault.count("auth/token/revoke-self") == 1
