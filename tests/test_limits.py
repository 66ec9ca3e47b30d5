"""Limits of docs/security.md that are reached here, since no other test of the part that keeps them does."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider.errors import InvalidClass
from provider.server.server import MAX_REQUEST_BYTES
from provider.settings import MIB
from provider.v1alpha1 import service_pb2 as pb
from tests.spc_classes import parse_class
from tests.test_server import PASSWORD, Mounting, refusal, serving


@pytest.mark.parametrize(("size", "code"), [(-MIB, "INVALID_ARGUMENT"), (MIB, "RESOURCE_EXHAUSTED")])
async def test_a_request_of_the_driver_is_bounded(tmp_path: Path, size: int, code: str) -> None:
    """What comes through the socket is read up to the limit; over it gRPC refuses it unread."""
    request = pb.MountRequest(attributes=" " * (MAX_REQUEST_BYTES + size), permission="420")
    async with serving(tmp_path / "s", Mounting(PASSWORD)) as stub:
        found, _ = await refusal(stub.Mount(request))
    # What is still being sent when it is refused may be cut off instead.
    assert found.name == code or (size > 0 and found.name == "UNAVAILABLE")


def test_a_duration_is_bounded() -> None:
    """The text of a duration has 64 characters at most, whatever it comes to."""
    assert parse_class(refreshAfter="1s" * 32).objects[0].refresh_after == 32
    with pytest.raises(InvalidClass, match="is not a duration"):
        parse_class(refreshAfter="1s" * 33)
