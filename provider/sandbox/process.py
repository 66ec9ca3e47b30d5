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
from provider.sandbox.worker import CPU_SECONDS, MEMORY_BYTES, STARTED, WALL_SECONDS
from provider.settings import MAX_MOUNT_BYTES, MAX_RESPONSE_BYTES, MIB

_log = logging.getLogger(__name__)

# Bytes of what a mount's programs write: more than a volume holds is of no use.
MAX_OUTPUT: Final = MAX_MOUNT_BYTES
# Bytes of what they are given: Vault's largest response, of which a child holds a few copies on its way.
MAX_INPUT: Final = MAX_RESPONSE_BYTES
# Mounts whose programs run at one time: of those that all ended when they were last run, so that a node's boot goes on;
# and of those that did not or never ran, so that these keep nobody else waiting.
MAX_AT_ONCE: Final = 2
MAX_UNPROVEN_AT_ONCE: Final = 1
# Programs of which it is known whether they end.
MAX_KNOWN: Final = 5000
# Seconds for the worker to start and load its languages, on a node that boots; and for a child to end by itself, whose
# own time the kernel keeps.
START_SECONDS: Final = 15.0
ANSWER_SECONDS: Final = WALL_SECONDS + 0.15

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

    ``final`` is whether it would fail again: what ran out of time may have had too little of the processor.
    """

    what: str
    advice: str
    final: bool = True


Result: TypeAlias = Outcome | Failure


class WorkerLost(Exception):
    """The worker ended while a request was under way."""


class Sandbox:
    """Runs programs, those of one call in one process that ends with them."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._unproven_turns = asyncio.Semaphore(MAX_UNPROVEN_AT_ONCE)
        # Whether a program ended when it was last run, by a digest of its text.
        self._ends: OrderedDict[bytes, bool] = OrderedDict()

    async def run(self, programs: Sequence[Program]) -> list[Result]:
        """The result of each program; they share one second of CPU, one allowance of memory and one of output.

        Programs that did not end when they were last run, wherever that was, or that never ran, are run one mount at a
        time, and no other program waits for them; the former are put off where one runs.

        Raises ProviderError where the worker cannot be started.
        """
        request = await asyncio.to_thread(_request, programs)
        if request is None or len(request) > MAX_INPUT:
            return [_TOO_MUCH] * len(programs)
        wanted = _languages(programs)
        texts = [_text_digest(program) for program in programs]
        proven = all(self._ends.get(text, False) for text in texts)
        occupied = self._unproven_turns.locked()
        if occupied and not self._hopeful(texts):
            return [_PUT_OFF] * len(programs)
        async with self._turns if proven else self._unproven_turns:
            # A Deployment's pods come with one text: the first of them has told while the others waited.
            if occupied and not self._hopeful(texts):
                return [_PUT_OFF] * len(programs)
            for last in (False, True):
                try:
                    results = _results(await self._ask(wanted, request), programs)
                    self._note(texts, results)
                    return results
                except WorkerLost:
                    if last:
                        break
        raise ProviderError(
            "the process that runs templates and expressions does not start", "look at the node's memory"
        )

    def _hopeful(self, texts: Sequence[bytes]) -> bool:
        return all(self._ends.get(text, True) for text in texts)

    def _note(self, texts: Sequence[bytes], results: Sequence[Result]) -> None:
        for text, result in zip(texts, results, strict=True):
            if result is not _NOT_RUN:
                self._ends[text] = result not in (_ENDLESS, _CRASHED)
                self._ends.move_to_end(text)
        while len(self._ends) > MAX_KNOWN:
            self._ends.popitem(last=False)

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

    async def _ask(self, wanted: bytes, request: bytes) -> tuple[bytes, bool]:
        """The frames that came, and whether time ran out before the end of them. Raises WorkerLost."""
        control = await self._worker()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(control, [wanted], [theirs.fileno()])
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
                return await _exchange(reader, writer, request)
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
                except OSError as error:
                    ours.close()
                    raise WorkerLost from error
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
    """The worker, with nothing of the daemon's: no environment, no descriptor but the socket, no terminal."""
    with control:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-B", "-c", _CODE),
            stdin=control.fileno(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[bytes, bool]:
    received = bytearray()
    began = asyncio.get_running_loop().time()
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(ANSWER_SECONDS):
            writer.write(request)
            writer.write_eof()
            # A child that has broken out of its language writes what it likes.
            while (chunk := await reader.read(1 << 18)) and len(received) <= 2 * MAX_OUTPUT:
                received += chunk
    return bytes(received), asyncio.get_running_loop().time() - began >= 0.9 * CPU_SECONDS


def _languages(programs: Sequence[Program]) -> bytes:
    """What the worker must have loaded: ``T`` for templates, ``J`` for JMESPath."""
    templates = any(isinstance(program, Check | Rendering) for program in programs)
    expressions = any(
        isinstance(program, Expression)
        or (isinstance(program, Rendering) and any(found is not None for _, found in program.sources.values()))
        for program in programs
    )
    return b"T" * templates + b"J" * expressions


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


def _results(answer: tuple[bytes, bool], programs: Sequence[Program]) -> list[Result]:
    """A result for each program. The one whose frame did not come is what ended the process."""
    received, late = answer
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
        results.append(_ENDLESS if late else _CRASHED)
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
    f"it took more than {CPU_SECONDS} s of processor time, with those before it",
    "look for a loop that does not end",
    final=False,
)
_CRASHED: Final = Failure(
    "its process ended without an answer", "it may have taken too much memory, or nested too deeply", final=False
)
_TOO_MUCH: Final = Failure(
    f"the secrets of the volume's programs come to more than {MAX_INPUT // MIB} MiB, or nest too deeply",
    "use less of them",
)
_PUT_OFF: Final = Failure(
    "it did not end when it was last run, and is put off while another runs that may not end",
    "look for a loop that does not end",
    final=False,
)
_NOT_RUN: Final = Failure("it was not run, since one before it did not end", "see the first one", final=False)
_SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "syntax": ("is not a template of Jinja2: {name}", "see https://jinja.palletsprojects.com/templates"),
    "undefined": (
        "speaks of {name}, which is not defined",
        "check the name, or the secret: {{ x | default('') }} allows it",
    ),
    "include": ("uses another template, and there is none", "write it into this one"),
    "forbidden": ("reaches for what the sandbox keeps away", "use the secrets and filters alone"),
    "unwritable": ("has a value that {name}", "see the filters in the README"),
    "fails": ("fails with {name}", "check what it does with each secret"),
    "deep": ("is nested too deeply", "look for a macro that calls itself"),
    "memory": (f"takes more than {MEMORY_BYTES // MIB} MiB of memory", "make it smaller"),
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
        return Failure(f"line {int(line)} {sentence}" if line else f"it {sentence}", advice)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _CRASHED


_NAMING: Final = frozenset({"undefined", "nothing"})
