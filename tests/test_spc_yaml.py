"""YAML as Go's yaml.v3 reads it, within limits: docs/contract.md section 2."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from provider.settings import MAX_YAML_DEPTH, MAX_YAML_NODES
from provider.spc.findings import Refused
from provider.spc.yaml_text import MAX_YAML_TEXT, Mapping, Scalar, read, resolve, to_json


def json_of(text: str) -> str:
    node, _ = read(text)
    assert node is not None
    return to_json(node)


def refusal(text: str) -> str:
    with pytest.raises(Refused) as refused:
        read(text)
    return refused.value.problem


# --- scalars ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("Null", None),
        ("nULL", "nULL"),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("False", False),
        ("yes", "yes"),
        ("y", "y"),
        ("0", 0),
        ("-0", 0),
        ("00", 0),
        ("0o7", 7),
        ("0O7", 7),
        ("-0X1f", -31),
        ("+0B1", 1),
        ("0600", 0o600),
        ("0_6_0_0", 0o600),
        ("1_", 1),
        ("_1", "_1"),
        ("08", 8.0),
        ("0x", "0x"),
        ("0xg", "0xg"),
        ("1__0", 10),
        ("9223372036854775807", 2**63 - 1),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", float(2**64)),
        ("-9223372036854775808", -(2**63)),
        ("-9223372036854775809", -float(2**63)),
        ("0x10000000000000000", "0x10000000000000000"),
        ("0" * 100 + "1", 1.0),
        ("1.5e-3", 0.0015),
        ("1e400", "1e400"),
        ("-1e400", "-1e400"),
        ("._5", "._5"),
        ("1_0.5", 10.5),
        (".", "."),
        ("-", "-"),
        ("+", "+"),
        ("1.2.3", "1.2.3"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("\u0661", "\u0661"),
        ("1\u0661", "1\u0661"),
        ("<<", "<<"),
        (".inf", float("inf")),
        ("+.Inf", float("inf")),
        ("-.INF", -float("inf")),
        (".iNF", ".iNF"),
    ],
)
def test_a_plain_scalar_has_the_type_that_go_gives_it(text: str, value: object) -> None:
    """Words, integers and floats of yaml.v3; all else is text."""
    found = resolve(text)
    assert found == value
    assert type(found) is type(value)


@given(st.text("+-._0123456789abcdefxXobBOnNeEiI~ ", max_size=12))
def test_any_scalar_resolves(text: str) -> None:
    """Whatever is written comes to one of JSON's types, and text stays what it was."""
    value = resolve(text)
    assert value is None or isinstance(value, (str, int, float))
    if isinstance(value, str):
        assert value == text


def test_a_scalar_knows_whether_it_was_plain() -> None:
    """Quotes and !!str make text of anything; a type's tag makes a type of quoted text."""
    text = "[600, '600', \"600\", !!str 600, !!int '600', ! 600, !!binary 600, !!float 600, !!null ~, !!bool 'true']"
    assert json_of(text) == '[600,"600","600","600",600,"600","600",600,null,true]'


def test_a_block_scalar_is_text() -> None:
    """Literal and folded text is never typed."""
    assert json_of("- |\n  600\n- >-\n  true\n") == '["600\\n","true"]'


@pytest.mark.parametrize(
    "text", ["!!int x", "!!int 1.5", "!!float x", "!!bool yes", "!!bool 1", "!!null x", '!!int "true"', "!!int ~"]
)
def test_a_value_that_is_not_of_its_tags_type_is_refused(text: str) -> None:
    """The fault tells the line, not the value."""
    assert refusal(f"\n{text}") == "line 2: a value is not of the type that its tag (!!) says"


@pytest.mark.parametrize(
    "text",
    [
        "!hunter2",
        "!hunter2 a",
        "!!timestamp 2024-01-01",
        "!!python/object:os.system a",
        "!!set {a}",
        "!x {a: b}",
        "!!map []",
        "!!seq {}",
        "!<tag:yaml.org,2002:merge> a",
    ],
)
def test_an_unknown_tag_is_refused(text: str) -> None:
    """Nothing is ever constructed by a tag; an unquoted password that begins with ! is not repeated."""
    assert refusal(f"\n- {text}") == "line 2: a tag (!name) is not known"


