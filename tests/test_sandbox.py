"""Other people's programs: what templates and expressions come to, and that hostile ones harm nobody but themselves."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from provider.errors import ProviderError
from provider.sandbox import process, worker
from provider.sandbox.lanes import Pace
from provider.sandbox.process import (
    MAX_OUTPUT,
    Check,
    Expression,
    Failure,
    Outcome,
    Program,
    Rendering,
    Result,
    Sandbox,
)
from provider.sandbox.worker import Failed
from provider.settings import MAX_RESPONSE_BYTES
from tests.properties import read_properties
from tests.stand.waiting import eventually

CANARY = "c4nary-value"
MANY = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"

HOSTILE = {
    "loops nested three deep": MANY + "{% endfor %}{% endfor %}{% endfor %}",
    "loops that write": MANY + "x{% endfor %}{% endfor %}{% endfor %}",
    "a text of a gigabyte": "{{ 'a' * 10**9 }}",
    "texts that double": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "lists of lists": "{{ [[[0] * 10000] * 10000] * 10000 }}",
    "a number of a billion digits": "{{ 9 ** (9 ** 9) }}",
    "a width of a gigabyte": "{{ '%1000000000d' % 1 }}",
    "a centred text": "{{ 'a' | center(10**9) }}",
    "padding by format": "{{ '{:>1000000000}'.format(1) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "nots": "{{ " + "not " * 15_000 + "1 }}",
    "blocks in blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops in loops": "{% for a in [1] %}" * 500 + "{% endfor %}" * 500,
    "attributes to the builtins": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ joiner.__init__.__globals__ }}",
    "a filter's attribute": "{{ ''|attr('__class__') }}",
    "format to an attribute": "{{ '{0.__class__}'.format('') }}",
    "format_map to an attribute": "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "a cycler's address": "{{ '%s' % cycler('a') }}",
    "a joiner's address": "{{ '%s' % joiner('a') }}",
    "a method's address": "{{ '%s' % secret.keys }}",
    "an address by pprint": "{{ secret | pprint }}",
    "a generator's frame": "{{ ([1] | map('upper')).gi_frame }}",
    "environment of a macro": "{% macro f() %}{% endmacro %}{{ f._environment }}",
    "a mapping's own": "{{ secret.update({'a': 1}) }}",
    "a list's own": "{{ [1].append(2) }}",
    "data again and again": "{% for i in range(5000) %}{{ secret.big }}{% endfor %}",
    "data in one list": "{{ (secret.big * 200) | list | length }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}{{ os }}",
    "chance": "{{ [1, 2] | random }}",
    "filler": "{{ lipsum(1000) }}",
    "a list that grows": "{{ range(99999) | list | sort | unique | map('string') | join * 1000 }}",
    "an unending sort": "{% for i in range(99999) %}{% if range(99999) | sort(reverse=true) %}{% endif %}{% endfor %}",
    "a regular expression's trap": "{{ ('<a ' * 99999) | striptags }}{{ ('a.' * 99999) | urlize | wordwrap(1) }}",
}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Jinja2 made ready in this process too, for the tests that call the worker's functions."""
    worker.environment()


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    made = Sandbox()
    yield made
    await made.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time enough for a program to use all of its processor time, on a machine that others keep busy."""
    monkeypatch.setattr(process, "WALL_SECONDS", 30.0)


def rendering(text: str, **sources: Any) -> Rendering:
    return Rendering(text, {alias: (value, None) for alias, value in sources.items()})


class Runs:
    """The allowances that a sandbox's children are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowances: list[worker.Allowance] = []
        order = worker.order

        def noting(wanted: str, allowance: worker.Allowance, wall: float) -> bytes:
            self.allowances.append(allowance)
            return order(wanted, allowance, wall)

        monkeypatch.setattr(process, "order", noting)


async def one(sandbox: Sandbox, program: Program, owner: str = "shop") -> Outcome | Failure:
    (result,) = await sandbox.run([program], owner)
    return result


def told(text: str, **sources: Any) -> Failed:
    """How a template fails."""
    with pytest.raises(Failed) as raised:
        worker.render(text, sources, 10_000)
    assert CANARY not in str(raised.value)
    assert raised.value.__context__ is None or raised.value.__suppress_context__
    return raised.value


