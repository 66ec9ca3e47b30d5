"""The whole of a MountRequest -> one MountSpec, with recent requests and the objects of recent classes at hand."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Generic, NamedTuple, TypeVar

from provider.errors import InvalidClass
from provider.settings import Settings
from provider.spc import parameters
from provider.spc.addresses import AllowedAddresses
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import AllKeys, MountSpec, ObjectSpec, Pkcs12, SingleValue, Source, Template
from provider.spc.objects import Defaults, note_world_writable, parse_objects
from provider.spc.shapes import MAX_TEMPLATE

# Requests whose mounts are kept: twice the pods that a node has at most, and characters in them all together.
_MAX_MOUNTS: Final = 512
_MAX_MOUNTS_SIZE: Final = 4 * 1024 * 1024
# Classes whose objects are kept parsed: more than a node has, and each a few KiB.
_MAX_CACHED: Final = 256
# Bytes of their texts, all together.
_MAX_CACHED_SIZE: Final = 8 * 1024 * 1024
# Classes with faults whose faults are kept, and bytes of them: kubelet mounts each again and again, and reading
# one takes up to a second. Apart from those above, so that no number of them lets go of a class that is right.
_MAX_FAULTY: Final = 64
_MAX_FAULTY_SIZE: Final = 1024 * 1024
# What an ObjectSpec takes besides its texts.
_OBJECT_SIZE: Final = 512
# Bytes of a class of some hundred objects.
_LARGE: Final = 128 * 1024

# Characters, and attributes, of a request that is read at once where its class is at hand: ten times a usual one's.
# What they can cost besides the class, a look for the nearest known name of each, is some milliseconds.
_MAX_RECALLED: Final = 64 * 1024
_MOST_RECALLED: Final = 30

_T = TypeVar("_T")


class FaultyClass(InvalidClass):
    """A class with faults that also has ``templates``, whose own faults are told by whoever can run them."""

    def __init__(self, faults: Sequence[str], templates: Sequence[ObjectSpec]) -> None:
        super().__init__(faults)
        self.templates = tuple(templates)


class _Class(NamedTuple):
    """What a class's objects came to: with a fault there are none, but for ``templates`` that can be checked still."""

    objects: tuple[ObjectSpec, ...]
    findings: Findings
    templates: tuple[ObjectSpec, ...]
    large: bool


class _Request(NamedTuple):
    """The four strings of a MountRequest."""

    attributes: str
    secrets: str
    target_path: str
    permission: str

    @property
    def short(self) -> bool:
        """Whether it may be read on the event loop."""
        return len(self.attributes) + len(self.secrets) <= _MAX_RECALLED


class _Mount(NamedTuple):
    """What a request came to: ``spec`` without its objects, which are those of the class, and without its tokens."""

    spec: MountSpec
    class_key: bytes


class _NotAtHand(Exception):
    """It takes longer than the event loop may be kept waiting."""