# --- structure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a", "line 2: is not YAML, did not find expected ',' or ']'"),
        ("a:\n\t- b", "line 2: is not YAML"),
        ("a: 'b", "line 1: is not YAML"),
        ("a: b: c", "line 1: is not YAML"),
        ("a: %b", "line 1: is not YAML"),
        ("a: @b", "line 1: is not YAML"),
        ("%YAML 3.0\n--- a", "line 1: is not YAML"),
        ("a: \0", "holds a character that YAML does not allow"),
        ("a: \x1b", "holds a character that YAML does not allow"),
    ],
)
def test_what_is_no_yaml_is_refused(text: str, problem: str) -> None:
    """The fault names the line and the parser's words."""
    assert refusal(text).startswith(problem)


def test_a_parser_error_repeats_nothing_of_the_text() -> None:
    """What the parser quotes is left out, with libyaml and without."""
    for text in (
        "a: !hunter2!x b",
        "a: 'hunter2",
        "&hunter2 [a",
        "[&hunter2 &hunter2 a",
        "%TAG !hunter2! a\n%TAG !hunter2! b\n--- a",
    ):
        with pytest.MonkeyPatch.context() as patch:
            assert "hunter2" not in refusal(text)
            patch.delattr(yaml, "CSafeLoader")
            assert "hunter2" not in refusal(text)


@pytest.mark.parametrize("text", ["? [a]\n: b", "? {a: b}\n: c", "{[a]: b}", "- &k [a]\n- {*k : b}"])
def test_a_key_that_is_no_scalar_is_refused(text: str) -> None:
    """A name is a word."""
    assert "a key is a list or a map" in refusal(text)


def test_keys_are_their_text() -> None:
    """Whatever type YAML gives a key, and through an alias too."""
    assert json_of("[&k 01, {*k : a, 'b': c, ~: d}]") == '[1,{"01":"a","b":"c","~":"d"}]'


def test_a_duplicate_is_told_by_text_and_line() -> None:
    """The first one is kept; a quoted key is the same as a plain one."""
    node, _ = read('a: 1\n"a": 2\nb: 3\na: 4\n')
    assert isinstance(node, Mapping)
    assert node.duplicates == (("a", 2), ("a", 4))
    assert [item.text for item in node.entries.values() if isinstance(item, Scalar)] == ["1", "3"]


def test_the_first_document_is_read() -> None:
    """And whether more follows; none at all is None."""
    assert read("") == (None, False)
    assert read("# only a comment") == (None, False)
    node, more = read("--- a\n--- b\n")
    assert isinstance(node, Scalar)
    assert (node.text, more) == ("a", True)
    assert read("a\n...\n")[1] is False
    assert read("[a] b")[1] is True


# --- anchors and merges -----------------------------------------------------------------------------------


def test_aliases_repeat_what_they_name() -> None:
    """Scalars, lists and maps; an anchor given again names the later node."""
    assert (
        json_of("[&a 1, *a, &b [x], *b, &c {k: *b}, *c, &a 2, *a]") == '[1,1,["x"],["x"],{"k":["x"]},{"k":["x"]},2,2]'
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[&d {a: 1, b: 2}, {<<: *d, b: 3}]", '[{"a":1,"b":2},{"a":1,"b":3}]'),
        ("[&d {a: 1, b: 2}, {b: 3, <<: *d}]", '[{"a":1,"b":2},{"a":1,"b":3}]'),
        ("[&d {a: 1}, &e {a: 2, b: 2}, {<<: [*d, *e], c: 3}]", '[{"a":1},{"a":2,"b":2},{"a":1,"b":2,"c":3}]'),
        ("{<<: {a: 1}, b: 2}", '{"a":1,"b":2}'),
        ("{<<: {<<: {a: 1}, b: 2}}", '{"a":1,"b":2}'),
        ("{<<: []}", "{}"),
        ('{"<<": {a: 1}}', '{"<<":{"a":1}}'),
        ("{!!str <<: {a: 1}}", '{"<<":{"a":1}}'),
    ],
)
def test_merge_keys_bring_in_maps(text: str, expected: str) -> None:
    """Own keys win, then earlier maps of a list; only the plain key merges."""
    assert json_of(text) == expected


