"""The only importer of lightkube: four calls of the Kubernetes API, with its errors turned into one of ours.

Importing this module costs 6 MiB and 0.15 s, which an installation that needs no Kubernetes API never pays:
``provider.kube.kubernetes`` imports it on first need, in a thread (docs/decisions/kubernetes-client.md).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx2
from lightkube import AsyncClient, ConfigError, KubeConfig
from lightkube.config import client_adapter
from lightkube.config.kubeconfig import SingleConfig
from lightkube.models.authentication_v1 import BoundObjectReference, TokenRequestSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Secret, ServiceAccountToken

from provider.kube.failures import ApiFailure, NotConfigured
from provider.kube.pods import MAX_LIST_BYTES, METADATA_LIST, NodePods, parse
from provider.redact import one_line

_T = TypeVar("_T")

# Requests in flight at once: a node's boot asks for a hundred tokens, and a thousand nodes may boot together.
MAX_REQUESTS: Final = 8
# Tries of one call, and the pauses before the second and the third: enough for an API server that restarts
# behind its load balancer, little enough that kubelet's own retry of the mount stays the one that counts.
ATTEMPTS: Final = 3
FIRST_PAUSE_SECONDS: Final = 0.2
# The longest pause that the API server may ask for with Retry-After; where it asks for more, the mount fails
# now.
MAX_PAUSE_SECONDS: Final = 2.0
# A connection that is not there by then is tried again: behind the service's address stand several API
# servers.
CONNECT_SECONDS: Final = 3.0
# Too many requests, and what says that a server, or what stands before it, is not well at the moment.
_TRANSIENT: Final = frozenset({429, 500, 502, 503, 504})


class Api:
    """A connection pool to one API server, with one configuration; build one with ``connect``.

    Every method raises ApiFailure and nothing else, and is as safe to send twice as once: a TokenRequest
    leaves nothing behind in the API server, and of two creations of one Secret the second is refused.
    """

    def __init__(self, config: SingleConfig, call_seconds: float) -> None:
        self.address = config.cluster.server
        self.namespace = config.namespace
        timeout = httpx2.Timeout(call_seconds, connect=CONNECT_SECONDS)
        # No proxy, netrc or CA of the environment: those are set for Vault, and an operator who sets HTTPS_PROXY
        # for it may well forget to write the cluster's service addresses into NO_PROXY.
        self._client = AsyncClient(config, timeout=timeout, trust_env=False)
        # lightkube's HTTP client with the same authentication and TLS, for what its listings cannot ask for.
        connection = client_adapter.ConnectionParams(timeout=timeout, trust_env=False)
        self._http = client_adapter.AsyncClient(config, connection)
        self._slots = asyncio.Semaphore(MAX_REQUESTS)

    async def create_token(
        self,
        namespace: str,
        service_account: str,
        pod_name: str,
        pod_uid: str,
        audience: str | None,
        seconds: int,
    ) -> str:
        """A JWT of the service account, bound to the pod, for ``audience`` (None: the API server's own)."""
        wanted = ServiceAccountToken(
            metadata=ObjectMeta(),
            spec=TokenRequestSpec(
                audiences=None if audience is None else [audience],
                expirationSeconds=seconds,
                boundObjectRef=BoundObjectReference(apiVersion="v1", kind="Pod", name=pod_name, uid=pod_uid),
            ),
        )

        async def send() -> ServiceAccountToken:
            return await self._client.create(wanted, service_account, namespace=namespace)

        answer = await self._call(send)
        token = answer.status.token if answer.status else None
        if not token:
            raise ApiFailure(200, "", "the answer holds no token")
        return token

    async def read_secret(self, name: str) -> dict[str, str]:
        """The data of a Secret in our own namespace, each value in base64."""

        async def send() -> Secret:
            return await self._client.get(Secret, name, namespace=self.namespace)

        return (await self._call(send)).data or {}

    async def create_immutable_secret(self, name: str, data: dict[str, str]) -> None:
        """Create a Secret in our own namespace that nobody can change; status 409 where it exists."""
        wanted = Secret(
            metadata=ObjectMeta(name=name, namespace=self.namespace), type="Opaque", immutable=True, data=data
        )

        async def send() -> Secret:
            return await self._client.create(wanted)

        await self._call(send)

    async def list_pods(self, namespace: str, selector: str, *, cached: bool) -> NodePods:
        """The pods of a namespace ("": of all) that a field selector chooses, by their metadata alone.

        ``cached`` allows what the API server has in memory, which may be seconds old and costs its database nothing.
        """
        path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        query = {"fieldSelector": selector} | ({"resourceVersion": "0"} if cached else {})

        async def send() -> bytearray:
            async with self._http.stream("GET", path, params=query, headers={"Accept": METADATA_LIST}) as response:
                if not response.is_success:
                    await response.aread()
                    response.raise_for_status()
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_LIST_BYTES:
                        break
                return body

        body = await self._call(send)
        if len(body) > MAX_LIST_BYTES:
            raise ApiFailure(200, "", f"the list is larger than {MAX_LIST_BYTES // 2**20} MiB")
        try:
            return parse(body)
        except ValueError as error:
            raise ApiFailure(200, "", "its answer is not the Kubernetes API's list of pods") from error

    async def close(self) -> None:
        """Close the connections; calls in flight fail."""
        await self._client.close()
        await self._http.aclose()

    async def _call(self, send: Callable[[], Awaitable[_T]]) -> _T:
        attempt = 1
        while True:
            try:
                async with self._slots:
                    return await send()
            except Exception as error:
                pause = _pause(error, attempt)
                if pause is None:
                    raise _failure(error) from error
            attempt += 1
            await asyncio.sleep(pause)


def connect(kubeconfig: str, service_account_dir: Path, call_seconds: float) -> Api:
    """An Api for the file ``kubeconfig``, or for the cluster that we run in where it is "".

    Reads files and builds a TLS context, so it belongs in a thread. Raises NotConfigured.
    """
    source = kubeconfig or str(service_account_dir)
    try:
        if kubeconfig:
            config = KubeConfig.from_file(kubeconfig).get()
        elif os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("KUBERNETES_SERVICE_PORT"):
            config = KubeConfig.from_service_account(service_account_dir).get()
        else:
            raise NotConfigured("this is not a pod of a cluster (KUBERNETES_SERVICE_HOST is not set)")
        if config is None or config.user is None:
            raise NotConfigured(f"{source}: the current context names no user")
        return Api(config, call_seconds)
    except (ConfigError, OSError) as error:
        raise NotConfigured(f"{source}: {one_line(str(error))}") from error
    except NotConfigured:
        raise
    except Exception as error:  # noqa: BLE001  # lightkube's parsing asserts and indexes
        # The file may hold credentials, and a parser's message quotes what it stumbled over.
        raise NotConfigured(f"{source} cannot be used ({type(error).__name__})") from None


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the call is sent again, or None where it is not to be."""
    if attempt == ATTEMPTS:
        return None
    pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
    if isinstance(error, httpx2.HTTPStatusError):
        if error.response.status_code not in _TRANSIENT:
            return None
        asked = error.response.headers.get("Retry-After", "")
        if asked.isascii() and asked.isdigit():  # the API server writes whole seconds
            pause = max(pause, float(asked))
        return pause if pause <= MAX_PAUSE_SECONDS else None
    return pause if isinstance(error, httpx2.TransportError) else None


def _failure(error: Exception) -> ApiFailure:
    if isinstance(error, httpx2.HTTPStatusError):
        response = error.response
        reason = f"{response.status_code} {response.reason_phrase}"
        status = _status(response)
        if status is None:
            # Not the API server's own words, so whoever stands between: its page is of no use in an event.
            return ApiFailure(response.status_code, "", one_line(reason))
        details = status.get("details")
        kind = details.get("kind") if isinstance(details, dict) else None
        reason = one_line(f"{reason}: {status.get('message')}")
        return ApiFailure(response.status_code, kind if isinstance(kind, str) else "", reason)
    # A ProtocolError is not among them: it quotes what the server sent.
    if isinstance(error, httpx2.NetworkError | httpx2.TimeoutException | ConfigError):
        return ApiFailure(0, "", one_line(str(error) or type(error).__name__))
    return ApiFailure(0, "", f"its answer is not the Kubernetes API's ({type(error).__name__})")


def _status(response: httpx2.Response) -> dict[str, Any] | None:
    """The Status object that the API server explains a refusal with, or None where the answer is none."""
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) and body.get("kind") == "Status" else None
