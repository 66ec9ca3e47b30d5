"""docs/security.md is true: each claim's test exists, each limit is the code's, each guardrail is a flag."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from provider import settings
from provider.cli import flags
from provider.settings import MIB
from tests.tools import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
LINKED = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", PAGE)
LINK = r"\[test_\w+\]\(\.\./tests/\w+\.py\)"
# What is limited, the limit, its name, and where it is reached.
LIMITS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(provider\.[\w.]+)` \|(.*)$", PAGE, re.MULTILINE)


def section(heading: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def defined_in(file: str) -> set[str]:
    """The names of the tests in a file, in classes too."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, functions)}


def shown(value: float) -> str:
    """A limit as the page writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    if value >= MIB and value % MIB == 0:
        return f"{value // MIB} MiB"
    return f"{value // 1024} KiB" if value >= 8192 and value % 1024 == 0 else f"{value:,}"


@pytest.mark.parametrize("file", sorted({file for _, file in LINKED}))
def test_every_linked_test_exists(file: str) -> None:
    """A claim whose test was renamed or removed is noticed."""
    assert {name for name, linked in LINKED if linked == file} <= defined_in(file)


@pytest.mark.parametrize(
    "adversary", ["A tenant", "A compromised pod", "A compromised provider pod", "The network", "Vault's operator"]
)
def test_every_claim_links_a_test(adversary: str) -> None:
    """Each row of each adversary's table says what protects, and links a test."""
    rows = [row for row in section(adversary).splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 4
    for row in rows:
        claim, since, by = (cell.strip() for cell in row.strip("|").split("|"))
        assert claim
        assert since
        assert re.search(LINK, by), claim


@pytest.mark.parametrize(("what", "value", "name", "reached"), LIMITS, ids=[name for _, _, name, _ in LIMITS])
def test_every_limit_is_the_codes(what: str, value: str, name: str, reached: str) -> None:
    """Each limit of the page is a constant of that name and value, and a test that comes to it is linked."""
    assert re.fullmatch(rf" {LINK}(, {LINK})* \|", reached), what
    module, _, constant = name.rpartition(".")
    assert value == shown(getattr(importlib.import_module(module), constant)), what


def test_every_limit_of_the_settings_is_told() -> None:
    """The limits that several rooms keep are all on the page, and each kind of input has some."""
    told = {name.rpartition(".")[2] for _, _, name, _ in LIMITS}
    assert {name for name in vars(settings) if name.startswith("MAX_")} <= told
    assert len(told) > 40


def test_every_guardrail_is_a_flag() -> None:
    """Each flag of the guardrails is on the page, and each that the page names exists."""
    named = set(re.findall(r"`--([a-z-]+)", PAGE))
    known = {flag.name for flag in flags.FLAGS}
    assert named <= known
    assert {flag.name for flag in flags.FLAGS if flag.group.startswith("Guardrails")} <= named
