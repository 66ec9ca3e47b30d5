"""Four calls of the Kubernetes API, with its failures turned into one of ours."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from provider.http import HttpFailure, Lookups, Origin, Pool, TlsFailed
from provider.kube.config import ApiConfig
from provider.kube.failures import AnswerTooLarge, ApiFailure
from provider.kube.pods import MAX_LIST_BYTES, METADATA_LIST, NodePods, parse
from provider.redact import one_line

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
# A Status, a token or a Secret has some KiB.
MAX_ANSWER_BYTES: Final = 1024 * 1024
# Too many requests, and what says that a server, or what stands before it, is not well at the moment.
_TRANSIENT: Final = frozenset({429, 500, 502, 503, 504})


class Api:
    """A connection pool to one API server, with one configuration; for one event loop.

    Every method raises ApiFailure and nothing else, waits for as long as its caller does, and is as safe to send twice
    as once: a TokenRequest leaves nothing behind in the API server, and of two creations of one Secret the second is
    refused.
    """

    def __init__(self, config: ApiConfig) -> None:
        self.namespace = config.namespace
        self._config = config
        self._from_file: str | None = None
        # No proxy or CA of the environment: those are set for Vault, and an operator who sets HTTPS_PROXY for it may
        # well forget to write the cluster's addresses into NO_PROXY.
        parts = urlsplit(config.server)
        tls = config.tls if parts.scheme == "https" else None
        self._base = parts.path
        self._pool = Pool(
            Origin(parts.hostname or "", parts.port or (443 if tls else 80), tls),
            lookups=Lookups(),
            limit=MAX_REQUESTS,
            connect_seconds=CONNECT_SECONDS,
        )

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
        wanted: dict[str, Any] = {
            "expirationSeconds": seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod_name, "uid": pod_uid},
        }
        if audience is not None:
            wanted["audiences"] = [audience]
        answer = await self._object(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": wanted},
        )
        status = answer.get("status")
        token = status.get("token") if isinstance(status, dict) else None
        if not isinstance(token, str) or not token:
            raise ApiFailure(200, "", "the answer holds no token")
        return token

    async def read_secret(self, name: str) -> dict[str, str]:
        """The data of a Secret in our own namespace, each value in base64."""
        data = (await self._object("GET", f"/api/v1/namespaces/{self.namespace}/secrets/{name}")).get("data")
        return {str(key): str(value) for key, value in data.items()} if isinstance(data, dict) else {}

    async def create_immutable_secret(self, name: str, data: Mapping[str, str]) -> None:
        """Create a Secret in our own namespace that nobody can change; status 409 where it exists."""
        wanted = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": self.namespace},
            "type": "Opaque",
            "immutable": True,
            "data": dict(data),
        }
        await self._object("POST", f"/api/v1/namespaces/{self.namespace}/secrets", wanted)

    async def list_pods(self, namespace: str, selector: str, *, cached: bool) -> NodePods:
        """The pods of a namespace ("": of all) that a field selector chooses, by their metadata alone.

        ``cached`` allows what the API server has in memory, which may be seconds old and costs its database nothing.
        A listing above MAX_LIST_BYTES is not complete.
        """
        path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        query = {"fieldSelector": selector} | ({"resourceVersion": "0"} if cached else {})
        try:
            return parse(await self._call("GET", path, query=query, accept=METADATA_LIST, limit=MAX_LIST_BYTES))
        except AnswerTooLarge:
            return NodePods(frozenset(), frozenset(), complete=False)
        except ValueError as error:
            raise ApiFailure(200, "", "its answer is not the Kubernetes API's list of pods") from error

    def close(self) -> None:
        """Let go of the connections, of each in use with its answer."""
        self._pool.close()

    async def _object(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer = _json(await self._call(method, path, body))
        if answer is None:
            raise ApiFailure(200, "", "its answer is not the Kubernetes API's")
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
        limit: int = MAX_ANSWER_BYTES,
    ) -> bytearray:
        """The body of an answer that is no refusal."""
        target = self._base + quote(path) + (f"?{urlencode(query)}" if query else "")
        sent = json.dumps(body).encode() if body is not None else None
        attempt = 1
        renewed = False
        while True:
            pause: float | None = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            try:
                token = await self._bearer()
                headers = {"Accept": accept} | ({"Authorization": f"Bearer {token}"} if token else {})
                response = await self._pool.request(method, target, headers, sent, limit=limit)
                response.close()
                status, answer = response.status, response.body
            except ValueError as error:  # a token that is none
                raise ApiFailure(0, "", str(error)) from error
            except HttpFailure as error:
                failure = ApiFailure(0, "", f"TLS failed: {error}" if isinstance(error, TlsFailed) else str(error))
            else:
                if 200 <= status < 300:
                    if len(answer) > limit:
                        raise AnswerTooLarge(status, "", f"the answer is larger than {limit // 2**20} MiB")
                    return answer
                if status == HTTPStatus.UNAUTHORIZED and self._from_file is not None and not renewed:
                    # docs/contract.md section 4: kubelet rotates the file.
                    renewed, self._from_file = True, None
                    continue
                failure = _refusal(status, answer)
                pause = _pause(status, response.header("Retry-After"), pause)
            if attempt == ATTEMPTS or pause is None:
                raise failure
            attempt += 1
            await asyncio.sleep(pause)

    async def _bearer(self) -> str:
        file = self._config.token_file
        if file is None:
            return self._config.token.reveal() if self._config.token else ""
        if self._from_file is None:
            try:
                self._from_file = (await asyncio.to_thread(file.read_text)).strip()
            except (OSError, UnicodeError) as error:
                said = error.strerror if isinstance(error, OSError) else "it is no text"
                raise ApiFailure(0, "", f"Token file {file} cannot be read: {said}") from None
        return self._from_file


def _pause(status: int, asked: str | None, pause: float | None) -> float | None:
    """Seconds to wait before the call is sent again, or None where it is not to be."""
    if status not in _TRANSIENT or pause is None:
        return None
    if asked is not None and asked.isascii() and asked.isdigit():  # the API server writes whole seconds
        pause = max(pause, float(asked))
    return pause if pause <= MAX_PAUSE_SECONDS else None


def _refusal(status: int, body: bytearray) -> ApiFailure:
    said = f"{status} {_phrase(status)}".strip()
    answer = _json(body)
    if answer is None or answer.get("kind") != "Status":
        # Not the API server's own words, so whoever stands between: its page is of no use in an event.
        return ApiFailure(status, "", one_line(said))
    details = answer.get("details")
    kind = details.get("kind") if isinstance(details, dict) else None
    return ApiFailure(status, kind if isinstance(kind, str) else "", one_line(f"{said}: {answer.get('message')}"))


def _json(body: bytearray) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
