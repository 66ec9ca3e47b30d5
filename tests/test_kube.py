"""Tokens for pods and the HMAC key, from an API server over TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import jwt
import pytest

import provider.kube.hmac_key
import provider.kube.kubernetes
from provider.errors import KubernetesUnavailable
from provider.kube import HmacKey, Kubernetes
from provider.kube.api import ATTEMPTS, MAX_REQUESTS
from provider.settings import Settings
from provider.spc.model import Pod
from tests.stand import kubeapi
from tests.stand.kubeapi import KubeApi
from tests.stand.pki import Authority

TOKEN_PATH = "/token"
SECRET_PATH = "/secrets"


class HandClock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def epoch(self) -> str:
        return "test"

    def wall(self) -> float:
        return self.time


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as server:
        yield server


@pytest.fixture
def config(api: KubeApi, tmp_path: Path) -> Path:
    return api.write_kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
async def kubernetes(config: Path) -> AsyncIterator[Kubernetes]:
    client = Kubernetes(str(config))
    yield client
    await client.close()


@pytest.fixture
def pod(api: KubeApi) -> Pod:
    return as_ours(api.add_pod("ecommerce", "shop-1", service_account="ecommerce-service-account"))


def as_ours(pod: kubeapi.Pod) -> Pod:
    """The stand's pod as the driver would name it."""
    return Pod(pod.namespace, pod.name, pod.uid, pod.service_account)


async def failure(call: Awaitable[object], *unsaid: str) -> KubernetesUnavailable:
    """The error that ``call`` raises; neither it nor its traceback says any of ``unsaid``, nor any JWT."""
    with pytest.raises(KubernetesUnavailable) as caught:
        await call
    shown = repr(caught.value) + "".join(traceback.format_exception(caught.value))
    for text in ("eyJ", *unsaid):
        assert text not in shown
    assert "\n" not in str(caught.value)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def foreign_server(path: Path, answer: bytes, accept: Callable[[], object] = lambda: None) -> AsyncIterator[Path]:
    """A TLS server that is no API server: each connection gets ``answer`` and is closed. Gives a kubeconfig."""
    authority = Authority()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server().write(path, "foreign"))

    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        accept()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=1)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield write_config(path / "foreign.kubeconfig", f"https://127.0.0.1:{port}", authority.pem)
    # Else a transport that is still closing outlives the loop.
    await asyncio.gather(*filter(None, served), return_exceptions=True)


def write_config(path: Path, server: str, ca_pem: bytes, user: str = "token: none") -> Path:
    """Write a kubeconfig by hand."""
    path.write_text(
        f"""
current-context: a
clusters: [{{name: a, cluster: {{server: "{server}",
            certificate-authority-data: "{base64.b64encode(ca_pem).decode()}"}}}}]
users: [{{name: a, user: {{{user}}}}}]
contexts: [{{name: a, context: {{cluster: a, user: a}}}}]
"""
    )
    return path


# Tokens ---------------------------------------------------------------------------------------------------


