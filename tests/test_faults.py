"""Each fault that lies between a node and its Vault, at the login and at the read: the daemon as a program, a real
OpenBao, and between them a proxy in a process of its own.

For each: the code, the words, how many requests went out, and that the next mount after it succeeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.live import Daemon
from tests.shop import LOGIN, READ, Shop
from tests.stand.driver import Driver
from tests.stand.faultproxy import FaultProxy
from tests.stand.kubeapi import KubeApi
from tests.stand.openbao import OpenBao
from tests.stand.pki import Authority
from tests.stand.waiting import eventually

# The longest that a mount may take here, which is none of its promises: kubelet waits for two minutes.
MOUNT_TIMEOUT = 6.0
MIB = 1024 * 1024
PHASES = pytest.mark.parametrize("phase", [LOGIN, READ], ids=["login", "read"])
Fault = Callable[[FaultProxy, str], None]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with KubeApi() as kube, OpenBao() as bao, FaultProxy(bao.address) as proxy:
        shop = Shop(tmp_path_factory.mktemp("faults"), kube, bao, proxy)
        with (
            Daemon(shop, f"--mount-timeout={MOUNT_TIMEOUT:g}s") as daemon,  # type: ignore[arg-type]
            Driver(daemon.socket) as driver,
        ):
            shop.driver = driver
            shop.mount()
            yield shop


@pytest.fixture
def shop(stand: Shop) -> Iterator[Shop]:
    stand.proxy.listen()
    stand.proxy.heal()
    stand.recovers()
    stand.proxy.forget()
    yield stand
    stand.proxy.heal()


def status(number: int, body: bytes = b'{"errors": ["told"]}', **headers: str) -> Fault:
    fields = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda proxy, path: proxy.answer(path, number, body, fields, times=1)


class TestPassing:
    """Faults that pass within the mount's own time, and so are no failure of it."""

    @PHASES
    @pytest.mark.parametrize("number", [412, 429, 472, 473, 500, 502, 503, 504])
    def test_status(self, shop: Shop, phase: str, number: int) -> None:
        """An answer that says "later" is asked for again, once, and the mount succeeds."""
        status(number)(shop.proxy, phase)
        assert shop.mount().text("api-key") == "key-1"
        assert shop.proxy.count(phase) == 2

    @PHASES
    def test_429_with_retry_after(self, shop: Shop, phase: str) -> None:
        """Not before the time that the server asks for."""
        status(429, Retry_After="1")(shop.proxy, phase)
        shop.mount()
        first, second = shop.proxy.seen(phase)
        assert second.at - first.at >= 1

    def test_reset_of_a_read(self, shop: Shop) -> None:
        """A read of kv whose answer is lost is sent again, once its engine is known: before and within the answer."""
        for make in (shop.proxy.reset, shop.proxy.reset_within):
            shop.proxy.forget()
            make(READ, times=1)
            shop.mount()
            assert shop.proxy.count(READ) == 2

    @PHASES
    def test_slow_drip(self, shop: Shop, phase: str) -> None:
        """An answer that takes its time is waited for within the mount's."""
        shop.proxy.drip(phase, seconds=1.5, times=1)
        assert shop.mount().text("api-key") == "key-1"
        assert shop.proxy.count(phase) == 1

    @PHASES
    def test_wrong_content_type(self, shop: Shop, phase: str) -> None:
        """Vault's answer is known by what it is, and not by what a proxy calls it."""
        shop.proxy.retype(phase, "text/plain", times=1)
        assert shop.mount().text("api-key") == "key-1"
        assert shop.proxy.count(phase) == 1


