"""The program: its flags as Go's flag package reads them, what it prints, and its life as a process."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider import __version__
from provider.cli import command, flags, main, readers
from provider.errors import InvalidSetting
from provider.notation import read_duration
from provider.settings import Settings, TlsSettings
from provider.spc.parameters import TOKENS
from provider.v1alpha1 import service_pb2, service_pb2_grpc
from tests.live import WRITTEN_SECONDS
from tests.stand.driver import Driver
from tests.stand.faulty import Faulty, secret, token
from tests.stand.process import Process
from tests.test_server import attributes

ROOT = Path(__file__).resolve().parent.parent


def parsed(*arguments: str, **environ: str) -> Settings:
    """The settings that a command line and an environment come to."""
    settings = command.parse(arguments, environ, lambda style: style).settings
    assert settings is not None
    return settings


def fault(*arguments: str, **environ: str) -> str:
    """What a wrong command line is told."""
    with pytest.raises(InvalidSetting) as caught:
        command.parse(arguments, environ, lambda style: style)
    return str(caught.value)


# --- flags ------------------------------------------------------------------------------------------------


def test_no_flag_at_all_is_the_defaults() -> None:
    """Without flags and environment, the settings are the defaults; the table's defaults are these."""
    assert parsed() == Settings()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-vault-addr=http://v:1",),
        ("--vault-addr=http://v:1",),
        ("-vault-addr", "http://v:1"),
        ("--vault-addr", "http://v:1"),
        ("--vault-addr", "http://other:1", "--vault-addr=http://v:1"),
    ],
)
def test_one_dash_or_two_and_value_after_equals_or_next(arguments: tuple[str, ...]) -> None:
    """A flag takes one dash or two, its value after = or as the next argument; the last one given counts."""
    assert parsed(*arguments).vault_addr == "http://v:1"


def test_value_may_look_like_a_flag_or_hold_equals() -> None:
    """The next argument is the value even when it begins with a dash; only the first = divides."""
    assert parsed("--vault-namespace", "-x").vault_namespace == "-x"
    assert parsed("--vault-namespace=a=b").vault_namespace == "a=b"


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (("-debug",), "debug"),
        (("--debug",), "debug"),
        (("-debug=true",), "debug"),
        (("--debug=T", "--log-level=error"), "debug"),
        (("-debug=false",), "info"),
        (("--debug", "--debug=0"), "info"),
        (("-log-level=WARN",), "warn"),
        (("-log-level", "trace"), "trace"),
    ],
)
def test_debug_and_log_level(arguments: tuple[str, ...], level: str) -> None:
    """-debug is --log-level=debug; booleans take a value after = only; level names are read in any case."""
    assert parsed(*arguments).log_level == level


def test_boolean_does_not_swallow_the_next_argument() -> None:
    """As in Go, the argument after a boolean is not its value; here that is told, and not ignored."""
    assert fault("--debug", "true") == '"true" is no flag: a boolean\'s value follows an equals sign: --debug=true'
    assert parsed("--debug", "--cache-size", "7") == Settings(log_level="debug", cache_size=7)


