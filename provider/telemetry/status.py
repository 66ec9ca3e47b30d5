"""What the daemon has and did, for the status command: sessions, leases, the last mounts and the last errors.

What the fields are is in docs/status.md. No value, token or JWT is in it, nor an accessor, and a lease's id only as its
SHA-256. Only whoever is on this host is answered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from provider import __version__
from provider.clock import Clock
from provider.redact import one_line
from provider.telemetry.events import LeaseView, SessionView, lease_sha256
from provider.telemetry.http import Answer, Page, Request
from provider.telemetry.volumes import Failure, Volume, Volumes

PATH: Final = "/status"
# Of what is told, so that whoever reads it knows what to expect; grows where a field goes or means something else.
SHAPE: Final = 1
# Of each list; several times what a node's 110 pods have.
MAX_LISTED: Final = 1000
# Mounts and errors that are told of: what a person reads. How many there are is told beside.
MAX_RECENT: Final = 20
# Of a name; a message may have more.
MAX_NAME: Final = 256
MAX_MESSAGE: Final = 4096


class Status:
    """The page of the status. ``views`` gives the sessions as they are."""

    def __init__(
        self, views: Callable[[], Sequence[SessionView]], volumes: Volumes, clock: Clock, *, node: str
    ) -> None:
        self._views = views
        self._volumes = volumes
        self._clock = clock
        self._node = node
        self._began = clock.now()

    @property
    def pages(self) -> Mapping[str, Page]:
        """The page by its path."""
        return MappingProxyType({PATH: self._answer})

    async def _answer(self, request: Request) -> Answer:
        if not _is_here(request.peer):
            return Answer(b"the status is for whoever is on this host\n", HTTPStatus.FORBIDDEN)
        now = self._clock.now()
        views = self._views()
        told = {
            "shape": SHAPE,
            "version": __version__,
            "node": _name(self._node),
            "uptime_seconds": round(now - self._began),
            **self._recent(now),
        }
        # Of a thousand sessions this takes some 20 ms, in which a mount would wait.
        body = await asyncio.to_thread(lambda: json.dumps(told | _sessions(views)))
        return Answer(body.encode() + b"\n", content_type="application/json")

    def _recent(self, now: float) -> dict[str, Any]:
        """The last mounts and errors, as many as are told, and how many are left out; of errors those that last first.

        ``failing`` counts all volumes whose mounts fail now.
        """
        mounted = self._volumes.recent_mounts()
        failing = {id(volume) for volume in self._volumes.failing()}
        failed = [
            (volume, volume.failure, id(volume) in failing)
            for volume in self._volumes.recent_errors()
            if volume.failure is not None
        ]
        failed.sort(key=lambda found: not found[2])
        return {
            "failing": len(failing),
            "mounts": [_mount(volume, now) for volume in mounted[:MAX_RECENT]],
            "errors": [_error(*found, now) for found in failed[:MAX_RECENT]],
            "mounts_left_out": max(0, len(mounted) - MAX_RECENT),
            "errors_left_out": max(0, len(failed) - MAX_RECENT),
        }


def _is_here(peer: str) -> bool:
    """Whether an IP address is of the loopback interface, whichever family it came by."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _sessions(views: Sequence[SessionView]) -> dict[str, Any]:
    """Sessions by pod, and leases by what is left of them, as many as are told, and how many are left out."""
    sessions = sorted(views, key=lambda view: (view.who.pod.namespace, view.who.pod.name, view.who.class_name))
    leases = sorted(
        ((view, lease) for view in views for lease in view.leases), key=lambda held: (held[1].left, held[1].path)
    )
    return {
        "sessions": [_session(view) for view in sessions[:MAX_LISTED]],
        "leases": [_lease(view, lease) for view, lease in leases[:MAX_LISTED]],
        "sessions_left_out": max(0, len(sessions) - MAX_LISTED),
        "leases_left_out": max(0, len(leases) - MAX_LISTED),
    }


def _session(view: SessionView) -> dict[str, Any]:
    who = view.who
    return {
        "namespace": _name(who.pod.namespace),
        "pod": _name(who.pod.name),
        "pod_uid": _name(who.pod.uid),
        "service_account": _name(who.pod.service_account),
        "class": _name(who.class_name),
        "role": _name(who.login.role),
        "auth_mount": _name(who.login.mount),
        "vault_address": _name(who.server.address),
        "vault_namespace": _name(who.server.namespace),
        "token": {"seconds_left": _left(view.token_left), "renewed": view.token_renewed} if view.token_left else None,
        "mounted_seconds_ago": _left(view.mounted_ago),
    }


def _lease(view: SessionView, lease: LeaseView) -> dict[str, Any]:
    return {
        "namespace": _name(view.who.pod.namespace),
        "pod": _name(view.who.pod.name),
        "role": _name(view.who.login.role),
        "path": _name(lease.path),
        "kind": lease.kind.value,
        "lease_sha256": lease_sha256(lease.lease_id),
        "seconds_left": _left(lease.left),
        "renewed": lease.renewed,
    }


def _mount(volume: Volume, now: float) -> dict[str, Any]:
    return _volume(volume) | {
        "seconds_ago": round(now - (volume.mounted_at or now)),
        "mounts": volume.mounts,
        "objects": sum(volume.kinds.values()),
    }


def _error(volume: Volume, failure: Failure, failing: bool, now: float) -> dict[str, Any]:
    return _volume(volume) | {
        "seconds_ago": round(now - failure.at),
        "failures": volume.failures,
        "failing": failing,
        "mounted_since": volume.failing_since is None,
        "code": failure.code,
        "message": one_line(failure.message, MAX_MESSAGE),
    }


def _volume(volume: Volume) -> dict[str, Any]:
    return {
        "namespace": _name(volume.pod.namespace),
        "pod": _name(volume.pod.name),
        "class": _name(volume.class_name),
        "target_path": _name(volume.target_path),
    }


def _name(text: str) -> str:
    return one_line(text, MAX_NAME)


def _left(seconds: float) -> int | None:
    """Whole seconds; None for no end, which JSON has no number for."""
    return round(seconds) if math.isfinite(seconds) else None
