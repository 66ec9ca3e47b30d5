"""hvac's seam for another HTTP client: hvac's thin calls over our transport, with retries.

hvac knows Vault's endpoints; ``hvac.adapters.Adapter`` is its documented place for another client. With methods that
are coroutines, its thin calls return awaitables. Calls that look into an answer do not work so; the ones that are used
are in ``calls.py``, and each has a test. They ask for no more than the methods that are here, so ``Adapter`` itself is
not inherited from: it brings requests, see ``calls.py``.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Collection, Hashable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeAlias

from provider.clock import Clock
from provider.errors import AnswerLost, VaultUnavailable
from provider.redact import MASK, Sensitive, one_line
from provider.vault.failures import NotSent
from provider.vault.memory import Room
from provider.vault.redirects import FOLLOWED, MAX_HOPS, NotFollowed
from provider.vault.transport import Answer, Request, Transport
from provider.vault.watch import Asker

# docs/contract.md section 3: answers after which the same request may be sent again. Not 501: what a server does not
# know how to do it does not know in a second either.
RETRIED_STATUSES: Final = frozenset({412, 429, 472, 473, 500, 502, 503, 504})
# Neither these nor any status of 500 or more is a refusal: the request timed out or came too early for the server, so
# it says nothing about the role, the token or the secret (RFC 9110 section 15.5.9, RFC 8470 section 5.2).
_TIMING_STATUSES: Final = frozenset({408, 425})
# First try and four more: over about 3 s, which a leader election often takes. After that kubelet's own retry is
# better placed, and the message in the pod's events is not kept back.
MAX_TRIES: Final = 5
FIRST_BACKOFF_SECONDS: Final = 0.2
MAX_BACKOFF_SECONDS: Final = 3.0
# Vault's own words in our messages: enough to know the fault, little enough for many objects in 4 KiB.
MAX_WORDS: Final = 400
# What is searched for texts that are to be hidden, which may be many: more than is shown. What may be the beginning of
# one at its end is dropped.
MAX_SEARCHED: Final = 64 * 1024
# Of a request's own values, which are hidden one after the other: a class may have tens of thousands.
MAX_HIDDEN: Final = 200
# Vault's refusals have one of these fields: a list of errors, or a response with nothing in it.
_REFUSALS: Final = frozenset({"errors", "data", "request_id"})
# Shorter texts are hidden by nothing: they would be found within other words, and guessed as quickly.
MIN_HIDDEN: Final = 6


Redirect: TypeAlias = Callable[[Transport, str, str], Transport]
"""The transport that a redirect leads to: from a transport, to a Location, of a path. Raises NotFollowed."""


class Refusal(Exception):
    """An HTTP status from 400 to 499 by which Vault refused, as Vault worded it. It never leaves the vault room."""

    def __init__(self, status: int, words: str, data: Mapping[str, Any] | None) -> None:
        super().__init__(status)
        self.status = status
        self.words = words
        self.data = data


class VaultAdapter:
    """One caller's view of a transport: its token, its deadline, and whether a lost answer may be asked for again.

    ``redirect`` finds where a redirect leads.

    ``deadline`` is in the event loop's time, in seconds. ``resend`` is for reads that change nothing at Vault.
    ``hidden`` are texts of the request which no error may quote, even where Vault does; the token is one of them.
    Requests take turns with those of other owners, and ``reads`` of classes more so; see ``Transport.send``. ``mount``
    is the auth or engine mount that is told of them, with a slash at its end. Requests with ``of_mount``, the hash of
    the pod's token or JWT, are part of a mount, which is known by that and by its deadline; see ``Asker``. ``room`` is
    where its answers are to be kept, and ``size`` about what the last one takes there.
    """

    def __init__(
        self,
        transport: Transport,
        token: Sensitive[str] | None,
        deadline: float,
        *,
        mount: str,
        resend: bool,
        hidden: Collection[Sensitive[str]] = (),
        owner: Hashable,
        reads: bool = False,
        of_mount: int | None = None,
        room: Room | None = None,
        redirect: Redirect,
    ) -> None:
        self.size = 0
        self._room = room
        self._transport = transport
        self._token = token
        self._deadline = deadline
        self._mount = mount
        self._resend = resend
        self._hidden = (*hidden, token) if token else tuple(hidden)
        self._owner = owner
        self._reads = reads
        self._redirect = redirect
        self._of_mount = hash((of_mount, deadline)) if of_mount is not None else None

    async def login(self, url: str, use_token: bool = True, **kwargs: Any) -> Any:
        """POST to a login endpoint; the token goes back to the caller and is not kept here."""
        return await self.request("POST", url, **kwargs)

    async def get(self, url: str, **kwargs: Any) -> Any:
        """See ``request``."""
        return await self.request("GET", url, **kwargs)

    async def post(self, url: str, **kwargs: Any) -> Any:
        """See ``request``."""
        return await self.request("POST", url, **kwargs)

    async def put(self, url: str, **kwargs: Any) -> Any:
        """See ``request``."""
        return await self.request("PUT", url, **kwargs)

    async def request(
        self, method: str, url: str, headers: Any = None, raise_exception: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Send a request, and send it again as docs/contract.md section 3 allows, within the deadline.

        Returns:
            The JSON object of the answer; an empty one for 204.

        Raises:
            Refusal: Vault refused.
            NoRoom: see ``Transport.send``.
            VaultUnavailable: no answer, or none of Vault's, or one that says nothing about the request (any status of
                500 or more), or too many retries.
        """
        body = kwargs.get("data")
        if body is None and kwargs.get("json") is not None:
            body = json.dumps(kwargs["json"]).encode()
        request = Request(
            method.upper(),
            url,
            {"X-Vault-Token": self._token.reveal()} if self._token else {},
            body,
            self._mount,
            Asker(self._owner, self._of_mount, asyncio.get_running_loop().time(), self._reads),
            self._room,
        )
        for tries in range(1, MAX_TRIES + 1):
            asked_to_wait = 0.0
            try:
                answer = await self._transport.send(request)
                if answer.status in FOLLOWED:
                    answer = await self._follow(answer, request)
            except NotSent as error:
                failure: VaultUnavailable = error
            except AnswerLost as error:
                if not self._resend:
                    raise
                failure = error
            else:
                if answer.status < 300:
                    return self._accept(answer)
                if answer.status not in RETRIED_STATUSES:
                    raise self._refusal(answer)
                failure = self._unavailable(answer)
                asked_to_wait = _retry_after(answer.header("Retry-After") or "0", self._transport.clock)
            wait = random.uniform(0, min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2**tries))
            wait = max(wait, asked_to_wait)
            if tries == MAX_TRIES or asyncio.get_running_loop().time() + wait >= self._deadline:
                raise failure
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _follow(self, answer: Answer, request: Request) -> Answer:
        """Send it on to where redirects lead that may be followed."""
        transport = self._transport
        for _ in range(MAX_HOPS):
            try:
                transport = self._redirect(transport, answer.header("Location") or "", request.path)
            except NotFollowed as refused:
                raise self._redirected(answer, str(refused)) from None
            answer = await transport.send(request)
            if answer.status not in FOLLOWED:
                return answer
        raise self._redirected(answer, f"set vaultAddress to the active node; {MAX_HOPS} redirects led here")

    def _redirected(self, answer: Answer, advice: str) -> VaultUnavailable:
        # Not its query: it repeats the request's, which may hold a secret.
        target = self._quoted((answer.header("Location") or "elsewhere").partition("?")[0], 200)
        return VaultUnavailable(
            f"Vault at {answer.address} redirects ({answer.status}) to {target}, where the token is not sent",
            self._quoted(advice, 400),
        )

    def _accept(self, answer: Answer) -> dict[str, Any]:
        if answer.body is None and answer.status != 204:
            raise self._not_vault(answer)
        self.size = answer.size
        return answer.body or {}

    def _refusal(self, answer: Answer) -> Refusal | VaultUnavailable:
        if answer.status < 400:
            return self._redirected(answer, "set vaultAddress to the active node or to a load balancer that finds it")
        if answer.status >= 500 or answer.status in _TIMING_STATUSES:
            return self._unavailable(answer)
        if answer.body is None or not answer.body.keys() & _REFUSALS:
            # A gateway's JSON is no verdict of Vault's, by which a secret would be left out, or a token given up.
            return self._not_vault(answer)
        body = answer.body
        data = body.get("data")
        return Refusal(answer.status, self._words(body), data if isinstance(data, dict) else None)

    def _unavailable(self, answer: Answer) -> VaultUnavailable:
        where = answer.address
        words = self._words(answer.body or {})
        said = f' ("{words}")' if words else ""
        if answer.status == 503 and "sealed" in words:
            return VaultUnavailable(f"Vault at {where} is sealed{said}", "unseal it; kubelet tries again by itself")
        if answer.status == 429:
            return VaultUnavailable(
                f"Vault at {where} throttles requests (429){said}",
                "raise its rate limit quota, or lower the load",
            )
        return VaultUnavailable(
            f"Vault at {where} answered {answer.status}{said}",
            "check Vault's log; kubelet tries again by itself",
        )

    def _not_vault(self, answer: Answer) -> VaultUnavailable:
        kind = self._quoted(answer.header("Content-Type") or "no content type", 80)
        if packed := answer.header("Content-Encoding"):  # it was asked not to
            kind += f", compressed by {self._quoted(packed, 20)}"
        return VaultUnavailable(
            f"what answers at {answer.address} ({answer.status}, {kind}) is not Vault's API",
            "check vaultAddress and any load balancer in front of it",
        )

    def _words(self, body: Mapping[str, Any]) -> str:
        """Vault's own words, as far as they are texts: its errors, else its warnings; one safe line, no credentials."""
        for field in ("errors", "warnings"):
            said = body.get(field)
            if isinstance(said, list) and said:
                texts, left = [], MAX_SEARCHED
                for part in said:
                    if isinstance(part, str) and left > 0:
                        # Cut first: of eight megabytes of blanks, each word would be an object.
                        texts.append(" ".join(part[:left].split()))
                        left -= len(part)
                return self._quoted("; ".join(texts), MAX_WORDS, whole=left >= 0)
        return ""

    def _quoted(self, text: str, limit: int, *, whole: bool = True) -> str:
        """What the server said as a part of one line, without what it must not repeat to others.

        ``whole`` is whether ``text`` is all of it.
        """
        if len(self._hidden) > MAX_HIDDEN:
            return "not quoted, since too many values would have to be hidden in it"
        whole = whole and len(text) <= MAX_SEARCHED
        text = text[:MAX_SEARCHED]
        hidden = {value.reveal() for value in self._hidden}
        hidden |= {" ".join(value.split()) for value in hidden}  # as its errors are quoted
        longest = 1
        for value in sorted(hidden, key=len, reverse=True):
            if len(value) >= MIN_HIDDEN:
                longest = max(longest, len(value))
                text = text.replace(value, MASK)
        # The beginning of one may be left where the text was cut.
        return one_line(text if whole else text[: 1 - longest or None], limit)


def _retry_after(text: str, clock: Clock) -> float:
    """Seconds that the server asks to wait, as a number or as an HTTP date; 0 where it does not say.

    Source: RFC 9110 section 10.2.3
    """
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - clock.wall()
        except (ValueError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)
