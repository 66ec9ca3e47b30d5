"""One mount: plan the reads, fetch them at once, render the files, all or nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

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
from provider.render import Answered, Contents, Files, RenderedFile, Renderer, render_plain
from provider.sessions import Fetched, Read, Sessions
from provider.spc import MountSpec, ObjectSpec, SecretRequest
from provider.spc.paths import clashes
from provider.telemetry.events import Kind, Mounted, MountedObject, Supply, Telemetry
from provider.vault import Auth, Room, VaultSecret, VaultServers
from provider.versions import Versions, key_of

_log = logging.getLogger(__name__)

_Failure: TypeAlias = tuple[ObjectSpec, SecretRequest, ProviderError]

# Distinct denials of one mount whose engine is asked for, and how long, so that the advice fits: an error message is
# not worth more of a sick Vault's time.
MAX_EXPLAINED: Final = 3
EXPLAIN_SECONDS: Final = 3.0
# Classes whose reads are kept planned; as many as the parser keeps parsed.
MAX_PLANS: Final = 256
# Bytes of files that are kept for the next mount while it would be made of the same answers. These are in memory for it
# anyway; larger volumes are made anew, so that memory does not hold a node's secrets twice.
MAX_MADE_BYTES: Final = 64 * 1024
# Bytes of answers in memory of which plain objects are made on the event loop, some milliseconds' worth; what comes of
# more is rendered in the renderer's thread, and within its time. A usual volume is made of a tenth of it.
MAX_ON_LOOP_BYTES: Final = 512 * 1024
# Sentences that are remembered as told; past it the oldest is told again when it comes up.
MAX_TOLD: Final = 1000
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

    @property
    def known(self) -> bytes | None:
        """The key, where nobody has to be asked for it any more."""
        ...

    def get(self) -> Awaitable[bytes | None]:
        """The key, or None where it is not to be had now."""
        ...


@dataclass(frozen=True, slots=True)
class MountResult:
    """All files of a volume, and the version of each object as (id, version).

    ``event`` is to be recorded once the driver is going to be given them.
    """

    files: tuple[RenderedFile, ...]
    versions: tuple[tuple[str, str], ...]
    event: Mounted | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """What was made of secrets: all files, the version of each object, and a mark of each object's files."""

    objects: tuple[ObjectSpec, ...]
    key: bytes | None = field(repr=False)
    secrets: Mapping[Read, VaultSecret] = field(repr=False)
    files: tuple[RenderedFile, ...] = field(repr=False)
    versions: tuple[tuple[str, str], ...]
    marks: Mapping[str, str]
    size: int
    """Bytes of all files."""


@dataclass(frozen=True, slots=True)
class _Done:
    """A mount that succeeded: what was made, what each object was read with, and what the reads gave."""

    made: _Made
    reads: Sequence[tuple[Read, ...]]
    fetched: Fetched


