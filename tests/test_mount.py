"""One mount, from a MountSpec to files or to one error, over real sessions against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import grpc
import pytest

from provider.clock import SystemClock
from provider.errors import MAX_MESSAGE_BYTES, Code, MountFailed, OutOfTime, ProviderError, encoded_size
from provider.kube import HmacKey, Kubernetes
from provider.mount import MAX_MADE_BYTES, Mounter
from provider.redact import Sensitive
from provider.render import RenderedFile, Renderer
from provider.sessions import Sessions
from provider.settings import Settings, TlsSettings
from provider.spc import Encoding, Login, MountSpec, ObjectSpec, Pod, SecretRequest, VaultServer
from provider.telemetry.events import Telemetry
from provider.vault import VaultServers, adapter
from tests.spc_classes import plain
from tests.stand.ecommerce import NAMESPACE, SERVICE_ACCOUNT, EcommerceStand
from tests.stand.faulty import Answer, Arrival, Cut, Faulty, refusal, secret, token
from tests.stand.kubeapi import Pod as KubePod
from tests.stand.openbao import OpenBao

CREDS = "database/creds/ecommerce-readonly"
CONFIG = "ecommerce/data/shared/config"
LOGIN = "auth/kubernetes/login"


@pytest.fixture(scope="module")
def shop() -> Iterator[EcommerceStand]:
    """The shop, and roles beside its own: `broad` reads all of ecommerce/, `bare` lacks the default policy."""
    with EcommerceStand(audit=True) as stand:
        bao = stand.openbao
        bao.write_policy("broad", 'path "ecommerce/*" { capabilities = ["read", "list"] }')
        bao.mount_kv("old", version=1)
        bao.write_policy("old", 'path "old/*" { capabilities = ["read"] }')
        login_role(bao, "broad", ["broad", "old", "ecommerce-policy"])
        login_role(bao, "bare", ["ecommerce-policy"], default=False)
        login_role(bao, "few", ["ecommerce-policy"], uses=3)
        yield stand


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries a twentieth as long; how many there are stays."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as server:
        server.on(LOGIN, token("hvs.token-of-a-faulty-server"))
        yield server


class TurnedClock(SystemClock):
    """The machine's clock, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


def held(spec: MountSpec) -> set[str]:
    """The paths of those of its files that are in memory."""
    gc.collect()
    names = {wanted.name for wanted in spec.objects}
    return {found.path for found in gc.get_objects() if isinstance(found, RenderedFile)} & names


@dataclass
class Node:
    """The provider of one node, without its server."""

    mounter: Mounter
    sessions: Sessions
    clock: TurnedClock

    async def mount(self, spec: MountSpec) -> dict[str, bytes]:
        """The files by path."""
        async with asyncio.timeout(30):
            result = await self.mounter.mount(spec)
        return {file.path: file.contents for file in result.files}

    async def failure(self, spec: MountSpec) -> ProviderError:
        """The error of a mount that fails."""
        with pytest.raises(ProviderError) as told:
            await self.mount(spec)
        return told.value


@contextlib.asynccontextmanager
async def running(
    shop: EcommerceStand, directory: Path, settings: Settings | None = None, timeout: float = 20
) -> AsyncIterator[Node]:
    key = directory / "hmac.key"
    key.write_bytes(b"k" * 32)
    settings = replace(settings or Settings(), hmac_key_file=str(key))
    clock = TurnedClock()
    servers = VaultServers(clock=clock)
    kubernetes = Kubernetes(str(shop.kube.write_kubeconfig(directory / "kubeconfig")))
    version_key = HmacKey(settings, kubernetes, clock)
    sessions = Sessions(servers, settings, clock=clock, key=version_key.get, telemetry=Telemetry())
    renderer = Renderer(Telemetry())
    try:
        yield Node(
            Mounter(servers, sessions, kubernetes, version_key, renderer, timeout=timeout, telemetry=Telemetry()),
            sessions,
            clock,
        )
    finally:
        await renderer.close()
        await sessions.close()
        await version_key.close()
        await kubernetes.close()
        await servers.close()


@pytest.fixture
async def node(shop: EcommerceStand, tmp_path: Path) -> AsyncIterator[Node]:
    async with running(shop, tmp_path) as opened:
        yield opened


def login_role(
    bao: OpenBao, name: str, policies: list[str], *, uses: int = 0, default: bool = True, namespace: str | None = None
) -> None:
    """A role of the kubernetes method for the shop's pods; `uses` of its tokens, 0 for any number."""
    bao.role(
        "kubernetes",
        name,
        namespace=namespace,
        bound_service_account_names=[SERVICE_ACCOUNT],
        bound_service_account_namespaces=[NAMESPACE],
        audience="vault",
        token_policies=policies,
        token_ttl="24h",
        token_num_uses=uses,
        token_no_default_policy=not default,
    )


def file(name: str, path: str | SecretRequest, key: str | None, encoding: Encoding = Encoding.UTF8) -> ObjectSpec:
    request = SecretRequest("GET", path) if isinstance(path, str) else path
    return plain(name, request, key, encoding=encoding)


