"""Which pods of a node live, from an API server over TLS."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from provider.errors import KubernetesDenied, KubernetesUnavailable
from provider.kube import Kubernetes
from provider.kube.api import ATTEMPTS
from provider.kube.pods import MAX_LIST_BYTES
from provider.sessions.sweep import PodSource
from tests.stand.kubeapi import KubeApi
from tests.test_kube import JSON, failure, foreign_server, response
from tests.tools import ROOT

ALL, IN_SHOP = "/api/v1/pods", "/api/v1/namespaces/shop/pods"
UID = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as server:
        yield server


@pytest.fixture
async def pods(api: KubeApi, tmp_path: Path) -> AsyncIterator[PodSource]:
    """The client, as the sweep sees it."""
    client = Kubernetes(str(api.write_kubeconfig(tmp_path / "kubeconfig")))
    yield client
    await client.close()


def asked(api: KubeApi) -> list[tuple[str, dict[str, list[str]]]]:
    """The path and the query of every request so far, all of them reads."""
    assert {seen.method for seen in api.requests} <= {"GET"}
    parts = [urlsplit(seen.path) for seen in api.requests]
    return [(part.path, parse_qs(part.query)) for part in parts]


def listing(*items: Any, **more: Any) -> bytes:
    """The API server's answer to a listing of metadata."""
    answer = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "items": list(items)}
    return json.dumps(answer | more).encode()


def item(**metadata: Any) -> dict[str, Any]:
    """One pod of a listing."""
    return {"metadata": {"namespace": "shop", "name": "web-1", "uid": UID} | metadata}


# What is asked, and what comes back -------------------------------------------------------------------------


async def test_the_pods_of_one_node_are_listed_by_metadata(pods: PodSource, api: KubeApi) -> None:
    """One request to the API server's cache tells UIDs and names of this node's pods, and none of another's."""
    here = [api.add_pod("shop", "web-1"), api.add_pod("shop", "web-2"), api.add_pod("bank", "web-1", phase="Pending")]
    api.add_pod("shop", "web-3", node="node-2")
    found = await pods.list_pods("node-1")
    assert found.uids == {pod.uid for pod in here}
    assert found.names == {("shop", "web-1"), ("shop", "web-2"), ("bank", "web-1")}
    assert found.complete
    selector = "spec.nodeName=node-1,status.phase!=Succeeded,status.phase!=Failed"
    assert asked(api) == [(ALL, {"fieldSelector": [selector], "resourceVersion": ["0"]})]


async def test_finished_pods_count_as_gone(pods: PodSource, api: KubeApi) -> None:
    """A pod that succeeded or failed is neither in the listing nor alive, though the API server still has it."""
    ended = [api.add_pod("shop", phase.lower(), phase=phase) for phase in ("Succeeded", "Failed")]
    odd = api.add_pod("shop", "odd", phase="Unknown")
    assert (await pods.list_pods("node-1")).uids == {odd.uid}
    assert [await pods.pod_lives("shop", pod.name, pod.uid) for pod in (*ended, odd)] == [False, False, True]


async def test_a_pod_lives_by_its_uid(pods: PodSource, api: KubeApi) -> None:
    """A pod of the same name that took its place does not count, nor one of that name elsewhere."""
    first = api.add_pod("shop", "web-1")
    assert await pods.pod_lives("shop", "web-1", first.uid)
    second = api.add_pod("shop", "web-1")
    assert not await pods.pod_lives("shop", "web-1", first.uid)
    assert await pods.pod_lives("shop", "web-1", second.uid)
    assert await pods.pod_lives("shop", "web-1", None)
    assert not await pods.pod_lives("bank", "web-1", second.uid)
    api.remove_pod(second)
    assert not await pods.pod_lives("shop", "web-1", second.uid)
    assert not await pods.pod_lives("shop", "web-1", None)


async def test_whether_a_pod_lives_is_not_read_from_a_cache(pods: PodSource, api: KubeApi) -> None:
    """The last word before a revocation has no resourceVersion, and takes no permission but `list`."""
    pod = api.add_pod("shop", "web-1")
    api.deny("get", "pods")
    assert await pods.pod_lives("shop", "web-1", pod.uid)
    selector = "metadata.name=web-1,status.phase!=Succeeded,status.phase!=Failed"
    assert asked(api) == [(IN_SHOP, {"fieldSelector": [selector]})]


