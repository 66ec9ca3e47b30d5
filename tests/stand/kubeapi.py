"""A stand-in for the Kubernetes API server: HTTPS, its own authority, and only what the provider uses.

TokenReview, TokenRequest, Secrets and Pods answer as the API server does, refusals included, so that
OpenBao's kubernetes method and the provider's client are tested against real protocol over real TLS.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import datetime
import json
import re
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jwt
import yaml
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.stand.pki import Authority
from tests.stand.process import StandError, free_port

AUDIENCE = "https://kubernetes.default.svc.cluster.local"
"""The API server's own audience and the issuer of its tokens."""

MIN_TOKEN_SECONDS = 600
"""The shortest life that TokenRequest grants."""

_PORT_ATTEMPTS = 3

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class ServiceAccount:
    """A service account of the cluster."""

    namespace: str
    name: str
    uid: str

    @property
    def username(self) -> str:
        """The name that TokenReview and RBAC know it by."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"


@dataclass(frozen=True)
class Pod:
    """A pod of the cluster."""

    namespace: str
    name: str
    uid: str
    service_account: str
    node: str
    phase: str

    def metadata(self) -> JsonObject:
        """The object's `metadata`."""
        return {"name": self.name, "namespace": self.namespace, "uid": self.uid, "resourceVersion": "1"}


@dataclass(frozen=True)
class Rule:
    """A permission, as RBAC has them; None stands for all namespaces or all names."""

    verb: str
    resource: str
    namespace: str | None = None
    name: str | None = None

    def covers(self, verb: str, resource: str, namespace: str | None, name: str | None) -> bool:
        """Whether the rule permits this request."""
        return (
            (self.verb, self.resource) == (verb, resource)
            and self.namespace in (None, namespace)
            and self.name in (None, name)
        )


@dataclass(frozen=True)
class SeenRequest:
    """A request that came in; `at` is a `time.monotonic()`."""

    method: str
    path: str
    at: float


@dataclass
class _Fault:
    """What happens instead of an answer, or before it, on paths that hold `path`."""

    path: str
    status: int | None
    seconds: float
    times: int | None
    headers: dict[str, str]
    together: int = 1
    arrived: int = 0
    there: asyncio.Event = field(default_factory=asyncio.Event)

    async def happen(self) -> None:
        """Return once `together` requests have come to this, and `seconds` have passed."""
        self.arrived += 1
        if self.arrived >= self.together:
            self.there.set()
        await self.there.wait()
        await asyncio.sleep(self.seconds)


class _Refusal(Exception):
    """A Status object to answer with."""

    def __init__(self, code: int, reason: str, message: str, details: JsonObject | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body: JsonObject = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details or {},
            "code": code,
        }


