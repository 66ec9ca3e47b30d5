"""A daemon's parts in one process, between a Vault and a Kubernetes API that answer whatever a test says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

from provider.cli.parts import build
from provider.clock import SystemClock
from provider.errors import MAX_MESSAGE_BYTES, Code, encoded_size
from provider.server import PodLimits, Server
from provider.settings import Settings
from provider.telemetry.lines import LineWriter
from provider.telemetry.log import _Json
from provider.v1alpha1 import service_pb2 as pb
from provider.v1alpha1 import service_pb2_grpc
from tests.spc_classes import GIVEN, OBJECT
from tests.stand.faulty import Answer, Arrival, Faulty, secret, token
from tests.stand.pki import Authority
from tests.stand.waiting import eventually
from tests.test_server import dialled
from tests.unseen import is_one_line

CANARY = "canary-f00dfeed"
"""In every secret that is planted: tokens, values, bodies."""

TOKEN = f"hvs.{CANARY}"
JWT = f"eyJ{CANARY}.{CANARY}.{CANARY}"
MOUNT_SECONDS = 4.0
"""The daemon's --mount-timeout. A mount takes no longer, whatever is answered."""

LIFE_SECONDS = 1.0
"""How long a connection lives, and so the end of the server takes."""

ALLOWED = {code.value for code in Code} - {"INTERNAL"}
"""The codes that input may lead to: the fifth is a bug's."""

tried: Counter[str] = Counter()
"""How many inputs of each kind there were."""


@dataclass(frozen=True)
class Ended:
    """How a mount ended: code ("OK" too), message, files, and what it had the daemon write meanwhile."""

    code: str
    message: str
    files: Mapping[str, bytes]
    seconds: float
    told: str


class _Scripted(Faulty):
    """Answers what ``reply`` says, to whatever is asked."""

    reply: Callable[[Arrival], Answer]

    async def _answer(self, arrival: Arrival) -> Answer:
        self.arrivals.clear()  # thousands come
        return self.reply(arrival)


