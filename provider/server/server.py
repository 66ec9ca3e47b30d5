"""The gRPC server at its socket: from the first answer to the last."""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from typing import Final

import grpc
import grpc.aio

from provider.clock import SystemClock
from provider.errors import InvalidSetting
from provider.server.endpoint import Endpoint
from provider.server.limits import PodLimits
from provider.server.service import Mounts, Service
from provider.settings import MIB, Settings
from provider.spc import Parser
from provider.telemetry.events import Telemetry
from provider.v1alpha1 import service_pb2, service_pb2_grpc

# Seconds after which a connection is told to go and a client dials anew. So a daemon that was replaced, or that
# stops, is left by all its clients soon, each between two calls; dialling a Unix socket costs next to nothing.
CONNECTION_AGE: Final = 2.0
# gRPC spreads the age by 10 % either way, and the client has to hear of it.
SERVE_ON_FACTOR: Final = 1.25
# Beyond the mount's own limit, for the answer to reach the caller: it is cut off only if something hangs.
GRACE_SECONDS: Final = 5.0
# A client that dialled and says nothing holds gRPC's stop up until gRPC gives its handshake up, after 20 s unless told.
# Less than what is served on for, so that at a stop none is left; nothing is lost, as it has sent no call.
HANDSHAKE_SECONDS: Final = 2.0
# gRPC itself answers RESOURCE_EXHAUSTED to what is larger, which must not leave Mount (docs/contract.md section 1).
# kubelet's call to the driver is at most 4 MiB, a class 1.5 MiB, and JSON makes six bytes of one at worst.
MAX_REQUEST_BYTES: Final = 64 * MIB
# Seconds for the server to answer its own health question over the socket.
ANSWER_SECONDS: Final = 2.0

_logger = logging.getLogger(__name__)


class Server:
    """Serves the driver's calls at ``path``. ``mount_timeout`` and ``connection_age`` are in seconds.

    ``limits`` is what pods may ask for; without it the default.
    """

    def __init__(
        self,
        path: str,
        parser: Parser,
        mounts: Mounts,
        mount_timeout: float,
        telemetry: Telemetry,
        *,
        limits: PodLimits | None = None,
        connection_age: float = CONNECTION_AGE,
    ) -> None:
        self._endpoint = Endpoint(path)
        self._service = Service(
            parser, mounts, mount_timeout, telemetry, limits or PodLimits(Settings(), SystemClock())
        )
        self._connection_age = connection_age
        self._told_lost = False
        self._grace = mount_timeout + GRACE_SECONDS
        self._grpc: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Take the endpoint over, once the server answers. Raises InvalidSetting where that cannot be."""
        self._endpoint.check()
        self._endpoint.clean()
        server = grpc.aio.server(
            options=[
                ("grpc.max_connection_age_ms", int(self._connection_age * 1000)),
                ("grpc.max_connection_age_grace_ms", int(self._grace * 1000)),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ]
        )
        server.add_generic_rpc_handlers((self._service.handler(),))
        try:
            with self._endpoint.private():
                server.add_insecure_port(_target(self._endpoint.bind_path))
        except RuntimeError as error:
            raise InvalidSetting(
                f"no socket can be bound at {self._endpoint.bind_path}",
                "look at the directory's permissions, its file system and the space left",
            ) from error
        await server.start()
        try:
            self._endpoint.publish()
        except InvalidSetting:
            await server.stop(None)
            raise
        self._grpc = server
        _logger.info("mounts are served", extra={"endpoint": self._endpoint.path})

    async def answers(self) -> bool:
        """Whether a driver that dials the endpoint now is answered by this server."""
        if not self._endpoint.is_ours():
            return False
        # A connection of its own: an old one would still answer after the path was taken away.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost")]
        async with grpc.aio.insecure_channel(_target(self._endpoint.path), options) as channel:
            call = service_pb2_grpc.CSIDriverProviderStub(channel).Version
            try:
                await call(service_pb2.VersionRequest(version="v1alpha1"), timeout=ANSWER_SECONDS)
            except grpc.aio.AioRpcError:
                return False
        return self._endpoint.is_ours()

    def is_lost(self) -> bool:
        """Whether no driver finds this server any more, nor another: the socket was removed, and not by us."""
        lost = self._endpoint.is_lost()
        if lost and not self._told_lost:
            _logger.error(
                "the socket is gone, so no mount can come; kubelet restarts the daemon once /health/live tells it so: "
                "look who removes it, as another provider of the same name does when it ends",
                extra={"endpoint": self._endpoint.path},
            )
        self._told_lost = lost
        return lost

    async def stop(self) -> None:
        """Leave the endpoint, and return when the last call is answered. No caller is cut off.

        Calls go on arriving over the connections that exist, so they are served until those have aged; gRPC's own
        stop cancels a call that arrives in the same moment.
        """
        removed = self._endpoint.withdraw()
        _logger.info("stopping", extra={"endpoint": self._endpoint.path, "taken_over": not removed})
        if self._grpc is not None:
            await asyncio.sleep(self._connection_age * SERVE_ON_FACTOR)
            await self._grpc.stop(self._grace)
        self._service.close()


def _target(path: str) -> str:
    """gRPC's name of a socket path: a URI, so what has a meaning there is escaped."""
    return f"unix:{urllib.parse.quote(path)}"
