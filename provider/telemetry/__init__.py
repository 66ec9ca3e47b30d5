"""What the daemon tells about itself: its log on stderr, and its health over HTTP. A leaf that others call.

``provider.telemetry.health`` is imported by itself, as it brings an HTTP server that ``--help`` has no use for.
"""

from provider.telemetry.log import LEVELS, Log

__all__ = ["LEVELS", "Log"]
