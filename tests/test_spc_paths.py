"""Paths of files, of requests and of auth mounts: docs/contract.md sections 1 and 2."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.spc.findings import Refused
from provider.spc.paths import clashes, object_name, refuse_dots, secret_path

LONG = "/".join(["x" * 255] * 16)


@pytest.mark.parametrize("name", ["a", "a/b/c", ".a", "a..b", "a/..b", "a/...", "yes", "a b", "é", "a\\b", LONG])
def test_a_clean_relative_path_is_a_name(name: str) -> None:
    """Such names are taken as they are, up to 4096 bytes and 255 an element."""
    assert object_name(name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/a", "is absolute"),
        ("/", "is absolute"),
        ("..", "begins with .."),
        ("../a", "begins with .."),
        ("a/..", "has an element .."),
        ("a/../b", "has an element .."),
        ("..a", "begins with .."),
        ("...", "begins with .."),
        ("..a/b", "begins with .."),
        ("a//b", "is not a clean path"),
        ("a/", "is not a clean path"),
        ("./a", "is not a clean path"),
        ("a/./b", "is not a clean path"),
        (".", "is not a clean path"),
        ("", "is not a clean path"),
        ("a\0b", "holds a NUL"),
        (LONG + "/x", "is longer than 4096 bytes"),
        ("é" * 128, "has an element longer than 255 bytes"),
        ("a/" + "x" * 256, "has an element longer than 255 bytes"),
    ],
)
def test_a_path_that_breaks_the_drivers_writer_is_refused(name: str, problem: str) -> None:
    """Each rule of the driver's has its own fault."""
    with pytest.raises(Refused) as refused:
        object_name(name)
    assert problem in refused.value.problem


@given(st.text("a./é\0", max_size=12))
def test_a_name_is_what_the_driver_takes(name: str) -> None:
    """A name is legal exactly when it is relative, clean as Go's path.Clean has it, and stays inside."""
    legal = (
        posixpath.normpath(name) == name
        and name != "."
        and not name.startswith(("/", ".."))
        and ".." not in name.split("/")
        and "\0" not in name
    )
    try:
        object_name(name)
    except Refused:
        assert not legal
    else:
        assert legal


@given(st.lists(st.sampled_from(["a", "b", "a/b", "a/b/c", "a-b", "a.b/c", "ab", "a/bc", "b/a"]), max_size=8))
def test_every_clash_is_found(names: list[str]) -> None:
    """Each name that is given twice, is another's directory, or is in one, is in a pair; every pair is such a clash."""
    pairs = list(clashes(names))
    for upper, lower in pairs:
        assert upper != lower
        assert names[lower] == names[upper] or names[lower].startswith(names[upper] + "/")
    for index, name in enumerate(names):
        others = names[:index] + names[index + 1 :]
        if any(name.startswith(other + "/") for other in others):
            assert any(index == lower for _, lower in pairs)
        if any(other.startswith(name + "/") for other in others):
            assert any(names[upper] == name for upper, _ in pairs)
        if name in others:
            assert any(index in pair for pair in pairs)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("secret/data/app", "secret/data/app"),
        ("/secret/data/app", "secret/data/app"),
        ("v1/secret/data/app", "secret/data/app"),
        ("/v1/secret/data/app", "secret/data/app"),
        ("//v1//secret///data/app", "secret/data/app"),
        ("v1/v1/app", "v1/app"),
        ("v1secret/app", "v1secret/app"),
        ("secret/data/app/", "secret/data/app"),
        ("/v1/secret/metadata//", "secret/metadata"),
        ("secret/a%2Fb#c d", "secret/a%2Fb#c d"),
        ("secret/.a/..b/c..", "secret/.a/..b/c.."),
        ("secret/é", "secret/é"),
        ("v1", "v1"),
    ],
)
def test_a_secret_path_is_spelled_in_several_ways(text: str, path: str) -> None:
    """Slashes at either end, one v1/ and repeated slashes do not count; percent and hash are literal text."""
    assert secret_path(text) == (path, ())


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("", ()),
        ("version=2", (("version", "2"),)),
        ("a=1&b=&c&a=2", (("a", "1"), ("b", ""), ("c", ""), ("a", "2"))),
        ("a=b%2Fc+d", (("a", "b/c d"),)),
        ("a=x?y&b=../..", (("a", "x?y"), ("b", "../.."))),
    ],
)
def test_a_query_is_split_off(query: str, fields: tuple[tuple[str, str], ...]) -> None:
    """At the first question mark; fields keep their order, empty ones too."""
    assert secret_path(f"/v1/secret/app?{query}") == ("secret/app", fields)