class _Lines(logging.Handler):
    """Keeps what the log would have written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Json())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def vault(arrival: Arrival) -> Answer:
    """A Vault that lets everybody in and has a secret everywhere."""
    path = arrival.path.removeprefix("/v1/")
    if path.endswith("/login"):
        return token(TOKEN)
    if path.startswith("sys/internal/ui/mounts/"):
        return secret({"path": "secret/", "type": "kv", "options": {"version": "2"}})
    return secret({"data": {"password": CANARY, "nested": {"list": [CANARY, 1, None]}}, "metadata": {"version": 1}})


def kubernetes(arrival: Arrival) -> Answer:
    """An API server that gives a token to everybody, and has no pods."""
    if arrival.path.endswith("/token"):
        return Answer(201, {"kind": "TokenRequest", "status": {"token": JWT}})
    return Answer(body={"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "items": []})


class Hostile:
    """The parts, reached through a real socket; a context manager. ``vault`` and ``kube`` are told what to say."""

    def __init__(self, directory: Path) -> None:
        authority = Authority()
        self.vault, self.kube = _Scripted(), _Scripted(certificate=authority.server())
        self.behave()
        self._ca = base64.b64encode(authority.pem).decode()
        self._directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self._pods = 0
        self._lines = _Lines()
        self._audit: list[bytes] = []
        self._written = 0  # lines of the audit log, ever

    def behave(self) -> None:
        """Have both servers answer as they should."""
        self.vault.reply, self.kube.reply = vault, kubernetes

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (self.vault, self.kube):
                stack.enter_context(server)
            self._runner = stack.enter_context(asyncio.Runner())
            logger = logging.getLogger()
            logger.addHandler(self._lines)
            stack.callback(logger.removeHandler, self._lines)
            before = logging.getLogger("provider").level
            logging.getLogger("provider").setLevel(logging.DEBUG)
            stack.callback(logging.getLogger("provider").setLevel, before)
            parts = contextlib.AsyncExitStack()
            stack.callback(lambda: self._runner.run(parts.aclose()))
            self._stub = self._runner.run(self._start(parts))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def _start(self, parts: contextlib.AsyncExitStack) -> Any:
        key = self._directory / "hmac-key"
        key.write_bytes(b"k" * 32)
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [
                {"name": "c", "cluster": {"server": self.kube.address, "certificate-authority-data": self._ca}}
            ],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
        }
        self.kubeconfig.write_text(json.dumps(config))
        settings = Settings(
            vault_addr=self.vault.address,
            hmac_key_file=str(key),
            kubeconfig=str(self.kubeconfig),
            mount_timeout=MOUNT_SECONDS,
            audit_log="stderr",
            max_pod_mounts=0,
        )
        writer = self._writer = LineWriter("audit", self._write_audit)
        writer.start()
        built = await parts.enter_async_context(build(settings, stderr=writer))
        path = self._directory / "s"
        # Kept, since a gRPC server that nobody holds ends.
        server = self._server = Server(
            str(path),
            built.parser,
            built.mounts,
            MOUNT_SECONDS,
            built.telemetry,
            limits=PodLimits(settings, SystemClock()),
            connection_age=LIFE_SECONDS,
        )
        await server.start()
        parts.push_async_callback(self._server.stop)
        channel = await parts.enter_async_context(dialled(path))
        return service_pb2_grpc.CSIDriverProviderStub(channel)

    def mount(
        self,
        kind: str,
        objects: str = OBJECT,
        *,
        raw: str | None = None,
        secrets: str = "null",
        target_path: str = "/volume",
        permission: str = "420",
        **parameters: str,
    ) -> Ended:
        """Mount for a pod that never was before, as an input of this ``kind``; ``raw`` in place of all attributes."""
        tried[kind] += 1
        self._pods += 1
        # A new pod logs in anew, and is not over its share.
        given = {**GIVEN, "csi.storage.k8s.io/pod.uid": f"pod-{self._pods}", "objects": objects, **parameters}
        request = pb.MountRequest(
            attributes=json.dumps(given) if raw is None else _text(raw),
            secrets=_text(secrets),
            target_path=_text(target_path),
            permission=_text(permission),
        )
        self._lines.lines.clear()
        self._audit.clear()
        began = time.monotonic()
        code, message, files = self._runner.run(self._call(request))
        seconds = time.monotonic() - began
        # The audit log is written in a thread. Of a mount that changed nothing it has no line.
        eventually(lambda: self._written == self._writer.taken, "all is told")
        told = "\n".join([*self._lines.lines, b"".join(self._audit).decode()])
        return Ended(code, message, files, seconds, told)

    def _write_audit(self, lines: Sequence[bytes]) -> None:
        self._audit.extend(lines)
        self._written += len(lines)

    async def _call(self, request: pb.MountRequest) -> tuple[str, str, dict[str, bytes]]:
        try:
            answer = await self._stub.Mount(request)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or "", {}
        return "OK", "", {file.path: file.contents for file in answer.files}

    def run(self, what: Any) -> Any:
        """What a coroutine comes to, in the daemon's loop."""
        return self._runner.run(what)


def _text(text: str) -> str:
    """``text`` as it can stand in a message: lone surrogates cannot."""
    return text.encode("utf-8", "replace").decode()


def judge(ended: Ended) -> Ended:
    """Assert what holds for every mount, whatever its input: a typed error or files, in time, and no secret told."""
    assert ended.code == "OK" or ended.code in ALLOWED, (ended.code, ended.message, ended.told)
    # The mount's own limit, a second for the server's, and what a busy machine adds.
    assert ended.seconds < MOUNT_SECONDS + 10
    if ended.code == "OK":
        assert ended.files
    else:
        assert ended.message
        check_message(ended.message)
    assert "unexpected error" not in ended.told
    assert CANARY not in ended.told, ended.told
    for line in ended.told.splitlines():
        assert is_one_line(line), line
        json.loads(line)
    return ended


def check_message(message: str) -> None:
    """Assert that a message is for a person: one line, short, and without a secret or a traceback."""
    assert encoded_size(message) <= MAX_MESSAGE_BYTES
    assert is_one_line(message)
    assert CANARY not in message
    assert "Traceback" not in message