class Parser:
    """Reads MountRequests under one daemon's settings. Safe to use from several threads.

    Kubelet mounts each volume again every minute or so, with the very same request until the pod's token is renewed,
    and a node's pods share classes. So what came of recent requests is kept, and what came of recent classes, by a
    digest: the text itself may hold a secret, and is not. No token is kept, each mount has those of its own request.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowed = AllowedAddresses(settings)
        self._mounts: _Kept[_Mount] = _Kept(_MAX_MOUNTS, _MAX_MOUNTS_SIZE)
        self._good: _Kept[_Class] = _Kept(_MAX_CACHED, _MAX_CACHED_SIZE)
        self._faulty: _Kept[_Class] = _Kept(_MAX_FAULTY, _MAX_FAULTY_SIZE)

    def parse(self, attributes: str, secrets: str, target_path: str, permission: str) -> MountSpec:
        """The mount that the four strings of a MountRequest ask for (docs/contract.md section 1).

        Raises InvalidClass, and nothing else, with every fault that was found; FaultyClass where there are templates,
        which may have more.
        """
        return self._parse(_Request(attributes, secrets, target_path, permission), at_hand=False)

    def recall(self, attributes: str, secrets: str, target_path: str, permission: str) -> MountSpec | None:
        """The same of a short request whose class was parsed before, in a fraction of a millisecond; else None."""
        request = _Request(attributes, secrets, target_path, permission)
        if not request.short:
            return None
        mount = self._mounts.get(_digest(*request))
        known = self._good.get(mount.class_key) if mount else None
        if mount and known:
            # The very text was read before: it is JSON, and its tokens are.
            tokens = parameters.pod_tokens(json.loads(attributes), secrets, Findings())
            return replace(mount.spec, objects=known.objects, tokens=tokens, large=known.large)
        try:
            return self._parse(request, at_hand=True)
        except _NotAtHand:
            return None

    def _parse(self, request: _Request, *, at_hand: bool) -> MountSpec:
        settings = self._settings
        findings = Findings(strict=settings.unknown_fields_are_faults)
        try:
            given = parameters.string_map(request.attributes)
        except Refused as refused:
            given = None
            findings.fault("attributes", refused.problem, refused.remedy)
        where = f"permission {show(request.permission)}"
        mode = findings.attempt(where, parameters.permission, request.permission, 0)
        note_world_writable(where, mode, findings, allowed=not settings.hardened)
        if not request.target_path:
            findings.fault("target_path", "is missing", "the driver sends it: look at the driver's version")
        if given is None:
            raise InvalidClass(findings.faults)
        text = given.get("objects", "")
        # All that the objects come to depends on, besides the settings.
        class_key = _digest(request.permission, given.get("refreshAfter", ""), text)
        known = self._good.get(class_key) or self._faulty.get(class_key)
        quick = request.short and len(given) <= _MOST_RECALLED
        if at_hand and not (quick and known):
            raise _NotAtHand
        read = parameters.Parameters(given, findings)
        pod, server, login = read.pod(), read.server(settings, self._allowed), read.login(settings)
        tokens = parameters.pod_tokens(given, request.secrets, findings)
        defaults = Defaults(
            mode, settings.renew_percent, read.refresh_after(settings), settings.templates, not settings.hardened
        )
        known = known or self._parse_class(class_key, text, defaults)
        findings.include(known.findings)
        if known.templates and findings.faults:
            raise FaultyClass(findings.faults, known.templates)
        findings.check()
        class_name = read.text(parameters.CLASS_NAME)
        spec = MountSpec(pod, class_name, request.target_path, server, login, (), warnings=findings.warnings)
        if quick:
            self._mounts.keep(_digest(*request), _Mount(spec, class_key), sum(map(_bytes, (*request, *spec.warnings))))
        return replace(spec, objects=known.objects, tokens=tokens, large=known.large)

    def _parse_class(self, key: bytes, text: str, defaults: Defaults) -> _Class:
        findings = Findings(strict=self._settings.unknown_fields_are_faults)
        objects = parse_objects(text, defaults, findings)
        told = sum(map(_bytes, findings.warnings + findings.faults))
        if findings.faults:
            # Where names are at fault, a template would be told of names that it has.
            named = defaults.templates and not any(" sources" in fault for fault in findings.faults)
            templates = tuple(spec for spec in objects if named and spec.name and _is_template(spec))
            parsed = _Class((), findings, templates, large=False)
            self._faulty.keep(key, parsed, told + sum(map(_size, templates)))
        else:
            size = sum(map(_size, objects))
            parsed = _Class(objects, findings, tuple(filter(_is_template, objects)), large=size > _LARGE)
            self._good.keep(key, parsed, told + size)
        return parsed


def _digest(*texts: str) -> bytes:
    """What stands for these texts, in this order, and for no others."""
    lengths = ",".join(str(len(text)) for text in texts)
    # Of a lone surrogate, which is refused further on, there is no UTF-8.
    return hashlib.sha256(f"{lengths}:{''.join(texts)}".encode("utf-8", "surrogatepass")).digest()


class _Kept(Generic[_T]):
    """What was asked for last, by its digest: at most ``most`` of it, and ``most_size`` bytes."""

    def __init__(self, most: int, most_size: int) -> None:
        self._most, self._most_size = most, most_size
        self._entries: OrderedDict[bytes, tuple[_T, int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> _T | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def keep(self, key: bytes, parsed: _T, size: int) -> None:
        with self._lock:
            # Another thread may have been as fast.
            _, before = self._entries.pop(key, (None, 0))
            self._entries[key] = (parsed, size)
            self._size += size - before
            while len(self._entries) > self._most or self._size > self._most_size:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._size -= dropped


def _is_template(spec: ObjectSpec) -> bool:
    return isinstance(spec.shape, Template) and len(spec.shape.text) <= MAX_TEMPLATE


def _size(spec: ObjectSpec) -> int:
    size = _OBJECT_SIZE + _bytes(spec.name) + sum(map(_source_size, spec.sources))
    match spec.shape:
        case SingleValue(key=key) | Pkcs12(password_key=key):
            return size + _bytes(key or "")
        case AllKeys(includes, excludes):
            return size + sum(map(_bytes, includes + excludes))
        case Template(text):
            return size + _bytes(text)
        case _:
            return size


def _source_size(source: Source) -> int:
    return source.request.size + _bytes(source.jmes_path or "")


def _bytes(text: str) -> int:
    """What a text takes in memory: one wide character makes each of its characters take four bytes."""
    return sys.getsizeof(text)
