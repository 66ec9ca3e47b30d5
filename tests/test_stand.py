"""The stand is honest: its parts refuse what the real ones refuse.

A test that passes on the stand proves something only as far as these do.
"""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import psycopg
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from provider.v1alpha1 import service_pb2, service_pb2_grpc
from tests.stand import ecommerce, kubeapi, openbao
from tests.stand.driver import Driver, DriverError
from tests.stand.ecommerce import EcommerceStand
from tests.stand.kubeapi import AUDIENCE, KubeApi, Pod
from tests.stand.kubelet import Failure
from tests.stand.openbao import OpenBao, OpenBaoError
from tests.stand.pki import Authority
from tests.stand.process import Process, StandError, free_port
from tests.stand.waiting import eventually

POD = Pod("shop", "web-0", "4f5c2a34-0000-4000-8000-000000000001", "web", "node-1", "Running")


@pytest.fixture
def kube() -> Iterator[KubeApi]:
    with KubeApi() as api:
        yield api


@pytest.fixture(scope="module")
def shop() -> Iterator[EcommerceStand]:
    with EcommerceStand(audit=True) as stand:
        yield stand


class Provider(service_pb2_grpc.CSIDriverProviderServicer):
    """A provider that answers what a test tells it to: the answers first, then the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[service_pb2.MountResponse | grpc.StatusCode] = []
        self.requests: list[service_pb2.MountRequest] = []

    def Mount(self, request: service_pb2.MountRequest, context: grpc.ServicerContext) -> service_pb2.MountResponse:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, service_pb2.MountResponse):
            return answer
        context.abort(answer, "as told")

    def Version(
        self, request: service_pb2.VersionRequest, context: grpc.ServicerContext
    ) -> service_pb2.VersionResponse:
        return service_pb2.VersionResponse(version=request.version, runtime_name="told")


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    servicer = Provider()
    service_pb2_grpc.add_CSIDriverProviderServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{tmp_path}/p.sock")
    server.start()
    yield servicer
    server.stop(None).wait()


@pytest.fixture
def driver(provider: Provider, tmp_path: Path) -> Iterator[Driver]:
    with Driver(tmp_path / "p.sock", timeout=20) as client:
        yield client


def answer(*files: tuple[str, bytes, int], version: str = "1") -> service_pb2.MountResponse:
    """An answer of these files (path, contents, mode) and one version."""
    return service_pb2.MountResponse(
        object_version=[service_pb2.ObjectVersion(id="object", version=version)],
        files=[service_pb2.File(path=path, contents=data, mode=mode) for path, data, mode in files],
    )


def call(
    kube: KubeApi,
    method: str,
    path: str,
    body: object = None,
    *,
    account: tuple[str, str] | None = None,
    token: str | None = None,
    accept: str = "application/json",
) -> tuple[int, dict[str, Any]]:
    """Ask the API as `account` (default the provider's), or with `token`; returns status and body."""
    bearer = kube.issue_token(*(account or kube.provider)) if token is None else token
    request = urllib.request.Request(  # noqa: S310 - the stand's own address
        kube.url + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {bearer}", "Content-Type": "application/json", "Accept": accept},
    )
    context = ssl.create_default_context(cadata=kube.ca_pem.decode())
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def review(kube: KubeApi, token: str, *audiences: str) -> dict[str, Any]:
    """The status of a TokenReview, asked as OpenBao asks."""
    spec: dict[str, object] = {"token": token, **({"audiences": audiences} if audiences else {})}
    path = "/apis/authentication.k8s.io/v1/tokenreviews"
    status, body = call(kube, "POST", path, {"spec": spec}, account=kube.reviewer)
    assert status == 201
    result: dict[str, Any] = body["status"]
    return result


def login(shop: EcommerceStand, token: str) -> dict[str, Any]:
    """Log in to the shop's role with a token."""
    body = {"role": "ecommerce-app", "jwt": token}
    result: dict[str, Any] = shop.openbao.api("POST", "auth/kubernetes/login", body, token="")["auth"]
    return result


def shop_token(shop: EcommerceStand) -> str:
    tokens = shop.tokens()
    assert tokens is not None
    return tokens[ecommerce.AUDIENCE]


class TestTokenReview:
    def test_living_token_of_the_asked_audience_is_authenticated(self, kube: KubeApi) -> None:
        """A bound token answers user, groups, pod and the audience that matched."""
        pod = kube.add_pod("shop", "web-0", service_account="web")
        status = review(kube, kube.issue_token("shop", "web", audiences=["vault", "other"], pod=pod), "vault")
        assert status["authenticated"] is True
        assert status["audiences"] == ["vault"]
        assert status["user"]["username"] == "system:serviceaccount:shop:web"
        assert "system:serviceaccounts:shop" in status["user"]["groups"]
        assert status["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [pod.uid]

    def test_another_audience_is_refused(self, kube: KubeApi) -> None:
        """A token for one audience is not one for another."""
        kube.add_service_account("shop", "web")
        status = review(kube, kube.issue_token("shop", "web", audiences=["vault"]), "other")
        assert "authenticated" not in status
        assert "audiences" in status["error"]

    def test_no_asked_audience_means_the_servers_own(self, kube: KubeApi) -> None:
        """Where none is asked, only a token for the API server itself passes."""
        kube.add_service_account("shop", "web")
        assert review(kube, kube.issue_token("shop", "web"))["audiences"] == [AUDIENCE]
        assert "authenticated" not in review(kube, kube.issue_token("shop", "web", audiences=["vault"]))

    def test_expired_token_is_refused(self, kube: KubeApi) -> None:
        """A token past its `exp` is not authenticated."""
        kube.add_service_account("shop", "web")
        status = review(kube, kube.issue_token("shop", "web", ttl=-5))
        assert "authenticated" not in status
        assert "expired" in status["error"]

    def test_forged_token_is_refused(self, kube: KubeApi) -> None:
        """The same claims under another key, or under no key, are not authenticated."""
        kube.add_service_account("shop", "web")
        claims = jwt.decode(kube.issue_token("shop", "web"), options={"verify_signature": False})
        other_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        for forged in (
            jwt.encode(claims, other_key, algorithm="RS256"),
            jwt.encode(claims, "", algorithm="none"),
            "no-jwt",
        ):
            assert review(kube, forged) == {"user": {}, "error": "invalid bearer token"}

    def test_token_dies_with_its_pod_and_account(self, kube: KubeApi) -> None:
        """A bound token ends with its pod, even when a pod of that name comes back; any with its account."""
        pod = kube.add_pod("shop", "web-0", service_account="web")
        bound, free = kube.issue_token("shop", "web", pod=pod), kube.issue_token("shop", "web")
        kube.remove_pod(pod)
        kube.add_pod("shop", "web-0", service_account="web")
        assert "authenticated" not in review(kube, bound)
        assert review(kube, free)["authenticated"] is True
        kube.remove_service_account("shop", "web")
        kube.add_service_account("shop", "web")
        assert "authenticated" not in review(kube, free)


class TestKubeApi:
    def test_callers_without_permission_are_refused_in_the_api_servers_words(self, kube: KubeApi) -> None:
        """No token is 401; a token without the permission 403, with a message that names all of it."""
        path = "/api/v1/namespaces/shop/serviceaccounts/web/token"
        kube.add_service_account("shop", "web")
        assert call(kube, "POST", path, {"spec": {}}, token="none")[1]["reason"] == "Unauthorized"
        assert call(kube, "POST", path, {"spec": {}})[0] == 201
        kube.deny("create", "serviceaccounts/token")
        status, body = call(kube, "POST", path, {"spec": {}})
        assert (status, body["reason"], body["code"]) == (403, "Forbidden", 403)
        assert body["message"] == (
            'serviceaccounts "web" is forbidden: User "system:serviceaccount:csi:vault-csi-provider" cannot '
            'create resource "serviceaccounts/token" in API group "" in the namespace "shop"'
        )

    def test_provider_may_only_what_its_manifest_gives(self, kube: KubeApi) -> None:
        """One named Secret, in one namespace; TokenReview is the reviewer's."""
        assert call(kube, "GET", "/api/v1/namespaces/csi/secrets/other")[0] == 403
        assert call(kube, "GET", f"/api/v1/namespaces/shop/secrets/{kube.hmac_secret}")[0] == 403
        assert call(kube, "GET", f"/api/v1/namespaces/csi/secrets/{kube.hmac_secret}")[0] == 404
        assert call(kube, "POST", "/apis/authentication.k8s.io/v1/tokenreviews", {"spec": {}})[0] == 403

    def test_token_request_grants_a_bound_token(self, kube: KubeApi) -> None:
        """The token is for the audience that was asked, and bound to the pod."""
        pod = kube.add_pod("shop", "web-0", service_account="web")
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": pod.uid}
        spec = {"audiences": ["vault"], "expirationSeconds": 600, "boundObjectRef": bound}
        status, body = call(kube, "POST", "/api/v1/namespaces/shop/serviceaccounts/web/token", {"spec": spec})
        assert status == 201
        assert body["status"]["expirationTimestamp"].endswith("Z")
        assert review(kube, body["status"]["token"], "vault")["authenticated"] is True
        kube.remove_pod(pod)
        assert "authenticated" not in review(kube, body["status"]["token"], "vault")

    @pytest.mark.parametrize(
        ("account", "spec", "status", "words"),
        [
            ("nobody", {}, 404, 'serviceaccounts "nobody" not found'),
            ("web", {"expirationSeconds": 599}, 422, "may not specify a duration less than 10 minutes"),
            ("web", {"boundObjectRef": {"kind": "Pod", "name": "gone"}}, 404, 'pods "gone" not found'),
            (
                "web",
                {"boundObjectRef": {"kind": "Pod", "name": "web-0", "uid": "old"}},
                409,
                "does not match",
            ),
            ("web", {"boundObjectRef": {"kind": "Pod", "name": "db-0"}}, 400, "different serviceaccount"),
            ("web", {"boundObjectRef": {"kind": "Node", "name": "n"}}, 400, "cannot bind token"),
        ],
    )
    def test_token_request_refusals(
        self, kube: KubeApi, account: str, spec: dict[str, object], status: int, words: str
    ) -> None:
        """An unknown account, a short life, and a pod that is gone, another or another's are refused."""
        kube.add_pod("shop", "web-0", service_account="web")
        kube.add_pod("shop", "db-0", service_account="db")
        path = f"/api/v1/namespaces/shop/serviceaccounts/{account}/token"
        answered, body = call(kube, "POST", path, {"spec": spec})
        assert answered == status
        assert words in body["message"]

    def test_only_one_creates_a_secret(self, kube: KubeApi) -> None:
        """Of many creators one gets 201, the others 409, and all read the same immutable object."""
        path = "/api/v1/namespaces/csi/secrets"

        def create(number: int) -> int:
            data = {"key": f"{number:04}"}
            body = {"metadata": {"name": kube.hmac_secret}, "data": data, "immutable": True}
            return call(kube, "POST", path, body)[0]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(create, range(4))) == [201, 409, 409, 409]
        status, body = call(kube, "GET", f"{path}/{kube.hmac_secret}")
        assert status == 200
        assert body == kube.secret("csi", kube.hmac_secret)
        assert body["immutable"] is True

    def test_pods_are_listed_by_field_page_and_metadata(self, kube: KubeApi) -> None:
        """Selectors choose, `limit` and `continue` page, and Accept turns pods into their metadata."""
        for number in range(5):
            kube.add_pod("shop", f"web-{number}", phase="Succeeded" if number == 4 else "Running")
        kube.add_pod("shop", "far", node="node-2")
        selector = "spec.nodeName=node-1,status.phase!=Succeeded"
        path = f"/api/v1/pods?resourceVersion=0&limit=3&fieldSelector={selector}"
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
        _, first = call(kube, "GET", path, accept=accept)
        assert first["kind"] == "PartialObjectMetadataList"
        assert [item["metadata"]["name"] for item in first["items"]] == ["web-0", "web-1", "web-2"]
        assert "spec" not in first["items"][0]
        _, second = call(kube, "GET", f"{path}&continue={first['metadata']['continue']}")
        assert second["kind"] == "PodList"
        assert [item["status"]["phase"] for item in second["items"]] == ["Running"]
        assert "continue" not in second["metadata"]
        assert call(kube, "GET", "/api/v1/pods?fieldSelector=spec.wrong=1")[0] == 400

    def test_faults_hit_the_path_they_name_until_healed(self, kube: KubeApi) -> None:
        """`fail` answers its status as often as told, on its path only; `heal` ends it."""
        kube.fail(503, path="/pods", times=1)
        assert call(kube, "GET", "/api/v1/pods")[0] == 503
        assert call(kube, "GET", "/api/v1/pods")[0] == 200
        kube.fail(500)
        kube.stall(60, path="/pods")
        assert call(kube, "GET", f"/api/v1/namespaces/csi/secrets/{kube.hmac_secret}")[0] == 500
        kube.heal()
        assert call(kube, "GET", "/api/v1/pods")[0] == 200
        assert kube.count("GET", "/api/v1/pods") == 3

    def test_stop_closes_the_port_and_start_opens_it_again(self, kube: KubeApi) -> None:
        """While stopped, connections are refused, even with an answer under way; what it knew stays."""
        kube.put_secret("csi", kube.hmac_secret, {"key": b"x"})
        kube.stall(60)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(call, kube, "GET", "/api/v1/pods")
            eventually(lambda: bool(kube.requests), "the request's arrival")
            kube.stop()
            with pytest.raises(OSError):  # noqa: PT011 - closed or reset, as the kernel has it
                waiting.result()
        kube.heal()
        with pytest.raises(urllib.error.URLError):
            call(kube, "GET", "/api/v1/pods")
        kube.start()
        assert call(kube, "GET", f"/api/v1/namespaces/csi/secrets/{kube.hmac_secret}")[0] == 200

    def test_its_certificate_is_its_own_authoritys(self, kube: KubeApi) -> None:
        """A client that trusts another authority does not get through."""
        context = ssl.create_default_context(cadata=Authority().pem.decode())
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(kube.url, context=context)  # noqa: S310 - the stand's own address

    def test_credentials_on_disk_work(self, kube: KubeApi, tmp_path: Path) -> None:
        """The kubeconfig's and the in-cluster directory's tokens let their account in."""
        config = yaml.safe_load(kube.write_kubeconfig(tmp_path / "config").read_text())
        directory = kube.write_in_cluster_dir(tmp_path / "in-cluster")
        assert config["clusters"][0]["cluster"]["server"] == kube.url
        assert (directory / "ca.crt").read_bytes() == kube.ca_pem
        assert (directory / "namespace").read_text() == "csi"
        for token in (config["users"][0]["user"]["token"], (directory / "token").read_text()):
            assert call(kube, "GET", "/api/v1/pods", token=token)[0] == 200


class TestEcommerce:
    def test_login_asks_the_api_server(self, shop: EcommerceStand) -> None:
        """OpenBao reviews the token at the stand-in: one request, and no login while that is away."""
        before = shop.kube.count("POST", "tokenreviews")
        assert "ecommerce-policy" in login(shop, shop_token(shop))["policies"]
        assert shop.kube.count("POST", "tokenreviews") == before + 1
        shop.kube.stop()
        try:
            with pytest.raises(OpenBaoError):
                login(shop, shop_token(shop))
        finally:
            shop.kube.start()

    def test_wrong_audience_account_and_pod_are_refused(self, shop: EcommerceStand) -> None:
        """A token for another audience, of another account, or of a pod that is gone does not log in."""
        other = shop.kube.add_pod(ecommerce.NAMESPACE, "other-0", service_account="other")
        gone = shop.kube.add_pod(ecommerce.NAMESPACE, "gone-0", service_account=ecommerce.SERVICE_ACCOUNT)
        shop.kube.remove_pod(gone)
        issue = shop.kube.issue_token
        for token in (
            issue(ecommerce.NAMESPACE, ecommerce.SERVICE_ACCOUNT, pod=shop.pod),
            issue(ecommerce.NAMESPACE, "other", audiences=[ecommerce.AUDIENCE], pod=other),
            issue(ecommerce.NAMESPACE, ecommerce.SERVICE_ACCOUNT, audiences=[ecommerce.AUDIENCE], pod=gone),
        ):
            with pytest.raises(OpenBaoError) as caught:
                login(shop, token)
            assert caught.value.status == 403

    def test_jwt_method_verifies_the_same_tokens(self, shop: EcommerceStand) -> None:
        """The jwt method takes the stand's tokens by its public key, and not those for another audience."""
        shop.openbao.enable_jwt_auth("jwt", shop.kube.public_key_pem, shop.kube.issuer)
        shop.openbao.role("jwt", "app", role_type="jwt", user_claim="sub", bound_audiences=["vault"])
        issue = shop.kube.issue_token

        def enter(audience: str) -> dict[str, Any]:
            token = issue(ecommerce.NAMESPACE, ecommerce.SERVICE_ACCOUNT, audiences=[audience])
            return shop.openbao.api("POST", "auth/jwt/login", {"role": "app", "jwt": token}, token="")

        assert enter("vault")["auth"]["client_token"]
        with pytest.raises(OpenBaoError):
            enter("other")

    def test_database_credential_really_opens_the_database(self, shop: EcommerceStand) -> None:
        """The leased user reads with its own password only, may not write, and ends with its token."""
        auth = login(shop, shop_token(shop))
        lease = shop.openbao.api("GET", "database/creds/ecommerce-readonly", token=auth["client_token"])
        user, password = lease["data"]["username"], lease["data"]["password"]
        assert (lease["lease_duration"], lease["renewable"]) == (3600, True)
        assert shop.openbao.leases("database/creds") == [lease["lease_id"]]
        assert auth["accessor"] in shop.openbao.token_accessors()
        assert shop.postgres.users("v-%") == [user]
        names = shop.postgres.query("SELECT name FROM products ORDER BY id", user=user, password=password)
        assert names == [("Teapot",), ("Kettle",)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            shop.postgres.query("DELETE FROM products", user=user, password=password)
        assert not shop.postgres.can_login(user, password + "x")
        assert not shop.postgres.can_login(user, "")
        assert not shop.postgres.can_login("nobody", password)
        shop.openbao.api("POST", "auth/token/revoke-self", token=auth["client_token"])
        # OpenBao answers at once and revokes the token's leases afterwards.
        eventually(lambda: not shop.postgres.can_login(user, password), "the user's end")
        eventually(lambda: shop.openbao.leases("database/creds") == [], "the lease's end")

    def test_users_whose_time_is_over_are_told_apart(self, shop: EcommerceStand) -> None:
        """Of the users there are, `valid` leaves out one that PostgreSQL lets in no more."""
        for name, until in (("over", "yesterday"), ("valid", "tomorrow"), ("endless", "infinity")):
            shop.postgres.query(f"CREATE ROLE \"life-{name}\" LOGIN VALID UNTIL '{until}'")
        shop.postgres.query('CREATE ROLE "life-of-no-end" LOGIN')
        assert len(shop.postgres.users("life-%")) == 4
        assert shop.postgres.users("life-%", valid=True) == ["life-endless", "life-of-no-end", "life-valid"]

    def test_policy_covers_what_the_class_reads_and_no_more(self, shop: EcommerceStand) -> None:
        """The shared key is readable, the mount's other paths and other engines are not."""
        token = login(shop, shop_token(shop))["client_token"]
        read = shop.openbao.api("GET", "ecommerce/data/shared/config", token=token)
        assert read["data"]["data"]["api_key"] == shop.api_key
        for path in ("ecommerce/data/other", "secret/data/x", "database/config/postgres"):
            with pytest.raises(OpenBaoError, match="403"):
                shop.openbao.api("GET", path, token=token)

    def test_audit_counts_requests_but_roots(self, shop: EcommerceStand) -> None:
        """Each request of a client is seen once, with its accessor; those of the stand itself are not."""
        auth = login(shop, shop_token(shop))
        shop.openbao.api("GET", "ecommerce/data/shared/config")
        shop.openbao.api("GET", "ecommerce/data/shared/config", token=auth["client_token"])
        seen = [one for one in shop.openbao.requests("ecommerce/") if one.accessor == auth["accessor"]]
        assert [(one.operation, one.path) for one in seen] == [("read", "ecommerce/data/shared/config")]
        assert all(one.accessor for one in shop.openbao.requests("ecommerce/"))

    def test_parameters_are_the_examples(self, shop: EcommerceStand) -> None:
        """The class that is mounted is the manifest's, at this stand's address."""
        objects = yaml.safe_load(shop.parameters["objects"])
        assert [one["objectName"] for one in objects] == ["db-username", "db-password", "api-key"]
        assert shop.parameters["roleName"] == "ecommerce-app"
        assert shop.parameters["vaultAddress"] == shop.openbao.address

    def test_without_driver_tokens_the_role_takes_the_api_servers_audience(self) -> None:
        """An installation without `tokenRequests` sends no token, and its role takes a TokenRequest's."""
        with EcommerceStand(audience=None) as shop:
            assert shop.tokens() is None
            kube = shop.kube
            path = f"/api/v1/namespaces/{ecommerce.NAMESPACE}/serviceaccounts/{ecommerce.SERVICE_ACCOUNT}/token"
            reference = {"kind": "Pod", "name": shop.pod.name, "uid": shop.pod.uid}
            _, granted = call(kube, "POST", path, {"spec": {"boundObjectRef": reference}})
            assert login(shop, granted["status"]["token"])["client_token"]

    def test_manifest_without_a_class_is_said_plainly(self, tmp_path: Path) -> None:
        """A manifest that has no SecretProviderClass is a StandError that names the file."""
        (tmp_path / "x.yaml").write_text("kind: Pod\n---\n")
        with pytest.raises(StandError, match=r"x\.yaml has no SecretProviderClass"):
            ecommerce.example_parameters(tmp_path / "x.yaml")


class TestOpenBao:
    def test_tls_server_demands_a_client_certificate(self, tmp_path: Path) -> None:
        """With a client authority, only a client with its certificate gets an answer over TCP."""
        servers, clients = Authority("servers"), Authority("clients")
        context = ssl.create_default_context(cadata=servers.pem.decode())
        with OpenBao(storage="inmem", certificate=servers.server(), client_ca_pem=clients.pem) as bao:
            url = f"{bao.address}/v1/sys/health"
            with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
                urllib.request.urlopen(url, context=context)  # noqa: S310 - the stand's own address
            context.load_cert_chain(*clients.client().write(tmp_path, "client"))
            with urllib.request.urlopen(url, context=context) as response:  # noqa: S310
                assert json.load(response)["sealed"] is False

    @pytest.mark.parametrize(("hosts", "expired"), [(["other.example"], False), (["127.0.0.1"], True)])
    def test_bad_server_certificates_are_bad(self, hosts: list[str], expired: bool) -> None:
        """A certificate for another host, or an expired one, fails verification; the stand still works."""
        authority = Authority()
        context = ssl.create_default_context(cadata=authority.pem.decode())
        certificate = authority.server(hosts, expired=expired)
        with OpenBao(storage="inmem", certificate=certificate) as bao:
            with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
                urllib.request.urlopen(bao.address, context=context)  # noqa: S310 - the stand's own address
            assert bao.api("GET", "sys/health")["initialized"] is True

    def test_stored_secrets_survive_a_kill_and_sealing_stops_answers(self) -> None:
        """On raft storage a KV secret is there after SIGKILL; sealed, it is a 503 until unsealed."""
        with OpenBao(storage="raft") as bao:
            bao.mount_kv("kv", 1)
            bao.api("POST", "kv/a", {"k": "v"})
            bao.kill()
            with pytest.raises(OSError):  # noqa: PT011 - refused or gone, as the kernel has it
                bao.api("GET", "kv/a")
            bao.start()
            assert bao.api("GET", "kv/a")["data"] == {"k": "v"}
            bao.seal()
            with pytest.raises(OpenBaoError, match="503"):
                bao.api("GET", "kv/a")
            bao.unseal()
            assert bao.api("GET", "kv/a")["data"] == {"k": "v"}
            assert Path(bao.unix_address.removeprefix("unix://")).is_socket()

    def test_dev_server_pauses_and_restarts_on_its_address(self) -> None:
        """Paused it answers nothing, resumed it does; a restart keeps address and root token, not data."""
        with OpenBao() as bao:
            address = bao.address
            bao.api("POST", "secret/data/a", {"data": {"k": "v"}})
            bao.pause()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(bao.api, "GET", "secret/data/a")
                assert not concurrent.futures.wait([waiting], timeout=0.2).done
                bao.resume()
                assert waiting.result()["data"]["data"] == {"k": "v"}
            bao.restart()
            assert bao.address == address
            with pytest.raises(OpenBaoError, match="404"):
                bao.api("GET", "secret/data/a")

    def test_namespaces_are_apart(self) -> None:
        """A KV mount, a policy and the audit log's entries belong to the namespace that they were made in."""
        with OpenBao(audit=True) as bao:
            bao.api("POST", "sys/namespaces/team")
            bao.mount_kv("kv", namespace="team")
            bao.write_kv("kv/data/a", {"k": "v"}, namespace="team")
            bao.write_policy("reader", 'path "kv/data/a" { capabilities = ["read"] }', namespace="team")
            made = bao.api("POST", "auth/token/create", {"policies": ["reader"]}, namespace="team")
            token = made["auth"]["client_token"]
            read = bao.api("GET", "kv/data/a", namespace="team", token=token)
            assert read["data"]["data"] == {"k": "v"}
            with pytest.raises(OpenBaoError, match="403"):
                bao.api("GET", "kv/data/a", token=token)
            assert [one.namespace for one in bao.requests("kv/")] == ["team/", ""]

    def test_taken_port_is_left_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A port that somebody takes between the look and the start costs an attempt, not the stand."""
        with socket.create_server(("127.0.0.1", free_port())) as taken:
            for module in (openbao, kubeapi):
                ports = iter([taken.getsockname()[1], free_port()])
                monkeypatch.setattr(module, "free_port", lambda ports=ports: next(ports))
            with OpenBao() as bao, KubeApi() as kube:
                assert bao.api("GET", "sys/health")["sealed"] is False
                assert call(kube, "GET", "/api/v1/pods")[0] == 200

    def test_pki_issues_for_its_domains(self) -> None:
        """A role issues for its domain with an expiration, and refuses another domain."""
        with OpenBao() as bao:
            bao.enable_pki()
            bao.pki_role("web", ["shop.example"])
            issued = bao.api("POST", "pki/issue/web", {"common_name": "www.shop.example"})
            assert issued["lease_id"] == ""
            assert issued["data"]["expiration"] > time.time()
            with pytest.raises(OpenBaoError, match="400"):
                bao.api("POST", "pki/issue/web", {"common_name": "other.example"})


class TestDriver:
    def test_request_is_what_the_driver_sends(self, provider: Provider, driver: Driver) -> None:
        """Attributes, tokens, secrets and permission are strings of JSON as the contract has them."""
        provider.answers = [answer(("a", b"1", 0o644))]
        token = jwt.encode({"exp": 1893456000}, "k" * 32)
        driver.mount(
            POD,
            {"roleName": "class", "objects": "[]"},
            volume_attributes={"roleName": "volume"},
            tokens={"vault": token},
            class_name="web-secrets",
        )
        sent = provider.requests[0]
        attributes = json.loads(sent.attributes)
        tokens = json.loads(attributes.pop("csi.storage.k8s.io/serviceAccount.tokens"))
        assert tokens == {"vault": {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}}
        assert attributes == {
            "roleName": "volume",
            "objects": "[]",
            "csi.storage.k8s.io/pod.name": POD.name,
            "csi.storage.k8s.io/pod.namespace": POD.namespace,
            "csi.storage.k8s.io/pod.uid": POD.uid,
            "csi.storage.k8s.io/serviceAccount.name": POD.service_account,
            "csi.storage.k8s.io/ephemeral": "true",
            "secretProviderClass": "web-secrets",
        }
        assert (sent.permission, sent.secrets, len(sent.current_object_version)) == ("420", "null", 0)

    def test_files_are_swapped_in_at_once(self, provider: Provider, driver: Driver) -> None:
        """Visible names are symlinks through `..data`, which moves to a new directory; the old one goes."""
        provider.answers = [
            answer(("a", b"1", 0o600), ("sub/b", b"2", 0o644)),
            answer(("a", b"3", 0o640), ("c", b"4", 0o666), version="2"),
        ]
        first = driver.mount(POD, {})
        assert first.versions == {"object": "1"}
        assert (first.text("a"), first.text("sub/b")) == ("1", "2")
        assert (first.target / "a").is_symlink()
        assert str((first.target / "a").readlink()) == "..data/a"
        old = (first.target / "..data").resolve()
        assert old.name.startswith("..2")
        assert (old / "a").stat().st_mode & 0o777 == 0o600
        second = driver.remount(first)
        fresh = (second.target / "..data").resolve()
        assert {entry.name for entry in second.target.iterdir()} == {"..data", fresh.name, "a", "c"}
        assert fresh != old
        assert (second.text("a"), (fresh / "a").stat().st_mode & 0o777) == ("3", 0o640)
        assert (fresh / "c").stat().st_mode & 0o777 == 0o666

    def test_same_files_are_not_written_again(self, provider: Provider, driver: Driver) -> None:
        """An unchanged answer leaves the volume alone; so does one of versions without files."""
        provider.answers = [answer(("a", b"1", 0o600)), answer(("a", b"1", 0o600)), answer()]
        first = driver.mount(POD, {})
        directory = (first.target / "..data").readlink()
        assert first.rewritten
        assert not driver.remount(first).rewritten
        assert not driver.remount(first).rewritten
        assert (first.target / "..data").readlink() == directory
        assert first.text("a") == "1"

    def test_remount_sends_fresh_tokens(self, provider: Provider, driver: Driver) -> None:
        """A rotation is the same request with the tokens of that minute."""
        provider.answers = [answer(("a", b"1", 0o600))]
        outcome = driver.mount(POD, {"roleName": "r"}, tokens={"vault": "one"})
        driver.remount(outcome, tokens={"vault": "two"})
        before, after = (json.loads(request.attributes) for request in provider.requests)
        tokens = json.loads(after.pop("csi.storage.k8s.io/serviceAccount.tokens"))
        assert tokens["vault"]["token"] == "two"
        assert before.items() > after.items()
        assert provider.requests[0].target_path == provider.requests[1].target_path

    def test_over_four_mib_is_refused_by_the_transport(self, provider: Provider, driver: Driver) -> None:
        """Just under 4 MiB mounts; over it is RESOURCE_EXHAUSTED, and the volume stays as it was."""
        provider.answers = [
            answer(("a", b"x" * (4 * 1024 * 1024 - 100), 0o600)),
            answer(("a", b"x" * (4 * 1024 * 1024), 0o600)),
        ]
        outcome = driver.mount(POD, {})
        with pytest.raises(grpc.RpcError) as caught:
            driver.remount(outcome)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(outcome.read("a")) == 4 * 1024 * 1024 - 100

    @pytest.mark.parametrize(
        ("paths", "words"),
        [
            (["a", "a"], "two files have the path"),
            (["a", "a/b"], "is a file and the directory"),
            (["/a"], "absolute"),
            (["a//b"], "not clean"),
            (["./a"], "not clean"),
            (["a/"], "not clean"),
            ([""], "not clean"),
            (["a/../b"], "leaves the volume"),
            (["..data"], "keeps for itself"),
            (["..x/a"], "keeps for itself"),
            (["é" * 128], "too long"),
            (["/".join(["a" * 200] * 21)], "too long"),
        ],
    )
    def test_bad_paths_are_refused(
        self, provider: Provider, driver: Driver, tmp_path: Path, paths: list[str], words: str
    ) -> None:
        """Paths that would break the driver's writer are errors, and nothing is written."""
        provider.answers = [answer(*((path, b"", 0o600) for path in paths))]
        with pytest.raises(DriverError, match=words):
            driver.mount(POD, {}, target_path=tmp_path / "volume")
        assert not (tmp_path / "volume").exists()

    @pytest.mark.parametrize(
        ("response", "words"),
        [
            (service_pb2.MountResponse(files=[service_pb2.File(path="a")]), "no object versions"),
            (
                service_pb2.MountResponse(
                    object_version=[service_pb2.ObjectVersion(id="o", version=one) for one in "12"]
                ),
                "same id",
            ),
            (
                service_pb2.MountResponse(
                    object_version=[service_pb2.ObjectVersion(id="o")], error=service_pb2.Error(code="X")
                ),
                "error code 'X'",
            ),
            (answer(("a", b"", 0o1000)), "not within 0 to 0777"),
            (answer(("a", b"", -1)), "not within 0 to 0777"),
        ],
    )
    def test_answers_that_break_the_contract_are_refused(
        self, provider: Provider, driver: Driver, response: service_pb2.MountResponse, words: str
    ) -> None:
        """No versions, ids that repeat, an error code, and a mode out of range are errors."""
        provider.answers = [response]
        with pytest.raises(DriverError, match=words):
            driver.mount(POD, {})

    def test_unavailable_is_tried_three_times(self, provider: Provider, driver: Driver) -> None:
        """Two UNAVAILABLE are hidden by the third attempt, a third one is not; another code at once."""
        down, fine = grpc.StatusCode.UNAVAILABLE, answer(("a", b"1", 0o600))
        provider.answers = [down, down, fine]
        outcome = driver.mount(POD, {})
        assert len(provider.requests) == 3
        provider.answers = [down, down, down, fine]
        with pytest.raises(grpc.RpcError):
            driver.remount(outcome)
        assert len(provider.requests) == 6
        provider.answers = [grpc.StatusCode.INTERNAL]
        with pytest.raises(grpc.RpcError):
            driver.remount(outcome)
        assert len(provider.requests) == 7

    def test_waits_for_a_provider_that_is_not_there_yet(self, tmp_path: Path) -> None:
        """A call before the socket exists succeeds once it does; past the deadline it fails."""
        with Driver(tmp_path / "late.sock", timeout=0.2) as impatient:
            with pytest.raises(grpc.RpcError) as caught:
                impatient.version()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
        service_pb2_grpc.add_CSIDriverProviderServicer_to_server(Provider(), server)
        pool = concurrent.futures.ThreadPoolExecutor(1)
        with Driver(tmp_path / "late.sock", timeout=20) as patient, pool:
            waiting = pool.submit(patient.version)
            server.add_insecure_port(f"unix:{tmp_path}/late.sock")
            server.start()
            assert waiting.result().runtime_name == "told"
        server.stop(None).wait()

    def test_repr_of_an_outcome_holds_no_secret(self, provider: Provider, driver: Driver) -> None:
        """An outcome in a failing test's output shows neither contents nor tokens."""
        provider.answers = [answer(("a", b"canary-contents", 0o600))]
        outcome = driver.mount(POD, {}, tokens={"vault": "canary-token"})
        assert "canary" not in repr(outcome)
        assert "canary" not in repr(outcome.files)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody collects has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class TestProcess:
    def test_child_dies_with_a_killed_parent(self, tmp_path: Path) -> None:
        """A parent that is killed, and so cleans nothing up, leaves no process behind."""
        code = (
            "import sys, time; from pathlib import Path; from tests.stand.process import Process\n"
            f"child = Process(['/bin/sleep', '600'], log=Path({str(tmp_path / 'log')!r}))\n"
            "print(child.pid, flush=True); time.sleep(600)"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        with parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            comm = Path(f"/proc/{child}/comm")
            eventually(lambda: comm.read_text().strip() == "sleep", "the child's start")
            parent.kill()
        eventually(lambda: gone(child), "the child's end")

    def test_child_outlives_the_thread_that_started_it(self, tmp_path: Path) -> None:
        """A part started on a short-lived thread keeps running."""
        started: list[Process] = []
        log = tmp_path / "log"
        command = ["/bin/sh", "-c", "echo ready; exec sleep 600"]
        thread = threading.Thread(target=lambda: started.append(Process(command, log=log)))
        thread.start()
        thread.join()
        eventually(lambda: log.read_text() == "ready\n", "the command's start")
        assert started[0].wait(0.2) is None
        assert started[0].stop() == -signal.SIGTERM

    def test_stop_ends_the_whole_group_even_paused_and_deaf(self, tmp_path: Path) -> None:
        """A command that is paused and ignores SIGTERM is killed, and its own children with it."""
        command = "trap '' TERM; sleep 600 & echo $!; wait; wait"
        process = Process(["/bin/sh", "-c", command], log=tmp_path / "log")
        eventually(lambda: (tmp_path / "log").read_text().endswith("\n"), "the command's start")
        grandchild = int((tmp_path / "log").read_text())
        process.signal(signal.SIGSTOP)
        assert process.running
        assert process.stop(grace=0.1) == -signal.SIGKILL
        assert not process.running
        eventually(lambda: gone(grandchild), "the grandchild's end")
        process.kill()  # A second time is no error.

    def test_missing_command_is_said_plainly(self, tmp_path: Path) -> None:
        """A log that cannot be written is a StandError; a command that is not there exits with a trace."""
        with pytest.raises(StandError, match="cannot start /bin/true"):
            Process(["/bin/true"], log=tmp_path / "no" / "log")
        process = Process(["/no/such/command"], log=tmp_path / "log")
        assert process.wait(20) == 1
        assert "FileNotFoundError" in process.log_tail()

    def test_free_port_is_below_the_kernels_own(self) -> None:
        """Ports stay clear of outgoing connections, so that a restart finds its port free."""
        floor = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert all(1024 < free_port() < floor for _ in range(5))


DENIED = 'login as role "app" with service account shop/app denied: Vault answered 403: permission denied'


@pytest.mark.parametrize(
    ("failure", "cut"),
    [
        (Failure("PERMISSION_DENIED", DENIED, 1.0, 3.0), True),
        (Failure("PERMISSION_DENIED", DENIED, 4.5, 5.0), True),
        (Failure("PERMISSION_DENIED", DENIED, 0.0, 1.9), False),  # over before the seal
        (Failure("PERMISSION_DENIED", DENIED, 5.1, 9.0), False),  # begun after it
        (Failure("PERMISSION_DENIED", "Vault denied GET shop/data/app", 1.0, 3.0), False),
        (Failure("UNAVAILABLE", DENIED, 1.0, 3.0), False),
    ],
)
def test_a_login_that_is_cut_off_is_one_that_was_denied_meanwhile(failure: Failure, cut: bool) -> None:
    """Long runs excuse no other denial: only a login's, that was under way while Vault was being sealed."""
    assert failure.is_cut_login([(2.0, 5.0)]) is cut


def test_what_does_not_come_about_is_told_with_what_there_is_instead() -> None:
    """Whoever reads of a wait in vain, which came once in a hundred runs, knows what there was."""
    with pytest.raises(StandError, match=r"^not within 0\.01 s: no user is left, but \['v-1'\]$"):
        eventually(lambda: False, "no user is left", seconds=0.01, instead=lambda: ["v-1"])
    with pytest.raises(StandError, match=r"^not within 0\.01 s: no user is left$"):
        eventually(lambda: False, "no user is left", seconds=0.01)