# -- what templates come to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a\n{{ s.name }}\n", "a\nit's\n"),
        ("{{ s.number }} {{ s.none }} {{ s.yes }} {{ s.list }}", '5 null true [1,{"a":"b"}]'),
        ("{{ s.items }}{{ s['items'] }}", "1616"),
        ("{{ s.keys() | list | length }}", "7"),
        ("{{ s.values | default('-') }}{{ s.pop | default('-') }}{{ s.get is defined }}", "--false"),
        ("{{ s.list | map('string') }}{{ [3, 1] | reverse }}", "[\"1\",\"{'a': 'b'}\"][1,3]"),
        ("{{ range ~ '' }} {{ range(2) | list }} {{ 'a b'.split() | join('-') }}", "range [0,1] a-b"),
        (
            "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{% for _ in [1] %}{{ loop.cycle('c') }}{% endfor %}",
            "2c",
        ),
        ("{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call f(1) %}2{% endcall %}", "<12>"),
        ("{% block b %}b{% endblock %}{{ self.b() }}", "bb"),
        ("{{ s.list | json }} {{ s.list | tojson(1) }}", '[1,{"a":"b"}] [\n 1,\n {\n  "a": "b"\n }\n]'),
        ("{% if s.yes %}\n  x\n{% endif %}\ny\n", "  x\ny\n"),
        ("{{ s.gone | default('-') }}", "-"),
        ("{{ s.html }}", "<&>"),
        ("{{ s.html | json }}", '"<&>"'),
        ("{{ s.name | base64 | b64decode }}", "it's"),
        ("{% for key, value in {'b': 1, 'a': 2} | dictsort %}{{ key }}={{ value }};{% endfor %}", "a=2;b=1;"),
    ],
)
def test_templates(text: str, written: str) -> None:
    """Text is written as it is, other data as JSON; a key of a secret comes before a method of that name."""
    data = {"name": "it's", "number": 5, "none": None, "yes": True, "list": [1, {"a": "b"}], "items": 16, "html": "<&>"}
    assert worker.render(text, {"s": data}, 1000) == written


texts = st.text(st.characters(codec="utf-8")).map(lambda text: text.replace("\0", ""))


@given(texts)
def test_filters_quote_for_their_language(text: str) -> None:
    """What a filter makes of a text, its language's own reader makes the text of."""
    written = {
        name: worker.render("{{ s | " + name + " }}", {"s": text}, 10**6)
        for name in ("json", "base64", "shell", "properties", "yaml")
    }
    assert json.loads(written["json"]) == text
    assert base64.b64decode(written["base64"]).decode() == text
    assert shlex.split(written["shell"]) == [text]
    assert read_properties(f"k={written['properties']}\n") == {"k": text}
    assert yaml.safe_load(written["yaml"]) == text


def test_pem_joins_what_lists_hold() -> None:
    """Blocks of texts and lists of them come one after another, each once, ended by a newline."""
    block = "-----BEGIN X-----\nYQ==\n-----END X-----"
    other = block.replace("YQ", "Yg")
    assert worker.render("{{ [s.a, [s.b, s.a]] | pem }}", {"s": {"a": block + "\n", "b": other}}, 1000) == (
        f"{block}\n{other}\n"
    )