class Mounter:
    """Turns a MountSpec into files."""

    def __init__(
        self,
        servers: VaultServers,
        sessions: Sessions,
        tokens: TokenSource,
        version_key: VersionKey,
        renderer: Renderer,
        *,
        timeout: float,
        telemetry: Telemetry,
    ) -> None:
        self._telemetry = telemetry
        self._servers = servers
        self._sessions = sessions
        self._tokens = tokens
        self._version_key = version_key
        self._renderer = renderer
        self._timeout = timeout
        self._versions = Versions()
        # A class is mounted again every minute, and by all pods of a deployment.
        self._plan = functools.lru_cache(MAX_PLANS)(plan)
        self._told: OrderedDict[tuple[str, str, str], None] = OrderedDict()

    async def mount(self, spec: MountSpec, spent: Callable[[float], None] = lambda _: None) -> MountResult:
        """The files of ``spec``, all of them, within the mount timeout.

        ``spent`` is told of processor time, in seconds, that went into rendering them besides the usual.

        Raises:
            ProviderError: none of them; MountFailed where objects failed, OutOfTime where time did.
        """
        began = time.monotonic()
        self._tell(spec, spec.warnings, logging.WARNING)
        try:
            async with asyncio.timeout(self._timeout):
                with self._sessions.mounting(spec) as room:
                    done = await self._mount(spec, asyncio.get_running_loop().time() + self._timeout, room, spent)
        except TimeoutError as error:
            raise OutOfTime(
                f"the mount took longer than {self._timeout:g} s; Vault at {spec.server.address} was still to answer",
                "check Vault's load and the network to it; kubelet tries again by itself",
            ) from error
        seconds = time.monotonic() - began
        _log.info(
            "mounted",
            extra={
                "pod": str(spec.pod),
                "secret_provider_class": spec.class_name,
                "files": len(done.made.files),
                "milliseconds": round(seconds * 1000),
            },
        )
        return MountResult(done.made.files, done.made.versions, _event(spec, done, seconds))

    async def check(self, templates: Sequence[ObjectSpec], owner: str) -> None:
        """Raise InvalidClass where one of the objects' templates is none. ``owner`` is the pod's namespace."""
        await self._renderer.check(templates, owner)

    def _tell(self, spec: MountSpec, sentences: Sequence[str], level: int) -> None:
        """Log what is to be known of the class, once: its volumes are mounted again every minute."""
        for sentence in sentences:
            key = (spec.pod.namespace, spec.class_name, sentence)
            if key not in self._told:
                _log.log(level, "SecretProviderClass %s: %s", spec.class_name, sentence, extra={"pod": str(spec.pod)})
            self._told[key] = None
            self._told.move_to_end(key)
        while len(self._told) > MAX_TOLD:
            self._told.popitem(last=False)

    async def _mount(self, spec: MountSpec, deadline: float, room: Room, spent: Callable[[float], None]) -> _Done:
        async def login(until: float) -> Auth:
            vault = self._servers.get(spec.server, spec.pod.uid)
            return await log_in(vault, spec, self._tokens, until, telemetry=self._telemetry)

        shaped = [wanted for wanted in spec.objects if not wanted.plain]
        if shaped:
            await self._renderer.check(shaped, spec.pod.namespace)
        # The cache holds what it is asked by: of a large class that is more than the plan is worth.
        reads, distinct = (plan if spec.large else self._plan)(spec.objects)
        key, fetching = self._version_key.known, self._sessions.fetch(spec, distinct, login, deadline, room)
        if key is not None:
            fetched = await fetching
        else:
            # The key is fetched beside the secrets, and waited for no longer than they take or its own few seconds.
            key, fetched = await asyncio.gather(self._version_key.get(), fetching)
        made = fetched.made
        if not isinstance(made, _Made) or made.key != key or made.objects != spec.objects:
            made = await self._make(spec, reads, fetched.answers, key, deadline, spent)
        self._sessions.settle(spec, made.secrets, made if made.size <= MAX_MADE_BYTES else None)
        return _Done(made, reads, fetched)

    async def _make(
        self,
        spec: MountSpec,
        reads: Sequence[tuple[Read, ...]],
        answers: Mapping[Read, VaultSecret | ProviderError],
        key: bytes | None,
        deadline: float,
        spent: Callable[[float], None],
    ) -> _Made:
        """Make of the answers what the class asks for. Raises ProviderError."""
        made, secrets, failures = await self._rendered(spec, reads, answers, spent)
        if failures:
            # In the class's order: the first one's code is the mount's (docs/contract.md section 1).
            order = {wanted.name: number for number, wanted in enumerate(spec.objects)}
            failures.sort(key=lambda failure: order[failure[0].name])
            raise await self._failed(failures, spec, deadline)
        own_key = key_of(key, spec.pod.namespace, spec.server.address, spec.server.namespace) if key else None
        size = sum([len(file.contents) for files in made.values() for file in files])
        if size <= MAX_ON_LOOP_BYTES and all(wanted.plain for wanted in spec.objects):
            files, versions = _assembled(spec, made, self._versions, own_key)
        else:
            # Their files may be thousands.
            files, versions = await asyncio.to_thread(_assembled, spec, made, self._versions, own_key)
        marks = dict(versions) if key is not None else {name: _mark(files) for name, files in made.items()}
        return _Made(spec.objects, key, secrets, files, versions, marks, size)

    async def _rendered(
        self,
        spec: MountSpec,
        reads: Sequence[tuple[Read, ...]],
        answers: Mapping[Read, VaultSecret | ProviderError],
        spent: Callable[[float], None],
    ) -> tuple[Mapping[str, Files], dict[Read, VaultSecret], list[_Failure]]:
        """The files of each object, the secrets they were made of, and what failed."""
        failures: list[_Failure] = []

        def failed(wanted: ObjectSpec, request: SecretRequest, error: ProviderError) -> None:
            if wanted.optional and isinstance(error, SecretNotFound):
                name = _named([wanted])
                about = "" if error.what.startswith(name) else name
                what = one_line(f"left out, since it is optional: {about}{error}", MAX_WHAT)
                self._tell(spec, [what], logging.INFO)
            else:
                failures.append((wanted, request, error.alone()))

        contents = Contents(len(spec.objects))
        answered: list[Answered] = []
        secrets: dict[Read, VaultSecret] = {}
        on_loop = 0
        for wanted, together in zip(spec.objects, reads, strict=True):
            responses = []
            for read in together:
                answer = answers[read]
                if isinstance(answer, ProviderError):
                    failed(wanted, read.request, answer)
                else:
                    secrets[read] = answer
                    responses.append(answer.response)
                    on_loop += answer.size
            if len(responses) < len(together):
                continue
            if not wanted.plain or on_loop > MAX_ON_LOOP_BYTES:
                answered.append(Answered(wanted, responses))
                continue
            try:
                file = RenderedFile(wanted.name, wanted.mode, render_plain(wanted, responses[0]))
                contents.add(wanted.name, (file,))
            except ProviderError as error:
                failed(wanted, wanted.request, error)
            if contents.full:
                # A thousand objects of one large secret would be gigabytes before anybody counted them.
                break
        if answered and not contents.full:
            volume, owner = spec.target_path, spec.pod.namespace
            errors = await self._renderer.render(volume, answered, owner, contents, spent=spent)
            for given, found in zip(answered, errors, strict=True):
                if found is not None:
                    failed(given.spec, given.spec.request, found)
        return contents.made, secrets, failures

    async def _failed(self, failures: Sequence[_Failure], spec: MountSpec, deadline: float) -> MountFailed:
        """All failing objects in one error; objects that failed alike share a sentence."""
        alike: dict[str, tuple[list[ObjectSpec], SecretRequest, ProviderError]] = {}
        for wanted, request, error in failures:
            alike.setdefault(str(error), ([], request, error))[0].append(wanted)
        until = min(deadline - EXPLAIN_SECONDS / 2, asyncio.get_running_loop().time() + EXPLAIN_SECONDS)
        refused = [found for found in alike.values() if isinstance(found[2], AccessDenied | SecretNotFound)]
        advised = await asyncio.gather(
            *(self._advice(error, request, spec, until) for _, request, error in refused[:MAX_EXPLAINED])
        )
        better = {id(error): advice for (_, _, error), advice in zip(refused, advised, strict=False)}
        sentences = []
        for objects, _, error in alike.values():
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
        if engine is not None and engine.kind == "kv":
            rest = request.path.removeprefix(engine.path)
            if engine.version == "2" and rest.split("/", 1)[0] not in KV2_PREFIXES:
                return f'{engine.path} is a KV version 2 engine: write secretPath "{engine.path}data/{rest}"'
            if engine.version != "2" and rest.startswith("data/"):
                return f'{engine.path} is a KV version 1 engine: write secretPath "{engine.path}{rest[len("data/") :]}"'
        if isinstance(error, AccessDenied):
            can = CAPABILITIES.get(request.method, "update")
            return (
                f"check secretPath, whose mount and spelling Vault does not tell from a denial; if it is right, give a "
                f'policy of role "{spec.login.role}" the capability "{can}" on "{request.path}"'
            )
        return error.advice or "check secretPath, and secretKey"


