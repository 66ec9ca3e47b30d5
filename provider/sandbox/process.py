"""The daemon's side of the worker: starts it when the first program comes, sends programs, bounds the waiting."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import socket
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, assert_never

from provider.errors import ProviderError
from provider.sandbox.lanes import Lane, Pace, Paces
from provider.sandbox.worker import FULL, SMALL, STARTED, SUSPECT, WALL_SECONDS, Allowance, order
from provider.settings import MAX_MOUNT_BYTES, MAX_RESPONSE_BYTES, MIB

_log = logging.getLogger(__name__)

# Bytes of what a mount's programs write: more than a volume holds is of no use.
MAX_OUTPUT: Final = MAX_MOUNT_BYTES
# Bytes of what they are given: Vault's largest response, of which a child holds a few copies on its way.
MAX_INPUT: Final = MAX_RESPONSE_BYTES
# Mounts whose programs run at one time with the small allowance; of those, the ones whose programs are not known to get
# along with it; of those again, the ones of owners some of whose programs lately did not. So neither what is known nor
# what is new waits for what others write that does not end.
SMALL_PLACES: Final = 4
SMALL_STRANGERS: Final = 3
SMALL_SUSPECTS: Final = 2
# Mounts whose programs run at one time with the full allowance. All together take no more memory than three of them.
FULL_PLACES: Final = 2
# Seconds for which an owner is remembered for a program that took too long.
SUSPECT_SECONDS: Final = 60.0
# Seconds for the worker to start and load its languages, on a node that boots; and for a child to end by itself, whose
# own time the kernel keeps.
START_SECONDS: Final = 15.0
ENDING_SECONDS: Final = 0.15
# Seconds that a child with the full allowance is to have, so that it can use its second of the processor: what would
# have less, since it waited, is not run.
LEAST_SECONDS: Final = 1.3
# Seconds after which what waits behind endless programs of its own owner is told so, rather than tried; and those for
# an owner that is remembered for them, whose mounts may wait twice, to check a template and to run it.
PATIENCE_SECONDS: Final = 1.5
SUSPECT_PATIENCE_SECONDS: Final = 0.4
# Seconds in which the programs of such an owner are told how they ended.
SUSPECT_WALL_SECONDS: Final = 1.4
# Seconds for which what did not end is not tried again: of what kubelet asks for again and again, less is a load.
RETRY_SECONDS: Final = 30.0
# Owners of whom it is known when a program of theirs last took too long.
MAX_OWNERS: Final = 1000

_ROOT: Final = str(Path(__file__).resolve().parent.parent.parent)
_CODE: Final = f"import sys; sys.path.insert(0, {_ROOT!r}); from provider.sandbox.worker import main; main()"


@dataclass(frozen=True, slots=True)
class Check:
    """Whether ``text`` is a template that speaks of no name but ``names``. Its outcome is nothing."""

    text: str = field(repr=False)
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expression:
    """What a JMESPath expression finds in ``data``; ``parse``: data that is a string holds JSON."""

    expression: str
    data: Any = field(repr=False)
    parse: bool = False


@dataclass(frozen=True, slots=True)
class Rendering:
    """A template over data by alias: each the data, and an expression that finds the alias' value in it, or None."""

    text: str = field(repr=False)
    sources: Mapping[str, tuple[Any, str | None]] = field(repr=False)


