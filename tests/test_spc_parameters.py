"""Attributes, secrets and permission: docs/contract.md section 1 and the parameters of section 2."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from provider.cli import command
from provider.errors import Code, InvalidClass, InvalidSetting
from provider.settings import MAX_ATTRIBUTES_BYTES, Settings, TlsSettings
from provider.spc import Login, Parser, Pod, VaultServer, mounting_class, mounting_pod
from provider.spc.parameters import MAX_LOGIN_TEXT
from tests.spc_classes import GIVEN, OBJECT, TOKENS, attributes, fault, faults, parse, parse_class

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ3ZWIifQ.c2lnbmF0dXJl"


def refusal(attributes: str, secrets: str = "null", permission: str = "420") -> str:
    with pytest.raises(InvalidClass) as refused:
        parse(attributes, secrets, permission)
    (found,) = refused.value.faults
    return found


def tokens(**by_audience: str) -> str:
    return json.dumps(
        {
            audience: {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}
            for audience, token in by_audience.items()
        }
    )


# --- pod, class and target --------------------------------------------------------------------------------


def test_the_pod_is_who_the_driver_says() -> None:
    """Pod, class name and target path come from what the driver adds to the attributes."""
    spec = parse_class()
    assert spec.pod == Pod("shop", "web-0", "8f3c2c1e-5b7a-4d0c-9a52-0c9de8b2a6b1", "web")
    assert str(spec.pod) == "shop/web-0"
    assert spec.class_name == "web-secrets"
    assert spec.target_path == "/pods/web-0/mount"
    assert spec.warnings == ()


@pytest.mark.parametrize("field", ["pod.name", "pod.namespace", "pod.uid", "serviceAccount.name"])
def test_a_pod_without_its_fields_is_refused(field: str) -> None:
    """Where the CSIDriver object lacks podInfoOnMount, the fault says so, for each field."""
    found = fault(**{f"csi.storage.k8s.io/{field}": ""})
    assert found.startswith(f"csi.storage.k8s.io/{field}: is missing")
    assert "podInfoOnMount: true" in found


@pytest.mark.parametrize("value", ["../kube-system", "a/b", "a b", "-a", "a-", "é", "a" * 254, "a\n"])
def test_a_pod_with_a_name_that_kubernetes_does_not_give_is_refused(value: str) -> None:
    """The names stand in URLs of the Kubernetes API, so nothing else than a name passes."""
    assert "is not a name that Kubernetes gives" in fault(**{"csi.storage.k8s.io/pod.namespace": value})


def test_a_request_without_target_is_refused() -> None:
    """An empty target path is a fault."""
    with pytest.raises(InvalidClass, match="target_path: is missing"):
        Parser(Settings()).parse(attributes(), "null", "", "420")


def test_all_faults_come_at_once() -> None:
    """Faults of the request, of parameters and of several objects are in one error, which is INVALID_ARGUMENT."""
    objects = "- {objectName: a, secretPath: ..}\n- {objectName: /b, encoding: rot13, secretPath: x}"
    with pytest.raises(InvalidClass) as refused:
        parse(attributes(objects, roleName="", vaultAddress="nowhere"), "[]", "1000")
    assert [found.split(":")[0] for found in refused.value.faults] == [
        'permission "1000"',
        'vaultAddress "nowhere"',
        "roleName",
        "secrets",
        'objects[0] (a) secretPath ".."',
        'objects[1] (/b) objectName "/b"',
        'objects[1] (/b) encoding "rot13"',
    ]
    assert refused.value.code is Code.INVALID_ARGUMENT


# --- attributes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "{ is missing at character 0"),
        ("null", "{ is missing at character 0"),
        ("[]", "{ is missing at character 0"),
        ('{"a"', ": is missing at character 4"),
        ('{"a" "b"}', ": is missing at character 5"),
        ('{"a":"b"', ", or } is missing at character 8"),
        ('{"a":"b" "c":"d"}', ", or } is missing at character 9"),
        ('{"a":"b",}', "a name at character 9 is not a string"),
        ("{a:1}", "a name at character 1 is not a string"),
        ('{"a":1}', "a value at character 5 is not a string"),
        ('{"a":null}', "a value at character 5 is not a string"),
        ('{"a":"b}', "a value at character 5 is not a string"),
        ('{"a":"\n"}', "a value at character 5 is not a string"),
        ('{"a":"\\ud800"}', "a value at character 5 is not a string"),
        ('{"a":"\ud800"}', "a value at character 5 is not a string"),
        ('{"\\ud800":"a"}', "a name at character 1 is not a string"),
        ("{} {}", "there is text after its end"),
        ('{"a":"b"}x', "there is text after its end"),
    ],
)
def test_attributes_that_are_no_object_of_strings_are_refused(text: str, problem: str) -> None:
    """Each way to break the JSON is told, and where."""
    found = refusal(text)
    assert found.startswith("attributes: is not a JSON object of strings")
    assert problem in found


def test_attributes_may_have_white_space_and_escapes() -> None:
    """JSON's white space, escapes and repeated names (the last counts) are read as Go reads them."""
    text = attributes()[:-1] + ' ,\n\t"roleName" : "\\u0077eb" , "roleName":"shop\\n" \r} '
    assert parse(text).login.role == "shop\n"


