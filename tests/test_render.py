"""From Vault's response to a file's bytes."""

from __future__ import annotations

import base64
import dataclasses
import json
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.errors import BadSecret, ProviderError, SecretNotFound
from provider.render.values import render_plain as render
from provider.spc.model import Encoding, ObjectSpec, SecretRequest, SingleValue
from tests.spc_classes import plain

CANARY = "c4nary-value"
WHOLE = plain("app.json", SecretRequest("GET", "ecommerce/data/app"), None)
PASSWORD = plain("db-password", SecretRequest("GET", "ecommerce/data/app"), "password")


def answer(data: Any, **fields: Any) -> dict[str, Any]:
    """What Vault answers, with ``data``."""
    return {
        "request_id": "6f4a1c1e-0001",
        "lease_id": "",
        "renewable": False,
        "lease_duration": 0,
        "data": data,
        "wrap_info": None,
        "warnings": None,
        "auth": None,
        "mount_type": "kv",
        **fields,
    }


def kv2(data: dict[str, Any]) -> dict[str, Any]:
    """What a KV v2 engine answers, with ``data`` as the secret."""
    return answer({"data": data, "metadata": {"version": 3, "created_time": "2026-01-01T00:00:00Z"}})


def failure(spec: ObjectSpec, response: dict[str, Any]) -> ProviderError:
    """The error that rendering raises; it and its whole traceback are free of the canary."""
    with pytest.raises(ProviderError) as caught:
        render(spec, response)
    shown = str(caught.value) + repr(caught.value) + "".join(traceback.format_exception(caught.value))
    assert CANARY not in shown
    assert caught.value.__context__ is None, "an error that may quote the value rides along"
    assert caught.value.advice
    return caught.value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé<&\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


# With a key -----------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8")), st.booleans())
def test_a_string_is_written_as_it_is(value: str, versioned: bool) -> None:
    """Whatever the string holds, the file is its UTF-8, from KV v1 and KV v2 alike."""
    response = kv2({"password": value}) if versioned else answer({"password": value})
    assert render(PASSWORD, response) == value.encode()


@given(json_values.filter(lambda value: not isinstance(value, str)))
def test_any_other_value_is_compact_json(value: object) -> None:
    """A map, list, number, boolean or null is JSON that reads back as the same value, in one line."""
    written = render(PASSWORD, answer({"password": value}))
    assert json.loads(written) == value
    assert written == json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, "é", None]}, '{"a":[1,"é",null]}'),
        ({"html": "<a>&</a>"}, '{"html":"<a>&</a>"}'),
        (12345678901234567890123, "12345678901234567890123"),
        (0.1, "0.1"),
        (True, "true"),
        (None, "null"),
        (json.loads("1e3"), "1000.0"),
    ],
)
def test_json_is_plain(value: object, expected: str) -> None:
    """JSON is compact, not escaped beyond need, and whole numbers keep every digit."""
    assert render(PASSWORD, answer({"password": value})) == expected.encode()


def test_keys_are_looked_up_inside_of_kv_v2() -> None:
    """Where the data holds a map named data, the key is looked up there and nowhere else."""
    assert render(PASSWORD, kv2({"password": "inner"})) == b"inner"
    assert isinstance(
        failure(dataclasses.replace(PASSWORD, shape=SingleValue("metadata")), kv2({"a": "b"})), SecretNotFound
    )


def test_a_value_named_data_is_no_kv_v2() -> None:
    """A KV v1 secret may have a key named data; a string there is a value like any other."""
    spec = dataclasses.replace(PASSWORD, shape=SingleValue("data"))
    assert render(spec, answer({"data": "text", "password": "x"})) == b"text"


# Encodings ------------------------------------------------------------------------------------------------


@given(st.binary(), st.sampled_from(["", "\n", " \t\r\n"]), st.integers(1, 20))
def test_encoded_bytes_come_back(content: bytes, blank: str, width: int) -> None:
    """base64 and hex decode to the stored bytes, also with whitespace where tools break the lines."""
    encoded = base64.b64encode(content).decode()
    wrapped = blank.join(encoded[at : at + width] for at in range(0, len(encoded), width)) + blank
    spec = dataclasses.replace(PASSWORD, shape=SingleValue("password", Encoding.BASE64))
    assert render(spec, kv2({"password": wrapped})) == content
    digits = content.hex()
    wrapped = blank.join(digits[at : at + width] for at in range(0, len(digits), width)) + blank
    spec = dataclasses.replace(PASSWORD, shape=SingleValue("password", Encoding.HEX))
    assert render(spec, kv2({"password": wrapped.upper()})) == content


@pytest.mark.parametrize("encoding", [Encoding.BASE64, Encoding.HEX])
@pytest.mark.parametrize("value", [CANARY, CANARY + "é", "abc", {"a": CANARY}, "=", "YQ=a"])
def test_what_is_not_in_the_encoding_is_refused(encoding: Encoding, value: object) -> None:
    """The error names object, path, key and encoding, and not the value."""
    error = failure(dataclasses.replace(PASSWORD, shape=SingleValue("password", encoding)), kv2({"password": value}))
    assert isinstance(error, BadSecret)
    for part in ("db-password", "ecommerce/data/app", '"password"', encoding.value):
        assert part in error.what


