"""A tenant's pod that mounts as often as it is answered: a program, since what it costs must not be the test's own.

`python -m tests.flooder SOCKET KIND CALLS` reads one line of JSON, the attributes of its class, floods with so many
calls at a time until its standard input ends, and prints how its mounts ended.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import sys

import grpc
import grpc.aio

from provider.v1alpha1 import service_pb2 as pb
from provider.v1alpha1 import service_pb2_grpc
from tests.spc_hostile import CLASSES

KINDS = ("objects", "answers", "classes")
"""What it floods with: a class of many objects, one of many large ones, or classes that are hostile and another one
each time.
"""


async def flood(socket: str, kind: str, calls: int) -> None:
    """Mount until standard input ends, and print how often each outcome came, the first message of each beside it."""
    given = json.loads(sys.stdin.readline())
    hostile = json.loads(CLASSES["many sources"]())["objects"]
    outcomes: collections.Counter[str] = collections.Counter()
    messages: dict[str, str] = {}
    numbers = itertools.count()
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", 4 * 1024 * 1024)]

    async def keep_mounting(stub: service_pb2_grpc.CSIDriverProviderAsyncStub) -> None:
        while not over.done():
            number = next(numbers)
            objects = f"{hostile}\n# {number}" if kind == "classes" else given["objects"]
            request = pb.MountRequest(
                attributes=json.dumps({**given, "objects": objects}),
                secrets="null",
                target_path=f"/volumes/{number % 50}",
                permission="420",
            )
            try:
                await stub.Mount(request, wait_for_ready=True)
                outcome, message = "OK", ""
            except grpc.aio.AioRpcError as error:
                outcome, message = error.code().name, error.details() or ""
                if "in a minute" in message:
                    outcome = "REFUSED"
                elif "in memory" in message:
                    outcome = "TOO_LARGE"
            outcomes[outcome] += 1
            messages.setdefault(outcome, message[:300])

    async with grpc.aio.insecure_channel(f"unix:{socket}", options) as channel:
        stub = service_pb2_grpc.CSIDriverProviderStub(channel)
        print("flooding", flush=True)
        await asyncio.gather(*(keep_mounting(stub) for _ in range(calls)))
    print(json.dumps({"outcomes": outcomes, "messages": messages}), flush=True)


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1], sys.argv[2], int(sys.argv[3])))
