"""Object versions tell that something changed, and nothing else."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider import versions
from provider.redact import Sensitive
from provider.spc.model import Encoding, ObjectSpec, SecretRequest
from provider.versions import ABSENT, Versions, key_of
from tests.spc_classes import parse_class, plain
from tests.tools import ROOT

KEY = bytes(range(32))
REQUEST = SecretRequest("GET", "ecommerce/data/app", (("version", "2"),), Sensitive('{"ttl":"1h"}'))
SPEC = plain("db/password", REQUEST, "password", 0o640)


def changed(**fields: Any) -> ObjectSpec:
    """SPEC with other fields."""
    given = {"name": SPEC.name, "request": REQUEST, "key": "password", "mode": SPEC.mode}
    return plain(**{**given, **fields})


# Few letters, so that parts of neighbouring fields often are the same and only their borders differ.
texts = st.text("ab',\\\ud800\0", max_size=3)
requests = st.builds(
    SecretRequest,
    method=texts,
    path=texts,
    query=st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
    body=st.none() | texts.map(Sensitive),
)
specs = st.builds(
    plain,
    name=texts,
    request=requests,
    key=st.none() | texts,
    mode=st.integers(0, 0o777),
    encoding=st.sampled_from(Encoding),
)
contents = st.binary(max_size=3)


def version_of(key: bytes | None, spec: ObjectSpec, content: bytes) -> str:
    """The version of a plain object, by a daemon that has just started."""
    return Versions().of(key, spec, [(spec.name, content)])


def test_without_a_key_the_version_is_empty() -> None:
    """No key, no version: a plain hash would let anybody test guesses of the content."""
    assert version_of(None, SPEC, b"content") == ""


def test_the_version_is_an_hmac_under_the_key() -> None:
    """A version is 64 hex digits, the same each time, and another under another key."""
    version = version_of(KEY, SPEC, b"content")
    assert len(bytes.fromhex(version)) == 32
    assert version == version_of(KEY, SPEC, b"content")
    assert version != version_of(KEY[::-1], SPEC, b"content")


def test_the_layout_is_the_documented_one() -> None:
    """The bytes under the HMAC are those of docs/decisions/object-versions.md; versions survive releases."""
    page = (ROOT / "docs" / "decisions" / "object-versions.md").read_text()
    (documented,) = re.findall(r"^    (\('vault-csi-provider object version 1'.*\))$", page, re.MULTILINE)
    spec = plain("db/password", SecretRequest("GET", "secret/data/app"), "password", 0o640)
    message = documented.encode() + b"content"
    assert version_of(KEY, spec, b"content") == hmac.new(KEY, message, hashlib.sha256).hexdigest()
    message = (
        rb"""('vault-csi-provider object version 1', 'db/"pass\'word', """
        rb"""('GET', 'ecommerce/data/app', (('version', '2'),), '{"ttl":"1h"}'), 'p\xe4ssword', 416, 'utf-8')content"""
    )
    spec = changed(name="db/\"pass'word", key="pässword")
    assert version_of(KEY, spec, b"content") == hmac.new(KEY, message, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        changed(name="db/passwords"),
        changed(key="Password"),
        changed(key=None),
        changed(key=""),
        changed(mode=0o600),
        changed(encoding=Encoding.HEX),
        changed(request=REQUEST._replace(method="POST")),
        changed(request=REQUEST._replace(path="ecommerce/data/apps")),
        changed(request=REQUEST._replace(query=())),
        changed(request=REQUEST._replace(query=(("version", "3"),))),
        changed(request=REQUEST._replace(body=Sensitive('{"ttl":"2h"}'))),
        changed(request=REQUEST._replace(body=None)),
        changed(request=REQUEST._replace(body=Sensitive(""))),
    ],
)
def test_each_field_of_the_definition_counts(other: ObjectSpec) -> None:
    """Any change of the object's definition, its request body included, is a new version."""
    assert version_of(KEY, other, b"content") != version_of(KEY, SPEC, b"content")


