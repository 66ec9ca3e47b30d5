"""Secrets that are easy to recognise, put wherever the daemon gets one, and looked for wherever it leaves something.

The daemon is a program before real OpenBao and PostgreSQL, with all that it can tell turned on. What it tells is
collected from outside: log, audit, metrics, status, errors, state files, what the kernel shows of it, and its end.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from tests.live import AUDIENCE, CERTIFICATE, DATABASE, Cluster, class_of
from tests.stand.driver import Driver, MountOutcome
from tests.stand.kubeapi import Pod
from tests.stand.process import Process, free_port
from tests.stand.waiting import eventually
from tests.test_examples import clean_environment
from tests.tools import ROOT

ROLE = "canary"
# What is a secret whatever it says: a token of Vault's or OpenBao's, a JWT, a private key.
PATTERNS = (
    re.compile(rb"\b(?:s|hvs|hvb|hvr)\.[A-Za-z0-9_-]{20,}"),
    re.compile(rb"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    re.compile(rb"PRIVATE KEY"),
)


class Canaries:
    """Secrets by what they are, and where a text has one of them."""

    def __init__(self) -> None:
        self._forms: dict[str, set[bytes]] = {}

    def new(self, what: str) -> str:
        """A new secret of letters and digits."""
        secret = f"Canary{secrets.token_hex(12)}"
        self.add(what, secret.encode())
        return secret

    def add(self, what: str, secret: bytes) -> None:
        """A secret that somebody else made."""
        assert len(secret) >= 12
        # In base64 a secret looks three ways, by where in the text it begins; what its neighbours share is cut off.
        encoded = {base64.b64encode(b"x" * shift + secret)[shift + 1 + (shift > 0) : -4] for shift in range(3)}
        self._forms.setdefault(what, set()).update({secret, secret.hex().encode(), secret[::-1]} | encoded)

    def found(self, text: bytes) -> set[str]:
        """What the text gives away."""
        named = {what for what, forms in self._forms.items() if any(form in text for form in forms)}
        return named | {pattern.pattern.decode() for pattern in PATTERNS if pattern.search(text)}


class Told:
    """What the daemon left, by where, and the daemon's own process ids."""

    def __init__(self, canaries: Canaries) -> None:
        self.canaries = canaries
        self.texts: dict[str, bytes] = {}

    def add(self, where: str, text: bytes) -> None:
        """Something that was told, which is not nothing."""
        assert text, where
        self.texts[where] = text

    def leaks(self) -> dict[str, set[str]]:
        """Where a secret is told, and which."""
        return {where: found for where, text in self.texts.items() if (found := self.canaries.found(text))}


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    """All secrets of this module."""
    return Canaries()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, canaries: Canaries) -> Iterator[Cluster]:
    """The servers, with a canary for each thing that a class may have of them."""
    with Cluster(tmp_path_factory.mktemp("canaries")) as cluster:
        canaries.add("HMAC key", cluster.key.read_bytes())
        cluster.role(ROLE)
        cluster.bao.write_kv(
            "shop/data/canary",
            {
                "password": canaries.new("value"),
                "document": json.dumps({"inner": {"pin": canaries.new("value in a document")}}),
                "list": [canaries.new("value in a list")],
                "nothing": None,
                "certificate": canaries.new("value that is no PEM"),
                "encoded": "!" + canaries.new("value that is no base64"),
            },
        )
        cluster.bao.write_kv("shop/data/keys", {canaries.new("key of a secret"): canaries.new("value of such a key")})
        pem = "-----BEGIN {0}-----\n{1}\n-----END {0}-----\n"
        cluster.bao.write_kv(
            "shop/data/pem",
            {
                "certificate": pem.format("CERTIFICATE", canaries.new("value that is no certificate")),
                "private_key": pem.format("EC PRIVATE KEY", canaries.new("value that is no key")),
            },
        )
        cluster.bao.write_kv("shop/data/nul", {"a": canaries.new("value with a NUL") + "\0"})
        cluster.bao.write_policy(
            f"{ROLE}-writes",
            'path "shop/data/written" { capabilities = ["create", "update", "read"] }\n'
            'path "sys/tools/hash" { capabilities = ["update"] }\n',
        )
        cluster.bao.role(
            ROLE,
            ROLE,
            bound_service_account_names=["*"],
            bound_service_account_namespaces=["shop"],
            audience=AUDIENCE,
            token_policies=[ROLE, f"{ROLE}-writes"],
        )
        yield cluster