def test_a_number_is_decoded_by_its_digits() -> None:
    """Vault keeps ``0123`` typed without quotes as a number; its digits are what the encoding applies to."""
    assert (
        render(dataclasses.replace(PASSWORD, shape=SingleValue("password", Encoding.HEX)), answer({"password": 1234}))
        == b"\x12\x34"
    )


def test_a_lone_surrogate_is_refused() -> None:
    """A string that is no Unicode text has no UTF-8; the secret is not altered to make it fit."""
    assert isinstance(failure(PASSWORD, answer({"password": CANARY + "\ud800"})), BadSecret)


@pytest.mark.parametrize("value", [{"a": float("inf"), "b": CANARY}, [float("nan"), CANARY]])
def test_a_number_that_is_none_in_json_is_refused(value: object) -> None:
    """``1e400`` reads as infinity, which no JSON parser would take back."""
    assert isinstance(failure(PASSWORD, answer({"password": value})), BadSecret)


def test_endless_nesting_is_refused() -> None:
    """A value nested too deeply is the secret's fault, not a crash."""
    value: list[Any] = [CANARY]
    for _ in range(100_000):
        value = [value]
    assert isinstance(failure(PASSWORD, answer({"password": value})), BadSecret)


# Without a key --------------------------------------------------------------------------------------------


def test_the_whole_response_has_its_shape() -> None:
    """All eight fields in their order, the request's id blank, and nothing that a newer server adds."""
    written = render(WHOLE, kv2({"password": "p", "é": "<&>"}))
    assert written.decode() == (
        '{"request_id":"","lease_id":"","lease_duration":0,"renewable":false,"data":{"data":{"password":"p",'
        '"é":"<&>"},"metadata":{"version":3,"created_time":"2026-01-01T00:00:00Z"}},"warnings":null,"auth":null,'
        '"wrap_info":null}'
    )


def test_a_field_that_is_left_out_has_its_zero() -> None:
    """Vault leaves out what is empty; the file has it all the same."""
    assert json.loads(render(WHOLE, {"data": {"a": "b"}})) == {
        "request_id": "",
        "lease_id": "",
        "lease_duration": 0,
        "renewable": False,
        "data": {"a": "b"},
        "warnings": None,
        "auth": None,
        "wrap_info": None,
    }


def test_an_unchanged_secret_is_an_unchanged_file() -> None:
    """Two reads of one secret differ only in their request's id, and the files not at all."""
    assert render(WHOLE, answer({"a": "b"}, request_id="1")) == render(WHOLE, answer({"a": "b"}, request_id="2"))


def test_a_lease_is_kept() -> None:
    """The lease belongs to the credential: applications read it from the file."""
    written = json.loads(render(WHOLE, answer({"a": "b"}, lease_id="db/1", lease_duration=3600, renewable=True)))
    assert (written["lease_id"], written["lease_duration"], written["renewable"]) == ("db/1", 3600, True)


@pytest.mark.parametrize("field", ["auth", "wrap_info"])
def test_an_answer_may_be_complete_without_data(field: str) -> None:
    """A created token comes in auth, a wrapped answer in wrap_info; neither has data."""
    written = json.loads(render(WHOLE, answer(None, **{field: {"token": "t"}})))
    assert written[field] == {"token": "t"}


# What is not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [WHOLE, PASSWORD])
@pytest.mark.parametrize("response", [answer(None), {}])
def test_no_data_is_not_found(spec: ObjectSpec, response: dict[str, Any]) -> None:
    """An answer without data is no secret, and the error says which object and path."""
    error = failure(spec, response)
    assert isinstance(error, SecretNotFound)
    assert spec.name in error.what
    assert "ecommerce/data/app" in error.what


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_missing_key_is_counted_not_listed(count: int) -> None:
    """The error names object, path and the missing key, and of the others only how many there are."""
    others = {f"private-{number}": CANARY for number in range(count)}
    error = failure(PASSWORD, kv2(others))
    assert isinstance(error, SecretNotFound)
    assert f"it has {count} key{'' if count == 1 else 's'})" in error.what
    for part in ("db-password", "ecommerce/data/app", '"password"'):
        assert part in error.what
    assert "private" not in str(error)


def test_a_key_in_another_case_is_hinted_at() -> None:
    """Keys are case-sensitive, which is told to whom it would help."""
    assert "upper and lower case" in failure(PASSWORD, kv2({"Password": CANARY})).advice
    assert "upper and lower case" not in failure(PASSWORD, kv2({"pass": CANARY})).advice


def test_data_that_is_no_map_is_not_vaults() -> None:
    """Something else answers at the address: an error, not a crash."""
    assert isinstance(failure(PASSWORD, answer([CANARY])), BadSecret)
