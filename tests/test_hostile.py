"""Hostile input, end to end: whatever a tenant, a Vault, an API server or a disk says, a mount ends as it should.

Each input goes through the driver's socket and the real parts. `FUZZ_EXAMPLES` is how many of each kind are tried;
`make fuzz` tries many.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provider.cli import command, flags
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
# What one mount may add, of the daemon and of the Vault that is in the same process.
MOUNT_BYTES = 200 * MIB

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


def _resident(name: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


_peaks: list[int] = []


def _peak() -> int:
    _peaks.append(_resident("VmHWM"))
    return max(_peaks)


@contextlib.contextmanager
def hostile_memory(most: int) -> Iterator[None]:
    """Assert that what is done inside takes no more memory than that, at any time, over what was in use."""
    _peak()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now; see proc(5)
    before = _resident("VmHWM")
    yield
    grown = _resident("VmHWM") - before
    assert grown < most, f"{grown // MIB} MiB"


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


# --- answers that are large or deep, to classes of many objects -------------------------------------------

FORMS = (
    "secretKey: password",
    "encoding: utf-8",
    "format: yaml",
    "secretKey: '*'",
    "template: '{{ secret | json }}'",
    "jmesPath: data.password",
)
LARGE = 300_000
"""Bytes over which an answer is read in a thread, where there is more room on the stack."""

LOGIN, ENGINE, READ = "login", "engine", "read"
_AUTH = {"client_token": TOKEN, "accessor": "a", "lease_duration": 3600, "renewable": True, "policies": ["default"]}
_MOUNT = {"path": "secret/", "type": "kv", "options": {"version": "2"}}
_HERE = "nested here"


def _with(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {**fields, name: _HERE}


NESTED: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        f"auth.{name}": (LOGIN, 200, {"auth": _with(_AUTH, name)})
        for name in (*_AUTH, "token_policies", "entity_id", "token_type", "num_uses", "metadata")
    },
    "auth of a refusal": (LOGIN, 400, {"errors": [_HERE]}),
    "policy": (LOGIN, 200, {"auth": {**_AUTH, "token_policies": [_HERE], "policies": [_HERE]}}),
    **{f"mount.{name}": (ENGINE, 200, {"data": _with(_MOUNT, name)}) for name in _MOUNT},
    "version of the mount": (ENGINE, 200, {"data": {**_MOUNT, "options": {"version": _HERE}}}),
    **{
        name: (READ, 200, _with({"data": {"data": {"password": "x"}}}, name))
        for name in ("request_id", "lease_id", "lease_duration", "renewable", "wrap_info", "data", "auth", "metadata")
    },
    "version": (READ, 200, {"data": {"data": {"password": "x"}, "metadata": {"version": _HERE}}}),
    "value": (READ, 200, {"data": {"data": {"password": _HERE}}}),
    **{f"errors of {status}": (READ, status, {"errors": [_HERE]}) for status in (400, 403, 404)},
    "warnings": (READ, 404, {"warnings": [_HERE, "x"], "errors": []}),
    "errors that are none": (READ, 400, {"errors": _HERE}),
}
"""Where nested JSON stands in for what should be a text, a number or a list: the request, the status, and the body."""


@pytest.mark.parametrize("padding", [0, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("place", NESTED)
def test_deep_answers(hostile: Hostile, place: str, padding: int) -> None:
    """JSON nested about as deep as can be read at all, wherever Vault has a field: whoever reads on has less room."""
    request, status, body = NESTED[place]
    envelope = json.dumps({**body, "padding": "x" * padding})
    objects = "\n".join(
        f"- {{objectName: {name}, secretPath: secret/data/x, {form}}}"
        for name, form in zip("abcdef", FORMS if place in ("value", "data") else FORMS[:1], strict=False)
    )
    usual = hostile.vault.reply
    for depth in range(900, 1000, 4 if len(objects) < 100 else 20):
        opening, closing = (b"[", b"]") if depth % 8 else (b'{"a":', b"}")
        nested = opening * depth + b"1" + closing * depth
        answer = Answer(status, envelope.encode().replace(json.dumps(_HERE).encode(), nested))

        def reply(arrival: Any, answer: Answer = answer) -> Answer:
            path = arrival.path.removeprefix("/v1/")
            asked = LOGIN if path.endswith("/login") else ENGINE if path.startswith("sys/internal") else READ
            return answer if asked == request else usual(arrival)

        hostile.vault.reply = reply
        judge(hostile.mount("Vault's answers", objects))


PARTS = ['{"":1}', "[[]]", "[]", '""', "1", "-1e9", '"\\u0000"', '{"a":{"b":null}}', '"' + "é" * 50 + '"']


@settings(within, max_examples=max(1, EXAMPLES // 10))
@given(
    part=st.sampled_from(PARTS),
    size=st.sampled_from([1_000, 30_000, 33_000, 250_000, 262_143, 262_145, 400_000, 2_000_000]),
    objects=st.integers(1, 100),
    form=st.sampled_from(FORMS),
    status=st.sampled_from([200, 200, 200, 400, 403, 404]),
)
@example(part='{"":1}', size=250_000, objects=100, form=FORMS[0], status=200)
@example(part="[[]]", size=250_000, objects=100, form=FORMS[1], status=200)
@example(part='{"":1}', size=2_000_000, objects=12, form=FORMS[0], status=200)
def test_many_large_answers(hostile: Hostile, part: str, size: int, objects: int, form: str, status: int) -> None:
    """Classes of up to 100 objects, each of which is answered with up to 2 MB of many parts: 25 MB in a mount."""
    bulk = ",".join([part] * (size // (len(part) + 1)))
    fields = {"errors": "BULK"} if status >= 400 else {"data": {"data": {"password": "x", "bulk": "BULK"}}}
    body = json.dumps(fields).replace('"BULK"', f"[{bulk}]").encode()
    usual = hostile.vault.reply
    hostile.vault.reply = lambda arrival: (
        Answer(status, body) if arrival.path.startswith("/v1/secret/") else usual(arrival)
    )
    many = max(1, min(objects, 25_000_000 // size))
    with hostile_memory(MOUNT_BYTES):
        judge(
            hostile.mount(
                "Vault's answers",
                "\n".join(f"- {{objectName: a{n}, secretPath: 'secret/data/x?n={n}', {form}}}" for n in range(many)),
            )
        )


def test_words_of_vault_are_cut(hostile: Hostile) -> None:
    """An error repeats 400 characters of what Vault says."""
    usual = hostile.vault.reply
    words = Answer(400, {"errors": ["~" * 300, "~" * 300]})
    hostile.vault.reply = lambda arrival: words if arrival.path.startswith("/v1/secret/") else usual(arrival)
    assert 390 <= judge(hostile.mount("Vault's answers")).message.count("~") <= 400


@pytest.mark.parametrize("more", [0, 1])
def test_keys_that_become_files_are_bounded(hostile: Hostile, more: int) -> None:
    """A secret of 10,000 keys is as many files, and one more is none."""
    data = {f"k{number}": "" for number in range(10_000 + more)}
    usual = hostile.vault.reply
    hostile.vault.reply = lambda arrival: (
        secret({"data": data, "metadata": {"version": 1}}) if arrival.path.startswith("/v1/secret/") else usual(arrival)
    )
    ended = judge(hostile.mount("Vault's answers", "- {objectName: a, secretPath: secret/data/x, secretKey: '*'}"))
    assert len(ended.files) == (0 if more else 10_000)
    assert ("more than 10000 keys" in ended.message) is bool(more)


@pytest.mark.parametrize(("padding", "code"), [(1000, "OK"), (MIB, "FAILED_PRECONDITION")])
def test_an_answer_of_kubernetes_is_bounded(hostile: Hostile, padding: int, code: str) -> None:
    """A token that comes with more than a MiB is none."""
    body = {"kind": "TokenRequest", "status": {"token": JWT}, "padding": "x" * padding}
    hostile.kube.reply = lambda arrival: Answer(201, body)
    assert judge(hostile.mount("Kubernetes' answers")).code == code


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
        command.parse(given_arguments, environ, lambda style: style)
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
