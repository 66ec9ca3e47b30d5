"""The parser keeps what it has parsed: the same answer, within bounds, and without the text."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from provider.errors import InvalidClass
from provider.settings import Settings
from provider.spc import MountSpec, Parser
from provider.spc.objects import parse_objects
from tests.spc_classes import attributes


def mount(parser: Parser, objects: str, permission: str = "420") -> MountSpec:
    return parser.parse(attributes(objects), "null", "/target", permission)


def numbered(n: int) -> str:
    return f"- {{objectName: a{n}, secretPath: b, typo: x}}"


def is_kept(parser: Parser, spec: MountSpec, objects: str) -> bool:
    """Whether the objects come from what was parsed for ``spec``: the very same ones."""
    return mount(parser, objects).objects is spec.objects


def test_objects_are_parsed_once() -> None:
    """A re-mount gets the very objects of the mount before, with the same warnings."""
    parser = Parser(Settings())
    first = mount(parser, numbered(0))
    second = mount(parser, numbered(0))
    assert second.objects is first.objects
    assert second == first
    assert second.warnings == ('objects[0] (a0): unknown field "typo" is ignored',)


def recall(parser: Parser, given: str) -> MountSpec | None:
    return parser.recall(given, "null", "/target", "420")


def test_a_class_is_recalled_once_it_was_parsed() -> None:
    """Before that there is nothing to recall; then it is the mount that parsing gives, with its own parameters."""
    parser = Parser(Settings())
    given = attributes(numbered(0), roleName="a")
    assert recall(parser, given) is None
    parsed = parser.parse(given, "null", "/target", "420")
    assert recall(parser, given) == parsed
    other = recall(parser, attributes(numbered(0), roleName="b"))
    assert other is not None
    assert (other.login.role, other.objects is parsed.objects) == ("b", True)


def test_a_refused_class_is_recalled_as_refused() -> None:
    """With the faults that it had."""
    parser = Parser(Settings())
    given = attributes("- {objectName: a}")
    with pytest.raises(InvalidClass) as first:
        parser.parse(given, "null", "/target", "420")
    with pytest.raises(InvalidClass) as second:
        recall(parser, given)
    assert str(second.value) == str(first.value)


@pytest.mark.parametrize("more", [{"typo": "x" * 70_000}, {f"typo{n}": "x" for n in range(40)}])
def test_what_may_take_long_is_not_recalled(more: dict[str, str]) -> None:
    """Many or long attributes are read where they hold nobody up, known class or not."""
    parser = Parser(Settings())
    mount(parser, numbered(0))
    assert recall(parser, attributes(numbered(0))) is not None
    assert recall(parser, attributes(numbered(0), **more)) is None


def test_another_text_or_permission_is_another_class() -> None:
    """Nothing less than both makes two classes the same."""
    parser = Parser(Settings())
    assert mount(parser, numbered(0)).objects[0].name == "a0"
    assert mount(parser, numbered(1)).objects[0].name == "a1"
    assert mount(parser, numbered(0), "256").objects[0].mode == 0o400
    assert mount(parser, numbered(0)).objects[0].mode == 0o644


def test_parameters_are_never_kept() -> None:
    """The same objects under another role are another mount."""
    parser = Parser(Settings())
    assert parser.parse(attributes(roleName="a"), "null", "/t", "420").login.role == "a"
    assert parser.parse(attributes(roleName="b"), "null", "/t", "420").login.role == "b"


def test_a_refused_class_is_refused_again() -> None:
    """With the same faults, and it takes no place of one that is right."""
    parser = Parser(Settings())
    kept = mount(parser, numbered(0))
    messages = set()
    for n in range(300):
        with pytest.raises(InvalidClass) as refused:
            mount(parser, "- {objectName: ../a, secretPath: b}" + " " * n)
        messages.add(str(refused.value))
    assert len(messages) == 1
    assert is_kept(parser, kept, numbered(0))


def test_a_refused_class_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubelet asks for it again and again, and reading it may take a second: its faults are kept, and bounded."""
    read: list[str] = []

    def counting(text: str, *others: Any) -> Any:
        read.append(text)
        return parse_objects(text, *others)

    monkeypatch.setattr("provider.spc.parser.parse_objects", counting)
    parser = Parser(Settings())
    faulty = [f"- {{objectName: ../a{n}, secretPath: b}}" for n in range(100)]
    messages = []
    for text in (faulty[0], faulty[0], *faulty[1:], faulty[0], faulty[99]):
        with pytest.raises(InvalidClass) as refused:
            mount(parser, text)
        messages.append(str(refused.value))
    assert messages[0] == messages[1] == messages[-2]
    assert read == [*faulty, faulty[0]]
    assert len(parser._faulty._entries) == 64


def test_the_number_of_classes_is_bounded() -> None:
    """256 are kept; then the one least recently mounted goes."""
    parser = Parser(Settings())
    specs = [mount(parser, numbered(n)) for n in range(256)]
    assert is_kept(parser, specs[0], numbered(0))
    mount(parser, numbered(256))
    assert is_kept(parser, specs[0], numbered(0))
    assert is_kept(parser, specs[2], numbered(2))
    assert not is_kept(parser, specs[1], numbered(1))


@pytest.mark.parametrize(
    "fields",
    ["secretArgs: '{}'", "secretPath: '{}'", "secretPath: 'b?q={}'", "secretKey: '{}'", "? '{}' : x"],
    ids=["body", "path", "query", "key", "unknown field"],
)
def test_the_size_of_classes_is_bounded(fields: str) -> None:
    """Of large classes fewer are kept: nine of a megabyte are more than 8 MiB, wherever the text is.

    A warning is cut short, so a class whose text is in a field that nobody knows is small once parsed.
    """
    parser = Parser(Settings())
    large = [
        f"- {{objectName: a, secretPath: b, n: {n}, {fields.format('x' * 1_000_000)}}}".replace(
            "secretPath: b, " if "secretPath: '" in fields else "", ""
        )
        for n in range(9)
    ]
    specs = [mount(parser, text) for text in large]
    assert is_kept(parser, specs[8], large[8])
    assert is_kept(parser, specs[0], large[0]) is fields.startswith("?")


def test_the_text_is_not_kept() -> None:
    """What the class was written in, which may hold a secret, is let go; bodies stay as Sensitive."""
    parser = Parser(Settings())
    marker = "x" * 20 + "-marker-of-this-test"
    mount(parser, f"- {{objectName: a, secretPath: b, secretArgs: {{pin: {marker}}}}}")
    reached = gc.get_referents(parser._good, parser._faulty)
    texts: list[str] = []
    seen: set[int] = set()
    while reached:
        thing = reached.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, str):
            texts.append(thing)
        reached.extend(gc.get_referents(thing))
    assert [text for text in texts if marker in text] == [f'{{"pin":"{marker}"}}']


def test_threads_may_parse_at_once() -> None:
    """Many threads over more classes than are kept get each its own, and the bound holds."""
    parser = Parser(Settings())
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(300):
            n = (start + step * 7) % 300
            if mount(parser, numbered(n)).objects[0].name != f"a{n}":
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(parser._good._entries) == 256
    assert parser._good._size == sum(size for _, size in parser._good._entries.values())
