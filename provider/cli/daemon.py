"""From the command line to the exit code.

gRPC, uvloop and the parts are imported when the daemon is going to serve: ``--help`` needs none of them, gRPC's C
core reads its environment as it is imported, and whatever fails on the way is to be told in one line.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Final, Literal

from provider import __version__
from provider.cli.command import parse, unread
from provider.cli.flags import PROGRAM
from provider.cli.readers import split_listen_address
from provider.errors import InvalidSetting, ProviderError
from provider.redact import one_line
from provider.settings import Settings
from provider.telemetry import LEVELS, Log

if TYPE_CHECKING:
    from provider.cli.parts import Parts
    from provider.telemetry.http import HttpServer, Page

    Build = Callable[[Settings], AbstractAsyncContextManager[Parts]]

METRICS_PATH: Final = "/metrics"
# As Go's flag package ends.
EXIT_USAGE: Final = 2
# Above "off": why a daemon ends is told even when nothing else is.
_LAST_WORDS: Final = LEVELS["off"]

# A node of 250 pods has some 200 calls of the driver meanwhile, and a thousand objects of theirs to collect.
COLLECT_SECONDS: Final = 60.0

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None, build: Build | None) -> int:
    """See ``provider.cli.main``."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments, os.environ, version_text)
    except InvalidSetting as error:
        print(f"{PROGRAM}: {one_line(str(error), 1000)}", file=sys.stderr)
        return EXIT_USAGE
    if command.status is not None:
        from provider.cli import status

        return status.run(command.status)
    if command.settings is None:
        sys.stdout.write(command.text)
        return 0
    settings = command.settings
    # A signal may come while the parts are imported. It is only noted: an exception raised by a handler is lost where
    # it hits a finalizer, and without any handler process 1 of a container is not told of signals at all.
    told_to_stop = asyncio.Event()
    for number in _SIGNALS:
        signal.signal(number, lambda *_: told_to_stop.set())
    style: Literal["json", "text"] = "text" if settings.log_format == "text" else "json"
    with Log(settings.log_level, style) as log:
        try:
            _serve(settings, build, log, told_to_stop)
        except ProviderError as error:
            _logger.log(_LAST_WORDS, "cannot serve: %s", error)
            return 1
        except Exception as error:  # whatever it is, it ends in one line and not in a traceback
            _logger.log(_LAST_WORDS, "cannot serve: %s: %s", type(error).__name__, error, exc_info=True)
            return 1
    return 0


def version_text(style: str) -> str:
    """What ``--version`` prints, as "text" or "json"."""
    if style == "json":
        told = {"name": PROGRAM, "version": __version__, "python": platform.python_version()}
        return json.dumps(told) + "\n"
    return f"{PROGRAM} {__version__} (Python {platform.python_version()})\n"


def _serve(settings: Settings, build: Build | None, log: Log, told_to_stop: asyncio.Event) -> None:
    # gRPC's C core writes plain text to stderr, between the lines of JSON, unless told so before it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import uvloop

    from provider.cli import parts, process

    process.keep_memory_private()
    process.raise_descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings, build or functools.partial(parts.build, stderr=log.lines), told_to_stop))


def _settle_memory() -> None:
    """Let the garbage collector be: what the imports made stays for good, and of a mount only gRPC's part has cycles.

    Measured on a node's boot: 5 to 10 % of its CPU went into looking through objects that live on, and still 5 % where
    20,000 new ones had it look, which a boot's thousand reads in flight are many times. Nothing is collected first:
    that takes a tenth of a start's CPU, and memory shows no difference.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()


async def _collect_garbage() -> None:
    """Collect what gRPC leaves of each call: five objects in a cycle, up to 5 MiB at the collector's own threshold."""
    while True:
        await asyncio.sleep(COLLECT_SECONDS)
        gc.collect(0)  # the youngest alone: what lives on is not looked through again


async def _run(settings: Settings, build: Build, told_to_stop: asyncio.Event) -> None:
    """Serve until a signal comes, and then until the last caller has its answer."""
    from provider.cli import guardrails
    from provider.clock import SystemClock
    from provider.server import PodLimits, Server
    from provider.telemetry.health import Health

    loop = asyncio.get_running_loop()
    Log.watch(loop)
    for number in _SIGNALS:
        loop.add_signal_handler(number, told_to_stop.set)
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(build(settings))
        limits = PodLimits(settings, SystemClock())
        server = Server(
            settings.endpoint, parts.parser, parts.mounts, settings.mount_timeout, parts.telemetry, limits=limits
        )
        # Health comes first and goes last: a probe is told "not ready" at both ends.
        health = Health(server.answers, server.is_lost)
        stack.push_async_callback(health.close)
        for http in _http_servers(settings, {**health.pages, **parts.pages}, parts.metrics):
            await stack.enter_async_context(http)
        if not told_to_stop.is_set():
            await server.start()
            guardrails.tell(settings)
            for told in unread(os.environ):
                _logger.warning("%s", told)
            await asyncio.to_thread(parts.preload)
            await asyncio.to_thread(guardrails.try_files, settings)
            _settle_memory()
            collecting = asyncio.create_task(_collect_garbage())
            stack.callback(collecting.cancel)
            await told_to_stop.wait()
            await server.stop()
    _logger.info("stopped")


def _http_servers(settings: Settings, pages: Mapping[str, Page], metrics: Page | None) -> Iterator[HttpServer]:
    """What serves the health address, and the metrics' where they have one of their own."""
    from provider.telemetry.http import HttpServer

    own = settings.metrics_addr not in ("", settings.health_addr)
    health = split_listen_address(settings.health_addr)
    if health is not None:
        if metrics is not None and not own:
            pages = {**pages, METRICS_PATH: metrics}
        yield HttpServer(health, pages, name="health", flag="--health-addr")
    if metrics is not None and own:
        address = split_listen_address(settings.metrics_addr)
        if address is not None:
            yield HttpServer(address, {METRICS_PATH: metrics}, name=METRICS_PATH, flag="--metrics-addr")
