"""Which addresses of Vault a class may name, and a redirect may lead to: those that the operator's flags name.

A text that is read in two ways is how such lists are passed by, so only what has one reading is ever allowed: hosts of
plain ASCII, numbers of IP addresses in their usual form, no user, no escapes in the host, no dots in the path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from provider.settings import Settings, TlsSettings
from provider.spc import paths
from provider.spc.findings import Refused

ALLOWED: Final = (
    "a list, with commas between, of URLs (https://vault.example.com:8200, unix:///run/vault.sock) and of hosts "
    "reached by https (vault.example.com, *.example.com, 10.0.0.1:8200, * for all)"
)

_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
# DNS allows 253 characters of a name.
_MAX_HOST: Final = 253
_PLACE: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,254})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#\\]*)?(?:\?[^#]*)?",
    re.ASCII | re.IGNORECASE,
)
_PATTERN: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\*|(?:\*\.)?[a-z0-9_.-]{1,254}|\[[0-9a-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}|\*))?(?P<path>/[^?#\\]*)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a URL leads: ``host`` in its one form, ``path`` without a slash at its end. A socket has its path alone."""

    scheme: str
    host: str
    port: int
    path: str


@dataclass(frozen=True, slots=True)
class AddressPattern:
    """What one entry of the list allows. ``host`` is one host, ``*.`` and a domain, or ``*``; ``port`` None is any."""

    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def read(cls, text: str) -> AddressPattern:
        """The pattern that ``text`` is. Raises ValueError with a sentence of what is allowed.

        A host without a scheme is reached by https, at any port unless it has one; a URL without a port has its
        scheme's, as everywhere.
        """
        if text.startswith("unix:"):
            place = _place(text)
            if place is None:
                raise ValueError(ALLOWED)
            return cls(place.scheme, place.host, place.port, place.path)
        found = _PATTERN.fullmatch(text)
        path = (found["path"] or "") if found else ""
        if found is None or (path and not found["scheme"]) or not _is_plain(path) or _has_ways_out(path):
            raise ValueError(ALLOWED)
        scheme = (found["scheme"] or "https").lower()
        wildcard, name = _wildcard(found["host"])
        host = _host(name) if name else ""
        if host is None or (wildcard and name and _is_ip(host)):
            raise ValueError(ALLOWED)
        port: int | None = None
        if found["port"] not in (None, "*"):
            port = int(found["port"])
            if not 1 <= port <= 65535:
                raise ValueError(ALLOWED)
        elif found["port"] is None and found["scheme"]:
            port = _DEFAULT_PORTS[scheme]
        return cls(scheme, wildcard + host, port, path.rstrip("/"))

    @property
    def exact(self) -> bool:
        """Whether it names one server, and not whichever one a domain or a port has."""
        return "*" not in self.host and self.port is not None

    def matches(self, place: _Place) -> bool:
        """Whether the place is one of these: what lies below a path is in it."""
        if self.scheme == "unix" or place.scheme == "unix":
            return (self.scheme, self.path) == (place.scheme, place.path)
        if self.host != "*" and self.host != place.host:
            # The dot before the domain is part of what has to be there: evil-example.com is not of example.com.
            domain = self.host.removeprefix("*")
            if domain == self.host or not place.host.endswith(domain):
                return False
        if (self.scheme, self.port or place.port) != (place.scheme, place.port):
            return False
        return not self.path or (_is_plain(place.path) and f"{place.path}/".startswith(f"{self.path}/"))