def plan(objects: tuple[ObjectSpec, ...]) -> tuple[Sequence[tuple[Read, ...]], Sequence[Read]]:
    """The read of each source of each object, and all of them, each once (docs/contract.md section 2).

    Where objects differ in when a request is to be renewed or read again, the strictest holds for it; what is to be
    issued on every mount is never shared with what is kept.
    """
    together: dict[tuple[SecretRequest, bool], Read] = {}
    for wanted in objects:
        for source in wanted.sources:
            key = (source.request, wanted.fresh)
            percent, after = wanted.renew_percent, wanted.refresh_after
            before = together.get(key)
            if before is not None:
                percent, after = min(before.renew_percent, percent), min(before.refresh_after, after)
            together[key] = Read(source.request, wanted.fresh, percent, after)
    reads = [tuple([together[source.request, wanted.fresh] for source in wanted.sources]) for wanted in objects]
    return tuple(reads), tuple(together.values())


def _assembled(
    spec: MountSpec, made: Mapping[str, Files], versions: Versions, key: bytes | None
) -> tuple[tuple[RenderedFile, ...], tuple[tuple[str, str], ...]]:
    """All files of the volume, and each object's version. Raises SecretNotFound and BadSecret."""
    files = _all_files(spec, made)
    if not all(wanted.plain for wanted in spec.objects):
        _refuse_clashes(spec.objects, made)
    return files, tuple([(wanted.name, _version(versions, key, wanted, made)) for wanted in spec.objects])


