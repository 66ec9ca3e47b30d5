"""What became of each volume: what it held last, and how its last mount failed.

Kubelet mounts a volume again and again, and the driver hides from the user that a re-mount failed (docs/contract.md
section 1), so somebody has to remember what the one before was. Metrics, the audit log and the status ask here.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from provider.clock import Clock
from provider.settings import MIB
from provider.spc.model import Pod
from provider.telemetry.events import Kind, Mounted, MountRefused, Telemetry

# Several times the volumes of a node's 110 pods; past it the one that was heard of least recently is forgotten, and its
# next mount counts as a first one.
MAX_VOLUMES: Final = 1000
# What the marks of all volumes take together, in bytes, each MARK_BYTES besides its name's characters: those of 50,000
# usual objects. A million, if each volume had a class of 1,000 objects, would fill the daemon's memory, and so would
# names of 4 KiB.
MAX_MARKS_BYTES: Final = 10 * MIB
MARK_BYTES: Final = 200
# Seconds after which a failure that was not repeated is no longer one that lasts: kubelet tries again within 2 minutes,
# and the driver mounts again about as often, so the pod is gone. Twice the volume's own interval where that is longer,
# as with a driver that is told to mount again once an hour.
FAILING_SECONDS: Final = 600.0
# The time between two mounts of a volume that has not shown its own: docs/contract.md section 1 has 60 to 90 s, and the
# driver may skip one.
UNSHOWN_SECONDS: Final = 210.0
# Of a volume's times between mounts: the middle of three, so that neither one that comes early nor a night's suspension
# counts for much.
REMEMBERED_GAPS: Final = 3


@dataclass(frozen=True, slots=True)
class Change:
    """What a mount that succeeded brought: ``remount`` says whether its volume had been mounted before.

    ``changed`` has the names of objects that are other than at the mount before, new or left out; none at a first one.
    """

    remount: bool
    changed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Failure:
    """How a mount failed: the gRPC code, the message that the driver was answered, and when, in the clock's time."""

    code: str
    message: str
    at: float


class Remount(NamedTuple):
    """When a pod should be mounted again, in the clock's time: ``at`` is when it is due, ``late_at`` when it is late.

    Infinite and minus infinite where its mounts fail, so that none is to be counted on.
    """

    at: float
    late_at: float


