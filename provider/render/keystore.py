"""PKCS#12 (RFC 7292), written so that the same contents are the same bytes. Pure.

Salts and initialisation vectors are derived from what they protect: HMAC-SHA256 under a hash of the private key, over
the password and all that goes in. So nobody without the key can foretell them, they differ wherever the contents do,
and stay as they are over re-mounts, restarts and nodes; libraries draw them anew each time (docs/decisions/shapes.md).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

# As OpenJDK's keytool has it: the password is a secret of Vault's, and its file is as well kept as the key's own.
ITERATIONS: Final = 10_000
_SALT_BYTES: Final = 16
# RFC 7292, appendix B.2: the block of both hashes, and what a derived key is for.
_HASH_BLOCK: Final = 64
_FOR_KEY, _FOR_IV, _FOR_MAC = 1, 2, 3

_DATA: Final = "1.2.840.113549.1.7.1"
_ENCRYPTED_DATA: Final = "1.2.840.113549.1.7.6"
_SHROUDED_KEY_BAG: Final = "1.2.840.113549.1.12.10.1.2"
_CERTIFICATE_BAG: Final = "1.2.840.113549.1.12.10.1.3"
_X509: Final = "1.2.840.113549.1.9.22.1"
_FRIENDLY_NAME: Final = "1.2.840.113549.1.9.20"
_LOCAL_KEY_ID: Final = "1.2.840.113549.1.9.21"
_PBES2: Final = "1.2.840.113549.1.5.13"
_PBKDF2: Final = "1.2.840.113549.1.5.12"
_HMAC_SHA256: Final = "1.2.840.113549.2.9"
_AES256_CBC: Final = "2.16.840.1.101.3.4.1.42"
_SHA_3DES: Final = "1.2.840.113549.1.12.1.3"
_DIGESTS: Final = {"sha256": "2.16.840.1.101.3.4.2.1", "sha1": "1.3.14.3.2.26"}


def pkcs12(key: bytes, certificates: Sequence[bytes], alias: str, password: str, *, legacy: bool) -> bytes:
    """A keystore with one entry: a private key (PKCS#8) and its certificates (X.509), the key's own first; all in DER.

    Encryption is PBES2 with AES-256, and the MAC's hash SHA-256; with ``legacy`` 3DES and SHA-1. An empty password
    encrypts too, which every reader takes for a keystore without one.
    """
    return _Writer(key, certificates, alias, password, legacy=legacy).pfx()


class _Writer:
    """One keystore in the making."""

    def __init__(self, key: bytes, certificates: Sequence[bytes], alias: str, password: str, *, legacy: bool) -> None:
        self._key = key
        self._certificates = certificates
        self._alias = alias
        self._password = password
        self._legacy = legacy
        parts = [alias.encode("utf-16-be", "surrogatepass"), password.encode("utf-16-be", "surrogatepass"), key]
        contents = b"".join(_der(0x04, part) for part in (*parts, *certificates, bytes([legacy])))
        self._seed = hmac.digest(hashlib.sha256(key).digest(), contents, "sha256")

    def _derived(self, purpose: str, size: int) -> bytes:
        return hmac.digest(self._seed, purpose.encode(), "sha256")[:size]

    def pfx(self) -> bytes:
        key_id = hashlib.sha1(self._certificates[0], usedforsecurity=False).digest()
        named = [_attribute(_FRIENDLY_NAME, _der(0x1E, self._alias.encode("utf-16-be", "surrogatepass")))]
        local = [*named, _attribute(_LOCAL_KEY_ID, _der(0x04, key_id))]
        bags = [
            _bag(_CERTIFICATE_BAG, _sequence(_oid(_X509), _explicit(_der(0x04, certificate))), [] if number else local)
            for number, certificate in enumerate(self._certificates)
        ]
        algorithm, encrypted = self._encrypted("certificates", _sequence(*bags))
        content = _sequence(_oid(_DATA), algorithm, _der(0x80, encrypted))
        certificates = _sequence(_oid(_ENCRYPTED_DATA), _explicit(_sequence(_integer(0), content)))
        algorithm, encrypted = self._encrypted("key", self._key)
        key = _bag(_SHROUDED_KEY_BAG, _sequence(algorithm, _der(0x04, encrypted)), local)
        keys = _sequence(_oid(_DATA), _explicit(_der(0x04, _sequence(key))))
        safe = _sequence(certificates, keys)
        return _sequence(_integer(3), _sequence(_oid(_DATA), _explicit(_der(0x04, safe))), self._mac(safe))

    def _encrypted(self, what: str, plain: bytes) -> tuple[bytes, bytes]:
        """The algorithm's identifier and the ciphertext."""
        salt = self._derived(f"salt of the {what}", _SALT_BYTES)
        cipher: BlockCipherAlgorithm
        if self._legacy:
            cipher = TripleDES(self._pkcs12_kdf("sha1", salt, _FOR_KEY, 24))
            vector = self._pkcs12_kdf("sha1", salt, _FOR_IV, 8)
            algorithm = _sequence(_oid(_SHA_3DES), _sequence(_der(0x04, salt), _integer(ITERATIONS)))
        else:
            secret = self._password.encode("utf-8", "surrogatepass")
            cipher = AES(hashlib.pbkdf2_hmac("sha256", secret, salt, ITERATIONS, 32))
            vector = self._derived(f"vector of the {what}", 16)
            function = _sequence(_der(0x04, salt), _integer(ITERATIONS), _integer(32), _algorithm(_HMAC_SHA256))
            derivation = _sequence(_oid(_PBKDF2), function)
            algorithm = _sequence(_oid(_PBES2), _sequence(derivation, _sequence(_oid(_AES256_CBC), _der(0x04, vector))))
        block = cipher.block_size // 8
        padding = block - len(plain) % block
        encryptor = Cipher(cipher, CBC(vector)).encryptor()
        return algorithm, encryptor.update(plain + bytes([padding]) * padding) + encryptor.finalize()

    def _mac(self, safe: bytes) -> bytes:
        digest = "sha1" if self._legacy else "sha256"
        salt = self._derived("salt of the MAC", _SALT_BYTES)
        key = self._pkcs12_kdf(digest, salt, _FOR_MAC, hashlib.new(digest).digest_size)
        mac = hmac.digest(key, safe, digest)
        return _sequence(
            _sequence(_algorithm(_DIGESTS[digest]), _der(0x04, mac)), _der(0x04, salt), _integer(ITERATIONS)
        )

    def _pkcs12_kdf(self, digest: str, salt: bytes, purpose: int, size: int) -> bytes:
        """RFC 7292, appendix B.2."""
        secret = self._password.encode("utf-16-be", "surrogatepass") + b"\0\0"
        mixed = _filled(salt) + _filled(secret)
        derived = b""
        while len(derived) < size:
            block = hashlib.new(digest, bytes([purpose]) * _HASH_BLOCK + mixed).digest()
            for _ in range(ITERATIONS - 1):
                block = hashlib.new(digest, block).digest()
            derived += block
            added = int.from_bytes((block * _HASH_BLOCK)[:_HASH_BLOCK], "big") + 1
            mixed = b"".join(
                ((int.from_bytes(mixed[at : at + _HASH_BLOCK], "big") + added) % (1 << 8 * _HASH_BLOCK)).to_bytes(
                    _HASH_BLOCK, "big"
                )
                for at in range(0, len(mixed), _HASH_BLOCK)
            )
        return derived[:size]


def _filled(text: bytes) -> bytes:
    """Repeated to fill whole blocks of the hash."""
    size = -(-len(text) // _HASH_BLOCK) * _HASH_BLOCK
    return (text * -(-size // len(text)))[:size]


# -- DER (X.690) ---------------------------------------------------------------------------------------------------


def _der(tag: int, contents: bytes) -> bytes:
    size = len(contents)
    if size < 0x80:
        return bytes([tag, size]) + contents
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + contents


def _sequence(*parts: bytes) -> bytes:
    return _der(0x30, b"".join(parts))


def _explicit(part: bytes) -> bytes:
    return _der(0xA0, part)


def _integer(number: int) -> bytes:
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    encoded = bytearray([40 * first + second])
    for number in rest:
        septets = [number & 0x7F]
        while number := number >> 7:
            septets.append(0x80 | number & 0x7F)
        encoded += bytes(reversed(septets))
    return _der(0x06, bytes(encoded))


def _algorithm(dotted: str) -> bytes:
    return _sequence(_oid(dotted), b"\x05\x00")


def _attribute(dotted: str, value: bytes) -> bytes:
    return _sequence(_oid(dotted), _der(0x31, value))


def _bag(kind: str, value: bytes, attributes: Sequence[bytes]) -> bytes:
    parts = [_oid(kind), _explicit(value)]
    if attributes:
        parts.append(_der(0x31, b"".join(sorted(attributes))))
    return _sequence(*parts)
