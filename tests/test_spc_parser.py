"""The parser keeps what it has parsed: the same answer, within bounds, and without the text."""

from __future__ import annotations

import gc
import json
import sys
import threading
from typing import Any

import pytest

from provider.errors import InvalidClass
from provider.redact import Sensitive
from provider.settings import Settings
from provider.spc import MountSpec, Parser
from provider.spc.objects import parse_objects
from tests.spc_classes import TOKENS, attributes


def mount(parser: Parser, objects: str, permission: str = "420") -> MountSpec:
    return parser.parse(attributes(objects), "null", "/target", permission)


def numbered(n: int) -> str:
    return f"- {{objectName: a{n}, secretPath: b, typo: x}}"


def is_kept(parser: Parser, spec: MountSpec, objects: str) -> bool:
    """Whether the objects come from what was parsed for ``spec``: the very same ones."""
    return mount(parser, objects).objects is spec.objects


def test_objects_are_parsed_once() -> None:
    """A re-mount gets the very objects of the mount before, with the same warnings."""
    parser = Parser(Settings())
    first = mount(parser, numbered(0))
    second = mount(parser, numbered(0))
    assert second.objects is first.objects
    assert second == first
    assert second.warnings == ('objects[0] (a0): unknown field "typo" is ignored',)


def recall(parser: Parser, given: str) -> MountSpec | None:
    return parser.recall(given, "null", "/target", "420")


def test_a_class_is_recalled_once_it_was_parsed() -> None:
    """Before that there is nothing to recall; then it is the mount that parsing gives, with its own parameters."""
    parser = Parser(Settings())
    given = attributes(numbered(0), roleName="a")
    assert recall(parser, given) is None
    parsed = parser.parse(given, "null", "/target", "420")
    assert recall(parser, given) == parsed
    other = recall(parser, attributes(numbered(0), roleName="b"))
    assert other is not None
    assert (other.login.role, other.objects is parsed.objects) == ("b", True)


def test_a_refused_class_is_recalled_as_refused() -> None:
    """With the faults that it had."""
    parser = Parser(Settings())
    given = attributes("- {objectName: a}")
    with pytest.raises(InvalidClass) as first:
        parser.parse(given, "null", "/target", "420")
    with pytest.raises(InvalidClass) as second:
        recall(parser, given)
    assert str(second.value) == str(first.value)


@pytest.mark.parametrize("more", [{"typo": "x" * 70_000}, {f"typo{n}": "x" for n in range(40)}])
def test_what_may_take_long_is_not_recalled(more: dict[str, str]) -> None:
    """Many or long attributes are read where they hold nobody up, known class or not, and are not kept."""
    parser = Parser(Settings())
    mount(parser, numbered(0))
    assert recall(parser, attributes(numbered(0))) is not None
    long = attributes(numbered(0), **more)
    assert recall(parser, long) is None
    parser.parse(long, "null", "/target", "420")
    assert recall(parser, long) is None
    assert len(parser._mounts._entries) == 1


def test_another_text_or_permission_is_another_class() -> None:
    """Nothing less than both makes two classes the same."""
    parser = Parser(Settings())
    assert mount(parser, numbered(0)).objects[0].name == "a0"
    assert mount(parser, numbered(1)).objects[0].name == "a1"
    assert mount(parser, numbered(0), "256").objects[0].mode == 0o400
    assert mount(parser, numbered(0)).objects[0].mode == 0o644


def test_parameters_are_never_kept() -> None:
    """The same objects under another role are another mount."""
    parser = Parser(Settings())
    assert parser.parse(attributes(roleName="a"), "null", "/t", "420").login.role == "a"
    assert parser.parse(attributes(roleName="b"), "null", "/t", "420").login.role == "b"


def test_a_refused_class_is_refused_again() -> None:
    """With the same faults, and it takes no place of one that is right."""
    parser = Parser(Settings())
    kept = mount(parser, numbered(0))
    messages = set()
    for n in range(300):
        with pytest.raises(InvalidClass) as refused:
            mount(parser, "- {objectName: ../a, secretPath: b}" + " " * n)
        messages.add(str(refused.value))
    assert len(messages) == 1
    assert is_kept(parser, kept, numbered(0))


