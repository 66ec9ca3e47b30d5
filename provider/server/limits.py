"""What one pod may ask for in a minute, so that no tenant starves the others of a node."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from provider.clock import Clock
from provider.errors import Code, ProviderError
from provider.settings import MIB, Settings

PERIOD: Final = 60.0
"""Seconds that a pod's share is for."""

# The part of it that may be spent at once. All of it at once held up the node's other pods for a second and more; this
# is as much as a class may have objects, and comes back in six seconds.
AT_ONCE: Final = 0.1
# Seconds of processor time that reading one pod's classes may take in a minute. A class of fifty objects takes some
# milliseconds, and is then kept; a hostile one takes up to a second, and is another one each time.
MAX_PARSING_SECONDS: Final = 3.0
# The same of rendering its files, besides what every usual mount takes: twenty keystores for old Java cost half a
# second, and are kept. A hostile class takes the two seconds that one mount may, and has then to wait for twenty.
MAX_RENDERING_SECONDS: Final = 6.0
# Seconds until a pod that is over its share is told so: whoever tries again at once gets no more work done by it.
REFUSAL_SECONDS: Final = 1.0
# Pods whose spending is remembered: a node has 110 by default, and each goes when its minute is over.
MAX_PODS: Final = 10_000


class PodFloods(ProviderError):
    """A pod has asked for more than its share."""

    code = Code.FAILED_PRECONDITION


class Spending(enum.IntEnum):
    """What is counted."""

    MOUNTS = 0
    OBJECTS = 1
    BYTES = 2
    PARSING = 3
    RENDERING = 4


_KINDS: Final = tuple(Spending)  # going through an enum's class costs as much as the rest of ``begin``
# In which words a refusal tells of it.
_WORDS: Final = (
    "mounts",
    "objects",
    "MiB of files",
    "seconds of reading its classes",
    "seconds of rendering its files",
)
# What was spent within this many seconds has not come back yet: a mount asks several times.
_STEP_SECONDS: Final = 0.05


class PodLimits:
    """The spending of pods, each within the same limits; a limit of 0 is none. For one thread.

    A pod may spend AT_ONCE of a minute's share, and that comes back evenly. It may go on while anything is left, and
    what a mount costs is taken when it is known, into debt if need be: a limit slows any class down, and refuses none
    for good.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._clock = clock
        self._limits: tuple[float, ...] = (
            settings.max_pod_mounts,
            settings.max_pod_objects,
            settings.max_pod_mib * MIB,
            MAX_PARSING_SECONDS,
            MAX_RENDERING_SECONDS,
        )
        # What is spent and has not come back, and since when; the pod that was seen last is at the end.
        self._spent: OrderedDict[str, tuple[float, list[float]]] = OrderedDict()

    def begin(self, pod: str) -> None:
        """Count a mount of the pod of this UID. Raises PodFloods where it has spent all of anything."""
        spent = self._of(pod)
        for spending in _KINDS:
            self._refuse_over(spending, spent)
        if self._limits[Spending.MOUNTS]:
            spent[Spending.MOUNTS] += 1

    def check(self, pod: str, spending: Spending) -> None:
        """Raise PodFloods where the pod has nothing left of this."""
        self._refuse_over(spending, self._of(pod))

    def _refuse_over(self, spending: Spending, all_spent: Sequence[float]) -> None:
        limit, spent = self._limits[spending], all_spent[spending]
        if not spent:
            return
        at_once = AT_ONCE * limit
        # Of mounts a whole one has to be left, since each costs one; the smallest limit still allows one at a time.
        if (spent > max(0.0, at_once - 1)) if spending is Spending.MOUNTS else (limit and spent >= at_once):
            raise _refusal(spending, limit)

    def spend(self, pod: str, spending: Spending, amount: float) -> None:
        """Take ``amount`` from what the pod has left, whether or not it has so much."""
        if self._limits[spending]:
            self._of(pod)[spending] += amount

    def _of(self, pod: str) -> list[float]:
        """What the pod has spent and not got back until now."""
        now = self._clock.now()
        at, spent = self._spent.get(pod, (now, [0.0] * len(_KINDS)))
        if pod in self._spent and now < at + _STEP_SECONDS:
            return spent
        back = (now - at) / PERIOD
        spent = [max(0.0, amount - limit * back) for amount, limit in zip(spent, self._limits, strict=True)]
        self._spent[pod] = now, spent
        self._spent.move_to_end(pod)
        self._forget(now)
        return spent

    def _forget(self, now: float) -> None:
        """Drop whoever was seen longest ago, if all has come back to it or there are too many."""
        while self._spent:
            pod, (at, spent) = next(iter(self._spent.items()))
            back = (now - at) / PERIOD
            owes = any(amount > limit * back for amount, limit in zip(spent, self._limits, strict=True))
            if len(self._spent) <= MAX_PODS and (owes or now == at):
                return
            del self._spent[pod]


def _refusal(spending: Spending, limit: float) -> PodFloods:
    shown = round(limit / MIB if spending is Spending.BYTES else limit)
    flag = {Spending.MOUNTS: "mounts", Spending.OBJECTS: "objects", Spending.BYTES: "mib"}.get(spending)
    return PodFloods(
        f"this pod has asked for more than its share, which is {shown} {_WORDS[spending]} in a minute",
        "mount less, or look why its volumes are mounted again and again"
        + (f"; the daemon's --max-pod-{flag}={2 * shown} would allow twice as much" if flag else ""),
    )
