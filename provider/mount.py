"""One mount: plan the reads, fetch them at once, render the files, all or nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from provider.errors import (
    AccessDenied,
    BadSecret,
    KubernetesUnavailable,
    LoginDenied,
    MountFailed,
    OutOfTime,
    ProviderError,
    SecretNotFound,
    encoded_size,
    fit,
)
from provider.login import TokenSource, log_in
from provider.redact import one_line
from provider.render import render
from provider.sessions import Read, Sessions
from provider.settings import MAX_MOUNT_BYTES, MIB
from provider.spc import MountSpec, ObjectSpec, SecretRequest
from provider.vault import Auth, VaultSecret, VaultServers
from provider.versions import object_version

_log = logging.getLogger(__name__)

# Distinct denials of one mount whose engine is asked for, and how long, so that the advice fits: an error message is
# not worth more of a sick Vault's time.
MAX_EXPLAINED: Final = 3
EXPLAIN_SECONDS: Final = 3.0
# Warnings that are remembered as told; past it the oldest is told again when it comes up.
MAX_WARNED: Final = 1000
# The names of objects that failed alike, in characters; past it they are counted.
MAX_NAMES: Final = 700
# The room of one sentence and of its remedy, in characters and as gRPC encodes them: a path may have 4 KiB, and what to
# do must still be read (docs/contract.md section 1).
MAX_WHAT: Final = 500
MAX_WHAT_BYTES: Final = 2300
MAX_ADVICE: Final = 450
MAX_ADVICE_BYTES: Final = 1400
MAX_NAME: Final = 60
KV2_PREFIXES: Final = frozenset(
    {"data", "metadata", "config", "delete", "undelete", "destroy", "subkeys", "detailed-metadata"}
)
# What a policy calls the right to each method (https://developer.hashicorp.com/vault/docs/concepts/policies).
CAPABILITIES: Final = {"GET": "read", "LIST": "list", "DELETE": "delete", "PATCH": "patch"}


class VersionKey(Protocol):
    """Where the key of object versions comes from."""

    def get(self) -> Awaitable[bytes | None]:
        """The key, or None where it is not to be had now."""
        ...


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """A file of the volume; ``mode`` is 0 to 0o777."""

    path: str
    mode: int
    contents: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MountResult:
    """All files of a volume, and the version of each object as (id, version)."""

    files: tuple[RenderedFile, ...]
    versions: tuple[tuple[str, str], ...]


class Mounter:
    """Turns a MountSpec into files."""

    def __init__(
        self,
        servers: VaultServers,
        sessions: Sessions,
        tokens: TokenSource,
        version_key: VersionKey,
        *,
        timeout: float,
    ) -> None:
        self._servers = servers
        self._sessions = sessions
        self._tokens = tokens
        self._version_key = version_key
        self._timeout = timeout
        self._warned: OrderedDict[tuple[str, str, str], None] = OrderedDict()

    async def mount(self, spec: MountSpec) -> MountResult:
        """The files of ``spec``, all of them, within the mount timeout.

        Raises:
            ProviderError: none of them; MountFailed where objects failed, OutOfTime where time did.
        """
        began = time.monotonic()
        self._warn(spec)
        try:
            async with asyncio.timeout(self._timeout):
                with self._sessions.mounting(spec):
                    result = await self._mount(spec, asyncio.get_running_loop().time() + self._timeout)
        except TimeoutError as error:
            raise OutOfTime(
                f"the mount took longer than {self._timeout:g} s; Vault at {spec.server.address} was still to answer",
                "check Vault's load and the network to it; kubelet tries again by itself",
            ) from error
        _log.info(
            "mounted",
            extra={
                "pod": str(spec.pod),
                "secret_provider_class": spec.class_name,
                "files": len(result.files),
                "milliseconds": round((time.monotonic() - began) * 1000),
            },
        )
        return result

    def _warn(self, spec: MountSpec) -> None:
        """Log what is odd about the class, once: its volumes are mounted again every minute."""
        for warning in spec.warnings:
            key = (spec.pod.namespace, spec.class_name, warning)
            if key not in self._warned:
                _log.warning("SecretProviderClass %s: %s", spec.class_name, warning, extra={"pod": str(spec.pod)})
            self._warned[key] = None
            self._warned.move_to_end(key)
        while len(self._warned) > MAX_WARNED:
            self._warned.popitem(last=False)

    async def _mount(self, spec: MountSpec, deadline: float) -> MountResult:
        async def login(until: float) -> Auth:
            return await log_in(self._servers.get(spec.server), spec, self._tokens, until)

        reads = plan(spec.objects)
        # The key is fetched beside the secrets, and waited for no longer than they take or its own few seconds.
        key, answers = await asyncio.gather(
            self._version_key.get(), self._sessions.fetch(spec, list(dict.fromkeys(reads)), login, deadline)
        )
        failures: list[tuple[ObjectSpec, ProviderError]] = []
        files: list[RenderedFile] = []
        secrets: dict[Read, VaultSecret] = {}
        size = 0
        for wanted, read in zip(spec.objects, reads, strict=True):
            answer = answers[read]
            try:
                if isinstance(answer, ProviderError):
                    raise answer
                secrets[read] = answer
                files.append(RenderedFile(wanted.name, wanted.mode, render(wanted, answer.response)))
                size += len(files[-1].contents)
            except ProviderError as error:
                failures.append((wanted, error))
            if size > MAX_MOUNT_BYTES:
                # A thousand objects of one large secret would be gigabytes before anybody counted them.
                failures.append((wanted, _too_large(files, size, len(spec.objects))))
                break
        if failures:
            raise await self._failed(failures, spec, deadline)
        self._sessions.settle(spec, secrets)
        versions = tuple(
            (wanted.name, object_version(key, wanted, file.contents))
            for wanted, file in zip(spec.objects, files, strict=True)
        )
        return MountResult(tuple(files), versions)

    async def _failed(
        self, failures: Sequence[tuple[ObjectSpec, ProviderError]], spec: MountSpec, deadline: float
    ) -> MountFailed:
        """All failing objects in one error; objects that failed alike share a sentence."""
        alike: dict[str, tuple[list[ObjectSpec], ProviderError]] = {}
        for wanted, error in failures:
            alike.setdefault(str(error), ([], error))[0].append(wanted)
        until = min(deadline - EXPLAIN_SECONDS / 2, _loop_time() + EXPLAIN_SECONDS)
        refused = [found for found in alike.values() if isinstance(found[1], AccessDenied | SecretNotFound)]
        advised = await asyncio.gather(
            *(self._advice(error, objects[0].request, spec, until) for objects, error in refused[:MAX_EXPLAINED])
        )
        better = {id(error): advice for (_, error), advice in zip(refused, advised, strict=False)}
        sentences = []
        for objects, error in alike.values():
            advice = better.get(id(error), error.advice)
            about = _named(objects)
            # A login is nothing of an object's; what comes of rendering has its object's name already.
            if isinstance(error, LoginDenied | KubernetesUnavailable) or error.what.startswith(about):
                about = ""
            what = fit(about + one_line(error.what, MAX_WHAT) + _where(error, spec), MAX_WHAT_BYTES)
            sentences.append(type(error)(what, fit(one_line(advice, MAX_ADVICE), MAX_ADVICE_BYTES)))
        return MountFailed(sentences)

    async def _advice(self, error: ProviderError, request: SecretRequest, spec: MountSpec, until: float) -> str:
        """What to do about a 403 or 404, knowing the secrets engine (docs/contract.md section 3)."""
        engine = await self._sessions.engine_of(spec, request.path, until)
        if engine is not None and (engine.kind, engine.version) == ("kv", "2"):
            rest = request.path.removeprefix(engine.path)
            if rest.split("/", 1)[0] not in KV2_PREFIXES:
                return f'{engine.path} is a KV version 2 engine: write secretPath "{engine.path}data/{rest}"'
        if isinstance(error, AccessDenied):
            can = CAPABILITIES.get(request.method, "update")
            return f'give a policy of role "{spec.login.role}" the capability "{can}" on "{request.path}"'
        return error.advice or "check secretPath, and secretKey"


def plan(objects: Sequence[ObjectSpec]) -> list[Read]:
    """The read that serves each object: one for all that send the same request (docs/contract.md section 2).

    Where they differ in when it is to be renewed or read again, the strictest holds for it; what is to be issued on
    every mount is never shared with what is kept.
    """
    together: dict[tuple[SecretRequest, bool], Read] = {}
    for wanted in objects:
        key = (wanted.request, wanted.fresh)
        read = Read(wanted.request, wanted.fresh, wanted.renew_percent, wanted.refresh_after)
        before = together.setdefault(key, read)
        together[key] = Read(
            wanted.request,
            wanted.fresh,
            min(before.renew_percent, read.renew_percent),
            min(before.refresh_after, read.refresh_after),
        )
    return [together[wanted.request, wanted.fresh] for wanted in objects]


def _too_large(files: Sequence[RenderedFile], size: int, count: int) -> BadSecret:
    largest = max(files, key=lambda file: len(file.contents))
    return BadSecret(
        f"the volume is too large: {len(files)} of its {count} files come to {size / MIB:.2f} MiB already, and the "
        f'driver takes at most {MAX_MOUNT_BYTES / MIB:.2f} MiB; the largest is "{one_line(largest.path, MAX_NAME)}" of '
        f"{len(largest.contents) / MIB:.2f} MiB",
        "split the SecretProviderClass, or mount less of each secret with secretKey",
    )


def _named(objects: Sequence[ObjectSpec]) -> str:
    names: list[str] = []
    for wanted in objects:
        name = f'"{one_line(wanted.name, MAX_NAME)}"'
        if names and encoded_size(", ".join((*names, name))) > MAX_NAMES:
            break
        names.append(name)
    left = len(objects) - len(names)
    return f"object{'s' if len(objects) > 1 else ''} {', '.join(names)}{f' and {left} more' if left else ''}: "


def _where(error: ProviderError, spec: MountSpec) -> str:
    """Who asked, and which Vault. A login's error has said so already; Kubernetes has nothing to do with it."""
    if isinstance(error, LoginDenied | KubernetesUnavailable):
        return ""
    namespace = f', Vault namespace "{spec.server.namespace}"' if spec.server.namespace else ""
    return f' [role "{spec.login.role}"{namespace}, {spec.server.address}]'


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
