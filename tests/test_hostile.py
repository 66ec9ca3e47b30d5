"""Hostile input, end to end: whatever a tenant, a Vault, an API server or a disk says, a mount ends as it should.

Each input goes through the driver's socket and the real parts. `FUZZ_EXAMPLES` is how many of each kind are tried;
`make fuzz` tries many.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provider.cli import flags
from provider.errors import InvalidSetting, ProviderError
from provider.kube import Kubernetes
from provider.sessions.snapshot import dump, load
from provider.settings import MIB
from provider.state import Entry, StateDir
from provider.vault import adapter
from tests.hostile import CANARY, JWT, TOKEN, Hostile, check_message, judge, tried
from tests.spc_classes import TOKENS
from tests.stand.faulty import Answer, secret, token
from tests.stand.waiting import eventually
from tests.test_snapshot import Readings, _example
from tests.test_spc_properties import anything, json_text, legal_attributes, yaml_objects

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
# What all of them together may add to the process; each is answered within limits of its own.
MEMORY_BYTES = 512 * MIB

within = settings(max_examples=EXAMPLES)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    patched = pytest.MonkeyPatch()
    # A hundred tries of a server that goes on failing, in little time.
    patched.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)
    with Hostile(tmp_path_factory.mktemp("hostile")) as parts:
        before = _peak()
        yield parts
        assert _peak() - before < MEMORY_BYTES
    patched.undo()
    print(f"\ninputs tried: {sum(tried.values())}, of these {dict(tried)}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(autouse=True)
def behaving(hostile: Hostile) -> None:
    """Both servers answer as they should until a test has them do otherwise."""
    hostile.behave()


def test_what_is_not_hostile_is_mounted(hostile: Hostile) -> None:
    """The parts work: else nothing below would say anything."""
    ended = judge(hostile.mount("none", "- {objectName: a, secretPath: secret/data/x, secretKey: password}"))
    assert ended.files == {"a": CANARY.encode()}
    assert "mounted" in ended.told


# --- what tenants write -----------------------------------------------------------------------------------


@within
@given(legal_attributes | json_text | anything, anything | st.just("/volume"), anything | st.just("420"))
def test_attributes(hostile: Hostile, attributes: str, target_path: str, permission: str) -> None:
    """Attributes, target path and permission of any text."""
    judge(hostile.mount("attributes", raw=attributes, target_path=target_path, permission=permission))


@within
@given(yaml_objects | anything | json_text)
def test_objects(hostile: Hostile, objects: str) -> None:
    """The objects of any text, and of YAML that is nearly right."""
    judge(hostile.mount("objects", objects))


jwts = st.sampled_from([JWT, CANARY, f'"{CANARY}', ""]) | anything
token_maps = st.dictionaries(
    anything | st.sampled_from(["vault", CANARY]),
    st.fixed_dictionaries({}, optional={"token": jwts, "expirationTimestamp": anything}) | jwts,
    max_size=3,
).map(json.dumps)


@within
@given(
    token_maps | json_text | anything, token_maps.map(lambda text: json.dumps({TOKENS: text})) | json_text | anything
)
def test_tokens(hostile: Hostile, in_attributes: str, in_secrets: str) -> None:
    """The pod's tokens of any text, in the attributes and in the secrets: never told, whatever is wrong with them."""
    judge(hostile.mount("tokens", secrets=in_secrets, **{TOKENS: in_attributes}))


pieces = st.sampled_from(
    [
        "{{ secret.password }}", "{{ secret }}", "{{ secret.gone }}", "{{ secret | json }}", "{{ secret.nested.list }}",
        "{% for key in secret %}", "{{ key }}", "{% endfor %}", "{% if secret %}", "{% endif %}",
        "{{ ''.__class__.__mro__ }}", "{{ secret.__init__.__globals__ }}", "{{ cycler.__init__ }}", "{{ lipsum }}",
        "{{ 'x' * 10 ** 9 }}", "{{ range(10 ** 9) | list }}", "{{ 9 ** 9 ** 9 }}", "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 1 / 0 }}", "{{ secret.password | b64decode }}",
        "{{ secret | pem }}", "{{ '%s' % secret }}", "{{ '{0.__class__}'.format(secret) }}", "{{", "}}", "{%", "%}",
        "{#", "\n", "é", "\u202e",
    ]
)  # fmt: skip
templates = st.lists(pieces | anything, max_size=5).map("".join)


