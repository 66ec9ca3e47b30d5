"""The way to Vault: TLS verified and its files re-read, client certificates, proxies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from provider.errors import VaultUnavailable
from provider.redact import Sensitive
from provider.settings import MIB, TlsSettings
from provider.spc import SecretRequest, VaultServer
from provider.vault import VaultServers, adapter
from provider.vault.tls import MAX_CA_FILES
from tests.stand.faulty import Faulty, secret
from tests.stand.openbao import OpenBao
from tests.stand.pki import LOOPBACK, Authority, Certificate

TOKEN = Sensitive("hvs.of-a-test-that-may-read")
THIS_MACHINE = "0.0.0.0"  # noqa: S104  # to connect to: an address of this machine that is not loopback's
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries a twentieth as long; how many there are stays. No proxy of whoever runs the tests."""
    monkeypatch.setattr(adapter, "FIRST_BACKOFF_SECONDS", 0.01)
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@dataclass
class HandClock:
    """A clock that a test turns."""

    seconds: float = 1000.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds

    def epoch(self) -> str:
        return "boot"


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def servers(clock: HandClock) -> AsyncIterator[VaultServers]:
    opened = VaultServers(clock=clock)
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def ca(authority: Authority, tmp_path: Path) -> str:
    """The path of the authority's certificate."""
    directory = tmp_path / "authority"
    directory.mkdir()
    path = directory / "ca.crt"
    path.write_bytes(authority.pem)
    return str(path)


@pytest.fixture
def faulty(authority: Authority) -> Iterator[Faulty]:
    with serving(authority.server()) as server:
        yield server


@contextlib.contextmanager
def serving(certificate: Certificate, client_ca_pem: bytes | None = None) -> Iterator[Faulty]:
    """A server with this certificate that answers one read."""
    with Faulty(certificate=certificate, client_ca_pem=client_ca_pem) as server:
        server.on("x", secret({"a": "1"}))
        yield server


async def read(servers: VaultServers, address: str, tls: TlsSettings, path: str = "x") -> object:
    """The data of a read."""
    async with asyncio.timeout(20):
        vault = servers.get(VaultServer(address, "", tls))
        deadline = asyncio.get_running_loop().time() + 20
        return (await vault.read(SecretRequest("GET", path), TOKEN, deadline)).response["data"]


