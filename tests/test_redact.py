"""Sensitive values and the scrubbing of text: docs/contract.md section 3 on what tokens look like."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.redact import MASK, Sensitive, one_line
from tests.unseen import is_one_line, shows_nothing

JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl-_9"


@dataclasses.dataclass(frozen=True)
class Holder:
    token: Sensitive[str]


def test_a_sensitive_value_shows_itself_only_when_asked() -> None:
    """No way to write it out shows it, alone or inside of something else."""
    value = Sensitive("hunter2")
    said = [
        repr(value),
        str(value),
        f"{value}",
        f"{value!r:>40}",
        "{} {!r}".format(value, value),  # noqa: UP032  # a way of its own
        f"{[value]} {Holder(value)}",
    ]
    assert not any("hunter2" in text for text in said)
    assert said[:3] == [MASK] * 3
    assert value.reveal() == "hunter2"


def test_a_sensitive_value_compares_by_its_value() -> None:
    """Equal values are equal and hash alike, so that requests that hold them do; the value itself is no Sensitive."""
    assert Sensitive("a") == Sensitive("a")
    assert Sensitive("a") != Sensitive("b")
    assert Sensitive("a") != "a"
    assert {Sensitive("a"): 1}[Sensitive("a")] == 1
    assert bool(Sensitive("a")) is True
    assert bool(Sensitive("")) is False


def test_a_sensitive_value_does_not_travel() -> None:
    """Neither pickle nor copy takes it along, and the error does not say it."""
    for carry in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError) as refused:
            carry(Sensitive("hunter2"))
        assert "hunter2" not in str(refused.value)
    with pytest.raises(TypeError):
        dataclasses.asdict(Holder(Sensitive("hunter2")))


def test_a_sensitive_value_takes_no_attribute() -> None:
    """Nothing can be hung onto it that would show with vars()."""
    with pytest.raises(AttributeError):
        Sensitive("a").other = "b"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "credential",
    [
        JWT,
        JWT.split(".", maxsplit=1)[0],
        JWT.rsplit(".", maxsplit=1)[0] + ".",
        "hvs.CAESIJlU9JMYEhOPYv4igdhm9PnZDrabYTobQ4Ymnlq1qY-LGh4KHGh2cy43OVRNMnZrakJoRG",
        "hvb.AAAAAQJ5R-2OVmS5Lm9WbR1yWVhTZQ",
        "hvr.AAAAAQJ5R-2OVmS5",
        "s.LoBYsCRPJrWcDNFkCVvOC2BL",
        "s.LoBYsCRPJrWcDNFkCVvOC2BL.hTqL0",
        "b.AAAAAQJ5R-2OVmS5Lm9WbR1yWVhTZQ",
        "r.AAAAAQJ5R-2OVmS5Lm9WbR1yWVhTZQ",
    ],
)
@pytest.mark.parametrize(
    "around", ["{}", "token {} is gone", '{{"token":"{}"}}', "X-Vault-Token: {}\n", "a={}&b", "({})", "token_{}"]
)
def test_a_credential_is_masked_wherever_it_stands(credential: str, around: str) -> None:
    """JWTs, and the tokens of Vault and OpenBao, in others' words as in ours."""
    text = one_line(around.format(credential))
    assert MASK in text
    assert not any(credential[start : start + 8] in text for start in range(0, len(credential) - 8, 4))


@pytest.mark.parametrize(
    "text",
    [
        "permission denied",
        "secret/data/hvs/app",
        "https://vault.shop.svc.cluster.local:8200",
        "s.txt",
        "a/s.b/c",
        "objects.of.something-that-is-long-enough",
        "eyJ",
        "namespace shop, role web",
    ],
)
def test_plain_words_stay(text: str) -> None:
    """What is no credential is not masked."""
    assert one_line(text) == text


def test_controls_are_escaped() -> None:
    """Line ends, terminal sequences, direction marks and lone surrogates are shown as escapes; other scripts stay."""
    assert one_line("a\nb\r\t\x1b[31m\x00\x7f\x85") == "a\\u000ab\\u000d\\u0009\\u001b[31m\\u0000\\u007f\\u0085"
    assert one_line("\u2028\u202e\u2066\u200b\ufeff\ud800") == "\\u2028\\u202e\\u2066\\u200b\\ufeff\\ud800"
    assert one_line("\U000e0041a") == "\\U000e0041a"
    assert one_line("é€𝄞 \"'\\") == "é€𝄞 \"'\\"


def test_no_character_that_shows_nothing_is_left() -> None:
    """Every control, format character, space but the usual one, filler and blank is escaped, and no other one is."""
    for number in range(0x110000):
        character = chr(number)
        hidden = shows_nothing(character)
        # A later Unicode than this Python's may have made more of them.
        if hidden or unicodedata.category(character) != "Cn":
            assert (one_line(character) != character) is hidden, hex(number)


@pytest.mark.parametrize(
    "character",
    "\u00a0\u034f\u115f\u1160\u17b4\u180b\u1680\u2003\u202f\u2065\u2800\u3000\u3164\ufe0f\uffa0\ufff0\U000e0002\U000e0100",
    ids=ascii,
)
def test_no_name_looks_like_another_by_what_shows_nothing(character: str) -> None:
    """Fillers, selectors of variants, joiners and odd spaces are seen in a name, at its end, within it and alone."""
    shown = f"\\u{ord(character):04x}" if character < "\U00010000" else f"\\U{ord(character):08x}"
    assert one_line("web" + character) == "web" + shown
    assert one_line(f"a.{character}b") == f"a.{shown}b"
    assert one_line(character * 2) == shown * 2


@given(st.text() | st.text("a \u3164\u2800\ufe0f\u00a0."), st.integers(1, 80))
def test_a_line_is_one_line_and_short(text: str, limit: int) -> None:
    """Whatever the text, the result has no more characters than the limit and none that a terminal would act on."""
    line = one_line(text, limit)
    assert len(line) <= limit
    assert is_one_line(line)
    assert line.encode().decode() == line


def test_a_long_text_is_cut_with_an_ellipsis() -> None:
    """The beginning stays; exactly as long as the limit is not too long."""
    assert one_line("x" * 512) == "x" * 512
    assert one_line("x" * 513) == "x" * 511 + "…"
    assert one_line("abcdef", 4) == "abc…"


def test_a_credential_across_the_cut_is_masked() -> None:
    """It is masked before the text is cut, so that no half of it remains."""
    for before in range(60, 80):
        assert "eyJ" not in one_line("x" * (before - 1) + " " + JWT * 3, 80)[: before + 8].replace(MASK, "")
        assert JWT[:8] not in one_line("x" * (before - 1) + " " + JWT * 3, 80)
