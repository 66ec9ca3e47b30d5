"""The list of addresses that a class may name: what it allows, and every way past it that is known."""

from __future__ import annotations

import contextlib
import string
from urllib.parse import urlsplit

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.settings import Settings, TlsSettings
from provider.spc.addresses import AddressPattern, AllowedAddresses, remedy

OWN = "https://vault.example.com:8200"


def allowed(*patterns: str, own: str = OWN) -> AllowedAddresses:
    """The list of these patterns, in the hardened mode."""
    return AllowedAddresses(Settings(hardened=True, vault_addr=own, allowed_vault_addresses=patterns))


def test_the_bare_daemon_is_as_open_as_the_go_providers() -> None:
    """Without a list and without --hardened every address is allowed, and none but the daemon's own is named."""
    bare = AllowedAddresses(Settings(vault_addr=OWN))
    assert bare.open
    assert bare.allows("http://evil.example:1")
    assert not bare.names("http://evil.example:1")
    assert bare.names(OWN)


def test_a_list_closes_the_bare_daemon_too() -> None:
    """Whoever gives a list means it, hardened or not."""
    listed = AllowedAddresses(Settings(vault_addr=OWN, allowed_vault_addresses=("*.example.com",)))
    assert not listed.open
    assert listed.allows("https://other.example.com:8200")
    assert not listed.allows("https://evil.example:8200")


def test_hardened_without_a_list_leaves_the_daemons_own_address() -> None:
    """--hardened alone allows the address that the operator's flag or environment names, and what lies below it."""
    hardened = allowed()
    assert hardened.allows(OWN)
    assert hardened.allows(f"{OWN}/v1/secret/data/a%20b?version=3")
    assert not hardened.allows("https://vault.example.com:8201")
    assert not hardened.allows("http://vault.example.com:8200")
    assert not hardened.allows("https://evil.example:8200")


