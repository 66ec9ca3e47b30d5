"""What form an object's file has: the fields beside those of docs/contract.md section 2 -> sources and a Shape.

Fields that do not go together are faults: what a class says and is not done would be found out in production.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from provider.redact import one_line
from provider.spc.entries import Entries
from provider.spc.findings import Refused, show
from provider.spc.model import (
    OWN_ALIAS,
    AllKeys,
    Encoding,
    Format,
    Pkcs12,
    SecretRequest,
    Shape,
    SingleValue,
    Source,
    Template,
    Whole,
)
from provider.spc.tables import PASSWORD_FIELDS, SOURCE_FIELDS
from provider.spc.yaml_text import Mapping as Map

EVERY_KEY: Final = "*"
PASSWORD_ALIAS: Final = "password"  # noqa: S105  # a name
DEFAULT_KEYSTORE_ALIAS: Final = "tls"

# A file is made of a handful of secrets; a template of more is a program, and belongs into the application.
MAX_SOURCES: Final = 50
# Characters: a configuration file fits well, and no parser spends a second on it.
MAX_TEMPLATE: Final = 64 * 1024

_PKCS12: Final = "pkcs12"
_FORMATS: Final = {member.value: member for member in Format}
# What a value that is no string can be written as.
_OF_VALUES: Final = (Format.JSON, Format.YAML, Format.DOTENV, Format.PROPERTIES, Format.TOML)
_ENCODINGS: Final = {
    "utf-8": Encoding.UTF8,
    "utf8": Encoding.UTF8,
    "base64": Encoding.BASE64,
    "hex": Encoding.HEX,
}
_ALIAS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# Jinja2's own words: a secret of that name could not be spoken of.
_TAKEN: Final = frozenset(
    {"true", "false", "none", "True", "False", "None", "and", "or", "not", "in", "is", "if", "else", "elif", "for"}
    | {"loop", "self", "super", "varargs", "kwargs", "caller", "range", "dict", "namespace"}
)

# Fields by the shape that they belong to; the sentence says where they do.
ONLY_WITH: Final[Mapping[str, tuple[str, str]]] = {
    "includes": ("all", 'belongs to secretKey: "*"'),
    "excludes": ("all", 'belongs to secretKey: "*"'),
    "alias": ("pkcs12", "belongs to format: pkcs12"),
    "passwordFrom": ("pkcs12", "belongs to format: pkcs12"),
    "legacy": ("pkcs12", "belongs to format: pkcs12"),
    "sources": ("template", "belongs to a template"),
}
# Fields that say something else than the shape does.
NEVER_WITH: Final[Mapping[str, tuple[str, ...]]] = {
    "all": ("jmesPath",),
    "pkcs12": ("secretKey", "jmesPath", "encoding"),
    "template": ("secretKey", "encoding", "format"),
    "whole": (),
    "value": (),
}


def parse_shape(given: Entries, *, templates: bool) -> tuple[tuple[Source, ...], Shape]:
    """The object's sources, at least one, and its shape; with a fault both are void."""
    kind = _kind(given)
    for field, (belongs, sentence) in ONLY_WITH.items():
        if belongs != kind and given.has(field):
            given.fault(field, sentence, "remove it")
    for field in NEVER_WITH[kind]:
        if given.has(field):
            given.fault(field, f"does not go with {_NAMES[kind]}", "remove one of them")
    if kind == "template":
        return _template(given, allowed=templates)
    own = Source(OWN_ALIAS, given.request() or _NOTHING, given.text("jmesPath") or None)
    encoding = given.optional("encoding", _encoding, Encoding.UTF8)
    if kind == "pkcs12":
        return _keystore(given, own)
    if kind == "all":
        includes, excludes = given.texts("includes"), given.texts("excludes")
        return (own,), AllKeys(includes, excludes, encoding, _value_format(given))
    if kind == "value":
        return (own,), SingleValue(given.text("secretKey") or None, encoding, _value_format(given))
    form = given.optional("format", _format, Format.ENVELOPE)
    if form is not Format.ENVELOPE and given.has("encoding"):
        given.fault("encoding", f"is how one value is decoded, and format: {form.value} has many", "remove it")
    return (own,), Whole(form)