Program: TypeAlias = Check | Expression | Rendering


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program came to: ``found`` False for nothing; ``text`` is JSON where ``json`` says so."""

    found: bool
    json: bool = False
    text: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """A program failed: a sentence that names lines and names of the program, never a value; and what to do.

    ``final`` is whether it would fail again: what ran out of time may have had too little of the processor. ``limit``
    is the bound that ended it: "cpu", "memory", "output" or "time"; "" where it failed by itself. ``missing`` is
    whether it asked for what the secrets do not have.
    """

    what: str
    advice: str
    final: bool = True
    limit: str = ""
    missing: bool = False


Result: TypeAlias = Outcome | Failure


class WorkerLost(Exception):
    """The worker ended while a request was under way."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Programs that run together, on behalf of ``owner``, since ``began`` in the loop's time."""

    owner: str
    programs: Sequence[Program]
    texts: Sequence[bytes]
    wanted: str
    request: bytes = field(repr=False)
    began: float
    suspect: bool

    @property
    def wall(self) -> float:
        """Seconds from its beginning within which it is to have ended."""
        return SUSPECT_WALL_SECONDS if self.suspect else WALL_SECONDS

    def all(self, failure: Failure) -> list[Result]:
        return [failure] * len(self.programs)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a child answered, in how many seconds, and of how many that it had."""

    received: bytes = field(repr=False)
    seconds: float
    wall: float

    @property
    def starved(self) -> bool:
        """Whether what did not end had too little of the processor."""
        return self.seconds >= 0.95 * self.wall


class Sandbox:
    """Runs programs, those of one call in one process that ends with them."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._small = Lane(
            SMALL_PLACES, strangers=SMALL_STRANGERS, suspects=SMALL_SUSPECTS, suspect=lambda owner: self._suspect(owner)
        )
        self._full = Lane(FULL_PLACES, strangers=FULL_PLACES)
        self._paces = Paces()
        # When a program of an owner last took too long, in the loop's time.
        self._exceeded: OrderedDict[str, float] = OrderedDict()

    async def run(self, programs: Sequence[Program], owner: str) -> list[Result]:
        """The result of each program; they share one second of CPU, one allowance of memory and one of output.

        ``owner`` is who answers for them, a namespace. What does not get along with the small allowance is run again
        with the full one, where others like it run; so no other program waits for one that does not end.

        Raises ProviderError where the worker cannot be started.
        """
        request = await asyncio.to_thread(_request, programs)
        if request is None or len(request) > MAX_INPUT:
            return [_TOO_MUCH] * len(programs)
        texts = [_text_digest(program) for program in programs]
        with contextlib.suppress(WorkerLost):  # told below, where it is tried again
            await self._worker()
        call = _Call(owner, programs, texts, _languages(programs), request, _now(), self._suspect(owner))
        if self._pace(call) <= Pace.NEW:
            results = await self._run_quickly(call)
            if results is not None:
                return results
        return await self._run_fully(call)

    async def _run_quickly(self, call: _Call) -> list[Result] | None:
        """The results with the small allowance; None where they take the full one."""
        seconds = SUSPECT_PATIENCE_SECONDS if call.suspect else None
        async with self._small.place(call.owner, lambda: self._pace(call) is Pace.QUICK, seconds=seconds) as granted:
            # A Deployment's pods come with one text: the first of them has told while the others waited.
            if granted and self._pace(call) > Pace.NEW:
                return None
            waited = _now() - call.began
            if not granted or (waited > PATIENCE_SECONDS and self._last_exceeded(call.owner) >= call.began):
                return call.all(_PUT_OFF)
            if call.suspect:
                run = await self._ask(call, SUSPECT, call.wall - waited)
            else:
                run = await self._ask(call, SMALL, WALL_SECONDS)
            results = _results(run.received, call.programs, _STARVED)
            if _STARVED in results and run.starved:
                return results
            too_little = [result in (_STARVED, _NO_MEMORY) for result in results]
            self._note(call, results, too_little, Pace.QUICK, Pace.OVER)
            return None if any(too_little) else results

    async def _run_fully(self, call: _Call) -> list[Result]:
        pace, now = self._pace(call), _now()
        if pace is Pace.ENDLESS and not (
            self._full.idle and now - self._paces.endless_since(call.owner, call.texts) > RETRY_SECONDS
        ):
            return call.all(_PUT_OFF)
        ends = pace is Pace.LONG  # what ended before is waited for, and may take its time
        until = call.began + call.wall
        seconds = None if ends else max(0.0, until - LEAST_SECONDS - now)
        async with self._full.place(call.owner, lambda: self._pace(call) is Pace.LONG, seconds=seconds) as granted:
            if not granted or (pace is not Pace.ENDLESS and self._pace(call) is Pace.ENDLESS):
                return call.all(_PUT_OFF)
            run = await self._ask(call, FULL, WALL_SECONDS if ends else max(0.1, until - _now()))
            late = run.seconds >= 0.9 * FULL.cpu
            results = _results(run.received, call.programs, _STARVED if run.starved else _ENDLESS if late else _CRASHED)
            too_little = [result in (_STARVED, _ENDLESS, _CRASHED) for result in results]
            self._note(call, results, too_little, Pace.LONG, Pace.OVER if run.starved else Pace.ENDLESS)
            return results

    def _suspect(self, owner: str) -> bool:
        return _now() - self._last_exceeded(owner) < SUSPECT_SECONDS

    def _last_exceeded(self, owner: str) -> float:
        return self._exceeded.get(owner, float("-inf"))

    def _pace(self, call: _Call) -> Pace:
        return self._paces.worst(call.owner, call.texts)

    def _note(
        self, call: _Call, results: Sequence[Result], too_little: Sequence[bool], ended: Pace, exceeded: Pace
    ) -> None:
        """Remember how the programs ran: ``exceeded`` those that had ``too_little``, and ``ended`` the others."""
        now = _now()
        for text, result, exceeds in zip(call.texts, results, too_little, strict=True):
            if exceeds:
                self._paces.note(call.owner, text, exceeded, now)
                self._exceeded[call.owner] = now
                self._exceeded.move_to_end(call.owner)
            elif result is not _NOT_RUN:
                # What is quick stays so, whatever it ran beside.
                quick = self._paces.worst(call.owner, [text]) is Pace.QUICK
                self._paces.note(call.owner, text, Pace.QUICK if quick else ended, now)
        while len(self._exceeded) > MAX_OWNERS:
            self._exceeded.popitem(last=False)

    async def close(self) -> None:
        """End the worker. Children that still run end by their own time."""
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            control.close()
        if process is not None:
            try:
                async with asyncio.timeout(WALL_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _ask(self, call: _Call, allowance: Allowance, wall: float) -> _Run:
        """What a child answers, the second one where the worker was lost with the first. Raises ProviderError."""
        for _ in range(2):
            with contextlib.suppress(WorkerLost):
                return await self._ask_once(call, allowance, wall)
        raise ProviderError(
            "the process that runs templates and expressions does not start", "look at the node's memory"
        )

    async def _ask_once(self, call: _Call, allowance: Allowance, wall: float) -> _Run:
        control = await self._worker()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(control, [order(call.wanted, allowance, wall)], [theirs.fileno()])
            ours.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise await self._lost(control) from error
            raise
        try:
            async with asyncio.timeout(START_SECONDS):
                started = await reader.read(1)
            if started == STARTED:
                began = _now()
                received = await _exchange(reader, writer, call.request, wall + ENDING_SECONDS)
                return _Run(received, _now() - began, wall)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()
        raise await self._lost(control)

    async def _worker(self) -> socket.socket:
        async with self._starting:
            if self._control is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    self._process = await _start(theirs)
                except BaseException as error:
                    ours.close()  # asyncio ends a process whose start is cancelled
                    if isinstance(error, OSError):
                        raise WorkerLost from error
                    raise
                self._control = ours
                _log.info("started the process for templates and expressions", extra={"pid": self._process.pid})
            return self._control

    async def _lost(self, control: socket.socket) -> WorkerLost:
        """Have the next request start a worker anew, unless another request has seen to it."""
        if self._control is control:
            _log.warning("the process for templates and expressions was lost")
            await self.close()
        return WorkerLost()


async def _start(control: socket.socket) -> asyncio.subprocess.Process:
    """The worker, with nothing of the daemon's: no environment, no descriptor but the socket, no terminal.

    As ``-I`` would have it, but for the one variable that is set: a set of texts has an order that hangs on their
    hashes, and would be another one after each restart and on each node. What collides on purpose costs its own second.
    """
    with control:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-s", "-B", "-c", _CODE),
            stdin=control.fileno(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, seconds: float
) -> bytes:
    """The frames that came."""
    received = bytearray()
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(seconds):
            writer.write(request)
            writer.write_eof()
            # A child that has broken out of its language writes what it likes.
            while (chunk := await reader.read(1 << 18)) and len(received) <= 2 * MAX_OUTPUT:
                received += chunk
    return bytes(received)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _languages(programs: Sequence[Program]) -> str:
    """What the worker must have loaded, as ``order`` takes it."""
    templates = any(isinstance(program, Check | Rendering) for program in programs)
    expressions = any(
        isinstance(program, Expression)
        or (isinstance(program, Rendering) and any(found is not None for _, found in program.sources.values()))
        for program in programs
    )
    return "T" * templates + "J" * expressions


def _text_digest(program: Program) -> bytes:
    """A digest of what a program is, whatever it is run on."""
    what: list[Any]
    match program:
        case Check(text, names):
            what = ["check", text, names]
        case Expression(expression, _, parse):
            what = ["expression", expression, parse]
        case Rendering(text, sources):
            what = ["template", text, [(alias, expression) for alias, (_, expression) in sources.items()]]
        case _:
            assert_never(program)
    return hashlib.sha256(json.dumps(what).encode()).digest()


def _request(programs: Sequence[Program]) -> bytes | None:
    """The request; None where the data is no JSON any more."""
    data: list[Any] = []
    known: dict[int, int] = {}

    def index(value: Any) -> int:
        # Data that several programs use goes there once; the programs keep it alive, so that its id is its own.
        if id(value) not in known:
            known[id(value)] = len(data)
            data.append(value)
        return known[id(value)]

    described: list[dict[str, Any]] = []
    for program in programs:
        match program:
            case Check(text, names):
                described.append({"kind": "check", "text": text, "names": names})
            case Expression(expression, value, parse):
                described.append({"kind": "expression", "expression": expression, "data": index(value), "parse": parse})
            case Rendering(text, sources):
                given = {alias: (index(value), expression) for alias, (value, expression) in sources.items()}
                described.append({"kind": "template", "text": text, "sources": given})
    request = {"data": data, "programs": described, "output": MAX_OUTPUT}
    try:
        return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return None


def _results(received: bytes, programs: Sequence[Program], cut: Failure) -> list[Result]:
    """A result for each program; ``cut`` for the one whose frame did not come, which is what ended the process."""
    results: list[Result] = []
    at = 0
    while len(results) < len(programs):
        size = int.from_bytes(received[at + 1 : at + 5], "big")
        payload = received[at + 5 : at + 5 + size]
        if len(received) < at + 5 or len(payload) < size:
            break
        results.append(_result(received[at : at + 1], payload.decode(errors="replace")))
        at += 5 + size
    if len(results) < len(programs):
        results.append(cut)
        results += [_NOT_RUN] * (len(programs) - len(results))
    return results


def _result(kind: bytes, text: str) -> Result:
    match kind:
        case b"T":
            return Outcome(True, False, text)
        case b"J":
            return Outcome(True, True, text)
        case b"N":
            return Outcome(False)
        case _:
            return _failure(text)


_ENDLESS: Final = Failure(
    f"it took more than {FULL.cpu:g} s of processor time, with those before it",
    "look for a loop that does not end",
    final=False,
    limit="cpu",
)
_CRASHED: Final = Failure(
    "its process ended without an answer", "it may have taken too much memory, or nested too deeply", final=False
)
_TOO_MUCH: Final = Failure(
    f"the secrets of the volume's programs come to more than {MAX_INPUT // MIB} MiB, or nest too deeply",
    "use less of them",
)
_PUT_OFF: Final = Failure(
    f"it did not end within {SMALL.cpu:g} s of processor time, or ran behind what did not, and is put off while others "
    "run that may not end",
    "look for a loop that does not end; it is tried again when the volume is mounted again",
    final=False,
    limit="cpu",
)
_STARVED: Final = Failure(
    f"it did not end within {WALL_SECONDS:g} s, in which it had less than {FULL.cpu:g} s of processor time",
    "look for a loop that does not end, and at the node's load; it is tried again when the volume is mounted again",
    final=False,
    limit="time",
)
_NOT_RUN: Final = Failure("it was not run, since one before it did not end", "see the first one", final=False)
_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "syntax": ("is not a template of Jinja2: {name}", "see https://jinja.palletsprojects.com/templates"),
    "unknown": ("speaks of {name}, which is no source of it", "correct the name, or declare it in sources"),
    "undefined": (
        "speaks of {name}, which is not defined",
        "check the name, or the secret: {{ x | default('') }} allows it; a method is called by ()",
    ),
    "autoescape": ("sets autoescape to what has to be computed", "write true or false"),
    "include": ("uses another template, and there is none", "write it into this one"),
    "forbidden": ("reaches for what the sandbox keeps away", "use the secrets and filters alone"),
    "unwritable": ("has a value that {name}", "see the filters in the README"),
    "fails": ("fails with {name}", "check what it does with each secret"),
    "deep": ("is nested too deeply", "look for a macro that calls itself"),
    "memory": (f"takes more than {FULL.memory // MIB} MiB of memory", "make it smaller"),
    "output": (f"comes to more than {MAX_OUTPUT // MIB} MiB, with those before it", "make it smaller"),
    "text": ("comes to what is no text in UTF-8", "check the secrets' text"),
    "nothing": ("has nothing for the source {name}: its jmesPath finds null", "check jmesPath and the secret"),
    "not-json": ("is of a value that holds no JSON", "store JSON, or leave jmesPath out"),
    "expression": ("calls a function with a value that it does not take {name}", "check jmesPath and the secret"),
    "no-json": ("comes to what is no JSON", "check jmesPath"),
}


def _failure(text: str) -> Failure:
    """The sentence for an error frame; what is no such frame was not written by our code."""
    try:
        code, line, name = json.loads(text)
        what, advice = _SENTENCES[code]
        told = f"({name})" if code == "expression" and name else f'"{name}"' if code in _NAMING and name else str(name)
        sentence = what.replace("{name}", told or "a name")
        limit = code if code in _LIMITS else ""
        sentence = f"line {int(line)} {sentence}" if line else f"it {sentence}"
        return Failure(sentence, advice, limit=limit, missing=code in _MISSING)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _CRASHED


_LIMITS: Final = frozenset({"memory", "output"})
_NAMING: Final = frozenset({"undefined", "nothing"})
_MISSING: Final = _NAMING
_NO_MEMORY: Final = _failure('["memory", 0, ""]')
