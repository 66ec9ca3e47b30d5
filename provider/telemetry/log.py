"""The daemon's log: one event a line on stderr, as JSON for machines or as text for people.

The rooms log through the standard library (``logging.getLogger(__name__)``, details in ``extra``); what happens to
an event from there on is decided here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal

from provider.errors import ProviderError
from provider.redact import one_line
from provider.telemetry.lines import MAX_WAITING, LineWriter

# The level names of the Go provider's logger, hclog.
LEVELS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "trace": 5,
        "debug": logging.DEBUG,
        "info": logging.INFO,
        "warn": logging.WARNING,
        "error": logging.ERROR,
        "off": logging.CRITICAL + 1,
    }
)
# Long enough for a message of a mount error (4 KiB), short enough for collectors that cut at 16 KiB.
MAX_FIELD: Final = 4096
# Frames of one exception that are told, innermost last.
MAX_FRAMES: Final = 24

# Lines of a moment are written together; a process that is killed takes them with it.
GATHER_SECONDS: Final = 0.02

_ROOT: Final = "provider"
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_OWN: Final = frozenset({"time", "severity", "message", "logger", "exception"})
_NOT_EXTRA: Final = _STANDARD | _OWN
# What logging finds out for each event unless told not to, and no line tells: file, thread and process. It is a third
# of what an event costs (https://docs.python.org/3/howto/logging.html#optimization).
_NOT_ASKED: Final[Mapping[str, object]] = MappingProxyType(
    {"_srcfile": None, "logThreads": False, "logProcesses": False, "logMultiprocessing": False}
)

# What may begin a field or an exception, in the text form, behind a message and behind a field's value.
_AFTER_MESSAGE: Final = '="['
_AFTER_FIELD: Final = ' ="'

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Log:
    """The log of the process while open: a context manager, since hooks of the interpreter are set and restored.

    Inside, everything that the process says goes through it: the logging module, warnings, exceptions that nobody
    caught in the main thread, in other threads, in finalizers, and (by ``watch``) in the event loop.

    Libraries are heard from WARNING up, whatever ``level`` says: the debug logs of HTTP stacks show headers, and
    so tokens.
    """

    def __init__(
        self, level: str, style: Literal["json", "text"], descriptor: int = 2, capacity: int = MAX_WAITING
    ) -> None:
        self._level = LEVELS[level]
        self._handler = _LineHandler(_Json() if style == "json" else _Text(), descriptor, capacity)
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> Log:
        root, ours = logging.getLogger(), logging.getLogger(_ROOT)
        before = (root.handlers[:], root.level, ours.level)
        hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
        asked = {name: vars(logging)[name] for name in _NOT_ASKED}

        def restore() -> None:
            root.handlers[:] = before[0]
            root.setLevel(before[1])
            ours.setLevel(before[2])
            sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
            logging.captureWarnings(False)
            vars(logging).update(asked)

        self._restore.append(restore)
        root.handlers[:] = [self._handler]
        root.setLevel(max(self._level, logging.WARNING))
        ours.setLevel(self._level)
        logging.captureWarnings(True)
        vars(logging).update(_NOT_ASKED)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
        sys.unraisablehook = _unraisable
        self._handler.lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.pop()()
        self._handler.close()

    @property
    def lines(self) -> LineWriter:
        """What writes it, for others whose lines go to the same place."""
        return self._handler.lines

    @staticmethod
    def watch(loop: asyncio.AbstractEventLoop) -> None:
        """Log what the event loop would print: exceptions of tasks and callbacks that nobody awaited."""
        loop.set_exception_handler(_unawaited)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(_ROOT).critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is not None:
        logging.getLogger(_ROOT).error(
            "uncaught exception in a thread", exc_info=(what.exc_type, what.exc_value, what.exc_traceback)
        )


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    # The object is not told: its repr may hold anything.
    info = None if what.exc_value is None else (what.exc_type, what.exc_value, what.exc_traceback)
    logging.getLogger(_ROOT).error("exception in a finalizer", exc_info=info)


def _unawaited(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Of the context only the message and the exception: the reprs of tasks and handles show coroutine arguments.
    error = context.get("exception")
    info = (type(error), error, error.__traceback__) if isinstance(error, BaseException) else None
    logging.getLogger(f"{_ROOT}.loop").error(str(context.get("message", "")), exc_info=info)


class _LineHandler(logging.Handler):
    """Formats an event where it happens, and has it written elsewhere."""

    def __init__(self, formatter: logging.Formatter, descriptor: int, capacity: int) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._told_refused = 0
        self.lines = LineWriter("log", self._write, capacity=capacity, gather=GATHER_SECONDS)

    def createLock(self) -> None:
        """None is needed: an event is formatted from nothing that is shared, and the lines have a lock of their own."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(self.format(record))

    def close(self) -> None:
        self.lines.close()
        super().close()

    def _write(self, lines: Sequence[bytes]) -> None:
        self._put(b"".join(lines))
        # Told as soon as the reader is back; a line that is refused meanwhile is told the next time.
        dropped = self.lines.refused - self._told_refused
        if dropped:
            self._told_refused += dropped
            what = {"levelno": logging.WARNING, "msg": "stderr was full: events are lost", "dropped": dropped}
            self._put(self.format(logging.makeLogRecord({"name": __name__, **what})).encode() + b"\n")

    def _put(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            # Nobody reads stderr any more; mounts go on.
            pass


@functools.lru_cache(maxsize=16)
def _severity(level: int) -> str:
    """The level by the names that GKE and Datadog both understand."""
    for at_least in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO):
        if level >= at_least:
            return logging.getLevelName(at_least)
    return "DEBUG"


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001  # a wrong format string in some library; its template still tells where
        text = str(record.msg)
    return one_line(text, MAX_FIELD)