@pytest.mark.parametrize(
    ("text", "code", "line", "name"),
    [
        ("a\n\n{{ s.passwrd }}", "undefined", 3, "passwrd"),
        ("{{ absent }}", "undefined", 1, "absent"),
        ("\n{{ s.absent | shell }}", "undefined", 2, "absent"),
        ("\n{{ s.absent | json }}{{ s.absent | pem }}", "undefined", 2, "absent"),
        ("\n{{ s['api-key'] }}", "undefined", 2, "api-key"),
        ("{{ s['it\\'s'] }}", "undefined", 1, "it's"),
        ("{{ s.größe }}", "undefined", 1, "größe"),
        ("{{ größe }}", "undefined", 1, "größe"),
        ("{{ s | attr('b c') }}", "undefined", 1, "b c"),
        ("{{ s['" + "x" * 200 + "'] }}", "undefined", 1, ""),
        ("\n{{ s[s.value] }}", "undefined", 2, ""),
        ("\n{{ s.map[s.value] }}", "undefined", 2, ""),
        ("\n{{ s.map | attr(s.value) }}", "undefined", 2, ""),
        ("\n{{ ''.__class__ }}", "forbidden", 2, ""),
        ("\n\n{{ s.value | b64decode }}", "unwritable", 3, "is not base64 of a text"),
        ("{{ s.value | pem }}", "unwritable", 1, "holds no PEM block"),
        ("{{ s.nul | shell }}", "unwritable", 1, "holds a NUL character, which a shell has not"),
        ("{{ s.keys() }}", "unwritable", 1, "is neither text nor data; a list is made by | list"),
        ("{{ s.keys() | json }}", "unwritable", 1, "cannot be written as JSON"),
        ("{{ s.keys() | yaml }}", "unwritable", 1, "cannot be written as YAML"),
        ("{{ s.keys() | shell }}", "unwritable", 1, "is neither text nor data"),
        # A method that is not called is no key of the secret.
        ("{{ s.keys }}", "undefined", 1, "keys"),
        ("{{ s['items'] | json }}", "undefined", 1, "items"),
        ("\n{{ 'x' ~ s.get }}", "undefined", 2, "get"),
        ("{{ '%s' % s.values }}", "undefined", 1, "values"),
        ("{{ s.value.title | upper }}", "undefined", 1, "title"),
        ("{{ [s.items] | join }}", "undefined", 1, "items"),
        ("{{ s | attr('copy') | urlencode }}", "undefined", 1, "copy"),
        ("{{ [s] | map(attribute='keys') | join }}", "undefined", 1, "keys"),
        ("\n{{ s.value + 1 }}", "fails", 2, "TypeError"),
        ("\n{{ 1 / 0 }}", "fails", 2, "ZeroDivisionError"),
        ("\n{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deep", 2, ""),
        ("{{ s.value * 1000 }}", "output", 0, ""),
        ("{% if %}", "syntax", 1, "Expected an expression, got 'end of statement block'"),
        ("\n{{ s | nosuch }}", "syntax", 2, "No filter named 'nosuch'."),
        ("{{ " + "(" * 5000 + " }}", "deep", 0, ""),
    ],
)
def test_errors_name_line_and_name_and_no_value(text: str, code: str, line: int, name: str) -> None:
    """A template that fails says where and at which name; a value that was used as a name is not told."""
    failed = told(text, s={"value": CANARY, "map": {}, "nul": "\0"})
    assert (failed.code, failed.line, failed.name) == (code, line, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ s.anything }}{% set x = 1 %}{{ x }}{% for y in s %}{{ loop.index }}{{ y }}{% endfor %}", None),
        ("{{ range(3) }}{{ namespace(a=1) }}{{ dict(a=1) }}", None),
        ("\n{{ other }}{{ s }}{{ third }}", ("unknown", 2, '"other", "third"')),
        (
            "\n{{ z }}{{ y }}\n{{ x }}{{ w }}{{ v }}{{ u }}{{ z }}",
            ("unknown", 2, '"y", "z", "u", "v", "w", and 1 more'),
        ),
        ("\n\n{% include s %}", ("include", 3, "")),
        ("{% extends 'x' %}", ("include", 1, "")),
        ("{% autoescape true %}{{ s }}{% endautoescape %}", None),
        # Jinja2 would compute it as it reads the template.
        ("\n{% autoescape 9 ** (9 ** 9) %}{% endautoescape %}", ("autoescape", 2, "")),
        ("{% autoescape s %}{% endautoescape %}", ("autoescape", 1, "")),
        ("\n{% if %}", ("syntax", 2, "Expected an expression, got 'end of statement block'")),
    ],
)
def test_templates_are_checked_without_their_secrets(text: str, told: tuple[str, int, str] | None) -> None:
    """What is no template, uses another, or speaks of a secret that is none of its sources, is known beforehand."""
    try:
        worker.check(text, ["s"])
        found = None
    except Failed as failed:
        found = (failed.code, failed.line, failed.name)
    assert found == told


