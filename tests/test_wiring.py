"""The daemon as a program: what is served where, and how it settles."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from provider.cli import daemon, main
from provider.cli.parts import Parts
from provider.mount import MountResult
from provider.render import RenderedFile
from provider.settings import Settings
from provider.spc import MountSpec, ObjectSpec, Parser
from provider.telemetry.events import Telemetry
from tests.live import WRITTEN_SECONDS
from tests.stand.driver import Driver
from tests.stand.kubeapi import Pod
from tests.stand.process import Process, free_port
from tests.stand.waiting import eventually
from tests.test_examples import clean_environment
from tests.tools import ROOT


class Collected:
    """A mount whose file tells how the garbage collector is set; what is preloaded takes until the first mount."""

    def __init__(self) -> None:
        self._mounted = threading.Event()

    async def mount(self, spec: MountSpec, spent: Callable[[float], None]) -> MountResult:
        told = json.dumps(
            {
                "enabled": gc.isenabled(),
                "frozen": gc.get_freeze_count(),
                "threshold": gc.get_threshold(),
                "collections": [generation["collections"] for generation in gc.get_stats()],
            }
        )
        self._mounted.set()
        return MountResult((RenderedFile("gc", 0o600, told.encode()),), (("gc", "1"),))

    async def check(self, templates: Sequence[ObjectSpec], owner: str) -> None:
        raise NotImplementedError

    def preload(self) -> None:
        if not self._mounted.wait(60):
            raise TimeoutError


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Parts]:
    await asyncio.sleep(0)
    collected = Collected()
    yield Parts(Parser(settings), collected, Telemetry(), preload=collected.preload)


@contextlib.contextmanager
def running(directory: Path, module: str, *flags: str, ready: str, **environ: str) -> Iterator[Process]:
    """A daemon whose socket is `vault.sock`, once its log has the message `ready`."""
    argv = [sys.executable, "-m", module, f"--endpoint={directory}/vault.sock", "--node-name=", *flags]
    process = Process(
        argv, log=directory / "log", cwd=ROOT, env=clean_environment() | {"PYTHONPATH": str(ROOT)} | environ
    )
    try:
        eventually(lambda: ready in process.log.read_text() or not process.running, f"the log says {ready!r}")
        assert process.running, process.log_tail()
        yield process
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.log_tail()
    finally:
        process.kill()


def status(port: int, path: str) -> int:
    """The status of a GET, 0 where nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            found: int = answer.status
            return found
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("flags", "on_health", "on_own"),
    [((), 200, 0), (("--metrics-addr=127.0.0.1:{own}",), 404, 200), (("--metrics-addr=off",), 404, 0)],
)
def test_metrics_are_served_where_the_flag_says(
    flags: tuple[str, ...], on_health: int, on_own: int, tmp_path: Path
) -> None:
    """/metrics is on the health address, on one of its own with nothing beside it, or nowhere."""
    health, own = free_port(), free_port()
    given = [flag.format(own=own) for flag in flags]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("{apiVersion: v1, kind: Config, clusters: [], contexts: [], users: []}")
    with running(tmp_path, "provider.cli", f"--health-addr=127.0.0.1:{health}", *given, ready="mounts are served"):
        eventually(lambda: status(health, "/health/live") == 200, "health is served")
        assert status(health, "/metrics") == on_health
        if on_own:
            eventually(lambda: status(own, "/metrics") == 200, "metrics are served")
        assert status(own, "/metrics") == on_own
        assert status(own, "/health/live") == (404 if on_own else 0)


def test_daemon_whose_socket_somebody_removed_asks_to_be_restarted(tmp_path: Path) -> None:
    """Kubelet is told by its liveness probe, and the log says why, once; what another daemon took over is not lost."""
    health = free_port()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("{apiVersion: v1, kind: Config, clusters: [], contexts: [], users: []}")
    with running(tmp_path, "provider.cli", f"--health-addr=127.0.0.1:{health}", ready="mounts are served") as daemon:
        eventually(lambda: status(health, "/health/live") == 200, "health is served")
        endpoint = tmp_path / "vault.sock"
        endpoint.rename(tmp_path / "aside")
        assert status(health, "/health/live") == status(health, "/health/live") == 503
        time.sleep(WRITTEN_SECONDS)
        assert daemon.log.read_text().count("the socket is gone") == 1
        endpoint.touch()
        assert status(health, "/health/live") == 200


def test_what_is_set_and_has_no_effect_is_warned_of(tmp_path: Path) -> None:
    """Variables that the Go providers read, and TLS files that cannot be read; not what a Service of the name sets."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("{apiVersion: v1, kind: Config, clusters: [], contexts: [], users: []}")
    flag = f"--vault-tls-ca-cert={tmp_path}/nowhere.crt"
    variables = {"BAO_CACERT_BYTES": "pem", "VAULT_PORT": "tcp://10.0.0.1:8200"}
    with running(tmp_path, "provider.cli", flag, ready="mounts are served", **variables) as daemon:
        eventually(lambda: "nowhere.crt" in daemon.log.read_text(), "the file is warned of")
        told = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    ours = [event for event in told if event["logger"].startswith("provider.cli")]
    warned = [event["message"] for event in ours if event["severity"] == "WARNING"]
    assert len(warned) == 2
    assert warned[0].startswith("BAO_CACERT_BYTES is set, and not read here: write the certificates to a file")
    assert warned[1].startswith(f"cannot use the CA certificates at {tmp_path}/nowhere.crt: No such file")


def test_collector_looks_at_nothing_at_the_start_and_seldom_once_mounts_are_served(tmp_path: Path) -> None:
    """It is off until all is imported, looks at none of that later, and at the rest seldom; mounts do not wait for
    what is imported once the daemon listens. What they leave is collected from time to time all the same."""
    with (
        running(tmp_path, "tests.test_wiring", "--health-addr=", ready="mounts are served"),
        Driver(tmp_path / "vault.sock") as driver,
    ):
        pod = Pod("shop", "web", "uid", "web", "node-1", "Running")

        def mounted() -> dict[str, Any]:
            given = driver.mount(pod, {"roleName": "r", "objects": "- {objectName: gc, secretPath: a/b}"}).text("gc")
            told: dict[str, Any] = json.loads(given)
            return told

        assert not mounted()["enabled"]
        eventually(lambda: mounted()["enabled"], "the collector is on")
        told = mounted()
        youngest, *older = told["collections"]
        eventually(lambda: mounted()["collections"][0] > youngest, "the youngest objects are looked through")
        assert mounted()["collections"][1:] == older
    assert told["frozen"] > 10_000
    assert told["threshold"][0] > gc.get_threshold()[0]


def test_daemon_listens_before_it_imports_what_only_mounts_need() -> None:
    """Neither hvac and requests, nor what templates, certificates and sealed files take, is imported for listening."""
    code = (
        "import sys, provider.cli.daemon, provider.cli.parts, provider.server, provider.telemetry.health as _\n"
        "only = {'hvac', 'requests', 'urllib3', 'jinja2', 'jmespath', 'cryptography'}\n"
        "print(*only & sys.modules.keys())\n"
        "provider.vault.import_calls(); print(*{'hvac', 'requests'} - sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


if __name__ == "__main__":
    daemon.COLLECT_SECONDS = 0.1  # type: ignore[misc]  # of a minute
    sys.exit(main(build=build))
