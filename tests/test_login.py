"""Login by the kubernetes and the jwt method: which token is sent, and what a refusal says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provider import login
from provider.clock import SystemClock
from provider.errors import KubernetesUnavailable, LoginDenied, VaultUnavailable
from provider.kube import Kubernetes
from provider.redact import Sensitive
from provider.settings import TlsSettings
from provider.spc import Login, MountSpec, Pod, VaultServer
from provider.telemetry.events import Telemetry
from provider.vault import Auth, VaultServers, adapter
from tests.stand.faulty import Answer, Arrival, Faulty, refusal
from tests.stand.kubeapi import AUDIENCE, KubeApi
from tests.stand.kubeapi import Pod as KubePod
from tests.stand.openbao import OpenBao
from tests.stand.process import free_port

NAMESPACE, ACCOUNT = "shop", "web"


@pytest.fixture(scope="module")
def kube() -> Iterator[KubeApi]:
    with KubeApi() as api:
        yield api


@pytest.fixture(scope="module")
def pod(kube: KubeApi) -> KubePod:
    return kube.add_pod(NAMESPACE, "web-0", service_account=ACCOUNT)


@pytest.fixture(scope="module")
def bao(kube: KubeApi) -> Iterator[OpenBao]:
    """Roles `vault`, `openbao`, `other` and `own` on two mounts, each for the audience of its name; `own` for none."""
    with OpenBao() as server:
        server.enable_kubernetes_auth("kubernetes", kube)
        server.enable_jwt_auth("team/jwt", kube.public_key_pem, kube.issuer)
        for audience in ("vault", "openbao", "other", "own"):
            server.role(
                "kubernetes",
                audience,
                bound_service_account_names=[ACCOUNT],
                bound_service_account_namespaces=[NAMESPACE],
                token_policies=["shop"],
                token_ttl="1h",
                **({} if audience == "own" else {"audience": audience}),
            )
            server.role(
                "team/jwt",
                audience,
                role_type="jwt",
                user_claim="sub",
                bound_audiences=[AUDIENCE if audience == "own" else audience],
                token_policies=["shop"],
                token_ttl="1h",
            )
        yield server


@pytest.fixture
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VaultServers]:
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)
    opened = VaultServers(clock=SystemClock())
    yield opened
    await opened.close()


@pytest.fixture
async def kubernetes(kube: KubeApi, tmp_path: Path) -> AsyncIterator[Kubernetes]:
    kube.requests.clear()
    opened = Kubernetes(str(kube.write_kubeconfig(tmp_path / "kubeconfig")))
    yield opened
    await opened.close()


def driver_tokens(kube: KubeApi, pod: KubePod, *audiences: str) -> dict[str, Sensitive[str]]:
    """What the driver hands over where its tokenRequests name these audiences."""
    return {
        audience: Sensitive(kube.issue_token(NAMESPACE, ACCOUNT, audiences=[audience] if audience else None, pod=pod))
        for audience in audiences
    }


def spec_of(address: str, pod: KubePod, wanted: Login, tokens: dict[str, Sensitive[str]]) -> MountSpec:
    return MountSpec(
        pod=Pod(pod.namespace, pod.name, pod.uid, pod.service_account),
        class_name="shop",
        target_path="/target",
        server=VaultServer(address, "", TlsSettings()),
        login=wanted,
        objects=(),
        tokens=tokens,
    )


async def log_in(servers: VaultServers, spec: MountSpec, tokens: login.TokenSource) -> Auth:
    async with asyncio.timeout(20):
        deadline = asyncio.get_running_loop().time() + 20
        return await login.log_in(servers.get(spec.server), spec, tokens, deadline, telemetry=Telemetry())


def token_requests(kube: KubeApi) -> int:
    return kube.count("POST", f"/serviceaccounts/{ACCOUNT}/token")


class TestAudience:
    @pytest.mark.parametrize("mount", ["kubernetes", "team/jwt"])
    @pytest.mark.parametrize(
        ("wanted", "from_driver", "sent", "asked"),
        [
            (None, ("vault", "openbao", "other"), "vault", 0),
            (None, ("openbao", "other", ""), "openbao", 0),
            (None, ("other",), "own", 1),
            (None, (), "own", 1),
            ("other", ("vault", "other"), "other", 0),
            ("other", ("vault", "openbao"), "other", 1),
            ("vault", (), "vault", 1),
        ],
    )
    async def test_token_that_is_sent(
        self,
        servers: VaultServers,
        kubernetes: Kubernetes,
        kube: KubeApi,
        bao: OpenBao,
        pod: KubePod,
        mount: str,
        wanted: str | None,
        from_driver: tuple[str, ...],
        sent: str,
        asked: int,
    ) -> None:
        """docs/contract.md section 2, row by row: a role takes only the right token; TokenRequest is the resort."""
        spec = spec_of(bao.address, pod, Login(mount, sent, wanted), driver_tokens(kube, pod, *from_driver))
        auth = await log_in(servers, spec, kubernetes)
        assert token_requests(kube) == asked
        assert auth.token.reveal().startswith("s.")
        assert (auth.ttl, auth.renewable, auth.num_uses) == (3600, True, 0)
        assert set(auth.policies) == {"default", "shop"}
        assert auth.accessor in bao.token_accessors()
        assert auth.entity_id

    async def test_entities(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """Pods of one service account are one entity to Vault, under each auth mount another."""
        sibling = kube.add_pod(NAMESPACE, "web-1", service_account=ACCOUNT)
        seen = {}
        for one, mount in ((pod, "kubernetes"), (sibling, "kubernetes"), (pod, "team/jwt")):
            spec = spec_of(bao.address, one, Login(mount, "vault", None), driver_tokens(kube, one, "vault"))
            seen[one.name, mount] = (await log_in(servers, spec, kubernetes)).entity_id
        assert seen["web-0", "kubernetes"] == seen["web-1", "kubernetes"] != seen["web-0", "team/jwt"]

    async def test_token_request_is_bound_to_the_pod(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao
    ) -> None:
        """The token that we ask for is the pod's own: where the pod is gone, there is none, and that is said."""
        gone = kube.add_pod(NAMESPACE, "web-2", service_account=ACCOUNT)
        kube.remove_pod(gone)
        with pytest.raises(KubernetesUnavailable, match=r"shop/web-2 was deleted or replaced"):
            await log_in(servers, spec_of(bao.address, gone, Login("kubernetes", "own", None), {}), kubernetes)