def test_an_empty_object_is_an_object() -> None:
    """``{}`` is legal JSON; what is refused is all that it lacks."""
    with pytest.raises(InvalidClass) as refused:
        parse(" { } ")
    assert len(refused.value.faults) == 6


@pytest.mark.parametrize("filler", ["x", "é"])
def test_attributes_are_bounded_in_bytes(filler: str) -> None:
    """MAX_ATTRIBUTES_BYTES are read, and not one more, counted as UTF-8."""
    room = MAX_ATTRIBUTES_BYTES - len(attributes(comment="x")) + 1
    text = attributes(comment=filler * (room // len(filler.encode())))
    text += " " * (MAX_ATTRIBUTES_BYTES - len(text.encode()))
    assert parse(text).login.role == "web"
    assert refusal(text + " ").startswith("attributes: is larger than 2097152 bytes")


def test_attributes_are_bounded_in_number() -> None:
    """A thousand entries are read, and not one more."""
    room = 1000 - len(json.loads(attributes()))
    fill = {f"csi.storage.k8s.io/{n}": "x" for n in range(room)}
    assert parse(attributes(**fill)).login.role == "web"
    assert "has more than 1000 entries" in refusal(attributes(**fill, more="x"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("vaultAdress", ", did you mean vaultAddress?"),
        ("rolename", ", did you mean roleName?"),
        ("BAOADDRESS", ", did you mean baoAddress?"),
        ("quite-different", ""),
        ("objects" * 10, ""),
    ],
)
def test_a_parameter_that_nobody_knows_is_a_warning(key: str, hint: str) -> None:
    """It is ignored, and the nearest known parameter is named, whatever its case; its value is not shown."""
    spec = parse_class(**{key: "hunter2"})
    assert spec.warnings == (f'parameters: unknown parameter "{key}" is ignored{hint}',)


def test_what_the_driver_adds_is_no_unknown_parameter() -> None:
    """Anything under csi.storage.k8s.io/ is the driver's own affair."""
    assert parse_class(**{"csi.storage.k8s.io/new.in.2030": "x"}).warnings == ()


def test_warnings_are_bounded() -> None:
    """A hundred warnings are kept, the others counted."""
    spec = parse_class(**{f"unknown-{n}": "x" for n in range(150)})
    assert len(spec.warnings) == 101
    assert spec.warnings[-1] == "and 50 more warnings"


# --- prefixes ---------------------------------------------------------------------------------------------

PARAMETERS = {
    "Address": "https://vault.shop:8200",
    "Namespace": "team",
    "AuthMountPath": "k8s",
    "CACertPath": "/ca.pem",
    "CADirectory": "/ca",
    "TLSServerName": "vault.shop",
    "TLSClientCertPath": "/cert.pem",
    "TLSClientKeyPath": "/key.pem",
    "SkipTLSVerify": "true",
    "RoleName": "clerk",
}


@pytest.mark.parametrize("prefix", ["vault", "openbao", "bao"])
def test_each_prefix_means_the_same(prefix: str) -> None:
    """Every parameter works under each of the three prefixes, without a warning."""
    spec = parse_class(roleName="", **{prefix + name: value for name, value in PARAMETERS.items()})
    assert spec.server == VaultServer(
        "https://vault.shop:8200",
        "team",
        TlsSettings("/ca.pem", "/ca", "vault.shop", "/cert.pem", "/key.pem", skip_verify=True),
    )
    assert spec.login == Login("k8s", "clerk", None)
    assert spec.warnings == ()


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("winner", "loser"), [("bao", "openbao"), ("openbao", "vault"), ("bao", "vault")])
def test_bao_wins_over_openbao_over_vault(winner: str, loser: str, name: str) -> None:
    """Where two spellings disagree the winner is used, and a warning names both, not their values."""
    other = {"Address": "https://other:1", "SkipTLSVerify": "false"}.get(name, "other")
    # Of a CA file and a directory the stronger spelling's is taken alone: a test below.
    apart = {"CACertPath", "CADirectory"} if name in ("CACertPath", "CADirectory") else {name}
    rest = {f"vault{key}": value for key, value in PARAMETERS.items() if key not in apart}
    alone = parse_class(roleName="", **rest, **{winner + name: PARAMETERS[name]})
    spec = parse_class(roleName="", **rest, **{winner + name: PARAMETERS[name], loser + name: other})
    assert dataclasses.replace(spec, warnings=()) == alone
    assert spec.warnings == (f"{winner}{name}: wins over {loser}{name}, which differs",)


def test_all_spellings_of_the_role_are_one_parameter() -> None:
    """``roleName`` itself comes last."""
    spec = parse_class(roleName="a", vaultRoleName="b", openbaoRoleName="c", baoRoleName="d")
    assert spec.login.role == "d"
    assert spec.warnings == ("baoRoleName: wins over openbaoRoleName and vaultRoleName and roleName, which differs",)


def test_spellings_that_agree_are_no_warning() -> None:
    """The same value twice is what a class for both providers looks like."""
    assert parse_class(vaultNamespace="a", baoNamespace="a").warnings == ()


def test_an_empty_parameter_is_unset() -> None:
    """An empty string neither wins over another spelling nor over the daemon's setting."""
    text = json.dumps(
        {**GIVEN, "objects": OBJECT, "baoNamespace": "", "vaultNamespace": "a", "vaultAddress": "", "audience": ""}
    )
    spec = parse(text)
    assert spec.server.namespace == "a"
    assert spec.server.address == "https://127.0.0.1:8200"
    assert spec.login.audience is None


# --- login ------------------------------------------------------------------------------------------------


def test_a_class_without_role_is_refused() -> None:
    """The role is required."""
    assert fault(roleName="").startswith("roleName: is missing")


def test_the_audience_is_the_classes_or_none() -> None:
    """An audience is taken as it is written; none is None."""
    assert parse_class(audience="https://vault.shop/").login.audience == "https://vault.shop/"
    assert parse_class().login.audience is None


@pytest.mark.parametrize("spelling", ["AuthMountPath", "KubernetesMountPath"])
@pytest.mark.parametrize("text", ["k8s/eu", "/k8s/eu/", "auth/k8s/eu", "/auth//k8s//eu/"])
def test_an_auth_mount_is_named_in_several_ways(spelling: str, text: str) -> None:
    """Slashes around it and a leading auth/ do not belong to the name."""
    assert parse_class(**{f"vault{spelling}": text}).login.mount == "k8s/eu"


def test_the_default_mount_is_the_daemons() -> None:
    """Without a parameter the operator's mount is used."""
    assert parse(attributes(), settings=Settings(vault_mount="jwt")).login.mount == "jwt"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("//", "is empty"), ("a/../b", "element . or .."), ("%2e", "element . or .."), ("a\tb", "control character")],
)
def test_an_auth_mount_that_is_none_is_refused(text: str, problem: str) -> None:
    """Nothing passes that could lead to another path."""
    found = fault(vaultKubernetesMountPath=text)
    assert found.startswith("vaultKubernetesMountPath")
    assert problem in found


