"""One object: its sources' values, the program that is run on them if one is, and the files that come of it.

Pure but for what it remembers on its way. Errors name objects, requests and keys, and never a value.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from provider.errors import BadSecret, ProviderError
from provider.redact import one_line
from provider.render.contents import MAX_FILES, Files, RenderedFile
from provider.render.values import (
    data_of,
    formatted,
    key_count,
    missing,
    object_name,
    render_plain,
    value_of,
    written,
)
from provider.settings import MAX_MOUNT_BYTES, MIB
from provider.spc import paths
from provider.spc.findings import Refused
from provider.spc.model import AllKeys, Format, ObjectSpec, Pkcs12, SingleValue, Template, Whole

if TYPE_CHECKING:
    from provider.sandbox.process import Failure, Program, Result

# Keys that one error names.
_MAX_NAMED: Final = 3
# Characters of a keystore's password; no reader asks for more, and it is hashed again and again.
MAX_PASSWORD: Final = 1024

Made: TypeAlias = "dict[bytes, Result | bytes]"
"""What programs and keystores came to, by the digest of all that went in."""


class Job:
    """An object on its way from ``responses``, one for each of its sources."""

    def __init__(self, spec: ObjectSpec, responses: Sequence[Mapping[str, Any]]) -> None:
        self.digest = b""
        self.spec = spec
        self._responses = responses
        self._values: list[Any] = []
        self._error: ProviderError | None = None

    def prepare(self, known: dict[int, str]) -> None:
        """Find the sources' values, and their digest where something is made of them that is worth remembering.

        ``known`` has the digests of values by their ids, for all jobs of a mount, and is added to.
        """
        shape = self.spec.shape
        if self.spec.plain:
            return
        try:
            self._values = _values(self.spec, self._responses)
        except ProviderError as error:
            self._error = error
            return
        if not self._runs and not isinstance(shape, Pkcs12):
            return
        # Of the definition only what the outcome hangs on: a changed mode is no reason to run a program again.
        what = (shape.text,) if isinstance(shape, Template) else (type(shape).__name__, repr(shape))
        sources = [(source.alias, source.jmes_path) for source in self.spec.sources]
        try:
            for value in self._values:
                if id(value) not in known:
                    known[id(value)] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        except RecursionError:
            self._error = _unusable(self.spec, "its data is nested too deeply")
            return
        values = [known[id(value)] for value in self._values]
        self.digest = hashlib.sha256(json.dumps([what, sources, values]).encode()).digest()

    def refuse(self, error: ProviderError) -> None:
        """Nothing is made of it; ``finish`` raises this."""
        self._error = error

    def program(self) -> Program | None:
        """What has to be run in the sandbox; None where nothing has to."""
        if self._error is not None or not self._runs:
            return None
        from provider.sandbox.process import Expression, Rendering

        shape, sources = self.spec.shape, self.spec.sources
        if isinstance(shape, Template):
            pairs = zip(sources, self._values, strict=True)
            return Rendering(shape.text, {source.alias: (value, source.jmes_path) for source, value in pairs})
        parse = isinstance(shape, SingleValue) and shape.key is not None
        return Expression(str(sources[0].jmes_path), self._values[0], parse)

    def finish(self, made: Made) -> Files:
        """The files; what is made here is added to ``made``. Raises ProviderError."""
        if self._error is not None:
            raise self._error
        return self._files(made)

    @property
    def _runs(self) -> bool:
        return isinstance(self.spec.shape, Template) or self.spec.sources[0].jmes_path is not None

    def _files(self, made: Made) -> Files:
        spec, values = self.spec, self._values
        if spec.plain:
            return (RenderedFile(spec.name, spec.mode, render_plain(spec, self._responses[0])),)
        match spec.shape:
            case AllKeys() as shape:
                return _file_for_each_key(spec, shape, values[0])
            case Whole(Format.PEM):
                contents = _pem(spec, values[0]).encode()
            case Whole(form):
                contents = _utf8(spec, formatted(spec, values[0], form, str(spec.request)))
            case Pkcs12() as shape:
                found = made.get(self.digest)
                contents = found if isinstance(found, bytes) else _keystore(spec, shape, values)
                made[self.digest] = contents
            case SingleValue(key=str(key)) as shape if not self._runs:
                contents = written(spec, values[0], shape.encoding, shape.format, f'key "{key}" of {spec.request}')
            case _:
                result = made[self.digest]
                contents = result if isinstance(result, bytes) else _outcome(spec, result)
        return (RenderedFile(spec.name, spec.mode, contents),)


def _values(spec: ObjectSpec, responses: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The value of each source, before its expression."""
    values: list[Any] = []
    for number, (source, response) in enumerate(zip(spec.sources, responses, strict=True)):
        match spec.shape:
            case SingleValue(key=str(key)):
                values.append(value_of(spec, source.request, response, key))
            case Pkcs12(password_key=str(key)) if number:
                values.append(value_of(spec, source.request, response, key))
            case _:
                values.append(data_of(spec, source.request, response))
    return values


def failed_program(spec: ObjectSpec, failure: Failure) -> ProviderError:
    """The error of an object whose program failed: SecretNotFound if for what is not there, else BadSecret."""
    kind = "template" if isinstance(spec.shape, Template) else "jmesPath"
    if failure.missing:
        return missing(spec, f"its {kind}: {failure.what}", failure.advice)
    return BadSecret(f"{object_name(spec)}: its {kind}: {failure.what}", failure.advice)


