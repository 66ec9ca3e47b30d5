"""The ``objects`` parameter -> ObjectSpecs (docs/contract.md section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from provider.durations import read_duration
from provider.redact import Sensitive, one_line
from provider.settings import MAX_OBJECTS
from provider.spc import paths, yaml_text
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import Encoding, ObjectSpec, SecretRequest
from provider.spc.yaml_text import Mapping, Node, Scalar, Sequence

_T = TypeVar("_T")

FIELDS: Final = (
    "objectName",
    "secretPath",
    "secretKey",
    "method",
    "secretArgs",
    "filePermission",
    "encoding",
    "lease",
    "renewPercent",
    "refreshAfter",
)

_EXAMPLE: Final = 'add "- objectName: password" and below it its secretPath'
_MODES: Final = "write an octal number from 0000 to 0777, for example 0600"
# Characters of a duration; reading a megabyte of digits takes seconds.
_MAX_DURATION: Final = 64
# A proxy on the way takes CONNECT and TRACE for itself, and a browser asks OPTIONS: none of them means a secret.
_NO_METHODS: Final = frozenset({"CONNECT", "TRACE", "OPTIONS"})
_ENCODINGS: Final = {
    "utf-8": Encoding.UTF8,
    "utf8": Encoding.UTF8,
    "base64": Encoding.BASE64,
    "hex": Encoding.HEX,
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for the objects that say nothing of their own: see ObjectSpec's fields of these names."""

    mode: int
    renew_percent: float
    refresh_after: float


def parse_objects(text: str, defaults: Defaults, findings: Findings) -> tuple[ObjectSpec, ...]:
    """The objects in the order of the class. What is wrong goes to ``findings``; with a fault the answer is void."""
    try:
        node, more = yaml_text.read(text)
        items = _items(node)
    except Refused as refused:
        findings.fault("objects", refused.problem, refused.remedy)
        return ()
    if more:
        findings.warn("objects", "only the first YAML document is used, what follows it is ignored")
    read = [(index, _object(index, item, defaults, findings)) for index, item in enumerate(items)]
    named = [(index, spec) for index, spec in read if spec and spec.name]
    for upper, lower in paths.clashes([spec.name for _, spec in named]):
        (first, one), (second, other) = named[upper], named[lower]
        same = one.name == other.name
        findings.fault(
            f"objects[{first}] ({one_line(one.name, 80)})",
            f"objectName {'is also' if same else 'is a directory to'} objects[{second}] ({one_line(other.name, 80)})",
            "give each object a file of its own",
        )
    return tuple(spec for _, spec in read if spec)


def _items(node: Node | None) -> tuple[Node, ...]:
    if node is None or (isinstance(node, Scalar) and node.value is None):
        raise Refused("names no object", _EXAMPLE)
    if not isinstance(node, Sequence):
        raise Refused("is not a YAML list", "begin each object with a dash, as in - objectName: password")
    if not node.items:
        raise Refused("names no object", _EXAMPLE)
    if len(node.items) > MAX_OBJECTS:
        raise Refused(f"has {len(node.items)} objects, more than {MAX_OBJECTS}", "split the class")
    return node.items


def _object(index: int, node: Node, defaults: Defaults, findings: Findings) -> ObjectSpec | None:
    where = f"objects[{index}]"
    if isinstance(node, Mapping):
        return _Fields(where, node, findings).object(defaults)
    findings.fault(where, "is not a map of fields", _EXAMPLE)
    return None


