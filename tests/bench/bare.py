"""A node's boot with nothing around it: the same logins and reads by the daemon's own HTTP client, which is what it can
cost at least on this machine, beside the same OpenBao. A program of its own; it reads the work from stdin, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import uvloop

from provider.http import Lookups, Origin, Pool

CONNECTIONS: Final = 64
"""As many as the daemon opens."""
CONNECT_SECONDS: Final = 10.0
LARGEST: Final = 1024 * 1024
"""Bytes of an answer; these have some hundred."""


async def boot(address: str, role: str, pods: Sequence[tuple[str, Sequence[str]]]) -> tuple[float, float]:
    """Log in to the role with each token, then read its paths at once; the seconds that all took, and those of CPU."""
    at = urlsplit(address)
    origin = Origin(at.hostname or "", at.port or 80)
    pool = Pool(origin, lookups=Lookups(), limit=CONNECTIONS, connect_seconds=CONNECT_SECONDS)

    async def ask(method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> Any:
        response = await pool.request(method, f"/v1/{path}", headers, body, limit=LARGEST)
        if not response.whole or response.status != 200:
            raise SystemExit(f"{path}: {response.status}")
        return json.loads(response.body)

    async def read(path: str, token: str) -> None:
        (await ask("GET", path, {"X-Vault-Token": token}))["data"]["data"]["value"]

    async def mount(jwt: str, paths: Sequence[str]) -> None:
        login = json.dumps({"role": role, "jwt": jwt}).encode()
        token = (await ask("POST", "auth/kubernetes/login", {}, login))["auth"]["client_token"]
        await asyncio.gather(*(read(path, token) for path in paths))

    began, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(mount(jwt, paths) for jwt, paths in pods))
    took = time.monotonic() - began, time.process_time() - cpu
    pool.close()
    return took


if __name__ == "__main__":
    print(json.dumps(uvloop.run(boot(*json.load(sys.stdin)))))
