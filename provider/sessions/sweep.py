"""The end of a pod, which nobody announces: pods that are gone are found, and their tokens revoked.

A pod counts as gone only when it is absent from two sweeps in a row, had no mount between them, and an uncached look
by its name confirms it: revoking a living pod's credentials would be worse than any that are left behind.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from provider.clock import Clock
from provider.errors import KubernetesDenied, KubernetesUnavailable
from provider.kube import NodePods
from provider.sessions.registry import Sessions
from provider.settings import Settings
from provider.spc import Pod
from provider.telemetry.events import Swept, Telemetry

_log = logging.getLogger(__name__)


class PodSource(Protocol):
    """Who knows the pods. Both raise KubernetesUnavailable; KubernetesDenied where it is for want of permission."""

    async def list_pods(self, node_name: str) -> NodePods:
        """The pods of a node that have not finished, from the API server's cache."""
        ...

    async def pod_lives(self, namespace: str, name: str, uid: str | None) -> bool:
        """Whether this very pod exists and has not finished, not from a cache; ``uid`` None is any of this name."""
        ...


class Sweeper:
    """Looks for sessions of pods that are gone, once every ``sweep_interval``."""

    def __init__(
        self, sessions: Sessions, pods: PodSource, settings: Settings, *, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._sessions = sessions
        self._pods = pods
        self._settings = settings
        self._clock = clock
        self._telemetry = telemetry
        own = (settings.pod_namespace, settings.pod_name)
        self._own = own if all(own) else None
        self._absent: dict[str, float] = {}
        self._said = ""

    async def run(self) -> None:
        """Sweep until cancelled; at once where it is turned off or cannot work."""
        if not self._settings.revoke:
            return
        if not self._settings.node_name:
            self._cannot("no node name is known (--node-name or NODE_NAME)")
            return
        while True:
            await asyncio.sleep(self._settings.sweep_interval)
            await self.sweep()

    async def sweep(self) -> None:
        """One sweep. What cannot be learnt revokes nothing."""
        if not self._sessions.all() or not self._sessions.may_sweep():
            self._absent.clear()
            return
        began = self._clock.now()
        try:
            listed = await self._pods.list_pods(self._settings.node_name)
            if not listed.complete:
                listed = await self._asked_by_name()
        except KubernetesDenied as error:
            self._cannot(str(error))
            return
        except KubernetesUnavailable as error:
            self._absent.clear()
            _log.warning("this sweep revokes nothing: %s", error)
            self._telemetry.record(Swept(str(error), 0))
            return
        if self._own is not None and self._own not in listed.names:
            self._absent.clear()
            why = f"the listing of node {self._settings.node_name} lacks this daemon's own pod; is --node-name right?"
            _log.warning("this sweep revokes nothing: %s", why)
            self._telemetry.record(Swept(why, 0))
            return
        self._sessions.sweeping = True
        self._said = ""
        before, self._absent = self._absent, {}
        gone = 0
        for pod in self._pods_with_sessions():
            uid = pod.uid
            if uid in listed.uids:
                continue
            # Its last session may have ended while another pod was asked for.
            mounted_at = max((found.mounted_at for found in self._sessions.of_pod(uid)), default=float("inf"))
            since = before.get(uid)
            if since is None or mounted_at >= since:
                self._absent[uid] = began
            elif await self._confirmed(pod):
                self._sessions.end(uid)
                gone += 1
            else:
                self._absent[uid] = since
        self._telemetry.record(Swept("", gone))

    async def _asked_by_name(self) -> NodePods:
        """Those pods that matter here, each asked for by its name, where the node's listing is not whole.

        Any tenant can make it too large, by pods with much metadata. A look by name costs the API server one key.
        """
        _log.debug("the listing of node %s is not whole: each pod is asked for by name", self._settings.node_name)
        living = set()
        names = set()
        if self._own is not None and await self._pods.pod_lives(*self._own, None):
            names.add(self._own)
        for pod in self._pods_with_sessions():
            if await self._pods.pod_lives(pod.namespace, pod.name, pod.uid):
                living.add(pod.uid)
                names.add((pod.namespace, pod.name))
        return NodePods(frozenset(living), frozenset(names), complete=True)

    def _pods_with_sessions(self) -> list[Pod]:
        return list({session.pod.uid: session.pod for session in self._sessions.all()}.values())

    async def _confirmed(self, pod: Pod) -> bool:
        try:
            return not await self._pods.pod_lives(pod.namespace, pod.name, pod.uid)
        except KubernetesUnavailable as error:
            _log.warning("whether pod %s is gone cannot be confirmed: %s", pod, error)
            return False

    def _cannot(self, why: str) -> None:
        self._sessions.sweeping = False
        self._absent.clear()
        self._telemetry.record(Swept(why, 0))
        if self._said != why:
            self._said = why
            _log.warning("pods that are gone cannot be found, so their tokens are left to expire: %s", why)
