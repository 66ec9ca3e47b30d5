"""The examples, done: their Vault set-up is run as written, and their classes are mounted through the daemon."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12

from provider.sandbox.quoting import pem_blocks
from tests.properties import read_properties
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


def check_all_keys(world: World, mounted: MountOutcome) -> None:
    """Each key is a file, at the root and in a directory, and what is excluded is none."""
    assert mounted.text("username") == "shop"
    assert mounted.text("password") == "correct-horse-battery-staple"
    assert mounted.text("tls/tls.crt") == "example-certificate"
    assert mounted.files.keys() == {"username", "password", "tls/tls.crt", "tls/tls.key"}


def check_document_value(world: World, mounted: MountOutcome) -> None:
    """One value out of a list, one out of a text of JSON, and a map as properties."""
    assert mounted.text("password-of-b") == "example-b"
    assert mounted.text("user") == "shop"
    assert mounted.text("login.properties") == "pin=1234\nuser=shop\n"


def check_formats(world: World, mounted: MountOutcome) -> None:
    """Each format's own reader gives the secret back."""
    secret = {"DB_USER": "shop", "DB_PASSWORD": 'it\'s a $ecret # with = and "quotes"', "DB_HOST": "db.example.com"}
    assert json.loads(mounted.text("app.json")) == secret
    assert yaml.safe_load(mounted.text("app.yaml")) == secret
    assert tomllib.loads(mounted.text("app.toml")) == secret
    assert read_properties(mounted.text("app.properties")) == secret
    read = subprocess.run(
        ["/bin/sh", "-eu"],
        input=f'. {mounted.target}/app.env; printf \'%s\\0\' "$DB_HOST" "$DB_PASSWORD" "$DB_USER"',
        capture_output=True,
        text=True,
        check=True,
    )
    assert read.stdout.split("\0")[:-1] == [secret[name] for name in sorted(secret)]


def check_keystore(world: World, mounted: MountOutcome) -> None:
    """All three hold the same key and certificate, and open with the password of the other secret."""
    text = mounted.read("tls.pem")
    assert [label for label, _ in pem_blocks(text.decode())][1:] == ["CERTIFICATE", "CERTIFICATE"]
    certificates = x509.load_pem_x509_certificates(text)
    key = load_pem_private_key(text, password=None)
    certificates[0].verify_directly_issued_by(certificates[1])
    for name in ("tls.p12", "legacy.p12"):
        opened = load_pkcs12(mounted.read(name), b"example-changeit")
        assert opened.cert is not None
        assert opened.key is not None
        assert opened.cert.certificate == certificates[0]
        assert opened.key.public_key() == key.public_key() == certificates[0].public_key()
        assert opened.cert.friendly_name == {"tls.p12": b"web", "legacy.p12": b"tls"}[name]
        assert [link.certificate for link in opened.additional_certs] == certificates[1:]


def check_legacy_app(world: World, mounted: MountOutcome) -> None:
    """The file is JSON; the account of one lease opens the database; the keys are those of the other secret."""
    config = json.loads(mounted.text("config.json"))
    database = config["database"]
    assert world.postgres.can_login(database["username"], database["password"])
    assert (database["host"], database["port"], database["database"]) == ("postgres.example.com", 5432, "shop")
    assert config["api_keys"] == {"external_api_key": "example-key-1", "webhook_secret": 'quoted "secret"'}


def check_config_files(world: World, mounted: MountOutcome) -> None:
    """One account is in psql's file and in Java's, and opens the database; nginx's include has both headers."""
    host, port, database, user, password = mounted.text(".pgpass").removesuffix("\n").split(":")
    assert (host, port, database) == ("db.example.com", "5432", "shop")
    assert world.postgres.can_login(user, password)
    properties = read_properties(mounted.text("database.properties"))
    assert (properties["jdbc.username"], properties["jdbc.password"]) == (user, password)
    assert properties["jdbc.url"] == "jdbc:postgresql://db.example.com:5432/shop"
    include = mounted.text("upstream-auth.conf")
    assert 'proxy_set_header Authorization "Bearer example-token-1";\n' in include
    assert f'"{base64.b64encode(b"shop:example-token-1").decode()}"' in include


def check_optional(world: World, mounted: MountOutcome) -> None:
    """The file of the secret that is not there is left out, and its version says so."""
    assert mounted.files.keys() == {"password"}
    assert mounted.versions["feature-flags.json"] == "absent"
    assert mounted.versions["password"] != "absent"


CHECKS: dict[str, Callable[[World, MountOutcome], None]] = {
    "kv": check_kv,
    "database": check_database,
    "pki": check_pki,
    "sync-secret": check_sync,
    "ecommerce": check_ecommerce,
    "namespace-and-tls": check_tls,
    "all-keys": check_all_keys,
    "document-value": check_document_value,
    "formats": check_formats,
    "keystore": check_keystore,
    "legacy-app": check_legacy_app,
    "config-files": check_config_files,
    "optional": check_optional,
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
        for entry in objects:
            own = files_of(entry, mounted)
            assert own or entry.get("optional"), entry["objectName"]
            assert {mounted.files[path].mode for path in own} <= {entry.get("filePermission", 0o644)}
        assert mounted.versions.keys() == {entry["objectName"] for entry in objects}
        for path, file in mounted.files.items():
            assert stat.S_IMODE((mounted.target / path).stat().st_mode) == file.mode
        CHECKS[name](world, mounted)
        for copy in secret_class["spec"].get("secretObjects", []):
            assert {entry["objectName"] for entry in copy["data"]} <= mounted.files.keys()


def files_of(entry: dict[str, Any], mounted: MountOutcome) -> list[str]:
    """The paths of an object's files; with all keys at the volume's root, those that lie there."""
    name = entry["objectName"]
    if entry.get("secretKey") != "*":
        return [path for path in mounted.files if path == name]
    return [path for path in mounted.files if os.path.dirname(path) == ("" if name == "." else name)]


def sent_tokens(world: World, pod: Pod, parameters: dict[str, str]) -> dict[str, str]:
    """What the driver sends where the CSIDriver object has `tokenRequests` with the class's audience."""
    audience = parameters.get("audience", "vault")
    token = world.kube.issue_token(pod.namespace, pod.service_account, audiences=[audience], pod=pod)
    return {audience: token}