EVERY = Settings(
    endpoint="/run/vault.sock",
    log_level="error",
    log_format="text",
    health_addr="127.0.0.1:8081",
    metrics_addr="127.0.0.1:9090",
    audit_log="/audit.log",
    vault_addr="https://vault.example:8200",
    vault_mount="k8s",
    vault_namespace="team",
    tls=TlsSettings("/ca.pem", "/cas", "vault.internal", "/cert.pem", "/key.pem", True),
    hmac_secret_name="key-of-ours",
    hmac_key_file="/key",
    max_connections=8,
    cache_size=0,
    kubeconfig="/kubeconfig",
    mount_timeout=90.0,
    renew_percent=50.0,
    refresh_after=300.0,
    share_reads=False,
    state_dir="/state",
    sweep_interval=30.0,
    node_name="node-7",
    revoke=False,
    templates=False,
    hardened=True,
    allowed_vault_addresses=("https://vault.example:8200", "*.example.com"),
    allow_skip_tls_verify=True,
    tls_root="/etc/vault-tls",
    unknown_fields_fail=False,
    max_pod_mounts=60,
    max_pod_objects=0,
    max_pod_mib=32,
)
EVERY_FLAG = {
    "endpoint": "unix:///run/vault.sock",
    "log-level": "error",
    "log-format": "text",
    "health-addr": "127.0.0.1:8081",
    "metrics-addr": "127.0.0.1:9090",
    "audit-log": "/audit.log",
    "vault-addr": "https://vault.example:8200/",
    "vault-mount": "k8s",
    "vault-namespace": "team",
    "vault-tls-ca-cert": "/ca.pem",
    "vault-tls-ca-directory": "/cas",
    "vault-tls-server-name": "vault.internal",
    "vault-tls-client-cert": "/cert.pem",
    "vault-tls-client-key": "/key.pem",
    "vault-tls-skip-verify": "true",
    "max-connections": "8",
    "hmac-secret-name": "key-of-ours",
    "hmac-key-file": "/key",
    "cache-size": "0",
    "kubeconfig": "/kubeconfig",
    "mount-timeout": "1m30s",
    "templates": "off",
    "renew-percent": "50",
    "refresh-after": "5m",
    "share-reads": "off",
    "state-dir": "/state",
    "sweep-interval": "30s",
    "node-name": "node-7",
    "revoke": "never",
    "hardened": "true",
    "allowed-vault-addresses": "https://vault.example:8200, *.example.com",
    "allow-skip-tls-verify": "true",
    "tls-root": "/etc/vault-tls",
    "unknown-fields": "warn",
    "max-pod-mounts": "60",
    "max-pod-objects": "0",
    "max-pod-mib": "32",
    "debug": "false",
    "version": "false",
    "output": "json",
}


def test_every_flag_reaches_its_setting() -> None:
    """Each flag of the table sets what it says; with the openbao- spelling too."""
    assert set(EVERY_FLAG) == {flag.name for flag in flags.FLAGS}
    assert parsed(*(f"-{name}={value}" for name, value in EVERY_FLAG.items())) == EVERY
    openbao = {re.sub("^vault-", "openbao-", name): value for name, value in EVERY_FLAG.items()}
    assert parsed(*(f"--{name}={value}" for name, value in openbao.items())) == EVERY


def test_openbaos_spelling_wins_over_vaults() -> None:
    """--openbao-addr wins over --vault-addr in either order; an empty one says nothing."""
    assert parsed("--openbao-addr=http://bao", "--vault-addr=http://vault").vault_addr == "http://bao"
    assert parsed("--vault-addr=http://vault", "--openbao-addr=http://bao").vault_addr == "http://bao"
    assert parsed("--vault-addr=http://vault", "--openbao-addr=").vault_addr == "http://vault"


ENVIRONMENT = {
    "ADDR": "https://vault.example:8200",
    "NAMESPACE": "team",
    "CACERT": "/ca.pem",
    "CAPATH": "/cas",
    "TLS_SERVER_NAME": "vault.internal",
    "CLIENT_CERT": "/cert.pem",
    "CLIENT_KEY": "/key.pem",
    "SKIP_VERIFY": "1",
    "PROXY_ADDR": "http://proxy:3128",
}


@pytest.mark.parametrize("prefix", ["VAULT_", "BAO_"])
def test_environment_as_the_command_lines_of_vault_and_openbao_spell_it(prefix: str) -> None:
    """Each variable of Vault's and OpenBao's command lines sets what it does there."""
    settings = parsed(**{prefix + name: value for name, value in ENVIRONMENT.items()})
    assert settings == Settings(
        vault_addr=EVERY.vault_addr,
        vault_namespace=EVERY.vault_namespace,
        tls=EVERY.tls,
        vault_proxy_addr="http://proxy:3128",
    )


