"""The daemon keeps within the manifests' memory limit while tenants with Vaults of their own do their worst.

Memory is counted as a container's is: the daemon's and its children's, a page that they share once.
"""

from __future__ import annotations

import contextlib
import json
import re
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from provider.settings import MIB
from provider.vault.transport import LARGE_BODY_BYTES
from tests.live import NODE, STATIC, Cluster, Daemon, class_of, contents
from tests.stand.driver import Driver
from tests.tools import ROOT

pytestmark = pytest.mark.alone

SECONDS = 20.0
NAMESPACES = 4
VAULTS = 10


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


ANSWERS = {
    "/login": _json(auth={"client_token": "hvs.hostile", "lease_duration": 3600, "policies": ["default"]}),
    "/mounts": _json(data=None),
    # Twenty times as much in memory as on the wire.
    "/leased": _json(lease_id="l", lease_duration=86400, renewable=True, data={"k": "v", "more": [{"a": "b"}] * 600}),
    "/text": _json(data={"k": "x" * 1_000_000}),
    "/marks": _json(data={"k": "v", "more": [{}] * 29_000}),
    "/small": _json(data={"k": "v", "more": [{}] * 650}),
    "/wide": json.dumps({"data": {"k": "\U0001f511" * 20_000}}, ensure_ascii=False).encode(),
    "/plain": _json(data={"k": "v"}),
}


class _Hostile(socketserver.StreamRequestHandler):
    """Answers by the last word of the path before a number; to another one never to the end."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the daemon is gone, or has given the answer up
            while line := self.rfile.readline():
                length = 0
                while (header := self.rfile.readline().strip().lower()) != b"":
                    if header.startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                self.rfile.read(length)
                asked = line.decode().split(" ")[1]
                word = next((word for word in ANSWERS if word in asked), None)
                if word is None:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE_BODY_BYTES)
                    self.wfile.write(b"x" * (LARGE_BODY_BYTES - 1))
                    self.rfile.read(1)
                    return
                body = ANSWERS[word]
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024


@contextlib.contextmanager
def hostile_vaults() -> Iterator[list[str]]:
    """The addresses of Vaults that anybody may run."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_Server(("127.0.0.1", 0), _Hostile)) for _ in range(VAULTS)]
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        yield [f"http://127.0.0.1:{server.server_address[1]}" for server in servers]


def _read(path: str, number: int) -> list[str]:
    return [f"{{objectName: x{each}, secretPath: {path}/{each}, secretKey: k}}" for each in range(number)]


def _template(path: str, text: str) -> str:
    return f"{{objectName: x, secretPath: {path}, template: '{text}'}}"


# What a pod mounts in its n-th volume, and how many pods do.
WORST: dict[str, tuple[Callable[[str], list[str]], int]] = {
    "ever other credentials": (lambda n: _read(f"x/leased/{n}", 20), 8),
    "answers that never end": (lambda n: _read(f"x/never/{n}", 50), 8),
    "the largest answers, held": (lambda n: [*_read("x/marks", 6), *_read(f"x/never/{n}", 1)], 8),
    "small mounts, held": (lambda n: [*_read("x/small", 9), *_read(f"x/never/{n}", 1)], 40),
    "large texts": (lambda n: _read("x/text", 4), 8),
    "wide characters": (lambda n: _read("x/wide", 20), 8),
    "large files of templates": (lambda n: [_template("x/wide", "{{ secret.k }}" * 3)], 8),
    "templates that fill memory": (
        lambda n: [_template("x/plain", '{% set x = "a" * 50000000 %}{% for i in range(99999) %}{% endfor %}' + n)],
        8,
    ),
}


def memory(pid: int) -> int:
    """Bytes that a process and its children have in memory now."""
    total = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child that has just ended
        share = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        total = int(share[1]) * 1024 if share else 0
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += memory(int(child))
    return total


def limit() -> int:
    """The memory limit of the manifests' container."""
    pod = yaml.safe_load((ROOT / "daemonset" / "base" / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (said,) = [found["resources"]["limits"]["memory"] for found in pod["containers"]]
    return int(said.removesuffix("Mi")) * MIB


def test_the_worst_of_everybody_at_once(tmp_path: Path) -> None:
    """Four namespaces' pods do all of it for 20 s: the daemon stays below its limit, and another pod mounts."""
    begun: Counter[str] = Counter()
    ends = time.monotonic() + SECONDS

    with Cluster(tmp_path) as cluster, hostile_vaults() as vaults, contextlib.ExitStack() as stack:
        cluster.role("app")
        allowed = f"--allowed-vault-addresses={','.join(vaults)}"
        daemon = stack.enter_context(Daemon(cluster, "--hardened", allowed))

        def attack(what: str, number: int, driver: Driver) -> None:
            objects, _ = WORST[what]
            pod = cluster.kube.add_pod(f"hostile-{number % NAMESPACES}", f"{number}-{len(what)}", node=NODE)
            turn = 0
            # Whatever becomes of a mount; and at the end of the test its channel is closed.
            with contextlib.suppress(ValueError):
                while time.monotonic() < ends:
                    turn += 1
                    wish = class_of("app", *objects(str(turn))) | {"vaultAddress": vaults[number % VAULTS]}
                    if turn % 2:
                        wish["refreshAfter"] = "1h"
                    begun[what] += 1
                    with contextlib.suppress(grpc.RpcError):
                        cluster.mount(driver, pod, wish, class_name=f"class-{turn}")

        victim = cluster.pod("victim")
        driver = stack.enter_context(Driver(daemon.socket))
        assert contents(cluster.mount(driver, victim, class_of("app", *STATIC)))
        threads = [
            threading.Thread(
                target=attack, args=(what, number, stack.enter_context(Driver(daemon.socket))), daemon=True
            )
            for what, (_, pods) in WORST.items()
            for number in range(pods)
        ]
        for thread in threads:
            thread.start()
        most, served = 0, 0
        while time.monotonic() < ends:
            assert contents(cluster.mount(driver, victim, class_of("app", *STATIC)))
            served += 1
            for _ in range(5):
                most = max(most, memory(daemon.process.pid))
                time.sleep(0.1)
        assert daemon.process.running
    print(f"{most / MIB:.0f} MiB at most; the victim mounted {served} times; {dict(begun)}")
    assert all(begun[what] >= pods for what, (_, pods) in WORST.items())
    assert most < limit()
    assert served >= 4
