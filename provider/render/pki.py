"""Certificates of Vault's PKI engine, with key and chain: in the order that a server wants, or as a keystore. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from provider.render.keystore import pkcs12
from provider.sandbox.quoting import pem_blocks

# Certificates of one object; the longest chains in use have five, and each is tried against all others.
MAX_CERTIFICATES: Final = 32


class Unusable(Exception):
    """The data is no certificate that can be used so: why. Never a value."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Bundle:
    """A certificate and its chain, each after the one that it certifies, and its private key if there is one; PEM."""

    certificates: tuple[str, ...]
    key: str | None = field(default=None, repr=False)


def bundle(data: Mapping[str, Any]) -> Bundle:
    """What ``pki/issue`` and its like answer: ``certificate``, ``ca_chain``, ``issuing_ca``, ``private_key``.

    Raises Unusable.
    """
    own = pem_blocks(_text(data, "certificate"))
    chain = data.get("ca_chain")
    texts = chain if isinstance(chain, list) else [chain]
    others = [block for text in [*texts, data.get("issuing_ca")] if isinstance(text, str) for block in pem_blocks(text)]
    certificates = list(dict.fromkeys(block for label, block in [*own, *others] if label == "CERTIFICATE"))
    if not any(label == "CERTIFICATE" for label, _ in own):
        raise Unusable('its key "certificate" holds no certificate in PEM')
    if len(certificates) > MAX_CERTIFICATES:
        raise Unusable(f"it has more than {MAX_CERTIFICATES} certificates")
    keys = pem_blocks(_text(data, "private_key")) + own
    key = next((block for label, block in keys if label.endswith("PRIVATE KEY")), None)
    return Bundle(_ordered(certificates), key)


def validity(data: Mapping[str, Any]) -> float | None:
    """Seconds for which the certificate in ``data`` is valid in all; None where there is none that can be read."""
    try:
        (certificate,) = _loaded([block for _, block in pem_blocks(_text(data, "certificate"))[:1]])
    except (Unusable, ValueError):
        return None
    return (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()


def pem(data: Mapping[str, Any]) -> str:
    """Private key, certificate and chain. Raises Unusable."""
    found = bundle(data)
    return "\n".join([*([found.key] if found.key else []), *found.certificates]) + "\n"


def keystore(data: Mapping[str, Any], alias: str, password: str, *, legacy: bool) -> bytes:
    """The same as PKCS#12. Raises Unusable."""
    found = bundle(data)
    if found.key is None:
        raise Unusable('it has no private key in PEM under "private_key"')
    key = None
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
        # Unchecked: trying its primes holds every other thread up, for seconds where they are large, and tells no more
        # of the key than that Vault has another one than the certificate's, which the public half tells as well.
        key = load_pem_private_key(found.key.encode(), password=None, unsafe_skip_rsa_key_validation=True)
    if key is None:
        raise Unusable('its key "private_key" holds no private key that can be read')
    certificates = _loaded(found.certificates)
    if certificates[0].public_key() != key.public_key():
        raise Unusable("its private key is not the certificate's")
    return pkcs12(
        key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        [certificate.public_bytes(Encoding.DER) for certificate in certificates],
        alias,
        password,
        legacy=legacy,
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) else ""


def _loaded(certificates: Sequence[str]) -> list[x509.Certificate]:
    loaded = []
    for certificate in certificates:
        try:
            loaded.append(x509.load_pem_x509_certificate(certificate.encode()))
        except ValueError:
            break
    if len(loaded) < len(certificates):
        raise Unusable("a certificate in it cannot be read")
    return loaded


def _ordered(certificates: Sequence[str]) -> tuple[str, ...]:
    """The first, then whoever issued the one before, then what belongs to no chain as it came; each once."""
    # One certificate may be there in several spellings.
    distinct: dict[x509.Certificate, str] = {}
    for text, certificate in zip(certificates, _loaded(certificates), strict=True):
        distinct.setdefault(certificate, text)
    left = {text: certificate for certificate, text in distinct.items()}
    at: str | None = certificates[0]
    order = []
    while at is not None:
        order.append(at)
        certificate = left.pop(at)
        at = next((text for text, other in left.items() if _issued(certificate, other)), None)
    return (*order, *left)


def _issued(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