@pytest.mark.parametrize(("a", "b"), [("vault", "vault"), ("bao", "vault"), ("vault", "openbao")])
def test_both_names_of_the_auth_mount_are_an_error(a: str, b: str) -> None:
    """Giving AuthMountPath and KubernetesMountPath is refused whatever their prefixes, even if they agree."""
    found = fault(**{f"{a}AuthMountPath": "x", f"{b}KubernetesMountPath": "x"})
    assert found.startswith(f'{a}AuthMountPath "x": is given besides {b}KubernetesMountPath "x"')


# --- server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://vault.shop:8200", "https://vault.shop:8200"),
        ("https://vault.shop:8200/", "https://vault.shop:8200"),
        ("HTTPS://Vault.Shop/Base//", "https://vault.shop/Base"),
        ("http://[::1]:8200/a/b", "http://[::1]:8200/a/b"),
        ("unix:///run/vault.sock", "unix:///run/vault.sock"),
        ("unix:///run/Vault/", "unix:///run/Vault"),
    ],
)
def test_an_address_is_normalised(text: str, address: str) -> None:
    """Spellings of one server are one address; a base path stays. The daemon's own flag is read alike."""
    assert parse_class(vaultAddress=text).server.address == address
    settings = command.parse([f"--vault-addr={text}"], {}, str).settings
    assert settings is not None
    assert parse(attributes(), settings=settings).server.address == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vault.shop:8200", "has no known scheme"),
        ("127.0.0.1:8200", "has no known scheme"),
        ("ftp://vault.shop", "has no known scheme"),
        ("https://", "has no host"),
        ("https:vault.shop", "has no host"),
        ("https://:8200", "has no host"),
        ("https://vault.shop:99999", "is not a URL"),
        ("https://vault.shop:port", "is not a URL"),
        ("https://[::1", "is not a URL"),
        ("https://vault.shop/?a=b", "has a query or a fragment"),
        ("https://vault.shop/#a", "has a query or a fragment"),
        ("https://vault.shop/a/../b", "has an element . or .."),
        ("https://vault.shop/%2E%2e", "has an element . or .."),
        ("https://vault .shop", "holds white space"),
        ("https://vault.shop\n", "holds white space"),
        ("unix://run/vault.sock", "names no socket"),
        ("unix://", "names no socket"),
        ("unix:///", "names no socket"),
        ("https://vault.shop:0", "has the port 0"),
        ("https://vault.shop/" + "a" * 2048, "has more than 2048 characters"),
    ],
)
def test_a_wrong_address_is_refused(text: str, problem: str) -> None:
    """The fault names the parameter, the value and what is wrong with it. The daemon does not start with such a one."""
    found = fault(baoAddress=text)
    assert found.startswith("baoAddress ")
    assert problem in found
    with pytest.raises(InvalidSetting, match="this " + re.escape(problem)):
        command.parse([f"--vault-addr={text}"], {}, str)