async def test_a_node_may_be_empty(pods: PodSource) -> None:
    """No pods is an answer."""
    found = await pods.list_pods("node-1")
    assert (found.uids, found.names, found.complete) == (frozenset(), frozenset(), True)


async def from_server(tmp_path: Path, answer: bytes, *, seen: list[None] | None = None) -> tuple[Any, bool]:
    """What a client makes of the same answer to a listing and to the look by name."""
    accepted = [] if seen is None else seen
    async with foreign_server(tmp_path, answer, lambda: accepted.append(None)) as config:
        client = Kubernetes(str(config))
        try:
            return await client.list_pods("node-1"), await client.pod_lives("shop", "web-1", UID)
        finally:
            await client.close()


async def test_an_empty_list_may_be_written_as_null(tmp_path: Path) -> None:
    """Some servers write `null` for no items: then the pod is gone, or else it would never be."""
    found, lives = await from_server(tmp_path, response("200 OK", listing(items=None), JSON))
    assert (found.uids, found.complete, lives) == (set(), True, False)


async def test_a_listing_that_was_cut_short_says_so(tmp_path: Path) -> None:
    """With more to come the listing is not complete, and a pod that is not in it is not known to be gone."""
    other = item(uid="another")
    found, lives = await from_server(
        tmp_path, response("200 OK", listing(other, metadata={"continue": "more", "resourceVersion": "1"}), JSON)
    )
    assert (found.uids, found.complete, lives) == ({"another"}, False, True)


# When it does not tell --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["list_pods", "pod_lives"])
@pytest.mark.parametrize("status", [401, 403])
async def test_without_the_permission_the_piece_of_rbac_is_named(
    pods: PodSource, api: KubeApi, call: str, status: int
) -> None:
    """A refusal is KubernetesDenied after one request, and names a component that the manifests have."""
    if status == 403:
        api.deny("list", "pods")
    else:
        api.fail(401, path="/pods")
    asking = pods.list_pods("node-1") if call == "list_pods" else pods.pod_lives("shop", "web-1", UID)
    error = await failure(asking)
    assert isinstance(error, KubernetesDenied)
    assert str(status) in error.what
    assert ("node node-1" if call == "list_pods" else "shop/web-1") in error.what
    named = re.search(r"the manifests' (\S+) component, or give --revoke=never", error.advice)
    assert named is not None
    assert (ROOT / "daemonset" / "components" / named[1] / "kustomization.yaml").is_file()
    # A token in a kubeconfig is not a file that could have changed, so there is nothing to try again with.
    assert len(api.requests) == 1


async def test_without_an_account_listing_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider without any right in the API has no token either: that is a lack of permission, not a fault."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    error = await failure(Kubernetes("", service_account_dir=tmp_path / "missing").list_pods("node-1"))
    assert isinstance(error, KubernetesDenied)
    assert "pod-end component" in error.advice


