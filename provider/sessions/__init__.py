"""One session a pod and identity: its token, its leases, their renewal, and requests that are joined."""

from provider.sessions.model import LogIn, Read
from provider.sessions.registry import Sessions

__all__ = ["LogIn", "Read", "Sessions"]
