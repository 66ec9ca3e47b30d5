"""The driver's two calls: request bytes in, response bytes out, and every failure one of five gRPC codes.

Messages are decoded and encoded here and not by gRPC, which answers UNKNOWN to bytes that are no message (a string
that is not UTF-8 is enough), and which would send a response before its size is known.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from provider import __version__
from provider.errors import MAX_MESSAGE_BYTES, Code, InvalidClass, OutOfTime, ProviderError, fit
from provider.mount import MountResult
from provider.redact import one_line
from provider.render import too_large
from provider.server.limits import REFUSAL_SECONDS, PodFloods, PodLimits, Spending
from provider.settings import MAX_MOUNT_BYTES
from provider.spc import FaultyClass, MountSpec, ObjectSpec, Parser, Pod, mounting_class, mounting_pod
from provider.telemetry.events import MountRefused, Telemetry
from provider.turns import Turns
from provider.v1alpha1 import service_pb2 as pb

PROTOCOL_VERSION: Final = "v1alpha1"
RUNTIME_NAME: Final = "vault-csi-provider"
# Files of a volume that take more than some 5 ms to serialise.
MANY_FILES: Final = 1000
# Seconds over the mount's own limit, which says better what was waited for: this one is for what forgets it.
BACKSTOP_SECONDS: Final = 1.0

_logger = logging.getLogger(__name__)


class Mounts(Protocol):
    """What fetches a volume; provider.mount.Mounter in the daemon. Raises ProviderError."""

    async def mount(self, spec: MountSpec, spent: Callable[[float], None]) -> MountResult:
        """All files of ``spec``, or an error; ``spent`` is told the seconds of processor time of unusual rendering."""
        ...

    async def check(self, templates: Sequence[ObjectSpec], owner: str) -> None:
        """InvalidClass where one of them is no template; ``owner`` is the pod's namespace."""
        ...


class _About:
    """What is known of a call, for whoever reads how it ended."""

    def __init__(self) -> None:
        self.spec: MountSpec | None = None
        self.pod: Pod | None = None
        self.class_name = ""
        self.target_path = ""

    def know(self, spec: MountSpec) -> None:
        """The request could be read."""
        self.spec, self.pod, self.class_name, self.target_path = spec, spec.pod, spec.class_name, spec.target_path

    def fields(self) -> dict[str, Any]:
        """What the log says of it."""
        if self.pod is None:
            return {}
        return {"pod": str(self.pod), "pod_uid": self.pod.uid, "secret_provider_class": self.class_name}


