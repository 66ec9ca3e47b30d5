"""Where the Kubernetes API is and who we are to it: as kubelet tells a pod, or as a kubeconfig says."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from provider.kube.failures import NotConfigured
from provider.redact import Sensitive, one_line

# A kubeconfig of many clusters has some 100 KiB; what is larger is another file.
MAX_KUBECONFIG_BYTES: Final = 4 * 1024 * 1024

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """An API server, as ``server`` (a URL without a trailing slash), and our credentials for it.

    ``namespace`` is our own. A client certificate is part of ``tls``. ``token_file`` is read again when the API server
    refuses what it held (docs/contract.md section 4: kubelet rotates it).
    """

    server: str
    namespace: str
    tls: ssl.SSLContext
    token: Sensitive[str] | None = field(default=None, repr=False)
    token_file: Path | None = None


def load(kubeconfig: str, service_account_dir: Path) -> ApiConfig:
    """The configuration in the file ``kubeconfig``, or that of the cluster we run in where it is "".

    Reads files and builds a TLS context, so it belongs in a thread. Raises NotConfigured.
    """
    source = kubeconfig or str(service_account_dir)
    try:
        return _from_kubeconfig(Path(kubeconfig).expanduser()) if kubeconfig else _in_cluster(service_account_dir)
    except NotConfigured as error:
        raise NotConfigured(f"{source}: {error}") from error
    except ssl.SSLError as error:
        raise NotConfigured(f"{source}: its certificates cannot be used ({error.reason or 'no PEM'})") from error
    except OSError as error:
        raise NotConfigured(f"{source}: {one_line(f'{error.strerror}: {error.filename or source}')}") from error
    except UnicodeError:
        raise NotConfigured(f"{source}: it is no text") from None


def _in_cluster(directory: Path) -> ApiConfig:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise NotConfigured("this is not a pod of a cluster (KUBERNETES_SERVICE_HOST is not set)")
    tls = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    namespace = (directory / "namespace").read_text().strip()
    return ApiConfig(
        f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace,
        tls,
        token_file=directory / "token",
    )


def _from_kubeconfig(path: Path) -> ApiConfig:
    with path.open("rb") as file:
        raw = file.read(MAX_KUBECONFIG_BYTES + 1)
    if len(raw) > MAX_KUBECONFIG_BYTES:
        raise NotConfigured(f"it is larger than {MAX_KUBECONFIG_BYTES // 2**20} MiB")
    try:
        whole = yaml.load(raw, _Loader)  # noqa: S506  # the safe one
    except (yaml.YAMLError, ValueError, RecursionError):
        # A parser's message quotes what it stumbled over, which may be a credential.
        raise NotConfigured("it is no YAML") from None
    context = _named(whole, "contexts", "context", _text(whole, "current-context"))
    cluster = _named(whole, "clusters", "cluster", _text(context, "cluster"))
    user = _named(whole, "users", "user", _text(context, "user"))
    server = _text(cluster, "server").rstrip("/")
    if not server.startswith("https://"):
        raise NotConfigured("its cluster's server is no https:// URL")
    if "exec" in user or "auth-provider" in user:
        raise NotConfigured("its user has exec or auth-provider; give it a token or a client certificate")
    token_file = user.get("tokenFile")
    return ApiConfig(
        server,
        str(context.get("namespace") or "default"),
        _tls(cluster, user, path.parent),
        token=Sensitive(str(user["token"])) if user.get("token") else None,
        token_file=path.parent / str(token_file) if token_file else None,
    )


def _tls(cluster: Mapping[str, Any], user: Mapping[str, Any], directory: Path) -> ssl.SSLContext:
    ca = _pem(cluster, "certificate-authority", directory)
    tls = ssl.create_default_context(cadata=ca.decode() if ca else None)
    if not ca and cluster.get("insecure-skip-tls-verify") is True:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    certificate, key = _pem(user, "client-certificate", directory), _pem(user, "client-key", directory)
    if certificate and key:
        # OpenSSL's Python interface takes a key from a file alone; this one is in memory and has no name.
        with _in_memory(certificate + b"\n" + key) as name:
            tls.load_cert_chain(name)
    return tls


@contextlib.contextmanager
def _in_memory(contents: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("kubeconfig", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, contents)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _pem(holder: Mapping[str, Any], name: str, directory: Path) -> bytes:
    """What ``<name>-data`` holds, or the file that ``<name>`` says, beside the kubeconfig; b"" for neither."""
    data, file = holder.get(f"{name}-data"), holder.get(name)
    if data:
        try:
            return base64.b64decode(str(data), validate=True)
        except (binascii.Error, ValueError):
            raise NotConfigured(f"its {name}-data is no base64") from None
    return (directory / str(file)).read_bytes() if file else b""


def _named(whole: object, section: str, kind: str, name: str) -> Mapping[str, Any]:
    """The entry ``name`` of a section, as kubeconfigs write them: a list of ``{name, <kind>}``."""
    entries = whole.get(section) if isinstance(whole, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
            found: Mapping[str, Any] = entry[kind]
            return found
    raise NotConfigured(f"its current context leads to no {kind}")


def _text(holder: object, name: str) -> str:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(value, str) or not value:
        raise NotConfigured(f"it has no {name}")
    return value