def put(path: Path, content: bytes) -> None:
    """Replace a file as those do who do it well: beside it, then over it."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


class TestVerification:
    async def test_ca_file(self, servers: VaultServers, faulty: Faulty, ca: str) -> None:
        """A certificate of the authority in the file is accepted."""
        assert await read(servers, faulty.address, TlsSettings(ca_cert=ca)) == {"a": "1"}

    async def test_ca_directory_with_junk_in_it(
        self, servers: VaultServers, faulty: Faulty, authority: Authority, tmp_path: Path
    ) -> None:
        """Every file of the directory is tried, laid out as kubelet does; what is no certificate does not matter."""
        directory = tmp_path / "cas"
        (directory / "..2026" / "nested").mkdir(parents=True)
        (directory / "..data").symlink_to("..2026")
        (directory / "..2026" / "our-ca.txt").write_bytes(authority.pem)
        (directory / "our-ca.txt").symlink_to("..data/our-ca.txt")
        (directory / "a-readme").write_text("the certificates of the house")
        (directory / "b-empty").touch()
        (directory / "c-torn.pem").write_bytes(authority.pem[:100])
        (directory / "z-other.pem").write_bytes(Authority("other").pem)
        assert await read(servers, faulty.address, TlsSettings(ca_directory=str(directory))) == {"a": "1"}

    async def test_file_wins_over_directory(
        self, servers: VaultServers, faulty: Faulty, ca: str, tmp_path: Path
    ) -> None:
        """Where both are given, only the file counts, as with Vault's own clients."""
        other = tmp_path / "other.crt"
        other.write_bytes(Authority("other").pem)
        with pytest.raises(VaultUnavailable, match=r"TLS"):
            await read(servers, faulty.address, TlsSettings(ca_cert=str(other), ca_directory=str(Path(ca).parent)))
        assert faulty.arrivals == []

    async def test_unknown_authority(self, servers: VaultServers, faulty: Faulty, tmp_path: Path) -> None:
        """Neither another authority's certificate nor the system's authorities vouch for it; nothing is sent."""
        other = tmp_path / "other.crt"
        other.write_bytes(Authority("other").pem)
        for tls in (TlsSettings(ca_cert=str(other)), TlsSettings()):
            with pytest.raises(VaultUnavailable, match=r"TLS with Vault at https.*verify failed|unable to get") as told:
                await read(servers, faulty.address, tls)
            assert "vaultCACertPath" in told.value.advice
        assert faulty.arrivals == []

    async def test_wrong_host(self, servers: VaultServers, authority: Authority, ca: str) -> None:
        """A certificate for another host is refused, and the name that it lacks is told; nothing is sent."""
        with serving(authority.server(["vault.internal"])) as server:
            with pytest.raises(VaultUnavailable, match=r"TLS .*127\.0\.0\.1") as told:
                await read(servers, server.address, TlsSettings(ca_cert=ca))
            assert "vaultTLSServerName" in told.value.advice
            assert server.arrivals == []

    async def test_server_name(self, servers: VaultServers, authority: Authority, ca: str) -> None:
        """vaultTLSServerName is the name that is verified, instead of the address's and not besides it."""
        with serving(authority.server(["vault.internal"])) as server:
            tls = TlsSettings(ca_cert=ca, server_name="vault.internal")
            assert await read(servers, server.address, tls) == {"a": "1"}
        with serving(authority.server()) as server, pytest.raises(VaultUnavailable, match=r"vault\.internal"):
            await read(servers, server.address, tls)

    async def test_expired_certificate(self, servers: VaultServers, authority: Authority, ca: str) -> None:
        """A certificate past its end is refused, and that is said."""
        with serving(authority.server(expired=True)) as server:
            with pytest.raises(VaultUnavailable, match=r"expired"):
                await read(servers, server.address, TlsSettings(ca_cert=ca))
            assert server.arrivals == []

    async def test_skip_verify(self, servers: VaultServers, authority: Authority, ca: str) -> None:
        """With vaultSkipTLSVerify anything goes: unknown authority, other host, expired."""
        with serving(Authority("other").server(["other.internal"], expired=True)) as server:
            for tls in (TlsSettings(skip_verify=True), TlsSettings(ca_cert=ca, skip_verify=True)):
                assert await read(servers, server.address, tls) == {"a": "1"}

    async def test_plain_http_where_tls_is_spoken(self, servers: VaultServers, faulty: Faulty) -> None:
        """http:// to a TLS port fails, and never by sending the token in the clear more than once."""
        with pytest.raises(VaultUnavailable):
            await read(servers, f"http://127.0.0.1:{faulty.port}", TlsSettings())
        assert faulty.arrivals == []

    async def test_plain_http_where_openbao_speaks_tls(self, servers: VaultServers, authority: Authority) -> None:
        """A real server says what is wrong, and so does the error, however the connection ends."""
        with OpenBao(storage="inmem", certificate=authority.server()) as bao:
            plain = bao.address.replace("https://", "http://")
            for _ in range(20):
                with pytest.raises(VaultUnavailable, match=f"^Vault at {plain} speaks TLS") as told:
                    await read(servers, plain, TlsSettings())
                assert "write https:// in vaultAddress" in told.value.advice

    async def test_tls_where_plain_http_is_spoken(self, servers: VaultServers) -> None:
        """The opposite slip is told as such, and not as a certificate's fault."""
        with OpenBao() as bao:
            with pytest.raises(VaultUnavailable, match=r"^TLS with Vault at") as told:
                await read(servers, bao.address.replace("http://", "https://"), TlsSettings(skip_verify=True))
            assert "write http:// in vaultAddress" in told.value.advice


