"""The composition root: which part is given which, and the order in which they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from provider.clock import SystemClock
from provider.kube import HmacKey, Kubernetes
from provider.mount import Mounter
from provider.render import Renderer
from provider.server import Mounts
from provider.sessions import Sessions, Sweeper
from provider.settings import Settings
from provider.spc import Parser
from provider.telemetry.events import Telemetry
from provider.vault import VaultServers

# What fails in the background for a reason that nobody thought of is tried again, but not in a busy loop.
RESTART_SECONDS: Final = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server needs to answer mounts."""

    parser: Parser
    mounts: Mounts
    telemetry: Telemetry


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Parts]:
    """The parts of a daemon with these settings, working while the context is open."""
    clock = SystemClock()
    telemetry = Telemetry()
    async with contextlib.AsyncExitStack() as stack:
        servers = VaultServers(clock=clock, proxy=settings.vault_proxy_addr, max_connections=settings.max_connections)
        stack.push_async_callback(servers.close)
        kubernetes = Kubernetes(settings.kubeconfig)
        stack.push_async_callback(kubernetes.close)
        key = HmacKey(settings, kubernetes, clock)
        stack.push_async_callback(key.close)
        sessions = Sessions(servers, settings, clock=clock, key=key.get, telemetry=telemetry)
        stack.push_async_callback(sessions.close)
        sweeper = Sweeper(sessions, kubernetes, settings, clock=clock, telemetry=telemetry)
        for name, work in (("renewals", sessions.run), ("sweeps", sweeper.run)):
            stack.push_async_callback(_end, asyncio.create_task(_keep_running(name, work), name=name))
        renderer = Renderer()
        stack.push_async_callback(renderer.close)
        mounts = Mounter(
            servers, sessions, kubernetes, key, renderer, timeout=settings.mount_timeout, telemetry=telemetry
        )
        yield Parts(Parser(settings), mounts, telemetry)


async def _keep_running(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` until it ends by itself, and again where a bug ends it."""
    while True:
        try:
            await work()
        except Exception:
            _logger.exception("%s have stopped on a bug, and start again", name)
            await asyncio.sleep(RESTART_SECONDS)
        else:
            return


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
