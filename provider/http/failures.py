"""How a request can fail. Each text is one safe line: nothing of what was sent, and of what came only the reasons of
TLS and of a proxy.
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from provider.redact import one_line

MAX_REASON: Final = 200
"""Characters of a reason."""


class HttpFailure(Exception):
    """No answer to a request; the text says why."""


class NotConnected(HttpFailure):
    """No connection came about, so nothing of the request was sent."""


class LookupFailed(NotConnected):
    """The host's name cannot be looked up."""


class ConnectFailed(NotConnected):
    """The server, or where there is a proxy what it leads to, takes no connection."""


class ProxyFailed(NotConnected):
    """The proxy takes no connection, or does not lead on."""


class TlsFailed(HttpFailure):
    """The two cannot agree on TLS. Under TLS 1.3 a server may say so only after the request was sent."""


class ExchangeBroken(HttpFailure):
    """The request went out, or a part of it; the answer did not come, or not whole, or is none of HTTP."""


def reason(error: BaseException) -> str:
    """An error of a socket or of TLS in a few words, the same from every event loop."""
    if isinstance(error, ssl.SSLError):
        said = getattr(error, "verify_message", "") or error.strerror or str(error)
    elif isinstance(error, ConnectionError) and error.errno:
        said = os.strerror(error.errno)
    else:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(str(said), MAX_REASON)