def _value(value: object) -> str | int | float | bool | None:
    if type(value) is str:
        return one_line(value, MAX_FIELD)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return one_line(str(value), MAX_FIELD)


def _fields(record: logging.LogRecord) -> dict[str, str | int | float | bool | None]:
    """What the call gave in ``extra``."""
    return {name: _value(value) for name, value in record.__dict__.items() if name not in _NOT_EXTRA}


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03}Z"


@functools.lru_cache(maxsize=1)
def _second(at: int) -> str:
    """A time in Unix seconds; many events fall into one."""
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None).isoformat()


def describe(error: BaseException) -> dict[str, Any]:
    """``error`` for the log: its type, where it was raised, and its causes; without locals.

    Its text is told only where the text is ours or the operating system's. That of any other exception may quote
    what it choked on, which here is a secret.
    """
    told: dict[str, Any] = {"type": f"{type(error).__module__}.{type(error).__qualname__}"}
    if isinstance(error, (ProviderError, OSError)):
        told["message"] = one_line(str(error), MAX_FIELD)
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(one_line(f"{code.co_filename}:{trace.tb_lineno} {code.co_qualname}"))
        trace = trace.tb_next
    told["frames"] = frames[-MAX_FRAMES:]
    return told


def _chain(error: BaseException) -> list[dict[str, Any]]:
    """``error`` and what it came of, the last one first; a loop of causes is left where it closes."""
    chain: list[dict[str, Any]] = []
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen and len(chain) < 8:
        seen.add(id(at))
        chain.append(describe(at))
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return chain


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": _time(record),
            "severity": _severity(record.levelno),
            "message": _message(record),
            "logger": record.name,
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            event["exception"] = _chain(record.exc_info[1])
        return _encode(event)


def _told(text: str, delimiters: str) -> str:
    """``text`` in quotes where it has one of ``delimiters``, and could pass for what follows it."""
    return _encode(text) if any(character in text for character in delimiters) else text


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Names that tenants choose are in messages too: without quotes one could read like fields, or an exception.
        message = _told(_message(record), _AFTER_MESSAGE)
        head = f"{_time(record)} {_severity(record.levelno):8} {record.name}: {message}"
        parts = [head, *(f"{name}={_told(str(value), _AFTER_FIELD)}" for name, value in _fields(record).items())]
        if record.exc_info and record.exc_info[1] is not None:
            for told in _chain(record.exc_info[1]):
                text = f": {_encode(told['message'])}" if "message" in told else ""
                where = f" at {told['frames'][-1]}" if told["frames"] else ""
                parts.append(f"[{told['type']}{text}{where}]")
        return " ".join(parts)
