"""A stand-in for the CSI driver: asks a provider for a pod's files, and writes them as the driver does.

What it sends, checks and writes is docs/contract.md section 1.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from provider.v1alpha1 import service_pb2, service_pb2_grpc
from tests.stand.kubeapi import Pod

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_PATH_BYTES = 4096
MAX_ELEMENT_BYTES = 255
KUBELET_DEADLINE = 120.0
"""Seconds that kubelet waits for a mount."""

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "v1alpha1.CSIDriverProvider"}],
                "waitForReady": True,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1.0,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


class DriverError(Exception):
    """The provider answered OK with something that the driver does not take."""


@dataclass(frozen=True)
class MountedFile:
    """A file of an answer."""

    mode: int
    contents: bytes = field(repr=False)


@dataclass(frozen=True)
class MountOutcome:
    """A mount that succeeded. `target` is the volume's directory, where the files are symlinks.

    `files` (by path) and `versions` (by object id) are what the provider answered. `rewritten` is false
    when the volume already held the same files, which then stay untouched.
    """

    pod: Pod
    target: Path
    files: Mapping[str, MountedFile] = field(repr=False)
    versions: Mapping[str, str]
    rewritten: bool
    request: service_pb2.MountRequest = field(repr=False)

    def read(self, path: str) -> bytes:
        """What the pod reads at `path` now, which a later mount may have changed."""
        return (self.target / path).read_bytes()

    def text(self, path: str) -> str:
        """`read`, as UTF-8."""
        return self.read(path).decode()


class Driver:
    """A driver with one connection of its own to the provider's socket, used as a context manager.

    Volumes without a `target_path` go to a temporary directory that ends with the driver. `timeout` is the
    deadline of a call in seconds, by default kubelet's. `longest_redial` compresses gRPC's pauses, which grow to two
    minutes while nobody answers, to so many seconds: for providers that live as shortly.
    """

    def __init__(
        self, socket_path: Path | str, *, timeout: float = KUBELET_DEADLINE, longest_redial: float = 120.0
    ) -> None:
        self.timeout = timeout
        self._volumes = Path(tempfile.mkdtemp(prefix="stand-csi-"))
        self._channel = grpc.insecure_channel(
            f"unix:{socket_path}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.service_config", _SERVICE_CONFIG),
                # Without it, all channels of a process to one address share one connection.
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_reconnect_backoff_ms", int(longest_redial * 1000)),
            ],
        )
        self._stub = service_pb2_grpc.CSIDriverProviderStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and delete the volumes."""
        self._channel.close()
        shutil.rmtree(self._volumes, ignore_errors=True)

    def version(self) -> service_pb2.VersionResponse:
        """Ask the provider's version; raises grpc.RpcError."""
        request = service_pb2.VersionRequest(version="v1alpha1")
        return self._stub.Version(request, timeout=self.timeout, wait_for_ready=True)

    def mount(
        self,
        pod: Pod,
        parameters: Mapping[str, str],
        *,
        volume_attributes: Mapping[str, str] | None = None,
        target_path: Path | None = None,
        tokens: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        permission: int = 0o644,
        class_name: str = "secrets",
    ) -> MountOutcome:
        """Mount a class's `parameters` for `pod`; the same pod and target again is a rotation.

        `tokens` maps audiences to JWTs, as the CSIDriver's `tokenRequests` make the driver send them; None
        sends none at all. `secrets` is the nodePublishSecretRef's. `permission` is the default file mode.

        Raises grpc.RpcError when the provider (or gRPC itself, past 4 MiB) refuses, DriverError when its
        answer breaks the contract; the volume then stays as it was.
        """
        attributes = {
            **parameters,
            **(volume_attributes or {}),
            "csi.storage.k8s.io/pod.name": pod.name,
            "csi.storage.k8s.io/pod.namespace": pod.namespace,
            "csi.storage.k8s.io/pod.uid": pod.uid,
            "csi.storage.k8s.io/serviceAccount.name": pod.service_account,
            "csi.storage.k8s.io/ephemeral": "true",
            "secretProviderClass": class_name,
        }
        if tokens is not None:
            attributes[_TOKENS] = _token_attribute(tokens)
        target = target_path or self._volumes / pod.uid / "volumes" / "kubernetes.io~csi" / class_name / "mount"
        request = service_pb2.MountRequest(
            attributes=json.dumps(attributes),
            secrets=json.dumps(secrets if secrets is None else dict(secrets)),
            target_path=str(target),
            permission=json.dumps(permission),
        )
        return self.send(pod, request)

    def remount(self, outcome: MountOutcome, *, tokens: Mapping[str, str] | None = None) -> MountOutcome:
        """Mount the same again, with fresh `tokens` (None: as they were), as kubelet does each minute."""
        request = service_pb2.MountRequest()
        request.CopyFrom(outcome.request)
        if tokens is not None:
            request.attributes = json.dumps(json.loads(request.attributes) | {_TOKENS: _token_attribute(tokens)})
        return self.send(outcome.pod, request)

    def send(self, pod: Pod, request: service_pb2.MountRequest) -> MountOutcome:
        """Send a ready request, check the answer and write its files; raises as `mount` does."""
        answer = self._stub.Mount(request, timeout=self.timeout, wait_for_ready=True)
        versions = _checked_versions(answer)
        files = _checked_files(answer.files)
        target = Path(request.target_path)
        # Versions without files say "leave the old ones".
        rewritten = bool(files) and write_volume(target, files)
        return MountOutcome(pod, target, files, versions, rewritten, request)


