"""The driver's side of a benchmark, in a process of its own: mounts as told, timed, each answer held to the byte.

Answers are looked at when the last one is there, so that the looking takes no time from the daemon.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from provider.v1alpha1 import service_pb2
from tests.stand.kubeapi import Pod

MODE = 0o644
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_DEADLINE = 120.0
_METHOD = "/v1alpha1.CSIDriverProvider/Mount"
# gRPC's C core, which is not the driver's, may lose calls in the moment in which a server lets a connection go by its
# age: 17 of 39,000 at an age of 50 ms, 110 at a time, with nothing of ours on either side. Whether such a call had
# begun shows in the counts.
_AGAIN = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class BenchFailed(Exception):
    """A mount failed, or its answer was not what it has to be."""


@dataclass(frozen=True)
class Lane:
    """One volume, mounted `rounds` times one after the other, every `period` seconds, first after `offset`.

    A mount that is late is made at once. `files` is what each answer has to hold, byte for byte; None where only
    Vault knows, and the answers come back.
    """

    request: bytes = field(repr=False)
    files: Mapping[str, bytes] | None = field(repr=False)
    rounds: int = 1
    period: float = 0.0
    offset: float = 0.0


@dataclass(frozen=True)
class Driven:
    """What became of a lane: when each mount began and ended, in time.monotonic()'s seconds.

    `answers` has the distinct answers of a lane without `files`, in the order in which they came.
    """

    times: tuple[tuple[float, float], ...]
    answers: tuple[Mapping[str, bytes], ...] = field(repr=False)

    @property
    def seconds(self) -> list[float]:
        """How long each mount took."""
        return [ended - began for began, ended in self.times]


def wall(driven: Sequence[Driven]) -> float:
    """Seconds from the first mount's beginning to the last one's end."""
    began = min(lane.times[0][0] for lane in driven)
    return max(lane.times[-1][1] for lane in driven) - began


def mount_request(pod: Pod, parameters: Mapping[str, str], tokens: Mapping[str, str], target: str) -> bytes:
    """What the driver sends for a pod's volume (docs/contract.md section 1)."""
    sent = {audience: {"token": token, "expirationTimestamp": _FAR} for audience, token in tokens.items()}
    attributes = {
        **parameters,
        "csi.storage.k8s.io/pod.name": pod.name,
        "csi.storage.k8s.io/pod.namespace": pod.namespace,
        "csi.storage.k8s.io/pod.uid": pod.uid,
        "csi.storage.k8s.io/serviceAccount.name": pod.service_account,
        "csi.storage.k8s.io/serviceAccount.tokens": json.dumps(sent),
        "csi.storage.k8s.io/ephemeral": "true",
        "secretProviderClass": "bench",
    }
    request = service_pb2.MountRequest(
        attributes=json.dumps(attributes), secrets="null", target_path=target, permission=json.dumps(MODE)
    )
    return request.SerializeToString()


_FAR = "2099-01-01T00:00:00Z"


class Load:
    """The process that makes the mounts, over one connection to a socket as the driver does; a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="load", daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def drive(self, socket: Path, lanes: Sequence[Lane]) -> list[Driven]:
        """Drive all lanes at the same time; what became of each. Raises BenchFailed."""
        self._pipe.send((socket, list(lanes)))
        try:
            answer: list[Driven] | str = self._pipe.recv()
        except EOFError:
            raise BenchFailed("the load's process ended") from None
        if isinstance(answer, str):
            raise BenchFailed(answer)
        return answer


def _serve(pipe: Connection) -> None:
    os.environ["GRPC_VERBOSITY"] = "NONE"
    while True:
        try:
            socket, lanes = pipe.recv()
        except EOFError:
            return
        try:
            answer: list[Driven] | str = asyncio.run(_drive(socket, lanes))
        except BenchFailed as error:
            answer = str(error)
        pipe.send(answer)


async def _drive(socket: Path, lanes: Sequence[Lane]) -> list[Driven]:
    import grpc  # here, since the environment has to be set before

    options: list[tuple[str, Any]] = [
        ("grpc.default_authority", "localhost"),
        ("grpc.service_config", json.dumps(_AGAIN)),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(f"unix:{socket}", options) as channel:
        # A connection is there before the clock runs, as the driver's is.
        await channel.channel_ready()
        call = channel.unary_unary(_METHOD, None, None)
        start = time.monotonic()

        async def drive(lane: Lane) -> tuple[list[tuple[float, float]], list[bytes]]:
            times, answers = [], []
            for number in range(lane.rounds):
                early = start + lane.offset + number * lane.period - time.monotonic()
                if early > 0:
                    await asyncio.sleep(early)
                began = time.monotonic()
                try:
                    answer = await call(lane.request, timeout=_DEADLINE, wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    raise BenchFailed(f"{error.code().name}: {error.details()}") from error
                times.append((began, time.monotonic()))
                answers.append(answer)
            return times, answers

        driven = await asyncio.gather(*map(drive, lanes))
    return [Driven(tuple(times), _checked(lane, answers)) for lane, (times, answers) in zip(lanes, driven, strict=True)]


def _checked(lane: Lane, answers: Sequence[bytes]) -> tuple[Mapping[str, bytes], ...]:
    distinct: list[Mapping[str, bytes]] = []
    for answer in answers:
        message = service_pb2.MountResponse.FromString(answer)
        files = {file.path: file.contents for file in message.files}
        if len(files) != len(message.files) or any(file.mode != MODE for file in message.files):
            raise BenchFailed("an answer has a path twice, or a wrong mode")
        if {entry.id for entry in message.object_version if entry.version} != files.keys():
            raise BenchFailed("an answer lacks an object's version")
        if lane.files is None:
            if files not in distinct:
                distinct.append(files)
        elif files != lane.files:
            wrong = sorted(path for path in files.keys() | lane.files.keys() if files.get(path) != lane.files.get(path))
            raise BenchFailed(f"an answer's files are not what Vault holds: {', '.join(wrong[:5])}")
    return tuple(distinct)
