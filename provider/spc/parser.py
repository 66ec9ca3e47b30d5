"""The whole of a MountRequest -> one MountSpec, with the parsed objects of recent classes at hand."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final, TypeAlias

from provider.errors import InvalidClass
from provider.settings import Settings
from provider.spc import parameters
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import AllKeys, MountSpec, ObjectSpec, Pkcs12, SingleValue, Source, Template
from provider.spc.objects import Defaults, parse_objects

# Classes whose objects are kept parsed: more than a node has, and each a few KiB.
_MAX_CACHED: Final = 256
# Characters in them all together, roughly bytes.
_MAX_CACHED_SIZE: Final = 8 * 1024 * 1024
# What an ObjectSpec takes besides its texts.
_OBJECT_SIZE: Final = 512

_Key: TypeAlias = tuple[bytes, Defaults]
_Objects: TypeAlias = tuple[tuple[ObjectSpec, ...], Findings]


class Parser:
    """Reads MountRequests under one daemon's settings. Safe to use from several threads.

    Kubelet mounts each volume again every minute or so, and a node's pods share classes, so the objects of classes
    that had no fault are kept, by a digest: the text itself may hold a secret, and is not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache: OrderedDict[_Key, tuple[_Objects, int]] = OrderedDict()
        self._cached_size = 0
        self._lock = threading.Lock()

    def parse(self, attributes: str, secrets: str, target_path: str, permission: str) -> MountSpec:
        """The mount that the four strings of a MountRequest ask for (docs/contract.md section 1).

        Raises InvalidClass, and nothing else, with every fault that was found.
        """
        findings = Findings()
        try:
            given = parameters.string_map(attributes)
        except Refused as refused:
            given = None
            findings.fault("attributes", refused.problem, refused.remedy)
        mode = findings.attempt(f"permission {show(permission)}", parameters.permission, permission, 0)
        if not target_path:
            findings.fault("target_path", "is missing", "the driver sends it: look at the driver's version")
        if given is None:
            raise InvalidClass(findings.faults)
        read = parameters.Parameters(given, findings)
        pod, server, login = read.pod(), read.server(self._settings), read.login(self._settings)
        tokens = read.tokens(secrets)
        settings = self._settings
        defaults = Defaults(mode, settings.renew_percent, read.refresh_after(settings), settings.templates)
        objects = self._objects(read.text("objects"), defaults, findings)
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

    def _objects(self, text: str, defaults: Defaults, findings: Findings) -> tuple[ObjectSpec, ...]:
        key = (hashlib.sha256(text.encode()).digest(), defaults)
        with self._lock:
            cached = self._cache.get(key)
            if cached:
                self._cache.move_to_end(key)
        if cached:
            objects, own = cached[0]
        else:
            own = Findings()
            objects = parse_objects(text, defaults, own)
            if not own.faults:
                self._keep(key, (objects, own))
        findings.include(own)
        return objects

    def _keep(self, key: _Key, parsed: _Objects) -> None:
        objects, findings = parsed
        size = sum(map(_size, objects)) + sum(map(len, findings.warnings))
        with self._lock:
            # Another thread may have been as fast.
            _, before = self._cache.pop(key, (None, 0))
            self._cache[key] = (parsed, size)
            self._cached_size += size - before
            while len(self._cache) > _MAX_CACHED or self._cached_size > _MAX_CACHED_SIZE:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached_size -= dropped


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