async def test_kubelets_newer_token_is_used(api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings read the rotated token of the pod again, once the API server refuses the old one."""
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)
    account = api.write_in_cluster_dir(tmp_path / "serviceaccount")
    client = Kubernetes("", service_account_dir=account)
    pod = api.add_pod("shop", "web-1")
    await client.list_pods("node-1")
    api.remove_service_account(*api.provider)
    api.add_service_account(*api.provider)
    (account / "token").write_text(api.issue_token(*api.provider))
    assert (await client.list_pods("node-1")).uids == {pod.uid}
    assert len(api.requests) == 3
    await client.close()


async def test_an_api_server_that_is_down_is_no_denial(pods: PodSource, api: KubeApi) -> None:
    """No connection: an error that comes and goes; afterwards the same client lists."""
    pod = api.add_pod("shop", "web-1")
    api.stop()
    for asking in (pods.list_pods("node-1"), pods.pod_lives("shop", "web-1", pod.uid)):
        error = await failure(asking)
        assert not isinstance(error, KubernetesDenied)
        assert "reach" in error.advice
    api.start()
    assert (await pods.list_pods("node-1")).uids == {pod.uid}


async def test_a_fault_that_stays_is_told_in_the_servers_words(pods: PodSource, api: KubeApi) -> None:
    """A server that is not well is asked ATTEMPTS times; what it says is in the error."""
    api.fail(503, path=ALL)
    error = await failure(pods.list_pods("node-1"))
    assert not isinstance(error, KubernetesDenied)
    assert "503 Service Unavailable: the stand was told to fail" in error.what
    assert "log" in error.advice
    assert len(api.requests) == ATTEMPTS
    api.heal()
    api.fail(503, path=ALL, times=ATTEMPTS - 1)
    assert (await pods.list_pods("node-1")).complete


async def test_a_proxy_of_the_environment_is_not_used(
    pods: PodSource, api: KubeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY is for Vault: listings go to the API server itself."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await pods.list_pods("node-1")).complete


@pytest.mark.parametrize("name", ["", "a,status.phase=Running", "a=b", "a!=b", "a&limit=1", "../x", "a\\b", "a b"])
async def test_a_name_cannot_widen_the_selector(pods: PodSource, api: KubeApi, name: str) -> None:
    """What is no name of an object becomes part of no selector and of no path."""
    for asking in (pods.list_pods(name), pods.pod_lives(name, "web-1", UID), pods.pod_lives("shop", name, UID)):
        assert "is not a name" in (await failure(asking)).what
    assert api.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"c4nary",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        listing(item(), kind="PodList"),
        listing(kind=None),
        json.dumps({"kind": "PartialObjectMetadataList", "metadata": {}}).encode(),
        json.dumps({"kind": "PartialObjectMetadataList", "items": []}).encode(),
        listing(metadata=None),
        listing(items=7),
        listing(items={"c4nary": 1}),
        listing(None),
        listing({"metadata": None}),
        listing(item(), item(uid=None)),
        listing(item(), item(uid="")),
        listing(item(), item(name=7)),
        listing(item(), {"metadata": {"name": "c4nary", "uid": "c4nary"}}),
    ],
    ids=lambda body: body[:60].decode(errors="replace"),
)
async def test_an_answer_that_is_no_listing_proves_nothing(tmp_path: Path, body: bytes) -> None:
    """Whatever is not certainly the API server's list of metadata is an error, and never "there are no pods"."""
    error = await failure(from_server(tmp_path, response("200 OK", body, JSON)), "c4nary")
    assert "not the Kubernetes API's" in error.what


@pytest.mark.parametrize("status", ["301 Moved", "302 Found"])
async def test_a_redirect_is_not_followed(tmp_path: Path, status: str) -> None:
    """The provider's token goes to the configured server alone."""
    seen: list[None] = []
    answer = response(status, listing(), JSON + "Location: https://127.0.0.1:1/c4nary\r\n")
    error = await failure(from_server(tmp_path, answer, seen=seen))
    assert status in error.what
    assert "c4nary" not in str(error)
    assert len(seen) == 1


async def test_an_answer_over_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    """A list of more than 8 MiB is not whole, whatever else it would have said: here, a terabyte. It proves nothing."""
    endless = f"HTTP/1.1 200 OK\r\n{JSON}Content-Length: {2**40}\r\n\r\n".encode() + b" " * (2 * MAX_LIST_BYTES)
    found, lives = await from_server(tmp_path, endless)
    assert (found.uids, found.complete, lives) == (frozenset(), False, True)


async def test_a_full_node_fits(pods: PodSource, api: KubeApi) -> None:
    """A node of 500 pods, the most that distributions configure, is one listing of one request."""
    expected = {api.add_pod("shop", f"web-{number}").uid for number in range(500)}
    found = await pods.list_pods("node-1")
    assert (found.uids, found.complete) == (frozenset(expected), True)
    assert len(api.requests) == 1


async def test_each_call_takes_a_bounded_time(pods: PodSource, api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent API server ends the sweep's look with an error, and does not hang it."""
    monkeypatch.setattr("provider.kube.kubernetes.CALL_SECONDS", 0.3)
    api.stall(60, path=ALL)
    with pytest.raises(KubernetesUnavailable, match="no answer within"):
        await pods.list_pods("node-1")
