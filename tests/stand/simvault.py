"""A Vault on simulated time: its real HTTP protocol over a Unix socket, its tokens and leases on a World's time.

What it answers is what docs/contract.md section 3 says. Tests read its books: every request, token and lease so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.stand.simtime import World

Reply = tuple[int, dict[str, Any] | None]

# What the default policy allows, revocation of others' leases not among it.
_DEFAULT_POLICY = ("auth/token/", "sys/leases/renew", "cubbyhole/", "sys/internal/ui/mounts/")


@dataclass
class Role:
    """An auth role: what its logins give. Times are in seconds."""

    ttl: float = 3600
    max_ttl: float = 86400
    policies: tuple[str, ...] = ("app", "default")
    batch: bool = False
    num_uses: int = 0
    entity: bool = True


@dataclass
class Creds:
    """A path that issues a leased credential on each read."""

    ttl: float = 3600
    max_ttl: float = 86400
    renewable: bool = True


@dataclass(eq=False)
class Token:
    """A token that was given, and when it ended or will end."""

    id: str = field(repr=False)
    role: Role
    jwt: str = field(repr=False)
    entity: str
    created: float
    expires: float
    uses: int
    revoked: float = math.inf

    @property
    def ends(self) -> float:
        return min(self.expires, self.revoked)


@dataclass(eq=False)
class Lease:
    """A credential that was issued, and when it ended or will end: with its token at the latest."""

    id: str
    path: str
    username: str
    token: Token
    created: float
    expires: float
    max_end: float
    renewable: bool

    @property
    def ends(self) -> float:
        return min(self.expires, self.token.ends)


@dataclass(frozen=True)
class Seen:
    """A request that came in: its path without ``v1/`` and query."""

    method: str
    path: str
    token: str = field(repr=False)
    at: float


class SimVault:
    """The server. Its configuration and its books are plain attributes; a test may change both at any time."""

    def __init__(self, directory: Path, world: World) -> None:
        self.socket = directory / "vault.sock"
        self.address = f"unix://{self.socket}"
        self.roles: dict[str, Role] = {"app": Role()}
        self.creds: dict[str, Creds] = {"database/creds/app": Creds()}
        self.certificates: dict[str, float] = {"pki/issue/web": 86400}
        # What each of them reads as; "" gives each a name that is no certificate.
        self.pem = ""
        self.kv: dict[str, dict[str, Any]] = {"secret/data/app": {"data": {"password": "pass-1"}, "metadata": {}}}
        self.engines = {
            "secret/": ("kv", "2"),
            "old/": ("kv", "1"),
            "database/": ("database", ""),
            "pki/": ("pki", ""),
            "totp/": ("totp", ""),
            "cubbyhole/": ("cubbyhole", ""),
        }
        self.policies: dict[str, tuple[str, ...]] = {"app": ("secret/", "old/", "database/", "pki/", "totp/")}
        self.tells_engines = True
        self.refuses_renewal = False
        """Whether leases are at once past the maximum that they may be renewed to: 400."""
        self.cap = math.inf
        """The most seconds that a renewal of a lease grants: a maximum TTL that was lowered since."""
        self.seen: list[Seen] = []
        self.tokens: dict[str, Token] = {}
        self.leases: dict[str, Lease] = {}
        self.all_tokens: list[Token] = []
        self.all_leases: list[Lease] = []
        self.under_dead_tokens = 0
        """Requests that came under a token that was over, or never was."""
        self._world = world
        self._numbers = itertools.count(1)
        self._held: dict[str, asyncio.Event] = {}
        self._broken: dict[str, tuple[int, str]] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    # -- for tests ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve."""
        self._server = await asyncio.start_unix_server(self._serve, self.socket, backlog=1024)

    async def stop(self) -> None:
        """Be away: connections are dropped, new ones refused. Tokens and leases go on expiring."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)
        self.socket.unlink(missing_ok=True)
        self._server = None

    def lose_storage(self) -> None:
        """Forget every token and lease; the configuration is set up again."""
        now = self._world.now()
        for token in self.tokens.values():
            token.revoked = min(token.revoked, now)
        self.tokens.clear()
        self.leases.clear()

    @contextlib.contextmanager
    def hold(self, path: str) -> Any:
        """Carry out what comes for paths that begin so, and keep the answers back until the end of the block."""
        self._held[path] = asyncio.Event()
        try:
            yield
        finally:
            self._held.pop(path).set()

    def breaks(self, path: str, status: int, words: str = "broken") -> None:
        """Answer this status at paths that begin so, until ``mend``."""
        self._broken[path] = (status, words)

    def mend(self) -> None:
        """Answer as it should be again."""
        self._broken.clear()

    def count(self, path: str, method: str = "") -> int:
        """How many requests came for paths that begin so."""
        return sum(seen.path.startswith(path) and method in ("", seen.method) for seen in self.seen)

    @property
    def logins(self) -> int:
        return len(self.all_tokens)

    @property
    def issued(self) -> int:
        """Leased credentials so far."""
        return len(self.all_leases)

    def lease_of(self, username: str) -> Lease:
        return next(lease for lease in self.all_leases if lease.username == username)

    def live_tokens(self) -> list[Token]:
        return [token for token in self.all_tokens if token.ends > self._world.now()]

    def live_leases(self) -> list[Lease]:
        return [lease for lease in self.all_leases if lease.ends > self._world.now()]

    # -- what Vault does -----------------------------------------------------------------------------------------

    def _handle(self, method: str, path: str, token_id: str, body: dict[str, Any]) -> Reply:
        now = self._world.now()
        broken = next((what for prefix, what in self._broken.items() if path.startswith(prefix)), None)
        if broken is not None:
            return _error(*broken)
        if path.startswith("auth/") and path.endswith("/login"):
            return self._login(path.split("/")[1], str(body["role"]), str(body["jwt"]), now)
        token = self.tokens.get(token_id)
        if token is None or token.ends <= now:
            self.under_dead_tokens += 1
            return _error(403, "permission denied")
        # Asking for an engine is no use of a token: checked against OpenBao 2.7.
        if token.uses and not path.startswith("sys/internal/ui/mounts/"):
            token.uses -= 1
            if not token.uses:
                token.revoked = now  # this request is still answered
        if not self._allowed(token, path):
            return _error(403, "1 error occurred:\n\t* permission denied\n\n")
        if path.startswith("auth/token/"):
            return self._own(path.removeprefix("auth/token/"), token, body, now)
        if path == "sys/leases/renew":
            return self._renew(str(body["lease_id"]), float(body["increment"]), now)
        if path.startswith("sys/internal/ui/mounts/"):
            return self._engine(path.removeprefix("sys/internal/ui/mounts/"))
        return self._read(method, path, token, now)

    def _allowed(self, token: Token, path: str) -> bool:
        allowed = [prefix for policy in token.role.policies for prefix in self.policies.get(policy, ())]
        if "default" in token.role.policies:
            allowed += _DEFAULT_POLICY
        return any(path.startswith(prefix) for prefix in allowed)

    def _login(self, mount: str, name: str, jwt: str, now: float) -> Reply:
        role = self.roles.get(name)
        if role is None:
            return _error(400, f'invalid role name "{name}"')
        number = next(self._numbers)
        token = Token(
            f"{'hvb' if role.batch else 'hvs'}.token-number-{number}",
            role,
            jwt,
            f"entity-{mount}-{jwt.partition('/')[0]}" if role.entity else "",
            now,
            now + role.ttl if role.ttl else math.inf,
            role.num_uses,
        )
        self.tokens[token.id] = token
        self.all_tokens.append(token)
        return 200, {"auth": self._auth(token, role.ttl)}

    def _auth(self, token: Token, ttl: float) -> dict[str, Any]:
        return {
            "client_token": token.id,
            "accessor": "" if token.role.batch else f"accessor-{token.id[4:]}",
            "policies": list(token.role.policies),
            "token_policies": list(token.role.policies),
            "lease_duration": int(ttl),
            "renewable": not token.role.batch,
            "entity_id": token.entity,
            "token_type": "batch" if token.role.batch else "service",
            "num_uses": token.role.num_uses,
        }

    def _own(self, what: str, token: Token, body: dict[str, Any], now: float) -> Reply:
        if what == "lookup-self":
            return 200, _envelope({"id": token.id, "ttl": int(token.ends - now)})
        if token.role.batch:
            return _error(400, "batch tokens cannot be renewed or revoked")
        if what == "revoke-self":
            token.revoked = now
            return 204, None
        ttl = min(float(str(body["increment"]).rstrip("s")), token.created + token.role.max_ttl - now)
        token.expires = now + ttl
        return 200, {"auth": self._auth(token, ttl)}

    def _renew(self, lease_id: str, increment: float, now: float) -> Reply:
        lease = self.leases.get(lease_id)
        if lease is None or lease.ends <= now:
            return _error(400, "lease not found")
        if not lease.renewable:
            return _error(400, "lease is not renewable")
        if self.refuses_renewal or lease.max_end - now < 1:
            return _error(400, "past the max TTL, cannot renew")
        ttl = min(increment, lease.max_end - now, self.cap)
        lease.expires = now + ttl
        return 200, _envelope(None, lease_id=lease_id, lease_duration=int(ttl), renewable=True)

    def _engine(self, path: str) -> Reply:
        found = next((mount for mount in self.engines if path.startswith(mount)), None)
        if found is None or not self.tells_engines:
            return _error(403, "preflight capability check returned 403")
        kind, version = self.engines[found]
        return 200, _envelope({"path": found, "type": kind, "options": {"version": version} if version else None})

    def _read(self, method: str, path: str, token: Token, now: float) -> Reply:
        if path in self.creds:
            return self._issue(path, self.creds[path], token, now)
        if path in self.certificates:
            number = next(self._numbers)
            end = int(self._world.now() + CERTIFICATE_DATE + self.certificates[path])
            return 200, _envelope(
                {
                    "certificate": self.pem or f"cert-{number}",
                    "private_key": f"key-{number}",
                    "serial_number": f"{number}",
                }
                | {"expiration": end}
            )
        if path.startswith("totp/"):
            return 200, _envelope({"code": f"code-{next(self._numbers)}"})
        if path.startswith("cubbyhole/"):
            return 200, _envelope({"of": f"cubbyhole-of-{token.jwt}"})
        if path not in self.kv:
            return 404, {"errors": []}
        if self.engines["old/"][0] == "kv" and path.startswith("old/"):
            return 200, _envelope(self.kv[path], lease_duration=2764800)
        return 200, _envelope(self.kv[path])

    def _issue(self, path: str, creds: Creds, token: Token, now: float) -> Reply:
        if token.role.num_uses and not token.uses:
            return _error(400, "token had one use left, so leased credentials were immediately revoked")
        number = next(self._numbers)
        # A batch token cannot be extended, so Vault bounds by it what is issued under it.
        limit = token.expires - now if token.role.batch else math.inf
        lease = Lease(
            f"{path}/{number}",
            path,
            f"user-{number}",
            token,
            now,
            now + min(creds.ttl, limit),
            now + min(creds.max_ttl, limit),
            creds.renewable,
        )
        self.leases[lease.id] = lease
        self.all_leases.append(lease)
        return 200, _envelope(
            {"username": lease.username, "password": f"password-of-{lease.username}"},
            lease_id=lease.id,
            lease_duration=int(lease.expires - now),
            renewable=lease.renewable,
        )

    # -- HTTP --------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async for method, target, token, raw in _requests(reader):
                    path = target.partition("?")[0].removeprefix("/v1/")
                    self.seen.append(Seen(method, path, token, self._world.now()))
                    status, answer = self._handle(method, path, token, json.loads(raw) if raw else {})
                    for prefix, gate in list(self._held.items()):
                        if path.startswith(prefix):
                            await gate.wait()
                    payload = b"" if answer is None else json.dumps(answer).encode()
                    head = f"HTTP/1.1 {status} Answer\r\nContent-Type: application/json\r\n"
                    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
                    await writer.drain()
        finally:
            self._open.discard(writer)
            writer.transport.abort()


# The calendar of certificates: a node's clock starts on the same date.
CERTIFICATE_DATE = 1_700_000_000.0


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, str, str, bytes]]:
    """Method, target, token and body of each request on a connection, until it ends."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        yield method, target, headers.get("x-vault-token", ""), body


def _envelope(data: dict[str, Any] | None, **fields: object) -> dict[str, Any]:
    envelope = {"request_id": "r", "lease_id": "", "renewable": False, "lease_duration": 0, "data": data}
    return envelope | {"wrap_info": None, "warnings": None, "auth": None} | fields


def _error(status: int, *words: str) -> Reply:
    return status, {"errors": list(words)}
