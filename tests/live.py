"""A node in real time: a daemon as a process before real OpenBao and PostgreSQL, and applications that use what it
mounts.

TTLs of seconds stand for those of hours; nothing here asserts a time, only what happened meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from provider.telemetry.log import GATHER_SECONDS
from tests.stand.driver import Driver, MountOutcome
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao
from tests.stand.postgres import Postgres
from tests.stand.process import Process, StandError
from tests.stand.waiting import eventually
from tests.test_examples import clean_environment
from tests.tools import ROOT

NAMESPACE = "shop"
NODE = "node-1"
AUDIENCE = "vault"
LONG = "1h"
"""A TTL that does not end within any of these tests."""

WRITTEN_SECONDS = 3 * GATHER_SECONDS
"""After which a line that a daemon told is in its file."""

SWAPS = 10
"""More swaps of a volume than can fall into one look at it."""

_GRANT = 'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{{name}}";'


class Left(NamedTuple):
    """Tokens and credentials, each by its lease, and users who can log in."""

    tokens: list[str]
    leases: list[str]
    users: list[str]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many there are of each."""
        return len(self.tokens), len(self.leases), len(self.users)


class Cluster:
    """PostgreSQL, the Kubernetes API and an OpenBao with KV, database and PKI engines, used as a context manager.

    `bao` is the OpenBao, if not one of this kind of `storage`; only such a one counts requests.
    """

    def __init__(self, directory: Path, *, storage: Literal["dev", "raft"] = "dev", bao: OpenBao | None = None) -> None:
        self.directory = directory
        self.postgres = Postgres()
        self.kube = KubeApi()
        self.bao = bao or OpenBao(storage=storage, audit=True)
        self.daemons = 0
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            for part in (self.postgres, self.kube, self.bao):
                parts.enter_context(part)
            self.kubeconfig = self.kube.write_kubeconfig(self.directory / "kubeconfig")
            self.key = self.directory / "hmac-key"
            self.key.write_bytes(secrets.token_bytes(32))
            self.set_up()
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def set_up(self) -> None:
        """The engines; again after OpenBao lost its storage, and then `role` again."""
        self.bao.mount_kv("shop")
        self.bao.write_kv("shop/data/app", {"api_key": "key-1"})
        self.bao.enable_database(self.postgres)
        self.bao.enable_pki()
        self.bao.pki_role("web", ["shop.example"], ttl="1h")

    def role(
        self, name: str, *, ttl: str = LONG, max_ttl: str = "2h", token_ttl: str = LONG, token_max_ttl: str = ""
    ) -> None:
        """An auth mount with a role, and a database role, all of that name: so each test counts its own.

        The name has 8 letters at most, which is what users' names show of it.
        """
        self.bao.enable_kubernetes_auth(name, self.kube)
        self.bao.database_role(name, ttl, max_ttl, _GRANT)
        self.bao.write_policy(
            name,
            f'path "database/creds/{name}" {{ capabilities = ["read"] }}\n'
            'path "shop/data/*" { capabilities = ["read"] }\n'
            'path "pki/issue/web" { capabilities = ["update"] }\n',
        )
        self.bao.role(
            name,
            name,
            bound_service_account_names=["*"],
            bound_service_account_namespaces=[NAMESPACE],
            audience=AUDIENCE,
            token_policies=[name],
            token_ttl=token_ttl,
            token_max_ttl=token_max_ttl,
        )

    def pod(self, name: str) -> Pod:
        """A new pod of the node, with the service account of its name."""
        return self.kube.add_pod(NAMESPACE, name, service_account=name, node=NODE)

    def mount(self, driver: Driver, pod: Pod, parameters: dict[str, str], class_name: str = "secrets") -> MountOutcome:
        """Mount as the driver does, with a token of the pod."""
        return driver.mount(pod, parameters, tokens=self.tokens(pod), class_name=class_name)

    def tokens(self, pod: Pod) -> dict[str, str]:
        """What the driver hands over at a mount."""
        return {AUDIENCE: self.kube.issue_token(pod.namespace, pod.service_account, audiences=[AUDIENCE], pod=pod)}

    def issued(self, role: str) -> int:
        """How many credentials were asked for, and so database users created."""
        return len(self.bao.requests(f"database/creds/{role}"))

    def logins(self, role: str) -> int:
        """How many logins there were."""
        return len(self.bao.requests(f"auth/{role}/login"))

    def users(self, role: str, *, valid: bool = False) -> list[str]:
        """The database's users of a role now; ``valid`` leaves out those that cannot log in any more."""
        return self.postgres.users(f"v-%-{role}-%", valid=valid)

    def left(self, role: str) -> Left:
        """What there is of a role now, at OpenBao and in PostgreSQL."""
        # Whom OpenBao was just serving when it or its client was killed may have left more behind, of no use to anybody
        # (docs/contract.md section 3): accessors of tokens that are none, and users that end with their TTL.
        return Left(
            self.bao.leases(f"auth/{role}/login"),
            self.bao.leases(f"database/creds/{role}"),
            self.users(role, valid=True),
        )