def test_a_refused_class_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubelet asks for it again and again, and reading it may take a second: its faults are kept, and bounded."""
    read: list[str] = []

    def counting(text: str, *others: Any) -> Any:
        read.append(text)
        return parse_objects(text, *others)

    monkeypatch.setattr("provider.spc.parser.parse_objects", counting)
    parser = Parser(Settings())
    faulty = [f"- {{objectName: ../a{n}, secretPath: b}}" for n in range(100)]
    messages = []
    for text in (faulty[0], faulty[0], *faulty[1:], faulty[0], faulty[99]):
        with pytest.raises(InvalidClass) as refused:
            mount(parser, text)
        messages.append(str(refused.value))
    assert messages[0] == messages[1] == messages[-2]
    assert read == [*faulty, faulty[0]]
    assert len(parser._faulty._entries) == 64


def test_the_number_of_classes_is_bounded() -> None:
    """256 are kept; then the one least recently mounted goes."""
    parser = Parser(Settings())
    specs = [mount(parser, numbered(n)) for n in range(256)]
    assert is_kept(parser, specs[0], numbered(0))
    mount(parser, numbered(256))
    assert is_kept(parser, specs[0], numbered(0))
    assert is_kept(parser, specs[2], numbered(2))
    assert not is_kept(parser, specs[1], numbered(1))


@pytest.mark.parametrize(
    "fields",
    ["secretArgs: '{}'", "secretPath: '{}'", "secretPath: 'b?q={}'", "secretKey: '{}'", "? '{}' : x"],
    ids=["body", "path", "query", "key", "unknown field"],
)
def test_the_size_of_classes_is_bounded(fields: str) -> None:
    """Of large classes fewer are kept: nine of a megabyte are more than 8 MiB, wherever the text is.

    A warning is cut short, so a class whose text is in a field that nobody knows is small once parsed.
    """
    parser = Parser(Settings())
    large = [
        f"- {{objectName: a, secretPath: b, n: {n}, {fields.format('x' * 1_000_000)}}}".replace(
            "secretPath: b, " if "secretPath: '" in fields else "", ""
        )
        for n in range(9)
    ]
    specs = [mount(parser, text) for text in large]
    assert is_kept(parser, specs[8], large[8])
    assert is_kept(parser, specs[0], large[0]) is fields.startswith("?")


def texts_reachable(*roots: object) -> list[str]:
    """Every text that can be reached from there, types aside."""
    texts: list[str] = []
    seen: set[int] = set()
    reached: list[object] = list(roots)
    while reached:
        thing = reached.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes)):
            texts.append(thing if isinstance(thing, str) else thing.decode("latin-1"))
        reached.extend(gc.get_referents(thing))
    return texts


def test_the_text_is_not_kept() -> None:
    """What the class was written in, which may hold a secret, is let go; bodies stay as Sensitive."""
    parser = Parser(Settings())
    marker = "x" * 20 + "-marker-of-this-test"
    mount(parser, f"- {{objectName: a, secretPath: b, secretArgs: {{pin: {marker}}}}}")
    assert [text for text in texts_reachable(parser) if marker in text] == [f'{{"pin":"{marker}"}}']


def test_threads_may_parse_at_once() -> None:
    """Many threads over more classes than are kept get each its own, and the bound holds."""
    parser = Parser(Settings())
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(300):
            n = (start + step * 7) % 300
            if mount(parser, numbered(n)).objects[0].name != f"a{n}":
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(parser._good._entries) == 256
    assert parser._good._size == sum(size for _, size in parser._good._entries.values())


# --- the same request again -------------------------------------------------------------------------------


def with_token(jwt: str, **parameters: str) -> str:
    return attributes(numbered(0), **{TOKENS: json.dumps({"vault": {"token": jwt}})}, **parameters)


def recalled(parser: Parser, given: str, secrets: str = "null", target_path: str = "/target") -> MountSpec:
    spec = parser.recall(given, secrets, target_path, "420")
    assert spec is not None
    return spec


def is_request_kept(parser: Parser, spec: MountSpec, given: str) -> bool:
    """Whether the mount is the one that the same request came to: with the very same server, which no class has."""
    return recalled(parser, given).server is spec.server


@pytest.mark.parametrize(
    ("parameters", "secrets"),
    [
        ({}, "null"),
        ({"vaultAddress": "https://vault:8200", "vaultNamespace": "a", "audience": "vault", "typo": "x"}, ""),
        ({"refreshAfter": "1m", "vaultCACertPath": "/ca.pem", "baoRoleName": "b"}, "{}"),
        ({}, json.dumps({TOKENS: json.dumps({"vault": {"token": "published"}, "other": {"token": "too"}})})),
        ({TOKENS: ""}, "null"),
    ],
    ids=["few", "many", "warned", "published tokens", "no token"],
)
def test_the_same_request_is_recalled_whole(parameters: dict[str, str], secrets: str) -> None:
    """It is all that parsing gives, tokens and warnings too, however often it comes."""
    parser = Parser(Settings())
    given = attributes(numbered(0), **{TOKENS: '{"vault": {"token": "a\\u0062c"}}', **parameters})
    parsed = parser.parse(given, secrets, "/target", "420")
    for _ in range(2):
        again = recalled(parser, given, secrets)
        assert again == parsed
        assert again.tokens == parsed.tokens
        assert (again.objects is parsed.objects, again.server is parsed.server) == (True, True)


def test_a_mount_has_the_tokens_of_its_own_request() -> None:
    """Kubelet renews the pod's token: the next request has another, and none is given the one before."""
    parser = Parser(Settings())
    for jwt in ("first", "second"):
        parser.parse(with_token(jwt), "null", "/target", "420")
    for jwt in ("first", "second", "third", "first", "third"):
        assert recalled(parser, with_token(jwt)).tokens == {"vault": Sensitive(jwt)}


