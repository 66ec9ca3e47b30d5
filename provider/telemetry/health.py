"""The health endpoint: plain HTTP for kubelet's probes, with the Go provider's paths."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from aiohttp import web

# Seconds between attempts at a port that is taken: as long as the daemon that this one replaces still runs.
RETRY_SECONDS: Final = 3.0

_logger = logging.getLogger(__name__)


class Health:
    """Serves ``/health/live`` (200 while the event loop runs) and ``/health/ready`` (200 while mounts can come).

    ``ready`` is asked at each probe; probes that come together share one question. A port that is taken is an
    error in the log and tried again every few seconds: mounts do not wait for it, since with the host's network two
    daemons overlap in a rolling update.
    """

    def __init__(self, address: tuple[str, int], ready: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        self._host, self._port = address
        self._ready = ready
        self._asking: asyncio.Task[bool] | None = None
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Health:
        self._serving = asyncio.create_task(self._serve(), name="health")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._serving, self._asking):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _serve(self) -> None:
        app = web.Application()
        app.add_routes([web.get("/health/live", self._answer_live), web.get("/health/ready", self._answer_ready)])
        # No access log: two probes every few seconds tell nothing. No waiting for kept-alive connections at the end.
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await self._listen(runner)
            await asyncio.get_running_loop().create_future()
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> None:
        while True:
            site = web.TCPSite(runner, self._host or None, self._port)
            try:
                await site.start()
            except OSError as error:
                _logger.error(  # noqa: TRY400  # the place of this error is known
                    "the health port cannot be opened; mounts are served, probes are not: free the port, or choose"
                    " another with --health-addr",
                    extra={"address": f"{self._host}:{self._port}", "error": error.strerror or str(error)},
                )
                await site.stop()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                _logger.info("health is served", extra={"address": f"{self._host}:{self._port}"})
                return

    async def _answer_live(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _answer_ready(self, request: web.Request) -> web.Response:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ready(), name="ready")
        # Shielded: a probe that gives up takes the answer from nobody else.
        if await asyncio.shield(self._asking):
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the socket does not answer mounts\n")
