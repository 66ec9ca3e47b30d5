"""The guardrails of a real daemon: what a hardened one never sends, and to whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.live import Cluster, Daemon, class_of
from tests.stand.driver import Driver
from tests.stand.faulty import Answer, Faulty, secret, token
from tests.stand.kubeapi import Pod
from tests.stand.waiting import eventually

FIELDS = "{objectName: api-key, secretPath: shop/data/app, secretKey: api_key}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("guardrails")) as running:
        running.role("app")
        yield running


@pytest.fixture
def tenants_vault() -> Iterator[Faulty]:
    """A server that a tenant runs, which takes whatever token it is sent."""
    with Faulty() as server:
        server.on("auth/app/login", token("hvs.of-the-tenants-server"))
        server.on("shop/data/app", secret({"data": {"api_key": "x"}}))
        yield server


def mount(cluster: Cluster, daemon: Daemon, **parameters: str) -> str:
    """The secret that is mounted for a pod whose token the driver did not hand over: a TokenRequest makes it."""
    with Driver(daemon.socket) as driver:
        return driver.mount(pod(cluster), class_of("app", FIELDS) | {"audience": "vault"} | parameters).text("api-key")


def pod(cluster: Cluster) -> Pod:
    return cluster.kube.add_pod("shop", f"pod-{len(cluster.kube.requests)}", service_account="app")


def refusal(cluster: Cluster, daemon: Daemon, **parameters: str) -> str:
    """What a mount that fails is told."""
    with pytest.raises(grpc.RpcError) as told:
        mount(cluster, daemon, **parameters)
    return str(told.value.details())


def tokens_made(cluster: Cluster) -> int:
    return sum(request.path.endswith("/token") for request in cluster.kube.requests)


def test_a_pods_token_goes_to_no_server_of_a_tenant(cluster: Cluster, tenants_vault: Faulty) -> None:
    """Hardened, a class that names another server is refused before a token is made, and nothing is sent there. The
    bare daemon makes one and sends it, as the Go providers do.
    """
    elsewhere = {"vaultAddress": tenants_vault.address}
    with Daemon(cluster, "--hardened") as daemon:
        assert mount(cluster, daemon) == "key-1"
        made = tokens_made(cluster)
        told = refusal(cluster, daemon, **elsewhere)
        assert f"--allowed-vault-addresses={tenants_vault.address} would allow it" in told
        assert tokens_made(cluster) == made
        assert tenants_vault.arrivals == []
    with Daemon(cluster) as daemon:
        mount(cluster, daemon, **elsewhere)
    (login,) = (arrival for arrival in tenants_vault.arrivals if arrival.path.endswith("/login"))
    assert json.loads(login.body)["jwt"].startswith("eyJ")


def test_a_redirect_leads_to_no_server_that_is_not_allowed(cluster: Cluster, tenants_vault: Faulty) -> None:
    """A server that the operator names cannot pass the token on to one that nobody named."""
    with Faulty() as operators:
        operators.on("auth/app/login", Answer(307, headers={"Location": f"{tenants_vault.address}/v1/auth/app/login"}))
        with Daemon(cluster, "--hardened", f"--allowed-vault-addresses={operators.address}") as daemon:
            told = refusal(cluster, daemon, vaultAddress=operators.address)
        assert "--allowed-vault-addresses" in told
        assert operators.arrivals
        assert tenants_vault.arrivals == []


def test_an_address_that_the_operator_allows_works_hardened(cluster: Cluster, tenants_vault: Faulty) -> None:
    """With the flag and the value that the refusal names, the class mounts."""
    with Daemon(cluster, "--hardened", f"--allowed-vault-addresses={tenants_vault.address}") as daemon:
        assert mount(cluster, daemon, vaultAddress=tenants_vault.address) == "x"
        for told in ("guardrails: hardened", "--vault-addr allows http://", "--allowed-vault-addresses allows http://"):
            eventually(partial(daemon.said, told), f"the log says: {told}")


def test_a_file_of_the_provider_is_not_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    """Whether a file exists in the provider's container is not told to who names it without leave."""
    (tmp_path / "there").write_text("secret of the provider")
    with Daemon(cluster, "--hardened") as daemon:
        told = [refusal(cluster, daemon, vaultCACertPath=str(tmp_path / name)) for name in ("there", "gone")]
    assert told[0].replace("there", "gone") == told[1]


def test_limits_of_the_flags_reach_the_daemon(cluster: Cluster) -> None:
    """A pod that is mounted more often than --max-pod-mounts allows is told so."""
    with Daemon(cluster, "--max-pod-mounts=1") as daemon, Driver(daemon.socket) as driver:
        mounted = driver.mount(pod(cluster), class_of("app", FIELDS) | {"audience": "vault"})
        with pytest.raises(grpc.RpcError) as told:
            driver.remount(mounted)
    assert told.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--max-pod-mounts=2 would allow" in str(told.value.details())