def test_a_query_is_bounded() -> None:
    """A thousand fields are read, and not one more."""
    assert len(secret_path("a?" + "&".join(["b=c"] * 1000))[1]) == 1000
    with pytest.raises(Refused, match="more than 1000 query fields"):
        secret_path("a?" + "&".join(["b=c"] * 1001))


@pytest.mark.parametrize("text", ["", "/", "v1/", "//v1//", "?version=2"])
def test_an_empty_secret_path_is_refused(text: str) -> None:
    """Nothing is left once slashes and v1/ are gone."""
    with pytest.raises(Refused, match="is empty"):
        secret_path(text)


def test_a_url_is_no_secret_path() -> None:
    """Who copies a browser's line is told which part of it is meant."""
    with pytest.raises(Refused, match="is a URL") as refused:
        secret_path("https://vault.shop:8200/v1/secret/data/app")
    assert "write the path alone" in refused.value.remedy


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "a\x7f", "a\x9fb", "a?b=\r"])
def test_a_control_character_in_a_secret_path_is_refused(text: str) -> None:
    """Nobody splits a request's line, in the query neither."""
    with pytest.raises(Refused, match="control character"):
        secret_path(text)


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "a/../b",
        "a/.",
        "./a",
        "a/%2e%2e/b",
        "a/.%2E",
        "a/%2e",
        "a/%252e%252e/b",
        "a/%25252e",
        "a/%%32e/b",
        "a/%2%65%%32%65",
        "a%2f..%2fb",
        "a%2F%2e%2e%2Fb",
        "a%252f%252e",
        "a/..;/b",
        "a/..;x=1/b",
        "..;",
        "a/.;/b",
        "a/..%3b/b",
        "a/%2e%2e%253bx",
        "a\\..\\b",
        "a/..%5cb",
        "a%5c%2e%2e/b",
    ],
)
def test_dots_are_refused_however_they_are_spelled(path: str) -> None:
    """As they stand, and percent-encoded once or more, with encoded slashes too, or what some servers take for those.

    What follows a semicolon is a parameter of the element to some, and no part of its name.
    """
    with pytest.raises(Refused, match=r"element \. or \.\."):
        secret_path(path)


@pytest.mark.parametrize("path", ["a;b", "a;..", "a/..b;/c", "..a/b", "a%3bb", "a\\b", "a/...;/b"])
def test_what_only_looks_like_dots_is_not_refused(path: str) -> None:
    """A semicolon, a backslash and dots within a name are no way to another path."""
    assert secret_path(path) == (path, ())


@given(st.lists(st.sampled_from([*"%./a25eEfF", "%2e", "%25", "%2f", "%32", "%65"]), max_size=12).map("".join))
def test_a_path_passes_only_if_no_decoding_makes_dots_of_it(path: str) -> None:
    """However often a client decodes the path, no form on the way to the last has an element of dots."""
    forms = [path]
    while (decoded := unquote(forms[-1], "latin-1")) != forms[-1]:
        forms.append(decoded)
    try:
        refuse_dots(path)
    except Refused:
        assert any(element in (".", "..") for form in (forms[0], forms[-1]) for element in form.split("/"))
    else:
        assert not any(element in (".", "..") for form in (forms[0], forms[-1]) for element in form.split("/"))