class TestClientCertificates:
    async def test_openbao_that_demands_one(self, servers: VaultServers, tmp_path: Path) -> None:
        """A real OpenBao that demands a client certificate answers with it, and refuses without or with another's."""
        servers_ca, clients_ca = Authority("servers"), Authority("clients")
        ca = tmp_path / "servers.crt"
        ca.write_bytes(servers_ca.pem)
        good = [str(path) for path in clients_ca.client("csi").write(tmp_path, "good")]
        other = [str(path) for path in Authority("other").client("csi").write(tmp_path, "other")]
        tls = TlsSettings(ca_cert=str(ca))
        with OpenBao(storage="inmem", certificate=servers_ca.server(), client_ca_pem=clients_ca.pem) as bao:
            health = "sys/health"
            vault = servers.get(VaultServer(bao.address, "", tls._replace(client_cert=good[0], client_key=good[1])))
            deadline = asyncio.get_running_loop().time() + 20
            answer = await vault.read(SecretRequest("GET", health), Sensitive(bao.root_token), deadline)
            assert answer.response["initialized"] is True
            for refused in (tls, tls._replace(client_cert=other[0], client_key=other[1])):
                # Under TLS 1.3 the alert comes after the handshake, and the end of the connection may overtake it.
                with pytest.raises(VaultUnavailable, match=r"TLS with Vault at .*certificate|reset by peer"):
                    await read(servers, bao.address, refused, health)

    def test_encrypted_key_asks_nobody(self, authority: Authority, ca: str, tmp_path: Path) -> None:
        """A key under a passphrase cannot be used; not even where there is a terminal is anybody asked for it."""
        client = authority.client()
        cert, key = client.write(tmp_path, "client")
        loaded = serialization.load_pem_private_key(client.key_pem, None)
        passphrase = serialization.BestAvailableEncryption(b"passphrase")
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key.write_bytes(loaded.private_bytes(pem, pkcs8, passphrase))
        program = (
            "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "from provider.settings import TlsSettings; from provider.vault.tls import make_context\n"
            f"make_context(TlsSettings(ca_cert={ca!r}, client_cert={str(cert)!r}, client_key={str(key)!r}))"
        )
        ours, terminal = os.openpty()
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
        )
        os.close(terminal)
        os.close(ours)
        assert f"cannot use the client certificate and its key at {cert} with {key}" in ended.stderr

    async def test_certificate_and_key_in_one_file(
        self, servers: VaultServers, authority: Authority, ca: str, tmp_path: Path
    ) -> None:
        """A client certificate's file may hold its key too."""
        client = authority.client("both")
        both = tmp_path / "both.pem"
        both.write_bytes(client.cert_pem + client.key_pem)
        with serving(authority.server(), authority.pem) as server:
            await read(servers, server.address, TlsSettings(ca_cert=ca, client_cert=str(both)))
            assert [seen.client for seen in server.arrivals] == ["both"]