def test_flag_wins_over_environment_and_bao_over_vault() -> None:
    """A flag wins over both environments, BAO_ over VAULT_; an empty variable or flag says nothing."""
    both = {"VAULT_ADDR": "http://vault", "BAO_ADDR": "http://bao"}
    assert parsed(**both).vault_addr == "http://bao"
    assert parsed("--vault-addr=http://flag", **both).vault_addr == "http://flag"
    assert parsed("--vault-addr=", **both).vault_addr == "http://bao"
    assert parsed(VAULT_ADDR="http://vault", BAO_ADDR="").vault_addr == "http://vault"
    assert parsed("--vault-tls-skip-verify=false", VAULT_SKIP_VERIFY="true").tls.skip_verify is False


CA_SOURCES = [
    {"--openbao-tls-ca-cert": "/f0", "--openbao-tls-ca-directory": "/d0"},
    {"--vault-tls-ca-cert": "/f1", "--vault-tls-ca-directory": "/d1"},
    {"BAO_CACERT": "/f2", "BAO_CAPATH": "/d2"},
    {"VAULT_CACERT": "/f3", "VAULT_CAPATH": "/d3"},
]


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("named", [{"f"}, {"d"}, {"f", "d"}], ids=["file", "directory", "both"])
def test_who_names_a_ca_source_names_them_all(level: int, named: set[str]) -> None:
    """The level that names a CA file or a directory is verified with that alone, whatever weaker levels name:
    --openbao- over --vault- over BAO_ over VAULT_."""
    here = {name: text for name, text in CA_SOURCES[level].items() if text[1] in named}
    given = here | {name: text for weaker in CA_SOURCES[level + 1 :] for name, text in weaker.items()}
    arguments = [f"{name}={text}" for name, text in given.items() if name.startswith("--")]
    environ = {name: text for name, text in given.items() if not name.startswith("--")}
    tls = parsed(*arguments, **environ).tls
    assert {tls.ca_cert, tls.ca_directory} == set(here.values()) | ({""} if len(named) == 1 else set())
    assert tls.ca_cert in ("", f"/f{level}")


def test_empty_ca_source_says_nothing() -> None:
    """A flag or a variable that is set and empty leaves the weaker level's CA sources as they are."""
    settings = parsed("--vault-tls-ca-cert=", BAO_CAPATH="", VAULT_CAPATH="/d")
    assert settings.tls == TlsSettings(ca_directory="/d")
    assert fault(VAULT_CACERT="a\n").startswith("VAULT_CACERT cannot be")


def test_who_the_daemon_is_comes_from_the_pods_environment() -> None:
    """NODE_NAME, POD_NAME and POD_NAMESPACE set what they say; --node-name wins."""
    pod = {"NODE_NAME": "node-1", "POD_NAME": "csi-x7", "POD_NAMESPACE": "csi"}
    assert parsed(**pod) == Settings(node_name="node-1", pod_name="csi-x7", pod_namespace="csi")
    assert parsed("--node-name=node-2", **pod).node_name == "node-2"


@pytest.mark.parametrize(("text", "shared"), [("on", True), ("off", False), ("true", True), ("0", False)])
def test_share_reads_is_on_or_off(text: str, shared: bool) -> None:
    """--share-reads takes on and off, and what other booleans take."""
    assert parsed(f"--share-reads={text}").share_reads is shared
    assert parsed("--share-reads", text).share_reads is shared


def test_pod_says_who_it_is_by_the_environment() -> None:
    """NODE_NAME, POD_NAME and POD_NAMESPACE, as a manifest's downward API sets them, reach the settings."""
    settings = parsed(NODE_NAME="node-1", POD_NAME="provider-x", POD_NAMESPACE="csi")
    assert settings == Settings(node_name="node-1", pod_name="provider-x", pod_namespace="csi")
    assert parsed("--node-name=node-2", NODE_NAME="node-1").node_name == "node-2"