@dataclass(slots=True)
class Volume:
    """One volume. Times are the clock's, in seconds.

    ``mounted_at`` is None where no mount has succeeded, ``failure`` where none has failed: it stays after a success, as
    ``failing_since`` does not, which is when the first of the failures since the last success came. ``gaps`` are the
    latest times from a success to the mount after it. ``kinds`` counts the objects that it holds by what they are made
    of.
    """

    pod: Pod
    class_name: str
    target_path: str
    mounted_at: float | None = None
    mounts: int = 0
    failures: int = 0
    failure: Failure | None = None
    failing_since: float | None = None
    gaps: tuple[float, ...] = ()
    kinds: Mapping[Kind, int] = field(default_factory=dict)
    keyed: bool = False
    marks: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def failing_seconds(self) -> float:
        """From the first to the last of the failures since the last success: it grows by a further one alone."""
        if self.failure is None or self.failing_since is None:
            return 0.0
        return self.failure.at - self.failing_since

    @property
    def interval(self) -> float | None:
        """The time between two of its mounts, in seconds, without kubelet's retries; None while it had no re-mount."""
        return sorted(self.gaps)[len(self.gaps) // 2] if self.gaps else None

    @property
    def remount(self) -> Remount:
        """When it should be mounted again."""
        if self.mounted_at is None or self.failing_since is not None:
            return Remount(math.inf, -math.inf)
        interval = self.interval
        late = 2 * (UNSHOWN_SECONDS if interval is None else interval)
        return Remount(self.mounted_at + (interval or 0.0), self.mounted_at + late)


class Volumes:
    """The volumes of the node, at most MAX_VOLUMES of them.

    They must listen after all who ask ``change`` or ``find`` about an event, since they forget what was before.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        # The one that was heard of last is last.
        self._volumes: OrderedDict[tuple[str, str], Volume] = OrderedDict()
        self._marks = 0  # bytes of all of theirs

    def listen(self, telemetry: Telemetry) -> None:
        """Remember from now on what events say of volumes."""
        telemetry.listen(self.take, Mounted, MountRefused)

    def take(self, event: Mounted | MountRefused) -> None:
        """Remember what ``event`` says of a volume."""
        if isinstance(event, Mounted):
            self._mounted(event)
        elif event.pod is not None:
            self._refused(event, event.pod)

    def find(self, pod_uid: str, target_path: str) -> Volume | None:
        """What is known of a volume; not to be changed."""
        return self._volumes.get((pod_uid, target_path))

    def change(self, mounted: Mounted) -> Change:
        """What ``mounted`` changes, before it is taken."""
        volume = self.find(mounted.spec.pod.uid, mounted.spec.target_path)
        if volume is None or volume.mounted_at is None:
            return Change(False, frozenset())
        before, now = volume.marks, mounted.marks
        # Mostly they are equal. Where the key has come or gone meanwhile they cannot be compared.
        if volume.keyed != mounted.keyed or before == now:
            return Change(True, frozenset())
        return Change(True, frozenset(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)))

    def recent_mounts(self) -> list[Volume]:
        """Volumes that have been mounted, the latest first."""
        mounted = [volume for volume in self._volumes.values() if volume.mounted_at is not None]
        return sorted(mounted, key=lambda volume: -(volume.mounted_at or 0.0))

    def recent_errors(self) -> list[Volume]:
        """Volumes of which a mount has failed, be it mounted again by now, the latest failure first."""
        failed = [volume for volume in self._volumes.values() if volume.failure is not None]
        return sorted(failed, key=lambda volume: -volume.failure.at if volume.failure else 0.0)

    def failing(self) -> list[Volume]:
        """Volumes whose mounts fail, the latest first."""
        return [volume for volume in reversed(self._volumes.values()) if self.fails(volume)]

    def fails(self, volume: Volume) -> bool:
        """Whether its last mount failed, and so lately that another is to come: else its pod is likely gone."""
        if volume.failing_since is None or volume.failure is None:
            return False
        return self._clock.now() <= volume.failure.at + max(FAILING_SECONDS, 2 * (volume.interval or 0.0))

    def remounts(self) -> defaultdict[str, Remount]:
        """When pods should be mounted again with all of their volumes, by UID.

        A pod that is not known was mounted by an earlier process, and is due since this one began.
        """
        unknown = Remount(self._began, self._began + 2 * UNSHOWN_SECONDS)
        pods: defaultdict[str, Remount] = defaultdict(lambda: unknown)
        for volume in self._volumes.values():
            one, all_of_them = volume.remount, pods.get(volume.pod.uid)
            if all_of_them is not None:
                one = Remount(max(one.at, all_of_them.at), min(one.late_at, all_of_them.late_at))
            pods[volume.pod.uid] = one
        return pods

    def _mounted(self, event: Mounted) -> None:
        spec = event.spec
        change = self.change(event)
        volume = self._volume(spec.pod, spec.class_name, spec.target_path)
        if change.changed or not change.remount or volume.keyed != event.keyed:
            self._marks += _size(event.marks) - _size(volume.marks)
            volume.marks, volume.keyed = event.marks, event.keyed
            volume.kinds = Counter(made.kind for made in event.objects())
        now = self._clock.now()
        _show_interval(volume, now)
        volume.mounted_at = now
        volume.mounts += 1
        volume.failing_since = None
        self._forget()

    def _refused(self, event: MountRefused, pod: Pod) -> None:
        volume = self._volume(pod, event.class_name, event.target_path)
        now = self._clock.now()
        _show_interval(volume, now)
        if volume.failing_since is None:
            volume.failing_since = now
        volume.failure = Failure(event.code, event.message, now)
        volume.failures += 1
        self._forget()

    def _volume(self, pod: Pod, class_name: str, target_path: str) -> Volume:
        key = (pod.uid, target_path)
        volume = self._volumes.get(key)
        if volume is None:
            volume = self._volumes[key] = Volume(pod, class_name, target_path)
        else:
            volume.class_name = class_name
            self._volumes.move_to_end(key)
        return volume

    def _forget(self) -> None:
        while len(self._volumes) > MAX_VOLUMES or (self._marks > MAX_MARKS_BYTES and len(self._volumes) > 1):
            _, volume = self._volumes.popitem(last=False)
            self._marks -= _size(volume.marks)


def _size(marks: Mapping[str, str]) -> int:
    return sum([MARK_BYTES + len(name) for name in marks])


def _show_interval(volume: Volume, now: float) -> None:
    """A mount of ``volume`` is over. After a failure kubelet or the driver may try again early, which shows nothing."""
    if volume.mounted_at is not None and volume.failing_since is None:
        volume.gaps = (*volume.gaps[1 - REMEMBERED_GAPS :], now - volume.mounted_at)
