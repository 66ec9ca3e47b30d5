"""What the daemon's process keeps from others: its memory, when it crashes and while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from provider.cli import process
from provider.sandbox.process import Expression, Outcome, Sandbox
from tests.stand.waiting import eventually
from tests.test_examples import clean_environment
from tests.tools import ROOT

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
IDLE = [sys.executable, "-I", "-S", "-c", "print(1, flush=True); import time; time.sleep(600)"]


class Crash:
    """A process in a directory of its own, which allows core dumps, and how it ended."""

    def __init__(self, argv: Sequence[str], directory: Path, *, ready: str) -> None:
        directory.mkdir()
        log = directory / "log"
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                argv,
                cwd=directory,
                env=clean_environment() | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_allow_core_dumps,
            )
        try:
            eventually(lambda: ready in log.read_text(), f"{argv} says {ready!r}")
            self.limit = resource.prlimit(self._popen.pid, resource.RLIMIT_CORE)
            self._popen.send_signal(signal.SIGSEGV)
            _, self.status = os.waitpid(self._popen.pid, 0)
        finally:
            self._popen.kill()
        self.said = log.read_text()
        self.left = {path.name for path in directory.iterdir()} - {"log"}

    @property
    def dumped(self) -> bool:
        """Whether the kernel says that its memory was dumped."""
        assert os.WTERMSIG(self.status) == signal.SIGSEGV
        return os.WCOREDUMP(self.status)


def _allow_core_dumps() -> None:
    # Only root raises the hard limit, and a container may lack even root's right to.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, UNLIMITED)


def test_crash_of_the_daemon_dumps_no_core(tmp_path: Path) -> None:
    """Where another process' memory is dumped when it crashes, the daemon's is not, and the log has no word of it.

    On a machine that dumps nothing at all it is the limit that shows it, and the flag of the kernel, which
    test_others_of_the_same_user_see_nothing looks at from outside.
    """
    control = Crash(IDLE, tmp_path / "control", ready="1")
    socket = tmp_path / "vault.sock"
    argv = [sys.executable, "-m", "tests.daemon", f"--endpoint={socket}", "--health-addr="]
    crash = Crash(argv, tmp_path / "daemon", ready="mounts are served")
    assert not crash.dumped
    assert crash.left == set()
    assert all(json.loads(line) for line in crash.said.splitlines())
    # A node's crash reporter, which is a program, is given a dump unless the limit is just this.
    assert process.NO_CORE_BYTES == 1
    highest = 1 if control.limit[1] == resource.RLIM_INFINITY else min(1, control.limit[1])
    assert crash.limit == (highest, highest)


def test_daemon_may_open_as_many_files_as_it_is_let(tmp_path: Path) -> None:
    """The daemon takes the hard limit of open files for its own, whatever it was started with."""
    argv = [sys.executable, "-m", "tests.daemon", f"--endpoint={tmp_path}/vault.sock", "--health-addr="]
    log = tmp_path / "log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            argv,
            env=clean_environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 900)),
        )
    try:
        eventually(lambda: "mounts are served" in log.read_text(), "the daemon serves")
        assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (900, 900)
    finally:
        daemon.kill()
        daemon.wait()


async def test_worker_of_templates_dumps_no_core() -> None:
    """The process that runs programs out of classes has the limit too, and nothing loaded that calls the kernel."""
    sandbox = Sandbox()
    try:
        assert await sandbox.run([Expression("a", {"a": 1})], "shop") == [Outcome(True, True, "1")]
        assert sandbox._process is not None
        worker = sandbox._process.pid
        assert resource.prlimit(worker, resource.RLIMIT_CORE) == (process.NO_CORE_BYTES, process.NO_CORE_BYTES)
        assert "_ctypes" not in await asyncio.to_thread(Path(f"/proc/{worker}/maps").read_text)
    finally:
        await sandbox.close()


_AS_NOBODY = """
import ctypes, json, os, resource
from provider.cli import process
from prometheus_client import CollectorRegistry, ProcessCollector

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
# A change of user did that already; a program starts with it set.
process.control(4, 1)
me = os.getpid()


def another() -> bool:
    # Of the same user and with no capability, as what came out of the sandbox would be.
    child = os.fork()
    if child == 0:
        try:
            open(f"/proc/{me}/environ", "rb").close()
            open(f"/proc/{me}/maps", "rb").close()
            os._exit(0)
        except PermissionError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


open_to_others = another()
process.keep_memory_private()
registry = CollectorRegistry()
ProcessCollector(registry=registry)
copy = os.memfd_create("pem")
os.write(copy, b"x")
print(json.dumps({
    "before": open_to_others,
    "after": another(),
    "limit": resource.getrlimit(resource.RLIMIT_CORE),
    "descriptors": len(os.listdir("/proc/self/fd")) > 2,
    "copy": open(f"/proc/self/fd/{copy}").read(),
    "metrics": sorted(metric.name for metric in registry.collect()),
}))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What a process without any right sees of itself, and another of its user of it."""
    done = subprocess.run([sys.executable, "-c", _AS_NOBODY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_others_of_the_same_user_see_nothing(seen: dict[str, Any]) -> None:
    """Another process of the daemon's user, which could read its environment and memory map, cannot any more."""
    assert (seen["before"], seen["after"]) == (True, False)
    assert seen["limit"] == [process.NO_CORE_BYTES, process.NO_CORE_BYTES]


def test_daemon_still_sees_itself(seen: dict[str, Any]) -> None:
    """The daemon's own descriptors, copies of certificates and metrics of itself are open to it without any right."""
    assert seen["descriptors"]
    assert seen["copy"] == "x"
    assert {"process_open_fds", "process_resident_memory_bytes", "process_cpu_seconds"} <= set(seen["metrics"])


def test_lower_limit_stays() -> None:
    """Where a container's limit is 0 already, which only a capability may raise, the daemon starts all the same."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        "from provider.cli.process import keep_memory_private; keep_memory_private();"
        "print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(0, 0)", done.stderr


def test_refusal_of_the_kernel_is_an_error() -> None:
    """What the kernel refuses is not taken for done."""
    with pytest.raises(OSError, match=r"prctl\(4\): Invalid argument"):
        process.control(4, 7)