class AllowedAddresses:
    """The addresses that the operator's settings allow.

    Open, as the Go providers are, where there is neither a list nor the hardened mode. Else the daemon's own address
    and what the list names.
    """

    def __init__(self, settings: Settings) -> None:
        self.open = not (settings.hardened or settings.allowed_vault_addresses)
        own = _place(settings.vault_addr)
        patterns = [AddressPattern.read(text) for text in settings.allowed_vault_addresses]
        if own is not None:
            patterns.append(AddressPattern(own.scheme, own.host, own.port, own.path))
        self._patterns = tuple(patterns)
        self._exact = tuple(pattern for pattern in patterns if pattern.exact)
        # The operator's word for where Vault is stands, even where it has more than one reading.
        self._own = settings.vault_addr.rstrip("/")
        self._client_cert = settings.tls.client_cert

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts that the operator's flags name by themselves, as they stand in a URL but for their case."""
        return frozenset(pattern.host.strip("[]") for pattern in self._exact if pattern.host)

    def allows(self, url: str) -> bool:
        """Whether a class may name this URL, or be led to it; a query counts for nothing."""
        return self.open or self._one_of(self._patterns, url)

    def names(self, url: str) -> bool:
        """Whether this very server is the daemon's own, or one of the list's that is no pattern."""
        return self._one_of(self._exact, url)

    def tls_at(self, url: str, tls: TlsSettings) -> TlsSettings:
        """``tls`` where a redirect leads: without the operator's client certificate unless a flag names that server."""
        if not tls.client_cert or tls.client_cert != self._client_cert or self.names(url):
            return tls
        return tls._replace(client_cert="", client_key="")

    def _one_of(self, patterns: tuple[AddressPattern, ...], url: str) -> bool:
        if url == self._own:
            return True
        place = _place(url)
        return place is not None and any(pattern.matches(place) for pattern in patterns)


def remedy(url: str) -> str:
    """What would have the list allow a URL that it does not, by the flag's name and value."""
    place = _place(url)
    if place is None:
        return "no flag allows it: write host and path in plain ASCII, an international name as xn--..."
    return f"the daemon's --allowed-vault-addresses={_text(place)} would allow it"


def _text(place: _Place) -> str:
    if place.scheme == "unix":
        return f"unix://{place.path}"
    return f"{place.scheme}://{place.host}:{place.port}{place.path}"


def _place(url: str) -> _Place | None:
    """Where ``url`` leads; None where that has more than one reading, or none."""
    if url.startswith("unix:///"):
        path = urlsplit(url).path.rstrip("/")
        plain = url.rstrip("/") == f"unix://{path}" and "%" not in path and "," not in path
        return _Place("unix", "", 0, path) if plain and path and not _has_ways_out(path) else None
    found = _PLACE.fullmatch(url)
    if found is None or _has_ways_out(found["path"] or ""):
        return None
    scheme = found["scheme"].lower()
    port = int(found["port"]) if found["port"] else _DEFAULT_PORTS[scheme]
    host = _host(found["host"])
    if host is None or not 1 <= port <= 65535:
        return None
    return _Place(scheme, host, port, (found["path"] or "").rstrip("/"))


def _wildcard(host: str) -> tuple[str, str]:
    """The ``*`` or ``*.`` of a pattern's host, and the rest of it."""
    for wildcard in ("*.", "*"):
        if host.startswith(wildcard):
            return wildcard, host.removeprefix(wildcard)
    return "", host


def _host(text: str) -> str | None:
    """A host in its one form: lower case, no dot at its end, an IP address as it is usually written. None: is none."""
    host = text.lower()
    if host.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            return None
    name = host.removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # 127.1, 0x7f.1 and 2130706433 are 127.0.0.1 to the C library, and names to others.
        return host if _is_ip(host) else None
    if len(name) > _MAX_HOST or not all(map(_LABEL.fullmatch, labels)):
        return None
    return name


def _is_ip(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _is_plain(path: str) -> bool:
    """Whether all readers find the same elements in it.

    An escape may hide a slash from one and show it to the next; some leave out what follows a semicolon, and some an
    empty element.
    """
    return "%" not in path and ";" not in path and "//" not in path


def _has_ways_out(path: str) -> bool:
    try:
        paths.refuse_dots(path)
    except Refused:
        return True
    # White space ends a request's line, and beyond ASCII two characters may look alike.
    return any(character <= " " or character > "~" for character in path)