def good(canaries: Canaries) -> list[str]:
    """Objects that mount, one of each way to a file; none of them quotes a secret but in what it sends."""
    sent = canaries.new("request body")
    return [
        *DATABASE,
        *CERTIFICATE,
        "{objectName: plain, secretPath: shop/data/canary, secretKey: password}",
        "{objectName: inner, secretPath: shop/data/canary, secretKey: document, jmesPath: inner.pin}",
        "{objectName: file.json, secretPath: shop/data/canary, format: json}",
        "{objectName: whole, secretPath: shop/data/canary}",
        "{objectName: rendered, secretPath: shop/data/canary, template: 'p={{ secret.password | shell }}'}",
        "{objectName: store.p12, secretPath: pki/issue/web, method: PUT, format: pkcs12, "
        "secretArgs: {common_name: shop.example}, "
        "passwordFrom: {secretPath: shop/data/canary, secretKey: password}}",
        f"{{objectName: written, secretPath: shop/data/written, method: PUT, secretKey: version, "
        f"secretArgs: {{data: {{x: {sent}}}}}}}",
    ]


def bad(canaries: Canaries) -> dict[str, str]:
    """Objects that fail with a secret in hand, by what is told of it."""
    sent = canaries.new("request body that is refused")
    secret = "secretPath: shop/data/canary"
    endless = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = secret.password %}{% endfor %}{% endfor %}"
    )
    return {
        'no key "nothing-of-it" (it has 6 keys)': f"{secret}, secretKey: nothing-of-it",
        'no key "password" (it has 1 key)': "secretPath: shop/data/keys, secretKey: password",
        "Vault denied GET shop/metadata/canary": "secretPath: shop/metadata/canary",
        "not valid base64": f"{secret}, secretKey: encoded, encoding: base64",
        "not valid hex": f"{secret}, secretKey: password, encoding: hex",
        "a value that holds no JSON": f"{secret}, secretKey: password, jmesPath: a.b",
        "a value that it does not take (abs)": f"{secret}, jmesPath: abs(password)",
        'line 1 speaks of "no"': f"{secret}, template: '{{{{ secret.password.no }}}}'",
        "line 1 fails with TypeError": f"{secret}, template: '{{{{ secret.password / 2 }}}}'",
        "look for a loop that does not end": f"{secret}, template: '{endless}'",
        "null, which TOML has not": f"{secret}, format: toml",
        "a NUL character": "secretPath: shop/data/nul, format: dotenv",
        "a certificate in it cannot be read": "secretPath: shop/data/pem, format: pem",
        "holds no certificate in PEM": f"{secret}, format: pkcs12",
        "Vault refused PUT pki/issue/web": "secretPath: pki/issue/web, method: PUT, "
        f"secretArgs: {{common_name: shop.example, ttl: {sent}}}",
        "Vault refused PUT sys/tools/hash": f"secretPath: sys/tools/hash, method: PUT, "
        f"secretArgs: {{input: {sent}, format: {sent}}}",
    }