def wanting(
    shop: EcommerceStand,
    *objects: ObjectSpec,
    role: str = "ecommerce-app",
    pod: KubePod | None = None,
    address: str = "",
    namespace: str = "",
) -> MountSpec:
    """The spec of a mount by the shop's pod, with fresh tokens of the driver's."""
    pod = pod or shop.pod
    return MountSpec(
        pod=Pod(pod.namespace, pod.name, pod.uid, pod.service_account),
        class_name="shop",
        target_path=f"/var/lib/kubelet/pods/{pod.uid}/volumes/secrets/mount",
        server=VaultServer(address or shop.openbao.address, namespace, TlsSettings()),
        login=Login("kubernetes", role, None),
        objects=objects,
        tokens={audience: Sensitive(jwt) for audience, jwt in (shop.tokens(pod) or {}).items()},
    )


USERNAME, PASSWORD = file("db-username", CREDS, "username"), file("db-password", CREDS, "password")
API_KEY = file("api-key", CONFIG, "api_key")


class Counted:
    """Requests of the provider that OpenBao's audit log has seen since this was made."""

    def __init__(self, shop: EcommerceStand) -> None:
        self._bao = shop.openbao
        self._before = len(self._bao.requests())

    def __call__(self, path: str) -> int:
        return sum(seen.path == path for seen in self._bao.requests()[self._before :])


@pytest.fixture
def counted(shop: EcommerceStand) -> Counted:
    return Counted(shop)


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until ``holds()``, and fail where that takes more than 10 s."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to hold")


