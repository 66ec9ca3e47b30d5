"""The composition root: which part is given which, and the order in which they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from provider.cli import process
from provider.clock import SystemClock
from provider.kube import HmacKey, Kubernetes
from provider.mount import Mounter
from provider.render import Renderer
from provider.server import Mounts
from provider.sessions import Sessions, Sweeper
from provider.settings import Settings
from provider.spc import Parser, VaultServer
from provider.spc.addresses import AllowedAddresses
from provider.telemetry.events import Event, Telemetry
from provider.telemetry.http import Page
from provider.telemetry.lines import LineWriter
from provider.telemetry.metrics import Metrics
from provider.telemetry.status import Status
from provider.telemetry.volumes import Volumes
from provider.vault import VaultServers, import_calls

# What fails in the background for a reason that nobody thought of is tried again, but not in a busy loop.
RESTART_SECONDS: Final = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server needs to answer mounts, and what else the daemon tells."""

    parser: Parser
    mounts: Mounts
    telemetry: Telemetry
    # What is served beside the health pages, by path; the metrics have a place of their own.
    pages: Mapping[str, Page] = field(default_factory=dict)
    metrics: Page | None = None
    # Imports what a mount needs and listening does not. Called in a thread once the daemon listens; a mount that comes
    # earlier imports it by itself.
    preload: Callable[[], None] = lambda: None


@contextlib.asynccontextmanager
async def build(settings: Settings, *, stderr: LineWriter) -> AsyncIterator[Parts]:
    """The parts of a daemon with these settings, working while the context is open. ``stderr`` writes lines there."""
    clock = SystemClock()
    telemetry = Telemetry()
    volumes = Volumes(clock)
    async with contextlib.AsyncExitStack() as stack:
        if settings.audit_log != "off":
            # Before the parts, so that it ends after them and tells how they ended.
            _audit(settings, telemetry, volumes, stderr, stack)
        servers = VaultServers(
            clock=clock,
            proxy=settings.vault_proxy_addr,
            max_connections=settings.max_connections,
            telemetry=telemetry,
            allowed=AllowedAddresses(settings),
            own=VaultServer(settings.vault_addr, "", settings.tls),
            descriptors=process.descriptors(),
        )
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
        renderer = Renderer(telemetry)
        stack.push_async_callback(renderer.close)
        mounts = Mounter(
            servers, sessions, kubernetes, key, renderer, timeout=settings.mount_timeout, telemetry=telemetry
        )
        metrics = None
        if settings.metrics_addr != "off":
            metrics = Metrics(
                volumes,
                sessions.views,
                lambda: stderr.refused,
                clock,
                address=settings.vault_addr,
                auth_mount=settings.vault_mount,
            )
            metrics.listen(telemetry)
        # After all who ask what a mount changed.
        volumes.listen(telemetry)
        status = Status(sessions.views, volumes, clock, node=settings.node_name)
        yield Parts(
            Parser(settings),
            mounts,
            telemetry,
            status.pages,
            metrics.page if metrics is not None else None,
            preload=import_calls,
        )


def _audit(
    settings: Settings,
    telemetry: Telemetry,
    volumes: Volumes,
    stderr: LineWriter,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Write the audit log from now on; it ends, and its file is closed, with ``stack``."""
    # A daemon without one does not pay for it.
    from provider.telemetry.audit import Audit, AuditFile, Put

    loop = asyncio.get_running_loop()

    def record(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the telling
            loop.call_soon_threadsafe(telemetry.record, event)

    put: Put = stderr.put
    if settings.audit_log != "stderr":
        put = stack.enter_context(AuditFile(settings.audit_log, record)).put
    audit = Audit(put, volumes, telemetry.record, node=settings.node_name)
    audit.begin()
    audit.listen(telemetry)
    stack.callback(audit.end)


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