@settings(within, max_examples=max(1, EXAMPLES // 4))
@given(templates)
@example("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
@example("{{ 'x' * 10 ** 9 }}")
@example("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
def test_templates(hostile: Hostile, text: str) -> None:
    """Templates of any text, and of pieces that loop, grow, recurse or reach for what is not theirs."""
    fields = {"objectName": "a", "secretPath": "secret/data/x", "template": text}
    judge(hostile.mount("templates", json.dumps([fields])))


@settings(within, max_examples=max(1, EXAMPLES // 4))
@given(st.lists(st.sampled_from(["data", ".", "[*]", "[0]", "[::0]", "|", "*", "@", "&", "!", "length(", ")", "`9`", "'x'", "[?"]) | anything, max_size=6).map("".join))  # fmt: skip  # noqa: E501
def test_expressions(hostile: Hostile, text: str) -> None:
    """JMESPath of any text and of its own pieces."""
    fields = {"objectName": "a", "secretPath": "secret/data/x", "jmesPath": text}
    judge(hostile.mount("templates", json.dumps([fields])))


# --- what servers answer ----------------------------------------------------------------------------------


def json_of(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Any JSON with such texts."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=6,
    )


json_values = json_of(st.text(max_size=20))
secrets = json_of(st.text(max_size=20) | st.just(CANARY))
auths = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        (
            "accessor",
            "lease_duration",
            "renewable",
            "entity_id",
            "token_policies",
            "token_type",
            "num_uses",
            "policies",
        ),
        json_values,
    )
    | {"client_token": st.just(TOKEN) | secrets},
)
envelopes = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("request_id", "lease_id", "lease_duration", "renewable", "warnings", "wrap_info", "errors"), json_values
    )
    | {"data": secrets | st.fixed_dictionaries({"data": secrets}), "auth": auths | json_values},
)
DEEP = {"lists": b"[" * 100_000, "objects": b'{"data":' * 10_000}
bodies = envelopes | json_values | st.binary(max_size=200) | st.sampled_from(sorted(DEEP)).map(DEEP.__getitem__)
# Those that Vault may be asked again for are the faults' tests.
statuses = st.sampled_from([200, 200, 200, 201, 204, 301, 307, 400, 403, 404, 405, 418, 501])
headers = st.dictionaries(
    st.sampled_from(["Content-Type", "Location", "Retry-After", "X-Vault-Index", "Set-Cookie"]),
    st.sampled_from(["text/html", "http://[", "https://evil.example/v1/x", "x" * 5000, "9" * 400, "\xff", "-1"]),
    max_size=2,
)
answers = st.builds(Answer, statuses, bodies, headers)
fine = st.just(Answer(599))
"""In this place the server behaves."""


@within
@given(
    login=fine | answers | auths.map(lambda auth: Answer(body={"auth": auth})),
    engine=fine | answers,
    read=fine | answers,
)
def test_vaults_answers(hostile: Hostile, login: Answer, engine: Answer, read: Answer) -> None:
    """Whatever is answered to a login, to the look-up of the engine and to a read: status, headers and body."""

    def reply(arrival: Any) -> Answer:
        path = arrival.path.removeprefix("/v1/")
        if path.endswith("/login"):
            answer, usual = login, token(TOKEN)
        elif path.startswith("sys/internal"):
            answer, usual = engine, secret({"path": "secret/", "type": "kv", "options": {"version": "2"}})
        else:
            answer, usual = read, secret({"data": {"password": CANARY}})
        return usual if answer.status == 599 else answer

    hostile.vault.reply = reply
    judge(hostile.mount("Vault's answers", "- {objectName: a, secretPath: secret/data/x, secretKey: password}"))


kube_bodies = bodies | st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["Status", "TokenRequest", "PartialObjectMetadataList", "Secret"]),
        "status": json_values | st.fixed_dictionaries({"token": json_values | st.just(JWT)}),
        "data": json_values | st.dictionaries(st.just("key"), st.sampled_from([CANARY, "", "a" * 44, "!"])),
        "items": json_values | st.lists(st.fixed_dictionaries({"metadata": json_values}), max_size=2),
        "metadata": json_values,
        "message": st.text(max_size=50),
        "reason": json_values,
        "code": json_values,
    },
)
kube_answers = st.builds(Answer, statuses | st.sampled_from([409, 410, 422]), kube_bodies, headers)


@within
@given(kube_answers)
def test_kubernetes_token(hostile: Hostile, answer: Answer) -> None:
    """Whatever is answered to the request of a pod's token, which the mount needs."""
    hostile.kube.reply = lambda arrival: answer
    judge(hostile.mount("Kubernetes' answers"))


