"""A session as a JSON object and back, for the state directory, and what two daemons hold of one session merged."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from provider.clock import Clock
from provider.redact import Sensitive
from provider.sessions.lifetime import Lifetime
from provider.sessions.model import HeldToken, Identity, Kept
from provider.settings import TlsSettings
from provider.spc import Login, Pod, SecretRequest, VaultServer
from provider.vault import Auth, VaultSecret, size_parsed


@dataclass(slots=True)
class Snapshot:
    """What of a session outlives its process. The newest token is the last."""

    identity: Identity
    pod: Pod
    tokens: list[HeldToken]
    kept: list[Kept]


def dump(snapshot: Snapshot, clock: Clock) -> dict[str, Any]:
    """The JSON object to seal; it holds secrets in the clear."""
    tokens = snapshot.tokens
    return {
        "time": {"epoch": clock.epoch(), "now": clock.now(), "wall": clock.wall()},
        "server": snapshot.identity.server._asdict() | {"tls": snapshot.identity.server.tls._asdict()},
        "login": snapshot.identity.login._asdict(),
        "pod": _fields(snapshot.pod),
        "tokens": [
            {
                "auth": _fields(token.auth) | {"token": token.auth.token.reveal()},
                "life": _finite(token.life),
                "uses_left": token.uses_left,
                "dead": token.dead,
                "bears_leases": token.bears_leases,
            }
            for token in tokens
        ],
        "kept": [
            {
                "request": {
                    "method": kept.request.method,
                    "path": kept.request.path,
                    "query": kept.request.query,
                    "body": kept.request.body.reveal() if kept.request.body is not None else None,
                },
                "secret": _fields(kept.secret),
                "life": _finite(kept.life),
                "token": next(number for number, token in enumerate(tokens) if token is kept.token),
                "volumes": sorted(kept.volumes),
            }
            for kept in snapshot.kept
        ],
    }


def load(payload: dict[str, Any], clock: Clock) -> Snapshot:
    """The session that was dumped, its times moved to this clock.

    Raises:
        ValueError: it is not what ``dump`` makes.
    """
    try:
        return _load(payload, clock)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"its contents are not a session ({type(error).__name__})") from error


def _load(payload: dict[str, Any], clock: Clock) -> Snapshot:
    then = payload["time"]
    shift = 0.0
    if then["epoch"] != clock.epoch():
        # Another boot: what is left of each life shrinks by the time that passed by the calendar.
        shift = clock.now() - then["now"] - max(0.0, clock.wall() - then["wall"])
    server = payload["server"]
    identity = Identity(
        VaultServer(**(server | {"tls": TlsSettings(**server["tls"])})),
        Login(**payload["login"]),
        payload["pod"]["uid"],
    )
    tokens = [
        HeldToken(
            Auth(
                **(
                    saved["auth"]
                    | {"token": Sensitive(saved["auth"]["token"]), "policies": tuple(saved["auth"]["policies"])}
                )
            ),
            _life(saved["life"], shift),
            -1,
            saved["uses_left"],
            saved["dead"],
            saved["bears_leases"],
        )
        for saved in payload["tokens"]
    ]
    kept = [
        Kept(
            _request(saved["request"]),
            VaultSecret(**saved["secret"], size=_size(saved["secret"]["response"])),
            _life(saved["life"], shift),
            tokens[saved["token"]],
            set(saved["volumes"]),
        )
        for saved in payload["kept"]
    ]
    return Snapshot(identity, Pod(**payload["pod"]), tokens, kept)


def merge(
    mine: Sequence[HeldToken], my_kept: dict[SecretRequest, Kept], theirs: Snapshot
) -> tuple[list[HeldToken], dict[SecretRequest, Kept]]:
    """What both hold: of one token or lease the later life, of two for one request the newer."""
    tokens = {token.auth.token: token for token in mine}
    for other in theirs.tokens:
        own = tokens.setdefault(other.auth.token, other)
        if own is not other:
            _later(own.life, other.life)
            own.dead |= other.dead
            if own.uses_left is not None and other.uses_left is not None:
                own.uses_left = min(own.uses_left, other.uses_left)
            own.bears_leases |= other.bears_leases
    kept = dict(my_kept)
    for found in theirs.kept:
        found.token = tokens[found.token.auth.token]
        own_kept = kept.get(found.request)
        if own_kept is None or found.life.started_at > own_kept.life.started_at:
            found.volumes |= own_kept.volumes if own_kept is not None else set()
            kept[found.request] = found
        else:
            own_kept.volumes |= found.volumes
            if found.secret.response == own_kept.secret.response:
                _later(own_kept.life, found.life)
    return sorted(tokens.values(), key=lambda token: token.life.started_at), kept


def _size(response: dict[str, Any]) -> int:
    return size_parsed(json.dumps(response, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _later(own: Lifetime, other: Lifetime) -> None:
    if other.expires_at > own.expires_at or (other.ended and not own.ended):
        own.expires_at, own.ended, own.renew_at = other.expires_at, other.ended, other.renew_at


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass's own fields that tell it apart. Not ``asdict``, which copies all below, the responses too."""
    kind: Any = type(record)  # which mypy does not take for hashable
    return {name: getattr(record, name) for name in _names(kind)}


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.init and field.compare)


def _finite(life: Lifetime) -> dict[str, Any]:
    """JSON has no infinity: null stands for it."""
    return {name: None if value == float("inf") else value for name, value in _fields(life).items()}


def _life(saved: dict[str, Any], shift: float) -> Lifetime:
    moved = {
        name: float("inf") if value is None else value + shift
        for name, value in saved.items()
        if name in ("started_at", "expires_at", "renew_at")
    }
    return Lifetime(**(saved | moved))


def _request(saved: dict[str, Any]) -> SecretRequest:
    body = saved["body"]
    return SecretRequest(
        saved["method"],
        saved["path"],
        tuple((name, value) for name, value in saved["query"]),
        Sensitive(body) if body is not None else None,
    )
