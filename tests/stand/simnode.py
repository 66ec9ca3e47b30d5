"""A node on simulated time: the real mounter, sessions, sweeper and state directory over a simulated Vault."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from provider.errors import KubernetesUnavailable
from provider.kube import NodePods
from provider.mount import Mounter
from provider.redact import Sensitive
from provider.render import Renderer
from provider.sessions import Sessions, Sweeper
from provider.settings import Settings, TlsSettings
from provider.spc import Login, MountSpec, ObjectSpec, Pod, SecretRequest, VaultServer
from provider.telemetry.events import Mounted, Telemetry
from provider.vault import VaultServers
from tests.spc_classes import plain
from tests.stand.simtime import SimClock, World
from tests.stand.simvault import SimVault

KEY = b"0123456789abcdef0123456789abcdef"
NODE_NAME = "node-1"
OWN_POD = Pod("kube-system", "provider-x7", "uid-of-the-provider", "provider")


def wanted(
    name: str,
    path: str,
    key: str | None = None,
    *,
    method: str = "GET",
    body: str | None = None,
    fresh: bool = False,
    renew_percent: float = 67.0,
    refresh_after: float = 0.0,
) -> ObjectSpec:
    """An object of a class: the file ``name`` with ``key`` of what ``path`` answers."""
    request = SecretRequest(method, path, (), Sensitive(body) if body is not None else None)
    return plain(name, request, key, fresh=fresh, renew_percent=renew_percent, refresh_after=refresh_after)


def credential(path: str = "database/creds/app", **options: Any) -> tuple[ObjectSpec, ObjectSpec]:
    """Both halves of a database credential, as the files ``user`` and ``password``."""
    return wanted("user", path, "username", **options), wanted("password", path, "password", **options)


STATIC = wanted("static", "secret/data/app", "password")
CERTIFICATE = wanted("certificate", "pki/issue/web", "certificate", method="POST", body="{}")
PRIVATE_KEY = wanted("key", "pki/issue/web", "private_key", method="POST", body="{}")


class Cluster:
    """The pods of the node as the API server knows them."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {OWN_POD.uid: OWN_POD}
        self.unseen: set[str] = set()
        """UIDs that the cache lacks, though the pods live."""
        self.complete = True
        self.failure: KubernetesUnavailable | None = None
        self.listed = 0
        self.confirmed: list[str] = []
        self.before_confirming: Callable[[], None] = lambda: None

    async def list_pods(self, node_name: str) -> NodePods:
        self.listed += 1
        if self.failure is not None:
            raise self.failure
        cached = [pod for uid, pod in self.pods.items() if uid not in self.unseen and node_name == NODE_NAME]
        names = frozenset((pod.namespace, pod.name) for pod in cached)
        return NodePods(frozenset(pod.uid for pod in cached), names, self.complete)

    async def pod_lives(self, namespace: str, name: str, uid: str | None) -> bool:
        if uid is None:
            return any((pod.namespace, pod.name) == (namespace, name) for pod in self.pods.values())
        self.confirmed.append(uid)
        self.before_confirming()
        if self.failure is not None:
            raise self.failure
        found = self.pods.get(uid)
        return found is not None and (found.namespace, found.name) == (namespace, name)


class _Tokens:
    async def create_token(self, pod: Pod, audience: str | None) -> Sensitive[str]:
        return Sensitive(f"{pod.service_account}/{pod.uid}")


class Key:
    """Where the HMAC key comes from; ``known`` None while it is not to be had."""

    def __init__(self, known: bytes | None = KEY) -> None:
        self.known = known

    async def get(self) -> bytes | None:
        return self.known


Files = dict[str, str]