class TestFilesOnDisk:
    async def test_replaced_ca_file_is_read_again(
        self, servers: VaultServers, authority: Authority, faulty: Faulty, ca: str, clock: HandClock
    ) -> None:
        """When Vault changes its authority and the file follows, the next reads work, without a restart."""
        tls = TlsSettings(ca_cert=ca)
        await read(servers, faulty.address, tls)
        fresh = Authority("fresh")
        faulty.stop()
        faulty.certificate = fresh.server()
        faulty.start()
        await asyncio.sleep(0.05)  # the end of the kept connection arrives
        clock.seconds += 2
        with pytest.raises(VaultUnavailable, match=r"TLS"):
            await read(servers, faulty.address, tls)
        put(Path(ca), fresh.pem)
        clock.seconds += 2
        await read(servers, faulty.address, tls)
        assert faulty.count("x") == 2

    async def test_unchanged_files_keep_the_connections(
        self, servers: VaultServers, faulty: Faulty, ca: str, clock: HandClock
    ) -> None:
        """Looking at the files costs no connection."""
        for _ in range(3):
            await read(servers, faulty.address, TlsSettings(ca_cert=ca))
            clock.seconds += 2
        assert {seen.connection for seen in faulty.arrivals} == {1}

    async def test_replaced_ca_directory_is_read_again(
        self, servers: VaultServers, faulty: Faulty, authority: Authority, tmp_path: Path, clock: HandClock
    ) -> None:
        """A file that comes into the directory counts, one that is written over or goes does not any more."""
        directory = tmp_path / "cas"
        directory.mkdir()
        (directory / "other.crt").write_bytes(Authority("other").pem)
        tls = TlsSettings(ca_directory=str(directory))
        with pytest.raises(VaultUnavailable, match=r"TLS"):
            await read(servers, faulty.address, tls)
        (directory / "ours.crt").write_bytes(authority.pem)
        clock.seconds += 2
        await read(servers, faulty.address, tls)
        (directory / "ours.crt").write_bytes(Authority("fresh").pem)
        clock.seconds += 2
        with pytest.raises(VaultUnavailable, match=r"TLS"):
            await read(servers, faulty.address, tls)
        (directory / "ours.crt").write_bytes(authority.pem)
        clock.seconds += 2
        await read(servers, faulty.address, tls)
        (directory / "ours.crt").unlink()
        clock.seconds += 2
        with pytest.raises(VaultUnavailable, match=r"TLS"):
            await read(servers, faulty.address, tls)

    async def test_replaced_client_certificate_is_read_again(
        self, servers: VaultServers, authority: Authority, ca: str, tmp_path: Path, clock: HandClock
    ) -> None:
        """A renewed client certificate is shown from then on; a read under way ends on the old connection."""
        cert, key = authority.client("first").write(tmp_path, "client")
        tls = TlsSettings(ca_cert=ca, client_cert=str(cert), client_key=str(key))
        with serving(authority.server(), authority.pem) as server:
            server.on("slow", replace(secret({"slow": "1"}), stall=0.3))
            slow = asyncio.create_task(read(servers, server.address, tls, "slow"))
            for _ in range(1000):
                if server.count("slow"):
                    break
                await asyncio.sleep(0.01)
            second = authority.client("second")
            put(key, second.key_pem)
            put(cert, second.cert_pem)
            clock.seconds += 2
            await read(servers, server.address, tls)
            assert await slow == {"slow": "1"}
            assert [seen.client for seen in server.arrivals] == ["first", "second"]

    async def test_half_written_replacement_keeps_what_worked(
        self,
        servers: VaultServers,
        authority: Authority,
        ca: str,
        tmp_path: Path,
        clock: HandClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """While the new files do not fit together the old ones go on working, with a warning; then the new count."""
        cert, key = authority.client("first").write(tmp_path, "client")
        tls = TlsSettings(ca_cert=ca, client_cert=str(cert), client_key=str(key))
        second = authority.client("second")
        with serving(authority.server(), authority.pem) as server:
            await read(servers, server.address, tls)
            for half in (second.cert_pem[:200], second.cert_pem):  # torn; whole, but with the other's key
                cert.write_bytes(half)
                clock.seconds += 2
                with caplog.at_level(logging.WARNING):
                    await read(servers, server.address, tls)
                assert "cannot be used yet" in caplog.text
                caplog.clear()
            key.write_bytes(second.key_pem)
            clock.seconds += 2
            await read(servers, server.address, tls)
            assert [seen.client for seen in server.arrivals] == ["first", "first", "first", "second"]

    @pytest.mark.parametrize("setting", ["ca_cert", "ca_directory", "client_cert", "client_key"])
    async def test_missing_file_is_named(
        self,
        servers: VaultServers,
        authority: Authority,
        faulty: Faulty,
        ca: str,
        tmp_path: Path,
        setting: str,
    ) -> None:
        """The message names the path that is missing; once it is there, the next read works."""
        cert, key = authority.client().write(tmp_path, "client")
        missing = tmp_path / "missing"
        given = {"ca_cert": ca, "client_cert": str(cert), "client_key": str(key)} | {setting: str(missing)}
        if setting == "ca_directory":
            del given["ca_cert"]
        tls = TlsSettings(**given)  # type: ignore[arg-type]  # text all of them
        with pytest.raises(VaultUnavailable) as told:
            await read(servers, faulty.address, tls)
        assert str(missing) in told.value.what
        assert "mounted into the provider's container" in told.value.advice
        assert faulty.arrivals == []
        if setting == "ca_directory":
            missing.mkdir()
            (missing / "ca.crt").write_bytes(authority.pem)
        else:
            missing.write_bytes({"ca_cert": Path(ca), "client_cert": cert, "client_key": key}[setting].read_bytes())
        assert await read(servers, faulty.address, tls) == {"a": "1"}

    @pytest.mark.parametrize("setting", ["ca_cert", "client_cert", "client_key"])
    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("pipe", "is not a regular file"),
            ("device", "is not a regular file"),
            ("directory", "is not a regular file"),
            ("endless", "is not a regular file"),
            ("large", "is larger than 1 MiB"),
        ],
    )
    async def test_what_is_no_file_holds_nobody(
        self,
        servers: VaultServers,
        authority: Authority,
        faulty: Faulty,
        ca: str,
        tmp_path: Path,
        setting: str,
        kind: str,
        reason: str,
    ) -> None:
        """A path that a class names may be anything: what cannot be read to an end is refused by its path."""
        cert, key = authority.client().write(tmp_path, "client")
        odd = tmp_path / "odd"
        match kind:
            case "pipe":
                os.mkfifo(odd)
            case "device":
                odd.symlink_to("/dev/null")
            case "directory":
                odd.mkdir()
            case "endless":
                odd.symlink_to("/dev/zero")
            case _:
                odd.touch()
                os.truncate(odd, 1024**4)
        given = {"ca_cert": ca, "client_cert": str(cert), "client_key": str(key)} | {setting: str(odd)}
        with pytest.raises(VaultUnavailable, match=rf"cannot use .*: {odd} {reason}"):
            await read(servers, faulty.address, TlsSettings(**given))  # type: ignore[arg-type]  # text all of them
        assert faulty.arrivals == []

    async def test_ca_directory_with_what_is_no_file(
        self, servers: VaultServers, faulty: Faulty, authority: Authority, tmp_path: Path
    ) -> None:
        """Pipes, devices and what is too large do not matter in a directory either."""
        directory = tmp_path / "cas"
        directory.mkdir()
        os.mkfifo(directory / "a-pipe")
        (directory / "b-device").symlink_to("/dev/zero")
        (directory / "c-large").touch()
        os.truncate(directory / "c-large", 1024**4)
        (directory / "d-ca.crt").write_bytes(authority.pem)
        assert await read(servers, faulty.address, TlsSettings(ca_directory=str(directory))) == {"a": "1"}

    async def test_directory_that_is_too_large_is_named(
        self, servers: VaultServers, faulty: Faulty, authority: Authority, tmp_path: Path
    ) -> None:
        """A directory of more than 1,000 files, or of more than 4 MiB, is refused by its path before it is all read."""
        many, large = tmp_path / "many", tmp_path / "large"
        for directory in (many, large):
            directory.mkdir()
            (directory / "z-ca.crt").write_bytes(authority.pem)
        for number in range(MAX_CA_FILES):
            (many / f"{number:04}").touch()
        for number in range(5):
            (large / f"{number:04}").write_bytes(b"x" * (MIB - 1))
        for directory, said in ((many, "more than 1000 files"), (large, "more than 4 MiB")):
            with pytest.raises(VaultUnavailable, match=rf"CA certificates at {directory}: .*{said}"):
                await read(servers, faulty.address, TlsSettings(ca_directory=str(directory)))
            (directory / "0000").unlink()
        for directory in (many, large):
            (directory / "0001").unlink()
            assert await read(servers, faulty.address, TlsSettings(ca_directory=str(directory))) == {"a": "1"}

    async def test_file_of_something_else_is_named(self, servers: VaultServers, faulty: Faulty, tmp_path: Path) -> None:
        """A CA file without a certificate is refused by its path, not taken for an empty list of authorities."""
        wrong = tmp_path / "ca.txt"
        wrong.write_text("not a certificate")
        with pytest.raises(VaultUnavailable, match=r"cannot use the CA certificates at .*ca\.txt"):
            await read(servers, faulty.address, TlsSettings(ca_cert=str(wrong)))