@pytest.mark.parametrize("text", ["https://user:hunter2@vault.shop", "https://user:hunter2@vault.shop:x", "a@hunter2"])
def test_a_password_in_an_address_is_not_shown(text: str) -> None:
    """An address with a user is refused, and none of it repeated, whatever else is wrong with it."""
    found = fault(vaultAddress=text)
    assert found.startswith("vaultAddress: ")
    assert "hunter2" not in found


@pytest.mark.parametrize("name", ["roleName", "vaultNamespace", "audience", "vaultAuthMountPath"])
def test_what_makes_a_session_is_no_longer_than_it_need_be(name: str) -> None:
    """Another one each time would fill memory, with a namespace of blanks even in mounts that succeed."""
    most = "n" * MAX_LOGIN_TEXT
    spec = parse_class(**{name: most})
    assert most in (spec.login.role, spec.server.namespace, spec.login.audience, spec.login.mount)
    for letter in ("n", " "):
        told = faults(**{name: letter * (MAX_LOGIN_TEXT + 1)})[0]
        assert told.startswith(f"{name}: has {MAX_LOGIN_TEXT + 1} characters (it may have {MAX_LOGIN_TEXT} characters)")


def test_a_namespace_has_no_slashes_around_it() -> None:
    """A class's or the operator's; a single slash is the root namespace, and wins over the operator's."""
    assert parse_class(vaultNamespace="/team/web/").server.namespace == "team/web"
    assert parse_class(vaultNamespace=" team/web ").server.namespace == "team/web"
    operators = Settings(vault_namespace="/team/")
    assert parse(attributes(), settings=operators).server.namespace == "team"
    assert parse(attributes(vaultNamespace="/"), settings=operators).server.namespace == ""