@pytest.mark.parametrize("own", ["http://vault:8200", "unix:///run/vault.sock", "https://väult.example"])
def test_the_daemons_own_address_is_always_allowed(own: str) -> None:
    """Even by http, by a socket, or by a name that the list would not take: it is the operator's word."""
    assert allowed(own=own).allows(own)
    assert allowed(own=own).names(own)


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("https://vault.example.com", "https://vault.example.com"),
        ("https://vault.example.com", "https://vault.example.com:443"),
        ("https://vault.example.com:443", "https://vault.example.com/"),
        ("https://vault.example.com:8200", "HTTPS://Vault.Example.COM:8200"),
        ("https://vault.example.com:8200", "https://vault.example.com:08200"),
        ("https://vault.example.com.", "https://vault.example.com"),
        ("https://vault.example.com", "https://vault.example.com."),
        ("https://gate.example/vault", "https://gate.example/vault"),
        ("https://gate.example/vault/", "https://gate.example/vault/v1/sys/health"),
        ("http://vault:8200", "http://vault:8200"),
        ("http://*.example.com:8200", "http://a.example.com:8200"),
        ("vault.example.com", "https://vault.example.com:8200"),
        ("vault.example.com:8200", "https://vault.example.com:8200"),
        ("vault.example.com:*", "https://vault.example.com:1"),
        ("https://vault.example.com:*", "https://vault.example.com:1"),
        ("*.example.com", "https://a.example.com"),
        ("*.example.com", "https://b.a.example.com:8200/path"),
        ("*", "https://evil.example:8200"),
        ("*:8200", "https://10.0.0.1:8200"),
        ("10.0.0.1", "https://10.0.0.1:8200"),
        ("[2001:DB8::1]:8200", "https://[2001:db8:0:0::1]:8200"),
        ("https://[::1]", "https://[0:0:0:0:0:0:0:1]"),
        ("xn--vult-loa.example", "https://xn--vult-loa.example"),
        ("unix:///run/vault.sock", "unix:///run/vault.sock"),
        ("unix:///run/vault.sock/", "unix:///run/vault.sock"),
    ],
)
def test_what_an_entry_allows(pattern: str, url: str) -> None:
    """A URL is that server and what lies below its path; a host is reached by https, at any port unless it has one."""
    assert allowed(pattern).allows(url)


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        # another scheme or port
        ("vault.other.com", "http://vault.other.com"),
        ("*", "http://evil.example"),
        ("*", "unix:///run/containerd/containerd.sock"),
        ("http://vault:8200", "https://vault:8200"),
        ("https://vault.other.com", "https://vault.other.com:8200"),
        ("*.other.com:8200", "https://a.other.com:8201"),
        ("vault.other.com:*", "https://vault.other.com:0"),
        ("vault.other.com:*", "https://vault.other.com:65536"),
        ("vault.other.com:*", "https://vault.other.com:"),
        ("vault.other.com:*", "https://vault.other.com:٤٤٣"),
        # another host that looks like it
        ("*.other.com", "https://other.com"),
        ("*.other.com", "https://evilother.com"),
        ("*.other.com", "https://a.other.com.evil.example"),
        ("*.other.com", "https://.other.com"),
        ("*.other.com", "https://a..other.com"),
        ("vault.other.com", "https://vault.other.com.evil.example"),
        ("vault.other.com", "https://vault.other.com.."),
        ("vault.other.com", "https://v\u0430ult.other.com"),  # a Cyrillic letter
        ("vault.other.com", "https://vault。other。com"),  # full stops that IDNA folds
        ("vault.other.com", "https://\uff56ault.other.com"),  # a full-width letter that IDNA folds
        ("vault.other.com", "https://vault%2eother.com"),
        ("vault.other.com", "https://vault.other.com%00.evil.example"),
        ("vault.other.com", "https://vault.other.com\\.evil.example"),
        ("vault.other.com", "https://evil.example\\@vault.other.com"),
        # a user
        ("vault.other.com", "https://vault.other.com@evil.example"),
        ("vault.other.com", "https://user:pass@vault.other.com"),
        ("vault.other.com", "https://vault.other.com:443@evil.example"),
        ("vault.other.com", "https://evil.example#@vault.other.com"),
        ("vault.other.com", "https://evil.example?@vault.other.com"),
        # another path
        ("https://gate.example/vault", "https://gate.example/"),
        ("https://gate.example/vault", "https://gate.example/vaulted"),
        ("https://gate.example/vault", "https://gate.example/vault/../other"),
        ("https://gate.example/vault", "https://gate.example/vault/%2e%2e/other"),
        ("https://gate.example/vault", "https://gate.example/vault%2f..%2fother"),
        ("https://gate.example/vault", "https://gate.example/vault/..%5cother"),
        ("https://gate.example/vault", "https://gate.example/vault/..;/other"),
        ("https://gate.example/vault", "https://gate.example/vault/..;x=1/other"),
        ("https://gate.example/vault", "https://gate.example/vault/%2e%2e%3b/other"),
        ("https://gate.example/vault", "https://gate.example/vault;x=1/other"),
        ("https://gate.example/vault", "https://gate.example/vault/a;b"),
        ("https://gate.example/vault", "https://gate.example/vault//other"),
        ("https://gate.example/vault", "https://gate.example//vault"),
        ("https://gate.example", "https://gate.example/..;/other"),
        ("https://gate.example/vault", "https://gate.example/vault\\..\\other"),
        ("https://gate.example", "https://gate.example/v1/ x"),
        ("https://gate.example", "https://gate.example/\r\nHost: evil.example"),
        # IP addresses in other forms
        ("127.0.0.1", "https://127.1"),
        ("127.0.0.1", "https://2130706433"),
        ("127.0.0.1", "https://0x7f000001"),
        ("127.0.0.1", "https://0177.0.0.1"),
        ("127.0.0.1", "https://127.0.0.1."),
        ("*", "https://0x7f.1"),
        ("[::1]", "https://[::1%eth0]"),
        ("[::1]", "https://[::2]"),
        ("10.0.0.1", "https://[::ffff:10.0.0.1]"),
        ("[::1]", "https://[::1].evil.example"),
        # sockets
        ("*.example.com", "https://[::1]"),
        ("*", "https://[1::2::3]"),
        ("unix:///run/vault.sock", "unix:///run/vault.sock.evil"),
        ("unix:///run/vault.sock", "unix:///run/vault.sock/below"),
        ("unix:///run/vault.sock", "unix:///run/../run/vault.sock"),
        ("unix:///run/vault.sock", "unix:///run/%76ault.sock"),
        ("unix:///run/vault.sock", "unix://host/run/vault.sock"),
        ("unix:///run/vault.sock", "https:///run/vault.sock"),
        # none at all
        ("vault.other.com", "vault.other.com"),
        ("vault.other.com", "//vault.other.com"),
        ("vault.other.com", ""),
    ],
)
def test_what_an_entry_does_not_allow(pattern: str, url: str) -> None:
    """Nothing that leads elsewhere passes, and nothing that another program may read as leading elsewhere."""
    assert not allowed(pattern).allows(url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://vault.example.com",
        "https://",
        "https://*example.com",
        "*example.com",
        "**.example.com",
        "a.*.example.com",
        "*.0.0.1",
        "vault.example.com/path",
        "https://user@vault.example.com",
        "https://vault.example.com?x=1",
        "https://vault.example.com/a;b",
        "https://vault.example.com//a",
        "https://vault.example.com#x",
        "https://vault.example.com/a/../b",
        "https://vault.example.com/a%2fb",
        "https://vault.example.com:0",
        "https://vault.example.com:99999",
        "vault.example.com:",
        "väult.example.com",
        "[::1",
        "[::x]",
        "127.1",
        "unix://host/run/vault.sock",
        "unix:///",
        "vault example.com",
    ],
)
def test_an_entry_that_is_none_is_told(text: str) -> None:
    """What cannot be an entry, or has two readings, does not start the daemon: the operator learns how to write."""
    with pytest.raises(ValueError, match="a list, with commas between"):
        AddressPattern.read(text)


