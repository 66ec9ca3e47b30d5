"""The image, as far as is provable without a container engine: linted, read, its builder stage done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import provider
from tests.tools import ROOT

DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
VENV = "/opt/vault-csi-provider"
UNCHECKED = b"\x01\x00\x00\x00"  # The second word of such a .pyc (PEP 552).


class Instruction(NamedTuple):
    """One instruction: its name in capitals, and the rest of it on one line."""

    name: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, without comments and line breaks."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line]


def stages() -> tuple[list[Instruction], list[Instruction]]:
    """The builder's instructions and the image's, each from its FROM on."""
    everything = instructions()
    starts = [at for at, instruction in enumerate(everything) if instruction.name == "FROM"]
    assert len(starts) == 2
    return everything[starts[0] : starts[1]], everything[starts[1] :]


def named(stage: list[Instruction], name: str) -> list[str]:
    """The texts of a stage's instructions of one name."""
    return [instruction.text for instruction in stage if instruction.name == name]


def environment(stage: list[Instruction]) -> dict[str, str]:
    """The variables that a stage sets."""
    return dict(pair.split("=", 1) for text in named(stage, "ENV") for pair in shlex.split(text))


def test_the_linter_has_nothing_to_say() -> None:
    """hadolint finds nothing, of whatever severity."""
    command: list[str | Path] = [HADOLINT, "--no-color", "--failure-threshold", "style", DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_linter_is_awake(tmp_path: Path) -> None:
    """The same linter objects to the same file when it names root, so its silence above means something."""
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text() + "USER root\n")
    done = subprocess.run([HADOLINT, "--no-color", worse], capture_output=True, text=True)
    assert done.returncode != 0
    assert "DL3002" in done.stdout


def test_both_stages_have_one_tagged_base() -> None:
    """The environment is made with the very interpreter that runs it, and of a version supported."""
    assert [text.split()[0] for text in named(instructions(), "FROM")] == ["${PYTHON_IMAGE}"] * 2
    (default,) = named(instructions(), "ARG")
    match = re.fullmatch(r"PYTHON_IMAGE=python:(\d+\.\d+)-slim(@sha256:[0-9a-f]{64})?", default)
    assert match is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(match.group(1))


def test_image_is_only_the_environment() -> None:
    """The image takes nothing but the finished environment, installs nothing, and cannot any more."""
    _, image = stages()
    assert named(image, "COPY") == [f"--from=builder {VENV} {VENV}"]
    assert named(image, "ADD") == []
    (command,) = named(image, "RUN")
    assert re.search(r"\bpip uninstall --yes\b[^&]* pip\b", command)
    assert re.search(r"\brm -rf \S*/ensurepip\b", command)
    assert not re.search(r"\b(apt-get|apk|pip install|gcc|curl|wget)\b", command)


def test_image_leaves_the_user_to_the_manifest() -> None:
    """No stage names a user: a manifest that names none gets root, who may bind in root's socket directory."""
    assert named(instructions(), "USER") == []


def test_image_starts_the_daemon_itself() -> None:
    """The daemon is process 1 and gets SIGTERM, with the arguments that the manifest gives."""
    _, image = stages()
    (entrypoint,) = named(image, "ENTRYPOINT")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (script,) = project["scripts"]
    assert json.loads(entrypoint) == [script]
    assert named(image, "CMD") == []
    assert environment(image)["PATH"].split(":")[0] == f"{VENV}/bin"


def test_image_sets_what_the_daemon_relies_on() -> None:
    """gRPC's own lines are silenced, output is not held back, and no start tries to write bytecode."""
    _, image = stages()
    assert environment(image) | {"PATH": ""} == {
        "PATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "GRPC_VERBOSITY": "NONE",
    }


def test_image_has_certificate_authorities() -> None:
    """A base image without CA certificates fails the build instead of every TLS handshake."""
    _, image = stages()
    (command,) = named(image, "RUN")
    assert command.endswith("&& test -s /etc/ssl/certs/ca-certificates.crt")