class Node:
    """The daemon with all that it can tell turned on, in directories that it has no business in."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "vault.sock"
        self.state, self.audit, self.log = directory / "state", directory / "audit.log", directory / "log"
        self.empty = [directory / name for name in ("cwd", "home", "tmp")]
        for path in self.empty:
            path.mkdir()
        cwd, home, tmp = self.empty
        self.port = free_port()
        self._env = clean_environment() | {
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "TMPDIR": str(tmp),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        flags = {
            "endpoint": self.socket,
            "health-addr": f"127.0.0.1:{self.port}",
            "kubeconfig": cluster.kubeconfig,
            "vault-addr": cluster.bao.address,
            "hmac-key-file": cluster.key,
            "state-dir": self.state,
            "audit-log": self.audit,
            "log-level": "debug",
        }
        self._argv = [sys.executable, "-m", "provider.cli", *(f"--{name}={value}" for name, value in flags.items())]
        self.process = Process(self._argv, log=self.log, cwd=cwd, env=self._env)
        eventually(lambda: "mounts are served" in self.log.read_text(), f"{self.log} says that mounts are served")

    def status(self, *flags: str) -> bytes:
        """What the status command prints."""
        argv = [sys.executable, "-m", "provider.cli", "status", f"--health-addr=127.0.0.1:{self.port}", *flags]
        done = subprocess.run(argv, env=self._env, cwd=self.empty[0], capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def page(self, path: str) -> bytes:
        """A page of its HTTP address."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            content: bytes = answer.read()
            return content

    def processes(self) -> list[int]:
        """The daemon and what it has started."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids

    def open_files(self) -> set[str]:
        """The regular files that its processes hold, deleted ones and those in memory too."""
        found = set()
        for pid in self.processes():
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if descriptor.is_file():
                        found.add(os.readlink(descriptor))
        return found


@pytest.fixture(scope="module")
def node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """The daemon, until it was made to crash."""
    node = Node(cluster, tmp_path_factory.mktemp("node"))
    yield node
    node.process.kill()


@pytest.fixture(scope="module")
def mounted(cluster: Cluster, canaries: Canaries, node: Node) -> Iterator[MountOutcome]:
    """A pod's volume with all that mounts, mounted and re-mounted, with its token and password among the canaries."""
    pod = cluster.pod(ROLE)
    parameters = class_of(ROLE, *good(canaries))
    with Driver(node.socket) as driver:
        tokens = cluster.tokens(pod)
        canaries.add("JWT", tokens[AUDIENCE].encode())
        outcome = driver.mount(pod, parameters, tokens=tokens, secrets={"password": canaries.new("driver's secret")})
        canaries.add("database password", outcome.read("db-password"))
        canaries.add("keystore", outcome.read("store.p12"))
        driver.remount(outcome)
        yield outcome


def refusals(cluster: Cluster, canaries: Canaries, node: Node, pod: Pod) -> Mapping[str, str]:
    """Why mounts with a fault in them fail, by the fault."""
    told = {}
    key = node.directory / "client.key"
    key.write_text(f"-----BEGIN X-----\n{canaries.new('client key')}\n")
    tls = {"vaultAddress": "https://127.0.0.1:1", "vaultTLSClientCertPath": str(key), "vaultTLSClientKeyPath": str(key)}
    header = base64.urlsafe_b64encode(json.dumps({"alg": "RS256", "x": canaries.new("part of a JWT")}).encode())
    forged = f"{header.decode()}.{'e30' * 4}.{canaries.new('signature of a JWT')}"
    canaries.add("JWT that is refused", forged.encode())
    with Driver(node.socket) as driver:
        for what, fields in bad(canaries).items():
            parameters = class_of(ROLE, f"{{objectName: file, {fields}}}")
            told[what] = refusal(driver, pod, parameters, cluster.tokens(pod))
            assert what in told[what]
        plain = class_of(ROLE, "{objectName: file, secretPath: shop/data/canary, secretKey: password}")
        for what, parameters, tokens in (
            ("TLS", plain | tls, cluster.tokens(pod)),
            ("forged token", plain, {AUDIENCE: forged}),
            ("token for another", plain | {"audience": "other"}, {"third": forged}),
            ("no such role", plain | {"roleName": "none"}, cluster.tokens(pod)),
        ):
            # A pod of its own, which has to log in.
            told[what] = refusal(driver, cluster.pod(f"{ROLE}-login"), parameters, tokens)
    return told


def refusal(driver: Driver, pod: Pod, parameters: dict[str, str], tokens: dict[str, str]) -> str:
    """Why a mount fails."""
    with pytest.raises(grpc.RpcError) as caught:
        driver.mount(pod, parameters, tokens=tokens)
    return str(caught.value.details())


def test_canaries_are_seen(cluster: Cluster, canaries: Canaries, mounted: MountOutcome) -> None:
    """What this module looks with finds each secret where it is meant to be: in volumes and requests."""
    volume = b"\0".join(mounted.files[path].contents for path in mounted.files)
    expected = {"value", "value in a document", "value in a list", "database password", "PRIVATE KEY", "keystore"}
    assert expected <= canaries.found(volume)
    assert canaries.found(base64.b64encode(b"?" + cluster.key.read_bytes() + b"?")) == {"HMAC key"}
    request = mounted.request.SerializeToString()
    assert {"JWT", PATTERNS[1].pattern.decode(), "request body", "driver's secret"} <= canaries.found(request)
    token = cluster.bao.api("POST", "auth/token/create", {"ttl": "1m"})["auth"]["client_token"]
    assert canaries.found(f'{{"token": "{token}"}}'.encode()) == {PATTERNS[0].pattern.decode()}
    assert canaries.found(b"") == set()


