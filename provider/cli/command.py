"""What a command line and the environment ask for: the flags' texts -> Settings, or a fault in one line.

The syntax is that of Go's flag package, since the arguments of the Go provider's DaemonSets and Helm charts come
here unchanged: one dash or two, ``-flag=value`` or ``-flag value``, and booleans that take a value only after ``=``.
argparse takes a boolean's value from the next argument or from nowhere, so it cannot read these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from provider.cli.flags import DEFAULT_HEALTH_ADDRESS, FLAGS, PROGRAM, PROXY_VARIABLE, STATUS, Flag, help_text
from provider.cli.readers import split_listen_address
from provider.errors import InvalidSetting
from provider.notation import BOOLEANS
from provider.redact import one_line
from provider.settings import Settings, TlsSettings

# What can stand in for "VAULT" at the start of a variable.
_ENV_PREFIX, _OTHER_ENV_PREFIX = "VAULT_", "BAO_"

# What the Go providers read by way of Vault's client, and this one does not, with what to do instead.
UNREAD: Final = {
    "VAULT_AGENT_ADDR": "name Vault's own address by VAULT_ADDR: no agent is needed",
    "VAULT_CACERT_BYTES": "write the certificates to a file, and name it by VAULT_CACERT",
    "VAULT_HTTP_PROXY": "write VAULT_PROXY_ADDR",
    "VAULT_SRV_LOOKUP": "name host and port by VAULT_ADDR",
    "VAULT_DISABLE_REDIRECTS": "a token is sent nowhere but to allowed addresses",
    "VAULT_CLIENT_TIMEOUT": "--mount-timeout bounds each mount",
    "VAULT_MAX_RETRIES": "what may be sent again is decided by request",
    "VAULT_RATE_LIMIT": "--max-connections bounds what Vault is asked at once",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What a command line asks for: ``settings`` to serve with, a daemon's ``status``, or a ``text`` to print."""

    settings: Settings | None
    text: str = ""
    status: StatusQuery | None = None


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """Where a running daemon is to be asked, and how to print what it says: as "text" or "json"."""

    address: tuple[str, int]
    style: str


def parse(arguments: Sequence[str], environ: Mapping[str, str], version: Callable[[str], str]) -> Command:
    """What ``arguments`` (without the program's name) and the environment ask for.

    A flag wins over the environment, OpenBao's spelling over Vault's, the last of one spelling over those before.
    ``version`` gives the text of ``--version`` in a format ("text" or "json").

    Raises InvalidSetting that names the flag or variable and what is allowed.
    """
    wants_status = bool(arguments) and arguments[0] == STATUS
    given = _split(arguments[1:] if wants_status else arguments)
    if given is None:
        return Command(None, help_text())
    asked = {flag.name: _from_flags(flag, given) for flag in FLAGS}
    if wants_status:
        return Command(None, status=_status_query(asked))
    if asked["version"]:
        return Command(None, version(asked["output"] or "text"))
    value = {
        flag.name: _from_environment(flag, environ) if asked[flag.name] is None else asked[flag.name] for flag in FLAGS
    }
    ca_cert, ca_directory = _cas(given, environ)
    tls = TlsSettings(
        ca_cert=ca_cert,
        ca_directory=ca_directory,
        server_name=value["vault-tls-server-name"],
        client_cert=value["vault-tls-client-cert"],
        client_key=value["vault-tls-client-key"],
        skip_verify=value["vault-tls-skip-verify"],
    )
    if bool(tls.client_cert) != bool(tls.client_key):
        half, other = ("cert", "key") if tls.client_cert else ("key", "cert")
        raise InvalidSetting(
            f"--vault-tls-client-{half} cannot be without --vault-tls-client-{other}",
            "give both or neither, by flags or their variables",
        )
    settings = Settings(
        endpoint=value["endpoint"],
        log_level="debug" if value["debug"] else value["log-level"],
        log_format=value["log-format"],
        health_addr=value["health-addr"],
        metrics_addr=value["metrics-addr"],
        audit_log=value["audit-log"],
        vault_addr=value["vault-addr"],
        vault_mount=value["vault-mount"],
        vault_namespace=value["vault-namespace"],
        tls=tls,
        vault_proxy_addr=next((text for _, text in _variables(PROXY_VARIABLE, environ)), ""),
        hmac_secret_name=value["hmac-secret-name"],
        hmac_key_file=value["hmac-key-file"],
        max_connections=value["max-connections"],
        cache_size=value["cache-size"],
        kubeconfig=value["kubeconfig"],
        mount_timeout=value["mount-timeout"],
        renew_percent=value["renew-percent"],
        refresh_after=value["refresh-after"],
        share_reads=value["share-reads"],
        state_dir=value["state-dir"],
        sweep_interval=value["sweep-interval"],
        node_name=value["node-name"],
        pod_name=environ.get("POD_NAME", ""),
        pod_namespace=environ.get("POD_NAMESPACE", ""),
        revoke=value["revoke"],
        templates=value["templates"],
        hardened=value["hardened"],
        allowed_vault_addresses=value["allowed-vault-addresses"],
        allow_skip_tls_verify=value["allow-skip-tls-verify"],
        tls_root=value["tls-root"],
        unknown_fields_fail=value["unknown-fields"],
        max_pod_mounts=value["max-pod-mounts"],
        max_pod_objects=value["max-pod-objects"],
        max_pod_mib=value["max-pod-mib"],
    )
    return Command(settings)


