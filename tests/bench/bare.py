"""A node's boot with nothing around it: the same logins and reads by the same HTTP client, which is what it can cost at
least on this machine, beside the same OpenBao. A program of its own; it reads the work from stdin, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Final

import aiohttp
import uvloop

CONNECTIONS: Final = 64
"""As many as the daemon opens."""


async def boot(address: str, pods: Sequence[tuple[str, Sequence[str]]]) -> tuple[float, float]:
    """Log in with each token, then read its paths at once; the seconds that all took, and those of CPU."""
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, raise_for_status=True) as session:

        async def read(path: str, token: str) -> None:
            async with session.get(f"{address}/v1/{path}", headers={"X-Vault-Token": token}) as response:
                json.loads(await response.read())["data"]["data"]["value"]

        async def mount(jwt: str, paths: Sequence[str]) -> None:
            login = {"role": "app", "jwt": jwt}
            async with session.post(f"{address}/v1/auth/kubernetes/login", json=login) as response:
                token = json.loads(await response.read())["auth"]["client_token"]
            await asyncio.gather(*(read(path, token) for path in paths))

        began, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(mount(jwt, paths) for jwt, paths in pods))
        return time.monotonic() - began, time.process_time() - cpu


if __name__ == "__main__":
    print(json.dumps(uvloop.run(boot(*json.load(sys.stdin)))))