@pytest.mark.parametrize(
    ("expression", "data", "parse", "found"),
    [
        ("a[?n=='x'].p | [0]", {"a": [{"n": "x", "p": "s"}]}, False, ("T", "s")),
        ("a", {"a": {"b": [1, None]}}, False, ("J", '{"b":[1,null]}')),
        ("a.b", {"a": 1}, False, ("N", "")),
        ("a", '{"a": 1.5}', True, ("J", "1.5")),
        ("a", {"a": False}, True, ("J", "false")),
        ("@", '"text"', True, ("T", "text")),
    ],
)
def test_expressions(expression: str, data: object, parse: bool, found: tuple[str, str]) -> None:
    """Strings come raw, other values as JSON, null is nothing; a string is parsed where it is to hold JSON."""
    assert worker.evaluate(expression, data, parse=parse) == found


@pytest.mark.parametrize(
    ("expression", "data", "parse", "told"),
    [
        ("a", CANARY, True, ("not-json", "")),
        ("a", "[" * 100_000, True, ("not-json", "")),
        ("length(a)", {"a": True, "b": CANARY}, False, ("expression", "length")),
        ("&a", {}, False, ("no-json", "")),
        ("avg(a)", {"a": [10**400]}, False, ("fails", "OverflowError")),
        ("|".join(["[@]"] * 3000), {}, False, ("deep", "")),
    ],
)
def test_expressions_that_fail(expression: str, data: object, parse: bool, told: tuple[str, str]) -> None:
    """The error has the function's name, and nothing of the value that it was given."""
    with pytest.raises(Failed) as raised:
        worker.evaluate(expression, data, parse=parse)
    assert (raised.value.code, raised.value.name) == told
    assert CANARY not in str(raised.value)


# -- the process ---------------------------------------------------------------------------------------------------


