"""The health pages, for kubelet's probes, with the Go provider's paths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from provider.telemetry.http import Answer, Page, Request


class Health:
    """``/health/live`` (200 while a new start would mend nothing) and ``/health/ready`` (200 while mounts can come).

    ``ready`` is asked at each probe, and probes that come together share one question; ``lost`` is whether the socket
    was taken away, which the daemon does not mend by itself.
    """

    def __init__(self, ready: Callable[[], Coroutine[Any, Any, bool]], lost: Callable[[], bool]) -> None:
        self._ready = ready
        self._lost = lost
        self._asking: asyncio.Task[bool] | None = None

    @property
    def pages(self) -> Mapping[str, Page]:
        """The pages by their paths."""
        return {"/health/live": self._answer_live, "/health/ready": self._answer_ready}

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _answer_live(self, request: Request) -> Answer:
        if self._lost():
            return Answer(b"the socket is gone\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return Answer(b"ok\n")

    async def _answer_ready(self, request: Request) -> Answer:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ready(), name="ready")
        # Shielded: a probe that gives up takes the answer from nobody else.
        if await asyncio.shield(self._asking):
            return Answer(b"ok\n")
        return Answer(b"the socket does not answer mounts\n", HTTPStatus.SERVICE_UNAVAILABLE)
