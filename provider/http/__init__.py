"""HTTP/1.1 over connections that are kept alive, to the servers that the daemon asks: Vault and the Kubernetes API.

llhttp, which is Node's parser, reads what they answer (httptools); the rest is here, in bounds that a hostile server
cannot leave. docs/decisions/http-client.md says why it is not a library.
"""

from provider.http.allowance import Allowance
from provider.http.connection import Response
from provider.http.failures import ConnectFailed, ExchangeBroken, HttpFailure, LookupFailed, ProxyFailed, TlsFailed
from provider.http.lookups import Lookups
from provider.http.pool import Origin, Pool, Proxy

__all__ = [
    "Allowance",
    "ConnectFailed",
    "ExchangeBroken",
    "HttpFailure",
    "LookupFailed",
    "Lookups",
    "Origin",
    "Pool",
    "Proxy",
    "ProxyFailed",
    "Response",
    "TlsFailed",
]