@dataclass
class ConnectProxy:
    """A proxy that knows CONNECT, and leads every name to one port; `refuse` is a status for all."""

    port: int
    refuse: str = ""
    targets: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            self.heads.append(head.decode())
            method, target, _ = head.decode().split(" ", 2)
            self.targets.append(target)
            if method != "CONNECT" or self.refuse:
                client.sendall(f"HTTP/1.1 {self.refuse or '405 No'}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def inside(authority: Authority) -> Iterator[Faulty]:
    """A Vault that calls itself vault.internal, which only a proxy can find."""
    with serving(authority.server(["vault.internal", THIS_MACHINE, *LOOPBACK])) as server:
        yield server


@pytest.fixture
def proxy(inside: Faulty) -> Iterator[ConnectProxy]:
    opened = ConnectProxy(inside.port)
    yield opened
    opened.close()


class TestProxies:
    @pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
    @pytest.mark.parametrize("scheme", ["http://", ""])
    async def test_https_proxy(
        self,
        servers: VaultServers,
        inside: Faulty,
        proxy: ConnectProxy,
        ca: str,
        monkeypatch: pytest.MonkeyPatch,
        variable: str,
        scheme: str,
    ) -> None:
        """HTTPS goes through the proxy by CONNECT, TLS end to end: the proxy sees the host, and no token."""
        monkeypatch.setenv(variable, scheme + proxy.place)
        tls = TlsSettings(ca_cert=ca)
        assert await read(servers, "https://vault.internal:8200", tls) == {"a": "1"}
        assert proxy.targets == ["vault.internal:8200"]
        assert TOKEN.reveal() not in proxy.heads[0]
        assert inside.arrivals[0].headers["host"] == "vault.internal:8200"

    async def test_tls_is_verified_behind_a_proxy(
        self,
        servers: VaultServers,
        inside: Faulty,
        proxy: ConnectProxy,
        ca: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """Whoever runs the proxy cannot pass for Vault: authority and name are checked as ever."""
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.place}")
        other = tmp_path / "other.crt"
        other.write_bytes(Authority("other").pem)
        for address, file in (("https://vault.internal", str(other)), ("https://vault.elsewhere", ca)):
            with pytest.raises(VaultUnavailable, match=r"TLS with Vault"):
                await read(servers, address, TlsSettings(ca_cert=file))
        assert inside.arrivals == []

    async def test_http_proxy(self, servers: VaultServers, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plain HTTP goes through HTTP_PROXY with the whole URL, as proxies want it; HTTPS_PROXY is not for it."""
        with Faulty() as server:
            server.on("x", secret({"a": "1"}))
            monkeypatch.setenv("HTTP_PROXY", server.address)
            monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
            await read(servers, "http://vault.internal:8200", TlsSettings())
            assert server.arrivals[0].path == "http://vault.internal:8200/v1/x"

    @pytest.mark.parametrize(
        ("host", "no_proxy"),
        [
            ("vault.invalid", "vault.invalid"),
            ("vault.invalid", "other.example, .invalid"),
            ("vault.invalid", "*.invalid"),
            ("vault.invalid", "INVALID"),
            ("vault.invalid", "vault.invalid:8200"),
            ("vault.invalid", "*"),
            (THIS_MACHINE, THIS_MACHINE),
            (THIS_MACHINE, f"{THIS_MACHINE}:8200"),
            (THIS_MACHINE, "10.0.0.0/8,0.0.0.0/24"),
            ("[::]", "::/32"),
            ("[::]", "::"),
            ("[::]", "[::]:8200"),
        ],
    )
    async def test_no_proxy(
        self,
        servers: VaultServers,
        proxy: ConnectProxy,
        ca: str,
        monkeypatch: pytest.MonkeyPatch,
        host: str,
        no_proxy: str,
    ) -> None:
        """Hosts, domains, addresses, networks and ports in NO_PROXY are not asked of the proxy."""
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.place}")
        monkeypatch.setenv("NO_PROXY", no_proxy)
        vault = servers.get(VaultServer(f"https://{host}:8200", "", TlsSettings(ca_cert=ca)))
        # Nobody is there directly: a name that does not resolve, and addresses of this machine that are not loopback's.
        with pytest.raises(VaultUnavailable):
            await vault.read(SecretRequest("GET", "x"), TOKEN, asyncio.get_running_loop().time())
        assert proxy.targets == []

    @pytest.mark.parametrize("host", ["vault.internal", THIS_MACHINE])
    async def test_no_proxy_of_others(
        self,
        servers: VaultServers,
        proxy: ConnectProxy,
        ca: str,
        monkeypatch: pytest.MonkeyPatch,
        host: str,
    ) -> None:
        """What NO_PROXY does not name goes through the proxy."""
        others = "other.internal,ault.internal,vault.internal:1,.vault.internal,,:8200,*.vault.internal"
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.place}")
        monkeypatch.setenv("NO_PROXY", f"{others},0.0.0.1,10.0.0.0/8,odd/8,0.0.0.0:1,::/0")
        assert await read(servers, f"https://{host}:8200", TlsSettings(ca_cert=ca)) == {"a": "1"}
        assert proxy.targets == [f"{host}:8200"]

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    async def test_loopback_is_never_proxied(
        self,
        servers: VaultServers,
        inside: Faulty,
        proxy: ConnectProxy,
        ca: str,
        monkeypatch: pytest.MonkeyPatch,
        host: str,
    ) -> None:
        """This machine itself, as a Vault Agent beside us, is not behind a proxy of the environment."""
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.place}")
        assert await read(servers, f"https://{host}:{inside.port}", TlsSettings(ca_cert=ca)) == {"a": "1"}
        assert proxy.targets == []

    async def test_vault_proxy_addr_wins(
        self, inside: Faulty, proxy: ConnectProxy, ca: str, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """VAULT_PROXY_ADDR counts before HTTPS_PROXY and NO_PROXY, for any address, as with Vault's own clients."""
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        servers = VaultServers(clock=clock, proxy=f"http://{proxy.place}")
        tls = TlsSettings(ca_cert=ca)
        await read(servers, "https://vault.internal:8200", tls)
        await read(servers, inside.address, tls)
        monkeypatch.setenv("NO_PROXY", "*")
        await read(servers, "https://vault.internal:8201", tls)
        await servers.close()
        assert proxy.targets == [
            "vault.internal:8200",
            inside.address.removeprefix("https://"),
            "vault.internal:8201",
        ]

    async def test_unix_address_is_never_proxied(self, clock: HandClock, proxy: ConnectProxy, tmp_path: Path) -> None:
        """A socket of this machine is not behind a proxy."""
        servers = VaultServers(clock=clock, proxy=f"http://{proxy.place}")
        with pytest.raises(VaultUnavailable, match=r"none\.sock is unreachable"):
            await read(servers, f"unix://{tmp_path}/none.sock", TlsSettings())
        await servers.close()
        assert proxy.targets == []

    @pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "502 Bad Gateway"])
    async def test_refusal_of_the_proxy(
        self, servers: VaultServers, proxy: ConnectProxy, ca: str, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        """A proxy that refuses was never Vault: it is named as the proxy's, and its password is not."""
        proxy.refuse = status
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:canary-password@{proxy.place}")
        with pytest.raises(VaultUnavailable, match=r"proxy") as told:
            await read(servers, "https://vault.internal:8200", TlsSettings(ca_cert=ca))
        assert 1 <= len(proxy.targets) <= 2
        assert "Proxy-Authorization" in proxy.heads[0]
        assert status[:3] in str(told.value)
        shown = "".join(traceback.format_exception(told.value)) + shown_chain(told.value)
        assert "canary-password" not in shown
        assert "dXNlcjpjYW5hcnktcGFzc3dvcmQ" not in shown  # the same in base64

    async def test_proxy_that_is_away(self, servers: VaultServers, ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy that nobody can reach is named, without its password."""
        monkeypatch.setenv("HTTPS_PROXY", "http://user:canary-password@127.0.0.1:1")
        with pytest.raises(VaultUnavailable, match=r"proxy") as told:
            await read(servers, "https://vault.internal:8200", TlsSettings(ca_cert=ca))
        assert "canary-password" not in str(told.value) + shown_chain(told.value)

    async def test_a_class_does_not_say_how_the_proxy_is_verified(
        self, inside: Faulty, authority: Authority, ca: str, clock: HandClock, tmp_path: Path
    ) -> None:
        """An https proxy is verified by the operator's settings: neither what a class skips nor whom it trusts counts.

        So nobody who answers in the proxy's place is sent its password.
        """
        heads: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        certificate, key = authority.server(("127.0.0.1",)).write(tmp_path, "proxy")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        proxy = f"https://user:canary-password@127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        # Vault itself is verified by neither, plain HTTP has no TLS of its own; the operator trusts no such authority.
        for server in ("https://vault.internal:8200", "http://vault.internal:8200"):
            for tls in (TlsSettings(skip_verify=True), TlsSettings(ca_cert=ca)):
                servers = VaultServers(clock=clock, proxy=proxy)
                with pytest.raises(VaultUnavailable, match=r"at the proxy: .*certificate"):
                    await read(servers, server, tls)
                await servers.close()
        assert heads == []
        trusting = VaultServers(clock=clock, proxy=proxy, own=VaultServer("https://vault", "", TlsSettings(ca_cert=ca)))
        with pytest.raises(VaultUnavailable, match=r"proxy"):
            await read(trusting, "https://vault.internal:8200", TlsSettings())
        await trusting.close()
        assert heads
        assert all(b"Proxy-Authorization: Basic " in head for head in heads)
        listener.close()

    @pytest.mark.parametrize("proxy_url", ["socks5://127.0.0.1:1080", "http://", "http://[", "http://h:port"])
    async def test_proxy_that_cannot_be_used(
        self, servers: VaultServers, ca: str, monkeypatch: pytest.MonkeyPatch, proxy_url: str
    ) -> None:
        """A proxy of another kind, or no address at all, is an error of ours that says so."""
        monkeypatch.setenv("HTTPS_PROXY", proxy_url)
        with pytest.raises(VaultUnavailable, match=r"proxy"):
            await read(servers, "https://vault.internal:8200", TlsSettings(ca_cert=ca))


def shown_chain(error: BaseException | None) -> str:
    """The repr of an error and of all that it came from."""
    shown = []
    while error is not None:
        shown.append(repr(error))
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


def test_no_tls_older_than_12(ca: str) -> None:
    """TLS 1.2 is the least that is spoken, with own authorities and with the system's."""
    from provider.vault.tls import make_context

    for tls in (TlsSettings(ca_cert=ca), TlsSettings(), TlsSettings(skip_verify=True)):
        assert make_context(tls).minimum_version >= ssl.TLSVersion.TLSv1_2
