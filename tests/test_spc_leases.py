"""How long an answer is good for, as classes say it: ``refreshAfter``, ``renewPercent`` and ``lease``."""

from __future__ import annotations

import pytest

from provider.settings import Settings
from provider.spc import Parser
from tests.spc_classes import attributes, faults, one, parse, parse_class

OPERATORS = Settings(renew_percent=50.0, refresh_after=300.0)


def test_objects_that_say_nothing_follow_the_daemon() -> None:
    """Without the fields, and where they are null or empty, an object has the operator's settings and is kept."""
    for fields in ("", ", lease: , renewPercent: , refreshAfter: ", ', lease: ~, renewPercent: null, refreshAfter: ""'):
        (spec,) = parse(attributes("- {objectName: a, secretPath: b" + fields + "}"), settings=OPERATORS).objects
        assert (spec.fresh, spec.renew_percent, spec.refresh_after) == (False, 50.0, 300.0)


@pytest.mark.parametrize(("text", "fresh"), [("keep", False), ("fresh", True), ('"fresh"', True)])
def test_lease(text: str, fresh: bool) -> None:
    """``fresh`` asks for an issue on every mount, ``keep`` says that it is the default that is meant."""
    assert one(f"lease: {text}").fresh is fresh


@pytest.mark.parametrize(("text", "percent"), [("1", 1.0), ("99", 99.0), ("33.5", 33.5), ('"67"', 67.0)])
def test_renew_percent(text: str, percent: float) -> None:
    """A number from 1 to 99, plain or in quotes."""
    assert one(f"renewPercent: {text}").renew_percent == percent


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("2m", 120.0), ("1h30m", 5400.0), ("300ms", 0.3), ("0", 0.0)]
)
def test_refresh_after(text: str, seconds: float) -> None:
    """A duration as Go writes them, on an object and on its class."""
    assert one(f"refreshAfter: {text}").refresh_after == pytest.approx(seconds)
    assert parse_class(refreshAfter=text).objects[0].refresh_after == pytest.approx(seconds)


def test_the_nearest_refresh_after_wins() -> None:
    """An object's over its class's, a class's over the daemon's; 0 is a value and turns it off."""
    objects = "- {objectName: a, secretPath: b, refreshAfter: 0}\n- {objectName: c, secretPath: d}"
    spec = parse(attributes(objects, refreshAfter="10m"), settings=OPERATORS)
    assert [wanted.refresh_after for wanted in spec.objects] == [0.0, 600.0]
    spec = parse(attributes(objects, refreshAfter="0"), settings=OPERATORS)
    assert [wanted.refresh_after for wanted in spec.objects] == [0.0, 0.0]


def test_classes_that_differ_in_refresh_after_alone_are_not_mixed() -> None:
    """The same objects under another ``refreshAfter`` are parsed for it, although classes are kept parsed."""
    parser = Parser(Settings())
    seconds = [
        parser.parse(attributes(refreshAfter=text), "null", "/target", "420").objects[0].refresh_after
        for text in ("1m", "2m", "", "1m")
    ]
    assert seconds == [60.0, 120.0, 0.0, 60.0]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("lease: Fresh", 'lease "Fresh": is neither keep nor fresh (write fresh for what is to be issued'),
        ("lease: true", 'lease "true": is neither keep nor fresh'),
        ("lease: [fresh]", "lease: is a list (write one value)"),
        ("renewPercent: 0", 'renewPercent "0": is not a number from 1 to 99 (write a number like 67)'),
        ("renewPercent: 99.5", "is not a number from 1 to 99"),
        ("renewPercent: 100", "is not a number from 1 to 99"),
        ("renewPercent: 67%", "is not a number from 1 to 99"),
        ("renewPercent: -5", "is not a number from 1 to 99"),
        ("renewPercent: 1e1", "is not a number from 1 to 99"),
        ("refreshAfter: 5", 'refreshAfter "5": is not a duration (write a duration like 90s, 2m, 1h30m or 300ms)'),
        ("refreshAfter: -1m", "is not a duration"),
        ("refreshAfter: 1d", "is not a duration"),
    ],
)
def test_what_is_wrong_is_told_with_object_field_and_remedy(field: str, told: str) -> None:
    """A wrong value is a fault that names the object, the field, the value, and what to write."""
    (fault,) = faults("- {objectName: password, secretPath: a, " + field + "}")
    assert fault.startswith("objects[0] (password) ")
    assert told in fault


def test_a_class_with_a_wrong_refresh_after_is_refused() -> None:
    """The class's own parameter is checked as an object's is."""
    assert faults(refreshAfter="soon") == (
        'refreshAfter "soon": is not a duration (write a duration like 90s, 2m, 1h30m or 300ms)',
    )