_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


def write_volume(target: Path, files: Mapping[str, MountedFile]) -> bool:
    """Make `target` hold exactly `files`, all at once for a reader; False when it already does.

    Files live in a timestamped directory; `..data` points to it and is swapped by a rename; the names that
    a pod opens are symlinks through `..data`.
    """
    target.mkdir(parents=True, exist_ok=True)
    link = target / "..data"
    old = target / os.readlink(link) if link.is_symlink() else None
    if old is not None and _held(old) == dict(files):
        return False
    stamp = datetime.datetime.now(datetime.UTC).strftime("..%Y_%m_%d_%H_%M_%S.")
    fresh = Path(tempfile.mkdtemp(prefix=stamp, dir=target))
    fresh.chmod(0o755)
    for path, file in files.items():
        place = fresh / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.contents)
        place.chmod(file.mode)  # Whatever the umask took.
    visible = {path.partition("/")[0] for path in files}
    for name in visible:
        if not (target / name).is_symlink():
            (target / name).symlink_to(f"..data/{name}")
    swapped = target / "..data_tmp"
    swapped.unlink(missing_ok=True)
    swapped.symlink_to(fresh.name)
    swapped.rename(link)
    for entry in list(target.iterdir()):
        if not entry.name.startswith("..") and entry.name not in visible:
            entry.unlink()
    if old is not None:
        shutil.rmtree(old)
    return True


def _held(directory: Path) -> dict[str, MountedFile]:
    return {
        str(path.relative_to(directory)): MountedFile(stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def _checked_versions(answer: service_pb2.MountResponse) -> dict[str, str]:
    if answer.error.code:
        raise DriverError(f"error code {answer.error.code!r} in an answer that is OK: the message is lost")
    if not answer.object_version:
        raise DriverError("no object versions: the driver takes this for a provider that did nothing")
    versions = {version.id: version.version for version in answer.object_version}
    if len(versions) != len(answer.object_version):
        raise DriverError("two object versions have the same id")
    return versions


def _checked_files(files: Iterable[service_pb2.File]) -> dict[str, MountedFile]:
    checked: dict[str, MountedFile] = {}
    for file in files:
        _check_path(file.path)
        if file.path in checked:
            raise DriverError(f"two files have the path {file.path!r}")
        if not 0 <= file.mode <= 0o777:
            raise DriverError(f"mode {file.mode:o} of {file.path!r} is not within 0 to 0777")
        checked[file.path] = MountedFile(file.mode, file.contents)
    for path in checked:
        elements = path.split("/")
        for depth in range(1, len(elements)):
            if (parent := "/".join(elements[:depth])) in checked:
                raise DriverError(f"{parent!r} is a file and the directory of {path!r}")
    return checked


def _check_path(path: str) -> None:
    elements = path.split("/")
    if path.startswith("/"):
        raise DriverError(f"path {path!r} is absolute")
    if not path or any(element in ("", ".") for element in elements):
        raise DriverError(f"path {path!r} is not clean")
    if ".." in elements:
        raise DriverError(f"path {path!r} leaves the volume")
    if elements[0].startswith(".."):
        raise DriverError(f"path {path!r} begins with '..', which the driver keeps for itself")
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_ELEMENT_BYTES for part in elements):
        raise DriverError(f"a path of {len(path.encode())} bytes is too long, or one of its elements is")


def _token_attribute(tokens: Mapping[str, str]) -> str:
    return json.dumps(
        {audience: {"token": token, "expirationTimestamp": _expiry(token)} for audience, token in tokens.items()}
    )


def _expiry(token: str) -> str:
    """When a JWT ends, RFC 3339; in an hour for what is no JWT, which a test may send."""
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    with contextlib.suppress(IndexError, KeyError, ValueError, binascii.Error):
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        ends = datetime.datetime.fromtimestamp(claims["exp"], datetime.UTC)
    return ends.strftime("%Y-%m-%dT%H:%M:%SZ")
