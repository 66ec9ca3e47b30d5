"""The attributes that the driver sends -> pod, Vault server and login (docs/contract.md sections 1 and 2)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from provider.notation import BOOLEANS
from provider.redact import Sensitive, one_line
from provider.settings import MAX_ATTRIBUTES_BYTES, Settings, TlsSettings
from provider.spc import paths
from provider.spc.addresses import AllowedAddresses, remedy
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import Login, Pod, VaultServer
from provider.spc.objects import duration
from provider.spc.tables import PARAMETERS

POD_NAME: Final = "csi.storage.k8s.io/pod.name"
POD_NAMESPACE: Final = "csi.storage.k8s.io/pod.namespace"
POD_UID: Final = "csi.storage.k8s.io/pod.uid"
SERVICE_ACCOUNT: Final = "csi.storage.k8s.io/serviceAccount.name"
TOKENS: Final = "csi.storage.k8s.io/serviceAccount.tokens"
CLASS_NAME: Final = "secretProviderClass"
_DRIVERS_OWN: Final = "csi.storage.k8s.io/"

# The spellings of a prefix, the winner first (docs/contract.md section 2).
_PREFIXES: Final = ("bao", "openbao", "vault")
_PREFIXED: Final = (
    *(field.name.removeprefix("vault") for field in PARAMETERS if field.name.startswith("vault")),
    "RoleName",
)
_SPELLINGS: Final = {
    name: (*(prefix + name for prefix in _PREFIXES), *(("roleName",) if name == "RoleName" else ()))
    for name in _PREFIXED
}
NAMES: Final = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}
_NOT_GIVEN: Final = {name: ("", f"vault{name}") for name in _PREFIXED}
_FILES: Final = ("CACertPath", "CADirectory", "TLSClientCertPath", "TLSClientKeyPath")
KNOWN: Final = (
    "audience",
    "objects",
    "refreshAfter",
    *(spelling for name in _PREFIXED for spelling in _SPELLINGS[name]),
)

# A class has some 20 parameters, and a Secret holds 1 MiB.
_MAX_ENTRIES: Final = 1000
# A pod has a token or two, of a few KiB each; JSON that is all brackets takes 30 times its size in memory.
_MAX_TOKENS_BYTES: Final = 256 * 1024

# Kubernetes' own names: they stand in URLs of its API.
_KUBERNETES_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
# The quote before a name is looked for last: what begins with plain text is found several times as fast.
_OF_POD: Final = re.compile(
    rf'({re.escape(_DRIVERS_OWN)}(?<=[\s{{,]"{re.escape(_DRIVERS_OWN)})(?:pod\.(?:name|namespace|uid)|serviceAccount\.name))'
    r'"\s*:\s*"([^"\\]{1,253})"'
)
_OF_CLASS: Final = re.compile(rf'(?<!\\)"{CLASS_NAME}"\s*:\s*"([^"\\]{{1,253}})"')
_SPACE: Final = (" ", "\t", "\r", "\n")
# Of a host's name, and of what is between its dots.
_MAX_NAME: Final = 253
_MAX_LABEL: Final = 63
# Of an address: no server's is longer.
MAX_ADDRESS: Final = 2048
# Characters of a role, an auth mount, an audience, and of a Vault namespace, which may be a path of several.
MAX_LOGIN_TEXT: Final = 512
_SCHEMES: Final = "write http://host:port, https://host:port or unix:///path/to/socket"


def string_map(text: str) -> dict[str, str]:
    """A JSON object of strings, of at most MAX_ATTRIBUTES_BYTES. Raises Refused, never repeating a value.

    Go's map[string]string is all that the driver sends, so nothing else is ever built in memory.
    """
    if len(text) > MAX_ATTRIBUTES_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_ATTRIBUTES_BYTES:
        raise Refused(f"is larger than {MAX_ATTRIBUTES_BYTES} bytes", "make the class smaller")
    decoder = json.JSONDecoder()
    entries: dict[str, str] = {}
    at = _skip(text, _after(text, 0, "{"))
    # Counted as written, since a name that is there already costs as much.
    read = 0
    more = text[at : at + 1] != "}"
    at += not more
    while more:
        read += 1
        if read > _MAX_ENTRIES:
            raise Refused(f"has more than {_MAX_ENTRIES} entries", "remove those that are not needed")
        key, at = _string(decoder, text, at, "a name")
        at = _after(text, at, ":")
        entries[key], at = _string(decoder, text, at, "a value")
        at = _after(text, at, ",", "}")
        more = text[at - 1] == ","
    if _skip(text, at) != len(text):
        raise _not_json("there is text after its end")
    return entries


def _skip(text: str, at: int) -> int:
    """The position of what follows the white space at ``at``."""
    while text[at : at + 1] in _SPACE:
        at += 1
    return at


def _after(text: str, at: int, *expected: str) -> int:
    if text[at : at + 1] in expected:
        return at + 1
    at = _skip(text, at)
    if text[at : at + 1] not in expected:
        raise _not_json(f"{' or '.join(expected)} is missing at character {at}")
    return at + 1


def _string(decoder: json.JSONDecoder, text: str, at: int, what: str) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        at = _skip(text, at)
    if text[at : at + 1] == '"':
        try:
            value, end = decoder.raw_decode(text, at)
            # A lone surrogate is no character; nothing could send it on.
            value.encode()
            return str(value), end
        except ValueError:
            pass
    # Out here, where the decoder's error does not go along: it carries the whole text.
    raise _not_json(f"{what} at character {at} is not a string")


def _not_json(problem: str) -> Refused:
    return Refused(f"is not a JSON object of strings, {problem}", "the driver writes it: look at the driver's version")


def permission(text: str) -> int:
    """The request's permission, the mode of files: a JSON number, 0 to 0777 (in decimal, as 420). Raises Refused."""
    if not re.fullmatch("0|[1-9][0-9]{0,2}", text) or int(text) > 0o777:
        raise Refused("is not a number from 0 to 511", "the driver sends the mode in decimal, 420 for 0644")
    return int(text)


