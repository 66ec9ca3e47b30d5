"""The whole of a MountRequest -> one MountSpec, with the parsed objects of recent classes at hand."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final, TypeAlias

from provider.errors import InvalidClass
from provider.settings import Settings
from provider.spc import parameters
from provider.spc.addresses import AllowedAddresses
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import AllKeys, MountSpec, ObjectSpec, Pkcs12, SingleValue, Source, Template
from provider.spc.objects import Defaults, note_world_writable, parse_objects

# Classes whose objects are kept parsed: more than a node has, and each a few KiB.
_MAX_CACHED: Final = 256
# Characters in them all together, roughly bytes.
_MAX_CACHED_SIZE: Final = 8 * 1024 * 1024
# Classes with faults whose faults are kept, and characters in them: kubelet mounts each again and again, and reading
# one takes up to a second. Apart from those above, so that no number of them lets go of a class that is right.
_MAX_FAULTY: Final = 64
_MAX_FAULTY_SIZE: Final = 1024 * 1024
# What an ObjectSpec takes besides its texts.
_OBJECT_SIZE: Final = 512

# Characters, and attributes, of a request that is read at once where its class is at hand: ten times a usual one's.
# What they can cost besides the class, a look for the nearest known name of each, is some milliseconds.
_MAX_RECALLED: Final = 64 * 1024
_MOST_RECALLED: Final = 30

_Key: TypeAlias = tuple[bytes, Defaults]
_Objects: TypeAlias = tuple[tuple[ObjectSpec, ...], Findings]


class _NotAtHand(Exception):
    """It takes longer than the event loop may be kept waiting."""


class Parser:
    """Reads MountRequests under one daemon's settings. Safe to use from several threads.

    Kubelet mounts each volume again every minute or so, and a node's pods share classes, so what came of recent
    classes is kept, by a digest: the text itself may hold a secret, and is not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowed = AllowedAddresses(settings)
        self._good = _Kept(_MAX_CACHED, _MAX_CACHED_SIZE)
        self._faulty = _Kept(_MAX_FAULTY, _MAX_FAULTY_SIZE)

    def parse(self, attributes: str, secrets: str, target_path: str, permission: str) -> MountSpec:
        """The mount that the four strings of a MountRequest ask for (docs/contract.md section 1).

        Raises InvalidClass, and nothing else, with every fault that was found.
        """
        return self._parse(attributes, secrets, target_path, permission, at_hand=False)

    def recall(self, attributes: str, secrets: str, target_path: str, permission: str) -> MountSpec | None:
        """The same of a short request whose class was parsed before, in a fraction of a millisecond; else None."""
        if len(attributes) + len(secrets) > _MAX_RECALLED:
            return None
        try:
            return self._parse(attributes, secrets, target_path, permission, at_hand=True)
        except _NotAtHand:
            return None

    def _parse(self, attributes: str, secrets: str, target_path: str, permission: str, *, at_hand: bool) -> MountSpec:
        settings = self._settings
        findings = Findings(strict=settings.unknown_fields_are_faults)
        try:
            given = parameters.string_map(attributes)
        except Refused as refused:
            given = None
            findings.fault("attributes", refused.problem, refused.remedy)
        mode = findings.attempt(f"permission {show(permission)}", parameters.permission, permission, 0)
        note_world_writable(f"permission {show(permission)}", mode, findings, allowed=not settings.hardened)
        if not target_path:
            findings.fault("target_path", "is missing", "the driver sends it: look at the driver's version")
        if given is None:
            raise InvalidClass(findings.faults)
        if at_hand and len(given) > _MOST_RECALLED:
            raise _NotAtHand
        read = parameters.Parameters(given, findings)
        pod, server, login = read.pod(), read.server(settings, self._allowed), read.login(settings)
        tokens = read.tokens(secrets)
        defaults = Defaults(
            mode, settings.renew_percent, read.refresh_after(settings), settings.templates, not settings.hardened
        )
        objects = self._objects(read.text("objects"), defaults, findings, at_hand=at_hand)
        findings.check()
        return MountSpec(
            pod=pod,
            class_name=read.text(parameters.CLASS_NAME),
            target_path=target_path,
            server=server,
            login=login,
            objects=objects,
            tokens=tokens,
            warnings=findings.warnings,
        )

    def _objects(self, text: str, defaults: Defaults, findings: Findings, *, at_hand: bool) -> tuple[ObjectSpec, ...]:
        key = (hashlib.sha256(text.encode()).digest(), defaults)
        found = self._good.get(key) or self._faulty.get(key)
        if found is None and at_hand:
            raise _NotAtHand
        if found is None:
            own = Findings(strict=self._settings.unknown_fields_are_faults)
            found = parse_objects(text, defaults, own), own
            told = sum(map(len, own.warnings + own.faults))
            if own.faults:
                found = (), own
                self._faulty.keep(key, found, told)
            else:
                self._good.keep(key, found, told + sum(map(_size, found[0])))
        objects, own = found
        findings.include(own)
        return objects


class _Kept:
    """What came of the classes that were asked for last: at most ``most`` of them, and ``most_size`` characters."""

    def __init__(self, most: int, most_size: int) -> None:
        self._most, self._most_size = most, most_size
        self._entries: OrderedDict[_Key, tuple[_Objects, int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> _Objects | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def keep(self, key: _Key, parsed: _Objects, size: int) -> None:
        with self._lock:
            # Another thread may have been as fast.
            _, before = self._entries.pop(key, (None, 0))
            self._entries[key] = (parsed, size)
            self._size += size - before
            while len(self._entries) > self._most or self._size > self._most_size:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._size -= dropped


def _size(spec: ObjectSpec) -> int:
    size = _OBJECT_SIZE + len(spec.name) + sum(map(_source_size, spec.sources))
    match spec.shape:
        case SingleValue(key=key) | Pkcs12(password_key=key):
            return size + len(key or "")
        case AllKeys(includes, excludes):
            return size + sum(map(len, includes + excludes))
        case Template(text):
            return size + len(text)
        case _:
            return size


def _source_size(source: Source) -> int:
    request = source.request
    body = len(request.body.reveal()) if request.body else 0
    query = sum(len(name) + len(value) for name, value in request.query)
    return len(source.jmes_path or "") + len(request.path) + body + query