class KubeApi:
    """The stand-in, used as a context manager, on a thread of its own.

    It knows two service accounts from the start: `reviewer`, which may create TokenReviews (OpenBao's), and
    `provider`, which has what the provider's RBAC gives it. Others may do nothing until `allow` says so.
    """

    hmac_secret = "vault-csi-provider-hmac-key"

    def __init__(self) -> None:
        self._authority = Authority("stand kubernetes authority")
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._key_id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._accounts: dict[tuple[str, str], ServiceAccount] = {}
        self._pods: dict[tuple[str, str], Pod] = {}
        self._secrets: dict[tuple[str, str], JsonObject] = {}
        self._rules: dict[tuple[str, str], set[Rule]] = {}
        self._faults: list[_Fault] = []
        self._port = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self.requests: list[SeenRequest] = []
        """Every request so far, refused and failed ones too."""
        self.reviewer = ("openbao", "openbao")
        self.provider = ("csi", "vault-csi-provider")
        for account in (self.reviewer, self.provider):
            self.add_service_account(*account)
        self.allow("create", "tokenreviews", account=self.reviewer)
        self.allow("create", "serviceaccounts/token")
        self.allow("get", "secrets", namespace=self.provider[0], name=self.hmac_secret)
        self.allow("create", "secrets", namespace=self.provider[0])
        self.allow("list", "pods")

    # Life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve, on the same port as before, and return when connections are accepted."""
        if self._thread is not None:
            return
        listener = self._listen()
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, started)), name="stand-kubeapi", daemon=True
        )
        self._thread.start()
        if not started.wait(10):
            raise StandError("the Kubernetes API stand-in did not start within 10 s")

    def stop(self) -> None:
        """Close the port and all connections; what is stored stays for the next `start`."""
        if self._thread is None:
            return
        assert self._loop is not None
        assert self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    # What a test sees -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """`https://127.0.0.1:PORT`."""
        return f"https://127.0.0.1:{self._port}"

    @property
    def ca_pem(self) -> bytes:
        """The certificate of the authority that signed the server's."""
        return self._authority.pem

    @property
    def issuer(self) -> str:
        """The `iss` of its tokens."""
        return AUDIENCE

    @property
    def public_key_pem(self) -> bytes:
        """The public key of its tokens."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a pod finds the API."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._port)}

    def count(self, method: str, path: str) -> int:
        """How many requests came with this method whose path holds `path`."""
        return sum(1 for seen in list(self.requests) if seen.method == method and path in seen.path)

    def write_kubeconfig(self, path: Path, account: tuple[str, str] | None = None) -> Path:
        """Write a kubeconfig for `account` (namespace, name; default the provider's), mode 0600."""
        namespace, name = account or self.provider
        cluster = {"server": self.url, "certificate-authority-data": base64.b64encode(self.ca_pem).decode()}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stand", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": self.issue_token(namespace, name)}}],
            "contexts": [{"name": "stand", "context": {"cluster": "stand", "user": name, "namespace": namespace}}],
            "current-context": "stand",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def write_in_cluster_dir(self, path: Path, account: tuple[str, str] | None = None) -> Path:
        """Write what kubelet mounts at /var/run/secrets/kubernetes.io/serviceaccount into `path`."""
        namespace, name = account or self.provider
        path.mkdir(parents=True, exist_ok=True)
        (path / "token").write_text(self.issue_token(namespace, name))
        (path / "ca.crt").write_bytes(self.ca_pem)
        (path / "namespace").write_text(namespace)
        return path

    # What a test arranges -------------------------------------------------------------------------------

    def add_service_account(self, namespace: str, name: str) -> ServiceAccount:
        """Create a service account, or find the one there is."""
        fresh = ServiceAccount(namespace, name, str(uuid.uuid4()))
        return self._accounts.setdefault((namespace, name), fresh)

    def remove_service_account(self, namespace: str, name: str) -> None:
        """Delete a service account; its tokens are worth nothing from then on."""
        self._accounts.pop((namespace, name), None)

    def add_pod(
        self,
        namespace: str,
        name: str,
        *,
        service_account: str = "default",
        uid: str | None = None,
        node: str = "node-1",
        phase: str = "Running",
    ) -> Pod:
        """Create a pod (replacing one of that name), and its service account if need be."""
        self.add_service_account(namespace, service_account)
        pod = Pod(namespace, name, uid or str(uuid.uuid4()), service_account, node, phase)
        self._pods[namespace, name] = pod
        return pod

    def remove_pod(self, pod: Pod) -> None:
        """Delete a pod; tokens bound to it are worth nothing from then on."""
        if self._pods.get((pod.namespace, pod.name)) == pod:
            del self._pods[pod.namespace, pod.name]

    def issue_token(
        self,
        namespace: str,
        service_account: str,
        *,
        audiences: Sequence[str] | None = None,
        pod: Pod | None = None,
        ttl: float = 3600,
    ) -> str:
        """A signed token of a service account; `audiences` default to the API server's own.

        `ttl` is in seconds, and a negative one makes an expired token. Bound to `pod` where one is given.
        """
        account = self._accounts[namespace, service_account]
        now = time.time()
        claims: JsonObject = {
            "namespace": namespace,
            "serviceaccount": {"name": account.name, "uid": account.uid},
        }
        if pod is not None:
            claims["pod"] = {"name": pod.name, "uid": pod.uid}
            claims["node"] = {"name": pod.node}
        return jwt.encode(
            {
                "aud": list(audiences or (AUDIENCE,)),
                "exp": int(now + ttl),
                "iat": int(now + min(ttl, 0)),
                "nbf": int(now + min(ttl, 0)),
                "iss": AUDIENCE,
                "jti": str(uuid.uuid4()),
                "kubernetes.io": claims,
                "sub": account.username,
            },
            self._key,
            algorithm="RS256",
            headers={"kid": self._key_id},
        )

    def secret(self, namespace: str, name: str) -> JsonObject | None:
        """The stored Secret, or None."""
        return self._secrets.get((namespace, name))

    def put_secret(self, namespace: str, name: str, data: dict[str, bytes], *, immutable: bool = False) -> None:
        """Store a Secret from the outside, replacing one of that name."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        body = {"metadata": {"name": name}, "data": encoded, "immutable": immutable, "type": "Opaque"}
        self._secrets[namespace, name] = _stored(namespace, name, body)

    def remove_secret(self, namespace: str, name: str) -> None:
        """Delete a Secret."""
        self._secrets.pop((namespace, name), None)

    def allow(
        self,
        verb: str,
        resource: str,
        *,
        account: tuple[str, str] | None = None,
        namespace: str | None = None,
        name: str | None = None,
    ) -> None:
        """Permit a verb on a resource (`serviceaccounts/token`) to `account`, default the provider's."""
        rules = self._rules.setdefault(account or self.provider, set())
        rules.add(Rule(verb, resource, namespace, name))

    def deny(self, verb: str, resource: str, *, account: tuple[str, str] | None = None) -> None:
        """Take every permission for a verb on a resource from `account`, default the provider's."""
        key = account or self.provider
        kept = {rule for rule in self._rules.get(key, set()) if (rule.verb, rule.resource) != (verb, resource)}
        self._rules[key] = kept

    def fail(
        self,
        status: int,
        *,
        path: str = "",
        times: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer `status` on paths that hold `path`, `times` times or until `heal`."""
        self._faults.append(_Fault(path, status, 0, times, headers or {}))

    def stall(self, seconds: float, *, path: str = "", times: int | None = None) -> None:
        """Answer `seconds` later on paths that hold `path`, `times` times or until `heal`."""
        self._faults.append(_Fault(path, None, seconds, times, {}))

    def gather(self, count: int, *, path: str = "") -> None:
        """Answer requests on paths that hold `path` once there are `count` of them, all before any later one."""
        self._faults.append(_Fault(path, None, 0, None, {}, together=count))

    def heal(self) -> None:
        """End all faults."""
        self._faults.clear()

    # Serving --------------------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        for _ in range(_PORT_ATTEMPTS if self._port == 0 else 0):
            port = free_port()
            with contextlib.suppress(OSError):  # Somebody took it in between.
                listener = socket.create_server(("127.0.0.1", port))
                self._port = port
                return listener
        return socket.create_server(("127.0.0.1", self._port))

    async def _serve(self, listener: socket.socket, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        application = web.Application(middlewares=[self._answer])
        account = "/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        application.add_routes(
            [
                web.post("/apis/authentication.k8s.io/v1/tokenreviews", self._token_review),
                web.post(account, self._token_request),
                web.get("/api/v1/namespaces/{namespace}/secrets/{name}", self._get_secret),
                web.post("/api/v1/namespaces/{namespace}/secrets", self._create_secret),
                web.get("/api/v1/namespaces/{namespace}/pods/{name}", self._get_pod),
                web.get("/api/v1/namespaces/{namespace}/pods", self._list_pods),
                web.get("/api/v1/pods", self._list_pods),
            ]
        )
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.SockSite(runner, listener, ssl_context=self._tls()).start()
            started.set()
            await self._stopping.wait()
        finally:
            # As when a server dies: without waiting for clients to agree to the end of TLS.
            for connection in runner.server.connections if runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory(prefix="stand-kube-") as directory:
            context.load_cert_chain(*self._authority.server().write(Path(directory), "server"))
        return context

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(SeenRequest(request.method, request.path_qs, time.monotonic()))
        for fault in self._due_faults(request.path_qs):
            await fault.happen()
            if fault.status is not None:
                failure = _Refusal(fault.status, "InternalError", "the stand was told to fail")
                return web.json_response(failure.body, status=fault.status, headers=fault.headers)
        try:
            return await handler(request)
        except _Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.code)
        except web.HTTPNotFound:
            missing = _Refusal(404, "NotFound", "the server could not find the requested resource")
            return web.json_response(missing.body, status=404)

    def _due_faults(self, path: str) -> list[_Fault]:
        due = []
        with self._lock:
            for fault in list(self._faults):
                if fault.path not in path:
                    continue
                due.append(fault)
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
        return due

    def _authorize(
        self, request: web.Request, verb: str, resource: str, *, group: str = "", name: str | None = None
    ) -> None:
        """Raise the API server's 401 or 403 unless the caller may do this."""
        namespace = request.match_info.get("namespace")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            if scheme != "Bearer":
                raise _Rejected("no bearer token")
            caller, _ = self._verify(token, [AUDIENCE])
        except _Rejected as error:
            raise _Refusal(401, "Unauthorized", "Unauthorized") from error
        rules = self._rules.get((caller.account.namespace, caller.account.name), set())
        if any(rule.covers(verb, resource, namespace, name) for rule in rules):
            return
        kind = resource.partition("/")[0]
        scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
        subject = f'{kind} "{name}"' if name else kind
        qualified = f"{subject}" if not group else subject.replace(kind, f"{kind}.{group}", 1)
        raise _Refusal(
            403,
            "Forbidden",
            f'{qualified} is forbidden: User "{caller.account.username}" cannot {verb} resource "{resource}" '
            f'in API group "{group}" {scope}',
            {key: value for key, value in {"name": name, "group": group, "kind": kind}.items() if value},
        )

    def _verify(self, token: str, audiences: Sequence[str]) -> tuple[_Identity, list[str]]:
        """Who a token speaks for, and which of `audiences` it is for; raises _Rejected."""
        try:
            claims = jwt.decode(
                token,
                self._key.public_key(),
                algorithms=["RS256"],
                issuer=AUDIENCE,
                options={"verify_aud": False, "require": ["exp", "iat", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _Rejected("[invalid bearer token, service account token has expired]") from error
        except jwt.InvalidTokenError as error:
            raise _Rejected("invalid bearer token") from error
        private = claims["kubernetes.io"]
        namespace, named = private["namespace"], private["serviceaccount"]
        account = self._accounts.get((namespace, named["name"]))
        if account is None or account.uid != named["uid"]:
            raise _Rejected("[invalid bearer token, service account token has been invalidated]")
        bound = private.get("pod")
        if bound is not None:
            pod = self._pods.get((namespace, bound["name"]))
            if pod is None or pod.uid != bound["uid"]:
                raise _Rejected("[invalid bearer token, pod of the token is gone]")
        meant = [audience for audience in audiences if audience in claims["aud"]]
        if not meant:
            raise _Rejected(
                f"[invalid bearer token, token audiences {json.dumps(claims['aud'])} is invalid for the "
                f"target audiences {json.dumps(list(audiences))}]"
            )
        extra = {"authentication.kubernetes.io/credential-id": [f"JTI={claims['jti']}"]}
        if bound is not None:
            extra["authentication.kubernetes.io/pod-name"] = [bound["name"]]
            extra["authentication.kubernetes.io/pod-uid"] = [bound["uid"]]
            extra["authentication.kubernetes.io/node-name"] = [private["node"]["name"]]
        return _Identity(account, extra), meant

    async def _token_review(self, request: web.Request) -> web.Response:
        self._authorize(request, "create", "tokenreviews", group="authentication.k8s.io")
        body = await request.json()
        spec = body.get("spec") or {}
        status: JsonObject
        try:
            identity, meant = self._verify(spec.get("token") or "", spec.get("audiences") or [AUDIENCE])
        except _Rejected as error:
            status = {"user": {}, "error": str(error)}
        else:
            account = identity.account
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{account.namespace}"]
            status = {
                "authenticated": True,
                "user": {
                    "username": account.username,
                    "uid": account.uid,
                    "groups": [*groups, "system:authenticated"],
                    "extra": identity.extra,
                },
                "audiences": meant,
            }
        answer = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "metadata": {}}
        return web.json_response(answer | {"spec": spec, "status": status}, status=201)

    async def _token_request(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        self._authorize(request, "create", "serviceaccounts/token", name=name)
        spec = (await request.json()).get("spec") or {}
        if (namespace, name) not in self._accounts:
            raise _not_found("serviceaccounts", name)
        seconds = spec.get("expirationSeconds") or 3600
        if seconds < MIN_TOKEN_SECONDS:
            raise _Refusal(
                422,
                "Invalid",
                f'TokenRequest.authentication.k8s.io "" is invalid: spec.expirationSeconds: Invalid value: '
                f"{seconds}: may not specify a duration less than 10 minutes",
                {"group": "authentication.k8s.io", "kind": "TokenRequest"},
            )
        pod = self._bound_pod(namespace, name, spec.get("boundObjectRef"))
        audiences = spec.get("audiences") or [AUDIENCE]
        token = self.issue_token(namespace, name, audiences=audiences, pod=pod, ttl=seconds)
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        answer = {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"audiences": audiences, "expirationSeconds": seconds},
            "status": {"token": token, "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ")},
        }
        return web.json_response(answer, status=201)

    def _bound_pod(self, namespace: str, account: str, reference: JsonObject | None) -> Pod | None:
        if reference is None:
            return None
        if reference.get("kind") != "Pod":
            raise _Refusal(400, "BadRequest", f"cannot bind token to a {reference.get('kind')}")
        name = reference.get("name", "")
        pod = self._pods.get((namespace, name))
        if pod is None:
            raise _not_found("pods", name)
        uid = reference.get("uid") or pod.uid
        if uid != pod.uid:
            raise _Refusal(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on Pod "{name}": the UID in the bound object reference '
                f"({uid}) does not match the UID in record. The object might have been deleted and then "
                f"recreated",
                {"name": name, "kind": "Pod"},
            )
        if pod.service_account != account:
            raise _Refusal(
                400,
                "BadRequest",
                f'cannot bind token for serviceaccount "{account}" to pod running with different serviceaccount name.',
            )
        return pod

    async def _get_secret(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        self._authorize(request, "get", "secrets", name=name)
        stored = self._secrets.get((namespace, name))
        if stored is None:
            raise _not_found("secrets", name)
        return web.json_response(stored)

    async def _create_secret(self, request: web.Request) -> web.Response:
        namespace = request.match_info["namespace"]
        self._authorize(request, "create", "secrets")
        body = await request.json()
        name = (body.get("metadata") or {}).get("name") or ""
        for value in (body.get("data") or {}).values():
            try:
                base64.b64decode(value, validate=True)
            except (binascii.Error, TypeError) as error:
                raise _Refusal(400, "BadRequest", "illegal base64 data in Secret") from error
        fresh = _stored(namespace, name, body)
        if self._secrets.setdefault((namespace, name), fresh) is not fresh:
            details = {"name": name, "kind": "secrets"}
            raise _Refusal(409, "AlreadyExists", f'secrets "{name}" already exists', details)
        return web.json_response(fresh, status=201)

    async def _get_pod(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        self._authorize(request, "get", "pods", name=name)
        pod = self._pods.get((namespace, name))
        if pod is None:
            raise _not_found("pods", name)
        if _wants(request, "PartialObjectMetadata"):
            return web.json_response(
                {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": pod.metadata()}
            )
        return web.json_response({"kind": "Pod", "apiVersion": "v1"} | _full(pod))

    async def _list_pods(self, request: web.Request) -> web.Response:
        self._authorize(request, "list", "pods")
        namespace = request.match_info.get("namespace")
        pods = [pod for pod in list(self._pods.values()) if namespace in (None, pod.namespace)]
        pods = sorted(
            _selected(pods, request.query.get("fieldSelector", "")), key=lambda pod: (pod.namespace, pod.name)
        )
        limit = int(request.query.get("limit") or 0)
        # The token is a position by name, so that pods which come and go between pages disturb nothing.
        if after := request.query.get("continue"):
            last = tuple(json.loads(base64.urlsafe_b64decode(after)))
            pods = [pod for pod in pods if (pod.namespace, pod.name) > last]
        metadata: JsonObject = {"resourceVersion": "1"}
        if limit and len(pods) > limit:
            metadata["remainingItemCount"] = len(pods) - limit
            pods = pods[:limit]
            position = json.dumps([pods[-1].namespace, pods[-1].name]).encode()
            metadata["continue"] = base64.urlsafe_b64encode(position).decode()
        if _wants(request, "PartialObjectMetadataList"):
            kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
            items: list[JsonObject] = [{"metadata": pod.metadata()} for pod in pods]
        else:
            kind, version = "PodList", "v1"
            items = [_full(pod) for pod in pods]
        return web.json_response({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items})


@dataclass(frozen=True)
class _Identity:
    """Who a verified token speaks for."""

    account: ServiceAccount
    extra: dict[str, list[str]] = field(default_factory=dict)


class _Rejected(Exception):
    """A token is not valid; the message says why, without the token."""


def _not_found(resource: str, name: str) -> _Refusal:
    return _Refusal(404, "NotFound", f'{resource} "{name}" not found', {"name": name, "kind": resource})


def _stored(namespace: str, name: str, body: JsonObject) -> JsonObject:
    metadata = {"name": name, "namespace": namespace, "uid": str(uuid.uuid4()), "resourceVersion": "1"}
    stored = {"kind": "Secret", "apiVersion": "v1", "type": "Opaque"} | body
    return stored | {"metadata": (body.get("metadata") or {}) | metadata}


def _full(pod: Pod) -> JsonObject:
    return {
        "metadata": pod.metadata(),
        "spec": {"nodeName": pod.node, "serviceAccountName": pod.service_account},
        "status": {"phase": pod.phase},
    }


def _wants(request: web.Request, kind: str) -> bool:
    accepted = re.sub(r"\s", "", ",".join(request.headers.getall("Accept", [])))
    for offer in accepted.split(","):
        parameters = dict(part.partition("=")[::2] for part in offer.split(";")[1:])
        if parameters.get("as") == kind and parameters.get("g") == "meta.k8s.io" and parameters.get("v") == "v1":
            return True
    return False


def _selected(pods: Iterable[Pod], selector: str) -> list[Pod]:
    fields: dict[str, Callable[[Pod], str]] = {
        "metadata.name": lambda pod: pod.name,
        "metadata.namespace": lambda pod: pod.namespace,
        "spec.nodeName": lambda pod: pod.node,
        "spec.serviceAccountName": lambda pod: pod.service_account,
        "status.phase": lambda pod: pod.phase,
    }
    kept = list(pods)
    for requirement in filter(None, selector.split(",")):
        match = re.fullmatch(r"([^=!]+)(!=|==|=)(.*)", requirement)
        if match is None or match.group(1) not in fields:
            raise _Refusal(400, "BadRequest", f"field label not supported: {requirement}")
        read, value = fields[match.group(1)], match.group(3)
        kept = [pod for pod in kept if (read(pod) == value) != (match.group(2) == "!=")]
    return kept
