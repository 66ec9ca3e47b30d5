"""A kubeconfig's ways to name a server and to say who we are."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from provider.errors import KubernetesUnavailable
from provider.kube import Kubernetes
from provider.spc.model import Pod
from tests.stand.pki import Authority, Certificate

POD = Pod("ecommerce", "shop-1", "uid-1", "ecommerce-service-account")
TOKEN = "a-token-for-the-pod"


@contextlib.asynccontextmanager
async def server(
    authority: Authority, path: Path, *, client_ca: bytes | None = None
) -> AsyncIterator[tuple[str, list[str]]]:
    """A TLS server that grants any TokenRequest; gives its URL, and each Authorization header that came to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server().write(path, "server"))
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=client_ca.decode())
    seen: list[str] = []
    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        seen.append(next((line.partition(": ")[2] for line in head if line.lower().startswith("authorization")), ""))
        body = json.dumps({"kind": "TokenRequest", "status": {"token": TOKEN}}).encode()
        writer.write(b"HTTP/1.1 201 Created\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=1)
    async with listening:
        yield f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}", seen
    await asyncio.gather(*filter(None, served), return_exceptions=True)


def write(path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    """A kubeconfig of one cluster and one user."""
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


async def token(kubeconfig: Path) -> str:
    """The token that a TokenRequest under this kubeconfig brings."""
    client = Kubernetes(str(kubeconfig))
    try:
        return (await client.create_token(POD, "vault")).reveal()
    finally:
        await client.close()


@pytest.mark.parametrize("inline", [True, False])
async def test_a_client_certificate_is_shown(tmp_path: Path, inline: bool) -> None:
    """In the kubeconfig itself or in files beside it: a server that asks for one gets it."""
    authority, people = Authority(), Authority("people")
    client: Certificate = people.client()
    certificate, key = client.write(tmp_path, "client")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    async with server(authority, tmp_path, client_ca=people.pem) as (url, _):
        if inline:
            data = {
                name: base64.b64encode(path.read_bytes()).decode() for name, path in (("c", certificate), ("k", key))
            }
            user = {"client-certificate-data": data["c"], "client-key-data": data["k"]}
            cluster = {"server": url, "certificate-authority-data": base64.b64encode(authority.pem).decode()}
        else:
            user = {"client-certificate": certificate.name, "client-key": key.name}
            cluster = {"server": url, "certificate-authority": "ca.pem"}
        assert await token(write(tmp_path / "config", cluster, user)) == TOKEN
        with pytest.raises(KubernetesUnavailable):
            await token(write(tmp_path / "config", cluster, {"token": "t"}))


async def test_a_token_file_beside_it_is_sent(tmp_path: Path) -> None:
    """``tokenFile`` is relative to the kubeconfig; ``token`` is sent as it is."""
    authority = Authority()
    (tmp_path / "token").write_text("from-the-file\n")
    async with server(authority, tmp_path) as (url, seen):
        cluster = {"server": url + "/", "certificate-authority-data": base64.b64encode(authority.pem).decode()}
        await token(write(tmp_path / "config", cluster, {"tokenFile": "token"}))
        await token(write(tmp_path / "config", cluster, {"token": "as-it-is"}))
    assert seen == ["Bearer from-the-file", "Bearer as-it-is"]


async def test_a_server_is_trusted_blindly_only_where_no_authority_is_named(tmp_path: Path) -> None:
    """``insecure-skip-tls-verify`` counts alone: beside a CA, the CA is what is believed."""
    async with server(Authority(), tmp_path) as (url, seen):
        blind = {"server": url, "insecure-skip-tls-verify": True}
        assert await token(write(tmp_path / "config", blind, {"token": "t"})) == TOKEN
        other = blind | {"certificate-authority-data": base64.b64encode(Authority().pem).decode()}
        for cluster in (other, {"server": url}):
            with pytest.raises(KubernetesUnavailable, match="unable to get local issuer certificate"):
                await token(write(tmp_path / "config", cluster, {"token": "t"}))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("cluster", "user", "said"),
    [
        ({"server": "https://127.0.0.1:9"}, {"exec": {"command": "c4nary"}}, "give it a token or a client certificate"),
        ({"server": "http://127.0.0.1:9"}, {"token": "c4nary"}, "no https:// URL"),
        ({"server": "https://127.0.0.1:9", "certificate-authority-data": "c4nary!"}, {"token": "t"}, "is no base64"),
        ({"server": "https://127.0.0.1:9", "certificate-authority-data": "YzRuYXJ5"}, {"token": "t"}, "certificates"),
        ({"server": "https://127.0.0.1:9", "certificate-authority": "no.pem"}, {"token": "t"}, "no.pem"),
    ],
)
async def test_what_cannot_be_used_is_named(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], said: str
) -> None:
    """The error has the file and the field, and nothing of what the field holds."""
    path = write(tmp_path / "config", cluster, user)
    with pytest.raises(KubernetesUnavailable, match=said) as caught:
        await token(path)
    assert str(path) in str(caught.value)
    assert "c4nary" not in str(caught.value)


async def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    """What is larger than a kubeconfig can be is refused, and not parsed."""
    path = tmp_path / "config"
    path.write_text("a: b\n" * 1_000_000)
    with pytest.raises(KubernetesUnavailable, match="larger than 4 MiB"):
        await token(path)
