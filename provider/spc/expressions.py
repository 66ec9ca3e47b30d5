"""Regular expressions and JMESPath of a class: checked before anything is read, within bounds.

Their engines are loaded by the first class that has one. Both come from anyone who may write a class: RE2 takes linear
time in text and expression (https://github.com/google/re2/wiki/WhyRE2), and JMESPath is only parsed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from provider.redact import one_line
from provider.spc.findings import Findings, Refused, show
from provider.spc.model import OWN_ALIAS, AllKeys, ObjectSpec

# Characters of one expression; nobody could read a longer one.
MAX_EXPRESSION: Final = 1000
# Characters of a class's expressions together, and how many of RE2's, which may compile for a millisecond each: what
# takes half a second at most.
MAX_EXPRESSIONS_TEXT: Final = 32 * 1024
MAX_REGEXES: Final = 200
# Bytes of one compiled expression: thousands of letters in thousands of places would take gigabytes.
_MAX_COMPILED: Final = 64 * 1024
_REGEX_HELP: Final = "see https://github.com/google/re2/wiki/Syntax"
_JMESPATH_HELP: Final = "see https://jmespath.org/specification.html"


def regex(text: str) -> Callable[[str], bool]:
    """Whether the expression is found in a text. Raises Refused."""
    import re2

    options = re2.Options()
    options.max_mem = _MAX_COMPILED
    options.log_errors = False
    try:
        compiled = re2.compile(text, options=options)
    except re2.error:
        raise Refused("is not a regular expression of RE2, or too large a one", _REGEX_HELP) from None
    return lambda key: compiled.search(key) is not None


def jmes_path(text: str) -> None:
    """Raise Refused where ``text`` is no JMESPath expression, or calls a function that there is not."""
    import jmespath.exceptions
    import jmespath.functions
    import jmespath.parser

    try:
        pending: list[Any] = [jmespath.parser.Parser().parse(text).parsed]
    except (jmespath.exceptions.JMESPathError, ValueError, RecursionError):
        raise Refused("is not a JMESPath expression", _JMESPATH_HELP) from None
    while pending:
        node = pending.pop()
        if node["type"] == "function_expression" and node["value"] not in jmespath.functions.Functions.FUNCTION_TABLE:
            raise Refused(f"calls {show(node['value'])}, which is no function", _JMESPATH_HELP)
        # A slice's children are its bounds.
        pending += [child for child in node["children"] if isinstance(child, dict)]


def check_expressions(objects: Sequence[tuple[int, ObjectSpec]], findings: Findings) -> None:
    """Note a fault for each expression of the class that is none; ``objects`` are its objects with their index."""
    regexes, paths = list(_regexes(objects)), list(_jmes_paths(objects))
    if len(regexes) > MAX_REGEXES or sum(len(text) for _, text in regexes + paths) > MAX_EXPRESSIONS_TEXT:
        findings.fault(
            "objects",
            f"have more than {MAX_REGEXES} includes and excludes, or expressions of more than {MAX_EXPRESSIONS_TEXT} "
            "characters",
            "split the class",
        )
        return
    for engine, found in ((regex, regexes), (jmes_path, paths)):
        for where, text in found:
            findings.attempt(f"{where} {show(text)}", functools.partial(_check, engine), text, None)


def _check(engine: Callable[[str], object], text: str) -> None:
    if len(text) > MAX_EXPRESSION:
        raise Refused(f"is longer than {MAX_EXPRESSION} characters", "shorten it")
    engine(text)


def _regexes(objects: Sequence[tuple[int, ObjectSpec]]) -> Iterator[tuple[str, str]]:
    for index, spec in objects:
        if isinstance(spec.shape, AllKeys):
            where = f"objects[{index}] ({one_line(spec.name, 80)})"
            yield from ((f"{where} includes", text) for text in spec.shape.includes)
            yield from ((f"{where} excludes", text) for text in spec.shape.excludes)


def _jmes_paths(objects: Sequence[tuple[int, ObjectSpec]]) -> Iterator[tuple[str, str]]:
    for index, spec in objects:
        for source in spec.sources:
            if source.jmes_path is not None:
                own = "" if source.alias == OWN_ALIAS else f" sources {source.alias}"
                yield f"objects[{index}] ({one_line(spec.name, 80)}){own} jmesPath", source.jmes_path