def tokens(text: str) -> dict[str, Sensitive[str]]:
    """The JWTs that kubelet made for the pod, by audience. Raises Refused, repeating nothing of the text."""
    found: object = None
    if len(text) <= _MAX_TOKENS_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
            found = {} if found is None else found
    by_audience: dict[str, Sensitive[str]] = {}
    if isinstance(found, dict):
        for audience, entry in found.items():
            token = entry.get("token") if isinstance(entry, dict) else None
            if isinstance(token, str) and token and token.isascii():
                by_audience[audience] = Sensitive(token)
    if not isinstance(found, dict) or len(by_audience) != len(found):
        raise Refused(
            "is not a JSON object of tokens by audience",
            "kubelet writes it: do not set it in parameters or volumeAttributes",
        )
    return by_audience


def pod_tokens(attributes: Mapping[str, str], secrets: str, findings: Findings) -> dict[str, Sensitive[str]]:
    """The pod's JWTs, from the attributes and from the request's ``secrets``, which may hold the same key.

    What ``secrets`` holds wins: a class's author can put a key into attributes, but not there.
    """
    found = _tokens_at(TOKENS, attributes.get(TOKENS, ""), findings)
    if secrets.strip() not in ("", "null"):
        published: dict[str, str] = findings.attempt("secrets", string_map, secrets, {})
        found |= _tokens_at(f"secrets {TOKENS}", published.get(TOKENS, ""), findings)
    return found


def _tokens_at(where: str, text: str, findings: Findings) -> dict[str, Sensitive[str]]:
    return findings.attempt(where, tokens, text, {}) if text else {}


