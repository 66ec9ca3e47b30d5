"""What is remembered of the volumes of a node."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest

from provider.settings import TlsSettings
from provider.spc import MountSpec, Pod
from provider.spc.model import Login, VaultServer
from provider.telemetry import volumes
from provider.telemetry.events import Kind, Mounted, MountedObject, MountRefused, ProgramEnded, Supply, Telemetry
from provider.telemetry.volumes import Change, Volumes

NOTHING: frozenset[str] = frozenset()


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def epoch(self) -> str:
        return "boot"

    def wall(self) -> float:
        return self.time


def pod(name: str = "web-0") -> Pod:
    return Pod("shop", name, f"uid-of-{name}", "web")


def mounted(marks: Mapping[str, str], *, name: str = "web-0", target: str = "/t", **fields: Any) -> Mounted:
    """A mount that succeeded, of objects with these marks; those whose names begin with "db" are leased."""
    server = VaultServer("https://vault.example", "", TlsSettings())
    spec = MountSpec(pod(name), "secrets", target, server, Login("kubernetes", "web", None), ())

    def objects() -> list[MountedObject]:
        kinds = [(each, Kind.LEASED if each.startswith("db") else Kind.STATIC) for each in marks]
        return [MountedObject(each, (), "", (), (), kind, Supply.READ) for each, kind in kinds]

    given: dict[str, Any] = {"seconds": 0.5, "files": len(marks), "size": 100, "keyed": True, "accessor": "a"}
    given |= {"read": len(marks), "kept": 0, "remembered": 0, "objects": objects}
    return Mounted(spec, marks=marks, **(given | fields))


def refused(*, name: str = "web-0", target: str = "/t", code: str = "NOT_FOUND", known: bool = True) -> MountRefused:
    """A mount that failed; not `known` where not even its pod could be told."""
    return MountRefused(code, "no such secret", 0.1, pod(name) if known else None, "secrets", target, None)


def test_remount_changes_what_differs() -> None:
    """A first mount is no re-mount; a later one has changed what is other, new or gone."""
    known = Volumes(Hand())
    first = mounted({"a": "1", "b": "1", "c": "1"})
    assert known.change(first) == Change(False, NOTHING)
    known.take(first)
    assert known.change(first) == Change(True, NOTHING)
    later = mounted({"a": "1", "b": "2", "d": "1"})
    assert known.change(later) == Change(True, frozenset("bcd"))
    assert known.change(mounted({"a": "2"}, target="/other")) == Change(False, NOTHING)
    known.take(later)
    assert known.change(later) == Change(True, NOTHING)


def test_marks_with_and_without_the_key_are_not_compared() -> None:
    """When the HMAC key comes after the first mounts, nothing is taken for changed; what changes later is."""
    known = Volumes(Hand())
    known.take(mounted({"a": "hash"}, keyed=False))
    assert known.change(mounted({"a": "version"})) == Change(True, NOTHING)
    known.take(mounted({"a": "version"}))
    assert known.change(mounted({"a": "next"})).changed == {"a"}


def test_volume_that_never_mounted_has_no_remount() -> None:
    """A mount that succeeds after failures is the first."""
    known = Volumes(Hand())
    known.take(refused())
    assert not known.change(mounted({"a": "1"})).remount


def test_failing_volumes_are_those_whose_last_mount_failed_lately() -> None:
    """A failure is failing until a success, or until kubelet has not tried again for long; it says since when."""
    clock = Hand()
    known = Volumes(clock)
    known.take(mounted({"a": "1"}))
    known.take(refused())
    clock.time += 50
    known.take(refused(code="PERMISSION_DENIED"))
    known.take(refused(name="other"))
    known.take(refused(name="nobody", known=False))
    other, web = known.failing()
    assert (other.pod.name, web.pod.name, web.failing_since, web.failures) == ("other", "web-0", 1000.0, 2)
    assert web.failure is not None
    assert (web.failure.code, web.failure.message, web.failure.at) == ("PERMISSION_DENIED", "no such secret", 1050.0)
    known.take(mounted({"a": "1"}))
    assert [volume.pod.name for volume in known.failing()] == ["other"]
    assert known.fails(other)
    assert not known.fails(web)
    clock.time += volumes.FAILING_SECONDS + 1
    assert known.failing() == []
    assert not known.fails(other)
    known.take(refused())
    assert known.failing()[0].failing_since == clock.time


def test_failure_lasts_by_further_failures_alone() -> None:
    """From the first failure to the last: a pod that is gone fails no longer than it did while it was there."""
    clock = Hand()
    known = Volumes(clock)
    known.take(refused())
    clock.time += 500
    (volume,) = known.failing()
    assert volume.failing_seconds == 0
    known.take(refused())
    clock.time += 500
    assert volume.failing_seconds == 500
    known.take(mounted({"a": "1"}))
    assert volume.failing_seconds == 0


def test_volume_that_is_mounted_rarely_fails_until_it_should_have_been_tried_twice() -> None:
    """With a driver that mounts again once an hour a failure lasts to the next attempt; kubelet's retries show no
    interval, nor does one night's suspension."""
    clock = Hand()
    known = Volumes(clock)
    known.take(refused())
    for gap in (5, 3600, 3600, 20_000, 3600):
        clock.time += gap
        known.take(mounted({"a": "1"}))
    clock.time += 3600
    known.take(refused())
    for _ in range(3):
        clock.time += 1
        known.take(refused())
    (volume,) = known.failing()
    assert volume.interval == 3600
    clock.time += 3700
    assert known.failing() == [volume]
    clock.time += 3600
    assert known.failing() == []


