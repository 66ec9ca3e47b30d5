"""The fields of one YAML map, each read by its kind; faults are noted where they are found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from provider.notation import BOOLEANS
from provider.redact import Sensitive, one_line
from provider.spc import paths, yaml_text
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import SecretRequest
from provider.spc.yaml_text import Mapping, Scalar
from provider.spc.yaml_text import Sequence as List

_T = TypeVar("_T")

# A proxy on the way takes CONNECT and TRACE for itself, a browser asks OPTIONS, and HEAD has no body, which its answer
# nevertheless has a length of: none of them means a secret.
_NO_METHODS: Final = frozenset({"CONNECT", "TRACE", "OPTIONS", "HEAD"})


class Entries:
    """One map of the class. ``where`` is how faults name it; fields that are not ``known`` are warned of."""

    def __init__(self, where: str, node: Mapping, findings: Findings, known: Sequence[str]) -> None:
        self.where = where
        self.findings = findings
        self._node = node
        # Of the dozen and a half fields that an object may have, most do not say anything: told once, for all.
        self._said = {
            field: value
            for field, value in node.entries.items()
            if not isinstance(value, Scalar) or (value.text and not value.null)
        }
        self._told: set[str] = set()
        for field, line in node.duplicates:
            self.fault(one_line(field, 80), f"is given twice, again in line {line}", "remove one")
        findings.unknown(where, "field", node.entries, known)

    def fault(self, field: str, problem: str, remedy: str) -> None:
        """Note a fault of a field."""
        self.findings.fault(f"{self.where} {field}", problem, remedy)

    def has(self, field: str) -> bool:
        """Whether the field says anything: it is there, and neither null nor empty."""
        return field in self._said

    def scalar(self, field: str) -> Scalar | None:
        """The field's scalar; None if it does not say anything, or is no scalar, which is noted."""
        node = self._said.get(field)
        if node is None or isinstance(node, Scalar):
            return node
        # A field that decides on the shape is looked at more than once.
        if field not in self._told:
            self._told.add(field)
            self.fault(field, f"is a {'list' if isinstance(node, List) else 'map'}", "write one value")
        return None

    def text(self, field: str) -> str:
        """The field as it is written, whatever YAML would read it as; "" where it is unset."""
        scalar = self.scalar(field) if field in self._said else None
        return scalar.text if scalar else ""

    def optional(self, field: str, read: Callable[[str], _T], default: _T) -> _T:
        """What ``read`` makes of the field's text; ``default`` where it is unset, or Refused, which is noted."""
        scalar = self.scalar(field) if field in self._said else None
        if scalar is None:
            return default
        try:
            return read(scalar.text)
        except Refused as refused:
            self.fault(f"{field} {show(scalar.text)}", refused.problem, refused.remedy)
            return default

    def required(self, field: str, read: Callable[[str], _T], remedy: str) -> _T | None:
        """What ``read`` makes of the field's text; None where it is missing or Refused, which is noted."""
        scalar = self.scalar(field)
        if scalar is None:
            self.fault(field, "is missing", remedy)
            return None
        try:
            return read(scalar.text)
        except Refused as refused:
            # A path's query is not shown: a secret may be a request's argument.
            self.fault(f"{field} {show(scalar.text.partition('?')[0])}", refused.problem, refused.remedy)
            return None

    def boolean(self, field: str) -> bool:
        """The boolean; False where the field is unset."""
        return self.optional(field, _boolean, False)

    def texts(self, field: str) -> tuple[str, ...]:
        """The texts of a list; none where the field is unset, or is no list of texts, which is noted."""
        node = self._said.get(field)
        if node is None:
            return ()
        items = node.items if isinstance(node, List) else ()
        texts = tuple(item.text for item in items if isinstance(item, Scalar) and not item.null)
        if not isinstance(node, List) or len(texts) < len(items):
            self.fault(field, "is not a list of texts", f"write {field}: and below it a dash before each")
        return texts

    def map(self, field: str) -> Mapping | None:
        """The map; None where the field is unset, or is no map, which is noted."""
        node = self._said.get(field)
        if node is None or isinstance(node, Mapping):
            return node
        self.fault(field, "is not a map", f"write {field}: and its fields below it, indented")
        return None

    def inner(self, field: str, node: Mapping, known: Sequence[str]) -> Entries:
        """The fields of a map inside of this one."""
        return Entries(f"{self.where} {field}", node, self.findings, known)

    def request(self) -> SecretRequest | None:
        """The request of ``secretPath``, ``method`` and ``secretArgs``; None where no path is given, which is noted."""
        target = self.required("secretPath", paths.secret_path, "name the API path, as secret/data/app")
        method, body = self.optional("method", _method, "GET"), self._body()
        return SecretRequest(method, *target, body) if target else None

    def _body(self) -> Sensitive[str] | None:
        node = self._node.entries.get("secretArgs")
        if node is None or (isinstance(node, Scalar) and node.null):
            return None
        try:
            return Sensitive(yaml_text.to_json(node))
        except Refused as refused:
            self.fault("secretArgs", refused.problem, refused.remedy)
            return None


def _method(text: str) -> str:
    if not re.fullmatch("[A-Za-z]{1,32}", text):
        raise Refused("is not an HTTP method", "write GET, POST, PUT or another method, letters only")
    method = text.upper()
    if method in _NO_METHODS:
        raise Refused("is no method that Vault answers with a secret", "write GET, LIST, POST, PUT or leave it out")
    return method


def _boolean(text: str) -> bool:
    if text not in BOOLEANS:
        raise Refused("is not a boolean", "write true or false")
    return BOOLEANS[text]
