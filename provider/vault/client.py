"""What the provider asks of a Vault, in its own types and its own errors."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlencode

from provider.errors import (
    AccessDenied,
    LoginDenied,
    ProviderError,
    RequestRefused,
    SecretNotFound,
    VaultUnavailable,
)
from provider.redact import Sensitive
from provider.spc import Login, SecretRequest, VaultServer
from provider.vault.adapter import Redirect, Refusal, VaultAdapter
from provider.vault.memory import Room
from provider.vault.transport import Transport

# What may stand unescaped in a path (RFC 3986 pchar and "/"). A percent sign is literal text in a class.
_PATH_SAFE: Final = "/-._~!$&'()*+,;=:@"
# Any response of Vault's has one of these, 204 aside; a gateway's page of JSON has none.
_RESPONSE: Final = frozenset({"request_id", "lease_id", "data", "auth", "wrap_info"})
_HEADER_TEXT: Final = re.compile(r"[!-~]+")
# A mount's path, type and version are kept for every mount that classes name: no longer than any is.
MAX_MOUNT_TEXT: Final = 512
# Of an id of Vault's: an accessor's, an entity's, a request's. They have some 40 characters; what is longer is none.
MAX_ID: Final = 64
# Of a token: a batch token with much in it has some KiB. And of the names of its policies, all together. Both are kept
# for each session.
MAX_TOKEN: Final = 8 * 1024
MAX_POLICIES_TEXT: Final = 16 * 1024

# What is told of the requests that are not a class's own.
_TOKENS: Final = "auth/token/"
_SYSTEM: Final = "sys/"


@dataclass(frozen=True, slots=True)
class Auth:
    """What a login gave. ``ttl`` is in seconds, 0 for a token without end; ``num_uses`` 0 means without limit.

    ``request_id`` is as VaultSecret's. It is of the login, not of the token, and nobody keeps it.
    """

    token: Sensitive[str]
    accessor: str
    ttl: float
    renewable: bool
    entity_id: str
    policies: tuple[str, ...]
    num_uses: int
    request_id: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a renewal gave: a life of ``ttl`` seconds from now. ``request_id`` is as VaultSecret's."""

    ttl: float
    request_id: str


@dataclass(frozen=True, slots=True)
class VaultSecret:
    """Vault's answer to a SecretRequest. ``response`` is the whole JSON object; durations are in seconds.

    ``size`` is about how many bytes it takes in memory, 0 where that was not looked at.
    """

    response: Mapping[str, Any] = field(repr=False)
    lease_id: str = ""
    lease_duration: float = 0.0
    renewable: bool = False
    size: int = field(default=0, compare=False)

    @property
    def leased(self) -> bool:
        """Whether it is *leased* (docs/contract.md section 3)."""
        return bool(self.lease_id)

    @property
    def request_id(self) -> str:
        """Vault's name for the request that gave this answer, by which its audit log knows it; "" where it has none."""
        return _request_id(self.response)

    @property
    def certificate_end(self) -> float | None:
        """Unix seconds at which an *issued* certificate ends, by the shape of the answer alone; None otherwise.

        docs/contract.md section 3: the caller must know that the mount is not ``kv`` before it believes this.
        """
        data = self.response.get("data")
        if not isinstance(data, dict) or not {"serial_number", "certificate"} <= data.keys():
            return None
        return _seconds(data.get("expiration")) or None


@dataclass(frozen=True, slots=True)
class EngineMount:
    """A secrets engine as ``sys/internal/ui/mounts/<path>`` describes it. ``path`` ends with a slash."""

    path: str
    kind: str
    version: str


class LeaseGone(ProviderError):
    """What was to be renewed exists no more at Vault."""


class RenewalFailed(ProviderError):
    """The engine could not renew it just now, or will not any more: it does not say which."""


class RenewalRefused(ProviderError):
    """Vault will not renew it any further; it lives until the end that it has."""


