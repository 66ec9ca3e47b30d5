"""Data as text: whatever it holds, each format's own parser reads it back."""

from __future__ import annotations

import json
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provider.render import formats
from provider.render.formats import describe, write
from provider.sandbox.quoting import Unwritable, pem_blocks, shell_word, yaml_scalar
from provider.spc.model import Format
from tests.properties import read_properties

# All of Unicode, and often what some grammar takes seriously.
hard = st.text("\n\r\t\x00\x0b\x0c\x1b\x7f\x85\xa0 '\"=#\\$`!:;&|{}[]%@*?~<>-.,0e\u2028\u2029\ufeff\ufffe\U0001f600éß")
texts = st.text(st.characters(codec="utf-8")) | hard
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
data = st.dictionaries(texts, values, max_size=6)
WORDS = ("yes", "No", "null", "~", "1e3", "0o14", "0x1F", "2024-01-01", "=", "<<", "")
TRICKY: dict[str, Any] = {f"k{word}": word for word in WORDS} | {word: word for word in WORDS}


def in_toml(value: Any) -> Any:
    """What of a value TOML can hold: no null, and integers of 64 bits."""
    if isinstance(value, dict):
        return {key: in_toml(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [in_toml(inner) for inner in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return value % 2**63
    return "" if value is None else value


def as_text(value: Any) -> str:
    """A value in a format that knows only strings."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@given(data)
@example(TRICKY)
def test_json(given: dict[str, Any]) -> None:
    """A JSON parser reads the data back, its keys sorted at each level."""
    text = write(Format.JSON, given)
    pairs = json.loads(text, object_pairs_hook=list)
    assert json.loads(text) == given
    assert [key for key, _ in pairs] == sorted(given)


@given(data)
@example(TRICKY)
@example({"a" * 2000: {"b" * 1500: ["c" * 5000]}, "n": [1e16, -1e-7, 5e-324, 10**30, -0.0]})
def test_yaml(given: dict[str, Any]) -> None:
    """PyYAML reads the data back, words, dates and numbers as the types that they had, keys sorted."""
    read = yaml.safe_load(write(Format.YAML, given))
    assert read == given
    assert list(read) == sorted(given)


@given(values)
def test_yaml_of_one_value(value: Any) -> None:
    """A value by itself is YAML too, in one line where a template wants it so."""
    assert yaml.safe_load(write(Format.YAML, value)) == value
    line = yaml_scalar(value)
    assert "\n" not in line
    assert yaml.safe_load(line) == value


@given(data.map(in_toml))
@example(TRICKY)
def test_toml(given: dict[str, Any]) -> None:
    """tomllib reads the data back, keys sorted."""
    read = tomllib.loads(write(Format.TOML, given))
    assert read == given
    assert list(read) == sorted(given)


@given(data)
@example(TRICKY)
@example({" a ": " b ", "": "", "a=b:c#d!e": "\\u0041", "x": "\ta\n  b", "y": "#!"})
def test_properties(given: dict[str, Any]) -> None:
    """Java's rules read each key and value back, from a file of ASCII, so whatever charset the reader takes."""
    text = write(Format.PROPERTIES, given)
    assert text.isascii()
    assert read_properties(text) == {key: as_text(value) for key, value in given.items()}
    assert text.count("\n") == len(given)


# Several at a time, for one process of sh.
@settings(max_examples=100)
@given(st.lists(st.dictionaries(st.from_regex("K_[A-Za-z0-9_]{1,8}", fullmatch=True), values, max_size=6), max_size=6))
def test_dotenv(given: list[dict[str, Any]]) -> None:
    """A shell that reads the file has each variable with its very value, and runs nothing that is in it."""
    script: list[str] = []
    wanted: list[str] = []
    for one in given:
        kept = {key: as_text(value).replace("\0", "") for key, value in one.items()}
        script.append(write(Format.DOTENV, kept))
        script += [f"printf '%s\\0' \"${key}\"\n" for key in kept]
        wanted += kept.values()
    done = subprocess.run(["sh", "-eu"], input="".join(script).encode(), capture_output=True, env={}, check=True)
    assert done.stdout.decode().split("\0")[:-1] == wanted
    assert done.stderr == b""


@given(hard.map(lambda text: text.replace("\0", "")))
def test_a_shell_word_is_one_word(text: str) -> None:
    """Whatever is in it, quoting makes one argument of it."""
    assert shell_word(text)[0] == shell_word(text)[-1] == "'"
    assert shell_word(text)[1:-1].replace("'\\''", "").count("'") == 0


@pytest.mark.parametrize(
    ("form", "data", "told"),
    [
        (Format.DOTENV, {"fine": "1", "a-b": "x"}, 'key "a-b" cannot be written as dotenv: it is no variable'),
        (Format.DOTENV, {"A": "c4nary\0"}, 'key "A" cannot be written as dotenv: it holds a NUL'),
        (
            Format.DOTENV,
            {"A": "c4nary", "OPTIND": "c4nary"},
            'key "OPTIND" cannot be written as dotenv: it is a variable',
        ),
        (Format.DOTENV, {"UID": "0"}, 'key "UID" cannot be written as dotenv: it is a variable that shells keep'),
        (Format.TOML, {"a": {"b": [None]}}, 'key "b" cannot be written as toml: it is null'),
        (Format.TOML, {"big": 2**63}, 'key "big" cannot be written as toml: it is an integer of more than 64 bits'),
        (Format.TOML, ["c4nary"], "the data cannot be written as toml: it is not a map of keys"),
        (Format.PROPERTIES, "c4nary", "the data cannot be written as properties: it is not a map"),
        (Format.JSON, {"a": 1, "b": float("inf")}, 'key "b" cannot be written as json: it holds a number that is not'),
        (
            Format.YAML,
            {"a": 1, "b": [float("nan")]},
            'key "b" cannot be written as yaml: it holds a number that is not',
        ),
        (Format.DOTENV, {"A": 1, "B": float("inf")}, 'key "B" cannot be written as dotenv: it holds a number that is'),
        (Format.JSON, [float("inf")], "the data cannot be written as json: it holds a number that is not finite"),
        (Format.TOML, {"a": "1", "b": "c4nary\ud800"}, 'key "b" cannot be written as toml: it holds a character that'),
        (Format.JSON, {"a": "1", "\ud800": "c4nary"}, "cannot be written as json: it holds a character that is no"),
    ],
)
def test_what_a_format_cannot_hold_names_the_key(form: Format, data: Any, told: str) -> None:
    """The error says which key and why, and has nothing of a value."""
    with pytest.raises(Unwritable) as raised:
        write(form, data)
    assert told in describe(raised.value, form)
    assert "c4nary" not in describe(raised.value, form)
    assert raised.value.__context__ is None


@pytest.mark.parametrize("shell", [["sh"], ["bash", "--norc"], ["bash", "--posix", "--norc"]])
def test_variables_of_a_shell_are_refused_or_read_back(shell: list[str]) -> None:
    """Whatever variable the shell has of its own: a value for it is read as it was written, or is an error."""
    listed = subprocess.run(["bash", "--norc", "-c", "compgen -v"], capture_output=True, text=True, env={}, check=True)
    # Those that exist in some modes alone, or after the first command of a kind.
    names = {*listed.stdout.split(), "PIPESTATUS", "REPLY", "OPTARG", "OPTIND", "COPROC", "MAPFILE", "READLINE_LINE"}
    assert {"UID", "BASH_VERSINFO", "IFS"} <= names
    refused = set()
    for name in sorted(names):
        try:
            text = write(Format.DOTENV, {name: "7 'x'"})
        except Unwritable:
            refused.add(name)
            continue
        script = text + f"""printf '%s' "${name}"\n"""
        done = subprocess.run(shell, input=script, capture_output=True, text=True, env={})
        assert (done.stdout, done.stderr, done.returncode) == ("7 'x'", "", 0), name
    assert "IFS" not in refused
    assert {"UID", "PPID", "PIPESTATUS"} <= refused


@pytest.mark.parametrize("form", [Format.JSON, Format.YAML, Format.TOML, Format.PROPERTIES, Format.DOTENV])
def test_endless_nesting_is_refused(form: Format) -> None:
    """Data nested too deeply to be written is an error of the data, not a crash."""
    nested: Any = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(Unwritable, match="nested too deeply"):
        write(form, nested)


@pytest.mark.parametrize("form", [form for form in formats._WRITERS if form is not Format.JSON])
def test_no_keys_are_no_lines(form: Format) -> None:
    """A secret without keys is an empty file, or an empty map where the format has a word for it."""
    assert write(form, {}) == ("{}\n" if form is Format.YAML else "")


def test_pem_blocks_are_found_in_any_text() -> None:
    """Blocks come in their order, with their labels, whatever is around them."""
    text = "x\n-----BEGIN A B-----\nYQ==\n-----END A B-----\ny -----BEGIN C-----\nYg==\n-----END C-----"
    assert [label for label, _ in pem_blocks(text)] == ["A B", "C"]
    assert pem_blocks(text)[0][1] == "-----BEGIN A B-----\nYQ==\n-----END A B-----"
    assert pem_blocks("-----BEGIN A-----\nYQ==\n-----END B-----") == []


def test_blocks_that_do_not_end_are_passed_over() -> None:
    """A megabyte of beginnings is read once through, and the block behind them is found by itself."""
    block = "-----BEGIN A-----\nYQ==\n-----END A-----"
    assert pem_blocks("-----BEGIN A-----\n" * 60_000 + block) == [("A", block)]
    assert pem_blocks("-----BEGIN A-----\n" * 60_000) == []
