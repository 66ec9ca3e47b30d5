"""What the operator closes to classes: each guardrail bare and hardened, and the flag that opens it again."""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
from pathlib import Path

import pytest

from provider.cli import command
from provider.errors import InvalidClass, VaultUnavailable
from provider.settings import Settings, TlsSettings
from provider.spc import MountSpec, Parser
from provider.vault.tls import make_context
from tests.spc_classes import OBJECT, attributes
from tests.stand.pki import Authority

ADDRESS = "https://vault.example:8200"
OPERATORS_TLS = TlsSettings("/op/ca", "", "", "/op/cert", "/op/key")
OPEN = Settings(vault_addr=ADDRESS)
HARDENED = dataclasses.replace(OPEN, hardened=True)


def mount(settings: Settings, objects: str = OBJECT, permission: str = "420", **parameters: str) -> MountSpec:
    """What a class comes to under these settings."""
    return Parser(settings).parse(attributes(objects, **parameters), "null", "/volume", permission)


def refusal(settings: Settings, objects: str = OBJECT, permission: str = "420", **parameters: str) -> str:
    """The only fault of a class under these settings."""
    with pytest.raises(InvalidClass) as refused:
        mount(settings, objects, permission, **parameters)
    (found,) = refused.value.faults
    return found


def advised(fault: str) -> Settings:
    """HARDENED, with the flag that a refusal names at the value that it names."""
    (name, value) = re.findall(r"the daemon's (--[a-z-]+)=(\S+) would", fault)[0]
    settings = command.parse([f"--vault-addr={ADDRESS}", "--hardened", f"{name}={value}"], {}, str).settings
    assert settings is not None
    return settings


CLOSED = {
    "address": (OBJECT, {"vaultAddress": "https://tenant.example:8200"}),
    "address by http": (OBJECT, {"vaultAddress": "http://vault.example:8200"}),
    "socket": (OBJECT, {"baoAddress": "unix:///run/containerd/containerd.sock"}),
    "no verification": (OBJECT, {"vaultSkipTLSVerify": "true"}),
    "CA file": (OBJECT, {"vaultCACertPath": "/etc/vault-tls/ca.pem"}),
    "CA directory": (OBJECT, {"openbaoCADirectory": "/etc/vault-tls"}),
    "unknown parameter": (OBJECT, {"vaultAdress": ADDRESS}),
    "unknown field": (OBJECT + "  secretkey: password\n", {}),
    "unknown field of a source": ("- {objectName: a, template: x, sources: {s: {secretPath: a, typo: b}}}", {}),
    "world-writable": (OBJECT + "  filePermission: 0666\n", {}),
}


@pytest.mark.parametrize(("objects", "parameters"), CLOSED.values(), ids=CLOSED)
def test_the_bare_daemon_takes_it(objects: str, parameters: dict[str, str]) -> None:
    """Without a flag each of these classes works, as it does with the Go providers."""
    assert mount(OPEN, objects, **parameters).objects


@pytest.mark.parametrize(("objects", "parameters"), CLOSED.values(), ids=CLOSED)
def test_hardened_refuses_it_and_names_the_flag_that_allows_it(objects: str, parameters: dict[str, str]) -> None:
    """--hardened closes it, and the daemon takes the class with the very flag and value that the refusal names."""
    fault = refusal(HARDENED, objects, **parameters)
    assert mount(advised(fault), objects, **parameters).objects


def test_hardened_takes_what_stays_within_its_bounds() -> None:
    """A class that names nothing of its own, or the daemon's own address, works hardened too."""
    assert mount(HARDENED).server.address == ADDRESS
    assert mount(HARDENED, vaultAddress=ADDRESS, vaultSkipTLSVerify="false").objects
    assert mount(HARDENED, OBJECT + "  filePermission: 0770\n").objects[0].mode == 0o770


