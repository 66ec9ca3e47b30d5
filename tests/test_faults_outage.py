"""A Vault that is away, before a node of 110 pods whose mounts are tried again as kubelet does: in real time.

What goes out is counted at the proxy; how long a mount takes, where the driver waits for it.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from tests.live import Daemon
from tests.shop import FAILED, Shop
from tests.stand.driver import Driver
from tests.stand.faultproxy import FaultProxy
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao

pytestmark = pytest.mark.alone

PODS = 110
OUTAGE = 60.0
# Kubelet's, in seconds: between two tries of one volume.
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 122.0
MOUNT_TIMEOUT = 10.0
# What Vault has to be silent for before it is looked at, and what a look waits for; see provider/vault/watch.py.
SEEN_TO_HANG = 7.0
# What a machine that is busy itself may add, with a hundred threads of this test beside the daemon.
LATE = 2.0
REFUSED = re.compile(
    r"Vault at \S+ is unreachable since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \((?P<mounts>\d+) mounts? refused\)"
)


@dataclass(frozen=True)
class Try:
    """A mount that failed: when it began and ended (`time.monotonic()`), and with what."""

    began: float
    ended: float
    code: grpc.StatusCode
    words: str


class Kubelet:
    """Mounts of many pods, each tried again until it succeeds, with kubelet's pauses; a context manager."""

    def __init__(self, shop: Shop, pods: int) -> None:
        self.tries: list[Try] = []
        self.mounted: list[float] = []
        self._shop = shop
        self._pods = [shop.pod() for _ in range(pods)]
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(pods, "kubelet")

    def __enter__(self) -> Kubelet:
        self._running = [self._pool.submit(self._run, pod) for pod in self._pods]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()

    def _run(self, pod: Pod) -> None:
        backoff = FIRST_BACKOFF
        tokens = self._shop.tokens(pod)
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._shop.driver.mount(pod, self._shop.parameters(), tokens=tokens)
            except grpc.RpcError as error:
                self.tries.append(Try(began, time.monotonic(), error.code(), str(error.details())))
            else:
                self.mounted.append(time.monotonic())
                return
            self._stop.wait(backoff)
            backoff = min(LAST_BACKOFF, backoff * 2)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with KubeApi() as kube, OpenBao() as bao, FaultProxy(bao.address) as proxy:
        shop = Shop(tmp_path_factory.mktemp("outage"), kube, bao, proxy)
        with (
            Daemon(shop, f"--mount-timeout={MOUNT_TIMEOUT:g}s") as daemon,  # type: ignore[arg-type]
            Driver(daemon.socket) as driver,
        ):
            shop.driver = driver
            yield shop


def first_success_after(shop: Shop) -> float:
    """Seconds from now to the success of the next mount, tried again after kubelet's first pause."""
    began = time.monotonic()
    pod = shop.pod()
    for _ in range(20):
        try:
            shop.mount(pod)
        except grpc.RpcError:
            time.sleep(FIRST_BACKOFF)
        else:
            return time.monotonic() - began
    pytest.fail("mounts do not work again")


def check_refusals(tries: list[Try], since: float) -> None:
    """Each mount that began after Vault was known to be away failed within a second, and said so."""
    known = [one for one in tries if one.began >= since]
    assert len(known) >= PODS
    assert {one.code for one in tries} == {FAILED}
    slowest = max(known, key=lambda one: one.ended - one.began)
    assert statistics.median(one.ended - one.began for one in known) <= 1.0
    assert slowest.ended - slowest.began <= 1.0 + LATE, f"{slowest.began - since:.1f} s after that: {slowest}"
    refused = [REFUSED.search(one.words) for one in known]
    assert all(refused)
    counted = max(int(found["mounts"]) for found in refused if found)
    assert counted <= len(tries) + 1
    assert counted >= len(known) // 2


def test_one_probe_a_second(shop: Shop) -> None:
    """In an outage of a minute, under 110 pods that mount, at most one connection a second is made, and then all mount.

    The load balancer before Vault accepts connections and resets them.
    """
    shop.mount()
    shop.proxy.drop()
    time.sleep(0.2)
    shop.proxy.forget()
    began = time.monotonic()
    with Kubelet(shop, PODS) as kubelet:
        time.sleep(OUTAGE)
        made = [at for at in shop.proxy.connections() if at >= began + 2]
        shop.proxy.heal()
        took = first_success_after(shop)
    assert OUTAGE / 2 <= len(made) <= OUTAGE
    assert min(later - earlier for earlier, later in pairwise(made)) >= 0.9  # as seen from the other side
    check_refusals([one for one in kubelet.tries if one.ended <= began + OUTAGE], began + 2)
    assert took <= 2.0 + LATE


@pytest.mark.parametrize(
    ("fail", "heal", "known_after"),
    [
        (FaultProxy.refuse, FaultProxy.listen, 0.0),
        (FaultProxy.hang, FaultProxy.heal, SEEN_TO_HANG),
    ],
    ids=["refused", "hangs"],
)
def test_mounts_fail_within_a_second(
    shop: Shop, fail: Callable[[FaultProxy], None], heal: Callable[[FaultProxy], None], known_after: float
) -> None:
    """Where nobody listens that holds from the first mount on; where nobody answers, as soon as that can be known."""
    shop.mount()
    fail(shop.proxy)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError):
        shop.mount()
    time.sleep(max(0.0, began + known_after - time.monotonic()))
    since = time.monotonic()
    with Kubelet(shop, PODS) as kubelet:
        time.sleep(6)
        heal(shop.proxy)
        took = first_success_after(shop)
        ended = time.monotonic()
    check_refusals([one for one in kubelet.tries if one.ended <= ended], since)
    assert took <= 2.0 + LATE


def test_renewals_go_on(shop: Shop, tmp_path: Path) -> None:
    """A token whose renewal falls into an outage is renewed after it, and its pod does not log in again."""
    shop.bao.role(
        "kubernetes",
        "short",
        bound_service_account_names=["*"],
        bound_service_account_namespaces=["shop"],
        audience="vault",
        token_policies=["shop"],
        token_ttl="12s",
    )
    pod = shop.pod()
    mounted = shop.mount(pod, roleName="short")
    began = time.monotonic()
    time.sleep(5)
    shop.proxy.drop()
    time.sleep(max(0.0, began + 9.5 - time.monotonic()))
    shop.proxy.heal()
    shop.proxy.forget()
    time.sleep(5)
    assert shop.proxy.count("auth/token/renew-self") >= 1
    shop.driver.remount(mounted)
    assert shop.proxy.count("auth/kubernetes/login") == 0
