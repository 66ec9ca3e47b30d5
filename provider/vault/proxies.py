"""The proxy on the way to a Vault: the operator's own, or the environment's."""

from __future__ import annotations

import base64
import ipaddress
import os
import ssl
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

from provider.errors import VaultUnavailable
from provider.http import Proxy

PROXY_ADVICE: Final = "check VAULT_PROXY_ADDR, HTTPS_PROXY and NO_PROXY in the provider's environment"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_secure(text: str) -> bool:
    """Whether the proxy of this URL is spoken to over TLS."""
    return text.strip().lower().startswith("https://")


def usable_proxy(text: str, tls: ssl.SSLContext | None) -> Proxy:
    """The proxy of a URL, which may hold a user and a password; as for Go's clients, a missing scheme means ``http``.

    ``tls`` is for one of ``https``, which is never spoken to without. Raises VaultUnavailable for what cannot be a
    proxy.
    """
    text = text.strip()
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        secure = url.scheme == "https"
        if url.scheme not in ("http", "https") or not url.hostname or (secure and tls is None):
            raise ValueError
        port = url.port or (443 if secure else 80)
    except ValueError:
        raise VaultUnavailable(
            "the proxy that VAULT_PROXY_ADDR or the environment names is no http:// or https:// URL", PROXY_ADVICE
        ) from None
    authorization = ""
    if url.username is not None:
        # os.fsencode: a byte of the environment that is no UTF-8 is sent as it is.
        user = b":".join(unquote_to_bytes(os.fsencode(part or "")) for part in (url.username, url.password))
        authorization = "Basic " + base64.b64encode(user).decode()
    return Proxy(url.hostname, port, tls if secure else None, authorization)


def proxy_from_environment(scheme: str, host: str, port: int) -> str:
    """HTTPS_PROXY, HTTP_PROXY and NO_PROXY, else the same in lower case, read as Go's clients do; "" for none.

    NO_PROXY may name networks (10.0.0.0/8) and ports, and this machine itself is never behind a proxy.
    Source: https://pkg.go.dev/golang.org/x/net/http/httpproxy
    """
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return ""
    for entry in _setting("NO_PROXY").lower().split(","):
        if _covers(entry.strip(), host, port, address):
            return ""
    return _setting(f"{scheme.upper()}_PROXY")


def _setting(name: str) -> str:
    return os.environ.get(name) or os.environ.get(name.lower(), "")


def _covers(entry: str, host: str, port: int, address: _Address | None) -> bool:
    """Whether an entry of NO_PROXY stands for this host and port."""
    if entry == "*":
        return True
    name, _, number = entry.rpartition(":")
    if number.isdigit() and (":" not in name or name.endswith("]")) and name:
        if int(number) != port:
            return False
        entry = name
    if address is not None:
        try:
            return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    domain = entry.removeprefix("*")
    return bool(domain) and (host == domain or host.endswith(domain if domain.startswith(".") else f".{domain}"))


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
