"""The hierarchy of errors: codes and message sizes of docs/contract.md section 1."""

from __future__ import annotations

import inspect
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider import errors
from provider.errors import (
    MAX_MESSAGE_BYTES,
    AccessDenied,
    Code,
    InvalidClass,
    MountFailed,
    ProviderError,
    SecretNotFound,
    VaultUnavailable,
    encoded_size,
    fit,
    join_within,
)

# How gRPC's percent-encoding leaves printable ASCII but the percent sign alone.
PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def classes() -> list[type[ProviderError]]:
    return [
        found
        for _, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, ProviderError) and found is not MountFailed
    ]


@pytest.mark.parametrize("error", classes())
def test_each_error_has_a_code_that_may_leave_mount(error: type[ProviderError]) -> None:
    """Never one of the five that kubelet takes as "still in progress", nor UNKNOWN."""
    assert error.code.value in ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION", "INTERNAL")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ProviderError", Code.INTERNAL),
        ("InvalidClass", Code.INVALID_ARGUMENT),
        ("InvalidSetting", Code.INVALID_ARGUMENT),
        ("LoginDenied", Code.PERMISSION_DENIED),
        ("AccessDenied", Code.PERMISSION_DENIED),
        ("SecretNotFound", Code.NOT_FOUND),
        ("BadSecret", Code.FAILED_PRECONDITION),
        ("RequestRefused", Code.FAILED_PRECONDITION),
        ("VaultUnavailable", Code.FAILED_PRECONDITION),
        ("AnswerLost", Code.FAILED_PRECONDITION),
        ("OutOfTime", Code.FAILED_PRECONDITION),
        ("KubernetesUnavailable", Code.FAILED_PRECONDITION),
    ],
)
def test_the_code_of_each_error(name: str, code: Code) -> None:
    """Bad class, login or policy, path or key, Vault out of reach: as the contract says."""
    assert getattr(errors, name).code is code


def test_an_error_says_what_is_wrong_and_what_to_do() -> None:
    """The advice follows what is wrong; without one there is only that."""
    assert str(SecretNotFound("nothing at a/b", "write a/data/b")) == "nothing at a/b: write a/data/b"
    assert str(SecretNotFound("nothing at a/b")) == "nothing at a/b"


def test_an_invalid_class_holds_every_fault() -> None:
    """In the message one after the other, and as they came."""
    error = InvalidClass(["a is b", "c is d"])
    assert str(error) == "SecretProviderClass: a is b; c is d"
    assert error.faults == ("a is b", "c is d")


def test_a_failed_mount_has_the_first_objects_code() -> None:
    """Objects that fail in different ways are one error, with all their messages."""
    denied, gone = AccessDenied("a is denied", "ask"), SecretNotFound("b is not there")
    error = MountFailed([denied, gone])
    assert str(error) == "a is denied: ask; b is not there"
    assert error.code is Code.PERMISSION_DENIED
    assert error.failures == (denied, gone)
    assert MountFailed([gone, denied]).code is Code.NOT_FOUND
    assert MountFailed([VaultUnavailable("c")]).code is Code.FAILED_PRECONDITION


@given(st.text())
def test_the_encoded_size_is_grpcs(text: str) -> None:
    """Three bytes for each byte of UTF-8 that is not printable ASCII, or is a percent sign; one for the others."""
    carried = text.encode("utf-8", "replace").decode()
    assert encoded_size(text) == len(quote(carried, safe=PRINTABLE))


@given(st.text() | st.text("é%a\n", max_size=80), st.integers(9, 120))
def test_a_message_that_is_fitted_is_within_its_limit(text: str, limit: int) -> None:
    """It is a beginning of the text, as long as fits, with an ellipsis if something is cut."""
    found = fit(text, limit)
    assert encoded_size(found) <= limit
    if encoded_size(text) <= limit:
        assert found == text
    else:
        assert found.endswith("…")
        assert text.startswith(found[:-1])
        assert encoded_size(text[: len(found)]) + 9 > limit


def test_the_limit_is_four_kib() -> None:
    """As long as allowed is left alone."""
    assert MAX_MESSAGE_BYTES == 4096
    assert fit("x" * 4096) == "x" * 4096
    assert fit("x" * 4097) == "x" * 4087 + "…"


def test_parts_are_joined_as_one_safe_line() -> None:
    """Each is said once, credentials masked and controls escaped."""
    jwt = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln"
    assert join_within("A", ["b", "c\nd", "b", f"e {jwt}"]) == "A: b; c\\u000ad; e ***"
    assert join_within("", ["b"]) == "b"
    assert join_within("A", []) == "A: "


def test_what_does_not_fit_is_counted() -> None:
    """As many parts as fit into the limit, then how many more there are, each different one counted once."""
    parts = [f"{n:03} " + "x" * 96 for n in range(100)]
    text = join_within("A", parts)
    kept = text.count(" x")
    assert 30 < kept < 100
    assert text.endswith(f"; and {100 - kept} more")
    assert text.startswith("A: 000 ")
    assert encoded_size(text) <= MAX_MESSAGE_BYTES - 200
    assert join_within("", ["aaaa", "bbbb", "cccc", "bbbb"], limit=12) == "aaaa; bbbb; and 1 more"


def test_a_part_that_fills_the_message_does_not_hide_the_others() -> None:
    """The first is cut where it is too long, and the count of those after it still stands."""
    text = join_within("A", ["é" * 1200, "b", "c"])
    assert text.startswith("A: ééé")
    assert text.endswith("…; and 2 more")
    assert encoded_size(text) <= MAX_MESSAGE_BYTES


@given(st.text(max_size=20), st.lists(st.text() | st.text("é𝄞%\n", min_size=300), max_size=8))
def test_a_joined_message_is_within_its_limit(prefix: str, parts: list[str]) -> None:
    """Whatever is joined leaves room for what a caller puts around it."""
    assert encoded_size(join_within(prefix, parts)) <= MAX_MESSAGE_BYTES - 200
