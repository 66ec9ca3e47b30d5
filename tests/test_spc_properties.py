"""What holds for every request, however odd: it parses or it is InvalidClass, and no secret is in what is said."""

from __future__ import annotations

import json
from dataclasses import replace

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from provider.errors import MAX_MESSAGE_BYTES, InvalidClass, encoded_size
from provider.settings import Settings
from provider.spc import MountSpec, Parser
from provider.spc.objects import FIELDS
from provider.spc.parameters import KNOWN
from tests.spc_classes import GIVEN, OBJECT, TOKENS, attributes, parse, parse_class
from tests.unseen import is_one_line

# Any code point, lone surrogates too, and what each grammar takes seriously.
anything = st.text() | st.text('{}[]":,\\\n \ud800é%&*!<~-?|>a0.', max_size=60)
json_text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(anything, inner, max_size=4),
    max_leaves=10,
).map(json.dumps)
object_fields = st.dictionaries(st.sampled_from(FIELDS) | anything, json_text | anything, max_size=7)
yaml_objects = st.lists(
    object_fields.map(lambda fields: "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"),
    max_size=3,
).map(lambda items: "\n".join("- " + item for item in items))
legal_attributes = st.dictionaries(
    st.sampled_from([*GIVEN, *KNOWN, TOKENS]) | anything, anything | json_text | yaml_objects, max_size=8
).map(lambda given: json.dumps({**GIVEN, "objects": OBJECT, **given}))


def outcome(*request: str) -> MountSpec | str:
    """The spec, or the message of the refusal; any other error is the test's."""
    try:
        return Parser(Settings()).parse(*request)
    except InvalidClass as error:
        return str(error)


@given(legal_attributes | json_text | anything, json_text | anything, anything, anything | st.just("420"))
@example(attributes(), "null", "/target", "420")
@example("[" * 100_000, "[" * 100_000, "", "9" * 100_000)
@example(json.dumps({TOKENS: "9" * 10_000}), "9" * 10_000, "\ud800", "\ud800")
@example(attributes("- {objectName: \U0010ffff, secretPath: \U0010ffff, secretArgs: \U0010ffff}"), "{}", "/t", "0")
def test_any_request_parses_or_is_refused(attributes: str, secrets: str, target_path: str, permission: str) -> None:
    """Any four strings give a spec, or InvalidClass with a message that gRPC and the driver can carry."""
    found = outcome(attributes, secrets, target_path, permission)
    if isinstance(found, str):
        assert encoded_size(found) <= MAX_MESSAGE_BYTES
        assert is_one_line(found)
    else:
        assert found.objects
        assert all(item.name and item.request.path and 0 <= item.mode <= 0o777 for item in found.objects)
        assert all(is_one_line(line) for line in found.warnings)


@given(legal_attributes)
def test_a_request_parses_to_the_same_again(attributes: str) -> None:
    """From the cache as at first, and under another parser."""
    parser = Parser(Settings())
    found = outcome(attributes, "null", "/target", "420")
    if isinstance(found, MountSpec):
        assert parser.parse(attributes, "null", "/target", "420") == found
        assert parser.parse(attributes, "null", "/target", "420") == found


names = st.text("abcdefgh-", min_size=1, max_size=8)


@given(
    st.fixed_dictionaries(
        {"RoleName": names},
        optional={
            "Address": names.map("https://{}:8200/".format),
            "Namespace": names,
            "KubernetesMountPath": names,
            "CACertPath": names,
            "CADirectory": names,
            "TLSServerName": names,
            "SkipTLSVerify": st.sampled_from(["true", "f", "1"]),
        },
    )
)
def test_a_class_in_three_spellings_is_one(parameters: dict[str, str]) -> None:
    """The same parameters under each prefix, and under all at once, come to equal specs without a warning."""
    spellings = [{prefix + name: value for name, value in parameters.items()} for prefix in ("vault", "openbao", "bao")]
    specs = [parse_class(roleName="", **given) for given in spellings]
    specs.append(parse_class(roleName="", **spellings[0], **spellings[1], **spellings[2]))
    assert specs[0].warnings == ()
    assert all(spec == specs[0] for spec in specs)


# A canary in every place where a secret may stand, and faults all around it.
CANARY = "hunter2canary"
leaky = st.sampled_from(
    [
        f"{CANARY}",
        f"'{CANARY}'",
        f"[{CANARY}",
        f"{{{CANARY}: {CANARY}}}",
        f"{{{CANARY}: 1, {CANARY}: 2}}",
        f"{{a: *{CANARY}}}",
        f"{{a: !{CANARY} b}}",
        f"{{a: !{CANARY}!b c}}",
        f"{{a: !!int {CANARY}}}",
        f"{{a: &{CANARY} &{CANARY} b}}",
        f"{{a: %{CANARY}}}",
        f"{{a: '{CANARY}}}",
        f'{{a: "{CANARY}\\x"}}',
        f"{{a: {CANARY}: b}}",
        f"{{? [{CANARY}] : b}}",
        f"{{<<: {CANARY}}}",
        f"{{a: [.nan, {CANARY}]}}",
        f"{{a: {CANARY}\0}}",
        "[" * 80 + CANARY,
    ]
)
tokens = st.sampled_from(
    [
        CANARY,
        f'"{CANARY}"',
        f'{{"a": "{CANARY}"}}',
        f'{{"a": {{"token": "{CANARY}"}}',
        f'{{"{CANARY}": {{"token": 1}}}}',
        f'{{"a": {{"token": "{CANARY}"}}}}',
    ]
)
wrong = st.fixed_dictionaries(
    {},
    optional={
        "vaultAddress": st.sampled_from([f"https://u:{CANARY}@h", f"u:{CANARY}@h", "x"]),
        "vaultSkipTLSVerify": st.just("maybe"),
        "unknown": st.just(CANARY),
        "roleName": st.just(""),
    },
)


@given(
    leaky,
    tokens,
    tokens | tokens.map(lambda text: json.dumps({TOKENS: text})),
    wrong,
    st.sampled_from(["..", "a?p=" + CANARY, "../a?" + CANARY]),
)
def test_no_secret_is_in_what_is_said(
    secret_args: str, in_attributes: str, in_secrets: str, parameters: dict[str, str], path: str
) -> None:
    """Neither tokens nor request bodies, queries or values of unknown parameters are in faults, warnings or reprs."""
    objects = f"- objectName: a\n  secretPath: {path}\n  unknown: {CANARY}\n  secretArgs: {secret_args}\n"
    text = json.dumps({**GIVEN, "objects": objects, TOKENS: in_attributes, **parameters})
    try:
        spec = parse(text, secrets=in_secrets)
    except InvalidClass as error:
        said = f"{error} {error!r} {error.faults} {error.__cause__} {error.__context__}"
    else:
        # The query belongs to the request that others have to show with care; it is not a body.
        requests = [
            replace(item, sources=tuple(replace(s, request=s.request._replace(query=())) for s in item.sources))
            for item in spec.objects
        ]
        said = f"{replace(spec, objects=tuple(requests))!r} {spec.warnings} {spec.tokens}"
    assert CANARY not in said


@given(st.lists(st.text("áé€𝄞", min_size=250, max_size=300), min_size=1, max_size=60, unique=True))
def test_a_message_is_within_its_limit(names: list[str]) -> None:
    """Also where every name is in a script that gRPC encodes with up to twelve bytes a character."""
    found = outcome(attributes(yaml.safe_dump([{"objectName": "../" + name} for name in names])), "null", "/t", "420")
    assert isinstance(found, str)
    assert 1000 < encoded_size(found) <= MAX_MESSAGE_BYTES