def address(text: str) -> str:
    """A Vault address without a slash at its end, its scheme and host in lower case. Raises Refused."""
    if len(text) > MAX_ADDRESS:
        raise Refused(f"has more than {MAX_ADDRESS} characters", _SCHEMES)  # Python keeps each that it takes apart
    if re.search(r"[\x00-\x20\x7f-\xa0]", text):
        raise Refused("holds white space or a control character", _SCHEMES)
    try:
        url = urlsplit(text)
        port = url.port  # parsed when asked for
    except ValueError:
        raise Refused("is not a URL", _SCHEMES) from None
    if port == 0:
        raise Refused("has the port 0", _SCHEMES)
    if "@" in url.netloc:
        raise Refused("holds a user or a password", "write the address without them; roleName is how to log in")
    if url.scheme not in ("http", "https", "unix"):
        raise Refused("has no known scheme", _SCHEMES)
    if "?" in text or "#" in text:
        raise Refused("has a query or a fragment", "write the address without it")
    if url.scheme == "unix" and (url.netloc or not url.path.strip("/")):
        raise Refused("names no socket by its absolute path", _SCHEMES)
    if url.scheme != "unix" and not url.hostname:
        raise Refused("has no host", _SCHEMES)
    _check_name(url.hostname or "")
    paths.refuse_dots(url.path)
    return f"{url.scheme}://{url.netloc.lower()}{url.path.rstrip('/')}"


def _check_name(name: str) -> None:
    """Raise Refused if a host's name is longer than DNS allows (RFC 1035 section 2.3.4)."""
    if len(name.removesuffix(".")) > _MAX_NAME or any(len(label) > _MAX_LABEL for label in name.split(".")):
        raise Refused(
            f"has a host name of more than {_MAX_NAME} characters, or {_MAX_LABEL} between dots",
            "write the name that DNS has, or an IP address",
        )


def mounting_pod(attributes: str) -> Pod | None:
    """The pod that the attributes are of, found without reading the rest of them; None where it is not told.

    A text within the JSON cannot pass for one of its names: before a quote in a text there is a backslash.
    """
    given = dict(_OF_POD.findall(attributes))
    named = [given.get(key, "") for key in (POD_NAMESPACE, POD_NAME, POD_UID, SERVICE_ACCOUNT)]
    return Pod(*named) if all(map(_KUBERNETES_NAME.fullmatch, named)) else None


def mounting_class(attributes: str) -> str:
    """The SecretProviderClass that the attributes are of, found in the same way; "" where it is not told."""
    named = _OF_CLASS.search(attributes)
    return named[1] if named and _KUBERNETES_NAME.fullmatch(named[1]) else ""