class Daemon:
    """The provider as a process on its socket; `kill` and `start` again make it a restart. A context manager.

    `socket` is another daemon's to take over. Without `key_file` the HMAC key is the Secret's. `environ` is set.
    """

    def __init__(
        self, cluster: Cluster, *flags: str, socket: Path | None = None, key_file: bool = True, **environ: str
    ) -> None:
        cluster.daemons += 1
        self._name = f"daemon-{cluster.daemons}"
        self._cluster = cluster
        self._starts = 0
        self._env = clean_environment() | environ
        self.socket = socket or cluster.directory / f"{self._name}.sock"
        self._argv = [
            sys.executable,
            "-m",
            "provider.cli",
            f"--endpoint={self.socket}",
            "--health-addr=",
            f"--kubeconfig={cluster.kubeconfig}",
            f"--vault-addr={cluster.bao.address}",
            *((f"--hmac-key-file={cluster.key}",) if key_file else ()),
            *flags,
        ]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def start(self) -> None:
        """Start, and return when mounts are served."""
        self._starts += 1
        log = self._cluster.directory / f"{self._name}-{self._starts}.log"
        self.process = Process(self._argv, log=log, cwd=ROOT, env=self._env)
        eventually(
            lambda: self.said("mounts are served") or not self.process.running, f"{log} says that mounts are served"
        )
        assert self.process.running, self.process.log_tail()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to end, as kubelet does, and wait for its orderly end."""
        self.process.signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.process.log_tail()

    def events(self) -> list[dict[str, Any]]:
        """What it has logged since its last start, until now."""
        time.sleep(WRITTEN_SECONDS)
        lines = self.process.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def said(self, words: str) -> bool:
        """Whether a message of its log begins with these words."""
        return any(event["message"].startswith(words) for event in self.events())


DATABASE = (
    "{objectName: db-username, secretPath: database/creds/ROLE, secretKey: username}",
    "{objectName: db-password, secretPath: database/creds/ROLE, secretKey: password}",
)
STATIC = ("{objectName: api-key, secretPath: shop/data/app, secretKey: api_key}",)
_ISSUE = "secretPath: pki/issue/web, method: PUT, secretArgs: {common_name: shop.example}"
CERTIFICATE = (
    f"{{objectName: tls.crt, {_ISSUE}, secretKey: certificate}}",
    f"{{objectName: tls.key, {_ISSUE}, secretKey: private_key}}",
)


def class_of(role: str, *objects: str) -> dict[str, str]:
    """The parameters of a class that logs in under `role` and mounts `objects`."""
    listed = "\n".join(f"- {entry.replace('ROLE', role)}" for entry in objects)
    return {"roleName": role, "vaultAuthMountPath": role, "objects": listed}


def credential(mounted: MountOutcome) -> tuple[str, str]:
    """The username and password that the volume holds at one moment."""
    files = contents(mounted)
    return files["db-username"], files["db-password"]


def contents(mounted: MountOutcome) -> dict[str, str]:
    """All that the volume holds at one moment, by name."""
    for _ in range(SWAPS):
        # Of one directory, whatever the driver swaps in meanwhile; it deletes the old one, so that is tried again.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            directory = os.open(mounted.target / "..data", os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, directory)
            names = os.listdir(directory)
            found = {name: _read_in(directory, name) for name in names}
            # A directory that is being deleted may have lost files before they were listed.
            if os.path.samestat(os.fstat(directory), (mounted.target / "..data").stat()):
                return found
    raise StandError(f"no files in {mounted.target}")


def _read_in(directory: int, name: str) -> str:
    with open(name, opener=lambda path, flags: os.open(path, flags, dir_fd=directory)) as file:
        return file.read()


class Application:
    """An application that logs in to PostgreSQL twice a second with what its volume holds just then."""

    INTERVAL = 0.5

    def __init__(self, cluster: Cluster, role: str, mounted: MountOutcome) -> None:
        self.users: set[str] = set()
        """The users whose credentials it saw, and those of its role that the database had."""
        self.logins = 0
        self.refused: list[str] = []
        """The users that were not let in, with when."""
        self._cluster = cluster
        self._role = role
        self._mounted = mounted
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "application")

    def __enter__(self) -> Self:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._running.result()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(self.INTERVAL):
            user, password = credential(self._mounted)
            self.logins += 1
            if not self._cluster.postgres.can_login(user, password):
                self.refused.append(f"{user} after {time.monotonic() - began:.1f} s")
            self.users |= {user, *self._cluster.users(self._role)}


def remount_every(seconds: float, driver: Driver, mounted: MountOutcome, *, until: float) -> int:
    """Re-mount as kubelet does, at a steady pace, until the monotonic time `until`; how often that was."""
    times, due = 0, time.monotonic() + seconds
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        driver.remount(mounted)
        times += 1
        due += seconds
    return times
