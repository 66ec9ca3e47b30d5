"""The program that the limits in seconds were set by, rebuilt: a provider that mounts and does nothing else.

grpc.aio on uvloop, hvac's calls over aiohttp, libyaml's loader with a cache of classes. It keeps no session, lease or
version and writes no file and no line; each mount logs in and reads, all at once, over 64 connections at most.

A program of its own: ``python -m tests.bench.reference SOCKET VAULT``.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import grpc.aio
import uvloop
import yaml
from hvac.api.auth_methods import Kubernetes

from provider.v1alpha1 import service_pb2, service_pb2_grpc

CONNECTIONS: Final = 64
CLASSES: Final = 256
TOKENS: Final = "csi.storage.k8s.io/serviceAccount.tokens"
AUDIENCE: Final = "vault"


class Aio:
    """hvac's seam for another client, whose calls return awaitables then."""

    def __init__(self, client: aiohttp.ClientSession, headers: Mapping[str, str]) -> None:
        self._client = client
        self._headers = headers

    async def login(self, url: str, use_token: bool = True, **sent: Any) -> Any:
        """See ``request``."""
        return await self.request("post", url, **sent)

    async def request(
        self, method: str, url: str, headers: Any = None, raise_exception: bool = True, **sent: Any
    ) -> Any:
        """The JSON of the answer; RuntimeError for any but 200."""
        async with self._client.request(method, url, headers=self._headers, **sent) as response:
            body = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{url}: {response.status}")
            return json.loads(body)


@functools.lru_cache(CLASSES)
def objects_of(text: str) -> list[dict[str, str]]:
    """The objects of a class."""
    found: list[dict[str, str]] = yaml.load(text, yaml.CSafeLoader)
    return found


class Provider(service_pb2_grpc.CSIDriverProviderServicer):
    """The driver's two calls."""

    def __init__(self, client: aiohttp.ClientSession) -> None:
        self._client = client

    async def Version(self, request: service_pb2.VersionRequest, context: Any) -> service_pb2.VersionResponse:
        """The protocol's version."""
        return service_pb2.VersionResponse(version="v1alpha1")

    async def Mount(self, request: service_pb2.MountRequest, context: Any) -> service_pb2.MountResponse:
        """The files of the volume."""
        attributes, mode = json.loads(request.attributes), json.loads(request.permission)
        objects = objects_of(attributes["objects"])
        jwt = json.loads(attributes[TOKENS])[AUDIENCE]["token"]
        login: Any = Kubernetes(Aio(self._client, {})).login(attributes["roleName"], jwt, use_token=False)
        vault = Aio(self._client, {"X-Vault-Token": (await login)["auth"]["client_token"]})
        answers = await asyncio.gather(*(vault.request("get", f"/v1/{wanted['secretPath']}") for wanted in objects))
        response = service_pb2.MountResponse()
        for wanted, answer in zip(objects, answers, strict=True):
            contents = answer["data"]["data"][wanted["secretKey"]].encode()
            response.files.add(path=wanted["objectName"], mode=mode, contents=contents)
            response.object_version.add(id=wanted["objectName"], version="1")
        return response


async def serve(socket: Path, vault: str) -> None:
    """Serve at ``socket``, which appears once it answers, until the process ends."""
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(vault, connector=connector) as client:
        server = grpc.aio.server()
        service_pb2_grpc.add_CSIDriverProviderServicer_to_server(Provider(client), server)
        fresh = socket.with_suffix(".new")
        server.add_insecure_port(f"unix:{fresh}")
        await server.start()
        fresh.rename(socket)
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), sys.argv[2]))