async def test_a_token_is_bound_to_its_pod(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """One TokenRequest gives a token of the service account, for the audience, the pod and ten minutes."""
    token = await kubernetes.create_token(pod, "vault")
    claims = jwt.decode(token.reveal(), options={"verify_signature": False})
    assert claims["aud"] == ["vault"]
    assert claims["sub"] == "system:serviceaccount:ecommerce:ecommerce-service-account"
    assert claims["kubernetes.io"]["pod"] == {"name": pod.name, "uid": pod.uid}
    assert claims["exp"] - claims["iat"] == 600
    assert [(seen.method, seen.path) for seen in api.requests] == [
        ("POST", "/api/v1/namespaces/ecommerce/serviceaccounts/ecommerce-service-account/token")
    ]
    assert token.reveal() not in repr(token)


async def test_without_an_audience_the_servers_own_is_asked_for(kubernetes: Kubernetes, pod: Pod) -> None:
    """No audience in the class: the token is for the API server's own, which a role without one accepts."""
    token = await kubernetes.create_token(pod, None)
    assert jwt.decode(token.reveal(), options={"verify_signature": False})["aud"] == [kubeapi.AUDIENCE]


async def test_tokens_are_asked_for_a_few_at_a_time(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """A node's boot does not open a hundred connections to the API server."""
    api.stall(60, path=TOKEN_PATH)
    calls = [asyncio.create_task(kubernetes.create_token(pod, "vault")) for _ in range(3 * MAX_REQUESTS)]
    await until(lambda: api.count("POST", TOKEN_PATH) == MAX_REQUESTS)
    await asyncio.sleep(0.2)
    assert api.count("POST", TOKEN_PATH) == MAX_REQUESTS
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    api.heal()
    assert await kubernetes.create_token(pod, "vault")


async def test_without_the_permission_the_remedy_is_named(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """RBAC's refusal is told in its own words, with the two ways out, after one request."""
    api.deny("create", "serviceaccounts/token")
    error = await failure(kubernetes.create_token(pod, "vault"))
    assert error.code.value == "FAILED_PRECONDITION"
    assert 'ecommerce/ecommerce-service-account for audience "vault"' in error.what
    assert '403 Forbidden: serviceaccounts "ecommerce-service-account" is forbidden' in error.what
    assert "tokenRequests" in error.advice
    assert "token-request component" in error.advice
    assert api.count("POST", TOKEN_PATH) == 1


async def test_a_pod_that_is_gone_gets_no_token(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """Neither a pod that was deleted nor one that another of its name replaced; the error says so."""
    api.add_pod(pod.namespace, pod.name, service_account=pod.service_account)
    replaced = await failure(kubernetes.create_token(pod, "vault"))
    assert "409 Conflict" in replaced.what
    assert "deleted or replaced" in replaced.advice
    gone = Pod(pod.namespace, "shop-2", pod.uid, pod.service_account)
    missing = await failure(kubernetes.create_token(gone, "vault"))
    assert "404 Not Found" in missing.what
    assert "ecommerce/shop-2 was deleted" in missing.advice


async def test_a_service_account_that_is_gone_is_named(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """A deleted service account is another fault than a deleted pod."""
    api.remove_service_account(pod.namespace, pod.service_account)
    assert "create it again" in (await failure(kubernetes.create_token(pod, "vault"))).advice


@pytest.mark.parametrize("name", ["../default", "a/b", "a%2fb", "", "A", "a?b", ".", "a\n", "a" * 254])
@pytest.mark.parametrize("field", ["namespace", "service_account"])
async def test_a_name_cannot_lead_to_another_path(
    kubernetes: Kubernetes, api: KubeApi, pod: Pod, field: str, name: str
) -> None:
    """What is no name of an object never becomes part of a URL."""
    values = {"namespace": pod.namespace, "service_account": pod.service_account, field: name}
    other = Pod(name=pod.name, uid=pod.uid, **values)
    await failure(kubernetes.create_token(other, "vault"))
    assert api.requests == []


# Where the API server is, and who we are to it --------------------------------------------------------------


async def test_nothing_happens_before_the_first_call(tmp_path: Path) -> None:
    """A daemon that never needs the API is not bothered by a configuration that is not there."""
    client = Kubernetes(str(tmp_path / "missing"))
    await client.close()


@pytest.fixture
def account_dir(api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a pod of the provider finds in its file system and environment."""
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)
    return api.write_in_cluster_dir(tmp_path / "serviceaccount")


async def test_in_a_cluster_no_configuration_is_needed(api: KubeApi, account_dir: Path, pod: Pod) -> None:
    """Kubelet's environment and files are enough."""
    client = Kubernetes("", service_account_dir=account_dir)
    assert await client.create_token(pod, "vault")
    await client.read_or_create_hmac_key(api.hmac_secret)
    assert api.secret("csi", api.hmac_secret) is not None
    await client.close()


async def test_the_rotated_token_is_read_again(api: KubeApi, account_dir: Path, pod: Pod) -> None:
    """When the API server refuses the token, kubelet's newer one is used, once and from then on."""
    client = Kubernetes("", service_account_dir=account_dir)
    await client.create_token(pod, "vault")
    api.remove_service_account(*api.provider)
    api.add_service_account(*api.provider)
    refused = await failure(client.create_token(pod, "vault"))
    assert "401 Unauthorized" in refused.what
    assert "does not accept the provider's own credentials" in refused.advice

    (account_dir / "token").write_text(api.issue_token(*api.provider))
    before = api.count("POST", TOKEN_PATH)
    await client.create_token(pod, "vault")
    assert api.count("POST", TOKEN_PATH) == before + 2
    await client.create_token(pod, "vault")
    assert api.count("POST", TOKEN_PATH) == before + 3
    await client.close()


async def test_a_token_file_that_vanished_is_an_error(api: KubeApi, account_dir: Path, pod: Pod) -> None:
    """The token is refused and there is none to read: told, not crashed."""
    client = Kubernetes("", service_account_dir=account_dir)
    await client.create_token(pod, "vault")
    api.remove_service_account(*api.provider)
    (account_dir / "token").unlink()
    assert "Token file" in (await failure(client.create_token(pod, "vault"))).what
    await client.close()


async def test_the_servers_certificate_is_verified(api: KubeApi, account_dir: Path, pod: Pod) -> None:
    """A server of another authority gets no request; the right authority's file is picked up when it is there."""
    (account_dir / "ca.crt").write_bytes(Authority().pem)
    client = Kubernetes("", service_account_dir=account_dir)
    error = await failure(client.create_token(pod, "vault"))
    assert "TLS failed: unable to get local issuer certificate" in error.what
    assert api.requests == []
    fresh = account_dir / "ca.new"
    fresh.write_bytes(api.ca_pem)
    fresh.rename(account_dir / "ca.crt")
    assert await client.create_token(pod, "vault")
    await client.close()


async def test_a_new_configuration_cuts_no_call(api: KubeApi, config: Path, pod: Pod) -> None:
    """A kubeconfig that changes is read for the next call, while a call under way ends as it began."""
    client = Kubernetes(str(config))
    api.stall(0.5, path=TOKEN_PATH, times=1)
    slow = asyncio.create_task(client.create_token(pod, "vault"))
    await until(lambda: api.count("POST", TOKEN_PATH) == 1)
    other = ("csi", "other")
    api.add_service_account(*other)
    api.write_kubeconfig(config, other)
    assert "serviceaccount:csi:other" in (await failure(client.create_token(pod, "vault"))).what
    assert await slow
    await client.close()


async def test_a_proxy_of_the_environment_is_not_used(
    kubernetes: Kubernetes, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY is for Vault: the API server is reached without it."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await kubernetes.create_token(pod, "vault")


async def test_outside_of_a_cluster_the_flag_is_named(
    tmp_path: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a cluster nor a kubeconfig: the error says so, and what each kind of call could do without."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    client = Kubernetes("", service_account_dir=tmp_path)
    token = await failure(client.create_token(pod, "vault"))
    assert "not a pod of a cluster" in token.what
    assert "--kubeconfig" in token.advice
    key = await failure(client.read_or_create_hmac_key("name"))
    assert "--hmac-key-file" in key.advice


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "- c4nary",
        "a: [c4nary",
        "{current-context: c4nary, clusters: [], contexts: []}",
        "{current-context: a, clusters: [{name: a, cluster: {server: 1}}], contexts: []}",
        "{current-context: a, clusters: [{name: a, cluster: {}}], contexts: [{name: a, context: {cluster: a}}]}",
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, pod: Pod, text: str | None) -> None:
    """Missing, empty, no YAML, no kubeconfig: an error that names the file."""
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    error = await failure(Kubernetes(str(path)).create_token(pod, "vault"))
    assert str(path) in error.what


async def test_a_kubeconfig_is_not_quoted(tmp_path: Path, pod: Pod) -> None:
    """A parser's message quotes the line that it fails on, which may be the token's."""
    path = tmp_path / "kubeconfig"
    path.write_text('users: [{name: a, user: {token: "c4nary}}]\n')
    await failure(Kubernetes(str(path)).create_token(pod, "vault"), "c4nary")


# When it does not answer ------------------------------------------------------------------------------------


async def test_an_api_server_that_is_down_is_an_error_until_it_is_up(
    kubernetes: Kubernetes, api: KubeApi, pod: Pod
) -> None:
    """No connection: an error with a remedy; afterwards the same client works."""
    api.stop()
    error = await failure(kubernetes.create_token(pod, "vault"))
    assert "reach the API server" in error.advice
    api.start()
    assert await kubernetes.create_token(pod, "vault")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_passing_fault_is_waited_out(kubernetes: Kubernetes, api: KubeApi, pod: Pod, status: int) -> None:
    """Throttling and a server that is not well are tried again, a few times only."""
    api.fail(status, path=TOKEN_PATH, times=ATTEMPTS - 1)
    assert await kubernetes.create_token(pod, "vault")
    assert api.count("POST", TOKEN_PATH) == ATTEMPTS
    api.fail(status, path=TOKEN_PATH)
    error = await failure(kubernetes.create_token(pod, "vault"))
    assert str(status) in error.what
    assert "tokenRequests" in error.advice
    assert api.count("POST", TOKEN_PATH) == 2 * ATTEMPTS


@pytest.mark.parametrize(("seconds", "requests"), [("1", 2), ("60", 1), ("soon", 2)])
async def test_retry_after_is_honoured(
    kubernetes: Kubernetes, api: KubeApi, pod: Pod, seconds: str, requests: int
) -> None:
    """A short pause that the server asks for is kept; for a long one the mount does not wait."""
    api.fail(429, path=TOKEN_PATH, times=1, headers={"Retry-After": seconds})
    if requests == 1:
        assert "429" in (await failure(kubernetes.create_token(pod, "vault"))).what
    else:
        await kubernetes.create_token(pod, "vault")
    assert api.count("POST", TOKEN_PATH) == requests
    if seconds == "1":
        first, second = (seen.at for seen in api.requests)
        assert second - first >= 1


async def test_a_fault_of_the_request_is_not_repeated(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """What the server says no to stays no."""
    api.fail(400, path=TOKEN_PATH)
    await failure(kubernetes.create_token(pod, "vault"))
    assert api.count("POST", TOKEN_PATH) == 1


async def test_the_wait_for_an_answer_ends(
    kubernetes: Kubernetes, api: KubeApi, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API server that is silent is an error after CALL_SECONDS, not a mount that hangs."""
    api.stall(60, path=TOKEN_PATH)
    monkeypatch.setattr(provider.kube.kubernetes, "CALL_SECONDS", 0.3)
    assert "no answer within" in (await failure(kubernetes.create_token(pod, "vault"))).what


async def test_the_callers_time_limit_counts(kubernetes: Kubernetes, api: KubeApi, pod: Pod) -> None:
    """A caller with less time gets its own TimeoutError, and the client goes on working."""
    await kubernetes.create_token(pod, "vault")
    api.stall(60, path=TOKEN_PATH, times=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await kubernetes.create_token(pod, "vault")
    assert await kubernetes.create_token(pod, "vault")


PAGE = b"<html>c4nary</html>"


def response(status: str, body: bytes = PAGE, kind: str = "Content-Type: text/html\r\n") -> bytes:
    """An HTTP/1.1 answer."""
    head = f"HTTP/1.1 {status}\r\n{kind}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


JSON = "Content-Type: application/json\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        response("200 OK"),
        response("403 Forbidden"),
        response("403 Forbidden", kind=""),
        response("403 Forbidden", b'"c4nary"', JSON),
        response("403 Forbidden", b'{"kind":"Status"}', JSON),
        response("403 Forbidden", b'{"kind":"Status","details":{"kind":7}}', JSON),
        response("301 Moved", kind="Location: https://127.0.0.1:1/c4nary\r\n"),
        response("200 OK", b"{}", JSON),
        response("201 Created", b'{"status":{}}', JSON),
        response("201 Created", b'{"status":{"token":7}}', JSON),
        response("200 OK", b"[]", JSON),
        b"SSH-2.0-c4nary\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_the_apis_is_an_error(tmp_path: Path, pod: Pod, answer: bytes) -> None:
    """Whatever stands at the address, the error is ours and does not repeat its page."""
    async with foreign_server(tmp_path, answer) as config:
        client = Kubernetes(str(config))
        assert "c4nary" not in str(await failure(client.create_token(pod, "vault")))
        await client.close()


async def test_a_dropped_connection_is_tried_again(tmp_path: Path, pod: Pod) -> None:
    """A load balancer that closes connections costs a second try, and no more than ATTEMPTS."""
    accepted: list[None] = []
    async with foreign_server(tmp_path, b"", lambda: accepted.append(None)) as config:
        client = Kubernetes(str(config))
        await failure(client.create_token(pod, "vault"))
        assert len(accepted) == ATTEMPTS
        await client.close()


# The HMAC key's Secret --------------------------------------------------------------------------------------


async def test_the_key_is_created_once_and_read_by_others(kubernetes: Kubernetes, api: KubeApi, config: Path) -> None:
    """The first provider makes 32 random bytes that nobody can change; the next one reads them."""
    key = await kubernetes.read_or_create_hmac_key(api.hmac_secret)
    assert len(key) == 32
    stored = api.secret("csi", api.hmac_secret)
    assert stored is not None
    assert stored["immutable"] is True
    assert base64.b64decode(stored["data"]["key"]) == key
    assert (api.count("GET", SECRET_PATH), api.count("POST", SECRET_PATH)) == (1, 1)

    other = Kubernetes(str(config))
    assert await other.read_or_create_hmac_key(api.hmac_secret) == key
    assert (api.count("GET", SECRET_PATH), api.count("POST", SECRET_PATH)) == (2, 1)
    await other.close()
    api.remove_secret("csi", api.hmac_secret)
    assert await kubernetes.read_or_create_hmac_key(api.hmac_secret) != key


async def test_losers_of_the_race_read_the_winners_key(api: KubeApi, config: Path) -> None:
    """Providers of several nodes that create it at once all come to one key."""
    clients = [Kubernetes(str(config)) for _ in range(5)]
    api.gather(len(clients), path=f"{SECRET_PATH}/")
    async with contextlib.AsyncExitStack() as stack:
        for client in clients:
            stack.push_async_callback(client.close)
        keys = await asyncio.gather(*(client.read_or_create_hmac_key(api.hmac_secret) for client in clients))
    assert len(set(keys)) == 1
    assert api.count("POST", SECRET_PATH) == len(clients)
    # Each read finds nothing, and each loser reads again.
    assert api.count("GET", SECRET_PATH) == 2 * len(clients) - 1


async def test_a_key_of_another_provider_is_taken_over(kubernetes: Kubernetes, api: KubeApi) -> None:
    """A Secret that is there already is used as it is."""
    api.put_secret("csi", api.hmac_secret, {"key": b"sixteen bytes ok"})
    assert await kubernetes.read_or_create_hmac_key(api.hmac_secret) == b"sixteen bytes ok"
    assert api.count("POST", SECRET_PATH) == 0


@pytest.mark.parametrize("data", [{}, {"key": b"c4nary"}, {"other": b"c4nary" * 9}])
async def test_a_secret_without_a_proper_key_is_refused(
    kubernetes: Kubernetes, api: KubeApi, data: dict[str, bytes]
) -> None:
    """Missing or too short: an error that says what to do, and shows nothing of it."""
    api.put_secret("csi", api.hmac_secret, data)
    encoded = [base64.b64encode(value).decode() for value in data.values()]
    error = await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret), "c4nary", *encoded)
    assert f"csi/{api.hmac_secret}" in error.what
    assert "delete the Secret" in error.advice


async def test_a_secret_that_is_not_base64_is_refused(kubernetes: Kubernetes, api: KubeApi) -> None:
    """What no API server would send is an error, not a crash."""
    api.put_secret("csi", api.hmac_secret, {"key": b"x" * 32})
    stored = api.secret("csi", api.hmac_secret)
    assert stored is not None
    stored["data"]["key"] = "%c4nary%"
    await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret), "c4nary")


@pytest.mark.parametrize("verb", ["get", "create"])
async def test_without_permission_for_the_secret_the_remedy_is_named(
    kubernetes: Kubernetes, api: KubeApi, verb: str
) -> None:
    """Both permissions are needed where there is no Secret yet; the ways out are named."""
    api.deny(verb, "secrets")
    error = await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret))
    assert "403 Forbidden" in error.what
    assert "hmac-secret component" in error.advice
    assert "--hmac-key-file" in error.advice


async def test_a_failing_api_server_is_not_asked_to_create(kubernetes: Kubernetes, api: KubeApi) -> None:
    """Only where there is no Secret is one created."""
    api.fail(500, path=SECRET_PATH)
    assert "--hmac-key-file" in (await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret))).advice
    api.heal()
    api.remove_service_account(*api.provider)
    refused = await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret))
    assert "own credentials" in refused.advice
    api.stop()
    unreachable = await failure(kubernetes.read_or_create_hmac_key(api.hmac_secret))
    assert "reach the API server" in unreachable.advice
    assert api.count("POST", SECRET_PATH) == 0


# The key, asked for sparingly
# ---------------------------------------------------------------------------------


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def key(kubernetes: Kubernetes, clock: HandClock) -> AsyncIterator[HmacKey]:
    hmac_key = HmacKey(Settings(), kubernetes, clock)
    yield hmac_key
    await hmac_key.close()


async def test_the_key_is_asked_for_once_a_minute_then_kept(
    key: HmacKey, api: KubeApi, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is not to be had: one request and one warning a minute, however many mounts; then never again."""
    api.deny("get", "secrets")
    assert [await key.get() for _ in range(10)] == [None] * 10
    clock.time += 59.9
    assert await key.get() is None
    assert api.count("GET", SECRET_PATH) == 1
    clock.time += 0.1
    assert await key.get() is None
    assert api.count("GET", SECRET_PATH) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "hmac-secret component" in warnings[0]

    api.allow("get", "secrets", namespace="csi")
    assert await key.get() is None
    clock.time += 60
    found = await key.get()
    assert found is not None
    api.remove_secret("csi", api.hmac_secret)
    clock.time += 3600
    assert await key.get() == found
    assert api.count("GET", SECRET_PATH) == 3


async def test_mounts_at_once_share_one_request(key: HmacKey, api: KubeApi) -> None:
    """A node's boot asks once."""
    api.stall(0.2, path=SECRET_PATH)
    keys = await asyncio.gather(*(key.get() for _ in range(20)))
    assert None not in keys
    assert len(set(keys)) == 1
    assert (api.count("GET", SECRET_PATH), api.count("POST", SECRET_PATH)) == (1, 1)


async def test_a_caller_who_leaves_takes_the_request_from_nobody(key: HmacKey, api: KubeApi) -> None:
    """The mount that asked first is cancelled; the one that waits beside it has the key all the same."""
    api.stall(0.3, path=SECRET_PATH, times=1)
    first = asyncio.create_task(key.get())
    await until(lambda: api.count("GET", SECRET_PATH) == 1)
    second = asyncio.create_task(key.get())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second is not None
    assert api.count("GET", SECRET_PATH) == 1


async def test_a_mount_does_not_wait_for_a_slow_answer(
    key: HmacKey, api: KubeApi, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions stay empty where the key is slow to come; the request goes on for those who mount later."""
    monkeypatch.setattr(provider.kube.hmac_key, "MAX_WAIT_SECONDS", 0.1)
    api.stall(1.0, path=SECRET_PATH, times=1)
    assert await key.get() is None
    # Past the wait, counted from the request's start, nobody waits at all.
    clock.time += 1
    assert await key.get() is None
    monkeypatch.setattr(provider.kube.hmac_key, "MAX_WAIT_SECONDS", 30.0)
    assert await key.get() is not None
    assert api.count("GET", SECRET_PATH) == 1


async def test_closing_ends_the_request(kubernetes: Kubernetes, api: KubeApi, clock: HandClock) -> None:
    """A daemon that stops does not wait for the API server."""
    key = HmacKey(Settings(), kubernetes, clock)
    await key.close()
    api.stall(60, path=SECRET_PATH)
    waiting = asyncio.create_task(key.get())
    await until(lambda: api.count("GET", SECRET_PATH) == 1)
    await key.close()
    assert await waiting is None


# The key's file
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"0123456789abcdef", b"0123456789abcdef"),
        (b"0123456789abcdef\n", b"0123456789abcdef"),
        (b"0123456789abcdef\n\n", b"0123456789abcdef\n"),
        (b"\x00" * 31 + b"\xff", b"\x00" * 31 + b"\xff"),
        (b"x" * 4096 + b"\n", b"x" * 4096),
    ],
)
async def test_a_files_bytes_are_the_key(
    api: KubeApi, kubernetes: Kubernetes, clock: HandClock, tmp_path: Path, content: bytes, expected: bytes
) -> None:
    """As they are, less one newline that an editor leaves; the Kubernetes API is not asked."""
    path = tmp_path / "key"
    path.write_bytes(content)
    assert await HmacKey(Settings(hmac_key_file=str(path)), kubernetes, clock).get() == expected
    assert api.requests == []


@pytest.mark.parametrize("content", [None, b"", b"c4nary\n", b"c4nary" * 2 + b"abc\n", b"c4nary" * 1000])
async def test_a_file_that_is_no_key_is_warned_about(
    api: KubeApi,
    kubernetes: Kubernetes,
    clock: HandClock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    """Missing, too short, too long: no key, no other key instead, and a warning that names file and flag only."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    key = HmacKey(Settings(hmac_key_file=str(path)), kubernetes, clock)
    assert await key.get() is None
    assert await key.get() is None
    assert api.requests == []
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"--hmac-key-file {path}" in warning
    assert "c4nary" not in warning
    path.write_bytes(b"k" * 32)
    clock.time += 60
    assert await key.get() == b"k" * 32