class TestRefusals:
    @pytest.mark.parametrize(
        ("mount", "role", "audience", "said"),
        [
            ("kubernetes", "nobody", "vault", r'Vault answered 400: .*invalid role name "nobody"'),
            ("nowhere", "vault", "vault", r"Vault answered 403: .*permission denied"),
            ("kubernetes", "other", "vault", r"Vault answered 403: invalid audience"),
            ("team/jwt", "other", "vault", r"Vault answered 400: .*audience"),
        ],
        ids=["unknown role", "unknown mount", "wrong audience", "wrong audience for jwt"],
    )
    async def test_message(
        self,
        servers: VaultServers,
        kubernetes: Kubernetes,
        kube: KubeApi,
        bao: OpenBao,
        pod: KubePod,
        mount: str,
        role: str,
        audience: str,
        said: str,
    ) -> None:
        """A denied login names address, mount, role, service account, audience, Vault's words and a remedy."""
        tokens = driver_tokens(kube, pod, audience)
        spec = spec_of(bao.address, pod, Login(mount, role, audience), tokens)
        with pytest.raises(LoginDenied, match=said) as told:
            await log_in(servers, spec, kubernetes)
        message = str(told.value)
        assert f'login to {bao.address} at auth/{mount} with role "{role}"' in message
        assert f'service account shop/web (audience "{audience}", token from the driver)' in message
        assert f"check that auth mount {mount}/ exists" in told.value.advice
        assert "bound service account, its namespace in Kubernetes and its audience" in told.value.advice
        # It is what Vault answers where its own request to the API server fails; of no other refusal.
        assert ("TokenReview" in told.value.advice) == (mount == "nowhere")
        assert tokens[audience].reveal() not in message
        assert "eyJ" not in message

    async def test_message_for_a_token_of_our_own_asking(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """Where no audience was named, the message says whose audience was sent, and which namespace was asked."""
        bao.api("POST", "sys/namespaces/blue")
        spec = spec_of(bao.address, pod, Login("kubernetes", "vault", None), {})
        spec = replace(spec, server=spec.server._replace(namespace="blue"))
        with pytest.raises(LoginDenied) as told:
            await log_in(servers, spec, kubernetes)
        message = str(told.value)
        assert "(the API server's own audience, token from TokenRequest)" in message
        assert 'Vault namespace "blue"' in message

    async def test_message_for_a_namespace_that_is_not_there(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """What Vault has nothing at is not looked for in the role."""
        spec = spec_of(bao.address, pod, Login("kubernetes", "vault", "vault"), driver_tokens(kube, pod, "vault"))
        spec = replace(spec, server=spec.server._replace(namespace="nowhere"))
        with pytest.raises(LoginDenied, match="Vault answered 404") as told:
            await log_in(servers, spec, kubernetes)
        assert 'check that auth mount kubernetes/ and Vault namespace "nowhere" exist' in told.value.advice
        assert "bound" not in told.value.advice

    async def test_message_where_the_driver_sent_another_audience(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """Where no token can be asked for, those that the driver sent are named: one of them may be what is meant."""
        kube.deny("create", "serviceaccounts/token")
        spec = spec_of(bao.address, pod, Login("kubernetes", "vault", "vault"), driver_tokens(kube, pod, "sts.example"))
        with pytest.raises(KubernetesUnavailable) as told:
            await log_in(servers, spec, kubernetes)
        assert 'for audience "vault"' in told.value.what
        assert told.value.advice.startswith('the driver sent tokens for "sts.example" alone: name one of these')

    async def test_expired_token(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """An expired token of the driver's is a denied login, in Vault's words."""
        expired = kube.issue_token(NAMESPACE, ACCOUNT, audiences=["vault"], pod=pod, ttl=-60)
        spec = spec_of(bao.address, pod, Login("team/jwt", "vault", None), {"vault": Sensitive(expired)})
        with pytest.raises(LoginDenied, match=r"expired"):
            await log_in(servers, spec, kubernetes)

    async def test_second_factor(self, servers: VaultServers, kubernetes: Kubernetes, pod: KubePod) -> None:
        """An answer without a token, as with MFA, is a denial that says so."""
        with Faulty() as faulty:
            faulty.on("auth/kubernetes/login", Answer(body={"auth": {"client_token": ""}}))
            spec = spec_of(faulty.address, pod, Login("kubernetes", "vault", None), {"vault": Sensitive("eyJ.jwt")})
            with pytest.raises(LoginDenied, match=r'role "vault".*denied: .*holds no token.*MFA'):
                await log_in(servers, spec, kubernetes)

    @pytest.mark.parametrize("opaque", ["", "opaque-token-of-another-issuer"])
    async def test_token_that_vault_quotes(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, pod: KubePod, opaque: str
    ) -> None:
        """Vault's own words may quote the token that was sent, of whatever form; ours do not."""

        def quote(arrival: Arrival) -> Answer:
            return refusal(400, f"cannot parse {json.loads(arrival.body)['jwt']}")

        sent = Sensitive(opaque) if opaque else driver_tokens(kube, pod, "vault")["vault"]
        with Faulty() as faulty:
            faulty.on("auth/kubernetes/login", quote)
            spec = spec_of(faulty.address, pod, Login("kubernetes", "vault", None), {"vault": sent})
            with pytest.raises(LoginDenied, match=r"cannot parse \*\*\*") as told:
                await log_in(servers, spec, kubernetes)
        assert sent.reveal() not in str(told.value)
        assert "eyJ" not in str(told.value)

    async def test_unreachable_vault_is_no_denial(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, pod: KubePod
    ) -> None:
        """Nobody refused anything: it is VaultUnavailable, with its own remedy."""
        address = f"http://127.0.0.1:{free_port()}"
        spec = spec_of(address, pod, Login("kubernetes", "vault", None), driver_tokens(kube, pod, "vault"))
        with pytest.raises(VaultUnavailable, match=r"unreachable"):
            await log_in(servers, spec, kubernetes)

    async def test_kubernetes_that_refuses(
        self, servers: VaultServers, kubernetes: Kubernetes, kube: KubeApi, bao: OpenBao, pod: KubePod
    ) -> None:
        """Without the right to TokenRequest and without a token of the driver's, the message names both remedies."""
        kube.deny("create", "serviceaccounts/token")
        try:
            with pytest.raises(KubernetesUnavailable) as told:
                await log_in(servers, spec_of(bao.address, pod, Login("kubernetes", "own", None), {}), kubernetes)
        finally:
            kube.allow("create", "serviceaccounts/token")
        assert "tokenRequests" in told.value.advice
        assert "shop/web" in told.value.what
