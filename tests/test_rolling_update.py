"""A rolling update of the chart's DaemonSet on one node under load: the daemons run as the chart starts them.

Arguments, variables, directories, rights, probes and the order of pods come out of what helm renders. Only places
differ: the node's directories lie in the test's, and each pod's port is a free one of this machine, as each pod has an
address of its own.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from tests.stand.driver import Driver
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao
from tests.stand.process import Process, free_port
from tests.stand.waiting import eventually
from tests.test_chart import template
from tests.test_examples import clean_environment
from tests.test_manifests import Manifest, container, daemonset, of_kind, pod_spec
from tests.tools import ROOT

NODE = "node-1"
AUDIENCE = "vault"
# Drivers, each with a connection of its own, as if so many of the node's volumes were mounted at every moment.
DRIVERS = 8
# Every so many mounts of a driver are a new pod's, which has to log in; the others are re-mounts.
NEW_POD_EVERY = 4
# Seconds between two mounts of a driver: without it, they take the machine from the daemon that starts.
PACE = 0.02
# An update, and the way back.
UPDATES = 2
CLASS = {
    "roleName": "app",
    "objects": "- {objectName: key, secretPath: shop/data/app, secretKey: key}",
}


class Node:
    """A node: its directories, the Kubernetes API with the chart's rights, and Vault; used as a context manager.

    `values` are the chart's. Vault has the role and the secret of CLASS, unless it is not `prepared`.
    """

    def __init__(self, home: Path, *, prepared: bool = True, **values: Any) -> None:
        self.home = home
        self.kube = KubeApi()
        self.bao = OpenBao(audit=True)
        self._prepared = prepared
        self._values = values
        self._parts = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as parts:
            # Not below pytest's directory: a socket's path has 107 bytes at most.
            self._root = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="node-")))
            parts.enter_context(self.kube)
            parts.enter_context(self.bao)
            if self._prepared:
                self._prepare_vault()
            self._render()
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _prepare_vault(self) -> None:
        self.bao.mount_kv("shop")
        self.bao.write_kv("shop/data/app", {"key": "key-1"})
        self.bao.enable_kubernetes_auth("kubernetes", self.kube)
        self.bao.write_policy("app", 'path "shop/data/*" { capabilities = ["read"] }')
        self.bao.role(
            "kubernetes",
            "app",
            bound_service_account_names=["*"],
            bound_service_account_namespaces=["*"],
            audience=AUDIENCE,
            token_policies=["app"],
            token_ttl="1h",
        )

    def _render(self) -> None:
        namespace, name = self.kube.provider
        self._kubeconfig = self.kube.write_kubeconfig(self.home / "kubeconfig")
        values = {"vaultAddress": self.bao.address, "extraArgs": [f"-kubeconfig={self._kubeconfig}"], **self._values}
        self.manifests = template(self.home, values, release=name, namespace=namespace)
        # What the provider may do is what the chart's roles say, and nothing else.
        for verb, resource in [
            ("create", "serviceaccounts/token"),
            ("get", "secrets"),
            ("create", "secrets"),
            ("list", "pods"),
        ]:
            self.kube.deny(verb, resource)
        for role in of_kind(self.manifests, "Role", "ClusterRole"):
            for rule in role["rules"]:
                for verb in rule["verbs"]:
                    for resource in rule["resources"]:
                        (only,) = rule.get("resourceNames", [None])
                        self.kube.allow(verb, resource, namespace=role["metadata"].get("namespace"), name=only)

    @property
    def strategy(self) -> Manifest:
        """The DaemonSet's rolling update."""
        found: Manifest = daemonset(self.manifests)["spec"]["updateStrategy"]["rollingUpdate"]
        return found

    @property
    def socket(self) -> Path:
        """Where the driver looks."""
        (shared,) = [
            v["hostPath"]["path"] for v in pod_spec(daemonset(self.manifests))["volumes"] if v["name"] == "providers"
        ]
        return self.host(shared) / "vault.sock"

    def host(self, path: str) -> Path:
        """A directory of the node, in the test's."""
        place = self._root / path.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        return place


