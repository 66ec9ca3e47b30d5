"""The Kubernetes API as the provider uses it: connected on first need, its failures with a remedy."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from provider.errors import KubernetesDenied, KubernetesUnavailable
from provider.kube import config
from provider.kube.api import Api
from provider.kube.failures import ApiFailure, NotConfigured
from provider.kube.pods import NodePods
from provider.redact import Sensitive, one_line
from provider.spc.model import Pod

# docs/contract.md section 4: where kubelet mounts the provider's own token, CA and namespace.
IN_CLUSTER: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# One call with all its tries. A mount has 60 s by default and wants its secrets after this.
CALL_SECONDS: Final = 10.0
# How long a pod's token lives: the least that the API server grants, and ample for one login.
TOKEN_SECONDS: Final = 600
# docs/contract.md section 4: the Secret's data key and the size of a key that we make.
HMAC_DATA_KEY: Final = "key"
HMAC_KEY_BYTES: Final = 32
# A shorter key could be guessed from versions and contents that are known.
MIN_HMAC_KEY_BYTES: Final = 16

# Names become part of a URL's path, where "../" would lead elsewhere; the API server knows no others.
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")

# Pods that have ended for good count as gone: nothing in them uses a credential any more.
_NOT_FINISHED: Final = "status.phase!=Succeeded,status.phase!=Failed"

_LIST_ADVICE: Final = "apply the manifests' pod-end component, or give --revoke=never"

_FileStamp = tuple[int, int, int] | None


@dataclass(slots=True)
class _Connection:
    api: Api
    stamp: _FileStamp
    calls: int = 0
    retired: bool = False


class Kubernetes:
    """The API server that the file ``kubeconfig`` names, or that of the cluster we run in where it is "".

    Nothing is read or connected before the first call. The provider's own token is read again when
    the API server refuses it, and everything else when the kubeconfig or the cluster's CA file changes on
    disk. The server's certificate is verified as these say; a proxy is never used.

    Every call takes at most CALL_SECONDS, and less under the caller's own timeout; it raises
    KubernetesUnavailable, or its kind KubernetesDenied where that is said, and nothing else.
    """

    def __init__(self, kubeconfig: str, *, service_account_dir: Path = IN_CLUSTER) -> None:
        self._kubeconfig = kubeconfig
        self._service_account_dir = service_account_dir
        self._watched = Path(kubeconfig).expanduser() if kubeconfig else service_account_dir / "ca.crt"
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def create_token(self, pod: Pod, audience: str | None) -> Sensitive[str]:
        """A JWT of the pod's service account for ``audience`` (None: the API server's own).

        It lives TOKEN_SECONDS and ends with the pod (docs/contract.md section 4).
        """
        asked = "the API server's own audience" if audience is None else f'audience "{audience}"'
        subject = f"token of service account {pod.namespace}/{pod.service_account} for {asked}"
        _check_names(subject, pod.namespace, pod.service_account)
        try:
            async with self._api() as api:
                token = await api.create_token(
                    pod.namespace, pod.service_account, pod.name, pod.uid, audience, TOKEN_SECONDS
                )
        except NotConfigured as error:
            advice = "add tokenRequests to the CSIDriver object, run in the cluster, or give --kubeconfig"
            raise _unavailable(subject, str(error), advice) from error
        except ApiFailure as failure:
            raise _unavailable(subject, failure.reason, _token_advice(pod, failure)) from failure
        return Sensitive(token)

    async def read_or_create_hmac_key(self, secret_name: str) -> bytes:
        """The key in the Secret ``secret_name`` of our own namespace, created where there is none.

        Of several providers that create it at once, all come to the same key (docs/contract.md section 4).
        """
        subject = f"HMAC key in Secret {secret_name}"
        _check_names(subject, secret_name)
        try:
            async with self._api() as api:
                subject = f"HMAC key in Secret {api.namespace}/{secret_name}"
                data = await _read_or_create(api, secret_name)
        except NotConfigured as error:
            advice = "give --hmac-key-file, run in the cluster, or give --kubeconfig"
            raise _unavailable(subject, str(error), advice) from error
        except ApiFailure as failure:
            raise _unavailable(subject, failure.reason, _hmac_advice(failure)) from failure
        key = _decoded(data.get(HMAC_DATA_KEY, ""))
        if key is None or len(key) < MIN_HMAC_KEY_BYTES:
            raise _unavailable(
                subject,
                f'its data "{HMAC_DATA_KEY}" is missing or has less than {MIN_HMAC_KEY_BYTES} bytes',
                "delete the Secret, so that a new one is made",
            )
        return key

    async def list_pods(self, node_name: str) -> NodePods:
        """The pods of a node that have not finished, from the API server's memory, so seconds old at times.

        Raises KubernetesDenied where the API server does not know or does not permit us, as without any
        configuration (docs/contract.md section 4: listing pods is a right that may be left out).
        """
        subject = f"pods of node {node_name}"
        _check_names(subject, node_name)
        return await self._list_pods(subject, "", f"spec.nodeName={node_name}", cached=True)

    async def pod_lives(self, namespace: str, name: str, uid: str | None) -> bool:
        """Whether this very pod exists and has not finished, not from a cache; ``uid`` None is any of this name.

        It takes no right but to list pods. Raises KubernetesDenied as ``list_pods`` does.
        """
        subject = f"pod {namespace}/{name}"
        _check_names(subject, namespace, name)
        found = await self._list_pods(subject, namespace, f"metadata.name={name}", cached=False)
        # Cut short, it proves nothing.
        return (bool(found.uids) if uid is None else uid in found.uids) or not found.complete

    async def _list_pods(self, subject: str, namespace: str, selector: str, *, cached: bool) -> NodePods:
        try:
            async with self._api() as api:
                return await api.list_pods(namespace, f"{selector},{_NOT_FINISHED}", cached=cached)
        except NotConfigured as error:
            # Without the manifests' components the provider's pod has no account: that is a choice, not a fault.
            raise _unavailable(subject, str(error), _LIST_ADVICE, KubernetesDenied) from error
        except ApiFailure as failure:
            if failure.status in (401, 403):
                raise _unavailable(subject, failure.reason, _LIST_ADVICE, KubernetesDenied) from failure
            advice = "see the API server's log" if failure.status else "check that the provider's pods reach it"
            raise _unavailable(subject, failure.reason, advice) from failure

    async def close(self) -> None:
        """Let go of the connections, of each in use with its answer."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.api.close()

    @contextlib.asynccontextmanager
    async def _api(self) -> AsyncIterator[Api]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                connection = await self._connected()
                connection.calls += 1
                try:
                    yield connection.api
                finally:
                    connection.calls -= 1
                    _close_unused(connection)
        except TimeoutError:
            raise ApiFailure(0, "", f"no answer within {CALL_SECONDS:.0f} s") from None

    async def _connected(self) -> _Connection:
        async with self._connecting:
            stamp = _stamp(self._watched)
            current = self._connection
            if current is not None and current.stamp == stamp:
                return current
            # In a thread, as the TLS context takes longer than the loop may stand still.
            found = await asyncio.to_thread(config.load, self._kubeconfig, self._service_account_dir)
            self._connection = _Connection(Api(found), stamp)
            if current is not None:
                current.retired = True
                _close_unused(current)
            return self._connection