class TestLasting:
    """Faults that last for the mount: it fails with what is wrong, and the next one after them succeeds."""

    @PHASES
    @pytest.mark.parametrize("number", [412, 429, 472, 473, 500])
    def test_status(self, shop: Shop, phase: str, number: int) -> None:
        """Five tries and no more, Vault's words, and what to do; sys/health answers, so nobody else is refused."""
        shop.proxy.answer(phase, number, b'{"errors": ["told so"]}')
        words = shop.refused()
        assert ("throttles requests (429)" if number == 429 else f"answered {number}") in words
        assert '("told so")' in words
        assert shop.proxy.count(phase) == 5
        shop.proxy.heal()
        shop.mount()

    @PHASES
    def test_429_with_a_long_retry_after(self, shop: Shop, phase: str) -> None:
        """Who would have to wait for longer than the mount may take is told at once, and asks once."""
        shop.proxy.answer(phase, 429, b'{"errors": ["slow down"]}', {"Retry-After": "120"})
        assert 'throttles requests (429) ("slow down")' in shop.refused()
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()

    @PHASES
    @pytest.mark.parametrize("number", [502, 503, 504])
    def test_status_of_one_path(self, shop: Shop, phase: str, number: int) -> None:
        """A load balancer's trouble with one path is asked five times; Vault answers sys/health, so it is there."""
        shop.proxy.answer(phase, number, b"<html>Bad</html>", {"Content-Type": "text/html"})
        assert f"answered {number}" in shop.refused()
        assert shop.proxy.count(phase) == 5
        # The last answer may be what has it looked at, and the mount is refused at the same moment.
        eventually(lambda: shop.proxy.count("sys/health") >= 1, "Vault is looked at")
        shop.proxy.heal()
        shop.mount()

    def test_503_sealed(self, shop: Shop) -> None:
        """A sealed OpenBao, through the proxy: it is said, and over when it is unsealed."""
        shop.bao.seal()
        try:
            words = [shop.refused() for _ in range(3)]
            assert "is sealed" in words[0]
            assert "unseal it" in words[0]
            assert f"Vault at {shop.proxy.address} is unreachable since" in words[-1]
            assert "it is sealed" in words[-1]
        finally:
            shop.bao.unseal()
        shop.recovers()

    @PHASES
    @pytest.mark.parametrize("number", [307, 308])
    def test_redirect(self, shop: Shop, phase: str, number: int) -> None:
        """To an address that no flag allows nothing is sent: the message names where, the flag, and its value."""
        place = f"http://127.0.0.1:{shop.proxy.port + 1}"
        shop.proxy.answer(phase, number, b"", {"Location": f"{place}/v1/{_whole(phase)}"})
        words = shop.refused()
        assert f"redirects ({number}) to {place}" in words
        assert f"--allowed-vault-addresses={place} would allow it" in words
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()

    def test_refused_connections(self, shop: Shop) -> None:
        """Nobody listens: the mount fails within a second, says so, and counts itself."""
        shop.proxy.refuse()
        time.sleep(0.2)  # until the daemon has seen that what was open is reset
        words = shop.refused()
        assert f"Vault at {shop.proxy.address} is unreachable since" in words
        assert "mount refused): Connection refused" in words or "mounts refused): Connection refused" in words
        assert "check vaultAddress" in words
        shop.proxy.listen()
        shop.recovers()

    @PHASES
    def test_stall(self, shop: Shop, phase: str) -> None:
        """One path that is never answered fails at the mount's own timeout, sent once, and nobody else is refused."""
        shop.proxy.stall(phase)
        pod = shop.pod()
        assert f"the mount took longer than {MOUNT_TIMEOUT:g} s" in shop.refused(pod)
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()
        shop.proxy.listen()  # what was stalled is reset, as a network does in the end
        shop.recovers(pod)

    def test_reset_of_a_login(self, shop: Shop) -> None:
        """A login whose answer is lost may have made a token: it is sent once, before and within the answer."""
        for make in (shop.proxy.reset, shop.proxy.reset_within):
            shop.proxy.forget()
            make(LOGIN)
            words = shop.refused()
            assert "did not answer to the end" in words
            assert shop.proxy.count(LOGIN) == 1
            shop.proxy.heal()
            shop.recovers()

    @PHASES
    def test_truncated_json(self, shop: Shop, phase: str) -> None:
        """Half an answer is not Vault's, and is not asked for again."""
        shop.proxy.truncate(phase)
        assert "is not Vault's API" in shop.refused()
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()

    @PHASES
    @pytest.mark.parametrize("number", [200, 403])
    def test_html_of_a_load_balancer(self, shop: Shop, phase: str, number: int) -> None:
        """A page is no answer of Vault's and no refusal; its type is told, its text is not."""
        shop.proxy.answer(phase, number, b"<html>Sign in, canary</html>", {"Content-Type": "text/html; charset=utf-8"})
        words = shop.refused()
        assert f"({number}, text/html; charset=utf-8) is not Vault's API" in words
        assert "canary" not in words
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()

    @PHASES
    def test_body_of_10_mib(self, shop: Shop, phase: str) -> None:
        """More than any secret is not read to its end."""
        body = b'{"auth": {}, "data": {"data": {"api_key": "%s"}}}' % (b"x" * 10 * MIB)
        shop.proxy.answer(phase, 200, body)
        assert "answered more than 8 MiB" in shop.refused()
        assert shop.proxy.count(phase) == 1
        shop.proxy.heal()
        shop.mount()