class ProviderPod:
    """A pod of the DaemonSet: its container as a process."""

    def __init__(self, node: Node, number: int) -> None:
        self.name = f"provider-{number}"
        namespace, account = node.kube.provider
        node.kube.add_pod(namespace, self.name, service_account=account, node=NODE)
        spec, pod = container(node.manifests), pod_spec(daemonset(node.manifests))
        self.grace: int = pod["terminationGracePeriodSeconds"]
        self._probe = spec["startupProbe"]
        port = {each["name"]: each["containerPort"] for each in spec["ports"]}[self._probe["httpGet"]["port"]]
        self._address = f"127.0.0.1:{free_port()}"
        volumes = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
        places = {mount["mountPath"]: node.host(volumes[mount["name"]]) for mount in spec["volumeMounts"]}
        arguments = []
        for argument in spec["args"]:
            flag, equals, value = argument.partition("=")
            for inside, outside in places.items():
                if value == inside or value.startswith(f"{inside}/"):
                    value = f"{outside}{value.removeprefix(inside)}"
            arguments.append(f"{flag}{equals}{value}".replace(f"=:{port}", f"={self._address}"))
        assert f"-health-addr={self._address}" in arguments
        facts = {"spec.nodeName": NODE, "metadata.name": self.name, "metadata.namespace": namespace}
        environment = {
            variable["name"]: variable["value"]
            if "value" in variable
            else facts[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in spec["env"]
        }
        argv = [sys.executable, "-m", "provider.cli", *arguments]
        self.process = Process(
            argv, log=node.home / f"{self.name}.log", cwd=ROOT, env=clean_environment() | environment
        )

    @property
    def ready(self) -> bool:
        """What the startup probe finds."""
        assert self.process.running, self.process.log_tail()
        try:
            with urllib.request.urlopen(f"http://{self._address}{self._probe['httpGet']['path']}", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self) -> None:
        """As kubelet: so often, and with that patience."""
        patience = self._probe["failureThreshold"] * self._probe["periodSeconds"]
        eventually(lambda: self.ready, f"{self.name} is ready", seconds=patience)

    def stop(self) -> None:
        """SIGTERM, and an orderly end within the grace period."""
        self.process.signal(signal.SIGTERM)
        assert self.process.wait(self.grace) == 0, self.process.log_tail()


class Load:
    """Drivers that mount until the context ends: new pods and re-mounts of old ones."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._drive, args=(number,)) for number in range(DRIVERS)]
        self.mounts = [0] * DRIVERS
        self.pods = [0] * DRIVERS
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_all(self) -> None:
        """Until each driver has done a whole turn more: a new pod and its re-mounts."""
        target = [done + NEW_POD_EVERY + 1 for done in self.mounts]
        eventually(
            lambda: bool(self.failures) or all(done >= due for done, due in zip(self.mounts, target, strict=True)),
            "each driver mounts",
            seconds=60,
        )

    def _drive(self, number: int) -> None:
        with Driver(self._node.socket) as driver:
            outcome = None
            while not self._stop.wait(PACE) and not self.failures:
                try:
                    if self.mounts[number] % NEW_POD_EVERY == 0 or outcome is None:
                        pod = self._new_pod(number)
                        outcome = driver.mount(pod, CLASS, tokens=self._tokens(pod))
                    else:
                        outcome = driver.remount(outcome, tokens=self._tokens(outcome.pod))
                    assert outcome.text("key") == "key-1"
                except Exception as error:  # noqa: BLE001  # whatever it is, it is a mount that failed
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.mounts[number] += 1

    def _new_pod(self, number: int) -> Pod:
        self.pods[number] += 1
        name = f"web-{number}-{self.pods[number]}"
        return self._node.kube.add_pod("shop", name, service_account="web", node=NODE)

    def _tokens(self, pod: Pod) -> dict[str, str]:
        issue = self._node.kube.issue_token
        return {AUDIENCE: issue(pod.namespace, pod.service_account, audiences=[AUDIENCE], pod=pod)}


@contextmanager
def running(node: Node, number: int) -> Iterator[ProviderPod]:
    """A pod of the DaemonSet that is gone afterwards."""
    pod = ProviderPod(node, number)
    try:
        yield pod
    finally:
        pod.process.kill()


def test_rolling_update_fails_no_mount(tmp_path: Path) -> None:
    """The new pod starts while the old one serves, and the old one is stopped when the new one is ready, there and back
    under a load of logins and re-mounts: none fails, and no pod logs in a second time."""
    with Node(tmp_path) as node, ExitStack() as stack:
        assert node.strategy == {"maxSurge": 1, "maxUnavailable": 0}
        old = stack.enter_context(running(node, 0))
        old.wait_ready()
        with Load(node) as load:
            for number in range(1, UPDATES + 1):
                new = stack.enter_context(running(node, number))
                new.wait_ready()
                old.stop()
                load.wait_for_all()
                assert load.failures == []
                old = new
        assert load.failures == []
        assert len(node.bao.requests("auth/kubernetes/login")) == sum(load.pods)
        old.stop()
        assert not node.socket.exists()