class Node:
    """One daemon. ``files`` is what its pods' volumes hold: replaced by each mount that succeeds, as the driver does.

    ``written`` has each state of each volume, with the time at which it was written.
    """

    def __init__(self, stage: Stage, clock: SimClock, key: Key, settings: Settings) -> None:
        self.clock = clock
        self.files: dict[tuple[str, str], Files] = {}
        self.written: dict[tuple[str, str], list[tuple[float, Files]]] = {}
        self.versions: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}
        self.told: list[Mounted] = []
        """What is told of each mount that succeeded."""
        self._stage = stage
        self._servers = VaultServers(clock=clock)
        self.sessions = Sessions(self._servers, settings, clock=clock, key=key.get, telemetry=Telemetry())
        self.sweeper = Sweeper(self.sessions, stage.cluster, settings, clock=clock, telemetry=Telemetry())
        self._mounter = Mounter(
            self._servers,
            self.sessions,
            _Tokens(),
            key,
            Renderer(Telemetry()),
            timeout=settings.mount_timeout,
            telemetry=Telemetry(),
        )
        self._background: list[asyncio.Task[None]] = []

    async def mount(
        self, pod: Pod, *objects: ObjectSpec, volume: str = "/volume", role: str = "app", auth: str = "kubernetes"
    ) -> Files:
        """Mount, and return the volume's files. Raises what Mounter.mount raises; the files then stay."""
        spec = MountSpec(
            pod,
            "class",
            volume,
            VaultServer(self._stage.vault.address, "", TlsSettings()),
            Login(auth, role, None),
            objects,
            {"vault": Sensitive(f"{pod.service_account}/{pod.uid}")},
        )
        result = await self._mounter.mount(spec)
        files = {file.path: file.contents.decode() for file in result.files}
        self.files[pod.uid, volume] = files
        self.versions[pod.uid, volume] = result.versions
        assert result.event is not None
        self.told.append(result.event)
        self.written.setdefault((pod.uid, volume), []).append((self._stage.world.now(), files))
        return files

    async def remount(
        self, seconds: float, pod: Pod, *objects: ObjectSpec, volume: str = "/volume", role: str = "app"
    ) -> None:
        """Mount as kubelet does, every 60 to 90 s, for so long."""
        end = self._stage.world.now() + seconds
        while self._stage.world.now() < end:
            await self.mount(pod, *objects, volume=volume, role=role)
            await asyncio.sleep(random.uniform(60, 90))

    def run(self) -> None:
        """Begin the work in the background: renewals, and the sweep."""
        self._background = [asyncio.create_task(self.sessions.run()), asyncio.create_task(self.sweeper.run())]

    async def stop(self) -> None:
        """End as on SIGTERM."""
        for task in self._background:
            task.cancel()
        for task in self._background:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.sessions.close()
        await self._servers.close()


class Stage:
    """A Vault, a cluster and the daemons of a node, in one World; used as an async context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="sim-")
        self.directory = Path(self._directory.name)
        self.state = self.directory / "state"
        self.world = World()
        self.clock = SimClock(self.world)
        self.cluster = Cluster()
        self.vault = SimVault(self.directory, self.world)
        self._nodes: list[Node] = []

    async def __aenter__(self) -> Self:
        await self.vault.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self._nodes:
            await node.stop()
        with contextlib.suppress(AssertionError):
            await self.vault.stop()
        self._directory.cleanup()

    def pod(self, name: str, service_account: str = "shop") -> Pod:
        """A pod that runs on the node."""
        pod = Pod("shop", name, f"uid-of-{name}", service_account)
        self.cluster.pods[pod.uid] = pod
        return pod

    def remove(self, pod: Pod) -> None:
        """The pod is deleted."""
        del self.cluster.pods[pod.uid]

    def node(self, *, kept: bool = False, key: Key | None = None, **settings: Any) -> Node:
        """A daemon that has begun its work; ``kept`` gives it the state directory."""
        if kept:
            settings["state_dir"] = str(self.state)
        own = {"node_name": NODE_NAME, "pod_name": OWN_POD.name, "pod_namespace": OWN_POD.namespace}
        node = Node(self, self.clock, key or Key(), Settings(**(own | settings)))
        node.run()
        self._nodes.append(node)
        return node

    async def killed(self, node: Node) -> None:
        """The daemon is gone; what it had in memory is lost."""
        self._nodes.remove(node)
        await node.stop()