_NOTHING: Final = SecretRequest("GET", "")
_NAMES: Final = {"all": 'secretKey: "*"', "pkcs12": "format: pkcs12", "template": "template"}


def _kind(given: Entries) -> str:
    """Which shape the object's fields ask for."""
    key = given.text("secretKey")
    if given.has("template"):
        return "template"
    if given.text("format").lower() == _PKCS12:
        return "pkcs12"
    if key == EVERY_KEY:
        return "all"
    return "value" if key or given.has("jmesPath") else "whole"


def _keystore(given: Entries, own: Source) -> tuple[tuple[Source, ...], Shape]:
    sources: tuple[Source, ...] = (own,)
    key = None
    node = given.map("passwordFrom")
    if node is not None:
        inner = given.inner("passwordFrom", node, [field.name for field in PASSWORD_FIELDS])
        request = inner.request()
        key = inner.required("secretKey", str, "name the key that holds the password")
        sources = (own, Source(PASSWORD_ALIAS, request or _NOTHING))
    return sources, Pkcs12(given.text("alias") or DEFAULT_KEYSTORE_ALIAS, key, given.boolean("legacy"))


def _template(given: Entries, *, allowed: bool) -> tuple[tuple[Source, ...], Shape]:
    text = given.text("template")
    if not allowed:
        given.fault("template", "is not allowed here", "the operator turned templates off (--templates=off)")
    if len(text) > MAX_TEMPLATE:
        given.fault("template", f"is longer than {MAX_TEMPLATE} characters", "shorten it")
    sources: list[Source] = []
    if given.has("secretPath") or not given.has("sources"):
        sources.append(Source(OWN_ALIAS, given.request() or _NOTHING, given.text("jmesPath") or None))
    else:
        for field in ("method", "secretArgs", "jmesPath"):
            if given.has(field):
                given.fault(field, "belongs to a secretPath, which is not given", "put it into the source it is for")
    node = given.map("sources")
    for alias, entry in node.entries.items() if node else ():
        sources.append(_source(given, alias, entry, {source.alias for source in sources}))
    for alias, line in node.duplicates if node else ():
        given.fault(f"sources {show(alias)}", f"is given twice, again in line {line}", "rename one")
    if len(sources) > MAX_SOURCES:
        given.fault("sources", f"has more than {MAX_SOURCES} aliases", "split the file")
    return tuple(sources), Template(text)


def _source(given: Entries, alias: str, entry: object, before: set[str]) -> Source:
    field = f"sources {show(alias)}"
    if not _ALIAS.fullmatch(alias) or alias in _TAKEN:
        given.fault(field, "is no name for a template", "write letters, digits and _, and none of Jinja's own words")
    elif alias in before:
        given.fault(field, "is the name of the object's own secretPath", "rename it")
    if not isinstance(entry, Map):
        given.fault(field, "is not a map", "write its secretPath below it, indented")
        return Source(alias, _NOTHING)
    inner = given.inner(f"sources {one_line(alias, 80)}", entry, [field.name for field in SOURCE_FIELDS])
    return Source(alias, inner.request() or _NOTHING, inner.text("jmesPath") or None)


def _value_format(given: Entries) -> Format:
    form = given.optional("format", _format, Format.JSON)
    if form not in _OF_VALUES:
        words = ", ".join(member.value for member in _OF_VALUES)
        given.fault(
            f'format "{form.value}"', "is of all the data, not of one value", f"remove secretKey, or write {words}"
        )
    return form


def _format(text: str) -> Format:
    try:
        return _FORMATS[text.lower()]
    except KeyError:
        raise Refused("is not a format", f"write {', '.join(_FORMATS)} or {_PKCS12}") from None


def _encoding(text: str) -> Encoding:
    try:
        return _ENCODINGS[text.lower()]
    except KeyError:
        raise Refused("is not an encoding", "write utf-8, base64 or hex") from None