class TestFiles:
    async def test_class_of_the_shop(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """User name and password come from one lease and open the database; the key is the stored one."""
        files = await node.mount(wanting(shop, USERNAME, PASSWORD, API_KEY))
        assert list(files) == ["db-username", "db-password", "api-key"]
        assert files["api-key"] == shop.api_key.encode()
        assert shop.postgres.can_login(files["db-username"].decode(), files["db-password"].decode())
        assert counted(CREDS) == 1
        assert counted(CONFIG) == 1
        assert counted(LOGIN) == 1

    async def test_remount_is_the_same_volume(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """Re-mounts keep token and lease, read KV again, and give equal versions until the secret changes."""
        spec = wanting(shop, USERNAME, PASSWORD, API_KEY)
        first = await node.mounter.mount(spec)
        for _ in range(4):
            assert await node.mounter.mount(wanting(shop, USERNAME, PASSWORD, API_KEY)) == first
        assert [counted(path) for path in (LOGIN, CREDS, CONFIG)] == [1, 1, 5]
        assert [name for name, _ in first.versions] == ["db-username", "db-password", "api-key"]
        assert len({version for _, version in first.versions}) == 3
        shop.rotate_api_key("shop-key-0002")
        try:
            second = await node.mounter.mount(spec)
        finally:
            shop.rotate_api_key(shop.api_key)
        assert second.files[2].contents == b"shop-key-0002"
        assert second.versions[:2] == first.versions[:2]
        assert second.versions[2] != first.versions[2]

    async def test_what_is_not_asked_for_any_more(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """A credential that a volume's class names no longer is let go; asked for again, it is a new one."""
        first = await node.mount(wanting(shop, USERNAME))
        await node.mount(wanting(shop, API_KEY))
        assert await node.mount(wanting(shop, USERNAME)) != first
        assert counted(CREDS) == 2

    async def test_mode_and_path(self, node: Node, shop: EcommerceStand) -> None:
        """Each file has the path and the mode that its object asks for."""
        result = await node.mounter.mount(wanting(shop, replace(API_KEY, name="a/b", mode=0o400), API_KEY))
        assert [(made.path, made.mode) for made in result.files] == [("a/b", 0o400), ("api-key", 0o644)]

    async def test_whole_response(self, node: Node, shop: EcommerceStand) -> None:
        """Without a key the file is the response, equal at each mount while the secret is."""
        spec = wanting(shop, file("all.json", CONFIG, None))
        first = await node.mount(spec)
        whole = json.loads(first["all.json"])
        assert whole["data"]["data"] == {"api_key": shop.api_key}
        assert whole["request_id"] == ""
        assert set(whole) >= {"lease_id", "lease_duration", "renewable", "warnings", "auth", "wrap_info"}
        assert await node.mount(spec) == first

    async def test_kv_version_1(self, node: Node, shop: EcommerceStand) -> None:
        """KV version 1 keeps its keys in the data itself."""
        shop.openbao.api("POST", "old/app", {"user": "web", "expiration": 1})
        files = await node.mount(wanting(shop, file("user", "old/app", "user"), role="broad"))
        assert files == {"user": b"web"}

    async def test_requests_that_differ_are_not_mixed(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """Method, path, query and body make a request: each kind is sent once, and each object gets its own answer."""
        requests = [
            SecretRequest("GET", "x"),
            SecretRequest("GET", "x", (("version", "1"),)),
            SecretRequest("GET", "x", (("version", "2"),)),
            SecretRequest("POST", "x"),
            SecretRequest("POST", "x", (), Sensitive('{"a":1}')),
            SecretRequest("POST", "x", (), Sensitive('{"a":"1"}')),
            SecretRequest("GET", "y"),
        ]
        for path in ("x", "y"):
            faulty.on(path, lambda seen: secret({"k": f"{seen.method} {seen.path} {seen.body.decode()}"}))
        twice = [file(f"{number}-{copy}", wanted, "k") for number, wanted in enumerate(requests) for copy in (1, 2)]
        files = await node.mount(wanting(shop, *twice, address=faulty.address))
        assert [files[f"{number}-1"] for number in range(7)] == [files[f"{number}-2"] for number in range(7)]
        assert list(files.values())[::2] == [
            b"GET /v1/x ",
            b"GET /v1/x?version=1 ",
            b"GET /v1/x?version=2 ",
            b"POST /v1/x ",
            b'POST /v1/x {"a":1}',
            b'POST /v1/x {"a":"1"}',
            b"GET /v1/y ",
        ]
        assert faulty.count("x") + faulty.count("y") == len(requests)

    async def test_all_reads_at_once(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """Thirty distinct reads are under way at one time: a server that answers none before all came, answers."""
        faulty.on("x", replace(secret({"k": "1"}), together=30))
        objects = [file(f"f{number}", SecretRequest("GET", "x", (("n", str(number)),)), "k") for number in range(30)]
        assert len(await node.mount(wanting(shop, *objects, address=faulty.address))) == 30

    async def test_connections_for_reads_open_during_the_login(
        self, node: Node, shop: EcommerceStand, faulty: Faulty
    ) -> None:
        """A first mount's reads find a connection each: no handshake is left to wait for once the pod is logged in."""
        faulty.on(LOGIN, replace(token("hvs.token-of-a-faulty-server"), stall=2))
        faulty.on("kv/x", secret({"k": "v"}))
        objects = [file(f"f{number}", SecretRequest("GET", "kv/x", (("n", str(number)),)), "k") for number in range(6)]
        mount = asyncio.create_task(node.mount(wanting(shop, *objects, address=faulty.address)))
        await eventually(lambda: faulty.most_connections == 6)
        assert [arrival.path for arrival in faulty.arrivals] == [f"/v1/{LOGIN}"]
        assert len(await mount) == 6
        assert faulty.most_connections == 6

    async def test_mounts_of_one_pod_at_once(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """Ten mounts at one time are one login and one credential."""
        spec = wanting(shop, USERNAME, PASSWORD)
        mounts = [replace(spec, target_path=f"/target/{number}") for number in range(10)]
        results = await asyncio.gather(*map(node.mount, mounts))
        assert all(files == results[0] for files in results)
        assert [counted(LOGIN), counted(CREDS)] == [1, 1]

    async def test_no_key_for_versions(self, shop: EcommerceStand, tmp_path: Path) -> None:
        """Without an HMAC key the volume is mounted all the same, with empty versions."""
        async with running(shop, tmp_path) as node:
            (tmp_path / "hmac.key").unlink()
            result = await node.mounter.mount(wanting(shop, API_KEY))
        assert result.files[0].contents == shop.api_key.encode()
        assert result.versions == (("api-key", ""),)


class TestMadeOnce:
    """While a volume's answers are the very ones of its last mount, nothing is made of them again."""

    async def test_nothing_is_made_twice_of_one_answer(self, node: Node, shop: EcommerceStand) -> None:
        """A kept credential and what `refreshAfter` remembers: the re-mount has the files that were made before."""
        remembered = replace(API_KEY, refresh_after=300.0)
        spec = wanting(shop, USERNAME, PASSWORD, remembered)
        first, again = await node.mounter.mount(spec), await node.mounter.mount(spec)
        assert again.files is first.files
        assert (again.versions, again.event and again.event.remembered) == (first.versions, 1)
        # Later it is read again, and its files are made of that.
        node.clock.ahead += 301
        later = await node.mounter.mount(spec)
        assert later.files is not first.files
        assert later == first

    async def test_a_changed_secret_is_seen(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """Once its time in memory is over, a new value comes with a new version."""
        faulty.on("kv/rotates", secret({"k": "old"}), secret({"k": "new"}))
        spec = wanting(shop, replace(file("f", "kv/rotates", "k"), refresh_after=60.0), address=faulty.address)
        first, again = await node.mounter.mount(spec), await node.mounter.mount(spec)
        node.clock.ahead += 61
        later = await node.mounter.mount(spec)
        assert [result.files[0].contents for result in (first, again, later)] == [b"old", b"old", b"new"]
        assert first.versions == again.versions != later.versions

    async def test_a_changed_class_has_files_of_its_own(self, node: Node, shop: EcommerceStand) -> None:
        """Another mode, another key of the same secret: made anew, of the same answer from memory."""
        remembered = replace(API_KEY, refresh_after=300.0)
        first = await node.mounter.mount(wanting(shop, remembered))
        other = await node.mounter.mount(wanting(shop, replace(remembered, mode=0o400)))
        assert other.event is not None
        assert (other.event.remembered, other.files[0].mode, first.files[0].mode) == (1, 0o400, remembered.mode)

    async def test_what_another_volume_replaced_is_made_anew(self, node: Node, shop: EcommerceStand) -> None:
        """The pod's other volume brought a new credential: this one has its files, though it asks Vault nothing."""
        one = wanting(shop, USERNAME)
        other = replace(one, target_path=f"{one.target_path}-2")
        first = await node.mount(one)
        assert await node.mount(other) == first
        node.clock.ahead += 48 * 3600  # its lease is over
        brought, again = await node.mounter.mount(other), await node.mounter.mount(one)
        assert again.files == brought.files
        assert again.files[0].contents != first["db-username"]
        assert again.event is not None
        assert again.event.kept == 1

    async def test_what_is_read_each_time_is_held_no_longer(self, node: Node, shop: EcommerceStand) -> None:
        """The files of a volume with a static secret, and those of a large one, are gone with their mount."""
        large = replace(file("large", "ecommerce/data/large", "value"), refresh_after=300.0)
        shop.openbao.write_kv("ecommerce/data/large", {"value": "x" * (MAX_MADE_BYTES + 1)})
        for spec in (wanting(shop, USERNAME, API_KEY), wanting(shop, large, role="broad")):
            await node.mount(spec)
            assert held(spec) == set()
        spec = wanting(shop, USERNAME)
        await node.mount(spec)
        assert held(spec) == {"db-username"}

    async def test_key_that_comes_late_brings_versions(self, shop: EcommerceStand, tmp_path: Path) -> None:
        """Made while there was no key for versions, and made again once there is."""
        async with running(shop, tmp_path) as node:
            (tmp_path / "hmac.key").write_bytes(b"short")
            spec = wanting(shop, USERNAME)
            first = await node.mounter.mount(spec)
            (tmp_path / "hmac.key").write_bytes(b"k" * 32)
            node.clock.ahead += 61
            later = await node.mounter.mount(spec)
        assert first.files == later.files
        assert [version for _, version in first.versions] == [""]
        assert all(version for _, version in later.versions)


class TestTokens:
    async def test_pods_have_sessions_of_their_own(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """Each pod logs in for itself and gets its own credential, also where Vault takes them for one entity."""
        pods = [shop.kube.add_pod(NAMESPACE, f"twin-{number}", service_account=SERVICE_ACCOUNT) for number in range(2)]
        volumes = [await node.mount(wanting(shop, USERNAME, pod=pod)) for pod in pods]
        assert volumes[0] != volumes[1]
        assert [counted(LOGIN), counted(CREDS)] == [2, 2]

    async def test_identities_of_one_pod_are_apart(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """Another role is another session: what one role may read, the other does not get from memory."""
        await node.mount(wanting(shop, USERNAME))
        login_role(shop.openbao, "nothing", [])
        error = await node.failure(wanting(shop, USERNAME, role="nothing"))
        assert error.code is Code.PERMISSION_DENIED
        assert counted(LOGIN) == 2

    @pytest.mark.parametrize("role", ["ecommerce-app", "bare"])
    async def test_token_revoked_behind_our_back(
        self, node: Node, shop: EcommerceStand, counted: Counted, role: str
    ) -> None:
        """A dead token costs one new login and one more try of each read; user and password match again."""
        spec = wanting(shop, USERNAME, PASSWORD, API_KEY, file("session", "ecommerce/data/user-service/config", None))
        spec = replace(spec, login=spec.login._replace(role=role))
        before = await node.mount(spec)
        accessor = next(seen.accessor for seen in reversed(shop.openbao.requests(CONFIG)))
        shop.openbao.api("POST", "auth/token/revoke-accessor", {"accessor": accessor})
        after = await node.mount(spec)
        assert after["db-username"] != before["db-username"]
        assert shop.postgres.can_login(after["db-username"].decode(), after["db-password"].decode())
        assert after["api-key"] == before["api-key"]
        assert [counted(LOGIN), counted(CREDS), counted(CONFIG)] == [2, 2, 3]
        assert await node.mount(spec) == after
        assert counted(LOGIN) == 2

    async def test_policy_denial_logs_in_again_sparingly(
        self, node: Node, shop: EcommerceStand, counted: Counted
    ) -> None:
        """Where the token lives, a 403 is the policies': one new login at most in five minutes."""
        spec = wanting(shop, API_KEY, file("denied", "ecommerce/data/other/config", "k"))
        logins = []
        for ahead in (0, 0, 0, 0, 299, 0, 2, 0):
            node.clock.ahead += ahead
            assert (await node.failure(spec)).code is Code.PERMISSION_DENIED
            logins.append(counted(LOGIN))
        assert logins == [1, 2, 2, 2, 2, 2, 3, 3]

    async def test_new_policy_is_found_by_the_new_login(
        self, node: Node, shop: EcommerceStand, counted: Counted
    ) -> None:
        """A role that was given another policy since the login serves the next mount."""
        login_role(shop.openbao, "growing", ["default"])
        spec = wanting(shop, API_KEY, role="growing")
        assert (await node.failure(spec)).code is Code.PERMISSION_DENIED
        login_role(shop.openbao, "growing", ["ecommerce-policy"])
        assert await node.mount(spec) == {"api-key": shop.api_key.encode()}
        assert counted(LOGIN) == 2

    async def test_token_with_few_uses(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """A token that is used up is replaced before it fails a read."""
        spec = wanting(shop, API_KEY, role="few")
        for _ in range(9):
            assert await node.mount(spec) == {"api-key": shop.api_key.encode()}
        assert counted(LOGIN) <= 9
        assert counted(CONFIG) == 9

    async def test_cache_size_0_keeps_nothing(self, shop: EcommerceStand, tmp_path: Path, counted: Counted) -> None:
        """With cache-size 0 each mount logs in once, whatever it reads, and once only."""
        async with running(shop, tmp_path, Settings(cache_size=0)) as node:
            for number in range(1, 4):
                await node.mount(wanting(shop, USERNAME, PASSWORD, API_KEY))
                assert [counted(LOGIN), counted(CREDS)] == [number, number]

    async def test_least_recently_mounted_is_let_go(
        self, shop: EcommerceStand, tmp_path: Path, counted: Counted
    ) -> None:
        """Past cache-size the session that was mounted longest ago goes, and only that one logs in again."""
        first, second, third = (
            shop.kube.add_pod(NAMESPACE, f"lru-{number}", service_account=SERVICE_ACCOUNT) for number in range(3)
        )
        logins = []
        async with running(shop, tmp_path, Settings(cache_size=2)) as node:
            for pod in (first, second, first, third, first, second):
                await node.mount(wanting(shop, API_KEY, pod=pod))
                logins.append(counted(LOGIN))
        assert logins == [1, 2, 2, 3, 3, 4]

    async def test_cancelled_mount_orphans_nothing(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """A caller who goes away during login or read leaves both to the session: the next mount joins them."""
        faulty.on(LOGIN, replace(token("hvs.token-of-a-faulty-server"), stall=0.2))
        lease = secret({"username": "u"}, lease_id="lease/1", lease_duration=3600, renewable=True)
        faulty.on(CREDS, replace(lease, stall=0.2))
        spec = wanting(shop, USERNAME, address=faulty.address)
        for path in (LOGIN, CREDS):
            leaving = asyncio.create_task(node.mount(spec))
            await eventually(lambda path=path: faulty.count(path))  # type: ignore[misc]
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        assert await node.mount(spec) == {"db-username": b"u"}
        assert [faulty.count(LOGIN), faulty.count(CREDS)] == [1, 1]


class TestErrors:
    async def test_kv2_path_that_the_policy_does_not_name(self, node: Node, shop: EcommerceStand) -> None:
        """A KV version 2 path without data/, denied: the message has the path to write."""
        error = await node.failure(wanting(shop, file("k", "ecommerce/shared/config", "api_key")))
        assert error.code is Code.PERMISSION_DENIED
        assert 'object "k": Vault denied GET ecommerce/shared/config' in str(error)
        assert 'ecommerce/ is a KV version 2 engine: write secretPath "ecommerce/data/shared/config"' in str(error)

    async def test_kv2_path_that_is_not_there(self, node: Node, shop: EcommerceStand) -> None:
        """The same with a policy that allows it, where OpenBao answers 404."""
        error = await node.failure(wanting(shop, file("k", "ecommerce/shared/config", "api_key"), role="broad"))
        assert error.code is Code.NOT_FOUND
        assert "Vault has nothing at ecommerce/shared/config" in str(error)
        assert 'write secretPath "ecommerce/data/shared/config"' in str(error)

    async def test_kv2_path_that_has_data(self, node: Node, shop: EcommerceStand) -> None:
        """A path that is right in form is not corrected."""
        error = await node.failure(wanting(shop, file("k", "ecommerce/data/shared/nothing", "k")))
        assert error.code is Code.NOT_FOUND
        assert "ecommerce/data/shared/nothing" in str(error)
        assert "KV version 2" not in str(error)
        assert "check secretPath" in str(error)

    async def test_kv1_path_that_has_data(self, node: Node, shop: EcommerceStand) -> None:
        """The opposite slip: a path as of version 2 on an engine of version 1."""
        error = await node.failure(wanting(shop, file("k", "old/data/app", "k"), role="broad"))
        assert 'old/ is a KV version 1 engine: write secretPath "old/app"' in str(error)

    @pytest.mark.parametrize(
        ("method", "capability"), [("GET", "read"), ("LIST", "list"), ("POST", "update"), ("DELETE", "delete")]
    )
    async def test_policy_denial(self, node: Node, shop: EcommerceStand, method: str, capability: str) -> None:
        """A denial names object, request, Vault's words, role and address, and the capability to give on the path."""
        denied = SecretRequest(method, "old/app")
        error = await node.failure(wanting(shop, file("k", denied, "k")))
        assert error.code is Code.PERMISSION_DENIED
        for part in (
            f'object "k": Vault denied {method} old/app',
            "permission denied",
            f'[role "ecommerce-app", {shop.openbao.address}]',
            "check secretPath, whose mount and spelling",
            f'give a policy of role "ecommerce-app" the capability "{capability}" on "old/app"',
        ):
            assert part in str(error)

    async def test_namespace_is_named(self, node: Node, shop: EcommerceStand) -> None:
        """In a namespace the message says which."""
        bao = shop.openbao
        bao.api("POST", "sys/namespaces/blue")
        bao.enable_kubernetes_auth("kubernetes", shop.kube, namespace="blue")
        login_role(bao, "ecommerce-app", [], namespace="blue")
        error = await node.failure(wanting(shop, API_KEY, namespace="blue"))
        assert 'role "ecommerce-app", Vault namespace "blue"' in str(error)

    async def test_missing_key(self, node: Node, shop: EcommerceStand) -> None:
        """A missing key: object, path, key and how many there are; neither their names nor their values."""
        error = await node.failure(wanting(shop, file("k", CONFIG, "apikey")))
        assert error.code is Code.NOT_FOUND
        assert f'object "k": GET {CONFIG} has no key "apikey" (it has 1 key)' in str(error)
        assert str(error).count('object "k"') == 1
        assert "check secretKey" in str(error)
        assert "api_key" not in str(error)
        assert shop.api_key not in str(error)

    async def test_value_that_cannot_be_decoded(self, node: Node, shop: EcommerceStand) -> None:
        """A value that is not in the encoding that the object names is the store's fault, and is not shown."""
        error = await node.failure(wanting(shop, file("api-key", CONFIG, "api_key", Encoding.HEX)))
        assert error.code is Code.FAILED_PRECONDITION
        assert "is not valid hex" in str(error)
        assert shop.api_key not in str(error)

    async def test_all_failures_in_one_message(self, node: Node, shop: EcommerceStand) -> None:
        """Every failing object is named, the good ones are not, and the first one's code is the code."""
        missing, denied = file("missing", CONFIG, "other"), file("denied", "old/app", "k")
        nothing = file("nothing", "ecommerce/data/shared/nothing", "k")
        for objects, code in (
            ((API_KEY, missing, denied, nothing), Code.NOT_FOUND),
            ((API_KEY, denied, nothing, missing), Code.PERMISSION_DENIED),
        ):
            error = await node.failure(wanting(shop, *objects))
            assert isinstance(error, MountFailed)
            assert error.code is code
            assert len(error.failures) == 3
            assert all(f'"{name}"' in str(error) for name in ("missing", "denied", "nothing"))
            assert '"api-key"' not in str(error)

    async def test_objects_that_fail_alike_share_a_sentence(self, node: Node, shop: EcommerceStand) -> None:
        """One cause is told once, with the objects that it took."""
        objects = [file(f"f{number}", "old/app", "k") for number in range(5)]
        error = await node.failure(wanting(shop, API_KEY, *objects))
        assert str(error).count("Vault denied") == 1
        assert 'objects "f0", "f1", "f2", "f3", "f4": ' in str(error)

    async def test_names_of_many_objects_leave_room(self, node: Node, shop: EcommerceStand) -> None:
        """Hundreds that fail alike are named as far as the message has room, and counted from there."""
        objects = [file(f"{number:03}-{'x' * 40}", "old/app", "k") for number in range(300)]
        error = await node.failure(wanting(shop, *objects))
        named = str(error).count('xxx"')
        assert 5 < named < 300
        assert f"and {300 - named} more: " in str(error)
        assert encoded_size(str(error)) <= MAX_MESSAGE_BYTES

    async def test_too_large_a_volume_is_refused_before_it_is_whole(
        self, node: Node, shop: EcommerceStand, faulty: Faulty
    ) -> None:
        """Rendering stops where the driver's 4 MiB are passed, with the sizes; a thousand files are never in memory."""
        faulty.on("big", secret({"k": "x" * (1 << 20)}))
        objects = [file(f"f{number}", "big", "k") for number in range(100)]
        error = await node.failure(wanting(shop, *objects, address=faulty.address))
        assert error.code is Code.FAILED_PRECONDITION
        assert "4 of its 100 objects come to 4.01 MiB, and the driver takes at most 4.00 MiB" in str(error)

    @pytest.mark.parametrize("letter", ["x", "%", "ü"])
    async def test_message_fits(self, node: Node, shop: EcommerceStand, faulty: Faulty, letter: str) -> None:
        """However many fail, the message stays within 4 KiB as gRPC encodes it, says how many are left out, and keeps
        the remedy of the first.
        """
        objects = [file(f"f{number}", f"{letter * 60}/{number}", "k") for number in range(300)]
        error = await node.failure(wanting(shop, *objects, address=faulty.address))
        shown = str(error).count("Vault has nothing at")
        assert 0 < shown < 300
        assert f"and {300 - shown} more" in str(error)
        assert encoded_size(str(error)) <= MAX_MESSAGE_BYTES
        assert "check secretPath" in str(error)

    @pytest.mark.parametrize("letter", ["x", "%", "ü", "😀"])
    async def test_remedy_survives_long_texts(
        self, node: Node, shop: EcommerceStand, faulty: Faulty, letter: str
    ) -> None:
        """Names, paths and words of any length leave room for what to do."""
        long = letter * 3000
        others = [file(f"f{number}", f"{long}{number}", "k") for number in range(6)]
        for other in others:
            faulty.on(quote(other.request.path), refusal(403, long))
        for path, remedy in ((long, "check secretPath"), (f"{long}0", 'the capability "read" on')):
            error = await node.failure(wanting(shop, file(long, path, "k"), *others, address=faulty.address))
            assert encoded_size(str(error)) <= MAX_MESSAGE_BYTES
            assert remedy in str(error)
            assert re.search(r"; and [1-6] more$", str(error))

    async def test_login_denied(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """A login that is denied fails the mount once, not once an object; it is asked for once."""
        error = await node.failure(wanting(shop, USERNAME, API_KEY, role="nobody"))
        assert error.code is Code.PERMISSION_DENIED
        assert str(error).count("denied:") == 1
        assert 'role "nobody"' in str(error)
        assert counted(LOGIN) == 1

    async def test_login_whose_answer_was_lost(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """A lost login is not sent again within the mount; the next mount logs in."""
        faulty.on(LOGIN, Answer(cut=Cut.BEFORE), token("hvs.token-of-a-faulty-server"))
        faulty.on("x", secret({"k": "1"}))
        spec = wanting(shop, file("a", "x", "k"), file("b", SecretRequest("GET", "x", (("n", "1"),)), "k"))
        spec = replace(spec, server=spec.server._replace(address=faulty.address))
        error = await node.failure(spec)
        assert error.code is Code.FAILED_PRECONDITION
        assert faulty.count(LOGIN) == 1
        assert await node.mount(spec) == {"a": b"1", "b": b"1"}
        assert faulty.count(LOGIN) == 2

    async def test_sealed_and_unreachable(self, node: Node, shop: EcommerceStand, faulty: Faulty) -> None:
        """A Vault that is sealed, and one that is away, are preconditions; the mounts after work again."""
        faulty.on("x", secret({"k": "1"}))
        spec = wanting(shop, file("k", "x", "k"), address=faulty.address)
        faulty.on(LOGIN, refusal(503, "Vault is sealed"))
        error = await node.failure(spec)
        assert error.code is Code.FAILED_PRECONDITION
        assert "is sealed" in str(error)
        faulty.stop()
        await asyncio.sleep(0.05)  # the end of the kept connection arrives
        error = await node.failure(spec)
        assert error.code is Code.FAILED_PRECONDITION
        assert "is unreachable" in str(error)
        faulty.on(LOGIN, token("hvs.token-of-a-faulty-server"))
        faulty.start()
        assert await node.mount(spec) == {"k": b"1"}

    @pytest.mark.parametrize("slow", [LOGIN, "x"])
    async def test_out_of_time(self, shop: EcommerceStand, faulty: Faulty, tmp_path: Path, slow: str) -> None:
        """A mount ends with its time, as a precondition that names who was waited for."""
        faulty.on(slow, Answer(stall=30))
        async with running(shop, tmp_path, timeout=0.3) as node:
            error = await node.failure(wanting(shop, file("k", "x", "k"), address=faulty.address))
        assert isinstance(error, OutOfTime)
        assert error.code is Code.FAILED_PRECONDITION
        assert f"longer than 0.3 s; Vault at {faulty.address}" in str(error)

    async def test_retries_end_with_the_mount(self, shop: EcommerceStand, faulty: Faulty, tmp_path: Path) -> None:
        """A Retry-After beyond the mount's time is told at once, as throttling, not as time that ran out."""
        faulty.on("x", refusal(429, "too many", Retry_After="30"))
        async with running(shop, tmp_path, timeout=5) as node:
            error = await node.failure(wanting(shop, file("k", "x", "k"), address=faulty.address))
        assert "throttles" in str(error)
        assert faulty.count("x") == 1

    def test_codes_that_may_leave(self) -> None:
        """docs/contract.md section 1: no code that an error can have is one of the five, nor one that tells nothing."""
        kubelet_waits = {"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
        names = {code.value for code in Code}
        assert not names & (kubelet_waits | {"UNKNOWN", "OK"})
        assert names <= {status.name for status in grpc.StatusCode}
        assert all(isinstance(kind.code, Code) for kind in _kinds(ProviderError))

    async def test_nothing_is_mounted_by_halves(self, node: Node, shop: EcommerceStand, counted: Counted) -> None:
        """A mount with one bad object gives no file; what was issued for the good ones serves the next mount."""
        await node.failure(wanting(shop, USERNAME, file("k", CONFIG, "other")))
        files = await node.mount(wanting(shop, USERNAME, PASSWORD))
        assert shop.postgres.can_login(files["db-username"].decode(), files["db-password"].decode())
        assert counted(CREDS) == 1


def _kinds(kind: type[ProviderError]) -> Iterator[type[ProviderError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


class TestCanaries:
    """Secrets planted wherever one can be, and a look for them wherever one could come out."""

    VALUE = "canary-value-of-a-secret"
    BODY = "canary-of-a-request-body"
    TOKENS = ("hvs.canary-token-0123456789", "s.canarytoken0123456789abcd", "canary-0123-token-without-prefix")

    @pytest.mark.parametrize("client_token", TOKENS)
    async def test_no_secret_comes_out(
        self,
        node: Node,
        shop: EcommerceStand,
        faulty: Faulty,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        client_token: str,
    ) -> None:
        """Neither records at DEBUG, errors with all that they came from, nor reprs hold a value, token, JWT or body."""
        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(adapter, "MAX_TRIES", 2)
        body = SecretRequest("POST", "x", (), Sensitive(json.dumps({"pin": self.BODY, "list": [{"n": 12345678}]})))
        spec = wanting(shop, file("k", body, "k"), address=faulty.address)
        (jwt,) = (held.reveal() for held in spec.tokens.values())
        canaries = [self.VALUE, self.BODY, "12345678", client_token, jwt, jwt.split(".")[1][:20], jwt.split(".")[2]]
        login = token(client_token)

        def echo(status: int) -> Callable[[Arrival], Answer]:
            def answer(seen: Arrival) -> Answer:
                quoted = (
                    f"{seen.headers.get('x-vault-token')} {seen.body.decode()} {self.VALUE if status < 400 else ''}"
                )
                return replace(refusal(status, quoted, *quoted.split()), headers={"Retry-After": "0"})

            return answer

        def header(status: int, name: str) -> Callable[[Arrival], Answer]:
            return lambda seen: Answer(status, b"<html>", {name: f"http://h/{seen.headers['x-vault-token']}"})

        def bad_http(seen: Arrival) -> Answer:
            return Answer(200, {}, {f"bad {seen.headers.get('x-vault-token')} name": "\x00"})

        value = secret({"k": self.VALUE, "other": self.VALUE})
        leased = secret({"k": self.VALUE}, lease_id="lease/1", lease_duration=3600, renewable=True)
        scenes: list[tuple[str, Answer | Callable[[Arrival], Answer], bool]] = [
            ("x", value, True),
            ("x", leased, True),
            *((("x"), echo(status), False) for status in (200, 400, 403, 404, 405, 429, 500, 503)),
            ("x", header(307, "Location"), False),
            ("x", header(200, "Content-Type"), False),
            ("x", bad_http, False),
            ("x", Answer(body=b'{"data": {"k": "' + self.VALUE.encode()), False),
            ("x", replace(value, cut=Cut.WITHIN), False),
            ("x", replace(value, cut=Cut.BEFORE), False),
            ("x", secret({"other": self.VALUE}), False),
            ("x", Answer(body={"data": self.VALUE}), False),
            *((LOGIN, echo(status), False) for status in (200, 400, 403, 500)),
            (LOGIN, bad_http, False),
            (LOGIN, replace(login, cut=Cut.WITHIN), False),
        ]
        shown = [repr(spec)]
        for number, (path, reply, works) in enumerate(scenes):
            faulty.on("x", value)
            faulty.on(LOGIN, login)
            faulty.on("auth/token/lookup-self", echo(403))
            faulty.on("sys/internal/ui/mounts/x", echo(403))
            faulty.on(path, reply)
            pod = shop.kube.add_pod(NAMESPACE, f"canary-{number}", service_account=SERVICE_ACCOUNT)
            scene = replace(spec, pod=replace(spec.pod, uid=pod.uid))
            for _ in range(2):  # with a fresh token, and with one that is not
                if works:
                    result = await node.mounter.mount(scene)
                    assert result.files[0].contents == self.VALUE.encode()
                    shown.append(repr(result))
                else:
                    error = await node.failure(scene)
                    shown += [str(error), repr(error), *traceback.format_exception(error), *_chain(error)]
        encoded = await node.failure(wanting(shop, file("k", body, "k", Encoding.HEX), address=faulty.address))
        shown += [str(encoded), *_chain(encoded)]
        shown += [repr(session.__dict__) for session in node.sessions.all()]
        formatter = logging.Formatter("%(name)s %(message)s")
        for record in caplog.records:
            shown += [formatter.format(record), repr(record.__dict__)]

        text = "\n".join(shown)
        assert [canary for canary in canaries if canary in text] == []
        # It proves something only where the canaries were there, and where there was something to look at.
        sent = "\n".join(f"{seen.headers} {seen.body!r}" for seen in faulty.arrivals)
        assert all(canary in sent for canary in (self.BODY, client_token, jwt))
        assert "Vault answered 400" in text
        assert "***" in text
        assert any(record.getMessage() == "mounted" for record in caplog.records)


def _chain(error: BaseException | None) -> Iterator[str]:
    """The repr of an error and of all that it came from."""
    while error is not None:
        yield repr(error)
        yield repr(error.__dict__)
        error = error.__cause__ or error.__context__


async def test_a_warning_of_a_class_is_logged_once(
    shop: EcommerceStand, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """What is odd about a class is told at its first mount, and not again every minute by every replica."""
    odd = replace(wanting(shop, file("k", "ecommerce/data/shared/config", "api_key")), warnings=("odd",))
    await node.mount(odd)
    await node.mount(odd)
    await node.mount(replace(odd, class_name="another"))
    told = [record.getMessage() for record in caplog.records if "odd" in record.getMessage()]
    assert len(told) == 2