def _close_unused(connection: _Connection) -> None:
    if connection.retired and not connection.calls:
        connection.api.close()


def _stamp(path: Path) -> _FileStamp:
    """What changes when a file is written or replaced, by a rename or by kubelet's swap of a symlink."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


async def _read_or_create(api: Api, name: str) -> Mapping[str, str]:
    try:
        return await api.read_secret(name)
    except ApiFailure as failure:
        if failure.status != 404:
            raise
    fresh = {HMAC_DATA_KEY: base64.b64encode(secrets.token_bytes(HMAC_KEY_BYTES)).decode()}
    try:
        await api.create_immutable_secret(name, fresh)
    except ApiFailure as failure:
        if failure.status != 409:
            raise
        return await api.read_secret(name)
    return fresh


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _check_names(subject: str, *names: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise _unavailable(subject, f'"{name}" is not a name of a Kubernetes object', "")


def _unavailable(
    subject: str, reason: str, advice: str, kind: type[KubernetesUnavailable] = KubernetesUnavailable
) -> KubernetesUnavailable:
    return kind(one_line(f"Kubernetes API: {subject}: {reason}", 1024), advice)


def _token_advice(pod: Pod, failure: ApiFailure) -> str:
    match failure.status, failure.kind:
        case 401, _:
            return "the API server does not accept the provider's own credentials; check its service account"
        case 403, _:
            return "add tokenRequests to the CSIDriver object, or apply the manifests' token-request component"
        case (404, "pods") | (409, _):
            return f"pod {pod} was deleted or replaced meanwhile; nothing is left to do"
        case 404, "serviceaccounts":
            return "the pod's service account was deleted; create it again"
        case 0, _:
            return (
                "check that the provider's pods reach the API server, or add tokenRequests to the CSIDriver"
                " object, so that no call is needed"
            )
    return "see the API server's log; with tokenRequests in the CSIDriver object no call is needed"


def _hmac_advice(failure: ApiFailure) -> str:
    match failure.status:
        case 401:
            return "the API server does not accept the provider's own credentials; check its service account"
        case 403:
            return "apply the manifests' hmac-secret component, or give --hmac-key-file"
        case 0:
            return "check that the provider's pods reach the API server, or give --hmac-key-file"
    return "see the API server's log, or give --hmac-key-file"