def _status_query(asked: Mapping[str, Any]) -> StatusQuery:
    address = asked["health-addr"]
    found = split_listen_address(DEFAULT_HEALTH_ADDRESS if address is None else address)
    if found is None:
        raise InvalidSetting(
            '--health-addr="" leaves the status command nobody to ask', "give the daemon a health address"
        )
    return StatusQuery(found, asked["output"] or "text")


def _split(arguments: Sequence[str]) -> dict[str, str] | None:
    """The texts given by spelling; None where help is asked for."""
    known = {spelling: flag for flag in FLAGS for spelling in flag.spellings}
    given: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        found = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if found is None:
            raise _stray(argument)
        name, text = found[1], found[2]
        if name in ("h", "help"):
            return None
        flag = known.get(name)
        if flag is None:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            raise InvalidSetting(
                f"there is no flag --{one_line(name, 80)}",
                f"did you mean --{near[0]}? All flags: {PROGRAM} --help" if near else f"see {PROGRAM} --help",
            )
        if text is None:
            text = "true" if flag.boolean else next(left, None)
        if text is None:
            raise InvalidSetting(f"--{name} needs a value", f"write --{name}={flag.placeholder}")
        given[name] = text
        _read(flag, f"--{name}", text)
    return given


def _stray(argument: str) -> InvalidSetting:
    told = one_line(argument, 80)
    if argument in BOOLEANS:
        return InvalidSetting(f'"{told}" is no flag', f"a boolean's value follows an equals sign: --debug={told}")
    return InvalidSetting(f'"{told}" is no flag', f"allowed are flags alone; see {PROGRAM} --help")


def _read(flag: Flag, source: str, text: str) -> Any:
    """The value of ``text``, or None where it says nothing."""
    if not text and not flag.empty_counts and not flag.boolean:
        return None
    try:
        return flag.read(text)
    except ValueError as error:
        raise InvalidSetting(f'{source} cannot be "{one_line(text, 120)}"', f"allowed: {error}") from None


def _from_flags(flag: Flag, given: Mapping[str, str]) -> Any:
    values = (_read(flag, f"--{name}", given[name]) for name in flag.spellings if name in given)
    return next((value for value in values if value is not None), None)


def _spelled(variable: str) -> tuple[str, str]:
    """The spellings of an environment variable, the strongest first."""
    return variable.replace(_ENV_PREFIX, _OTHER_ENV_PREFIX, 1), variable


def _variables(variable: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The spellings of ``variable`` that are set and not empty, the strongest first."""
    for name in _spelled(variable):
        if environ.get(name):
            yield name, environ[name]


def unread(environ: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each variable that is set, and that whoever set it may take for read."""
    for variable, instead in UNREAD.items():
        for name, _ in _variables(variable, environ):
            yield f"{name} is set, and not read here: {instead}"


def _from_environment(flag: Flag, environ: Mapping[str, str]) -> Any:
    if flag.variable:
        for name, text in _variables(flag.variable, environ):
            return _read(flag, name, text)
    # A boolean without a default is neither true nor false while nobody says.
    return None if flag.boolean and not flag.default else flag.read(flag.default)


def _cas(given: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, str]:
    """The CA file and the CA directory, both of the strongest level that names either.

    Whoever names one says who is trusted: added to it, a weaker level's file would be trusted instead, since the file
    wins over the directory.
    """
    file, directory = (flag for flag in FLAGS if flag.name in ("vault-tls-ca-cert", "vault-tls-ca-directory"))
    levels = [
        *((given, "--", *names) for names in zip(file.spellings, directory.spellings, strict=True)),
        *((environ, "", *names) for names in zip(_spelled(file.variable), _spelled(directory.variable), strict=True)),
    ]
    for texts, dashes, of_file, of_directory in levels:
        ca_cert = _read(file, dashes + of_file, texts.get(of_file, ""))
        ca_directory = _read(directory, dashes + of_directory, texts.get(of_directory, ""))
        if ca_cert or ca_directory:
            return ca_cert or "", ca_directory or ""
    return "", ""