def import_calls() -> None:
    """Import hvac, so that no mount has to wait for it; takes a tenth of a second, so for a thread."""
    from provider.vault import calls  # noqa: F401


class Vault:
    """One Vault server, in one namespace, as ``owner`` asks it: a pod, or None for whoever has each token or JWT.

    ``deadline`` is everywhere in the event loop's time, in seconds.
    """

    __slots__ = ("_owner", "_redirect", "server", "transport", "watch")

    def __init__(self, transport: Transport, redirect: Redirect, owner: Hashable = None) -> None:
        self.transport = transport
        self._redirect = redirect
        self._owner = owner
        self.server = transport.server
        self.watch = transport.watch

    def expect(self, reads: int) -> None:
        """So many reads are to follow a login that is about to be asked for."""
        self.transport.expect(reads)

    async def login(self, login: Login, jwt: Sensitive[str], deadline: float) -> Auth:
        """Log in by the kubernetes or the jwt method, which take the same request (docs/contract.md section 3).

        Raises:
            LoginDenied: Vault refused; ``what`` holds its words, and the caller adds who tried.
            VaultUnavailable: no answer, or none of Vault's.
        """
        from provider.vault.calls import Kubernetes

        adapter = self._adapter(
            None, deadline, mount=f"auth/{login.mount}/", resend=False, hidden=(jwt,), of_mount=hash(jwt), by=jwt
        )
        try:
            answer = await Kubernetes(adapter).login(login.role, jwt.reveal(), use_token=False, mount_point=login.mount)
        except Refusal as refusal:
            said = f"Vault answered {refusal.status}: {refusal.words or 'permission denied'}"
            raise LoginDenied(said, _login_advice(login, self.server, refusal)) from refusal
        auth = answer.get("auth")
        token = _text(auth.get("client_token")) if isinstance(auth, dict) else ""
        if not isinstance(auth, dict) or not token:
            raise LoginDenied(
                "Vault's answer holds no token", "see whether a second factor (MFA) is enforced on the mount"
            )
        if _is_of_the_certificate(auth):
            await self._revoke_foreign(Sensitive(token), deadline)
            raise LoginDenied(
                f"auth mount {login.mount}/ is of the cert method: it logs in the provider's own client certificate, "
                "and not the pod",
                "name a mount of the kubernetes or jwt method in vaultAuthMountPath",
            )
        if not _HEADER_TEXT.fullmatch(token) or len(token) > MAX_TOKEN:
            raise LoginDenied(
                "the token in Vault's answer is not printable ASCII, or too long, so it cannot be sent in a header",
                "see what stands at vaultAddress: no Vault gives such tokens",
            )
        policies = _policies(auth)
        if sum(map(len, policies)) + len(policies) > MAX_POLICIES_TEXT:
            raise LoginDenied(
                f"the policies of the token come to more than {MAX_POLICIES_TEXT // 1024} KiB of names",
                "see what stands at vaultAddress, or give the role fewer policies",
            )
        return Auth(
            token=Sensitive(token),
            accessor=_short(auth.get("accessor")),
            ttl=_seconds(auth.get("lease_duration")),
            renewable=bool(auth.get("renewable")),
            entity_id=_short(auth.get("entity_id")),
            policies=policies,
            num_uses=int(_seconds(auth.get("num_uses"))),
            request_id=_request_id(answer),
        )

    async def read(
        self,
        request: SecretRequest,
        token: Sensitive[str],
        deadline: float,
        *,
        mount: str = "",
        resend: bool = False,
        room: Room | None = None,
    ) -> VaultSecret:
        """Send a class's request and return the answer. ``mount`` is its engine's path, where that is known.

        ``room`` is where the caller is going to keep the answer: a large one that it has no place for is not parsed.

        ``resend`` says that it is known to issue nothing, so that it may be sent again where its answer was lost.

        The owner's reads take turns with those of others (``Transport.send``).

        Raises:
            AccessDenied: 403; the token is dead, or its policies do not allow the request.
            SecretNotFound: 404.
            RequestRefused: another refusal (400, 405).
            NoRoom: see ``Transport.send``.
            VaultUnavailable: no answer, or none of Vault's.
        """
        adapter = VaultAdapter(
            self.transport,
            token,
            deadline,
            mount=mount or mount_of(request.path),
            resend=resend,
            hidden=_values(request) if request.body is not None or request.query else (),
            owner=self._owner_of(token),
            reads=True,
            of_mount=hash(token),
            room=room,
            redirect=self._redirect,
        )
        url = "/v1/" + quote(request.path, safe=_PATH_SAFE)
        if request.query:
            url += "?" + urlencode(request.query)
        body = request.body.reveal().encode() if request.body is not None else None
        answer: dict[str, Any] = {}
        try:
            answer = await adapter.request(request.method, url, data=body)
            await self._refuse_unfit(request, answer, deadline)
        except Refusal as refusal:
            error = _read_error(request, refusal)
        except ProviderError as failure:
            error = failure
        else:
            return VaultSecret(
                response=answer,
                lease_id=_text(answer.get("lease_id")),
                lease_duration=_seconds(answer.get("lease_duration")),
                renewable=bool(answer.get("renewable")),
                size=adapter.size,
            )
        del answer  # errors are kept until their mount ends
        try:
            raise error.alone()
        finally:
            del error

    async def _refuse_unfit(self, request: SecretRequest, answer: Mapping[str, Any], deadline: float) -> None:
        """Raise VaultUnavailable for what is no response of Vault's, RequestRefused for what is no pod's."""
        # What is below sys/ answers in shapes of its own (sys/health), and has no secrets.
        if answer and not answer.keys() & _RESPONSE and not request.path.startswith("sys/"):
            raise self._no_response(request)
        auth = answer.get("auth")
        if isinstance(auth, dict) and _is_of_the_certificate(auth):
            await self._revoke_foreign(Sensitive(_text(auth.get("client_token"))), deadline)
            raise RequestRefused(
                f"{request} is a login of the provider's own client certificate, which is no pod's",
                "log in by roleName and vaultAuthMountPath, as the pod",
            )

    async def renew_token(self, token: Sensitive[str], increment: float, deadline: float) -> Renewed:
        """Ask for ``increment`` more seconds of life.

        Raises LeaseGone (403: the token is dead), RenewalRefused, VaultUnavailable.
        """
        from provider.vault.calls import Token

        adapter = self._adapter(token, deadline, mount=_TOKENS, resend=True)
        try:
            answer = await Token(adapter).renew_self(increment=f"{int(increment)}s")
        except Refusal as refusal:
            if refusal.status == 403:
                raise LeaseGone(f"the token is gone: {refusal.words}") from refusal
            raise RenewalRefused(f"Vault answered {refusal.status}: {refusal.words}") from refusal
        auth = answer.get("auth")
        return Renewed(self._ttl(auth if isinstance(auth, dict) else {}), _request_id(answer))

    async def renew_lease(self, token: Sensitive[str], lease_id: str, increment: float, deadline: float) -> Renewed:
        """Ask for ``increment`` more seconds of a lease's life.

        Raises LeaseGone (no such lease), RenewalRefused (a live one at its limit, or no permission), RenewalFailed
        (its engine has an error), VaultUnavailable.
        """
        from provider.vault.calls import Lease

        adapter = self._adapter(token, deadline, mount=_SYSTEM, resend=True)
        try:
            answer = await Lease(adapter).renew_lease(lease_id, increment=int(increment))
        except Refusal as refusal:
            if refusal.status == 400 and "lease not found" in refusal.words:
                raise LeaseGone(f"the lease is gone: {refusal.words}") from refusal
            if refusal.status == 400 and "failed to renew entry" in refusal.words and "max TTL" not in refusal.words:
                raise RenewalFailed(f"Vault could not renew it: {refusal.words}", "see Vault's log") from refusal
            raise RenewalRefused(f"Vault answered {refusal.status}: {refusal.words}") from refusal
        if not answer:
            raise RenewalRefused("Vault renewed nothing")
        return Renewed(self._ttl(answer), _request_id(answer))

    def _ttl(self, renewed: Mapping[str, Any]) -> float:
        """What a renewal gave, in seconds. Raises VaultUnavailable where it does not say: nothing has ended by that."""
        said = renewed.get("lease_duration")
        if isinstance(said, bool) or not isinstance(said, int | float) or not 0 <= said < 1e12:
            raise self._no_response("a renewal")
        return float(said)

    def _no_response(self, request: object) -> VaultUnavailable:
        return VaultUnavailable(
            f"what answered {request} at {self.server.address} has none of the fields of Vault's responses",
            "check vaultAddress and any gateway in front of it",
        )

    async def revoke_token(self, token: Sensitive[str], deadline: float, *, may_lookup: bool = True) -> None:
        """Revoke the token and every lease under it; a token that is gone already is no error.

        ``may_lookup`` says that its policies allow what ``default`` allows, so that a 403 means that it is gone.

        Raises RenewalRefused (a batch token cannot be revoked, nor one that may not revoke itself), VaultUnavailable.
        """
        from provider.vault.calls import Token

        adapter = self._adapter(token, deadline, mount=_TOKENS, resend=True)
        try:
            answer = await Token(adapter).revoke_self()
            if answer and not answer.keys() & _RESPONSE:
                raise self._no_response("a revocation")
        except Refusal as refusal:
            if refusal.status != 403:
                raise RenewalRefused(f"Vault answered {refusal.status}: {refusal.words}") from refusal
            if not may_lookup:
                raise RenewalRefused("the token may not revoke itself; its role lacks the default policy") from refusal

    async def _revoke_foreign(self, token: Sensitive[str], deadline: float) -> None:
        """Revoke a token that nobody here is to have. Where that fails it is left to end."""
        if _HEADER_TEXT.fullmatch(token.reveal()):
            with contextlib.suppress(ProviderError):
                await self.revoke_token(token, deadline)

    async def token_lives(self, token: Sensitive[str], deadline: float) -> bool:
        """Whether ``lookup-self`` knows the token. Raises VaultUnavailable where nobody could say."""
        from provider.vault.calls import Token

        adapter = self._adapter(token, deadline, mount=_TOKENS, resend=True)
        try:
            await Token(adapter).lookup_self()
        except Refusal:
            return False
        return True

    async def engine_of(self, path: str, token: Sensitive[str], deadline: float) -> EngineMount | None:
        """The secrets engine that serves ``path``, or None where this token may not know (any refusal).

        None too for an answer that cannot be about ``path``: it is remembered, and other paths are judged by it.

        Raises VaultUnavailable.
        """
        adapter = self._adapter(token, deadline, mount=_SYSTEM, resend=True)
        try:
            answer = await adapter.request("GET", "/v1/sys/internal/ui/mounts/" + quote(path, safe=_PATH_SAFE))
        except Refusal:
            return None
        data = answer.get("data")
        if not isinstance(data, dict):
            return None
        options = data.get("options")
        mount = data.get("path")
        kind = data.get("type") or ""
        version = (options.get("version") if isinstance(options, dict) else None) or ""
        if not all(isinstance(text, str) and len(text) <= MAX_MOUNT_TEXT for text in (mount, kind, version)):
            return None
        return EngineMount(mount, kind, version) if mount and path.startswith(mount) else None

    def _owner_of(self, credential: Sensitive[str] | None) -> Hashable:
        return hash(credential) if self._owner is None else self._owner

    def _adapter(
        self,
        token: Sensitive[str] | None,
        deadline: float,
        *,
        mount: str,
        resend: bool,
        hidden: Collection[Sensitive[str]] = (),
        of_mount: int | None = None,
        by: Sensitive[str] | None = None,
    ) -> VaultAdapter:
        return VaultAdapter(
            self.transport,
            token,
            deadline,
            mount=mount,
            resend=resend,
            hidden=hidden,
            owner=self._owner_of(by or token),
            of_mount=of_mount,
            redirect=self._redirect,
        )


