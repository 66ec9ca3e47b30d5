"""What is done at Vault for as long as a pod lives, and once at its end: renewals and revocations, each told."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from provider.clock import Clock
from provider.errors import ProviderError
from provider.sessions.holdings import Holdings
from provider.sessions.lifetime import Lifetime
from provider.sessions.model import HeldToken, Kept
from provider.telemetry.events import Renewal, Renewing, Revocation, Revoking, Telemetry, Who
from provider.turns import Turns
from provider.vault import LeaseGone, RenewalFailed, RenewalRefused, Renewed, Vault

_log = logging.getLogger(__name__)

# One renewal or revocation: an unanswered one is tried again, so there is no use in waiting long.
RENEWAL_SECONDS: Final = 30.0
# A token without an end, at a Vault that never answers, is not worth a task for ever.
REVOCATION_SECONDS: Final = 86400.0


class Upkeep:
    """Renews and revokes what ``holdings`` has, at ``vault``.

    Revocations of pods that are gone take ``turns``, which all sessions share. ``who`` and ``about`` say whose it is,
    to listeners and in the log.
    """

    def __init__(
        self,
        vault: Vault,
        holdings: Holdings,
        clock: Clock,
        telemetry: Telemetry,
        turns: Turns,
        who: Who,
        about: Mapping[str, object],
    ) -> None:
        self._vault = vault
        self._holdings = holdings
        self._clock = clock
        self._telemetry = telemetry
        self._turns = turns
        self._who = who
        self._about = about

    async def renew_token(self, token: HeldToken) -> None:
        """Renew it if it is due."""
        sure = "default" in token.auth.policies
        await self._renew(token.life, token, self._vault.renew_token, sure=sure)

    async def renew_lease(self, kept: Kept) -> None:
        """Renew its lease if it is due."""
        ask = self._vault.renew_lease
        await self._renew(kept.life, kept.token, ask, kept.secret.lease_id, path=kept.request.path)

    async def revoke_once(self, token: HeldToken, why: str) -> None:
        """Try to; where Vault does not answer, the next login tries again, and so does the pod's end."""
        try:
            await self._revoke(token, why)
        except RenewalRefused:
            token.dead = True  # nobody can, so that it is left to expire
        except (ProviderError, TimeoutError):
            pass
        else:
            token.dead = True

    async def revoke_surely(self, token: HeldToken) -> None:
        """Revoke a token whose pod is gone; what fails is tried again until its expiry, REVOCATION_SECONDS at most."""
        wait = 1.0
        # Whoever has to revoke it by hand, after a restart too, has its name here alone.
        about = {**self._about, "accessor": token.auth.accessor}
        until = self._clock.now() + REVOCATION_SECONDS
        while token.usable(self._clock.now()) and self._clock.now() < until:
            try:
                await self._turns.take(self._vault.server)
                try:
                    await self._revoke(token, "pod gone")
                finally:
                    self._turns.give(self._vault.server)
            except RenewalRefused as refused:
                _log.warning("a token cannot be revoked and is left to expire: %s", refused, extra=about)
                return
            except (ProviderError, TimeoutError) as error:
                _log.warning("revocation failed, trying again: %s", error, extra=about)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(60.0, wait * 2)
            else:
                token.dead = True
                _log.info("revoked the token of a pod that is gone", extra=about)

    async def _renew(
        self,
        life: Lifetime,
        token: HeldToken,
        ask: Callable[..., Coroutine[Any, Any, Renewed]],
        *lease_id: str,
        path: str = "auth/token",
        sure: bool = True,
    ) -> None:
        """Renew one life. ``sure`` says that who is told it is gone can believe it: a 403 may be for want of policy."""
        began = self._clock.now()
        if life.renew_at > began:
            return
        ttl, reason, request_id = 0.0, "", ""
        about = {**self._about, "path": path}
        self._holdings.changed = True
        try:
            async with asyncio.timeout(RENEWAL_SECONDS):
                renewed = await ask(token.auth.token, *lease_id, life.granted, self._soon())
        except LeaseGone as gone:
            outcome, reason = Renewing.GONE, str(gone)
            if not sure:
                life.refused()
            elif lease_id or not await self._lives(token):
                life.gone(self._clock.now())
            else:
                # The auth method may look at the pod's token again and not be able to just now: OpenBao's kubernetes
                # method answers so while the API server is away. A re-mount could not log in either.
                outcome = self._not_now(life)
            if outcome is Renewing.UNANSWERED:
                _log.warning("Vault renews the token not now, though it lives; trying again: %s", gone, extra=about)
            else:
                _log.warning("%s; the next re-mount brings a new one", gone, extra=about)
        except RenewalFailed as failed:
            outcome, reason = self._not_now(life), str(failed)
            _log.warning("not renewed: %s", failed, extra=about)
        except RenewalRefused as refused:
            outcome, reason = Renewing.REFUSED, str(refused)
            life.refused()
            _log.info("not renewed any further: %s; the next re-mount brings a new one", refused, extra=about)
        except (ProviderError, TimeoutError) as error:
            outcome, reason = Renewing.UNANSWERED, str(error)
            life.unanswered(self._clock.now(), random.random())
            _log.warning("renewal unanswered, trying again: %s", error, extra=about)
        except Exception:  # noqa: BLE001  # a bug must not leave it due for ever: the loop would do nothing else
            outcome, reason = Renewing.UNANSWERED, "internal error"
            life.unanswered(self._clock.now(), random.random())
            _log.exception("renewal failed on a bug, trying again", extra=about)
        else:
            outcome, ttl, request_id = Renewing.RENEWED, renewed.ttl, renewed.request_id
            self._holdings.renewed(life, began, ttl)
            _log.debug("renewed", extra=about | {"ttl_seconds": ttl})
        self._telemetry.record(
            Renewal(
                self._who,
                path,
                token.auth.accessor,
                "".join(lease_id),
                outcome,
                ttl,
                self._clock.now() - began,
                reason,
                request_id,
            )
        )

    def _not_now(self, life: Lifetime) -> Renewing:
        """Have it tried again while a re-mount could still bring another one in time; then leave it to that."""
        now = self._clock.now()
        if life.expires_at - now > self._holdings.notice():
            life.unanswered(now, random.random())
            return Renewing.UNANSWERED
        life.refused()
        return Renewing.REFUSED

    async def _lives(self, token: HeldToken) -> bool:
        """Whether Vault knows a token that it would not renew; where nobody can say, it is not given up."""
        try:
            async with asyncio.timeout(RENEWAL_SECONDS):
                return await self._vault.token_lives(token.auth.token, self._soon())
        except (ProviderError, TimeoutError):
            return True

    async def _revoke(self, token: HeldToken, why: str) -> None:
        began = self._clock.now()
        outcome, reason = Revoking.REVOKED, ""
        try:
            async with asyncio.timeout(RENEWAL_SECONDS):
                await self._vault.revoke_token(
                    token.auth.token, self._soon(), may_lookup="default" in token.auth.policies
                )
        except RenewalRefused as refused:
            outcome, reason = Revoking.REFUSED, str(refused)
            raise
        except (ProviderError, TimeoutError) as error:
            outcome, reason = Revoking.UNANSWERED, str(error)
            raise
        finally:
            self._telemetry.record(
                Revocation(self._who, token.auth.accessor, outcome, why, reason, self._clock.now() - began)
            )

    def _soon(self) -> float:
        return asyncio.get_running_loop().time() + RENEWAL_SECONDS