def test_each_refusal_is_one_of_all_faults() -> None:
    """Everything that the operator does not allow is told at once."""
    with pytest.raises(InvalidClass) as refused:
        mount(
            HARDENED,
            OBJECT + "  filePermission: 0666\n  typo: x\n",
            vaultAddress="https://tenant.example",
            vaultSkipTLSVerify="true",
            vaultCACertPath="/ca.pem",
            typo="x",
        )
    assert len(refused.value.faults) == 6


# --- addresses --------------------------------------------------------------------------------------------


def test_an_address_by_http_that_the_operator_names_stays_allowed() -> None:
    """As VAULT_ADDR, or in the list: it is the operator's word."""
    own = dataclasses.replace(HARDENED, vault_addr="http://127.0.0.1:8200")
    assert mount(own).server.address == "http://127.0.0.1:8200"
    assert mount(own, vaultAddress="http://127.0.0.1:8200").objects
    listed = dataclasses.replace(HARDENED, allowed_vault_addresses=("http://vault:8200",))
    assert mount(listed, vaultAddress="http://vault:8200").objects


@pytest.mark.parametrize("spelling", ["vaultAddress", "openbaoAddress", "baoAddress"])
def test_every_spelling_of_the_address_is_judged(spelling: str) -> None:
    """A stronger spelling is no way past the list."""
    assert "--allowed-vault-addresses" in refusal(HARDENED, **{spelling: "https://tenant.example"})


@pytest.mark.parametrize("path", ["..;/..;/vault-b/v1/secret/data/x", "..%5c..%5cvault-b/x", "a/..;x=1/..;/b"])
def test_a_secret_path_does_not_lead_out_of_an_allowed_path(path: str) -> None:
    """What is asked for below an address that ends in a path stays below it, whatever a gateway makes of dots."""
    settings = Settings(hardened=True, vault_addr="https://gw.example/vault-a")
    assert "has an element . or .." in refusal(settings, f"- {{objectName: a, secretPath: '{path}'}}")


@pytest.mark.parametrize("name", ["a" * 64, ".".join(["a" * 60] * 5), "a" * 300])
def test_a_name_that_dns_does_not_have_is_refused(name: str) -> None:
    """A host, and whom its certificate is for, have 253 characters at most, and 63 between dots."""
    assert "vaultAddress" in (told := refusal(Settings(), vaultAddress=f"https://{name}:8200"))
    assert "63 between dots" in told
    assert "vaultTLSServerName" in (told := refusal(Settings(), vaultTLSServerName=name))
    assert "63 between dots" in told
    longest = ".".join(["a" * 63] * 3 + ["a" * 61])
    mount(Settings(), vaultAddress=f"https://{longest}:8200", vaultTLSServerName=longest)


def test_the_operators_client_certificate_goes_to_the_operators_servers() -> None:
    """With a list it goes to the daemon's own address and to URLs of the list, never to what a pattern matches."""
    settings = dataclasses.replace(
        HARDENED, tls=OPERATORS_TLS, allowed_vault_addresses=("*.example", "https://exact.other:8200")
    )
    for address in ("", ADDRESS, "https://exact.other:8200"):
        tls = mount(settings, vaultAddress=address).server.tls
        assert (tls.client_cert, tls.client_key) == ("/op/cert", "/op/key")
    elsewhere = mount(settings, vaultAddress="https://tenant.example")
    assert (elsewhere.server.tls.client_cert, elsewhere.server.tls.client_key) == ("", "")
    assert "is sent no client certificate" in elsewhere.warnings[0]
    anywhere = dataclasses.replace(settings, hardened=False, allowed_vault_addresses=())
    assert mount(anywhere, vaultAddress="https://tenant.example").server.tls.client_cert == "/op/cert"


# --- verification -----------------------------------------------------------------------------------------