def test_a_pattern_names_no_server() -> None:
    """Only URLs name a server: what a pattern happens to match gets nothing that is the operator's own."""
    some = allowed("*.example.com", "https://exact.example.org:8200")
    assert some.allows("https://a.example.com")
    assert not some.names("https://a.example.com")
    assert some.names("https://exact.example.org:8200")
    assert some.names(OWN)


def test_the_operators_certificate_follows_no_redirect_to_what_a_pattern_matches() -> None:
    """Where a redirect leads, it is shown to the servers that the flags name alone; a class's own goes along."""
    operators, own = TlsSettings(client_cert="/op.crt", client_key="/op.key"), TlsSettings(client_cert="/class.crt")
    some = AllowedAddresses(
        Settings(
            vault_addr=OWN,
            tls=operators,
            allowed_vault_addresses=("*.example.com", "https://exact.example.org:8200"),
        )
    )
    assert some.tls_at("https://a.example.com", operators) == TlsSettings()
    assert some.tls_at("https://a.example.com", own) == own
    for named in (OWN, "https://exact.example.org:8200"):
        assert some.tls_at(named, operators) == operators


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example:8200",
        "http://other.example/vault",
        "https://[::2]",
        "unix:///run/other.sock",
        "https://10.0.0.7",
    ],
)
def test_what_a_refusal_advises_does_allow_it(url: str) -> None:
    """The remedy is a flag and its value; with it the address is allowed."""
    assert not allowed().allows(url)
    value = remedy(url).removeprefix("the daemon's --allowed-vault-addresses=").removesuffix(" would allow it")
    assert allowed(value).allows(url)


def test_what_no_flag_can_allow_says_what_to_write() -> None:
    """An address with two readings is in no list; its author is told what to write instead."""
    assert "plain ASCII" in remedy("https://väult.example")


CHARACTERS = string.ascii_letters + string.digits + ".-_%@:/\\?#[]*。\uff41 \t\n\0"
HOSTS = st.lists(st.sampled_from([*CHARACTERS, *["other.com", ".other.com", ":8200"] * 20]), max_size=8).map("".join)


@given(HOSTS)
def test_what_is_allowed_is_read_alike_by_all(rest: str) -> None:
    """Whatever passes a list leads to an allowed host and port for Python's URL reader, by which the connection is
    made, and for one in C, unless it reads no such URL at all."""
    url = f"https://{rest}"
    if allowed("*.other.com", "other.com:8200").allows(url):
        ours = urlsplit(url)
        readings = [(ours.hostname or "", ours.port)]
        with contextlib.suppress(httptools.HttpParserInvalidURLError):
            other = httptools.parse_url(url.encode())
            readings.append((other.host.decode().lower(), other.port))
        for host, told in readings:
            name, port = host.removesuffix("."), told or 443
            assert name.endswith(".other.com") or (name, port) == ("other.com", 8200)


@given(st.sampled_from(["a.other.com", "other.com:8200", "x.y.other.com:1"]), st.text(max_size=12))
def test_text_around_an_allowed_host_does_not_lead_elsewhere(host: str, text: str) -> None:
    """Before the host, behind it and within its path: what is allowed is still that host to the HTTP client."""
    for url in (f"https://{text}{host}", f"https://{host}{text}", f"https://{host}/{text}", f"{text}https://{host}"):
        if allowed("*.other.com", "other.com:8200").allows(url):
            read = urlsplit(url)
            assert read.hostname is not None
            assert read.hostname.removesuffix(".").endswith("other.com")
            assert read.scheme == "https"
