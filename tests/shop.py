"""A shop whose pods read one secret, and a proxy between its daemon and its OpenBao that fails as told."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Final

import grpc
import pytest

from tests.live import AUDIENCE, NAMESPACE, NODE
from tests.stand.driver import Driver, MountOutcome
from tests.stand.faultproxy import FaultProxy
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao

LOGIN: Final = "auth/kubernetes/login"
READ: Final = "shop/data/"
FAILED: Final = grpc.StatusCode.FAILED_PRECONDITION


class Shop:
    """OpenBao with one KV engine, the Kubernetes API, the proxy before OpenBao, and the daemon on the other side."""

    def __init__(self, directory: Path, kube: KubeApi, bao: OpenBao, proxy: FaultProxy) -> None:
        # As tests.live.Cluster has them, for its Daemon.
        self.directory, self.kube, self.bao = directory, kube, bao
        self.kubeconfig = kube.write_kubeconfig(directory / "kubeconfig")
        self.key = directory / "hmac-key"
        self.key.write_bytes(b"k" * 32)
        self.daemons = 0
        self.proxy = proxy
        self.driver: Driver
        self._numbers = itertools.count()
        bao.mount_kv("shop")
        bao.write_kv("shop/data/app", {"api_key": "key-1"})
        bao.write_policy("shop", 'path "shop/data/*" { capabilities = ["read"] }')
        bao.enable_kubernetes_auth("kubernetes", kube)
        bao.role(
            "kubernetes",
            "shop",
            bound_service_account_names=["*"],
            bound_service_account_namespaces=[NAMESPACE],
            audience=AUDIENCE,
            token_policies=["shop"],
        )

    def pod(self) -> Pod:
        name = f"pod-{next(self._numbers)}"
        return self.kube.add_pod(NAMESPACE, name, service_account=name, node=NODE)

    def mount(self, pod: Pod | None = None, /, **parameters: str) -> MountOutcome:
        """A mount of a pod, a new one where none is given, through the proxy."""
        pod = pod or self.pod()
        return self.driver.mount(pod, self.parameters() | parameters, tokens=self.tokens(pod))

    def parameters(self) -> dict[str, str]:
        """Those of the shop's class."""
        objects = "- {objectName: api-key, secretPath: shop/data/app, secretKey: api_key}"
        return {"roleName": "shop", "objects": objects, "vaultAddress": self.proxy.address}

    def tokens(self, pod: Pod) -> dict[str, str]:
        """What the driver hands over at a mount."""
        return {AUDIENCE: self.kube.issue_token(pod.namespace, pod.service_account, audiences=[AUDIENCE], pod=pod)}

    def refused(self, pod: Pod | None = None, /, **parameters: str) -> str:
        """The words of a mount that fails as all of these do."""
        with pytest.raises(grpc.RpcError) as told:
            self.mount(pod, **parameters)
        assert told.value.code() is FAILED, told.value.details()
        return str(told.value.details())

    def recovers(self, pod: Pod | None = None, /, **parameters: str) -> None:
        """Mounts work again at kubelet's next try or the one after; here those come quickly."""
        for _ in range(30):
            try:
                assert self.mount(pod, **parameters).text("api-key") == "key-1"
            except grpc.RpcError as error:
                assert error.code() is FAILED, error.details()  # noqa: PT017  # no other code on the way either
                time.sleep(0.1)
            else:
                return
        pytest.fail("mounts do not work again")
