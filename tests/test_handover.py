"""A second daemon takes the socket over under load, without one failed mount.

Run as a program (`python -m tests.test_handover SOCKET REPORT`), this is the load: the stand's drivers, each with a
thread and a connection of its own. They mount without a pause until SIGTERM; then the program writes to REPORT, as
JSON, how many mounts each daemon answered and to how many drivers, and every failure.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.stand.driver import Driver
from tests.stand.kubeapi import Pod
from tests.stand.process import Process
from tests.test_cli import ROOT, daemon

DRIVERS = 40
HANDOVERS = 3
# Mostly at once: a stop that cuts calls off hits those that just arrive. Some long enough to be in flight through it.
MOUNT_SECONDS = (0.0, 0.0, 0.0, 0.1)


class Load:
    """Drivers that mount until told to stop."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._answers: Counter[str] = Counter()
        self._drivers: dict[str, set[int]] = {}
        self._failures: list[str] = []
        self._warm = threading.Barrier(DRIVERS + 1)

    def run(self, report: Path) -> None:
        """Start all drivers, say "going" once each has tried a mount, and report at SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        threads = [threading.Thread(target=self._drive, args=(number,)) for number in range(DRIVERS)]
        for thread in threads:
            thread.start()
        self._warm.wait()
        print("going", flush=True)
        self._stop.wait()
        for thread in threads:
            thread.join()
        drivers = {pid: len(numbers) for pid, numbers in self._drivers.items()}
        report.write_text(json.dumps({"answers": self._answers, "drivers": drivers, "failures": self._failures}))

    def _drive(self, number: int) -> None:
        with Driver(self._path, timeout=60) as driver:
            turn = 0
            while not self._stop.is_set():
                seconds = MOUNT_SECONDS[(number + turn) % len(MOUNT_SECONDS)]
                try:
                    self._mount(driver, number, seconds)
                except Exception as error:  # noqa: BLE001  # whatever it is, it is a mount that failed
                    with self._lock:
                        self._failures.append(f"{type(error).__name__}: {error}")
                if turn == 0:
                    self._warm.wait()
                turn += 1

    def _mount(self, driver: Driver, number: int, seconds: float) -> None:
        pod = Pod("shop", f"web-{number}", f"uid-{number}", "web", "node-1", "Running")
        objects = f"- objectName: pid\n  secretPath: sleep/{seconds}\n  secretKey: pid"
        pid = driver.mount(pod, {"roleName": "shop", "objects": objects}).text("pid")
        with self._lock:
            self._answers[pid] += 1
            self._drivers.setdefault(pid, set()).add(number)


@contextmanager
def load(path: Path, report: Path) -> Iterator[Process]:
    """The load as a process of its own, going when the context opens."""
    argv = [sys.executable, "-m", "tests.test_handover", str(path), str(report)]
    process = Process(argv, log=report.with_suffix(".log"), cwd=ROOT)
    try:
        while "going" not in process.log.read_text():
            assert process.running, process.log_tail()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()


def test_socket_changes_hands_under_load_without_a_failed_mount(tmp_path: Path) -> None:
    """Three times a new daemon takes the path over from one that is then stopped, under 40 drivers on connections of
    their own: no mount fails, every daemon answers some, the last one every driver, and each old one ends with 0."""
    path, written = tmp_path / "vault.sock", tmp_path / "report.json"
    with ExitStack() as stack:
        unlimited = "--max-pod-mounts=0"  # each driver mounts for one pod, as often as it can
        daemons = [stack.enter_context(daemon("tests.daemon", path, unlimited))]
        clients = stack.enter_context(load(path, written))
        for number in range(HANDOVERS):
            successor = stack.enter_context(daemon("tests.daemon", path, unlimited, name=f"successor-{number}"))
            successor.told("mounts are served")
            daemons[-1].signal(signal.SIGTERM)
            assert daemons[-1].ended() == 0
            daemons.append(successor)
            assert path.is_socket()
        clients.signal(signal.SIGTERM)
        assert clients.wait(60) == 0, clients.log_tail()
        report: dict[str, Any] = json.loads(written.read_text())
        assert report["failures"] == []
        pids = [str(each.pid) for each in daemons]
        assert sorted(report["answers"]) == sorted(pids)
        assert report["drivers"][pids[-1]] == DRIVERS
        daemons[-1].signal(signal.SIGTERM)
        assert daemons[-1].ended() == 0
        assert not path.exists()


if __name__ == "__main__":
    Load(sys.argv[1]).run(Path(sys.argv[2]))