@pytest.mark.parametrize(("text", "shared"), [("on", True), ("off", False), ("true", True), ("0", False)])
def test_switch_is_on_or_off(text: str, shared: bool) -> None:
    """A switch takes on and off, and what Go's booleans take; pod-end is the default of --revoke."""
    assert parsed(f"--share-reads={text}", "--revoke=pod-end") == Settings(share_reads=shared)


def test_health_can_be_off() -> None:
    """An empty --health-addr is a value: no health endpoint."""
    assert parsed("--health-addr=").health_addr == ""


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        (":8080", ("", 8080)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_listen_addresses(text: str, address: tuple[str, int] | None) -> None:
    """A listen address is host:port, :port for all interfaces, or nothing."""
    assert readers.split_listen_address(text) == address


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m", 120), ("1h30m", 5400), ("300ms", 0.3), ("0", 0), ("1.5h", 5400), (".5s", 0.5), ("1.s", 1),
     ("250us", 0.00025), ("250µs", 0.00025), ("250μs", 0.00025), ("1000000000ns", 1), ("1h1m1s1ms", 3661.001)],
)  # fmt: skip
def test_durations_as_go_writes_them(text: str, seconds: float) -> None:
    """Durations have Go's units and fractions, one after the other."""
    assert read_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "s", "1d", "1 s", "-1s", "+1s", "1s ", "1,5s", ".s", "1e3s", "٣s", "00"])
def test_what_is_no_duration(text: str) -> None:
    """A number without unit (but 0), another unit, a sign or a space is no duration."""
    with pytest.raises(ValueError, match="a duration like 90s"):
        read_duration(text)


@given(st.text(), st.sampled_from([flag.name for flag in flags.FLAGS]))
def test_any_text_is_a_value_or_a_told_fault(text: str, name: str) -> None:
    """Whatever a flag's value is, it is taken or refused with a line that names the flag; nothing else is raised."""
    try:
        command.parse([f"--{name}={text}"], {}, lambda style: style)
        told = f"--{name} cannot be "
    except InvalidSetting as error:
        told = str(error)
    assert told.startswith(f"--{name} cannot be ")
    assert "\n" not in told


