"""The examples, done: their Vault set-up is run as written, and their classes are mounted through the daemon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.stand.driver import Driver, MountOutcome
from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao, find_binary
from tests.stand.pki import Authority
from tests.stand.postgres import Postgres
from tests.stand.process import Process
from tests.tools import ROOT

EXAMPLES = {path.stem: path for path in sorted((ROOT / "deploy" / "examples").glob("*.yaml"))}

# `vault` for the set-up's commands. What a person would do by hand: go on where an engine is there already, and try
# again while a new KV engine says that it is not ready.
VAULT = """#!/bin/sh
case "$*" in *" -") input=$(cat) ;; *) input= ;; esac
for attempt in $(seq 100); do
  if output=$(printf '%s' "$input" | BAO "$@" 2>&1); then exit 0; fi
  case $output in
    *"path is already in use"*) exit 0 ;;
    *"Upgrading from non-versioned"*) sleep 0.1 ;;
    *) break ;;
  esac
done
printf '%s\\n' "$output" >&2
exit 1
"""


def set_up_commands(example: Path) -> str:
    """The shell script in an example's comment: its lines indented by five spaces."""
    comment = example.read_text().partition("\napiVersion:")[0]
    return "\n".join(re.findall(r"^#     (.*)$", comment, re.MULTILINE))


