"""The status command: asks the daemon that runs here, and prints what it says for people or for programs.

What the daemon answers is in docs/status.md. Whatever listens at the address may have answered, so it is bounded, and
nothing of it reaches the terminal as it came.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from provider.cli.command import StatusQuery
from provider.cli.flags import PROGRAM
from provider.redact import one_line

# Must be the path and the shape of provider.telemetry.status, which brings along what only a daemon needs.
PATH: Final = "/status"
SHAPE: Final = 1
# The daemon answers within milliseconds; one that does not is stuck.
TIMEOUT_SECONDS: Final = 10.0
# Several times what a thousand sessions and leases come to.
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
# Of a cell of a table; `--output json` has the whole.
MAX_CELL: Final = 60
MAX_MESSAGE: Final = 1000

# What stands for "this host" in an address to listen at.
_HERE: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


class NoStatus(Exception):
    """There is no status to be had; the text says why, and what to do."""


def run(query: StatusQuery) -> int:
    """Print the status, and return the exit code: 0, or 1 where there is none."""
    try:
        told = ask(query.address)
        text = json.dumps(told, indent=2) + "\n" if query.style == "json" else "\n".join(table(told)) + "\n"
    except NoStatus as error:
        print(f"{PROGRAM}: {one_line(str(error), 1000)}", file=sys.stderr)
        return 1
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has seen enough; the interpreter would complain as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def ask(address: tuple[str, int]) -> dict[str, Any]:
    """What the daemon at ``address`` answers. Raises NoStatus."""
    host, port = _HERE.get(address[0], address[0]), address[1]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", PATH)
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NoStatus(
            f"no daemon answers at {where} ({said}): is one running here, and is this its --health-addr?"
        ) from error
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.FORBIDDEN:
        raise NoStatus(
            f"the daemon at {where} tells its status to its own host alone: ask from inside its pod, as with kubectl "
            "exec, at an address of the loopback interface"
        )
    if answer.status != http.HTTPStatus.OK or len(body) > MAX_ANSWER_BYTES:
        raise NoStatus(f"what answers at {where} has no status to tell (HTTP {answer.status}): is it {PROGRAM}?")
    try:
        told = json.loads(body)
    except ValueError as error:
        raise NoStatus(f"what answers at {where} is not understood: is it {PROGRAM}?") from error
    if not isinstance(told, dict) or told.get("shape") != SHAPE:
        raise NoStatus(f"the daemon at {where} is of another version: run the command of its own image")
    return told


def table(told: dict[str, Any]) -> Iterator[str]:
    """The lines for people. Raises NoStatus where ``told`` is not what a daemon says."""
    try:
        yield from _lines(told)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise NoStatus(f"the answer is not what {PROGRAM} says") from error


def _lines(told: dict[str, Any]) -> Iterator[str]:
    node = f" on {_cell(told['node'])}" if told["node"] else ""
    yield f"{PROGRAM} {_cell(told['version'])}{node}, up {_duration(told['uptime_seconds'])}"
    yield _failing(int(told["failing"]))
    yield from _section(
        "sessions",
        ("pod", "class", "role", "Vault", "token left", "mounted"),
        [
            (
                _pod(session),
                session["class"] or "-",
                session["role"],
                _vault(session),
                _token(session["token"]),
                _ago(session["mounted_seconds_ago"]),
            )
            for session in told["sessions"]
        ],
        told["sessions_left_out"],
    )
    yield from _section(
        "leases",
        ("pod", "path", "kind", "left", "then"),
        [
            (
                _pod(lease),
                lease["path"],
                lease["kind"],
                _duration(lease["seconds_left"]),
                "renewed" if lease["renewed"] else "replaced by a re-mount",
            )
            for lease in told["leases"]
        ],
        told["leases_left_out"],
    )
    yield from _section(
        "last mounts",
        ("pod", "class", "objects", "mounts", "when"),
        [
            (_pod(mount), mount["class"], str(mount["objects"]), str(mount["mounts"]), _ago(mount["seconds_ago"]))
            for mount in told["mounts"]
        ],
        told["mounts_left_out"],
    )
    errors = told["errors"]
    yield from _section(
        "last errors",
        ("pod", "class", "code", "failures", "when", "now"),
        [
            (
                _pod(error),
                error["class"] or "-",
                error["code"],
                str(error["failures"]),
                _ago(error["seconds_ago"]),
                "mounted" if error["mounted_since"] else "failing" if error["failing"] else "not tried again",
            )
            for error in errors
        ],
        told["errors_left_out"],
        notes=[one_line(error["message"], MAX_MESSAGE) for error in errors],
    )


def _failing(volumes: int) -> str:
    if volumes == 0:
        return "no volume is failing"
    return f"{volumes} {'volume is' if volumes == 1 else 'volumes are'} failing: see LAST ERRORS"


def _section(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left_out: int = 0, notes: Sequence[str] = ()
) -> Iterator[str]:
    """A table below its title; each row may have a note below it."""
    yield ""
    yield f"{title.upper()}: {len(rows) + left_out or 'none'}"
    if not rows:
        return
    cells = [[head.upper() for head in heads], *([_cell(text) for text in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if notes and number:
            yield f"      {notes[number - 1]}"
    if left_out:
        yield f"  and {int(left_out)} more"


def _pod(told: dict[str, Any]) -> str:
    return f"{told['namespace']}/{told['pod']}"


def _vault(session: dict[str, Any]) -> str:
    namespace = session["vault_namespace"]
    return f"{session['vault_address']} ({namespace})" if namespace else str(session["vault_address"])


def _token(token: dict[str, Any] | None) -> str:
    if token is None:
        return "no token"
    return _duration(token["seconds_left"]) + (", renewed" if token["renewed"] else "")


def _ago(seconds: float | None) -> str:
    return "not since the start" if seconds is None else f"{_duration(seconds)} ago"


def _duration(seconds: float | None) -> str:
    """Two units are as much as anybody reads: 3d4h, 2h5m, 5m12s, 12s; without an end "no end"."""
    if seconds is None:
        return "no end"
    left = max(0, math.floor(seconds))
    parts = [(left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "m"), (left % 60, "s")]
    first = next((number for number, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return "".join(f"{count}{unit}" for count, unit in parts[first : first + 2])


def _cell(text: str) -> str:
    return one_line(text, MAX_CELL)
