"""The YAML of ``objects`` -> nodes that keep their text, within limits, read as Go's yaml.v3 would.

PyYAML's own constructors follow YAML 1.1 (``yes`` is a boolean, ``2024-01-01`` a date) and forget how a scalar was
written, so values are built here from its events: iteratively, and counted as their aliases would expand, so that
neither nesting nor a "billion laughs" costs more than its own text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import yaml

from provider.settings import MAX_YAML_DEPTH, MAX_YAML_NODES
from provider.spc.findings import Refused

# Characters of all scalars, as JSON has them, after aliases are followed: a class in etcd (1.5 MiB at most) that is all
# text, nearly. This bounds what one request body can grow to.
MAX_YAML_TEXT: Final = 1024 * 1024
# The parser compares each %TAG directive with all before it; nobody writes more than one or two.
_MAX_TAG_DIRECTIVES: Final = 16

_CORE: Final = "tag:yaml.org,2002:"
# What a scalar's tag says of its value's type. !!binary stays the text that was written.
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    f"{_CORE}int": (int,),
    f"{_CORE}float": (int, float),
    f"{_CORE}bool": (bool,),
    f"{_CORE}null": (type(None),),
}
_TEXT_TAGS: Final = ("!", f"{_CORE}str", f"{_CORE}binary")

_NULLS: Final = ("", "~", "null", "Null", "NULL")
_WORDS: Final[dict[str, float | bool | None]] = {
    **dict.fromkeys(_NULLS),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INTEGER: Final = re.compile(
    r"(?P<sign>[-+]?)(?:0[xX](?P<hex>[0-9a-fA-F]+)|0[bB](?P<bin>[01]+)|0[oO]?(?P<oct>[0-7]+)|(?P<dec>0|[1-9][0-9]*))",
    re.ASCII,
)
_BASES: Final = {"hex": 16, "bin": 2, "oct": 8, "dec": 10}
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
# Far more digits than any number that fits 64 bits; longer texts never reach the conversion to int.
_MAX_DIGITS: Final = 80

Value: TypeAlias = str | int | float | bool | None


# Nodes are not frozen: a class has dozens to ten thousands of them, and a frozen one takes several times as long to
# make. Nothing changes one once it is read, and they are gone when the class is.
@dataclass(slots=True)
class Scalar:
    """One scalar. ``typed`` says that YAML may read it as something else than a string: plain, or tagged so."""

    text: str = field(repr=False)
    typed: bool
    line: int

    @property
    def value(self) -> Value:
        """What YAML reads it as; a float may be infinite or NaN."""
        return resolve(self.text) if self.typed else self.text

    @property
    def null(self) -> bool:
        """Whether YAML reads it as no value at all."""
        return self.typed and self.text in _NULLS


@dataclass(slots=True)
class Sequence:
    """A list of nodes; an alias is the very node that it names."""

    items: tuple[Node, ...] = field(repr=False)
    line: int


@dataclass(slots=True)
class Mapping:
    """Nodes by the text of their keys, merge keys (``<<``) followed.

    ``duplicates`` are the keys that are given twice, with the line of the later one, which is not in ``entries``.
    """

    entries: dict[str, Node] = field(repr=False)
    duplicates: tuple[tuple[str, int], ...] = field(repr=False)
    line: int


Node: TypeAlias = Scalar | Sequence | Mapping


def resolve(text: str) -> Value:
    """What Go's yaml.v3 makes of a plain scalar where any type is welcome.

    YAML 1.2's words for true, false and null; integers of 64 bits in decimal, 0x, 0b, 0o and the older 0-octal, with
    underscores; floats; everything else, dates too, is the text itself.
    """
    if text in _WORDS:
        return _WORDS[text]
    first = text[0]
    if first not in "+-.0123456789":
        return text
    plain = text if first == "." else text.replace("_", "")
    if len(plain) <= _MAX_DIGITS and (found := _INTEGER.fullmatch(plain)):
        base = str(found.lastgroup)
        number = int(found["sign"] + found[base], _BASES[base])
        if -(2**63) <= number < 2**64:
            return number
    if _FLOAT.fullmatch(plain):
        real = float(plain)
        # Go refuses what a float64 cannot hold, and leaves it a string.
        return text if real in (float("inf"), float("-inf")) else real
    return text


def read(text: str) -> tuple[Node | None, bool]:
    """The first document of ``text`` (None if there is none), and whether anything follows it.

    Raises Refused, naming the line, never the content: a password that lacks its quotes may be anywhere.
    """
    if text.count("%TAG") > _MAX_TAG_DIRECTIVES:
        raise Refused("has too many %TAG directives", "remove them")
    # Without libyaml (a source build) the pure parser reads the same, slower.
    loading: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        loader = loading(text)
        try:
            return _Builder().first_document(loader), _more(loader)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = _where(error)
    except yaml.YAMLError:
        problem = "holds a character that YAML does not allow"
    # Out here, where the parser's error, which may quote the text, does not go along.
    raise Refused(problem, "check indentation and quotes")


def _where(error: yaml.MarkedYAMLError) -> str:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    # The pure parser quotes the author's words; a quoted character or two says what is missing.
    problem = re.sub(r"'[^'\s]{3,}'|\"[^\"\s]{3,}\"", "…", str(error.problem))
    return f"line {line}: is not YAML, {problem}"


def _more(loader: Any) -> bool:
    """Whether a document follows, even a broken one: yaml.v3 never reads so far."""
    try:
        return isinstance(loader.get_event(), yaml.DocumentStartEvent)
    except yaml.YAMLError:
        return True


class _Open:
    """A collection that has begun and not ended."""

    __slots__ = ("anchor", "duplicates", "entries", "height", "items", "key", "line", "merge", "size")

    def __init__(self, line: int, anchor: str | None, size: tuple[int, int], *, mapping: bool) -> None:
        self.line = line
        self.anchor = anchor
        self.size = size
        self.height = 0
        self.items: list[Node] = []
        self.entries: dict[str, Node] | None = {} if mapping else None
        self.duplicates: list[tuple[str, int]] = []
        self.key: Scalar | None = None
        self.merge: Node | None = None


@dataclass(frozen=True, slots=True)
class _Anchored:
    """A node that an alias can name, and what following the alias adds."""

    node: Node
    nodes: int
    chars: int
    height: int


class _Builder:
    """Events in, one tree of nodes out."""

    def __init__(self) -> None:
        self._root: Node | None = None
        self._open: list[_Open] = []
        # None while the anchored collection is still open: an alias to it would contain itself.
        self._anchors: dict[str, _Anchored | None] = {}
        self._nodes = 0
        self._chars = 0

    def first_document(self, loader: Any) -> Node | None:
        """The document that begins next, read to its end; None if there is none. Raises Refused."""
        take = {
            yaml.ScalarEvent: self._scalar,
            yaml.AliasEvent: self._alias,
            yaml.SequenceStartEvent: self._start,
            yaml.MappingStartEvent: self._start,
            yaml.SequenceEndEvent: self._end,
            yaml.MappingEndEvent: self._end,
        }
        for event in iter(loader.get_event, None):
            kind = type(event)
            if kind in take:
                take[kind](event)
            elif kind is yaml.DocumentEndEvent:
                break
        return self._root

    def _count(self, nodes: int, chars: int, line: int) -> None:
        self._nodes += nodes
        self._chars += chars
        if self._nodes > MAX_YAML_NODES:
            raise Refused(f"line {line}: has more than {MAX_YAML_NODES} values, aliases followed", "split the class")
        if self._chars > MAX_YAML_TEXT:
            raise Refused(f"line {line}: has more than {MAX_YAML_TEXT} characters, aliases followed", "split the class")

    def _scalar(self, event: Any) -> None:
        line = event.start_mark.line + 1
        text: str = event.value
        # A request's body is made of these as JSON, where a control character takes six.
        chars = len(text) if text.isprintable() else len(json.dumps(text, ensure_ascii=False))
        self._count(1, chars, line)
        # implicit[0]: written plain, so its type is told from its text.
        typed = event.implicit[0] if event.tag is None else _is_typed(event, line)
        scalar = Scalar(text, typed, line)
        if event.anchor:
            self._anchors[event.anchor] = _Anchored(scalar, 1, chars, 0)
        self._add(scalar, 0)

    def _alias(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if event.anchor not in self._anchors:
            raise Refused(f"line {line}: an alias (*name) names no anchor (&name)", "quote a value that begins with *")
        anchored = self._anchors[event.anchor]
        if anchored is None:
            raise Refused(f"line {line}: an alias (*name) contains itself", "write the value out")
        self._count(anchored.nodes, anchored.chars, line)
        if len(self._open) + anchored.height > MAX_YAML_DEPTH:
            raise _too_deep(line)
        self._add(anchored.node, anchored.height)

    def _start(self, event: Any) -> None:
        line = event.start_mark.line + 1
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{_CORE}map" if mapping else f"{_CORE}seq"):
            raise _unknown_tag(line)
        if len(self._open) >= MAX_YAML_DEPTH:
            raise _too_deep(line)
        self._open.append(_Open(line, event.anchor, (self._nodes, self._chars), mapping=mapping))
        self._count(1, 0, line)
        if event.anchor:
            self._anchors[event.anchor] = None

    def _end(self, _: Any) -> None:
        done = self._open.pop()
        items = tuple(done.items)
        node = Sequence(items, done.line) if done.entries is None else _merged(done.entries, done)
        height = done.height + 1
        if done.anchor:
            nodes, chars = self._nodes - done.size[0], self._chars - done.size[1]
            self._anchors[done.anchor] = _Anchored(node, nodes, chars, height)
        self._add(node, height)

    def _add(self, node: Node, height: int) -> None:
        if not self._open:
            self._root = node
            return
        top = self._open[-1]
        if height > top.height:
            top.height = height
        if top.entries is None:
            top.items.append(node)
        elif top.key is None:
            if not isinstance(node, Scalar):
                raise Refused(f"line {node.line}: a key is a list or a map", "write a plain word before the colon")
            top.key = node
        else:
            _set(top, top.entries, top.key, node)
            top.key = None


def _set(top: _Open, entries: dict[str, Node], key: Scalar, node: Node) -> None:
    merge = key.typed and key.text == "<<"
    if (top.merge is not None) if merge else (key.text in entries):
        top.duplicates.append((key.text, key.line))
    elif merge:
        top.merge = node
    else:
        entries[key.text] = node


def _merged(own: dict[str, Node], done: _Open) -> Mapping:
    """The mapping with what ``<<`` brings in: own keys win, then earlier maps of the list over later ones."""
    if done.merge is None:
        return Mapping(own, tuple(done.duplicates), done.line)
    sources = done.merge.items if isinstance(done.merge, Sequence) else (done.merge,)
    entries = dict(own)
    duplicates = list(done.duplicates)
    for source in sources:
        if not isinstance(source, Mapping):
            raise Refused(f"line {done.line}: << merges what is no map", "give it a map, or a list of maps")
        for key, node in source.entries.items():
            entries.setdefault(key, node)
        duplicates.extend(source.duplicates)
    return Mapping(entries, tuple(duplicates), done.line)


def _is_typed(event: Any, line: int) -> bool:
    """Whether a scalar that has a tag is typed. Raises Refused."""
    tag = event.tag
    if tag in _TEXT_TAGS:
        return False
    if tag not in _TYPES:
        raise _unknown_tag(line)
    if type(resolve(event.value)) not in _TYPES[tag]:
        raise Refused(f"line {line}: a value is not of the type that its tag (!!) says", "remove the tag")
    return True


def _unknown_tag(line: int) -> Refused:
    return Refused(f"line {line}: a tag (!name) is not known", "quote a value that begins with !")


def _too_deep(line: int) -> Refused:
    return Refused(f"line {line}: is nested more than {MAX_YAML_DEPTH} deep", "flatten it")


def to_json(node: Node) -> str:
    """``node`` as canonical JSON: keys sorted, no spaces, text as it is. Raises Refused, naming lines only."""
    return json.dumps(_plain(node), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(node: Node) -> Any:
    # Recursion is safe: the builder allows MAX_YAML_DEPTH levels, aliases followed.
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    if isinstance(node, Mapping):
        if node.duplicates:
            raise Refused(f"line {node.duplicates[0][1]}: a key is given twice", "remove one")
        return {key: _plain(item) for key, item in node.entries.items()}
    value = node.value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise Refused(f"line {node.line}: a number is not finite, which JSON has not", "quote it to send the word")
        # As Go writes it: Vault takes 8, but not 8.0, where it wants an integer.
        if value.is_integer() and abs(value) < 1e21:
            return int(value)
    return value