class TestTls:
    """The proxy speaks TLS: before a login nothing else can happen, so there is one phase."""

    @pytest.fixture
    def authority(self) -> Authority:
        return Authority()

    @pytest.fixture
    def trust(self, authority: Authority, tmp_path: Path) -> dict[str, str]:
        """The parameters of a class that trusts the authority."""
        (tmp_path / "ca.crt").write_bytes(authority.pem)
        return {"vaultCACertPath": str(tmp_path / "ca.crt")}

    def test_certificate_expired(self, shop: Shop, authority: Authority, trust: dict[str, str]) -> None:
        """It is said, no request arrives, and with a new certificate all is well."""
        shop.proxy.listen(authority.server(expired=True))
        words = shop.refused(**trust)
        assert f"TLS with Vault at {shop.proxy.address} failed" in words
        assert "expired" in words
        assert shop.proxy.seen() == []
        shop.proxy.listen(authority.server())
        shop.recovers(**trust)

    def test_wrong_host(self, shop: Shop, authority: Authority, trust: dict[str, str]) -> None:
        """A certificate of another host: its lack is named, no request arrives, and vaultTLSServerName helps."""
        shop.proxy.listen(authority.server(["vault.internal"]))
        words = shop.refused(**trust)
        assert "TLS with Vault" in words
        assert "127.0.0.1" in words
        assert "vaultTLSServerName" in words
        assert shop.proxy.seen() == []
        shop.recovers(**trust, vaultTLSServerName="vault.internal")

    def test_unknown_authority(self, shop: Shop, authority: Authority, trust: dict[str, str]) -> None:
        """Nothing is sent to a server that another authority vouches for."""
        shop.proxy.listen(Authority("other").server())
        words = shop.refused(**trust)
        assert "TLS with Vault" in words
        assert "vaultCACertPath" in words
        assert shop.proxy.seen() == []
        shop.proxy.listen(authority.server())
        shop.recovers(**trust)

    def test_client_certificate_refused(
        self, shop: Shop, authority: Authority, trust: dict[str, str], tmp_path: Path
    ) -> None:
        """Without a client certificate, or with another authority's, no request arrives; with the right one all do."""
        shop.proxy.listen(authority.server(), client_ca_pem=authority.pem)
        cert, key = Authority("other").client().write(tmp_path, "other")
        wrong = {"vaultTLSClientCertPath": str(cert), "vaultTLSClientKeyPath": str(key)}
        for parameters in ({}, wrong):
            words = shop.refused(**trust, **parameters)
            # Under TLS 1.3 the alert comes after the handshake, and the end of the connection may overtake it.
            assert "TLS with Vault" in words or "Connection reset by peer" in words or "did not answer" in words
        assert shop.proxy.seen() == []
        cert, key = authority.client().write(tmp_path, "right")
        shop.recovers(**trust, vaultTLSClientCertPath=str(cert), vaultTLSClientKeyPath=str(key))


def _whole(phase: str) -> str:
    return phase if phase == LOGIN else "shop/data/app"


def test_login_that_the_seal_cuts_off(tmp_path: Path) -> None:
    """OpenBao denies it as that of a pod that may not log in: the message names this cause too, and the next succeeds.

    Only one that has its storage in common with others ends what is under way; a single one waits for it.
    """
    with KubeApi() as kube, OpenBao(storage="raft") as bao, FaultProxy(bao.address) as proxy:
        shop = Shop(tmp_path, kube, bao, proxy)
        with Daemon(shop) as daemon, Driver(daemon.socket) as shop.driver, ThreadPoolExecutor(1) as pool:  # type: ignore[arg-type]
            pod = shop.pod()
            kube.stall(30, path="tokenreviews")
            try:
                mount = pool.submit(shop.mount, pod)
                eventually(lambda: kube.count("POST", "tokenreviews") > 0, "the login is under review")
                bao.seal()
                with pytest.raises(grpc.RpcError) as told:
                    mount.result()
            finally:
                kube.heal()
            bao.unseal()
            assert told.value.code() is grpc.StatusCode.PERMISSION_DENIED
            words = told.value.details() or ""
            assert "denied: Vault answered 403: permission denied" in words
            assert "403 too where its TokenReview fails, as while it is sealed or changes its leader" in words
            shop.recovers(pod)