@given(st.lists(st.text()))
def test_any_arguments_are_taken_or_a_told_fault(arguments: list[str]) -> None:
    """Whatever the arguments are, nothing but InvalidSetting is raised, and it says something in one line."""
    try:
        command.parse(arguments, {}, lambda style: style)
        told = "taken"
    except InvalidSetting as error:
        told = str(error)
    assert told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--vault-adr=x"], "there is no flag --vault-adr: did you mean --vault-addr?"),
        (["-endpont", "x"], "there is no flag --endpont: did you mean --endpoint?"),
        (["--openbao-adress=x"], "did you mean --openbao-addr?"),
        (["--qqqqqqqq"], "there is no flag --qqqqqqqq: see vault-csi-provider --help"),
        (["serve"], '"serve" is no flag: allowed are flags alone'),
        (["---debug"], '"---debug" is no flag'),
        (["-"], '"-" is no flag'),
        (["--"], '"--" is no flag'),
        (["--=x"], '"--=x" is no flag'),
        (["--endpoint"], "--endpoint needs a value: write --endpoint=PATH"),
        (["--debug=maybe"], '--debug cannot be "maybe": allowed: 1, t, T, true, TRUE, True, 0, f, F, false'),
        (["--debug="], '--debug cannot be "": allowed: 1, t'),
        (["--log-level=loud"], '--log-level cannot be "loud": allowed: trace, debug, info, warn, error, off'),
        (["--log-format=xml"], "allowed: json, text"),
        (["--output=yaml"], "allowed: json, text"),
        (["--cache-size=-1"], "a whole number from 0 (keep none) to 1000000"),
        (["--cache-size=1.5"], "a whole number"),
        (["--cache-size=1000001"], "a whole number"),
        (["--cache-size=٣"], "a whole number"),
        (["--max-connections=0"], "a whole number from 1 to 1024"),
        (["--max-connections=1025"], "a whole number from 1 to 1024"),
        (["--max-connections=many"], "a whole number from 1 to 1024"),
        (["--mount-timeout=60"], "a duration from 100ms to 110s, since kubelet gives up after 2m"),
        (["--mount-timeout=2m"], "a duration from 100ms to 110s"),
        (["--renew-percent=0"], "a number from 1 to 99"),
        (["--renew-percent=99.5"], "a number from 1 to 99"),
        (["--renew-percent=x"], "a number from 1 to 99"),
        (["--refresh-after=-1s"], "a duration like 90s"),
        (["--share-reads=no"], "allowed: on, off"),
        (["--revoke=always"], "allowed: pod-end, never"),
        (["--sweep-interval=10ms"], "a duration of 1s or more"),
        (["--sweep-interval=often"], "a duration of 1s or more"),
        (["--mount-timeout=0"], "a duration from 100ms to 110s"),
        (["--health-addr=8080"], "host:port, :port for all interfaces"),
        (["--health-addr=:0"], "host:port"),
        (["--health-addr=:65536"], "host:port"),
        (["--health-addr=::1:80"], "host:port"),
        (["--endpoint="], "the path of a Unix socket"),
        (["--endpoint=tcp://127.0.0.1:1"], "the path of a Unix socket"),
        (["--endpoint=/run/"], "the path of a Unix socket"),
        (["--endpoint=/a\0b"], "text without control characters"),
        (["--hmac-secret-name=Key"], "a Secret's name"),
        (["--vault-addr=vault:8200"], "a URL like https://vault.example:8200"),
        (["--vault-addr=ftp://vault"], "a URL like"),
        (["--vault-addr=https://"], "a URL like"),
        (["--vault-addr=https://vault:99999"], "a URL like"),
        (["--vault-addr=https://[::1"], "a URL like"),
        (["--vault-addr=https://user:secret@vault"], "vault.sock; this holds a user or a password"),
        (["--vault-addr=https://vault?x=1"], "vault.sock; this has a query or a fragment"),
        (["--vault-addr=https://vault:0"], "vault.sock; this has the port 0"),
        (["--vault-addr= https://vault"], "vault.sock; this holds white space or a control character"),
        (["--vault-addr=https://vault/../x"], "vault.sock; this has an element . or .."),
        (["--vault-addr=unix://run/vault.sock"], "a URL like"),
        (["--vault-addr=unix://"], "a URL like"),
        (["--vault-mount=a\nb"], '--vault-mount cannot be "a\\u000ab": allowed: the path of an auth mount'),
        (["--vault-mount=a/../b"], "like kubernetes; this has an element . or .."),
        (["--vault-mount=/"], "like kubernetes; this is empty"),
        (["--vault-tls-client-cert=/x"], "--vault-tls-client-cert cannot be without --vault-tls-client-key"),
        (["--vault-tls-client-key=/x"], "--vault-tls-client-key cannot be without --vault-tls-client-cert"),
        (["--vault-namespace=a\nb"], 'cannot be "a\\u000ab": allowed: text without control characters'),
    ],
)  # fmt: skip
def test_wrong_flag_says_what_is_wrong_and_what_is_allowed(arguments: list[str], told: str) -> None:
    """A wrong flag is named, with its value and what is allowed, and the nearest flag where there is one."""
    assert told in fault(*arguments)


@pytest.mark.parametrize("text", ["jwt", "/auth/jwt/", "auth//jwt"])
def test_the_auth_mount_is_read_as_in_a_class(text: str) -> None:
    """Slashes around it and a leading auth/ do not belong to its name, in metrics neither."""
    assert parsed(f"--vault-mount={text}").vault_mount == "jwt"


