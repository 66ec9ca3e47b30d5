"""The end of pods, which nobody announces: what they were given is revoked, and nothing of those that live.

The provider is a process before real OpenBao and PostgreSQL; the API server's stand-in knows which pods there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live import DATABASE, NAMESPACE, NODE, Cluster, Daemon, class_of, credential
from tests.stand.driver import Driver
from tests.stand.kubeapi import Pod
from tests.stand.waiting import eventually

PODS = 200
DRIVERS = 8
SWEEPS = (f"--node-name={NODE}", "--sweep-interval=1s")
# Sweeps that are to find nothing: more than the two that a pod's end takes.
LOOKS = 5


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Servers of this test alone, so that all tokens, leases and users are its own."""
    with Cluster(tmp_path) as cluster:
        yield cluster


def test_200_pods_come_and_go(cluster: Cluster) -> None:
    """While they live each has one token, lease and user; afterwards there is none, but those of the pod that stays."""
    cluster.role("fleet")
    with Daemon(cluster, *SWEEPS) as daemon, Driver(daemon.socket) as driver:
        stays = cluster.mount(driver, cluster.pod("stays"), class_of("fleet", *DATABASE))
        pods = [cluster.pod(f"fleet-{number}") for number in range(PODS)]

        def come(some: list[Pod]) -> None:
            with Driver(daemon.socket) as own:
                outcomes = [cluster.mount(own, pod, class_of("fleet", *DATABASE)) for pod in some]
                assert all(own.remount(outcome).files == outcome.files for outcome in outcomes)

        with ThreadPoolExecutor(DRIVERS) as pool:
            list(pool.map(come, (pods[number::DRIVERS] for number in range(DRIVERS))))
        assert cluster.left("fleet").counts == (PODS + 1, PODS + 1, PODS + 1)
        for number, pod in enumerate(pods):
            if number % 2:
                cluster.kube.remove_pod(pod)
            else:  # it has finished, and is listed until somebody deletes it
                cluster.kube.add_pod(
                    pod.namespace, pod.name, service_account=pod.service_account, uid=pod.uid, node=NODE, phase="Failed"
                )
        eventually(lambda: cluster.left("fleet").counts == (1, 1, 1), "nothing of the pods is left", seconds=60)
        assert cluster.postgres.can_login(*credential(stays))
        assert driver.remount(stays).files == stays.files
    assert (cluster.issued("fleet"), cluster.logins("fleet")) == (PODS + 1, PODS + 1)


def test_pod_that_went_while_the_daemon_was_down(cluster: Cluster, tmp_path: Path) -> None:
    """The next daemon on the state directory finds it gone, and revokes what the one before had been given for it."""
    cluster.role("missed")
    with Daemon(cluster, *SWEEPS, f"--state-dir={tmp_path / 'state'}") as daemon, Driver(daemon.socket) as driver:
        pod = cluster.pod("missed")
        cluster.mount(driver, pod, class_of("missed", *DATABASE))
        daemon.kill()
        cluster.kube.remove_pod(pod)
        assert cluster.left("missed").counts == (1, 1, 1)
        daemon.start()
        eventually(lambda: cluster.left("missed").counts == (0, 0, 0), "nothing of the pod is left")
        eventually(lambda: not list((tmp_path / "state").glob("*.session")), "its file is gone too")


def test_nothing_is_revoked_without_proof(cluster: Cluster) -> None:
    """Not where the listing lacks the daemon's own pod, nor where a pod lives on another node, nor if turned off."""
    cluster.kube.add_pod("csi", "provider", node=NODE)
    wrong_node = ("--node-name=elsewhere", "--sweep-interval=1s")
    with (
        Daemon(cluster, *wrong_node, POD_NAMESPACE="csi", POD_NAME="provider") as lost,
        Daemon(cluster, *wrong_node) as misled,
        Daemon(cluster, *SWEEPS, "--revoke=never") as off,
        Driver(lost.socket) as with_lost,
        Driver(misled.socket) as with_misled,
        Driver(off.socket) as with_off,
    ):
        cluster.role("spared")
        drivers = {"lost": with_lost, "misled": with_misled, "off": with_off}
        pods = {name: cluster.pod(name) for name in drivers}
        for name, driver in drivers.items():
            cluster.mount(driver, pods[name], class_of("spared", *DATABASE))
        cluster.kube.remove_pod(pods["lost"])
        cluster.kube.remove_pod(pods["off"])
        eventually(lambda: said(lost, "this sweep revokes nothing") >= LOOKS, "sweeps that prove nothing")
        eventually(lambda: cluster.kube.count("GET", f"/namespaces/{NAMESPACE}/pods") >= LOOKS, "looks by name")
        assert cluster.left("spared").counts == (3, 3, 3)


def said(daemon: Daemon, words: str) -> int:
    """How often a message of the daemon began with these words."""
    return sum(event["message"].startswith(words) for event in daemon.events())
