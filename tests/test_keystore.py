"""PEM and PKCS#12 of certificates: what other readers make of them, and that they stay the same."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provider.render import pki
from provider.render.keystore import _integer, _sequence, pkcs12
from provider.sandbox.quoting import pem_blocks
from tests.stand.pki import Authority, Certificate

# What a BMPString holds; Java takes an alias beyond it too, OpenSSL does not.
BASIC = st.characters(codec="utf-8", max_codepoint=0xFFFF)
CANARY = "c4nary-value"
MOMENT = datetime(2024, 1, 1)  # noqa: DTZ001  # X.509's times are UTC without saying so


@dataclass(frozen=True)
class Issued:
    """A certificate, as Vault answers it, and its parts."""

    data: dict[str, Any]
    authority: str
    certificate: x509.Certificate


@pytest.fixture(scope="module")
def issued() -> Issued:
    authority = Authority()
    server = authority.server()
    data = {
        "certificate": server.cert_pem.decode(),
        "private_key": server.key_pem.decode(),
        "issuing_ca": authority.pem.decode(),
        "ca_chain": [authority.pem.decode()],
        "serial_number": "01",
        "expiration": 1,
    }
    return Issued(data, authority.pem.decode(), x509.load_pem_x509_certificate(server.cert_pem))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("password", ["changeit", "", "pä€ß\U0001f600", "x" * 100])
def test_other_readers_open_it(issued: Issued, legacy: bool, password: str) -> None:
    """OpenSSL, by way of cryptography, finds key, certificate, chain and alias, under the password and no other."""
    made = pki.keystore(issued.data, "web", password, legacy=legacy)
    opened = load_pkcs12(made, password.encode())
    assert opened.cert is not None
    assert opened.key is not None
    assert opened.cert.certificate == issued.certificate
    assert opened.cert.friendly_name == b"web"
    assert opened.key.public_key() == issued.certificate.public_key()
    (link,) = opened.additional_certs
    assert link.certificate == x509.load_pem_x509_certificate(issued.authority.encode())
    with pytest.raises(ValueError, match="password"):
        load_pkcs12(made, b"another")
    # Identifiers of AES-256 and of PBE with 3DES, as DER writes them.
    assert (bytes.fromhex("060960864801650304012a") in made) is not legacy
    assert (bytes.fromhex("060a2a864886f70d010c0103") in made) is legacy


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_contents_are_the_same_bytes(issued: Issued, legacy: bool) -> None:
    """Made again it is equal, byte for byte; another password, alias, chain or kind shares not one salt with it."""
    first = pki.keystore(issued.data, "web", "changeit", legacy=legacy)
    assert pki.keystore(dict(issued.data), "web", "changeit", legacy=legacy) == first
    alone = {key: value for key, value in issued.data.items() if key in ("certificate", "private_key")}
    others = [
        pki.keystore(issued.data, "web", "changeit2", legacy=legacy),
        pki.keystore(issued.data, "web2", "changeit", legacy=legacy),
        pki.keystore(alone, "web", "changeit", legacy=legacy),
        pki.keystore(issued.data, "web", "changeit", legacy=not legacy),
    ]
    tails = [made[-24:-4] for made in (first, *others)]  # the MAC's salt, before its iterations
    assert len(set(tails)) == len(tails)


@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(alias=st.text(BASIC, max_size=300), password=st.text(max_size=200), links=st.integers(0, 40))
def test_structure_holds_any_lengths(issued: Issued, alias: str, password: str, links: int) -> None:
    """However long alias, password and chain are, the MAC is right and all parts are read back."""
    alias, password = (text.replace("\0", "") for text in (alias, password))
    key = load_pem_private_key(issued.data["private_key"].encode(), None)
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    certificate = issued.certificate.public_bytes(Encoding.DER)
    opened = load_pkcs12(pkcs12(der, [certificate] * (1 + links), alias, password, legacy=False), password.encode())
    assert opened.cert is not None
    assert (opened.cert.friendly_name or b"") == alias.encode()
    assert len(opened.additional_certs) == links
    assert opened.key is not None


def test_pem_has_the_order_that_a_server_wants(issued: Issued) -> None:
    """Private key, certificate, then each certificate's issuer, however the answer has them, each once."""
    root, middle, leaf = chain_of_three()
    data = {
        "certificate": leaf.cert_pem.decode(),
        "private_key": leaf.key_pem.decode(),
        "ca_chain": [issued.authority, root.decode(), middle.decode()],
        "issuing_ca": middle.decode(),
    }
    text = pki.pem(data)
    blocks = [block + "\n" for _, block in pem_blocks(text)]
    assert blocks == [leaf.key_pem.decode(), leaf.cert_pem.decode(), middle.decode(), root.decode(), issued.authority]
    assert text == "".join(blocks)