def _version(versions: Versions, key: bytes | None, wanted: ObjectSpec, made: Mapping[str, Files]) -> str:
    files = made.get(wanted.name)
    return versions.of(key, wanted, None if files is None else [(file.path, file.contents) for file in files])


def _all_files(spec: MountSpec, made: Mapping[str, Files]) -> tuple[RenderedFile, ...]:
    """The files of the volume, in the order of the class. Raises SecretNotFound where there is none."""
    files: list[RenderedFile] = []
    for wanted in spec.objects:
        files += made.get(wanted.name, ())
    if not files:
        # docs/contract.md section 1: the driver would leave the volume's old files where they are.
        raise SecretNotFound(
            "the mount comes to no file: Vault has nothing for any of its optional objects",
            "write one of the secrets, or make one object not optional",
        )
    return tuple(files)


def _refuse_clashes(objects: Sequence[ObjectSpec], made: Mapping[str, Files]) -> None:
    """What of the paths only the secrets' keys tell (docs/contract.md section 1, Paths); spc has seen to the rest.

    Raises BadSecret where two files are one, or one is another's directory.
    """
    owned = [(file.path, wanted.name) for wanted in objects for file in made.get(wanted.name, ())]
    for upper, lower in clashes([path for path, _ in owned]):
        (path, one), (below, other) = owned[upper], owned[lower]
        how = "is also a file" if path == below else f'is a directory to "{one_line(below, MAX_NAME)}"'
        raise BadSecret(
            f'object "{one_line(one, MAX_NAME)}": its file "{one_line(path, MAX_NAME)}" {how} of object '
            f'"{one_line(other, MAX_NAME)}"',
            "leave the key out by excludes, or rename one of the objects",
        )


def _mark(files: Files) -> str:
    """What tells two makings of an object apart within this process, where no key gives it a version."""
    return str(hash(tuple((file.path, file.contents) for file in files)))


def _event(spec: MountSpec, done: _Done, seconds: float) -> Mounted:
    """What is told of a mount that succeeded."""
    made, fetched = done.made, done.fetched

    def objects() -> list[MountedObject]:
        return [
            _mounted(wanted, version, together, fetched)
            for wanted, (_, version), together in zip(spec.objects, made.versions, done.reads, strict=True)
        ]

    supplies = list(fetched.at_hand.values())
    kept = supplies.count(Supply.KEPT)
    return Mounted(
        spec=spec,
        seconds=seconds,
        files=len(made.files),
        size=made.size,
        marks=made.marks,
        # Without the key an object has no version, and there is at least one that is not absent.
        keyed=all(version for _, version in made.versions),
        accessor=fetched.accessor,
        read=len(fetched.answers) - len(supplies),
        kept=kept,
        remembered=len(supplies) - kept,
        objects=objects,
    )


def _mounted(wanted: ObjectSpec, version: str, together: Sequence[Read], fetched: Fetched) -> MountedObject:
    secrets: list[VaultSecret] = []
    kinds: list[Kind] = []
    supplies: list[Supply] = []
    for read in together:
        answer = fetched.answers[read]
        if isinstance(answer, VaultSecret):
            secrets.append(answer)
            kinds.append(fetched.kind(read))
            supplies.append(fetched.at_hand.get(read, Supply.READ))
    return MountedObject(
        wanted.name,
        tuple([read.request.path for read in together]),
        version,
        tuple([secret.request_id for secret in secrets]),
        tuple([secret.lease_id for secret in secrets if secret.leased]),
        # Of several sources, what makes the object change most, and what cost most.
        Kind.LEASED if Kind.LEASED in kinds else Kind.ISSUED if Kind.ISSUED in kinds else Kind.STATIC,
        Supply.READ if Supply.READ in supplies else Supply.KEPT if Supply.KEPT in supplies else Supply.REMEMBERED,
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