class Parameters:
    """The attributes by meaning, whichever way they are spelled. What is wrong goes to ``findings``."""

    def __init__(self, attributes: Mapping[str, str], findings: Findings) -> None:
        self._attributes = attributes
        self._findings = findings
        # Those that are given are looked for when they are asked for, and what a spelling wins over is told once.
        self._winners = dict(_NOT_GIVEN)
        for key in attributes:
            self._winners.pop(NAMES.get(key, ""), None)
        authors = [key for key in attributes if key != CLASS_NAME and not key.startswith(_DRIVERS_OWN)]
        findings.unknown("parameters", "parameter", authors, KNOWN)

    def text(self, name: str) -> str:
        """The attribute of exactly this name; "" where it is unset."""
        return self._attributes.get(name, "")

    def pod(self) -> Pod:
        """The pod; all its fields are required."""
        return Pod(
            namespace=self._kubernetes_name(POD_NAMESPACE),
            name=self._kubernetes_name(POD_NAME),
            uid=self._kubernetes_name(POD_UID),
            service_account=self._kubernetes_name(SERVICE_ACCOUNT),
        )

    def server(self, settings: Settings, allowed: AllowedAddresses) -> VaultServer:
        """Where Vault is: each parameter of the class over the operator's setting, as far as the operator allows."""
        given, spelling = self._folded("Address")
        if given:
            # A password in it would be shown.
            where = f"{spelling} {show(given)}" if "@" not in given else spelling
            there = self._findings.attempt(where, address, given, "")
            if there and not allowed.allows(there):
                advice = f"leave it out, or look for a slip in it; else {remedy(there)}"
                self._findings.fault(where, "is not an address that the daemon's operator allows", advice)
        else:
            there = settings.vault_addr
        return VaultServer(
            address=there,
            # Vault reads it from a header, whose blanks at both ends do not count.
            namespace=(self._short(*self._clean("Namespace")) or settings.vault_namespace).strip(" /"),
            # Where the list is open, the operator's certificate goes along everywhere, as the Go providers have it.
            tls=self._tls(settings, operators_server=allowed.open or allowed.names(there)),
        )

    def login(self, settings: Settings) -> Login:
        """How the pod logs in."""
        role, role_spelling = self._folded("RoleName")
        self._short(role, role_spelling)
        if not role:
            self._findings.fault("roleName", "is missing", "name the Vault role to log in with")
        mount, mount_spelling = self._folded("AuthMountPath")
        older, older_spelling = self._folded("KubernetesMountPath")
        if mount and older:
            self._findings.fault(
                f"{mount_spelling} {show(mount)}",
                f"is given besides {older_spelling} {show(older)}",
                "remove one",
            )
        given = self._short(mount or older, mount_spelling if mount else older_spelling)
        where = f"{mount_spelling if mount else older_spelling} {show(given)}"
        return Login(
            mount=self._findings.attempt(where, paths.auth_mount, given, "") if given else settings.vault_mount,
            role=role,
            audience=self._short(self.text("audience"), "audience") or None,
        )

    def refresh_after(self, settings: Settings) -> float:
        """How old an answer from memory may be, in seconds, for objects that say nothing of their own."""
        given = self.text("refreshAfter")
        if not given:
            return settings.refresh_after
        return self._findings.attempt(f"refreshAfter {show(given)}", duration, given, 0.0)

    def _folded(self, name: str) -> tuple[str, str]:
        """The value and the spelling that win for a parameter; ("", usual spelling) where none is given."""
        if name in self._winners:
            return self._winners[name]
        winner = self._winners[name] = self._fold(name)
        return winner

    def _fold(self, name: str) -> tuple[str, str]:
        given = [(self._attributes[key], key) for key in _SPELLINGS[name] if self._attributes.get(key)]
        if not given:
            return _NOT_GIVEN[name]
        value, winner = given[0]
        losers = [key for other, key in given if other != value]
        if losers:
            self._findings.warn(winner, f"wins over {' and '.join(losers)}, which differs")
        return value, winner

    def _clean(self, name: str) -> tuple[str, str]:
        """As ``_folded``, with a control character noted."""
        value, spelling = self._folded(name)
        if paths.CONTROL.search(value):
            self._findings.fault(f"{spelling} {show(value)}", "holds a control character", "remove it")
        return value, spelling

    def _short(self, value: str, spelling: str) -> str:
        """``value``, with a fault noted where it is longer than any that there is: each makes a session of its own."""
        if len(value) > MAX_LOGIN_TEXT:
            advice = f"it may have {MAX_LOGIN_TEXT} characters"
            self._findings.fault(spelling, f"has {len(value)} characters", advice)
        return value

    def _cas(self, operators: TlsSettings) -> tuple[str, str]:
        """The CA file and the CA directory, both of whoever names either.

        Whoever names one says who is trusted: added to it, the file of a weaker spelling or of the operator would be
        trusted instead, since the file wins over the directory.
        """
        (file, file_spelling), (directory, directory_spelling) = self._clean("CACertPath"), self._clean("CADirectory")
        if not file and not directory:
            return operators.ca_cert, operators.ca_directory
        if file and directory:
            file_rank = _SPELLINGS["CACertPath"].index(file_spelling)
            directory_rank = _SPELLINGS["CADirectory"].index(directory_spelling)
            if file_rank < directory_rank:
                self._findings.warn(file_spelling, f"wins over {directory_spelling}")
                return file, ""
            if directory_rank < file_rank:
                self._findings.warn(directory_spelling, f"wins over {file_spelling}")
                return "", directory
        return file, directory

    def _tls(self, settings: Settings, *, operators_server: bool) -> TlsSettings:
        """The TLS settings. ``operators_server``: the operator's client certificate may go there."""
        operators = settings.tls
        ca_cert, ca_directory = self._cas(operators)
        client_cert, client_key = self._client(settings, operators_server=operators_server)
        for name in _FILES:
            given, spelling = self._folded(name)
            if given:
                self._confine(given, spelling, settings)
        # The operator's own file is the same one, and needs no second connection, whoever names it.
        own_cas = (ca_cert, ca_directory) == (operators.ca_cert, operators.ca_directory)
        own_client = (client_cert, client_key) == (operators.client_cert, operators.client_key)
        return TlsSettings(
            ca_cert=ca_cert,
            ca_directory=ca_directory,
            server_name=self._server_name() or operators.server_name,
            client_cert=client_cert,
            client_key=client_key,
            skip_verify=self._skip_verify(settings),
            ca_root="" if own_cas else settings.tls_root,
            client_root="" if own_client or not client_cert else settings.tls_root,
        )

    def _server_name(self) -> str:
        name, spelling = self._clean("TLSServerName")
        if name:
            self._findings.attempt(f"{spelling} {show(name)}", _check_name, name, None)
        return name

    def _client(self, settings: Settings, *, operators_server: bool) -> tuple[str, str]:
        """The client's certificate and its key."""
        operators = settings.tls
        (cert, _), (key, _) = self._clean("TLSClientCertPath"), self._clean("TLSClientKeyPath")
        if cert or key:
            # Where a class's files are confined, what it did not name is not made up by a file that is not.
            if not _confined(settings):
                cert, key = cert or operators.client_cert, key or operators.client_key
        elif operators_server:
            cert, key = operators.client_cert, operators.client_key
        elif operators.client_cert:
            self._findings.warn(
                "vaultAddress",
                "is sent no client certificate: the daemon's goes to addresses alone that --vault-addr or a URL in "
                "--allowed-vault-addresses names, not to what a pattern matches",
            )
        if bool(cert) != bool(key):
            missing, present = ("Key", "Cert") if cert else ("Cert", "Key")
            self._findings.fault(
                f"vaultTLSClient{missing}Path",
                f"is missing where vaultTLSClient{present}Path is given",
                "give the client's certificate and its key, or neither",
            )
        return cert, key

    def _confine(self, given: str, spelling: str, settings: Settings) -> None:
        """Note a file that lies outside of the operator's directory by its path; symlinks are for who opens it."""
        root = settings.tls_root.rstrip("/")
        elements = given.split("/")
        inside = ".." not in elements and (given == root or given.startswith(f"{root}/"))
        if _confined(settings) and not (settings.tls_root and inside):
            directory = given if spelling.endswith("CADirectory") else given.rpartition("/")[0] or "/"
            flag = f"the daemon's --tls-root={one_line(directory, 80)} would allow it"
            usable = given.startswith("/") and ".." not in elements
            self._findings.fault(
                f"{spelling} {show(given)}",
                "is a file that the daemon's operator does not let a class name",
                flag if usable else "write its path from /, without .., below the daemon's --tls-root",
            )

    def _skip_verify(self, settings: Settings) -> bool:
        given, spelling = self._folded("SkipTLSVerify")
        if not given:
            return settings.tls.skip_verify
        where = f"{spelling} {show(given)}"
        skip = self._findings.attempt(where, _boolean, given, False)
        if skip and not (settings.skipping_tls_verify_allowed or settings.tls.skip_verify):
            self._findings.fault(
                where,
                "is not allowed by the daemon's operator",
                "give the server's CA by vaultCACertPath; the daemon's --allow-skip-tls-verify=true would allow it",
            )
        return skip

    def _kubernetes_name(self, key: str) -> str:
        value = self.text(key)
        if not value:
            self._findings.fault(key, "is missing", "the CSIDriver object needs podInfoOnMount: true")
        elif not _KUBERNETES_NAME.fullmatch(value):
            self._findings.fault(
                f"{key} {show(value)}", "is not a name that Kubernetes gives", "do not set it in the class"
            )
        return value


def _confined(settings: Settings) -> bool:
    """Whether the files that a class may name are those below a directory, or none."""
    return settings.hardened or bool(settings.tls_root)


def _boolean(text: str) -> bool:
    if text not in BOOLEANS:
        raise Refused("is not a boolean", 'write "true" or "false"')
    return BOOLEANS[text]