def test_when_a_pod_is_to_be_mounted_again() -> None:
    """By the intervals that its volumes have shown, the slowest's; late after twice the time of the quickest."""
    clock = Hand()
    known = Volumes(clock)
    began = clock.time
    unshown = volumes.UNSHOWN_SECONDS
    assert known.remounts()["uid-of-web-0"] == (began, began + 2 * unshown)
    clock.time += 1000
    known.take(mounted({"a": "1"}))
    known.take(mounted({"a": "1"}, target="/slow"))
    assert known.remounts()["uid-of-web-0"] == (2000.0, 2000.0 + 2 * unshown)
    for gap, target in ((60, "/t"), (60, "/slow")):
        clock.time += gap
        known.take(mounted({"a": "1"}, target=target))
    assert known.remounts()["uid-of-web-0"] == (2120.0 + 120, 2060.0 + 2 * 60)
    assert known.remounts()["uid-of-other"] == (began, began + 2 * unshown)
    known.take(refused(target="/slow"))
    assert known.remounts()["uid-of-web-0"] == (math.inf, -math.inf)


def test_latest_mounts_and_errors_come_first() -> None:
    """The lists for people have the latest first, no more than asked for, and errors that are over too."""
    clock = Hand()
    known = Volumes(clock)
    for name in ("a", "b", "c"):
        clock.time += 1
        known.take(refused(name=name))
    for name in ("b", "a"):
        clock.time += 1
        known.take(mounted({"x": "1"}, name=name))
    assert [volume.pod.name for volume in known.recent_mounts()] == ["a", "b"]
    assert [volume.pod.name for volume in known.recent_errors()][:2] == ["c", "b"]


def test_kinds_are_those_of_the_last_change() -> None:
    """A volume knows what its objects are made of; an unchanged re-mount does not ask for it again."""
    known = Volumes(Hand())
    known.take(mounted({"db": "1", "a": "1"}))

    def never() -> list[MountedObject]:
        raise AssertionError("asked for the objects of a mount that changed nothing")

    known.take(mounted({"db": "1", "a": "1"}, objects=never))
    volume = known.find("uid-of-web-0", "/t")
    assert volume is not None
    assert volume.kinds == {Kind.LEASED: 1, Kind.STATIC: 1}
    known.take(mounted({"db": "2"}))
    assert volume.kinds == {Kind.LEASED: 1}
    assert volume.mounts == 3


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes past the limit, and marks past theirs, make the ones that were heard of least recently be forgotten."""
    monkeypatch.setattr(volumes, "MAX_VOLUMES", 3)
    monkeypatch.setattr(volumes, "MAX_MARKS_BYTES", 10 * (volumes.MARK_BYTES + 1))
    known = Volumes(Hand())
    for name in ("a", "b", "c"):
        known.take(mounted({"x": "1"}, name=name))
    known.take(mounted({"x": "2"}, name="a"))
    known.take(refused(name="d"))
    assert known.find("uid-of-b", "/t") is None
    assert known.find("uid-of-a", "/t") is not None
    many = {str(number): "1" for number in range(9)}
    for name in ("e", "f"):
        known.take(mounted(many, name=name))
    assert known.find("uid-of-e", "/t") is None
    assert known.change(mounted(many, name="f")).remount
    known.take(mounted(dict.fromkeys(many | {"9": "", "10": ""}, "2"), name="f"))
    assert known.find("uid-of-f", "/t") is not None
    known.take(mounted({"x": "1"}, name="f"))
    known.take(mounted(many, name="a"))
    assert known.find("uid-of-f", "/t") is not None


def test_other_events_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Of all events those about mounts are heard, and no others."""
    known, telemetry = Volumes(Hand()), Telemetry()
    known.listen(telemetry)
    with caplog.at_level(logging.ERROR):
        telemetry.record(ProgramEnded("cpu"))
    assert caplog.messages == []
    assert known.recent_mounts() == known.recent_errors() == []
    telemetry.record(mounted({"a": "1"}))
    telemetry.record(refused(name="other"))
    assert len(known.recent_mounts()) == len(known.recent_errors()) == 1
