"""What is measured: the daemon as a process, with real OpenBao and PostgreSQL a network away.

The daemon runs as daemonset/ runs it: version key from a Secret, sessions sealed in a directory, pods swept.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.bench.load import Lane, Load, mount_request
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.latency import LatencyProxy
from tests.stand.openbao import OpenBao
from tests.stand.postgres import Postgres
from tests.stand.process import Process, StandError, free_port

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "shop"
NODE = "node-1"
AUDIENCE = "vault"
TICKS = os.sysconf("SC_CLK_TCK")
LOGIN_PATH = "auth/kubernetes/login"
ENGINE_PATH = "sys/internal/ui/mounts/"
MEMORY = Path("/dev/shm")
"""Where a node's /run is: in memory."""
SOCKET = "vault.sock"
COMPILING_SECONDS = 3.0
"""In which a daemon that listens has imported the rest, slowly, as there is no bytecode of it yet."""

DEFAULT = "default-policy"
"""The role whose tokens have OpenBao's default policy."""
POLICY = """
path "bench/data/*" { capabilities = ["read"] }
path "database/creds/ROLE" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
path "sys/leases/renew" { capabilities = ["update"] }
"""
"""What a role's tokens may: its secrets, and what the provider asks of a token besides."""

_GRANT = 'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{{name}}";'


class BenchStand:
    """OpenBao behind a LatencyProxy, PostgreSQL, the Kubernetes API and the load; a context manager.

    Pods are of namespace `shop`, role `app` lets each of its service accounts read all that is below `bench/` and
    the credential `database/creds/app`; tokens and leases live an hour. Its tokens do without the default policy, as
    docs/scale.md advises; those of role DEFAULT have it besides.
    """

    def __init__(self) -> None:
        self.kube = KubeApi()
        self.bao = OpenBao()
        self.postgres = Postgres()
        self.load = Load()
        self._secrets: dict[str, str] = {}
        self._pods = 0
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            base = MEMORY if os.access(MEMORY, os.W_OK) else None
            self.directory = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=base)))
            for part in (self.postgres, self.kube, self.bao, self.load):
                parts.enter_context(part)
            self.proxy = parts.enter_context(LatencyProxy(self.bao.address))
            self.kubeconfig = self.kube.write_kubeconfig(self.directory / "kubeconfig")
            self.bao.mount_kv("bench")
            self.bao.enable_database(self.postgres)
            self.bao.enable_kubernetes_auth("kubernetes", self.kube)
            self.role("app", "1h", "24h")
            self.role(DEFAULT, "1h", "24h", default_policy=True)
            # The first daemon compiles what it imports, soon after it listens the last of it too.
            with self.daemon():
                time.sleep(COMPILING_SECONDS)
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def role(self, name: str, ttl: str, max_ttl: str, *, default_policy: bool = False) -> None:
        """An auth role and a database role whose tokens and leases live for `ttl`."""
        self.bao.database_role(name, ttl, max_ttl, _GRANT)
        self.bao.write_policy(name, POLICY.replace("ROLE", name))
        self.bao.role(
            "kubernetes",
            name,
            bound_service_account_names=["*"],
            bound_service_account_namespaces=[NAMESPACE],
            audience=AUDIENCE,
            token_policies=[name],
            token_no_default_policy=not default_policy,
            token_ttl=ttl,
            token_max_ttl=max_ttl,
        )

    def pod(self, service_account: str = "") -> Pod:
        """A new pod of the node; with a service account of its own, unless one is named."""
        self._pods += 1
        name = f"app-{self._pods}"
        return self.kube.add_pod(NAMESPACE, name, service_account=service_account or name, node=NODE)

    def token(self, pod: Pod) -> str:
        """A token of the pod for Vault's audience."""
        return self.kube.issue_token(pod.namespace, pod.service_account, audiences=[AUDIENCE], pod=pod)

    def secret(self, path: str, size: int = 32) -> str:
        """The value of key `value` at `bench/data/<path>`, `size` letters long; written where it is not there yet."""
        if path not in self._secrets:
            self._secrets[path] = secrets.token_hex((size + 1) // 2)[:size]
            self.bao.write_kv(f"bench/data/{path}", {"value": self._secrets[path]})
        return self._secrets[path]

    def static(self, pod: Pod, paths: Sequence[str], **parameters: str) -> Lane:
        """The lane of a volume with one object for each of `paths`, see `secret`."""
        files = {f"object-{number}": self.secret(path).encode() for number, path in enumerate(paths)}
        objects = [
            {"objectName": name, "secretPath": f"bench/data/{path}", "secretKey": "value"}
            for name, path in zip(files, paths, strict=True)
        ]
        return Lane(self.request(pod, "app", objects, parameters), files)

    def dynamic(self, pod: Pod, role: str = "app", **fields: str) -> Lane:
        """The lane of a volume with both halves of a database credential; `fields` are for both objects."""
        path = f"database/creds/{role}"
        objects = [
            {"objectName": key, "secretPath": path, "secretKey": key, **fields} for key in ("username", "password")
        ]
        return Lane(self.request(pod, role, objects, {}), None)

    def request(
        self, pod: Pod, role: str, objects: Sequence[Mapping[str, str]], parameters: Mapping[str, str]
    ) -> bytes:
        """The driver's request for a class with these objects."""
        # JSON is YAML; a class of a person's hand takes about as long to read.
        written = "\n".join(f"- {json.dumps(entry)}" for entry in objects)
        target = f"/var/lib/kubelet/pods/{pod.uid}/volumes/kubernetes.io~csi/bench/mount"
        return mount_request(
            pod, {"roleName": role, "objects": written, **parameters}, {AUDIENCE: self.token(pod)}, target
        )

    @contextlib.contextmanager
    def daemon(self, *flags: str) -> Iterator[Daemon]:
        """A daemon with these flags besides those of daemonset/, once it listens."""
        with self._directory() as directory:
            argv = [
                "provider.cli",
                f"--endpoint={directory / SOCKET}",
                f"--vault-addr={self.proxy.address}",
                f"--kubeconfig={self.kubeconfig}",
                f"--state-dir={directory / 'state'}",
                f"--node-name={NODE}",
                f"--health-addr=127.0.0.1:{free_port()}",
                # An hour's mounts of a pod come within seconds here.
                "--max-pod-mounts=0",
                "--max-pod-objects=0",
                "--max-pod-mib=0",
                *flags,
            ]
            with Daemon(argv, directory, self.directory / "bytecode") as daemon:
                yield daemon

    @contextlib.contextmanager
    def reference(self) -> Iterator[Daemon]:
        """`tests.bench.reference`, once it listens."""
        with self._directory() as directory:
            argv = ["tests.bench.reference", str(directory / SOCKET), self.proxy.address]
            with Daemon(argv, directory, self.directory / "bytecode") as reference:
                yield reference

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="daemon-", dir=self.directory) as directory:
            yield Path(directory)

    def floors(self, times: int) -> tuple[list[float], list[float]]:
        """Seconds of one read of a KV secret and of one login, each over a bare connection that is kept alive."""
        pod = self.pod()
        login = json.dumps({"role": "app", "jwt": self.token(pod)}).encode()
        self.secret("floor")
        connection = http.client.HTTPConnection(self.proxy.address.removeprefix("http://"), timeout=30)

        def ask(method: str, path: str, body: bytes | None, token: str) -> tuple[float, bytes]:
            began = time.monotonic()
            connection.request(method, f"/v1/{path}", body, {"X-Vault-Token": token} if token else {})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise StandError(f"{method} {path} answered {response.status}")
            return time.monotonic() - began, answer

        with contextlib.closing(connection):
            logins = [ask("POST", LOGIN_PATH, login, "") for _ in range(times + 1)]
            token = json.loads(logins[-1][1])["auth"]["client_token"]
            reads = [ask("GET", "bench/data/floor", None, token) for _ in range(times + 1)]
        # The first of each opened the connection, or warmed what comes after.
        return [seconds for seconds, _ in reads[1:]], [seconds for seconds, _ in logins[1:]]

    def bare(self, pods: int, objects: int, role: str = "app") -> Bare:
        """The logins and reads of a node's boot without a provider."""
        work: list[tuple[str, list[str]]] = []
        for number in range(pods):
            paths = [f"boot/{number}/{one}" for one in range(objects)]
            for path in paths:
                self.secret(path)
            work.append((self.token(self.pod()), [f"bench/data/{path}" for path in paths]))
        before = cpu_seconds(self.bao.pid)
        seconds, cpu = program("bare", [self.proxy.address, role, work])
        return Bare(seconds, cpu, cpu_seconds(self.bao.pid) - before)