class Service:
    """Answers Version and Mount. ``mount_timeout``, in seconds, is what ``mounts`` keeps by itself.

    Only INVALID_ARGUMENT, PERMISSION_DENIED, NOT_FOUND, FAILED_PRECONDITION and INTERNAL leave it
    (docs/contract.md section 1).
    """

    def __init__(
        self, parser: Parser, mounts: Mounts, mount_timeout: float, telemetry: Telemetry, limits: PodLimits
    ) -> None:
        self._telemetry = telemetry
        self._limits = limits
        self._parser = parser
        self._mounts = mounts
        self._limit = mount_timeout + BACKSTOP_SECONDS
        # One thread: a class of a megabyte takes long to read, and must hold up neither the event loop nor more
        # than one of the node's cores.
        self._reader = ThreadPoolExecutor(1, "parse")
        # Pod by pod, since a hostile class takes up to a second, and a pod may have many.
        self._reading = Turns(1)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What a gRPC server is to be given."""
        # Without (de)serializers both are bytes.
        handlers = {
            "Version": grpc.unary_unary_rpc_method_handler(self.version),
            "Mount": grpc.unary_unary_rpc_method_handler(self.mount),
        }
        service = pb.DESCRIPTOR.services_by_name["CSIDriverProvider"].full_name
        return grpc.method_handlers_generic_handler(service, handlers)

    def close(self) -> None:
        """Let go of the thread; no call may be under way."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def version(self, data: bytes, context: Any) -> bytes:
        """The protocol's version and ours, whatever the request says."""
        answer = pb.VersionResponse(version=PROTOCOL_VERSION, runtime_name=RUNTIME_NAME, runtime_version=__version__)
        return answer.SerializeToString()

    async def mount(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """All files of one volume, or a status error whose message tells a person what to do."""
        about = _About()
        began = asyncio.get_running_loop().time()
        failure: ProviderError
        try:
            async with asyncio.timeout(self._limit):
                return await self._mount(data, about)
        except ProviderError as error:
            failure = error.alone()
        except TimeoutError:
            failure = OutOfTime(
                f"the mount is not done after {self._limit:g} s",
                "look whether Vault and the Kubernetes API answer in time; --mount-timeout sets the limit",
            )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                _logger.warning("the caller gave the mount up", extra=about.fields())
                raise
            # Nobody cancelled this call: a cancelled part leaked. gRPC would leave the caller without an answer.
            failure = _unexpected(error, about)
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets a code that kubelet retries
            failure = _unexpected(error, about)
        message = self._tell(failure, about, asyncio.get_running_loop().time() - began)
        # Not abort: its exception is in a cycle with the frames of the call, and so with the whole request.
        context.set_code(grpc.StatusCode[failure.code.value])
        context.set_details(message)
        return b""

    def _tell(self, failure: ProviderError, about: _About, seconds: float) -> str:
        """Tell whoever listens of a mount that failed; and what to tell the caller."""
        message = fit(one_line(str(failure), MAX_MESSAGE_BYTES))
        level = logging.ERROR if failure.code is Code.INTERNAL else logging.WARNING
        # docs/contract.md section 1: the driver hides the failure of a re-mount, so the log has to tell.
        told = {**about.fields(), "milliseconds": round(seconds * 1000), "code": failure.code.name}
        _logger.log(level, "mount failed: %s", message, extra=told)
        self._telemetry.record(
            MountRefused(
                failure.code.name, message, seconds, about.pod, about.class_name, about.target_path, about.spec
            )
        )
        return message

    async def _mount(self, data: bytes, about: _About) -> bytes:
        try:
            request = pb.MountRequest.FromString(data)
        except DecodeError:
            raise InvalidClass(["the driver's request is no MountRequest, or has text that is not UTF-8"]) from None
        about.pod, about.target_path = mounting_pod(request.attributes), request.target_path
        pod = about.pod.uid if about.pod else ""
        try:
            spec = await self._read(request, pod)
        except ProviderError as error:
            # The class that could not be read has a name all the same.
            about.class_name = mounting_class(request.attributes)
            if isinstance(error, PodFloods):
                await asyncio.sleep(min(REFUSAL_SECONDS, self._limit / 2))
            if isinstance(error, FaultyClass) and about.pod is not None:
                raise await self._with_templates(error, about.pod.namespace) from None
            raise
        about.know(spec)
        result = await self._mounts.mount(spec, functools.partial(self._limits.spend, pod, Spending.RENDERING))
        many = len(result.files) > MANY_FILES
        answer = await asyncio.to_thread(_answer, result) if many else _answer(result)
        self._limits.spend(pod, Spending.BYTES, len(answer))
        if result.event is not None:
            self._telemetry.record(result.event)
        return answer

    async def _with_templates(self, error: FaultyClass, owner: str) -> InvalidClass:
        """All faults of the class, those of its templates too: they have to be run to be known."""
        try:
            await self._mounts.check(error.templates, owner)
        except InvalidClass as more:
            return InvalidClass([*error.faults, *more.faults])
        except ProviderError:
            pass  # no time to tell, and it would not be the class's fault
        return error

    async def _read(self, request: pb.MountRequest, pod: str) -> MountSpec:
        """What the request asks for, if the pod may still ask. Raises PodFloods and InvalidClass."""
        self._limits.begin(pod)
        spec = self._parser.recall(request.attributes, request.secrets, request.target_path, request.permission)
        if spec is None:
            spec = await self._read_anew(request, pod)
        # Others of the pod's mounts may have spent what was left meanwhile.
        self._limits.check(pod, Spending.OBJECTS)
        self._limits.spend(pod, Spending.OBJECTS, sum([len(wanted.sources) for wanted in spec.objects]))
        return spec

    async def _read_anew(self, request: pb.MountRequest, pod: str) -> MountSpec:
        await self._reading.take(pod)
        try:
            self._limits.check(pod, Spending.PARSING)
            spec, seconds = await asyncio.get_running_loop().run_in_executor(self._reader, self._parse, request)
            self._limits.spend(pod, Spending.PARSING, seconds)
        finally:
            self._reading.give(pod)
        if isinstance(spec, InvalidClass):
            raise spec
        return spec

    def _parse(self, request: pb.MountRequest) -> tuple[MountSpec | InvalidClass, float]:
        """What the request comes to, and the seconds of processor time that it took."""
        began = time.thread_time()
        spec: MountSpec | InvalidClass
        try:
            spec = self._parser.parse(request.attributes, request.secrets, request.target_path, request.permission)
        except InvalidClass as error:
            spec = error
        return spec, time.thread_time() - began


def _unexpected(error: BaseException, about: _About) -> ProviderError:
    """An error for the caller that has nothing of ``error`` but an id, under which the log has it."""
    incident = secrets.token_hex(4)
    _logger.error("unexpected error in a mount", exc_info=error, extra={**about.fields(), "incident": incident})
    return ProviderError(
        f"internal error {incident}", f"this is a bug in {RUNTIME_NAME}: report it with the log's lines of that id"
    )


def _answer(result: MountResult) -> bytes:
    """The serialised response; ProviderError where the driver would take it for something else than it is."""
    if not result.files or not result.versions:
        # docs/contract.md section 1: the driver would keep the volume's old files, and call it a success.
        raise ProviderError("the mount came to no file at all", f"this is a bug in {RUNTIME_NAME}: report it")
    size = sum([len(file.contents) for file in result.files])
    if size <= MAX_MOUNT_BYTES:
        response = pb.MountResponse(
            files=[pb.File(path=file.path, mode=file.mode, contents=file.contents) for file in result.files],
            object_version=[pb.ObjectVersion(id=name, version=version) for name, version in result.versions],
        )
        data = response.SerializeToString()
        size = len(data)
        if size <= MAX_MOUNT_BYTES:
            return data
    raise too_large(f"its {len(result.files)} files come to", size, result.files)
