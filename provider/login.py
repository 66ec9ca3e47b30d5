"""How a pod logs in to Vault: which of its tokens is sent, and what a refusal means to whoever reads it."""

from __future__ import annotations

import time
from typing import Final, Protocol

from provider.errors import KubernetesUnavailable, LoginDenied, ProviderError
from provider.redact import Sensitive, one_line
from provider.spc import MountSpec, Pod
from provider.telemetry.events import LoggedIn, Telemetry
from provider.vault import Auth, Vault

# docs/contract.md section 2: the audiences that the driver is commonly set up for, in this order, where a class
# names none.
DEFAULT_AUDIENCES = ("vault", "openbao")

# Of the audiences that the driver sent tokens for, those that an error names.
MAX_AUDIENCES_SHOWN: Final = 3


class TokenSource(Protocol):
    """Where a pod's service account token comes from when the driver sent none for the audience."""

    async def create_token(self, pod: Pod, audience: str | None) -> Sensitive[str]:
        """A TokenRequest bound to the pod; audience None is the API server's own."""
        ...


async def log_in(vault: Vault, spec: MountSpec, tokens: TokenSource, deadline: float, *, telemetry: Telemetry) -> Auth:
    """Log the pod of ``spec`` in. ``deadline`` is in the event loop's time, in seconds.

    Raises:
        LoginDenied: Vault refused.
        KubernetesUnavailable: there is no token to send.
        VaultUnavailable: no answer.
    """
    began = time.monotonic()
    try:
        auth = await _log_in(vault, spec, tokens, deadline)
    except ProviderError as error:
        telemetry.record(LoggedIn(spec, "", 0.0, time.monotonic() - began, error))
        raise
    telemetry.record(LoggedIn(spec, auth.accessor, auth.ttl, time.monotonic() - began, None, auth.request_id))
    return auth


async def _log_in(vault: Vault, spec: MountSpec, tokens: TokenSource, deadline: float) -> Auth:
    jwt, audience = await _service_account_token(spec, tokens)
    try:
        return await vault.login(spec.login, jwt, deadline)
    except LoginDenied as denied:
        login, pod = spec.login, spec.pod
        namespace = f', Vault namespace "{spec.server.namespace}"' if spec.server.namespace else ""
        raise LoginDenied(
            f'login to {spec.server.address} at auth/{login.mount} with role "{login.role}"{namespace} as service '
            f"account {pod.namespace}/{pod.service_account} ({audience}) denied: {denied.what}",
            denied.advice,
        ) from denied


async def _service_account_token(spec: MountSpec, tokens: TokenSource) -> tuple[Sensitive[str], str]:
    """The token to log in with, and how to speak of its audience (docs/contract.md section 2, ``audience``)."""
    wanted = spec.login.audience
    for audience in (wanted,) if wanted is not None else DEFAULT_AUDIENCES:
        if audience in spec.tokens:
            return spec.tokens[audience], f'audience "{audience}", token from the driver'
    said = f'audience "{wanted}"' if wanted is not None else "the API server's own audience"
    try:
        return await tokens.create_token(spec.pod, wanted), f"{said}, token from TokenRequest"
    except KubernetesUnavailable as error:
        if not spec.tokens:
            raise
        sent = ", ".join(one_line(f'"{audience}"', 100) for audience in list(spec.tokens)[:MAX_AUDIENCES_SHOWN])
        advice = (
            f"the driver sent tokens for {sent} alone: name one of these as the class's audience, or {error.advice}"
        )
        raise type(error)(error.what, advice) from error
