"""What a user would pick instead: Vault Agent as a sidecar, one process a pod, here OpenBao's from the same wheel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.load import BenchFailed
from tests.bench.scenarios import OBJECTS, Figure, figure
from tests.bench.stand import BenchStand
from tests.stand.openbao import find_binary
from tests.stand.process import Process, StandError

_LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Agents:
    """So many agents started at once: seconds until each pod's files are there, MiB and seconds of CPU of all.

    `private` is proportional set size: what is shared between processes (the program's text) counted once.
    """

    pods: int
    ready: Figure
    resident: Figure
    private: Figure
    cpu: Figure


def agents(stand: BenchStand, pods: int, runs: int) -> Agents:
    """Start one agent a pod, with the same OBJECTS secrets as a volume, and wait for the rendered file."""
    stand.proxy.delay(0.005)
    results = [_once(stand, pods) for _ in range(runs)]
    return Agents(pods, *(figure(column) for column in zip(*results, strict=True)))


def _once(stand: BenchStand, pods: int) -> tuple[float, float, float, float]:
    paths = [f"one/{number}" for number in range(OBJECTS)]
    expected = "\n".join(stand.secret(path) for path in paths)
    with contextlib.ExitStack() as stack:
        configs = []
        for _ in range(pods):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-", dir=stand.directory)))
            configs.append(_configure(stand, directory, paths))
        began = time.monotonic()
        processes = []
        for config in configs:
            process = Process(
                [str(find_binary()), "agent", f"-config={config}", "-log-level=warn"],
                log=config.with_name("agent.log"),
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(config.parent)},
            )
            stack.callback(process.kill)
            processes.append(process)
        outputs = [config.with_name("rendered") for config in configs]
        while not all(output.exists() for output in outputs):
            dead = [process for process in processes if not process.running]
            if dead or time.monotonic() > began + _LIMIT_SECONDS:
                raise StandError(f"an agent did not render:\n{(dead or processes)[0].log_tail()}")
            time.sleep(0.002)
        ready = time.monotonic() - began
        if any(output.read_text() != expected for output in outputs):
            raise BenchFailed("an agent rendered something else than Vault holds")
        time.sleep(0.5)
        sizes = [_sizes(process.pid) for process in processes]
        return ready, sum(s[0] for s in sizes), sum(s[1] for s in sizes), sum(s[2] for s in sizes)


def _configure(stand: BenchStand, directory: Path, paths: Sequence[str]) -> Path:
    token = directory / "token"
    token.write_text(stand.token(stand.pod()))
    template = "\n".join(
        f'{{{{ with secret "bench/data/{path}" }}}}{{{{ .Data.data.value }}}}{{{{ end }}}}' for path in paths
    )
    config = {
        "vault": {"address": stand.proxy.address},
        "auto_auth": {
            "method": [{"type": "kubernetes", "config": {"role": "app", "token_path": str(token)}}],
        },
        "template": [{"contents": template, "destination": str(directory / "rendered")}],
    }
    path = directory / "agent.json"
    path.write_text(json.dumps(config))
    return path


def _sizes(pid: int) -> tuple[float, float, float]:
    """Resident and proportional MiB, and seconds of CPU."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    resident, private = (
        int(found[1]) / 1024
        for name in ("Rss", "Pss")
        if (found := re.search(rf"^{name}:\s+(\d+)", rollup, re.MULTILINE)) is not None
    )
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return resident, private, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
