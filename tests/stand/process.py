"""Processes that the stand starts, and that never outlive it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("launch.py")
_STOP_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""


class StandError(RuntimeError):
    """A part of the stand is missing, did not start or did not answer; the message says which and why."""


class Process:
    """A running command with its own process group and log file; stopped by `stop`, or with its parent.

    argv[0] is an absolute path. `log` collects stdout and stderr, appended. `owner` is a (uid, gid) to run
    as, which takes root. `stop_signal` asks the command to stop. Raises StandError when it cannot start.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        owner: tuple[int, int] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.argv = tuple(argv)
        self.log = log
        self._env = env
        self._cwd = cwd
        self._owner = owner
        self._stop_signal = stop_signal
        self._popen: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._started = threading.Event()
        self._exited = threading.Event()
        # The kernel sends the death signal when the *thread* that started the child ends (prctl(2)), so a
        # thread is kept for as long as the child runs.
        threading.Thread(target=self._run, name=f"wait-{Path(argv[0]).name}", daemon=True).start()
        self._started.wait()
        if self._failure is not None:
            raise StandError(f"cannot start {argv[0]}: {self._failure}") from self._failure

    def _run(self) -> None:
        uid, gid = ("-", "-") if self._owner is None else map(str, self._owner)
        launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
        try:
            with self.log.open("ab") as output:
                self._popen = subprocess.Popen(
                    [*launcher, str(int(self._stop_signal)), uid, gid, *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._env,
                    cwd=self._cwd,
                    start_new_session=True,
                )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        self._popen.wait()
        self._exited.set()

    @property
    def pid(self) -> int:
        """The process id, also the id of its group."""
        assert self._popen is not None  # The constructor raised otherwise.
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not exited yet (a paused process is running)."""
        return not self._exited.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while running."""
        assert self._popen is not None
        return self._popen.returncode if self._exited.is_set() else None

    def wait(self, seconds: float) -> int | None:
        """Wait for the exit and return its status, or None when it has not come within `seconds`."""
        self._exited.wait(seconds)
        return self.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self, grace: float = _STOP_GRACE) -> int:
        """Ask to stop, wait `grace` seconds, then kill; returns the exit status."""
        if self.running:
            # The leader alone: servers such as PostgreSQL stop their children in order by themselves.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, self._stop_signal)
            self.signal(signal.SIGCONT)  # A paused process would not see the signal before.
            self._exited.wait(grace)
        return self.kill()

    def kill(self) -> int:
        """Kill the whole group at once and wait for the end; returns the exit status."""
        self.signal(signal.SIGKILL)
        self._exited.wait()
        assert self._popen is not None
        return self._popen.returncode

    def log_tail(self, lines: int = 15) -> str:
        """The end of the log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on, nor on the next one (which OpenBao takes too).

    Below the range that the kernel gives to outgoing connections, so that a server which is stopped and
    started again finds its port free.
    """
    floor = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    first, last = (10_000, floor - 2) if floor > 12_000 else (20_000, 60_000)
    for _ in range(200):
        port = random.SystemRandom().randrange(first, last, 2)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for candidate in (port, port + 1):
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", candidate))
            return port
    raise StandError("no free TCP port found on 127.0.0.1")
