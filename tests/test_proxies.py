"""Which proxy stands before a Vault, and what is known of it. tests/test_tls.py has the ways through them."""

from __future__ import annotations

import base64
import ssl

import pytest

from provider.errors import VaultUnavailable
from provider.vault.proxies import is_secure, proxy_from_environment, usable_proxy

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of whoever runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@pytest.mark.parametrize(
    ("text", "host", "port", "secure"),
    [
        ("http://p.test:3128", "p.test", 3128, False),
        ("http://p.test", "p.test", 80, False),
        ("p.test:3128", "p.test", 3128, False),
        ("127.0.0.1", "127.0.0.1", 80, False),
        ("https://p.test", "p.test", 443, True),
        ("HTTPS://P.test:8443/path?query", "p.test", 8443, True),
        ("http://[fe80::1]:3128", "fe80::1", 3128, False),
        (" https://p.test \n", "p.test", 443, True),
    ],
)
def test_place(text: str, host: str, port: int, secure: bool, tls: ssl.SSLContext) -> None:
    """Host, port and TLS of a proxy's URL; as for Go's clients, a missing scheme is http."""
    found = usable_proxy(text, tls)
    assert (found.host, found.port, found.tls) == (host, port, tls if secure else None)
    assert found.authorization == ""
    assert is_secure(text) is secure


@pytest.mark.parametrize(
    ("user", "sent"),
    [
        ("u:p", b"u:p"),
        ("u", b"u:"),
        (":p", b":p"),
        ("u%40corp:p%3Aq%2F%25", b"u@corp:p:q/%"),
        ("u:p@q", b"u:p@q"),
        ("u:%FF%0D%0A", b"u:\xff\r\n"),
        ("ü:\udcff", "ü".encode() + b":\xff"),
    ],
)
def test_user_and_password(user: str, sent: bytes) -> None:
    """User and password go out byte for byte as the URL has them, and are not shown."""
    found = usable_proxy(f"http://{user}@p.test", None)
    assert found.host == "p.test"
    kind, _, text = found.authorization.partition(" ")
    assert (kind, base64.b64decode(text)) == ("Basic", sent)
    assert text not in repr(found)


@pytest.mark.parametrize(
    "text",
    [
        "socks5://p.test",
        "http://",
        "https://",
        "http://[",
        "http://[::1",
        "http://p:port",
        "http://p:99999",
        "://",
        ":",
    ],
)
def test_no_proxy_at_all(text: str, tls: ssl.SSLContext) -> None:
    """What is no URL of a proxy is told, without the URL."""
    with pytest.raises(VaultUnavailable, match=r"is no http:// or https:// URL") as told:
        usable_proxy(f"{text}canary" if text.startswith("socks") else text, tls)
    assert "canary" not in str(told.value)
    assert told.value.__cause__ is None


def test_never_in_the_clear() -> None:
    """A proxy of https is not spoken to without TLS, whatever was overlooked before: its password would show."""
    with pytest.raises(VaultUnavailable):
        usable_proxy("https://u:p@p.test", None)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scheme has its own variable; upper case counts before lower, as for Go's clients; ALL_PROXY does not."""
    monkeypatch.setenv("ALL_PROXY", "http://all")
    assert proxy_from_environment("http", "v.test", 80) == ""
    monkeypatch.setenv("http_proxy", "http://plain-lower")
    monkeypatch.setenv("https_proxy", "http://secure-lower")
    assert proxy_from_environment("http", "v.test", 80) == "http://plain-lower"
    assert proxy_from_environment("https", "v.test", 443) == "http://secure-lower"
    monkeypatch.setenv("HTTP_PROXY", "http://plain")
    monkeypatch.setenv("HTTPS_PROXY", "")
    assert proxy_from_environment("http", "v.test", 80) == "http://plain"
    assert proxy_from_environment("https", "v.test", 443) == "http://secure-lower"


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize(
    ("host", "port", "entries", "covered"),
    [
        ("v.test", 80, "v.test", True),
        ("a.v.test", 80, "v.test", True),
        ("av.test", 80, "v.test", False),
        ("v.test", 80, ".v.test", False),
        ("a.v.test", 80, ".v.test", True),
        ("a.v.test", 80, "*.v.test", True),
        ("v.test", 80, "*.v.test", False),
        ("v.test", 80, " other , V.TEST ", True),
        ("v.test", 80, "v.test:80", True),
        ("v.test", 80, "v.test:81", False),
        ("v.test", 80, "*", True),
        ("v.test", 80, "", False),
        ("v.test", 80, ",,", False),
        ("v.test", 80, ":80", False),
        ("10.1.2.3", 80, "10.0.0.0/8", True),
        ("10.1.2.3", 80, "10.1.2.4/30", False),
        ("10.1.2.3", 80, "10.1.2.3:81", False),
        ("10.1.2.3", 80, "10.1.2.3:80", True),
        ("10.1.2.3", 80, "2.3", False),
        ("fd00::1", 80, "fd00::/8", True),
        ("fd00::1", 80, "[fd00::1]", True),
        ("fd00::1", 80, "[fd00::1]:80", True),
        ("fd00::1", 80, "[fd00::1]:81", False),
        ("fd00::1", 80, "fd00::1", True),
        ("fd00::1", 80, "10.0.0.0/8", False),
        ("localhost", 80, "", True),
        ("127.9.9.9", 80, "", True),
        ("::1", 80, "", True),
    ],
)
def test_exceptions(
    name: str, host: str, port: int, entries: str, covered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_PROXY names hosts with what is under them, addresses, networks and ports; loopback is never behind a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://p.test")
    monkeypatch.setenv(name, entries)
    assert proxy_from_environment("http", host, port) == ("" if covered else "http://p.test")