@pytest.mark.parametrize("name", ["Namespace", "CACertPath", "CADirectory", "TLSServerName"])
def test_no_control_character_reaches_a_header_or_a_path(name: str) -> None:
    """A control character in them is refused, and shown escaped."""
    assert fault(**{f"vault{name}": "a\0b"}).startswith(f'vault{name} "a\\u0000b": holds a control character')


OPERATORS_TLS = TlsSettings("/op/ca", "/op/dir", "op", "/op/cert", "/op/key", skip_verify=True)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("TLSServerName", "server_name"),
        ("TLSClientCertPath", "client_cert"),
        ("TLSClientKeyPath", "client_key"),
    ],
)
def test_a_tls_parameter_wins_over_the_operators(name: str, field: str) -> None:
    """Parameter by parameter; the others stay the operator's, also where the class names an address."""
    changed: dict[str, Any] = {field: "/mine"}
    text = attributes(**{f"vault{name}": "/mine"}, vaultAddress="https://mine:1")
    found = parse(text, settings=Settings(tls=OPERATORS_TLS)).server.tls
    assert found == OPERATORS_TLS._replace(**changed)


@pytest.mark.parametrize(
    ("parameters", "file", "directory"),
    [
        ({}, "/op/ca", "/op/dir"),
        ({"vaultCACertPath": "/mine"}, "/mine", ""),
        ({"vaultCADirectory": "/mine"}, "", "/mine"),
        ({"vaultCACertPath": "/mine", "vaultCADirectory": "/mine.d"}, "/mine", "/mine.d"),
        ({"baoCADirectory": "/bao.d", "vaultCACertPath": "/mine"}, "", "/bao.d"),
        ({"openbaoCACertPath": "/bao", "vaultCADirectory": "/mine.d"}, "/bao", ""),
        ({"baoCADirectory": "/bao.d", "vaultCADirectory": "/mine.d", "vaultCACertPath": "/mine"}, "", "/bao.d"),
    ],
)
def test_who_names_a_ca_source_names_them_all(parameters: dict[str, str], file: str, directory: str) -> None:
    """A class that names a CA file or a directory is verified with that alone, not with the operator's other one, and
    so a stronger spelling over a weaker one."""
    found = parse(attributes(**parameters), settings=Settings(tls=OPERATORS_TLS)).server.tls
    assert found == OPERATORS_TLS._replace(ca_cert=file, ca_directory=directory)