def test_wrong_variable_is_told_by_its_name() -> None:
    """A wrong environment variable is named as it was given."""
    assert fault(VAULT_SKIP_VERIFY="maybe").startswith('VAULT_SKIP_VERIFY cannot be "maybe": allowed: 1, t')
    assert fault(BAO_ADDR="bao", VAULT_ADDR="http://vault").startswith('BAO_ADDR cannot be "bao"')


@pytest.mark.parametrize("address", ["http://127.0.0.1:8200", "https://vault/base", "unix:///run/v.sock"])
def test_addresses_of_vault(address: str) -> None:
    """http, https and unix URLs are addresses; a slash at the end is dropped."""
    assert parsed(f"--vault-addr={address}/").vault_addr == address


# --- what it prints ---------------------------------------------------------------------------------------


def test_wrong_flag_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong flag prints one line on stderr, nothing on stdout, and ends with 2."""
    assert main(["--vault-adr=x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vault-csi-provider: there is no flag --vault-adr")
    assert err.count("\n") == 1


def test_wrong_flag_repeats_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    """A token that was given in the wrong place is not repeated."""
    assert main(["--debug=hvs.CAESIJcanarycanarycanary"]) == 2
    assert "canary" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints name and version as text, or as JSON with --output=json, and ends with 0."""
    assert main(["-version"]) == 0
    assert capsys.readouterr().out.startswith(f"vault-csi-provider {__version__} ")
    assert main(["--version", "-output", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["version"]) == ("vault-csi-provider", __version__)


def test_version_asks_nothing_of_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """--version works where the environment is wrong, and a wrong flag beside it is still told."""
    monkeypatch.setenv("VAULT_SKIP_VERIFY", "maybe")
    assert main(["--version"]) == 0
    assert main(["--version", "--output=yaml"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("flag", ["-h", "--help", "-help", "--h"])
def test_help_shows_every_flag_aligned(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """--help prints each flag with default and environment in aligned columns, under its group, and ends with 0."""
    assert main([flag]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    (head,) = [line for line in lines if line.startswith("  Flag")]
    for flag_ in flags.FLAGS:
        (line,) = [line for line in lines if re.match(rf"  --{flag_.name}( |$)", line)]
        assert line[head.index("Default") :].split()[0] == (flag_.default or "-")
        assert line[head.index("Environment") :] == (flag_.variable or "-")
        assert f"      {flag_.meaning}" in lines
        assert flag_.group in lines
    assert max(map(len, lines)) <= 120


def test_markdown_table_has_every_flag() -> None:
    """The README's table has a row for each flag, with the same default, environment and meaning."""
    rows = flags.markdown_table().splitlines()[2:]
    assert len(rows) == len(flags.FLAGS)
    for row, flag in zip(rows, flags.FLAGS, strict=True):
        assert row.startswith(f"| `--{flag.name}")
        assert row.endswith(f"| {flag.meaning} |")
        assert (f"`{flag.default}`" if flag.default else "") in row
        assert flag.variable in row


def test_help_needs_none_of_the_daemons_libraries() -> None:
    """--help imports neither gRPC nor HTTP nor Vault's client: it is there at once."""
    code = "import sys; from provider.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"grpc", "httptools", "hvac", "uvloop", "google.protobuf"}.isdisjoint(done.stdout.split())


# --- the process ------------------------------------------------------------------------------------------


class Daemon(Process):
    """A daemon as a process, with what it writes in a file called after ``name``, beside the socket."""

    def __init__(self, module: str, path: Path, *arguments: str, name: str) -> None:
        argv = [sys.executable, "-m", module, f"--endpoint=unix://{path}", "--health-addr=", *arguments]
        super().__init__(argv, log=path.with_name(f"{name}.log"), cwd=ROOT)

    def events(self) -> list[dict[str, Any]]:
        """What it told until now, each line of which has to be JSON."""
        time.sleep(WRITTEN_SECONDS)
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def told(self, message: str) -> None:
        """Wait until it tells this; fail if it ends before."""
        while message not in self.log.read_text():
            assert self.running, self.log.read_text()
            time.sleep(0.01)

    def ended(self) -> int | None:
        """Wait for the end and return the exit code; None if it does not come."""
        return self.wait(60)


@contextmanager
def daemon(module: str, path: Path, *arguments: str, name: str = "daemon") -> Iterator[Daemon]:
    """A daemon that is gone afterwards."""
    running = Daemon(module, path, *arguments, name=name)
    try:
        yield running
    finally:
        running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_real_daemon_with_0(tmp_path: Path, number: signal.Signals) -> None:
    """The daemon of the command line answers Version, and ends with 0 at SIGTERM and SIGINT, its socket removed."""
    path = tmp_path / "vault.sock"
    with daemon("provider.cli", path, "--revoke=never") as running, Driver(path) as driver:
        assert driver.version().runtime_version == __version__
        running.signal(number)
        assert running.ended() == 0
        assert not path.exists()
        assert [event["message"] for event in running.events()][-2:] == ["stopping", "stopped"]


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n"], ids=["nothing", "half a greeting"])
def test_half_open_connection_does_not_hold_up_the_end(tmp_path: Path, said: bytes) -> None:
    """A client that dialled and then says nothing, or no more, does not keep the daemon from ending: it ends while
    the client still waits, before the 20 s for which gRPC would wait for it."""
    path = tmp_path / "vault.sock"
    with daemon("tests.daemon", path) as running, socket.socket(socket.AF_UNIX) as silent:
        running.told("mounts are served")
        silent.connect(str(path))
        silent.sendall(said)
        with Driver(path) as driver:
            driver.version()  # answered after the silent one was accepted
        running.signal(signal.SIGTERM)
        assert running.wait(15) == 0


def test_connections_to_vault_are_as_many_as_the_operator_allows(tmp_path: Path) -> None:
    """Four pods' logins at once, each slow: with --max-connections=2 they go through two connections, both used."""
    path, key = tmp_path / "vault.sock", tmp_path / "key"
    key.write_bytes(bytes(32))
    with Faulty() as vault, ExitStack() as stack:
        vault.on("auth/kubernetes/login", dataclasses.replace(token("hvs.made-up"), together=2, stall=0.05))
        vault.on("secret/data/app", secret({"password": "swordfish"}))
        flags_ = ("--max-connections=2", f"--vault-addr={vault.address}", f"--hmac-key-file={key}", "--revoke=never")
        running = stack.enter_context(daemon("provider.cli", path, *flags_))
        running.told("mounts are served")
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{path}"))
        mount = service_pb2_grpc.CSIDriverProviderStub(channel).Mount
        by_audience = json.dumps({"vault": {"token": "made-up", "expirationTimestamp": "2100-01-01T00:00:00Z"}})
        pods = [{"csi.storage.k8s.io/pod.uid": f"uid-{number}", TOKENS: by_audience} for number in range(4)]
        texts = [json.dumps(json.loads(attributes("secret/data/app")) | pod) for pod in pods]
        calls = [
            mount.future(service_pb2.MountRequest(attributes=text, target_path="/volume", permission="420"))
            for text in texts
        ]
        assert [call.result().files[0].contents for call in calls] == [b"swordfish"] * 4
        assert vault.most_connections == 2


def test_signal_before_the_start_is_done_is_heeded(tmp_path: Path) -> None:
    """A signal while the daemon still imports its parts, in a finalizer even, ends it with 0 before it serves."""
    # Stands before the real uvloop on the path, and is imported in the midst of the start.
    (tmp_path / "uvloop.py").write_text(
        "import os, signal, sys\n"
        "class Finalized:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Finalized()\n"
        "sys.path.remove(os.path.dirname(__file__))\n"
        "del sys.modules['uvloop']\n"
        "import uvloop\n"
    )
    argv = [sys.executable, "-m", "provider.cli", f"--endpoint={tmp_path}/vault.sock", "--health-addr="]
    done = subprocess.run(
        argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["stopped"]


def test_mounts_in_flight_and_those_that_arrive_are_answered(tmp_path: Path) -> None:
    """After SIGTERM, a mount that takes longer than the daemon serves on is answered, and so is one that arrives."""
    path = tmp_path / "vault.sock"
    with daemon("tests.daemon", path) as running:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            call = service_pb2_grpc.CSIDriverProviderStub(channel).Mount

            def mount(seconds: float) -> Any:
                scripted = attributes(f"sleep/{seconds}")
                request = service_pb2.MountRequest(attributes=scripted, target_path="/volume", permission="420")
                return call.future(request, wait_for_ready=True)

            mount(0).result()
            in_flight = mount(4)
            # A second mount that is answered shows that the first one has arrived.
            mount(0).result()
            running.signal(signal.SIGTERM)
            while path.exists():
                time.sleep(0.01)
            arriving = mount(0.1)
            assert arriving.result().files
            assert in_flight.result().files
        assert running.ended() == 0


@pytest.mark.parametrize("level", ["info", "off"])
def test_endpoint_that_cannot_be_is_one_line_and_exit_code_1(tmp_path: Path, level: str) -> None:
    """A file at the endpoint ends the daemon with 1 and one line that says why, even with the log off."""
    path = tmp_path / "vault.sock"
    path.write_text("precious")
    with daemon("provider.cli", path, f"--log-level={level}") as running:
        assert running.ended() == 1
        (event,) = running.events()
    assert event["severity"] == "CRITICAL"
    assert f"--endpoint {path} exists and is not a socket" in event["message"]
    assert path.read_text() == "precious"


def test_grpcs_own_complaints_are_silent(tmp_path: Path) -> None:
    """Where gRPC cannot bind, its plain text does not get between the lines of JSON."""
    argv = [sys.executable, "-m", "provider.cli", "--endpoint=/proc/vault.sock", "--health-addr="]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert [json.loads(line)["severity"] for line in done.stderr.splitlines()] == ["CRITICAL"]


def test_bug_at_the_start_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception nobody thought of ends the daemon with 1 and one line with its type, and no traceback."""
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")

    def build(settings: Settings) -> Any:
        raise RuntimeError("broken part")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([f"--endpoint={tmp_path}/vault.sock", "--health-addr=", "--log-format=text"], build) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "CRITICAL provider.cli.daemon: cannot serve: RuntimeError: broken part" in err


def test_daemon_listens_on_its_health_port_and_is_ready(tmp_path: Path) -> None:
    """The daemon serves /health/ready, 200 while it mounts and 503 once it stops; a port that is taken
    stops no mount."""
    path = tmp_path / "vault.sock"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with daemon("tests.daemon", path, f"--health-addr=127.0.0.1:{port}") as running, Driver(path) as driver:
            assert driver.version().version == "v1alpha1"
            running.told("the health port cannot be opened")
            assert "ERROR" in [event["severity"] for event in running.events()]
            assert driver.version().version == "v1alpha1"
    with daemon("tests.daemon", path, f"--health-addr=127.0.0.1:{port}") as running:
        running.told("health is served")
        running.told("mounts are served")
        assert ready(port) == 200
        running.signal(signal.SIGTERM)
        running.told("stopping")
        assert ready(port) == 503
        assert running.ended() == 0


def ready(port: int) -> int:
    """The status of /health/ready."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status


def test_environment_of_grpc_is_the_operators_if_set(tmp_path: Path) -> None:
    """GRPC_VERBOSITY is NONE unless the operator asks gRPC to speak."""
    code = (
        "import os; from tests.daemon import build; from provider.cli import main;"
        f"main(['--endpoint={tmp_path}/no/vault.sock', '--health-addr='], build); print(os.environ['GRPC_VERBOSITY'])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    for given_, expected in ((None, "NONE"), ("ERROR", "ERROR")):
        env = environ if given_ is None else environ | {"GRPC_VERBOSITY": given_}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == expected
