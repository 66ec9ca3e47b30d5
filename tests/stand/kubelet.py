"""A stand-in for kubelet: mounts that fail are tried again, and mounts that succeeded are mounted again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import grpc

from tests.stand.driver import Driver, MountOutcome
from tests.stand.kubeapi import Pod
from tests.stand.process import StandError

if TYPE_CHECKING:
    from tests.live import Cluster, Daemon

FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 122.0
"""Seconds before a volume that failed is tried again: twice as long after each failure, as kubelet has it."""

MAYBE_IN_PROGRESS = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    }
)
"""What a provider must never answer with (docs/contract.md section 1)."""


_REDIAL = 1.0
"""Seconds; the least that gRPC waits by itself."""


@dataclass(frozen=True)
class Failure:
    """A mount that failed: its status code, its message, and from when to when it went on, as `time.monotonic()`."""

    code: str
    details: str
    began: float
    ended: float

    def is_cut_login(self, cuts: Sequence[tuple[float, float]]) -> bool:
        """Whether Vault denied the login of a mount while, in one of ``cuts``, it was sealed or changed its leader.

        Vault ends its TokenReview then, and answers 403 as to a pod that may not log in (docs/contract.md section 3).
        """
        return (
            self.code == grpc.StatusCode.PERMISSION_DENIED.name
            and "denied: Vault answered 403: permission denied" in self.details
            and any(self.began <= end and begin <= self.ended for begin, end in cuts)
        )

    def __str__(self) -> str:
        return f"{self.code}: {self.details}"


class Kubelet:
    """Mounts for the pods of a node, used as a context manager; for one thread, which has a connection of its own.

    `patience` is how long, in seconds, a volume may go on failing before StandError says that it failed for good.
    `longest_backoff` compresses kubelet's. With `restarts`, the daemon ends at any moment, so that a call may come to
    UNAVAILABLE by itself, and gRPC's own pauses are compressed too.
    """

    def __init__(
        self,
        cluster: Cluster,
        daemon: Daemon,
        *,
        patience: float,
        longest_backoff: float = LONGEST_BACKOFF,
        restarts: bool = False,
    ) -> None:
        self.mounts = 0
        """Mounts that succeeded."""
        self.failures: list[Failure] = []
        """The others."""
        self._cluster = cluster
        self._driver = Driver(daemon.socket, longest_redial=_REDIAL) if restarts else Driver(daemon.socket)
        self._patience = patience
        self._longest_backoff = longest_backoff
        self._tolerated = {grpc.StatusCode.UNAVAILABLE} if restarts else set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.close()

    def mount(self, pod: Pod, parameters: Mapping[str, str], class_name: str = "secrets") -> MountOutcome:
        """Mount a volume, however often that takes."""

        def once() -> MountOutcome:
            return self._driver.mount(pod, parameters, tokens=self._cluster.tokens(pod), class_name=class_name)

        return self._surely(pod, once)

    def remount(self, mounted: MountOutcome) -> MountOutcome:
        """Mount it again, with a token as fresh as kubelet's, however often that takes."""
        pod = mounted.pod
        return self._surely(pod, lambda: self._driver.remount(mounted, tokens=self._cluster.tokens(pod)))

    def _surely(self, pod: Pod, once: Callable[[], MountOutcome]) -> MountOutcome:
        until, backoff = time.monotonic() + self._patience, FIRST_BACKOFF
        while True:
            began = time.monotonic()
            try:
                outcome = once()
            except grpc.RpcError as error:
                # What a call raises is both; grpc's types do not say so.
                code, details = cast(grpc.Call, error).code(), cast(grpc.Call, error).details()
                self.failures.append(Failure(code.name, details or "", began, time.monotonic()))
                if code in MAYBE_IN_PROGRESS - self._tolerated:
                    raise StandError(f"pod {pod.name} was answered {code.name}: {details}") from error
                if time.monotonic() > until:
                    raise StandError(f"pod {pod.name} failed for good: {code.name}: {details}") from error
                time.sleep(backoff)
                backoff = min(2 * backoff, self._longest_backoff)
            else:
                self.mounts += 1
                return outcome