def test_a_ca_source_that_is_dropped_is_told() -> None:
    """Within a class, the spelling whose CA source counts no more is named in a warning."""
    assert parse_class(baoCADirectory="/d", vaultCACertPath="/f").warnings == (
        "baoCADirectory: wins over vaultCACertPath",
    )
    assert parse_class(openbaoCACertPath="/f", vaultCADirectory="/d").warnings == (
        "openbaoCACertPath: wins over vaultCADirectory",
    )


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_go_reads_these_as_true(text: str) -> None:
    """vaultSkipTLSVerify takes what Go's strconv.ParseBool takes."""
    assert parse_class(vaultSkipTLSVerify=text).server.tls.skip_verify is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_go_reads_these_as_false(text: str) -> None:
    """Also where the operator skips the verification: a class may insist on it."""
    found = parse(attributes(vaultSkipTLSVerify=text), settings=Settings(tls=OPERATORS_TLS))
    assert found.server.tls.skip_verify is False


@pytest.mark.parametrize("text", ["yes", "tRUE", "on", " true", "2"])
def test_go_reads_nothing_else_as_a_boolean(text: str) -> None:
    """Anything else is refused."""
    assert fault(vaultSkipTLSVerify=text).startswith(f'vaultSkipTLSVerify "{text}": is not a boolean')


@pytest.mark.parametrize(("given", "missing"), [("Cert", "Key"), ("Key", "Cert")])
def test_half_a_client_certificate_is_refused(given: str, missing: str) -> None:
    """After merging with the operator's settings: where they have the other half, it is whole."""
    parameters = {f"vaultTLSClient{given}Path": "/mine"}
    assert fault(**parameters).startswith(f"vaultTLSClient{missing}Path: is missing")
    assert parse(attributes(**parameters), settings=Settings(tls=OPERATORS_TLS)).objects


# --- tokens -----------------------------------------------------------------------------------------------


def test_tokens_come_by_audience() -> None:
    """Each token that the driver hands over is there under its audience, the empty one too, and not shown."""
    spec = parse_class(**{TOKENS: tokens(vault=JWT, **{"": "other"})})
    assert {audience: token.reveal() for audience, token in spec.tokens.items()} == {"vault": JWT, "": "other"}
    assert JWT not in repr(spec)
    assert JWT not in repr(spec.tokens)


@pytest.mark.parametrize("text", ["", "null", " null\n", "{}", '{"username": "x"}'])
def test_a_request_may_have_no_tokens(text: str) -> None:
    """Neither attributes nor secrets need to hold any."""
    assert parse(attributes(), secrets=text).tokens == {}
    assert parse(attributes(**{TOKENS: "null"})).tokens == {}


def test_tokens_in_secrets_win() -> None:
    """``secrets`` is out of the class's reach, so what it says of an audience counts; others are added."""
    spec = parse(
        attributes(**{TOKENS: tokens(a="planted", b="kept")}),
        secrets=json.dumps({TOKENS: tokens(a=JWT, c="added")}),
    )
    assert {audience: token.reveal() for audience, token in spec.tokens.items()} == {
        "a": JWT,
        "b": "kept",
        "c": "added",
    }


