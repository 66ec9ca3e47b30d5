"""The ``objects`` parameter -> ObjectSpecs (docs/contract.md section 2)."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import Final

from provider.notation import read_duration
from provider.redact import one_line
from provider.settings import MAX_OBJECTS
from provider.spc import paths, yaml_text
from provider.spc.entries import Entries
from provider.spc.expressions import check_expressions
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import AllKeys, ObjectSpec
from provider.spc.shapes import EVERY_KEY, parse_shape
from provider.spc.tables import OBJECT_FIELDS
from provider.spc.yaml_text import Mapping, Node, Scalar, Sequence

FIELDS: Final = tuple(field.name for field in OBJECT_FIELDS)

_EXAMPLE: Final = 'add "- objectName: password" and below it its secretPath'
# The Azure provider's classes have a text of YAML for each object, below a key.
_OF_OTHERS: Final = 'remove the line "array:", and | or quotes behind each dash, which other providers want'
_QUOTED: Final = re.compile(r"^objectName:\s", re.MULTILINE)
_MODES: Final = "write an octal number from 0000 to 0777, for example 0600"
# Characters of a duration; reading a megabyte of digits takes seconds.
_MAX_DURATION: Final = 64


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for the objects that say nothing of their own: see ObjectSpec's fields of these names.

    ``templates`` is whether the operator allows them, ``world_writable`` whether a file may be so.
    """

    mode: int
    renew_percent: float
    refresh_after: float
    templates: bool = True
    world_writable: bool = True


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
        if isinstance(one.shape, AllKeys) and not same:
            # A directory of files may hold another object's; whether two are one file is known with the keys.
            continue
        findings.fault(
            f"objects[{first}] ({one_line(one.name, 80)})",
            f"objectName {'is also' if same else 'is a directory to'} objects[{second}] ({one_line(other.name, 80)})",
            "give each object a file of its own",
        )
    specs = tuple(spec for _, spec in read if spec)
    reads = sum(len(spec.sources) for spec in specs)
    if reads > MAX_OBJECTS:
        findings.fault("objects", f"have {reads} sources, more than {MAX_OBJECTS}", "split the class")
    check_expressions([(index, spec) for index, spec in read if spec], findings)
    return specs


def _items(node: Node | None) -> tuple[Node, ...]:
    if node is None or (isinstance(node, Scalar) and node.null):
        raise Refused("names no object", _EXAMPLE)
    if isinstance(node, Mapping) and isinstance(array := node.entries.get("array"), Sequence) and array.items:
        raise Refused("is not a YAML list", _OF_OTHERS)
    if not isinstance(node, Sequence):
        raise Refused("is not a YAML list", "begin each object with a dash, as in - objectName: password")
    if not node.items:
        raise Refused("names no object", _EXAMPLE)
    if len(node.items) > MAX_OBJECTS:
        raise Refused(f"has {len(node.items)} objects, more than {MAX_OBJECTS}", "split the class")
    return node.items


def _object(index: int, node: Node, defaults: Defaults, findings: Findings) -> ObjectSpec | None:
    """The object; its name is empty where it has no legal one."""
    where = f"objects[{index}]"
    if not isinstance(node, Mapping):
        quoted = isinstance(node, Scalar) and _QUOTED.search(node.text)
        findings.fault(where, "is not a map of fields", _OF_OTHERS if quoted else _EXAMPLE)
        return None
    name = node.entries.get("objectName")
    if isinstance(name, Scalar) and name.text and not name.null:
        where = f"{where} ({one_line(name.text, 80)})"
    given = Entries(where, node, findings, FIELDS)
    legal = paths.directory_name if given.text("secretKey") == EVERY_KEY else paths.object_name
    checked = given.required("objectName", legal, "name the file to write the secret to")
    sources, shape = parse_shape(given, templates=defaults.templates)
    return ObjectSpec(
        name=checked or "",
        sources=sources,
        shape=shape,
        mode=_mode(given, defaults) or defaults.mode,
        fresh=given.optional("lease", _fresh, False),
        renew_percent=given.optional("renewPercent", _percent, defaults.renew_percent),
        refresh_after=given.optional("refreshAfter", duration, defaults.refresh_after),
        optional=given.boolean("optional"),
    )


def _mode(given: Entries, defaults: Defaults) -> int:
    """The mode; 0, which means the default, where it is unset too."""
    scalar = given.scalar("filePermission")
    if scalar is None:
        return 0
    where = f"{given.where} filePermission"
    read = _mode_of_number if scalar.typed else _mode_of_digits
    mode = given.findings.attempt(f"{where} {show(scalar.text)}", read, scalar.text, 0)
    # Decimal 420 is how Kubernetes writes 0644; 400 is most likely 0400 without its zero.
    if scalar.typed and mode and re.fullmatch("[4-7][04-7]{2}", scalar.text):
        given.findings.warn(
            where,
            f"{scalar.text} is decimal and means mode {mode:04o}; if 0{scalar.text} is meant, write that",
        )
    note_world_writable(f"{where} {show(scalar.text)}", mode, given.findings, allowed=defaults.world_writable)
    return mode


def note_world_writable(where: str, mode: int, findings: Findings, *, allowed: bool) -> None:
    """Note a mode that lets everybody write: a warning, or a fault where it is not ``allowed``."""
    if not mode & stat.S_IWOTH:
        return
    safe = f"0{mode & ~stat.S_IWOTH:o}"
    if allowed:
        findings.warn(where, f"lets everybody on the node write the secret's file; {safe} does not")
    else:
        findings.fault(
            where,
            "lets everybody on the node write the secret's file",
            f"write {safe}; only the daemon's --hardened=false would allow it",
        )


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