def clean_environment() -> dict[str, str]:
    """This process's environment without what a developer's shell says of another Vault or of a proxy."""
    theirs = re.compile(r"(VAULT|BAO)_.*|(https?|all)_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not theirs.fullmatch(name)}


class World:
    """A cluster with a PostgreSQL and an OpenBao that speaks TLS, and the daemon on its node."""

    def __init__(self, directory: Path, postgres: Postgres, kube: KubeApi, bao: OpenBao) -> None:
        self.directory = directory
        self.postgres = postgres
        self.kube = kube
        self.bao = bao
        self.ca = directory / "ca.crt"
        self.socket = directory / "vault.sock"
        (directory / "sa.pub").write_bytes(kube.public_key_pem)
        shim = directory / "vault"
        shim.write_text(VAULT.replace("BAO", str(find_binary())))
        shim.chmod(0o755)

    def set_up(self, name: str) -> None:
        """Run an example's commands, as an administrator of the server would."""
        postgres = self.postgres
        server = f"127.0.0.1:{postgres.port}/{postgres.database}?sslmode=disable"
        environment = {
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "VAULT_ADDR": self.bao.address,
            "VAULT_TOKEN": self.bao.root_token,
            "VAULT_CACERT": str(self.ca),
            "POSTGRES_URL": f"postgresql://{{{{username}}}}:{{{{password}}}}@{server}",
            "POSTGRES_ADMIN": postgres.superuser,
            "POSTGRES_ADMIN_PASSWORD": postgres.superuser_password,
        }
        done = subprocess.run(
            ["/bin/sh", "-eu"],
            input=set_up_commands(EXAMPLES[name]),
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def parameters(self, secret_class: dict[str, Any]) -> dict[str, str]:
        """A class's parameters; where it names a server and a CA, this world's instead."""
        here = {"vaultAddress": self.bao.address, "vaultCACertPath": str(self.ca)}
        parameters: dict[str, str] = secret_class["spec"]["parameters"]
        return parameters | {name: value for name, value in here.items() if name in parameters}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything that the examples need, once for all of them."""
    directory = tmp_path_factory.mktemp("examples")
    authority = Authority()
    (directory / "ca.crt").write_bytes(authority.pem)
    with contextlib.ExitStack() as parts:
        postgres = parts.enter_context(Postgres())
        kube = parts.enter_context(KubeApi())
        bao = parts.enter_context(OpenBao(storage="inmem", certificate=authority.server()))
        bao.enable_kubernetes_auth("kubernetes", kube)
        postgres.query("CREATE TABLE products (id int PRIMARY KEY)")
        world = World(directory, postgres, kube, bao)
        daemon = Process(
            [
                sys.executable,
                "-m",
                "provider.cli",
                f"-endpoint={world.socket}",
                "-health-addr=",
                f"--kubeconfig={kube.write_kubeconfig(directory / 'kubeconfig')}",
            ],
            log=directory / "daemon.log",
            cwd=ROOT,
            env=clean_environment() | {"VAULT_ADDR": bao.address, "VAULT_CACERT": str(world.ca)},
        )
        parts.callback(daemon.stop)
        while not world.socket.exists():
            assert daemon.running, daemon.log_tail()
            time.sleep(0.02)
        yield world


def check_kv(world: World, mounted: MountOutcome) -> None:
    """Keys as they are stored, a list as compact JSON, and the whole response."""
    assert mounted.text("username") == "shop"
    assert mounted.text("password") == "correct-horse-battery-staple"
    assert mounted.text("settings/hosts.json") == '["a.example.com","b.example.com"]'
    assert json.loads(mounted.text("settings/all.json"))["data"]["data"]["retries"] == 3


def check_database(world: World, mounted: MountOutcome) -> None:
    """An account that PostgreSQL lets in."""
    assert world.postgres.can_login(mounted.text("db-username"), mounted.text("db-password"))


def check_pki(world: World, mounted: MountOutcome) -> None:
    """A key that is the certificate's, and a certificate that is the issuer's."""
    certificate = x509.load_pem_x509_certificate(mounted.read("tls.crt"))
    key = load_pem_private_key(mounted.read("tls.key"), password=None)
    assert certificate.public_key() == key.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(mounted.read("ca.crt")))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {
        "web.default.svc",
        "web.default.svc.cluster.local",
    }


def check_sync(world: World, mounted: MountOutcome) -> None:
    """The values that the driver copies into the Secret."""
    assert mounted.text("app-username") == "shop"
    assert mounted.text("app-password") == "correct-horse-battery-staple"


def check_ecommerce(world: World, mounted: MountOutcome) -> None:
    """An account that PostgreSQL lets in, and the key."""
    check_database(world, mounted)
    assert mounted.text("api-key") == "example-key-1"


def check_tls(world: World, mounted: MountOutcome) -> None:
    """The secret of the namespace."""
    assert mounted.text("token") == "example-token-1"


CHECKS: dict[str, Callable[[World, MountOutcome], None]] = {
    "kv": check_kv,
    "database": check_database,
    "pki": check_pki,
    "sync-secret": check_sync,
    "ecommerce": check_ecommerce,
    "namespace-and-tls": check_tls,
}


@pytest.mark.parametrize("tokens", ["from the driver", "requested"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_mounts(world: World, name: str, tokens: str) -> None:
    """After its set-up, an example's class mounts each of its files, whoever makes the token."""
    world.set_up(name)
    manifests = list(yaml.safe_load_all(EXAMPLES[name].read_text()))
    (secret_class,) = [m for m in manifests if m["kind"] == "SecretProviderClass"]
    (account,) = [m["metadata"] for m in manifests if m["kind"] == "ServiceAccount"]
    pod = world.kube.add_pod(account["namespace"], f"{name}-pod", service_account=account["name"])
    parameters = world.parameters(secret_class)
    sent = sent_tokens(world, pod, parameters) if tokens == "from the driver" else None
    if "audience" not in parameters:
        # As the example's comment says of clusters whose driver sends a token for `vault`.
        world.bao.role("kubernetes", parameters["roleName"], audience="vault" if sent else "")
    requests = f"serviceaccounts/{pod.service_account}/token"
    before = world.kube.count("POST", requests)
    with Driver(world.socket) as driver:
        mounted = driver.mount(pod, parameters, tokens=sent)
        assert world.kube.count("POST", requests) - before == (0 if sent else 1)
        objects = yaml.safe_load(parameters["objects"])
        assert {path: file.mode for path, file in mounted.files.items()} == {
            entry["objectName"]: entry.get("filePermission", 0o644) for entry in objects
        }
        for path, file in mounted.files.items():
            assert stat.S_IMODE((mounted.target / path).stat().st_mode) == file.mode
        CHECKS[name](world, mounted)
        for copy in secret_class["spec"].get("secretObjects", []):
            assert {entry["objectName"] for entry in copy["data"]} <= mounted.files.keys()


def sent_tokens(world: World, pod: Pod, parameters: dict[str, str]) -> dict[str, str]:
    """What the driver sends where the CSIDriver object has `tokenRequests` with the class's audience."""
    audience = parameters.get("audience", "vault")
    token = world.kube.issue_token(pod.namespace, pod.service_account, audiences=[audience], pod=pod)
    return {audience: token}