def _outcome(spec: ObjectSpec, result: Result) -> bytes:
    """The contents that a program came to."""
    from provider.sandbox.process import Failure

    if isinstance(result, Failure):
        raise failed_program(spec, result)
    shape = spec.shape
    if not isinstance(shape, SingleValue):
        return _utf8(spec, result.text)
    where = f"jmesPath on {spec.request}"
    if not result.found:
        raise missing(spec, f"{where} finds nothing", "check jmesPath, and the names in the secret")
    value: Any = result.text
    if result.json:
        readable = False
        with contextlib.suppress(ValueError, RecursionError):
            value, readable = json.loads(result.text), True
        if not readable:
            # Nested more deeply than the daemon reads, or written by a program that broke out of its language.
            raise _unusable(spec, "its jmesPath comes to what cannot be read as JSON")
    return written(spec, value, shape.encoding, shape.format, where)


def _file_for_each_key(spec: ObjectSpec, shape: AllKeys, data: Mapping[str, Any]) -> Files:
    prefix = "" if spec.name == "." else f"{spec.name}/"
    if len(data) > MAX_FILES:
        raise BadSecret(
            f"{object_name(spec)}: {spec.request} has more than {MAX_FILES} keys, too many for files",
            "name the keys that are needed by secretKey, or split the secret",
        )
    files, wrong, size = [], [], 0
    for key in _wanted(spec, shape, data):
        value = data[key]
        problem = _not_a_name(prefix, key)
        if problem:
            wrong.append(f'"{one_line(key, 80)}" {problem}')
            continue
        where = f'key "{one_line(key, 80)}" of {spec.request}'
        contents = written(spec, value, shape.encoding, shape.format, where)
        files.append(RenderedFile(prefix + key, spec.mode, contents))
        size += files[-1].weight
        if size > MAX_MOUNT_BYTES:
            raise BadSecret(
                f"{object_name(spec)}: the keys of {spec.request} come to more than {MAX_MOUNT_BYTES / MIB:.2f} MiB, "
                "and the driver takes no more",
                "leave keys out by excludes, or split the secret",
            )
    if wrong:
        more = f", and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise BadSecret(
            f"{object_name(spec)}: a key of {spec.request} is no file's name: {', '.join(wrong[:_MAX_NAMED])}{more}",
            "leave it out by excludes, or rename it in Vault",
        )
    if not files:
        raise missing(
            spec,
            f"no key of {spec.request} is left (it has {key_count(data)})",
            "check includes, excludes and secretPath",
        )
    return tuple(files)


def _wanted(spec: ObjectSpec, shape: AllKeys, data: Mapping[str, Any]) -> list[str]:
    from provider.render import matching

    told = ""
    try:
        return matching.wanted(sorted(data), shape.includes, shape.excludes)
    except matching.TooSlow:
        told = f"takes more than {matching.MATCH_SECONDS:g} s of processor time for the keys of {spec.request}"
    except matching.TooLong as error:
        key = one_line(error.key, 80)
        told = f'is not tried on the key "{key}" of {spec.request}, which is longer than {matching.MAX_KEY} characters'
    raise BadSecret(
        f"{object_name(spec)}: the pattern of includes and excludes {told}",
        "write fewer and simpler expressions, or split the secret",
    )


def _not_a_name(prefix: str, key: str) -> str:
    """Why ``key`` cannot be a file's name in the directory; "" where it can (docs/contract.md section 1, Paths)."""
    if "/" in key:
        return "has a slash"
    try:
        paths.object_name(prefix + key)
    except Refused as refused:
        return refused.problem
    except UnicodeEncodeError:
        return "is no Unicode text"
    return ""


def _pem(spec: ObjectSpec, data: Mapping[str, Any]) -> str:
    from provider.render import pki

    _has_certificate(spec, data)
    problem = ""
    try:
        return pki.pem(data)
    except pki.Unusable as error:
        problem = error.problem
    raise _unusable(spec, problem)


def _keystore(spec: ObjectSpec, shape: Pkcs12, values: Sequence[Any]) -> bytes:
    from provider.render import pki

    _has_certificate(spec, values[0])
    password = values[1] if shape.password_key is not None else ""
    if not isinstance(password, str):
        raise _unusable(spec, "the password of passwordFrom is no string")
    if len(password) > MAX_PASSWORD:
        raise _unusable(spec, f"the password of passwordFrom is longer than {MAX_PASSWORD} characters")
    problem = ""
    try:
        return pki.keystore(values[0], shape.alias, password, legacy=shape.legacy)
    except pki.Unusable as error:
        problem = error.problem
    raise _unusable(spec, problem)


def _has_certificate(spec: ObjectSpec, data: Mapping[str, Any]) -> None:
    if "certificate" not in data:
        raise missing(
            spec,
            f'{spec.request} has no key "certificate" (it has {key_count(data)})',
            "name its keys certificate, private_key and ca_chain, as Vault's PKI engine does, or make a template of it",
        )


def _utf8(spec: ObjectSpec, text: str) -> bytes:
    contents = None
    with contextlib.suppress(UnicodeEncodeError):
        contents = text.encode()
    if contents is None:
        raise _unusable(spec, "its data holds a character that is no Unicode text")
    return contents


def _unusable(spec: ObjectSpec, problem: str) -> BadSecret:
    return BadSecret(f"{object_name(spec)}: {problem} (from {spec.request})", "check secretPath, method and secretArgs")