def _policies(auth: dict[str, Any]) -> tuple[str, ...]:
    """The names of a token's policies, in one order; none where there is no list of them."""
    named = auth.get("policies") or auth.get("token_policies")
    return tuple(sorted(name for name in named if isinstance(name, str))) if isinstance(named, list) else ()


def mount_of(path: str) -> str:
    """As much of the mount that serves ``path`` as the path alone tells, with a slash: never a secret's name.

    Where it has several elements that is the first of them, and for an auth mount the first two.
    """
    first, _, rest = path.partition("/")
    mount = f"auth/{rest.partition('/')[0]}/" if first == "auth" else f"{first}/"
    return mount if len(mount) <= MAX_MOUNT_TEXT else ""


def _login_advice(login: Login, server: VaultServer, refusal: Refusal) -> str:
    """What to do about a login that was refused (docs/contract.md section 3)."""
    if refusal.status == 404:
        namespace = f' and Vault namespace "{server.namespace}" exist' if server.namespace else " exists"
        return f"check that auth mount {login.mount}/{namespace}, and that vaultAddress ends before the API's /v1"
    advice = (
        f"check that auth mount {login.mount}/ exists, that the role exists there, and that its bound service account, "
        "its namespace in Kubernetes and its audience are these"
    )
    if refusal.status == 403 and "permission denied" in refusal.words:
        advice += "; Vault answers 403 too where its TokenReview fails, as while it is sealed or changes its leader"
    return advice


