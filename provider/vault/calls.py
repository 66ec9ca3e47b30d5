"""hvac's calls that are used. Imported by the first that makes one, or by ``import_calls``, and not with the room.

hvac brings requests and all that is behind it, for an adapter that is not used here: a third of the CPU that the
daemon would take until it listens.
"""

from hvac.api.auth_methods import Kubernetes, Token
from hvac.api.system_backend.lease import Lease

__all__ = ["Kubernetes", "Lease", "Token"]
