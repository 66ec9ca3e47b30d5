"""Watches over one Vault for all who ask it: sees that it is away, keeps them from asking, looks when it is back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeAlias
from weakref import WeakSet

from provider.clock import Clock
from provider.errors import AnswerLost, VaultUnavailable
from provider.spc import VaultServer
from provider.telemetry.events import BreakerChanged, Telemetry
from provider.turns import Turns
from provider.vault.breaker import Breaker, State
from provider.vault.failures import NotSent
from provider.vault.looks import LookQueue, Looks

_log = logging.getLogger(__name__)

# How long a mount waits for a Vault that is away before it is refused, within a second whatever else it has to do. It
# rides out what is over at the first look; and most mounts that come as Vault comes back succeed, instead of in up to
# two minutes, when kubelet asks again. Of many that come together the later ones have less of their second left.
PATIENCE_SECONDS: Final = 0.75
CROWD: Final = 16
PATIENCE_IN_A_CROWD_SECONDS: Final = 0.4
# Without any answer to anybody for this time, Vault may hang, and is looked at. Longer than it needs for anything but
# slow engines, and beside those it answers others.
SILENT_SECONDS: Final = 3.0
# What a Vault that is there needs to say so, however busy it and the network are.
LOOK_SECONDS: Final = 3.0
# Answers that may be Vault's, about one request, or those of a load balancer that has lost Vault; sealed is 503.
DOUBTED_STATUSES: Final = frozenset({501, 502, 503, 504})

Look: TypeAlias = Callable[[], Awaitable[tuple[str, str]]]
"""Asks Vault whether it is there. Gives what is wrong, "" for nothing, and what to do; raises VaultUnavailable."""


class Asker(NamedTuple):
    """For whom a request goes out. ``owner`` takes turns with others; ``reads`` are what a class asks for.

    ``mount`` tells mounts apart, and is None for what is none: that is refused at once while Vault is away, a mount
    after PATIENCE_SECONDS ``since`` the event loop's time.
    """

    owner: object = None
    mount: int | None = None
    since: float = -math.inf
    reads: bool = False


class Watch:
    """Over one Vault: an address, and how its TLS is verified; whatever the namespace.

    Looks at it wait in ``queue``, with those of others at the same place, and take part in ``looks``. ``own`` says that
    it is the daemon's own Vault.
    """

    def __init__(
        self, server: VaultServer, *, clock: Clock, telemetry: Telemetry, looks: Looks, queue: LookQueue, own: bool
    ) -> None:
        self.server = server
        self._all_looks = looks
        self._queue = queue
        self._own = own
        self.queues: WeakSet[Turns] = WeakSet()
        """Where requests wait that are to be told when Vault is away."""
        self._clock = clock
        self._telemetry = telemetry
        self._breaker = Breaker(server.address)
        self._flights: dict[int, tuple[float, Look]] = {}  # in the order in which they went out
        self._flown = 0
        self._heard_at = -math.inf
        self._listening: asyncio.TimerHandle | None = None
        self._look: Look | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._looks: set[asyncio.Task[None]] = set()
        self._change: asyncio.Future[None] | None = None
        self._waiting = 0

    @property
    def believes(self) -> bool:
        """Whether nothing speaks against asking this Vault, so that there is no need to be admitted."""
        return self._breaker.state is State.THERE

    async def admit(self, asker: Asker) -> None:
        """Let ``asker`` pass, at once where nothing is wrong. Raises VaultUnreachable while Vault is away."""
        breaker = self._breaker
        patience = 0.0
        if asker.mount is not None:
            patience = PATIENCE_SECONDS if self._waiting < CROWD else PATIENCE_IN_A_CROWD_SECONDS
        while breaker.state is not State.THERE:
            loop = asyncio.get_running_loop()
            breaker.want(loop.time())
            if breaker.state is State.AWAY:
                left = asker.since + patience - loop.time()
                if left <= 0:
                    raise breaker.refuse(asker.mount)
                await self._changed(left)
            elif breaker.in_question:
                await self._changed(LOOK_SECONDS)
            else:
                return

    def began(self, look: Look) -> int:
        """A request goes out; ``look`` is how to look at the Vault that it goes to. Gives its number."""
        loop = asyncio.get_running_loop()
        self._flown += 1
        self._flights[self._flown] = loop.time(), look
        if self._listening is None:
            self._listening = loop.call_later(SILENT_SECONDS, self._listen)
        return self._flown

    def ended(self, number: int, status: int, failure: VaultUnavailable | None) -> None:
        """The request of this number is over: with an answer of ``status``, 0 for none; ``failure`` says why."""
        _, look = self._flights.pop(number)
        if status:
            self._heard_at = asyncio.get_running_loop().time()
            if status < 500:
                if self._breaker.state is not State.THERE:
                    self._answered()
                return
        if isinstance(failure, NotSent):
            self._lost(look, *_reason(failure))
        elif isinstance(failure, AnswerLost) or status in DOUBTED_STATUSES:
            self._doubt(look)

    async def close(self) -> None:
        """Look no more; what was known is forgotten."""
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None
        looks = list(self._looks)
        self._found()
        await asyncio.gather(*looks, return_exceptions=True)

    # -- what is believed ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Doubt a Vault that has answered nobody for a while, though it was asked."""
        self._listening = None
        if not self._flights:
            return  # the next request listens again
        now = asyncio.get_running_loop().time()
        asked_at, look = next(iter(self._flights.values()))
        silent_since = max(asked_at, self._heard_at)
        if now >= silent_since + SILENT_SECONDS:
            self._doubt(look, at_once=True)
            silent_since = now
        self._listening = asyncio.get_running_loop().call_at(silent_since + SILENT_SECONDS, self._listen)

    def _doubt(self, look: Look, *, at_once: bool = False) -> None:
        self._look = look
        self._breaker.doubt(asyncio.get_running_loop().time(), self._clock.wall(), at_once=at_once)
        self._plan()

    def _lost(self, look: Look | None, reason: str, advice: str) -> None:
        self._look = look or self._look
        was = self._breaker.state
        self._breaker.lose(reason, advice, asyncio.get_running_loop().time(), self._clock.wall())
        if was is not State.AWAY:
            _log.warning(
                "Vault is unreachable, and not asked until it answers again: %s: %s",
                reason,
                advice,
                extra={"vault": self.server.address},
            )
            self._telemetry.record(BreakerChanged(self.server, True, self._heard_at > -math.inf))
            self._wake()
            for queue in self.queues:
                queue.dismiss()
        self._plan()

    def _answered(self) -> None:
        away = self._breaker.state is State.AWAY
        self._found()
        if away:
            self._queue.found()

    def _found(self, was: State | None = None) -> None:
        away, refused = (was or self._breaker.state) is State.AWAY, self._breaker.refused
        self._breaker.find()
        self._queue.leave(self._begin_look)
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        # Those that were sent while Vault was away could say so still.
        for task in self._looks:
            task.cancel()
        self._look = None
        if away:
            _log.info("Vault is asked again", extra={"vault": self.server.address, "mounts_refused": refused})
            self._telemetry.record(BreakerChanged(self.server, False, True))
        self._wake()

    def _wake(self) -> None:
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

    async def _changed(self, seconds: float) -> None:
        """Wait until something else is believed, or for so long."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        self._waiting += 1
        try:
            await asyncio.wait([self._change], timeout=seconds)
        finally:
            self._waiting -= 1

    # -- looks -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Have the next look begin when it is due."""
        due = self._breaker.next_probe()
        if self._next_look is None and due < math.inf:
            self._next_look = asyncio.get_running_loop().call_at(due, self._queue_up)

    def _queue_up(self) -> None:
        # Until it is its turn no other one is planned.
        self._queue.ask(self._begin_look, own=self._own)

    def _begin_look(self) -> bool:
        self._next_look = None
        look, was = self._look, self._breaker.state
        if look is None or not self._breaker.probe(asyncio.get_running_loop().time()):
            self._found(was)
            return False
        task = asyncio.create_task(self._take_look(look))
        ended = self._all_looks.began()
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)
        task.add_done_callback(lambda _: ended())
        self._plan()
        return True

    async def _take_look(self, look: Look) -> None:
        trouble, advice = "", ""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                trouble, advice = await look()
        except TimeoutError:
            trouble = f"it accepts connections and does not answer in {LOOK_SECONDS:g} s"
            advice = "check Vault's load and its storage; kubelet tries again by itself"
        except (NotSent, AnswerLost) as error:
            trouble, advice = _reason(error)
        except VaultUnavailable:
            pass  # TLS, or files of ours: it is there, and what is wrong is told by whoever asks
        if trouble:
            self._lost(None, trouble, advice)
        else:
            self._heard_at = asyncio.get_running_loop().time()
            self._answered()


def _reason(failure: VaultUnavailable) -> tuple[str, str]:
    """What came between, and what to do about it: the words after those on which Vault it was."""
    return failure.what.partition(": ")[2] or failure.what, failure.advice