def test_a_class_may_not_skip_the_verification_where_a_flag_says_so() -> None:
    """--allow-skip-tls-verify=false closes it alone; the operator's own --vault-tls-skip-verify holds for all."""
    closed = dataclasses.replace(OPEN, allow_skip_tls_verify=False)
    assert "--allow-skip-tls-verify=true" in refusal(closed, vaultSkipTLSVerify="true")
    own = dataclasses.replace(HARDENED, tls=TlsSettings(skip_verify=True))
    assert mount(own, vaultSkipTLSVerify="true").server.tls.skip_verify
    assert mount(own).server.tls.skip_verify


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/etc/vault", "/etc/vault-tls-evil/ca.pem", "/etc/vault-tls/../shadow", "etc/vault-tls/ca.pem", "/", "ca.pem"],
)
def test_a_file_outside_of_the_root_is_refused_by_its_path(path: str) -> None:
    """Before anything of it is looked at, so no class learns which files the provider's container has."""
    for settings in (HARDENED, OPEN):
        confined = dataclasses.replace(settings, tls_root="/etc/vault-tls/")
        assert "--tls-root" in refusal(confined, vaultCACertPath=path)


def test_the_operators_own_files_may_lie_anywhere() -> None:
    """The root holds for what a class names, also where it names the other kind of file."""
    settings = dataclasses.replace(HARDENED, tls=OPERATORS_TLS, tls_root="/etc/vault-tls")
    tls = mount(settings).server.tls
    assert (tls.ca_cert, tls.ca_root, tls.client_root) == ("/op/ca", "", "")
    tls = mount(settings, vaultCACertPath="/etc/vault-tls/ca.pem").server.tls
    assert (tls.ca_root, tls.client_cert, tls.client_root) == ("/etc/vault-tls", "/op/cert", "")


def test_the_operators_key_does_not_go_with_a_tenants_certificate() -> None:
    """Where files are confined, half a client certificate is not made whole by the operator's other half."""
    settings = dataclasses.replace(HARDENED, tls=OPERATORS_TLS, tls_root="/etc/vault-tls")
    fault = refusal(settings, vaultTLSClientCertPath="/etc/vault-tls/cert.pem")
    assert fault.startswith("vaultTLSClientKeyPath: is missing")


@pytest.fixture(scope="module")
def ca() -> bytes:
    return Authority().pem