DATA = {"a": "x", "b": {"c": [1]}}
EVERY_KIND: list[tuple[Program, Result]] = [
    (rendering("{{ secret.a }}é", secret=DATA), Outcome(True, False, "xé")),
    (Expression("b.c", DATA), Outcome(True, True, "[1]")),
    (Expression("b.d", DATA), Outcome(False)),
    (Rendering("{{ one }}", {"one": (DATA, "b.c[0]")}), Outcome(True, False, "1")),
    (Check("{{ secret }}", ("secret",)), Outcome(False)),
    (
        rendering("\n{{ secret.z }}", secret=DATA),
        Failure('line 2 speaks of "z", which is not defined', process._SENTENCES["undefined"][1], missing=True),
    ),
    (
        Rendering("{{ one }}", {"one": (DATA, "b.d")}),
        Failure(
            'it has nothing for the source "one": its jmesPath finds null',
            process._SENTENCES["nothing"][1],
            missing=True,
        ),
    ),
    (
        Expression("a", "no json", True),
        Failure("it is of a value that holds no JSON", process._SENTENCES["not-json"][1]),
    ),
    (
        rendering("{{ secret.a }}", secret={"a": "\ud800"}),
        Failure("it comes to what is no text in UTF-8", process._SENTENCES["text"][1]),
    ),
    (
        rendering("{{ secret.a }}", secret={"a": "é" * (MAX_OUTPUT // 2)}),
        Failure("it comes to more than 4 MiB, with those before it", process._SENTENCES["output"][1], limit="output"),
    ),
]


async def test_programs_of_one_mount(sandbox: Sandbox, patient: None) -> None:
    """Each program has its own result, in its order; one that fails does not keep the others."""
    assert await sandbox.run([program for program, _ in EVERY_KIND], "shop") == [result for _, result in EVERY_KIND]


def test_a_request_is_answered_frame_by_frame() -> None:
    """What a child writes for a request reads as one result for each program."""
    request = process._request([program for program, _ in EVERY_KIND])
    assert request is not None
    frames = b"".join(worker.answers(request))
    assert process._results(frames, [program for program, _ in EVERY_KIND], process._CRASHED) == [
        result for _, result in EVERY_KIND
    ]
    (frame,) = worker.answers(b"[" * 100_000)
    assert process._results(frame, [rendering("x")], process._CRASHED) == [
        Failure("it takes more than 64 MiB of memory", process._SENTENCES["memory"][1], limit="memory")
    ]


async def test_a_worker_that_hangs_is_killed_at_the_end(sandbox: Sandbox) -> None:
    """close() waits for the process no longer than its children may live, and then ends it."""
    await one(sandbox, rendering("x"))
    running = sandbox._process
    assert running is not None
    os.kill(running.pid, signal.SIGSTOP)
    await sandbox.close()
    assert running.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_template_fails_alone(sandbox: Sandbox, name: str) -> None:
    """It is told with a sentence that has nothing of the secret; the next one is served as ever."""
    secret = {"big": CANARY * 80_000, "a": "b"}
    await one(sandbox, rendering("{{ secret.a }}", secret=secret))
    result = await one(sandbox, rendering(HOSTILE[name], secret=secret))
    assert isinstance(result, Failure), name
    assert CANARY not in result.what + result.advice
    assert result.what
    assert result.advice
    assert await one(sandbox, rendering("{{ secret.a }}", secret=secret)) == Outcome(True, False, "b")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (rendering(HOSTILE["loops nested three deep"]), "than 1 s of processor time"),
        (rendering(HOSTILE["a text of a gigabyte"]), "more than 64 MiB of memory"),
        (rendering("{% for i in range(9) %}{{ s.a }}{% endfor %}", s={"a": "x" * 10**6}), "more than 4 MiB"),
        (rendering("{% for i in range(9) %}é{{ s.a }}{% endfor %}", s={"a": "é" * 250_000}), "more than 4 MiB"),
        (Expression("|".join(["[@, @]"] * 100), {}), " than "),
        (Expression("|".join(["[@, @][]"] * 80), [1]), " than "),
    ],
)
async def test_limits_are_told(sandbox: Sandbox, program: Program, told: str) -> None:
    """Each limit that a program meets is named, and those behind it say that they were not run."""
    first, second = await sandbox.run([program, rendering("x")], "shop")
    assert isinstance(first, Failure)
    assert told in first.what
    assert isinstance(second, Failure) is ("processor" in first.what)


LOOP = HOSTILE["loops nested three deep"]
# Some 0.3 s of processor time; and more memory than the small allowance has.
LONG = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
LARGE = "{% set x = 'a' * (30 * 1024 * 1024) %}"


def ever_new_loops(sandbox: Sandbox, count: int, owner: str = "hostile") -> list[asyncio.Task[None]]:
    """Tasks that run loops which nobody has seen before, each again as soon as it failed."""

    async def looping(number: int) -> None:
        for again in itertools.count():
            assert isinstance(await one(sandbox, rendering(f"{LOOP}{number}.{again}"), owner), Failure)

    return [asyncio.create_task(looping(number)) for number in range(count)]


async def test_a_new_program_does_not_wait_for_those_that_loop(sandbox: Sandbox) -> None:
    """Beside twenty texts that loop and that nobody knows, what another namespace runs for the first time ends soon."""
    await one(sandbox, rendering("{{ s }}", s=1))
    loops = ever_new_loops(sandbox, 20)
    try:
        await asyncio.sleep(1)
        async with asyncio.timeout(2):  # they would take 20 s one after another
            assert await one(sandbox, rendering("new"), "other") == Outcome(True, False, "new")
            assert await one(sandbox, rendering("{{ s }}", s=2)) == Outcome(True, False, "2")
        assert not any(loop.done() for loop in loops)
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def test_programs_that_loop_fail_in_time(sandbox: Sandbox) -> None:
    """However many loop at once: each is told within 2 s, run or put off, and that it is worth another try."""
    await one(sandbox, rendering("x"))
    await one(sandbox, rendering(LOOP))
    began = asyncio.get_running_loop().time()

    async def told(number: int) -> tuple[Failure, float]:
        result = await one(sandbox, rendering(f"{LOOP}{number}"))
        assert isinstance(result, Failure)
        return result, asyncio.get_running_loop().time() - began

    results = await asyncio.gather(*(told(number) for number in range(20)))
    assert not any(failure.final for failure, _ in results)
    assert any("put off" in failure.what for failure, _ in results)
    assert max(seconds for _, seconds in results) < 2.2


async def test_what_did_not_end_is_put_off(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, patient: None) -> None:
    """Its text is run again a while later, whatever it is run on; other namespaces learn nothing of it."""
    loop = rendering(LOOP)
    assert await one(sandbox, loop) is process._ENDLESS
    runs = Runs(monkeypatch)
    assert await one(sandbox, Rendering(loop.text, {})) is process._PUT_OFF
    assert not process._PUT_OFF.final
    assert runs.allowances == []
    monkeypatch.setattr(process, "RETRY_SECONDS", 0.0)
    assert isinstance(await one(sandbox, loop), Failure)
    assert runs.allowances == [worker.FULL]
    assert isinstance(await one(sandbox, loop, "other"), Failure)
    assert runs.allowances == [worker.FULL, worker.SMALL, worker.FULL]


async def test_what_takes_more_than_the_small_allowance_ends_all_the_same(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """A program that takes long or much memory is run with the full allowance, and at once there the next time."""
    runs = Runs(monkeypatch)
    for text in (LONG + "{{ s }}", LARGE + "{{ s }}"):
        runs.allowances.clear()
        await one(sandbox, rendering("x"))
        assert await one(sandbox, rendering(text, s=1)) == Outcome(True, False, "1")
        assert await one(sandbox, rendering(text, s=2)) == Outcome(True, False, "2")
        assert [allowance.memory for allowance in runs.allowances] == [
            *[worker.SMALL.memory] * 2,
            *[worker.FULL.memory] * 2,
        ]


async def test_what_had_too_little_of_the_processor_is_told(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that its node gave no time is no endless one: it is told so, and tried as before."""
    await one(sandbox, rendering("x"))
    monkeypatch.setattr(process, "WALL_SECONDS", 0.1)
    monkeypatch.setattr(process, "SMALL", dataclasses.replace(worker.SMALL, cpu=1.0))
    assert await one(sandbox, rendering(LOOP)) is process._STARVED
    assert not process._STARVED.final
    assert sandbox._paces.worst("shop", [process._text_digest(rendering(LOOP))]) is Pace.NEW


async def test_one_of_many_with_a_new_text_tells_for_all(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """Pods of one class that come at once run their template once; as it does not end, the others are put off."""
    await one(sandbox, rendering("x"))
    runs = Runs(monkeypatch)
    first, *others = await asyncio.gather(*(one(sandbox, rendering(LOOP)) for _ in range(5)))
    assert first is process._ENDLESS
    assert others == [process._PUT_OFF] * 4
    assert runs.allowances == [worker.SMALL, worker.FULL]


async def test_only_what_ran_is_known(sandbox: Sandbox, patient: None) -> None:
    """The program that did not end is known for it; those before it for how they ran; those behind it for nothing."""
    programs = [rendering("1"), rendering(LOOP), rendering("3")]
    assert await sandbox.run(programs, "shop") == [Outcome(True, False, "1"), process._ENDLESS, process._NOT_RUN]
    assert [sandbox._paces.worst("shop", [process._text_digest(program)]) for program in programs] == [
        Pace.QUICK,
        Pace.ENDLESS,
        Pace.NEW,
    ]


async def test_owners_that_are_known_are_bounded(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """Whose programs took too long is forgotten with time, and beyond a number of owners."""
    monkeypatch.setattr(process, "MAX_OWNERS", 2)
    for owner in ("a", "b", "c"):
        assert await one(sandbox, rendering(LARGE), owner) == Outcome(True)
    assert [owner for owner in ("a", "b", "c", "d") if sandbox._suspect(owner)] == ["b", "c"]
    monkeypatch.setattr(process, "SUSPECT_SECONDS", 0.0)
    assert not sandbox._suspect("c")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 9 ** (9 ** 9) }}",
        "{{ [9 ** (9 ** 9), s] }}",
        "{% if 9 ** (9 ** 9) %}{% endif %}",
        "{% autoescape false %}{{ 9 ** (9 ** 9) }}{% endautoescape %}",
    ],
)
async def test_reading_a_template_computes_nothing(sandbox: Sandbox, text: str) -> None:
    """Whether it is a template is found without doing what it says."""
    assert await sandbox.run([Check(text, ("s",))], "shop") == [Outcome(False)]


async def test_secrets_that_are_too_large(sandbox: Sandbox) -> None:
    """More than Vault's largest response is not sent, and data that nests too deeply is no request."""
    large = await one(sandbox, rendering("x", s={"a": "x" * MAX_RESPONSE_BYTES}))
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    deep = await one(sandbox, rendering("x", s=nested))
    assert large == deep
    assert isinstance(large, Failure)
    assert "come to more than 8 MiB, or nest too deeply" in large.what


async def test_sets_have_the_same_order_in_every_worker() -> None:
    """What is written of a set, as all keys but one are, comes out alike after a restart and on each node."""
    text = "{% for key in secret.keys() - ['password'] %}{{ key }} {% endfor %}"
    data = dict.fromkeys(("password", *"abcdefghijklmnopqrstuvwxyz"), "")
    results = set()
    for _ in range(3):
        sandbox = Sandbox()
        try:
            results.add(await one(sandbox, rendering(text, secret=data)))
        finally:
            await sandbox.close()
    (result,) = results
    assert isinstance(result, Outcome)
    assert sorted(result.text.split()) == sorted(set(data) - {"password"})


FILTERS: dict[str, str] = {
    "abs": "{{ -1 | abs }}",
    "attr": "{{ 'a' | attr('upper') is defined }}",
    "batch": "{{ [1, 2] | batch(1) }}",
    "default": "{{ secret.absent | default(1) }}",
    "d": "{{ secret.absent | d(1) }}",
    "dictsort": "{{ secret | dictsort }}",
    "filesizeformat": "{{ 1 | filesizeformat }}",
    "float": "{{ '1' | float }}",
    "format": "{{ '%s' | format(1) }}",
    "groupby": "{{ [secret] | groupby('a') }}",
    "int": "{{ '1' | int }}",
    "items": "{{ secret | items }}",
    "map": "{{ ['a'] | map('upper') }}",
    "max": "{{ [1] | max }}",
    "min": "{{ [1] | min }}",
    "reject": "{{ [1] | reject('odd') }}",
    "rejectattr": "{{ [secret] | rejectattr('a') }}",
    "replace": "{{ 'a' | replace('a', 'b') }}",
    "round": "{{ 1.5 | round }}",
    "select": "{{ [1] | select('odd') }}",
    "selectattr": "{{ [secret] | selectattr('a') }}",
    "slice": "{{ [1, 2] | slice(2) }}",
    "sort": "{{ [2, 1] | sort }}",
    "sum": "{{ [1] | sum }}",
    "unique": "{{ [1, 1] | unique }}",
    "xmlattr": "{{ secret | xmlattr }}",
    "b64decode": "{{ 'YQ==' | b64decode }}",
    "pem": "{{ secret.pem | pem }}",
}


async def test_every_filter_works_in_the_sandbox(sandbox: Sandbox) -> None:
    """What a filter imports only as it is used is there, though a child can open no file; and none shows an address."""
    data = {"a": "x", "pem": "-----BEGIN X-----\nYQ==\n-----END X-----"}
    names = sorted(worker.environment().filters)
    texts = [FILTERS.get(name, "{{ 'a b<c' | " + name + " }}") for name in names]
    assert FILTERS.keys() <= {*names}
    for name, text in zip(names, texts, strict=True):
        result = await one(sandbox, rendering(text + "{{ " + text.strip("{ }") + " ~ '' }}", secret=data))
        assert isinstance(result, Outcome), (name, result)
        assert " at 0x" not in result.text, name


async def test_nothing_of_the_daemon_comes_along(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has three descriptors and its hash seed; each render is a process that is gone afterwards."""
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", CANARY)
    with open("/dev/null") as inherited:  # noqa: ASYNC230
        os.set_inheritable(inherited.fileno(), True)
        await one(sandbox, rendering("x"))
        assert sandbox._process is not None
        worker_process = Path(f"/proc/{sandbox._process.pid}")
        assert (worker_process / "environ").read_bytes() == b"PYTHONHASHSEED=0\0"
        assert {entry.name for entry in (worker_process / "fd").iterdir()} == {"0", "1", "2"}
    children = Path(f"/proc/{sandbox._process.pid}/task/{sandbox._process.pid}/children")
    await asyncio.to_thread(eventually, lambda: not children.read_text(), "the children end")


async def test_the_worker_is_jinja_and_jmespath_alone(sandbox: Sandbox) -> None:
    """Of the provider the worker loads its own room and nothing else, so no rendering can reach the daemon's parts."""
    code = (
        "import sys; from provider.sandbox import worker; worker._load('TJ');"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in "
        "('provider', 'grpc', 'httptools', 'hvac', 'cryptography', 'yaml')))"
    )
    made = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    printed, _ = await made.communicate()
    assert eval(printed) == [  # noqa: S307
        "provider",
        "provider.sandbox",
        "provider.sandbox.quoting",
        "provider.sandbox.worker",
    ]


async def test_a_worker_that_is_killed_is_started_anew(sandbox: Sandbox) -> None:
    """The request after it, and one that is under way, are served by another."""
    assert await one(sandbox, rendering("x")) == Outcome(True, False, "x")
    assert sandbox._process is not None
    first = sandbox._process.pid
    os.kill(first, signal.SIGKILL)
    # All of them see it; one alone starts another.
    assert await asyncio.gather(*(one(sandbox, rendering("x")) for _ in range(6))) == [Outcome(True, False, "x")] * 6
    assert sandbox._process.pid != first


async def test_a_worker_that_cannot_start_is_told(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process ends at once, or there is none, the mount has an error that says so, and nothing hangs."""
    monkeypatch.setattr(process, "_CODE", "raise SystemExit(1)")
    with pytest.raises(ProviderError, match="the process that runs templates and expressions does not start"):
        await one(sandbox, rendering("x"))
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ProviderError, match="the process that runs templates and expressions does not start"):
        await one(sandbox, rendering("x"))


async def test_the_worker_ends_with_its_sandbox() -> None:
    """close() ends the process, once and again."""
    made = Sandbox()
    await one(made, rendering("x"))
    running = made._process
    assert running is not None
    await made.close()
    assert running.returncode == 0
    await made.close()


async def test_frames_that_are_none_are_a_crash() -> None:
    """What a program writes that broke out of its language is not believed."""
    deep = b"[" * 100_000
    for frame in (
        b"E" + len(deep).to_bytes(4, "big") + deep,
        b'E\x00\x00\x00\x11["deep",1e999,""]',
        b"E\x00\x00\x00\x01[",
        b'E\x00\x00\x00\x0c["nosuch",1]',
        b"T\xff\xff\xff\xffabc",
        b"T",
        b"",
    ):
        assert process._results(frame, [rendering("x")], process._CRASHED) == [process._CRASHED]


async def test_others_go_on_beside_hostile_templates(sandbox: Sandbox) -> None:
    """While as many templates loop as may run at once, the event loop goes round hundreds of times before one ends."""
    await one(sandbox, rendering("x"))
    hostile = [asyncio.create_task(one(sandbox, rendering(LOOP), owner)) for owner in "abcd"]
    rounds = 0
    while not any(task.done() for task in hostile):
        await asyncio.sleep(0.001)
        rounds += 1
    assert all(isinstance(result, Failure) for result in await asyncio.gather(*hostile))
    assert rounds > 300


def test_waiting_is_bounded() -> None:
    """A program's own time, kept by the kernel, and the time that is waited for it, are both within 2 s."""
    assert worker.SMALL.cpu < worker.FULL.cpu < process.LEAST_SECONDS < worker.WALL_SECONDS
    assert process.PATIENCE_SECONDS < worker.WALL_SECONDS
    assert process.SUSPECT_PATIENCE_SECONDS + process.SUSPECT_WALL_SECONDS + process.ENDING_SECONDS < 2
    assert worker.WALL_SECONDS + process.ENDING_SECONDS < 2


def test_memory_is_bounded() -> None:
    """All children together take what the memory limit of the DaemonSet has room for: three of the full allowance."""
    small, full = worker.SMALL.memory * process.SMALL_PLACES, worker.FULL.memory * process.FULL_PLACES
    assert small + full <= 3 * worker.FULL.memory


def test_sentences_have_one_name_at_most() -> None:
    """Each code that the worker knows has a sentence, and each sentence is one that the worker's code can ask for."""
    source = Path(worker.__file__).read_text()
    codes = set(re.findall(r'Failed\("([a-z-]+)"', source)) | {"memory"}
    assert codes == process._SENTENCES.keys()