def test_a_renewed_token_is_read_once() -> None:
    """The request that has it is known from then on, though its class was parsed for another."""
    parser = Parser(Settings())
    before = parser.parse(with_token("first"), "null", "/target", "420")
    after = recalled(parser, with_token("second"))
    assert after.server is not before.server
    assert is_request_kept(parser, after, with_token("second"))
    assert is_request_kept(parser, before, with_token("first"))


def test_no_token_outlives_its_mount() -> None:
    """Nothing of a JWT, nor of the text that it came in, can be reached from the parser once the mount is gone."""
    parser = Parser(Settings())
    marker = "marker-of-this-test"
    published = json.dumps({TOKENS: json.dumps({"vault": {"token": f"published-{marker}"}})})
    parser.parse(with_token(f"parsed-{marker}"), published, "/target", "420")
    recalled(parser, with_token(f"recalled-{marker}"), published)
    spec = recalled(parser, with_token(f"recalled-{marker}"), published)
    assert [text for text in texts_reachable(spec) if marker in text] == [f"published-{marker}"]
    del spec
    kept = texts_reachable(parser)
    assert "shop" in kept  # the pod's namespace: that the mount is there
    assert [text for text in kept if marker in text or TOKENS in text] == []


def test_each_of_the_four_strings_makes_another_request() -> None:
    """Also where the same characters are parted otherwise."""
    parser = Parser(Settings())
    given = with_token("a")
    requests = [
        (given, "null", "/target", "420"),
        (given, "", "null/target", "420"),
        (given, "null", "/target4", "20"),
        (given, "null", "/other", "420"),
        (given, " null", "/target", "420"),
        (given + " ", "null", "/target", "420"),
        (with_token("a", roleName="b"), "null", "/target", "420"),
    ]
    parsed = [parser.parse(*request) for request in requests]
    again = [parser.recall(*request) for request in requests]
    assert again == parsed
    assert [spec.server for spec in again if spec] == [spec.server for spec in parsed]
    assert len({id(spec.server) for spec in again if spec}) == len(requests)
    assert [spec.target_path for spec in parsed[:3]] == ["/target", "null/target", "/target4"]
    assert [spec.objects[0].mode for spec in parsed[:3]] == [420, 420, 20]