def _read_error(request: SecretRequest, refusal: Refusal) -> ProviderError:
    said = f' ("{refusal.words}")' if refusal.words else ""
    if refusal.status == 403:
        return AccessDenied(f"Vault denied {request}{said}")
    if refusal.status == 404:
        metadata = (refusal.data or {}).get("metadata")
        if isinstance(metadata, dict) and (metadata.get("deletion_time") or metadata.get("destroyed")):
            return SecretNotFound(
                f"the current version of {request.path} is deleted or destroyed",
                "undelete it, or write a new version",
            )
        return SecretNotFound(f"Vault has nothing at {request.shown}{said}")
    return RequestRefused(
        f"Vault refused {request} with {refusal.status}{said}", "check secretPath, method and secretArgs"
    )


def _values(request: SecretRequest) -> list[Sensitive[str]]:
    """The texts and numbers of a request's query and body, any of which may be a secret."""
    found = [Sensitive(value) for _, value in request.query]
    left: list[object] = [json.loads(request.body.reveal())] if request.body is not None else []
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif not isinstance(value, bool | None):
            found.append(Sensitive(str(value)))
    return found


def _is_of_the_certificate(auth: Mapping[str, Any]) -> bool:
    """Whether it is what the cert method gave: for the client certificate of the connection, and so for the provider's.

    That method asks for neither role nor JWT. Source: https://openbao.org/docs/auth/cert/
    """
    metadata = auth.get("metadata")
    return isinstance(metadata, dict) and "cert_name" in metadata


def _request_id(answer: Mapping[str, Any]) -> str:
    return _short(answer.get("request_id"))


def _short(value: object) -> str:
    """An id of Vault's; what is longer than any of its ids counts as none."""
    return value if isinstance(value, str) and len(value) <= MAX_ID else ""


def _text(value: object) -> str:
    """A text of Vault's; whatever else it may be counts as none."""
    return value if isinstance(value, str) else ""


def _seconds(value: object) -> float:
    """A number of Vault's as it should be; whatever else it may be counts as 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12:
        return float(value)
    return 0.0