class _Fields:
    """The fields of one object, each read by its kind; faults are noted where they are found."""

    def __init__(self, where: str, node: Mapping, findings: Findings) -> None:
        self._node = node
        self._findings = findings
        self._where = where
        name = node.entries.get("objectName")
        if isinstance(name, Scalar) and name.text and name.value is not None:
            self._where = f"{where} ({one_line(name.text, 80)})"

    def object(self, defaults: Defaults) -> ObjectSpec:
        """The object; its name is empty where it has no legal one."""
        for field, line in self._node.duplicates:
            self._fault(one_line(field, 80), f"is given twice, again in line {line}", "remove one")
        self._findings.unknown(self._where, "field", self._node.entries, FIELDS)
        name = self._required("objectName", paths.object_name, "name the file to write the secret to")
        target = self._required("secretPath", paths.secret_path, "name the API path, as secret/data/app")
        path, query = target or ("", ())
        return ObjectSpec(
            name=name or "",
            request=SecretRequest(self._optional("method", _method, "GET"), path, query, self._body()),
            key=self._text("secretKey") or None,
            mode=self._mode() or defaults.mode,
            encoding=self._optional("encoding", _encoding, Encoding.UTF8),
            fresh=self._optional("lease", _fresh, False),
            renew_percent=self._optional("renewPercent", _percent, defaults.renew_percent),
            refresh_after=self._optional("refreshAfter", duration, defaults.refresh_after),
        )

    def _fault(self, field: str, problem: str, remedy: str) -> None:
        self._findings.fault(f"{self._where} {field}", problem, remedy)

    def _scalar(self, field: str) -> Scalar | None:
        """The field's scalar; None if it is absent, null, or no scalar, which is noted."""
        node = self._node.entries.get(field)
        if node is None or (isinstance(node, Scalar) and node.value is None):
            return None
        if isinstance(node, Scalar):
            return node
        self._fault(field, f"is a {'list' if isinstance(node, Sequence) else 'map'}", "write one value")
        return None

    def _text(self, field: str) -> str:
        """The field as it is written, whatever YAML would read it as; "" where it is unset."""
        scalar = self._scalar(field)
        return scalar.text if scalar else ""

    def _optional(self, field: str, read: Callable[[str], _T], default: _T) -> _T:
        text = self._text(field)
        return self._findings.attempt(f"{self._where} {field} {show(text)}", read, text, default) if text else default

    def _required(self, field: str, read: Callable[[str], _T], remedy: str) -> _T | None:
        text = self._text(field)
        if not text:
            self._fault(field, "is missing", remedy)
            return None
        # A path's query is not shown: a secret may be a request's argument.
        where = f"{self._where} {field} {show(text.partition('?')[0])}"
        return self._findings.attempt(where, read, text, None)

    def _body(self) -> Sensitive[str] | None:
        node = self._node.entries.get("secretArgs")
        if node is None or (isinstance(node, Scalar) and node.value is None):
            return None
        try:
            return Sensitive(yaml_text.to_json(node))
        except Refused as refused:
            self._fault("secretArgs", refused.problem, refused.remedy)
            return None

    def _mode(self) -> int:
        """The mode; 0, which means the default, where it is unset too."""
        scalar = self._scalar("filePermission")
        if scalar is None or not scalar.text:
            return 0
        where = f"{self._where} filePermission"
        read = _mode_of_number if scalar.typed else _mode_of_digits
        mode = self._findings.attempt(f"{where} {show(scalar.text)}", read, scalar.text, 0)
        # Decimal 420 is how Kubernetes writes 0644; 400 is most likely 0400 without its zero.
        if scalar.typed and mode and re.fullmatch("[4-7][04-7]{2}", scalar.text):
            self._findings.warn(
                where,
                f"{scalar.text} is decimal and means mode {mode:04o}; if 0{scalar.text} is meant, write that",
            )
        return mode


def _mode_of_digits(text: str) -> int:
    """The mode of a quoted ``filePermission``: octal, with or without 0 or 0o before it."""
    found = re.fullmatch("(?:0o)?([0-7]{1,20})", text)
    if not found or int(found[1], 8) > 0o777:
        raise Refused("is not a file mode", _MODES)
    return int(found[1], 8)


def _mode_of_number(text: str) -> int:
    """The mode of a plain ``filePermission``: the number that YAML reads."""
    number = yaml_text.resolve(text)
    # A boolean is an int to Python.
    if type(number) is not int or number < 0:
        raise Refused("is not a file mode", _MODES)
    if number > 0o777:
        meant = f"write 0{text}, if that is meant" if re.fullmatch("[0-7]{3}", text) else _MODES
        raise Refused(f"is 0{number:o} in octal, over 0777", meant)
    return number


def _method(text: str) -> str:
    if not re.fullmatch("[A-Za-z]{1,32}", text):
        raise Refused("is not an HTTP method", "write GET, POST, PUT or another method, letters only")
    method = text.upper()
    if method in _NO_METHODS:
        raise Refused("is no method that Vault answers with a secret", "write GET, LIST, POST, PUT or leave it out")
    return method


def _encoding(text: str) -> Encoding:
    try:
        return _ENCODINGS[text.lower()]
    except KeyError:
        raise Refused("is not an encoding", "write utf-8, base64 or hex") from None


def _fresh(text: str) -> bool:
    if text not in ("keep", "fresh"):
        raise Refused("is neither keep nor fresh", "write fresh for what is to be issued on every mount")
    return text == "fresh"


def _percent(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", text) or not 1 <= float(text) <= 99:
        raise Refused("is not a number from 1 to 99", "write a number like 67")
    return float(text)


def duration(text: str) -> float:
    """Seconds of a duration as Go writes them. Raises Refused."""
    if len(text) > _MAX_DURATION:
        raise Refused("is not a duration", "write a duration like 90s, 2m, 1h30m or 300ms")
    try:
        return read_duration(text)
    except ValueError as error:
        raise Refused("is not a duration", f"write {error}") from None
