"""What the daemon tells about itself: its log; events, and metrics, audit log and status that are made of them; health.

The log alone is imported with the room: the other modules bring what ``--help`` has no use for.
"""

from provider.telemetry.log import LEVELS, Log

__all__ = ["LEVELS", "Log"]