def test_the_content_counts() -> None:
    """Rotated content is a new version."""
    assert version_of(KEY, SPEC, b"content") != version_of(KEY, SPEC, b"contents")


@given(specs, contents, specs, contents)
def test_only_equal_objects_have_equal_versions(
    spec: ObjectSpec, content: bytes, other: ObjectSpec, changed: bytes
) -> None:
    """Nothing can move from one field to the next without changing the version."""
    equal = version_of(KEY, spec, content) == version_of(KEY, other, changed)
    assert equal == ((spec, content) == (other, changed))


@given(texts, texts, contents, st.integers(0, 3))
def test_bytes_that_change_fields_change_the_version(first: str, second: str, content: bytes, split: int) -> None:
    """The same letters, cut elsewhere between name and method, are another definition."""
    letters = first + second
    spec = changed(name=first, request=SecretRequest(second, ""))
    moved = changed(name=letters[:split], request=SecretRequest(letters[split:], ""))
    equal = version_of(KEY, spec, content) == version_of(KEY, moved, content)
    assert equal == (spec == moved)


def test_others_cannot_try_what_a_version_is_of() -> None:
    """Pods of another namespace, and those that read from another Vault, have versions of their own."""
    keys = {
        key_of(KEY, "shop", "https://vault", ""),
        key_of(KEY, "bank", "https://vault", ""),
        key_of(KEY, "shop", "https://other", ""),
        key_of(KEY, "shop", "https://vault", "team"),
        key_of(KEY[::-1], "shop", "https://vault", ""),
    }
    assert len({version_of(key, SPEC, b"content") for key in keys}) == 5
    page = (ROOT / "docs" / "decisions" / "object-versions.md").read_text()
    (documented,) = re.findall(r"^    (\('vault-csi-provider version key 1'.*\))$", page, re.MULTILINE)
    assert key_of(KEY, "shop", "https://vault.example:8200", "") == hmac.digest(KEY, documented.encode(), "sha256")


def test_remembering_changes_no_version() -> None:
    """A daemon that has seen an object before gives it the version of one that has not, plain or not, key or not."""
    kept = Versions()
    (shaped,) = parse_class("- {objectName: app, secretPath: b, secretKey: '*'}").objects
    files = [("app/a", b"1"), ("app/b", b"2")]
    for _ in range(2):
        for spec in (SPEC, changed(mode=0o600), changed(key="other")):
            assert kept.of(KEY, spec, [(spec.name, b"content")]) == version_of(KEY, spec, b"content")
        assert kept.of(KEY, shaped, files) == Versions().of(KEY, shaped, files)
        assert kept.of(None, SPEC, [(SPEC.name, b"content")]) == ""
        assert kept.of(KEY, shaped, None) == kept.of(None, SPEC, None) == ABSENT


def test_definitions_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A re-mount of the same object does not write its definition again; what is remembered is bounded."""
    written: list[ObjectSpec] = []
    define = versions._definition

    def noting(spec: ObjectSpec) -> bytes:
        written.append(spec)
        return define(spec)

    monkeypatch.setattr(versions, "_definition", noting)
    monkeypatch.setattr(versions, "MAX_DEFINITIONS", 2)
    kept = Versions()
    for spec in (SPEC, changed(), SPEC):
        kept.of(KEY, spec, [("", b"")])
    assert len(written) == 1
    for spec in (changed(mode=1), changed(mode=2), changed(mode=3)):
        kept.of(KEY, spec, [("", b"")])
    assert len(written) == 4
    assert len(kept._definitions) == 2
    large = changed(request=REQUEST._replace(body=Sensitive("x" * versions.MAX_DEFINITION)))
    assert kept.of(KEY, large, [("", b"")]) == kept.of(KEY, large, [("", b"")])
    assert len(written) == 6
    assert len(kept._definitions) == 2