@within
@given(kube_answers, st.sampled_from(["key", "pods", "pod"]))
def test_kubernetes_other_answers(hostile: Hostile, answer: Answer, call: str) -> None:
    """Whatever is answered to the look-up of the HMAC key, of a node's pods and of one pod."""
    tried["Kubernetes' answers"] += 1
    hostile.kube.reply = lambda arrival: answer

    async def ask() -> None:
        kube = Kubernetes(str(hostile.kubeconfig))
        try:
            if call == "key":
                assert await kube.read_or_create_hmac_key("vault-csi-provider-hmac-key")
            elif call == "pods":
                await kube.list_pods("node-1")
            else:
                await kube.pod_lives("shop", "web-0", "uid")
        except ProviderError as error:
            check_message(str(error))
        finally:
            await kube.close()

    hostile.run(ask())


# --- what the operator's node has -------------------------------------------------------------------------

KEY = b"k" * 32
NAME = "0123456789abcdef0123456789abcdef"


@within
@given(st.data())
def test_state_files(tmp_path_factory: pytest.TempPathFactory, hostile: Hostile, data: st.DataObject) -> None:
    """A file of any bytes, one of ours that is changed, and one that is sealed well and holds any JSON."""
    tried["state files"] += 1
    directory = tmp_path_factory.getbasetemp() / "states"
    state = StateDir(str(directory), KEY)
    path = directory / f"{NAME}.session"

    async def scene() -> Entry | None:
        whole = dump(load(_example(), Readings()), Readings())
        for key in data.draw(st.sets(st.sampled_from(sorted(whole)))):
            whole[key] = data.draw(json_values)
        await state.save(NAME, Entry(1, whole))
        raw = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
            raw[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(data.draw(st.binary(max_size=300) | st.just(bytes(raw))))
        return await state.load(NAME)

    entry = asyncio.run(scene())
    state.close()
    if entry is not None:
        try:
            load(entry.payload, Readings())
        except ValueError as error:
            check_message(str(error))


names_of_flags = st.sampled_from([flag.name for flag in flags.FLAGS] + ["no-such-flag", "h"])
arguments = st.lists(
    st.builds(
        "{}{}{}{}".format, st.sampled_from(["-", "--", ""]), names_of_flags, st.sampled_from(["=", " ", ""]), anything
    )
    | anything
    | st.sampled_from(["status", TOKEN, JWT]),
    max_size=4,
)
variables = st.dictionaries(st.sampled_from([flag.variable for flag in flags.FLAGS if flag.variable]), anything)


@within
@given(arguments, variables)
def test_flags(given_arguments: list[str], environ: dict[str, str]) -> None:
    """Any command line and environment is settings, a text, or one line that says what is wrong."""
    tried["flags"] += 1
    try:
        flags.parse(given_arguments, environ, lambda style: style)
    except InvalidSetting as error:
        check_message(str(error))


BEYOND = "\U000e0041"


def test_names_cannot_write_lines_of_their_own(hostile: Hostile) -> None:
    """Line ends, terminal codes and direction marks in names that a tenant chooses are escaped in all that is told."""
    odd = 'x\n{"severity":"INFO","message":"forged"}\x1b[31m\u202e\u2028\x85' + BEYOND
    names = {
        "secretProviderClass": odd, "roleName": odd, "audience": odd, "vaultAuthMountPath": "k8s" + odd,
        "unknown" + odd: odd, "vaultNamespace": odd, "vaultTLSServerName": odd, "refreshAfter": odd,
        "vaultSkipTLSVerify": odd,
    }  # fmt: skip
    for name, text in names.items():
        judge(hostile.mount("names", **{name: text}))
    for field in (
        "objectName",
        "secretPath",
        "secretKey",
        "method",
        "encoding",
        "filePermission",
        "format",
        "odd" + odd,
    ):
        # YAML has no pairs of surrogates, as JSON writes what is beyond them.
        fields = {"objectName": "a", "secretPath": "secret/data/x", field.replace(BEYOND, ""): odd.replace(BEYOND, "")}
        ended = judge(hostile.mount("names", json.dumps([fields])))
        assert "u001b" in ended.told + ended.message
    hostile.vault.reply = lambda arrival: Answer(403, {"errors": [odd, odd]})
    judge(hostile.mount("names"))


def test_a_daemon_that_was_told_all_this_goes_on(hostile: Hostile) -> None:
    """After all inputs, and once it has looked whether Vault is back, it mounts as at first."""

    def mounted() -> bool:
        return judge(hostile.mount("none")).code == "OK"

    eventually(mounted, "a mount succeeds")
