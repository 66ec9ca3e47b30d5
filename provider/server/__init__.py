"""The gRPC side: the socket that the driver dials, and the two calls it makes. The only room that imports grpc."""

from provider.server.endpoint import Endpoint
from provider.server.limits import PodLimits
from provider.server.server import Server
from provider.server.service import Mounts, Service

__all__ = ["Endpoint", "Mounts", "PodLimits", "Server", "Service"]