def test_nothing_that_the_daemon_tells_has_a_secret(
    cluster: Cluster, canaries: Canaries, node: Node, mounted: MountOutcome
) -> None:
    """Log, audit, metrics, status, errors, versions, state files, /proc and the log of a crash are without any secret;
    no file is left where temporary ones go, and none is open but those that the flags name."""
    told = Told(canaries)
    errors = refusals(cluster, canaries, node, mounted.pod)
    for what, message in errors.items():
        told.add(f"error: {what}", message.encode())
    told.add("versions", json.dumps(dict(mounted.versions)).encode())
    for path in ("/metrics", "/health/ready", "/health/live"):
        told.add(path, node.page(path))
    told.add("status", node.status())
    told.add("status as JSON", node.status("--output=json"))
    files = [file for file in node.state.rglob("*") if file.is_file()]
    assert any(file.suffix == ".session" and file.stat().st_size > 100 for file in files)
    for number, file in enumerate(files):
        told.add(f"state file {number}", str(file).encode() + file.read_bytes())
    processes = node.processes()
    assert len(processes) > 1, "the process of the templates"
    for number, pid in enumerate(processes):
        for name in ("environ", "cmdline", "comm", "maps"):
            told.add(f"/proc/{number}/{name}", b"of it: " + Path(f"/proc/{pid}/{name}").read_bytes())
    outside = {path for path in node.open_files() if not path.startswith(("/dev/", "/proc/"))}
    assert {path for path in outside if not path.startswith(str(node.state))} <= {str(node.audit), str(node.log)}
    told.add("audit", node.audit.read_bytes())
    node.process.signal(signal.SIGSEGV)
    node.process.wait(30)
    told.add("log", node.log.read_bytes())
    assert b"Fatal Python error: Segmentation fault" in told.texts["log"]
    assert told.leaks() == {}
    assert [path for empty in node.empty for path in empty.rglob("*")] == []
    # Each source had something to tell: the mounts, or the faults of those that failed.
    for where in ("log", "audit", "/metrics", "status", "status as JSON"):
        assert b"PERMISSION_DENIED" in told.texts[where] or b"mount" in told.texts[where], where


_FAULTY = """
import asyncio, contextlib, dataclasses, pathlib, sys, threading
from provider.cli import main
from tests.daemon import build

secret = pathlib.Path(sys.argv.pop()).read_text()


class Unraisable:
    def __init__(self, value): self.value = value
    def __del__(self): raise RuntimeError(self.value)


def fail(value): raise RuntimeError(f"cannot use {value}") from ValueError(value)


async def nobody_waits(value): fail(value)


class Broken:
    async def mount(self, spec, spent):
        held = {"password": secret}
        threading.Thread(target=fail, args=(secret,)).start()
        asyncio.get_running_loop().call_soon(fail, secret)
        task = asyncio.create_task(nobody_waits(secret), name="lost")
        await asyncio.sleep(0.1)
        del task
        Unraisable(secret)
        fail(held["password"])


@contextlib.asynccontextmanager
async def broken(settings):
    async with build(settings) as parts:
        yield dataclasses.replace(parts, mounts=Broken())


sys.exit(main(build=broken))
"""


def test_bug_with_a_secret_in_hand_does_not_tell_it(canaries: Canaries, tmp_path: Path) -> None:
    """An exception that nobody foresaw, wherever it is raised, is logged with its place and without its text."""
    held = tmp_path / "secret"
    held.write_text(canaries.new("secret of a bug"))
    log, socket = tmp_path / "log", tmp_path / "vault.sock"
    flags = [f"--endpoint={socket}", "--health-addr=", "--log-level=debug", str(held)]
    process = Process([sys.executable, "-c", _FAULTY, *flags], log=log, cwd=ROOT, env=clean_environment())
    try:
        eventually(lambda: "mounts are served" in log.read_text(), f"{log} says that mounts are served")
        pod = Pod("shop", "web", "uid-1", service_account="web", node="node-1", phase="Running")
        with Driver(socket) as driver, pytest.raises(grpc.RpcError) as caught:
            driver.mount(pod, class_of("web", "{objectName: a, secretPath: sleep/0}"), tokens={})
        process.signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    told = log.read_bytes()
    assert canaries.found(told + str(caught.value.details()).encode()) == set()
    events = [json.loads(line) for line in told.splitlines()]
    assert sum("RuntimeError" in json.dumps(event) for event in events) >= 5