class Bare(NamedTuple):
    """What a node's boot takes by `tests.bench.bare`: seconds in all, and of its and OpenBao's CPU."""

    wall: float
    cpu: float
    vault_cpu: float


class Daemon:
    """A running provider, looked at from the outside; a context manager. `argv` begins with the module that it is.

    `started_in` is the seconds from exec to the socket, which is SOCKET in `directory`.
    """

    def __init__(self, argv: Sequence[str], directory: Path, bytecode: Path) -> None:
        self.socket = directory / SOCKET
        # A developer's shell may speak of another Vault, or of a proxy.
        theirs = re.compile(r"(VAULT|BAO)_.*|(https?|all)_proxy", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not theirs.fullmatch(name)}
        # The image's modules are compiled when it is built, whatever a developer's shell says of bytecode.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
        began = time.monotonic()
        command = [sys.executable, "-m", *argv]
        self._process = Process(command, log=directory / "daemon.log", cwd=ROOT, env=environment)
        while not self.socket.exists():
            if not self._process.running:
                raise StandError(f"{argv[0]} ended at its start:\n{self._process.log_tail()}")
            time.sleep(0.001)
        self.started_in = time.monotonic() - began
        self._proc = Path(f"/proc/{self._process.pid}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, as kubelet does; but without the seconds that it would serve on."""
        self._process.signal(signal.SIGKILL)
        self._process.wait(30)

    def cpu(self) -> float:
        """See `cpu_seconds`."""
        return cpu_seconds(self.pid)

    def memory(self) -> float:
        """Resident memory now, in MiB."""
        return status(self.pid, "VmRSS") / 1024

    def peak(self) -> float:
        """The most resident memory since its start, in MiB."""
        return status(self.pid, "VmHWM") / 1024

    def wakeups(self) -> tuple[int, int]:
        """How often its event loop's thread, and all of its threads, went to sleep so far."""
        threads = [int(entry.name) for entry in (self._proc / "task").iterdir()]
        counts = {thread: status(thread, "voluntary_ctxt_switches") for thread in threads}
        return counts[self.pid], sum(counts.values())


def program(name: str, work: Sequence[object]) -> Any:
    """What a program of tests.bench prints, as JSON, when it is given this work; StandError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{name}"],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise StandError(f"tests.bench.{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that a process has taken so far, user and system, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def status(pid: int, field: str) -> int:
    """A number of /proc/PID/status; sizes are in KiB."""
    found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1])