@pytest.mark.parametrize("text", ["{<<: a}", "{<<: [{a: b}, c]}", "{<<: [[]]}", "{<<: ~}"])
def test_a_merge_of_what_is_no_map_is_refused(text: str) -> None:
    """As yaml.v3 refuses it."""
    assert refusal(text) == "line 1: << merges what is no map"


def test_two_merge_keys_are_a_duplicate() -> None:
    """So are the duplicates of a map that is merged in."""
    for text in ("{<<: {a: 1}, <<: {b: 2}}", "{<<: {a: 1, a: 2}}"):
        node, _ = read(text)
        assert isinstance(node, Mapping)
        assert len(node.duplicates) == 1


def test_an_alias_without_anchor_is_refused() -> None:
    """An unquoted password that begins with * is not repeated."""
    assert refusal("[a, *hunter2]") == "line 1: an alias (*name) names no anchor (&name)"


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: [*a]}", "[&a x, &a [*a]]", "&a {<<: *a}"])
def test_an_alias_inside_what_it_names_is_refused(text: str) -> None:
    """No value contains itself."""
    assert refusal(text) == "line 1: an alias (*name) contains itself"


# --- limits -----------------------------------------------------------------------------------------------


def test_values_are_counted() -> None:
    """MAX_YAML_NODES values are read, and not one more."""
    assert read("[" + "a," * (MAX_YAML_NODES - 1) + "]")[0] is not None
    assert "has more than 50000 values" in refusal("[" + "a," * MAX_YAML_NODES + "]")


def test_values_are_counted_as_aliases_expand() -> None:
    """An alias counts as all that it names: 99 values of a hundred nodes and one of 99 make the limit."""
    anchored = "&a [" + "x," * 99 + "]"
    full = f"[{anchored}," + "*a," * 498 + "[" + "x," * 98 + "]]"
    assert read(full)[0] is not None
    assert "has more than 50000 values" in refusal(full[:-1] + ", x]")


def test_text_is_counted_as_aliases_expand() -> None:
    """MAX_YAML_TEXT characters are read, and not one more."""
    half = "x" * (MAX_YAML_TEXT // 2)
    assert read(f"[&a {half}, *a]")[0] is not None
    assert "has more than 1048576 characters" in refusal(f"[&a {half}, *a, x]")
    assert "has more than 1048576 characters" in refusal(f"[&a [{half}, {half}], *a]")


def test_text_is_counted_as_json_has_it() -> None:
    """A control character takes six characters in a request's body, so that aliases of few of them are megabytes."""
    anchored = '[&a "' + "\\x01" * 1000 + '", '
    assert read(anchored + "*a," * 173 + "]")[0] is not None
    assert "has more than 1048576 characters" in refusal(anchored + "*a," * 174 + "]")


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ("{a: ", "}")])
def test_nesting_is_bounded(start: str, end: str) -> None:
    """MAX_YAML_DEPTH levels are read, and not one more."""
    assert read(start * MAX_YAML_DEPTH + end * MAX_YAML_DEPTH)[0] is not None
    assert "is nested more than 64 deep" in refusal(start * (MAX_YAML_DEPTH + 1) + end * (MAX_YAML_DEPTH + 1))


def test_nesting_is_bounded_as_aliases_expand() -> None:
    """An alias is as deep as what it names: 32 levels in 32 are read, and not one more."""
    anchored = "&a [" + "[" * 31 + "]" * 31 + ", x]"
    assert read(f"[{anchored}, " + "[" * 31 + "*a" + "]" * 31 + "]")[0] is not None
    assert "is nested more than 64 deep" in refusal(f"[{anchored}, " + "[" * 32 + "*a" + "]" * 32 + "]")


def test_tag_directives_are_bounded() -> None:
    """The parser compares each with all before it."""
    assert read("".join(f"%TAG !a{n}! tag:x\n" for n in range(16)) + "--- a")[0] is not None
    assert "too many %TAG" in refusal("".join(f"%TAG !a{n}! tag:x\n" for n in range(17)) + "--- a")


# --- without libyaml --------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text("ab\u00e9'\":{}[],&*!%@`#-? \n\\~<|>"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc: \n-", max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(values, st.booleans())
def test_what_yaml_writes_is_read_back(value: object, flow: bool) -> None:
    """Whatever style PyYAML's writer chooses, the same JSON comes out, with libyaml and without."""
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert json_of(text) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(yaml, "CSafeLoader")
        assert json_of(text) == expected