def test_each_daemons_settings_are_its_own() -> None:
    """What one parser keeps, another does not answer with."""
    given = with_token("a")
    there, here = (Parser(Settings(vault_addr=f"http://{host}:8200")) for host in ("there", "here"))
    there.parse(given, "null", "/target", "420")
    assert here.recall(given, "null", "/target", "420") is None
    here.parse(given, "null", "/target", "420")
    assert [recalled(parser, given).server.address for parser in (there, here)] == [
        "http://there:8200",
        "http://here:8200",
    ]


def test_a_refused_request_is_not_kept() -> None:
    """Neither for its class nor for its parameters, though the class be known: it is refused again."""
    parser = Parser(Settings())
    kept = parser.parse(with_token("a"), "null", "/target", "420")
    for given in (attributes("- {objectName: ../a, secretPath: b}"), with_token("a", roleName=""), with_token("")):
        messages = set()
        for read in (parser.parse, parser.recall, parser.recall):
            with pytest.raises(InvalidClass) as refused:
                read(given, "null", "/target", "420")
            messages.add(str(refused.value))
        assert len(messages) == 1
    assert len(parser._mounts._entries) == 1
    assert is_request_kept(parser, kept, with_token("a"))


def test_the_number_of_requests_is_bounded() -> None:
    """512 are kept; then the one that was last seen longest ago goes, and its class still is known."""
    parser = Parser(Settings())
    specs = [parser.parse(with_token(f"{n}"), "null", "/target", "420") for n in range(512)]
    assert is_request_kept(parser, specs[0], with_token("0"))
    parser.parse(with_token("512"), "null", "/target", "420")
    assert len(parser._mounts._entries) == 512
    assert is_request_kept(parser, specs[0], with_token("0"))
    assert is_request_kept(parser, specs[2], with_token("2"))
    assert not is_request_kept(parser, specs[1], with_token("1"))


@pytest.mark.parametrize("where", ["attributes", "target path"])
def test_the_size_of_requests_is_bounded(where: str) -> None:
    """Of long ones fewer are kept: a hundred of 60,000 characters are more than 4 MiB."""
    parser = Parser(Settings())
    more = "x" * 60_000
    given, target_path = (
        (with_token("a", **{"csi.storage.k8s.io/more": more}), "/")
        if where == "attributes"
        else (with_token("a"), more)
    )
    specs = [parser.parse(given, "null", f"{target_path}{n}", "420") for n in range(100)]
    again = [parser.recall(given, "null", f"{target_path}{n}", "420") for n in (99, 0)]
    assert [spec is not None and spec.server is specs[n].server for n, spec in zip((99, 0), again, strict=True)] == [
        True,
        False,
    ]
    assert parser._mounts._size == sum(size for _, size in parser._mounts._entries.values()) <= 4 * 1024 * 1024


def test_warnings_count_in_the_size_of_requests() -> None:
    """They may be longer than the request that they are about."""
    parser = Parser(Settings())
    spec = mount(parser, numbered(0))
    mount(
        parser, "- {objectName: a, secretPath: b}" + " " * (len(numbered(0)) - len("- {objectName: a, secretPath: b}"))
    )
    (_, warned), (_, plain) = parser._mounts._entries.values()
    assert warned - plain == sys.getsizeof(spec.warnings[0])


def test_a_class_that_is_large_in_memory_is_told_so() -> None:
    """Whoever keeps something by its objects does without: one wide character has each of a text's take four bytes."""
    parser, many = Parser(Settings()), 40 * 1024
    specs = [mount(parser, f"- {{objectName: a, secretPath: {text * many}}}") for text in ("b", "\U0001f600")]
    specs += [mount(parser, f"- {{objectName: a, secretPath: {text * many}}}") for text in ("b", "\U0001f600")]
    assert [spec.large for spec in specs] == [False, True, False, True]


def test_a_request_is_recalled_while_its_class_is_known() -> None:
    """Each recall counts as a use of the class; with the class, what the request came to is void."""
    parser = Parser(Settings())
    given, other = with_token("a"), attributes(numbered(1))
    parser.parse(given, "null", "/target", "420")
    parser.parse(other, "null", "/target", "420")
    for n in range(2, 300):
        mount(parser, numbered(n))
        recalled(parser, given)
    assert parser.recall(other, "null", "/target", "420") is None
