"""How fast this machine is, told by a program that is not ours: aiohttp under uvloop reads one secret, many times.

A program of its own. It reads OpenBao's address, a token, the secret's path and its value from stdin, as JSON, and
prints the seconds of CPU that one read took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Final

import aiohttp
import uvloop

IN_FLIGHT: Final = 64
"""As where the reference was measured."""
WARM_UP: Final = 200
"""Reads that open the connections; they are not measured."""
READS: Final = 2000


async def cost(address: str, token: str, path: str, value: str) -> float:
    """Seconds of CPU for one of READS reads of the KV secret; SystemExit where an answer does not hold `value`."""
    at_once = asyncio.Semaphore(IN_FLIGHT)
    connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
    async with aiohttp.ClientSession(connector=connector, headers={"X-Vault-Token": token}) as session:

        async def read() -> None:
            async with at_once, session.get(f"{address}/v1/{path}") as response:
                body = await response.read()
                if response.status != 200:
                    raise SystemExit(f"{path}: {response.status}")
                if json.loads(body)["data"]["data"]["value"] != value:
                    raise SystemExit(f"{path}: another value than was written")

        await asyncio.gather(*(read() for _ in range(WARM_UP)))
        cpu = time.process_time()
        await asyncio.gather(*(read() for _ in range(READS)))
        return (time.process_time() - cpu) / READS


if __name__ == "__main__":
    print(json.dumps(uvloop.run(cost(*json.load(sys.stdin)))))
