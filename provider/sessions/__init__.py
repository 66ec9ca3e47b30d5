"""One session a pod and identity: its token, its leases, their renewal, and requests that are joined."""

from provider.sessions.model import Fetched, LogIn, Read
from provider.sessions.registry import Sessions
from provider.sessions.sweep import Sweeper

__all__ = ["Fetched", "LogIn", "Read", "Sessions", "Sweeper"]