class TestFilesUnderTheRoot:
    """Where a file lies is asked of the file that was opened."""

    def test_links_within_the_root_are_followed(self, tmp_path: Path, ca: bytes) -> None:
        """As in a ConfigMap's volume, where each file is a link through another."""
        root = tmp_path / "tls"
        (root / "..2024").mkdir(parents=True)
        (root / "..2024" / "ca.pem").write_bytes(ca)
        (root / "..data").symlink_to("..2024")
        (root / "ca.pem").symlink_to("..data/ca.pem")
        assert make_context(TlsSettings(ca_cert=str(root / "ca.pem"), ca_root=str(root))).get_ca_certs()
        assert make_context(TlsSettings(ca_directory=str(root), ca_root=str(root))).get_ca_certs()

    def test_the_root_itself_may_be_a_link(self, tmp_path: Path, ca: bytes) -> None:
        """The operator's directory is where it leads."""
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "ca.pem").write_bytes(ca)
        (tmp_path / "root").symlink_to("real")
        root = str(tmp_path / "root")
        assert make_context(TlsSettings(ca_cert=f"{root}/ca.pem", ca_root=root)).get_ca_certs()

    @pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
    def test_a_link_out_of_the_root_is_refused(self, tmp_path: Path, ca: bytes, directory: bool) -> None:
        """The message names the flag and the value that would allow it; with that value it works."""
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "ca.pem").write_bytes(ca)
        root = tmp_path / "tls"
        root.mkdir()
        (root / "ca.pem").symlink_to(tmp_path / "outside" / "ca.pem")
        file = "" if directory else str(root / "ca.pem")
        tls = TlsSettings(ca_cert=file, ca_directory=str(root), ca_root=str(root))
        with pytest.raises(VaultUnavailable, match="would allow it") as told:
            make_context(tls)
        (value,) = re.findall(r"--tls-root=(\S+) would", told.value.what)
        assert make_context(tls._replace(ca_root=value)).get_ca_certs()

    def test_client_certificate_and_key_are_judged_too(self, tmp_path: Path) -> None:
        """A key outside of the root is not read, even where its certificate lies within."""
        cert, key = Authority().client().write(tmp_path, "client")
        root = tmp_path / "tls"
        root.mkdir()
        os.rename(cert, root / "cert.pem")
        (root / "key.pem").symlink_to(key)
        tls = TlsSettings(client_cert=str(root / "cert.pem"), client_key=str(root / "key.pem"), client_root=str(root))
        with pytest.raises(VaultUnavailable, match="--tls-root"):
            make_context(tls)
        assert isinstance(make_context(tls._replace(client_root="")), ssl.SSLContext)

    def test_a_sibling_of_the_root_is_not_within(self, tmp_path: Path, ca: bytes) -> None:
        """A directory whose name begins as the root's does is another one."""
        (tmp_path / "tls-evil").mkdir()
        (tmp_path / "tls-evil" / "ca.pem").write_bytes(ca)
        (tmp_path / "tls").mkdir()
        (tmp_path / "tls" / "ca.pem").symlink_to(tmp_path / "tls-evil" / "ca.pem")
        with pytest.raises(VaultUnavailable, match="--tls-root"):
            make_context(TlsSettings(ca_cert=str(tmp_path / "tls" / "ca.pem"), ca_root=str(tmp_path / "tls")))


# --- fields and modes -------------------------------------------------------------------------------------


def test_unknown_fields_can_be_errors_without_the_hardened_mode() -> None:
    """--unknown-fields=error closes it alone, and names the nearest known field as the warning does."""
    strict = dataclasses.replace(OPEN, unknown_fields_fail=True)
    fault = refusal(strict, OBJECT + "  secretkey: x\n")
    assert 'unknown field "secretkey", did you mean secretKey? (rename it to secretKey, or remove it;' in fault


def test_names_that_the_go_providers_ignore_refuse_no_class() -> None:
    """A class with a field that never meant anything is mounted, hardened too; the log says what to remove."""
    spec = Parser(dataclasses.replace(OPEN, unknown_fields_fail=True)).parse(
        attributes(OBJECT + "  objectVersion: x\n", vaultCAPem="x"), "", "/t", "420"
    )
    assert list(spec.warnings) == [
        'parameters: parameter "vaultCAPem" has no meaning: remove it',
        'objects[0] (password): field "objectVersion" has no meaning: remove it',
    ]


@pytest.mark.parametrize("mode", ["0666", "0777", "0602", '"0002"', "438"])
def test_a_world_writable_mode_is_told_in_the_bare_daemon(mode: str) -> None:
    """It is kept, since classes of the Go providers may have it, and warned of."""
    spec = mount(OPEN, OBJECT + f"  filePermission: {mode}\n")
    assert spec.objects[0].mode & 0o002
    assert any("lets everybody on the node write" in warning for warning in spec.warnings)


def test_the_mode_that_a_refusal_advises_is_allowed() -> None:
    """The same mode without the right of everybody else to write."""
    fault = refusal(HARDENED, OBJECT + "  filePermission: 0666\n")
    (mode,) = re.findall(r"write (0[0-7]+);", fault)
    assert mount(HARDENED, OBJECT + f"  filePermission: {mode}\n").objects[0].mode == 0o664


def test_the_drivers_permission_is_judged_too() -> None:
    """What the driver asks for where an object says nothing."""
    assert "permission" in refusal(HARDENED, permission="438")
    assert mount(OPEN, permission="438").objects[0].mode == 0o666
