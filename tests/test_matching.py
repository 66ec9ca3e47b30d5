"""Includes and excludes: joined they find what each of them finds, and neither keys nor expressions take for ever."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from provider.render import matching
from provider.render.matching import TooLong, TooSlow, found_in, wanted
from provider.spc.expressions import regex

PARTS = ("a", "B", "^", "$", "|", ".", "a?", "(a)", "(?P<n>b)", "(?i)b", "\\Q.", "\\E", "[ab]", "\\b", "(?:a|b)", "")


def legal(text: str) -> bool:
    """Whether RE2 takes the expression by itself."""
    try:
        regex(text)
    except Exception:  # noqa: BLE001  # whatever it is, a class could not have it
        return False
    return True


expressions = st.lists(st.lists(st.sampled_from(PARTS), max_size=4).map("".join).filter(legal), max_size=4)
keys = st.text("abAB.|)", max_size=5)


@given(expressions, keys)
@example(["\\Q.", "\\Qb\\E"], ".")
def test_joined_expressions_find_what_each_of_them_finds(given: list[str], key: str) -> None:
    """Flags, groups, anchors and quotes of one expression do not reach into the next."""
    assert found_in(given)(key) == any(regex(text)(key) for text in given)


def test_expressions_that_are_too_large_together_are_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large, each of them counts."""
    monkeypatch.setattr(matching, "_MAX_JOINED", 1)
    found = found_in(["^a", "b$"])
    assert [found(key) for key in ("a", "xa", "b", "bx")] == [True, False, True, False]


def test_excludes_come_first_and_without_includes_all_are_taken() -> None:
    """A key that both find is left out; the order of the keys stays."""
    given = ["b", "ab", "a", "\ud800"]
    assert wanted(given, [], []) == given
    assert wanted(given, ["a"], []) == ["ab", "a"]
    assert wanted(given, ["a"], ["b"]) == ["a"]
    assert wanted(given, [], ["b"]) == ["a", "\ud800"]


def test_the_time_for_a_secret_is_bounded() -> None:
    """Expressions that are large for RE2, on keys that keep all of them busy, end with an error, each key in time."""
    began = time.thread_time()
    with pytest.raises(TooSlow):
        wanted(("a" * 1000 + str(number) for number in range(10_000)), ["(?:a?){1000}b"], [])
    assert time.thread_time() - began < 2 * matching.MATCH_SECONDS
    with pytest.raises(TooLong) as raised:
        wanted(["x", "a" * 1025], [], ["a"])
    assert raised.value.key == "a" * 1025
    assert wanted(["a" * 1025], [], []) == ["a" * 1025]


def test_thousands_of_keys_are_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty expressions are tried on 10,000 keys in one pass of the engine for each key."""
    import re2

    compiled: list[str] = []
    compile_one = re2.compile

    def noting(text: str, options: object) -> object:
        compiled.append(text)
        return compile_one(text, options=options)

    monkeypatch.setattr(re2, "compile", noting)
    given = [f"KEY_{number}" for number in range(10_000)]
    # Groups of one name in several of them are no reason to try each by itself.
    assert wanted(given, [], [f"_(?P<n>{number})$" for number in range(20)]) == given[20:]
    assert len(compiled) == 1