def test_a_certificate_in_two_spellings_is_one(issued: Issued) -> None:
    """Lines that end otherwise make no second certificate of one."""
    again = issued.data["certificate"].replace("\n", "\r\n")
    assert pki.pem(issued.data | {"ca_chain": [again, issued.authority]}) == pki.pem(issued.data)


def test_the_number_of_certificates_is_bounded(issued: Issued) -> None:
    """Each is tried as the issuer of the others, so more than any chain has are refused without being read."""
    block = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----"
    many = [block.format(number) for number in range(pki.MAX_CERTIFICATES)]
    with pytest.raises(pki.Unusable, match="it has more than 32 certificates"):
        pki.pem(issued.data | {"ca_chain": many})


def test_primes_of_a_key_are_not_tried() -> None:
    """Whether a key works out is for those who use it: trying its numbers would keep all other mounts waiting."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "shop")])
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, MOMENT, MOMENT).sign(key, SHA256())
    numbers = key.private_numbers()
    wrong = numbers.d + 2
    integers = (
        0,
        numbers.public_numbers.n,
        65537,
        wrong,
        numbers.p,
        numbers.q,
        numbers.dmp1,
        numbers.dmq1,
        numbers.iqmp,
    )
    der = _sequence(*map(_integer, integers))
    data = {
        "certificate": built.public_bytes(Encoding.PEM).decode(),
        "private_key": f"-----BEGIN RSA PRIVATE KEY-----\n{b64encode(der).decode()}\n-----END RSA PRIVATE KEY-----",
    }
    assert pki.keystore(data, "web", "changeit", legacy=False)


def test_a_bundle_and_a_signed_request(issued: Issued) -> None:
    """A certificate that comes as a bundle with its key is taken apart; one without a key is PEM without it."""
    data = issued.data
    bundle = {"certificate": data["private_key"] + "\n" + data["certificate"] + "\n" + issued.authority}
    assert pki.pem(bundle) == pki.pem(data)
    signed = {"certificate": data["certificate"], "ca_chain": issued.authority}
    assert pki.pem(signed) == data["certificate"] + issued.authority
    assert load_pem_private_key(pki.pem(data).encode(), None).public_key() == issued.certificate.public_key()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"certificate": CANARY}, 'its key "certificate" holds no certificate in PEM'),
        ({"certificate": None}, 'its key "certificate" holds no certificate in PEM'),
        ({"certificate": f"-----BEGIN CERTIFICATE-----\n{CANARY}\n-----END CERTIFICATE-----"}, "cannot be read"),
        ({"private_key": CANARY}, "it has no private key in PEM"),
        (
            {"private_key": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"},
            "no private key that can",
        ),
        ({"private_key": "other"}, "its private key is not the certificate's"),
    ],
)
def test_what_is_no_certificate_is_told(issued: Issued, changed: dict[str, Any], told: str) -> None:
    """The error says what is missing, and has nothing of a value."""
    if changed == {"private_key": "other"}:
        changed = {"private_key": Authority().server().key_pem.decode()}
    with pytest.raises(pki.Unusable, match=told) as raised:
        pki.keystore(issued.data | changed, "web", "", legacy=False)
    assert CANARY not in str(raised.value)
    assert raised.value.__context__ is None


def chain_of_three() -> tuple[bytes, bytes, Certificate]:
    """A root, an intermediate that it signed, and a certificate of that one with its key."""
    root = Authority()
    middle = root.intermediate()
    return root.pem, middle.pem, middle.server()
