"""Fields of Vault's answers that hold other JSON than they should: a typed error, or as if they were not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.hostile import CANARY, Ended, Hostile, judge, vault
from tests.stand.faulty import Answer, Arrival

OBJECT = "- {objectName: a, secretPath: secret/data/x, secretKey: password}"
# Python's parser takes most of them, and `str` of what comes of it raises RecursionError.
DEPTHS = range(900, 996, 8)
# So much more in an answer, and it is parsed where the stack is nearly empty.
SIZES = (0, 300_000)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    with Hostile(tmp_path_factory.mktemp("nested")) as parts:
        yield parts


def parsed_answers(hostile: Hostile, reply: Callable[[str, Arrival], Answer]) -> list[Ended]:
    """How mounts end while ``reply`` has nested lists in an answer; those that Python's own parser finds too deep, and
    so no JSON, are left out.
    """
    ended = []
    for size in SIZES:
        for depth in DEPTHS:
            # White space, which is JSON everywhere.
            hostile.vault.reply = partial(reply, " " * size + "[" * depth + "]" * depth)
            ended.append(judge(hostile.mount("nested", OBJECT)))
    parsed = [one for one in ended if "is not Vault's API" not in one.message]
    assert len(parsed) > len(DEPTHS)
    return parsed


@pytest.mark.parametrize(
    ("status", "body", "code", "told"),
    [
        (400, '{"errors": [%s]}', "FAILED_PRECONDITION", "Vault refused GET secret/data/x with 400"),
        (403, '{"errors": ["no", %s]}', "PERMISSION_DENIED", 'Vault denied GET secret/data/x ("no")'),
        (404, '{"errors": [], "warnings": [%s]}', "NOT_FOUND", "Vault has nothing at secret/data/x"),
        (200, '{"lease_id": %s, "data": {"data": {"password": "x"}, "metadata": {}}}', "OK", ""),
        (200, '{"request_id": %s, "data": {"data": {"password": "x"}, "metadata": {}}}', "OK", ""),
        (200, '{"lease_duration": %s, "data": {"data": {"password": "x"}, "metadata": {}}}', "OK", ""),
    ],
    ids=["errors", "some errors", "warnings", "lease", "request", "duration"],
)
def test_fields_of_an_answer_are_what_they_should_be(
    hostile: Hostile, status: int, body: str, code: str, told: str
) -> None:
    """However deep what is there instead is nested."""

    def reply(inner: str, arrival: Arrival) -> Answer:
        read = arrival.path == "/v1/secret/data/x"
        return Answer(status, (body % inner).encode()) if read else vault(arrival)

    parsed = parsed_answers(hostile, reply)
    assert {one.code for one in parsed} == {code}
    assert all(told in one.message for one in parsed)


@pytest.mark.parametrize("field", ["client_token", "accessor", "entity_id", "policies", "token_policies", "num_uses"])
def test_fields_of_a_login_are_what_they_should_be(hostile: Hostile, field: str) -> None:
    """A login without a token that is a text gives none; other fields are as if they were not there."""
    good = {"client_token": f'"hvs.{CANARY}"', "accessor": '"a"', "entity_id": '"e"', "policies": '["default"]'}

    def reply(inner: str, arrival: Arrival) -> Answer:
        if not arrival.path.endswith("/login"):
            return vault(arrival)
        fields = good | {field: f"[{inner}]" if "policies" in field else inner}
        if field == "token_policies":
            del fields["policies"]
        listed = ", ".join(f'"{name}": {value}' for name, value in fields.items())
        return Answer(200, f'{{"auth": {{{listed}}}}}'.encode())

    parsed = parsed_answers(hostile, reply)
    assert {one.code for one in parsed} == {"PERMISSION_DENIED" if field == "client_token" else "OK"}
