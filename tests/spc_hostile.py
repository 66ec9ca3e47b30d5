"""A program that parses hostile classes under hard limits; tests/test_spc_hostile.py runs it.

``python -m tests.spc_hostile`` parses each of CLASSES in a process that may take 64 MiB of memory over what is in use
with the class at hand, and one second of CPU. It prints a line of JSON for each that came to an end: its name,
``parsed`` or ``refused``, and the size of the message.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from provider.errors import InvalidClass, encoded_size
from provider.settings import MAX_ATTRIBUTES_BYTES, MIB, Settings
from provider.spc import Parser
from tests.spc_classes import GIVEN, TOKENS

# What the JSON around the objects takes at most.
ROOM = MAX_ATTRIBUTES_BYTES - 1024


def with_objects(objects: str) -> str:
    return json.dumps({**GIVEN, "objects": objects}, ensure_ascii=False)


def laughs() -> str:
    lines = ["- &a0 [" + ",".join(["lol"] * 10) + "]"]
    lines += [f"- &a{n} [" + ",".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 12)]
    return with_objects("\n".join(lines))


def merged_laughs() -> str:
    lines = ["- &a0 {" + ",".join(f"k{n}: v" for n in range(10)) + "}"]
    lines += [f"- &a{n} {{<<: [" + ",".join([f"*a{n - 1}"] * 10) + "]}" for n in range(1, 12)]
    return with_objects("\n".join(lines))


def one_text_many_times() -> str:
    text = "x" * (512 * 1024)
    return with_objects(
        f'- {{objectName: a, secretPath: b, secretArgs: {{t: &t "{text}", u: [' + ",".join(["*t"] * 9000) + "]}}"
    )


def deep_by_aliases() -> str:
    lines = ["- &a0 " + "[" * 60 + "]" * 60]
    lines += [f"- &a{n} " + "[" * 60 + f"*a{n - 1}" + "]" * 60 for n in range(1, 300)]
    return with_objects("\n".join(lines))


def one_object(secret_args: str) -> str:
    return with_objects("- objectName: a\n  secretPath: b\n  secretArgs: " + secret_args)


def one_field(field: str, text: str) -> str:
    return with_objects(f"- {{objectName: a, secretPath: b, {field}: {text}}}")


def expressions(number: int, fields: str) -> str:
    return with_objects("\n".join(f"- {{objectName: a{n}, secretPath: b, {fields}}}" for n in range(number)))


def attributes_of_many_names() -> str:
    return json.dumps(GIVEN | {f"k{n}": "" for n in range(100_000)})


CLASSES: dict[str, Callable[[], str]] = {
    "laughs": laughs,
    "merged laughs": merged_laughs,
    "one text many times": one_text_many_times,
    "deep by aliases": deep_by_aliases,
    "deep flow sequences": lambda: with_objects("[" * ROOM),
    "deep flow mappings": lambda: with_objects("{a: " * (ROOM // 4)),
    "deep block sequences": lambda: with_objects("- " * (ROOM // 2)),
    "deep explicit keys": lambda: with_objects("? " * (ROOM // 2)),
    "many empty objects": lambda: with_objects("- {}\n" * (ROOM // 7)),
    "many unknown fields": lambda: with_objects("- {" + ",".join(f"objectNam{n:07}: x" for n in range(24_000)) + "}"),
    "long unknown field": lambda: with_objects("- {? '" + "objectName" * 100_000 + "' : x}"),
    "many duplicate fields": lambda: with_objects("- {" + "a: x," * (ROOM // 6) + "}"),
    "many tag directives": lambda: with_objects("".join(f"%TAG !a{n}! x\n" for n in range(100_000)) + "--- []"),
    "many documents": lambda: with_objects("--- []\n" * (ROOM // 8)),
    "one long comment": lambda: with_objects("#" * ROOM),
    "many comments": lambda: with_objects("#\n" * (ROOM // 3)),
    "one long plain text": lambda: with_objects("x" * ROOM),
    "one long key": lambda: with_objects("- {? " + "x" * (ROOM - 100) + " : y}"),
    "huge number": lambda: one_object("9" * (1024 * 1024 - 100)),
    "huge hexadecimal": lambda: one_object("0x" + "f" * (1024 * 1024 - 100)),
    "huge fraction": lambda: one_object("0." + "1" * (1024 * 1024 - 100) + "e-300"),
    "body of controls": lambda: one_object('"' + "\\x01" * (ROOM // 5) + '"'),
    "body of controls and wide text": lambda: one_object('"\U0001f600' + "\\x01" * (ROOM // 5) + '"'),
    "wide text": lambda: one_object('"\U0001f600' + "x" * (1024 * 1024 - 100) + '"'),
    "many wide texts": lambda: one_object('["' + '", "\U0001f600'.join(["x" * 30] * 25_000) + '"]'),
    "encoded dots": lambda: with_objects("- {objectName: a, secretPath: 'a/%" + "25" * (400_000) + "2e%2e'}"),
    "many encoded dots": lambda: with_objects(
        "\n".join(f"- {{objectName: a{n}, secretPath: 'a/%" + "25" * 400 + "2e%2e'}" for n in range(1000))
    ),
    "deep object names": lambda: with_objects(
        "\n".join(f"- {{objectName: {n}/" + "a/" * 490 + "a, secretPath: b}" for n in range(1000))
    ),
    "long object names": lambda: with_objects(
        "\n".join(f"- {{objectName: {n:03}" + "é" * 480 + ", secretPath: b}" for n in range(1000))
    ),
    "long query": lambda: with_objects("- {objectName: a, secretPath: 'b?" + "a&" * 500_000 + "'}"),
    "long duration": lambda: one_field("refreshAfter", "1" * (1024 * 1024 - 100)),
    "long duration of many parts": lambda: json.dumps(GIVEN | {"refreshAfter": "1h" * 1_000_000}),
    "long percentage": lambda: one_field("renewPercent", "1" * (1024 * 1024 - 100)),
    "long parameter": lambda: json.dumps(GIVEN | {"vaultAddress" * 170_000: "x"}),
    "many names": attributes_of_many_names,
    "many repeated names": lambda: "{" + ",".join(['"a":""'] * 290_000) + "}",
    "long wrong address": lambda: json.dumps(GIVEN | {"vaultAddress": "http://[" + "a" * 2_000_000}),
    "long mount": lambda: json.dumps(GIVEN | {"vaultAuthMountPath": "/." * 1_000_000}),
    "many regular expressions": lambda: expressions(
        2, "secretKey: '*', includes: [" + "'[\\pL\\pN]{40}x'," * 100 + "]"
    ),
    "too many regular expressions": lambda: expressions(40, "secretKey: '*', includes: [" + "'\\pL{999}'," * 100 + "]"),
    "regular expressions that repeat": lambda: expressions(
        1, "secretKey: '*', excludes: [" + "'((((a{9}){9}){9}){9}){9}'," * 200 + "]"
    ),
    "regular expressions in brackets": lambda: expressions(30, f"secretKey: '*', includes: ['{'(' * 500}{')' * 500}']"),
    "JMESPath that doubles": lambda: expressions(32, f"jmesPath: '{'[@,@]|' * 166}@'"),
    "JMESPath in brackets": lambda: expressions(32, f"jmesPath: '{'(' * 1000}'"),
    "JMESPath of JSON": lambda: expressions(32, f"jmesPath: '`{'[' * 998}`'"),
    "too much JMESPath": lambda: expressions(1000, f"jmesPath: '{'[@,@]|' * 166}@'"),
    "many sources": lambda: expressions(
        150, "template: x, sources: {" + ",".join(f"a{n}: {{secretPath: b}}" for n in range(60)) + "}"
    ),
    "long templates": lambda: expressions(10, "template: '" + "{{" * 40_000 + "'"),
    "attributes of brackets": lambda: "[" * MAX_ATTRIBUTES_BYTES,
    "attributes of objects": lambda: '{"a":' * (MAX_ATTRIBUTES_BYTES // 5),
    "attributes of a list": lambda: '{"a":[' + '{"":{}},' * (MAX_ATTRIBUTES_BYTES // 9),
    "attributes of spaces": lambda: " " * MAX_ATTRIBUTES_BYTES,
    "attributes of a number": lambda: "9" * MAX_ATTRIBUTES_BYTES,
    "attributes too large": lambda: json.dumps(GIVEN | {"objects": "x" * MAX_ATTRIBUTES_BYTES}),
    "tokens of brackets": lambda: json.dumps(GIVEN | {TOKENS: "[" * (256 * 1024)}),
    "tokens of objects": lambda: json.dumps(GIVEN | {TOKENS: "[" + '{"":{}},' * 32_000 + "1]"}),
    "tokens too large": lambda: json.dumps(GIVEN | {TOKENS: "[" + '{"":{}},' * 120_000 + "1]"}),
}


def parse(parser: Parser, attributes: str, cost: Callable[[], object]) -> tuple[str, int]:
    """What comes of the class, after setting the limits: of memory from what is in use, of CPU from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + 64 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # The signal ends the process. RLIMIT_CPU would count whole seconds.
    signal.setitimer(signal.ITIMER_PROF, 1.0)
    cost()
    try:
        parser.parse(attributes, "null", "/target", "420")
    except InvalidClass as error:
        return "refused", encoded_size(str(error))
    return "parsed", 0


def spin() -> None:
    while True:
        pass


# What takes more than it may, to show that the limits hold.
CHECKS: dict[str, Callable[[], object]] = {"too much memory": lambda: bytes(80 * MIB), "too much time": spin}


def main() -> None:
    parser = Parser(Settings())
    # What a first parse loads stays out of the count.
    shaped = (
        "- {objectName: a, secretPath: b, secretKey: '*', includes: [c]}\n- {objectName: d, secretPath: b, jmesPath: e}"
    )
    parser.parse(with_objects(shaped), "null", "/target", "420")
    for name in (*CLASSES, *CHECKS):
        # Each in a process of its own, since a limit once set stays.
        child = os.fork()
        if not child:
            attributes = CLASSES.get(name, laughs)()
            result, size = parse(parser, attributes, CHECKS.get(name, int))
            print(json.dumps([name, result, size]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