def test_image_says_what_it_is() -> None:
    """Title, description and licence are the package's."""
    _, image = stages()
    labels = dict(pair.split("=", 1) for text in named(image, "LABEL") for pair in shlex.split(text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image."
    assert labels == {
        f"{prefix}title": project["name"],
        f"{prefix}description": project["description"],
        f"{prefix}licenses": project["license"],
    }


def test_builder_installs_only_locked_wheels() -> None:
    """Every installation is of hashed wheels, or of the wheel just built, from no index."""
    builder, _ = stages()
    commands = [part.strip() for text in named(builder, "RUN") for part in text.split("&&")]
    installs = [command for command in commands if re.search(r"\bpip\b.* install\b", command)]
    assert len(installs) == 3
    for command in installs:
        locked = "--require-hashes" in command and "--only-binary :all:" in command
        assert locked or "--no-index --no-deps" in command, command


def pins(lock: str) -> dict[str, str]:
    """Each name that a lock pins, with its version and hashes as written."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "requirements" / lock).read_text())
    found = (re.match(r"([\w.-]+)(==.*)", line) for line in text.splitlines())
    return {match[1]: match[2].strip() for match in found if match}


def test_build_lock_is_part_of_the_tests_lock() -> None:
    """The image's wheel is built by the versions that the tests build with, and by all that a build needs."""
    build, dev = pins("build.txt"), pins("dev.txt")
    assert {name: pin for name, pin in build.items() if dev.get(name) != pin} == {}
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    for requirement in map(Requirement, table["requires"]):
        version = re.match(r"==([\w.]+)", build[requirement.name])
        assert version is not None
        assert version[1] in requirement.specifier


def ignored() -> list[str]:
    """The paths that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    return [rule.removeprefix("!") for rule in rules if rule.startswith("!")]


def test_context_is_what_is_copied() -> None:
    """Docker is sent each file that the builder copies, and no other."""
    builder, _ = stages()
    copied = {source.rstrip("/") for text in named(builder, "COPY") for source in text.split()[:-1]}
    assert copied == set(ignored())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the builder stage was carried out, with `/` of the container at its top.

    COPY and RUN do here what they do there; paths below /opt, /src and /dist are moved, and `python` and
    `pip` are this environment's. That proves what success needs: files, locks, wheels for this Python.
    """
    root = tmp_path_factory.mktemp("image")
    builder, _ = stages()
    (workdir,) = named(builder, "WORKDIR")
    here = root / workdir.lstrip("/")
    here.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for instruction in builder:
        if instruction.name == "COPY":
            *sources, target = instruction.text.split()
            for source in sources:
                copy(ROOT / source, here / target / ("" if source.endswith("/") else Path(source).name))
        elif instruction.name == "RUN":
            command = re.sub(r"(?<![\w.])/(opt|src|dist)\b", rf"{root}/\1", instruction.text)
            done = subprocess.run(
                ["/bin/sh", "-euc", command],
                cwd=here,
                env=os.environ | {"PATH": path, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
                capture_output=True,
                text=True,
                umask=0o022,  # Docker's, whatever the tests run under
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return root


def copy(source: Path, target: Path) -> None:
    """Copy a file or a directory's content, as COPY does after .dockerignore."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def test_builder_stage_makes_a_daemon_that_runs(built: Path) -> None:
    """The environment that the image keeps starts the daemon, with the image's variables and nothing else."""
    _, image = stages()
    variables = environment(image) | {"PATH": f"{built}{VENV}/bin"}
    done = subprocess.run(
        ["vault-csi-provider", "-version"],
        executable=f"{built}{VENV}/bin/vault-csi-provider",
        cwd=built,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert provider.__version__ in done.stdout


def test_environment_holds_the_runtime_alone(built: Path) -> None:
    """No pip, no build tool and no test tool is in the environment: just the lock and the package."""
    (packages,) = (built / VENV.lstrip("/") / "lib").glob("python3.*/site-packages")
    installed = {re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() for path in packages.glob("*.dist-info")}
    locked = {re.sub(r"[-_.]+", "-", name).lower() for name in pins("runtime.txt")}
    assert installed - {"vault-csi-provider"} <= locked
    assert "vault-csi-provider" in installed
    assert not list((built / VENV.lstrip("/") / "bin").glob("pip*"))


def test_environment_is_every_users(built: Path) -> None:
    """Whatever user a manifest sets, it may read each file, enter each directory and run each program."""
    environment_ = built / VENV.lstrip("/")
    for path in environment_.rglob("*"):
        if path.is_symlink():
            continue
        wanted = 0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444
        assert path.stat().st_mode & wanted == wanted, path


def test_what_is_compiled_is_compiled_anew() -> None:
    """compileall overwrites what an import before it has compiled, whatever pip this environment has."""
    commands = [part for text in named(instructions(), "RUN") for part in text.split("&&") if "compileall" in part]
    assert len(commands) == 2
    for command in commands:
        assert "compileall -f -q --invalidation-mode unchecked-hash" in command


def test_environment_comes_compiled(built: Path) -> None:
    """Each module has bytecode that is used without a look at its source, despite a read-only root."""
    (packages,) = (built / VENV.lstrip("/") / "lib").glob("python3.*/site-packages")
    for module in packages.rglob("*.py"):
        bytecode = module.parent / "__pycache__" / f"{module.stem}.{sys.implementation.cache_tag}.pyc"
        assert bytecode.read_bytes()[4:8] == UNCHECKED, module