@pytest.mark.parametrize(
    "text",
    [
        JWT,
        f'"{JWT}"',
        f'["{JWT}"]',
        f'{{"vault": "{JWT}"}}',
        f'{{"vault": {{"jwt": "{JWT}"}}}}',
        f'{{"vault": {{"token": ["{JWT}"]}}}}',
        f'{{"vault": {{"token": "é{JWT}"}}}}',
        f'{{"vault": {{"token": ""}}, "{JWT}": {{}}}}',
        f'{{"vault": {{"token": "{JWT}"}}',
        f'{{"vault": {{"token": "{JWT}"}}, "other": null}}',
        "[" * 100_000,
        "9" * 5000,
        tokens(vault="x" * 300_000),
    ],
)
def test_broken_tokens_are_refused_without_a_word_of_them(text: str) -> None:
    """In attributes and in secrets alike the fault names the key only, and no chained error carries the text."""
    for call in (attributes(**{TOKENS: text}), "null"), (attributes(), json.dumps({TOKENS: text})):
        with pytest.raises(InvalidClass) as refused:
            parse(*call)
        (found,) = refused.value.faults
        assert found == (
            f"{'secrets ' if call[1] != 'null' else ''}{TOKENS}: is not a JSON object of tokens by audience "
            "(kubelet writes it: do not set it in parameters or volumeAttributes)"
        )
        assert refused.value.__cause__ is None
        assert refused.value.__context__ is None


@pytest.mark.parametrize("text", ["hunter2", '["hunter2"]', '{"a": 1, "b": "hunter2"}', '{"a": "hunter2', "\ud800"])
def test_broken_secrets_are_refused_without_a_word_of_them(text: str) -> None:
    """What is no JSON object of strings is a fault that repeats none of it."""
    found = refusal(attributes(), secrets=text)
    assert found.startswith("secrets: is not a JSON object of strings")
    assert "hunter2" not in found


# --- permission -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "mode"), [("420", 0o644), ("0", 0), ("511", 0o777), ("7", 7)])
def test_the_permission_is_the_default_mode(text: str, mode: int) -> None:
    """The driver's number is decimal, and the mode of every object that names none."""
    assert parse(attributes(), permission=text).objects[0].mode == mode


@pytest.mark.parametrize(
    "text", ["", "512", "-1", "0644", "0o644", "420.0", "4.2e2", '"420"', "null", "\u0661", "9" * 9999]
)
def test_a_permission_that_is_no_mode_is_refused(text: str) -> None:
    """Only a whole JSON number from 0 to 0777 is a mode."""
    assert "is not a number from 0 to 511" in refusal(attributes(), permission=text)


def test_faults_are_bounded() -> None:
    """A hundred faults are kept, the others counted, and the message says how many it leaves out."""
    found = faults("\n".join(["- {objectName: a, secretPath: b, encoding: x}"] * 300))
    assert len(found) == 101
    assert found[-1] == "and 499 more faults"


def test_the_class_is_found_without_reading_it() -> None:
    """Its name is found where the rest cannot be read, no text of it passes for its name, and what is no name of
    Kubernetes is none."""
    forged = {"objects": '"secretProviderClass":"forged"', "secretProviderClass": "web-secrets"}
    assert mounting_class(json.dumps(forged)) == "web-secrets"
    assert mounting_class('{"secretProviderClass": "web-secrets", "objects": ') == "web-secrets"
    assert mounting_class("{}") == mounting_class('{"secretProviderClass":"a b"}') == ""


@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": "), (",\n\t", "\t:\r\n")])
@pytest.mark.parametrize("driver_first", [True, False])
def test_the_pod_of_a_mount_is_told_apart(spaces: tuple[str, str], driver_first: bool) -> None:
    """However the JSON is spaced, its names are found wherever they stand, and no text passes for one."""
    name = "csi.storage.k8s.io/pod.uid"
    forged = {
        "objects": f'"{name}":"forged", "{name}":"forged"',
        f'x, "{name}': "forged",
        f"x {name}": "forged",
        "a": name,
        "b": "x\\",
    }
    given = {**GIVEN, **forged} if driver_first else {**forged, **GIVEN}
    pod = mounting_pod(json.dumps(given, separators=spaces))
    assert pod == Pod("shop", "web-0", GIVEN[name], "web")
    assert mounting_pod(json.dumps({**given, name: "a b"}, separators=spaces)) is None
    assert mounting_pod(json.dumps({**forged, "roleName": "web"}, separators=spaces)) is None
