"""The process that runs programs out of classes: it forks once for each mount that has some, and bounds that child.

It is started by exec with one socket and nothing else: no environment, no other descriptor, no secret. Over the socket
come orders, each with the end of a connection to one child: the child reads a request to its end, answers each program
with a frame, and ends. What a program may take is enforced by the kernel (setrlimit, setitimer), which a program cannot
talk to; the interpreter that it has broken, if it found a way, knows nothing of other pods and ends with it.

A frame is a kind (one byte), the length of what follows (4 bytes, big endian) and that: ``T`` text, ``J`` JSON, ``N``
nothing found, ``E`` an error as JSON. An error names lines and names of the program, and never a value.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import json
import math
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from provider.sandbox.quoting import Unwritable, compact, pem_blocks, property_value, shell_word, text_of, yaml_scalar

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the programs of one mount may take together: seconds of CPU time, and bytes over what an idle worker has."""

    cpu: float
    memory: int
    niceness: int


# What the programs of one mount may take together: seconds of CPU time, and bytes of memory over an idle worker's.
CPU_SECONDS: Final = 1
MEMORY_BYTES: Final = 64 * MIB
# A daemon that has no time for anything else must still answer its driver: programs come after it, and those that take
# long after the others.
FULL: Final = Allowance(CPU_SECONDS, MEMORY_BYTES, 19)
# What a program is first tried with, some ten times what most take. Whoever waits for one that does not end waits for
# this at most.
SMALL: Final = Allowance(0.1, 16 * MIB, 5)
# The same for those of whose owner others took too long.
SUSPECT: Final = replace(SMALL, niceness=FULL.niceness)
# Seconds until a child ends in any case.
WALL_SECONDS: Final = 1.8
# Bytes of what asks for a child.
MAX_ORDER: Final = 256
# What a child says first: from here on its time is its own.
STARTED: Final = b"+"
# Characters of a name that is told.
_MAX_NAME: Final = 100
# Names that are told together.
_MAX_NAMES: Final = 5
_TEMPLATE_FILE: Final = "<template>"

_environment: ImmutableSandboxedEnvironment | None = None


class Failed(Exception):
    """A program failed: a code that the other side has a sentence for, the line (0 for none), and a name or ""."""

    def __init__(self, code: str, line: int = 0, name: str = "") -> None:
        super().__init__(code, line, name)
        self.code = code
        self.line = line
        self.name = name


# -- the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Fork for each connection that comes over standard input, until that is closed."""
    # Whatever the daemon's own parent left open comes along past close-on-exec; the listing's own is closed by then.
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2:
            with contextlib.suppress(OSError):
                os.close(number)
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps children
    # Nobody listens to these, so they end a child, wherever that is; the daemon's parent may have had them ignored.
    for timer in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(timer, signal.SIG_DFL)
    _dump_no_core()
    while True:
        received, descriptors, _, _ = socket.recv_fds(control, MAX_ORDER, 1)
        if not received:
            return
        wanted, cpu, memory, niceness, wall = json.loads(received)
        # What the programs are written in is loaded here, once, and inherited by the children.
        _load(wanted)
        if not os.fork():
            control.close()
            _serve(descriptors[0], Allowance(cpu, memory, niceness), wall)
        for descriptor in descriptors:
            os.close(descriptor)


def _dump_no_core() -> None:
    """Have no crash of this process or a child written anywhere.

    By the limit alone, as ``cli.process`` explains its value: what else there is needs ctypes, and whoever breaks out
    of a template is not to find that loaded.
    """
    limit = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def order(wanted: str, allowance: Allowance, wall: float) -> bytes:
    """What asks for a child: the languages it needs (``T`` templates, ``J`` JMESPath) and what it may take."""
    return compact([wanted, allowance.cpu, allowance.memory, allowance.niceness, wall]).encode()


def _load(wanted: str) -> None:
    """Import what a child will need; it can open no file. Some modules are imported by an error, or by one filter."""
    if "T" in wanted and _environment is None:
        check("{% for x in names %}{{ x | json }}{% endfor %}", ["names"])
        for text in ("{{ 'a' ~ absent }}", "{% wrong %}", "{{ ''.__class__ }}", "{{ 'a' | striptags | wordwrap }}"):
            with contextlib.suppress(Failed):
                render(text, {}, 100)
    if "J" in wanted:
        evaluate("length(@)", [], parse=False)


def _serve(descriptor: int, allowance: Allowance, wall: float) -> None:
    """The child: never returns."""
    try:
        connection = socket.socket(fileno=descriptor)
        connection.sendall(STARTED)
        _bound(allowance, wall)
        received = bytearray()
        while chunk := connection.recv(1 << 18):
            received += chunk
        for frame in answers(received):
            connection.sendall(frame)
    finally:
        os._exit(0)


def _bound(allowance: Allowance, wall: float) -> None:
    # Where a container runs out of memory, a child is what ends first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + allowance.memory, used + allowance.memory))
    # The limit is kept in whole seconds, and cannot be undone; the timer is exact.
    seconds = math.ceil(allowance.cpu)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, allowance.cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)
    os.nice(allowance.niceness)


# -- requests ------------------------------------------------------------------------------------------------------


def answers(request: bytes | bytearray) -> Iterator[bytes]:
    """The frames that answer a request: ``{"data": [...], "programs": [...], "output": bytes}``.

    The frames of all programs together are no longer than ``output``; a program over it is an error, and so are those
    after it.
    """
    try:
        given = json.loads(request)
        left = given["output"]
    except (MemoryError, RecursionError):
        yield _frame("E", compact(["memory", 0, ""]).encode())
        return
    for program in given["programs"]:
        try:
            kind, payload = _run(program, given["data"], left)
        except Failed as failed:
            kind, payload = "E", compact([failed.code, failed.line, failed.name]).encode()
        left -= len(payload)
        yield _frame(kind, payload)


def _frame(kind: str, payload: bytes) -> bytes:
    return kind.encode() + len(payload).to_bytes(4, "big") + payload


def _run(program: Mapping[str, Any], data: Sequence[Any], room: int) -> tuple[str, bytes]:
    try:
        if program["kind"] == "check":
            check(program["text"], program["names"])
            return "N", b""
        if program["kind"] == "expression":
            kind, text = evaluate(program["expression"], data[program["data"]], parse=program["parse"])
        else:
            kind, text = "T", render(program["text"], _sources(program["sources"], data), room)
        payload = text.encode()
    except UnicodeEncodeError:
        raise Failed("text") from None
    except MemoryError:
        raise Failed("memory") from None
    if len(payload) > room:
        raise Failed("output")
    return kind, payload


def _sources(sources: Mapping[str, tuple[int, str | None]], data: Sequence[Any]) -> dict[str, Any]:
    found = {}
    for alias, (index, expression) in sources.items():
        value = data[index]
        if expression is not None:
            value = search(expression, value)
            if value is None:
                raise Failed("nothing", 0, alias)
        found[alias] = value
    return found


# -- expressions ---------------------------------------------------------------------------------------------------


def evaluate(expression: str, data: object, *, parse: bool) -> tuple[str, str]:
    """What a JMESPath expression finds in ``data``: a kind of frame and its text. Raises Failed.

    ``parse`` says that data that is a string holds JSON.
    """
    if parse and isinstance(data, str):
        try:
            data = json.loads(data)
        except (ValueError, RecursionError):
            raise Failed("not-json") from None
    value = search(expression, data)
    if value is None:
        return "N", ""
    if isinstance(value, str):
        return "T", value
    return "J", _json(value)


def search(expression: str, data: object) -> Any:
    """The value, None for nothing found. Raises Failed."""
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        return jmespath.search(expression, data)
    except JMESPathError as error:
        # Its text shows the value that the function was given.
        raise Failed("expression", 0, str(getattr(error, "function_name", ""))) from None
    except RecursionError:
        raise Failed("deep") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Failed("fails", 0, type(error).__name__) from None


def _json(value: object) -> str:
    try:
        return compact(value)
    except (TypeError, ValueError):
        # A reference (&name), or a number that is not finite.
        raise Failed("no-json") from None
    except RecursionError:
        raise Failed("deep") from None


# -- templates -----------------------------------------------------------------------------------------------------


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as templates have it: sandboxed, strict, without files, and the same each time it runs."""
    global _environment  # made once, before any fork
    if _environment is None:
        from jinja2 import StrictUndefined, Undefined, pass_eval_context
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandboxed
        from jinja2.sandbox import safe_range

        class Method(StrictUndefined):
            """A method, which can be called. It is no data, so whoever takes it for a key finds that undefined."""

            __slots__ = ("method",)

            def __init__(self, method: Callable[..., Any], owner: Any, name: Any) -> None:
                super().__init__(obj=owner, name=name)
                self.method = method

        class Environment(Sandboxed):
            """A sandbox in which a key of a map comes before a method of the same name, and a method is no value."""

            def getattr(self, obj: Any, attribute: str) -> Any:
                if isinstance(obj, dict) and attribute in obj:
                    return obj[attribute]
                return self._found(obj, attribute, super().getattr(obj, attribute))

            def getitem(self, obj: Any, argument: Any) -> Any:
                return self._found(obj, argument, super().getitem(obj, argument))

            def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
                return super().call(context, obj.method if isinstance(obj, Method) else obj, *args, **kwargs)

            def _found(self, obj: Any, name: Any, value: Any) -> Any:
                if isinstance(value, Undefined) or not callable(value):
                    return value
                return Method(value, obj, name)

        class Range:
            """Jinja2's ``range``, which does not show an address."""

            def __call__(self, *numbers: int) -> range:
                return safe_range(*numbers)

            def __repr__(self) -> str:
                return "range"

        made = Environment(
            undefined=StrictUndefined,
            finalize=pass_eval_context(_finalized),
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
            cache_size=0,
            # What a template computes it computes as it runs: reading it is then short work.
            optimized=False,
        )
        # An unchanged secret is an unchanged file, so nothing is left to chance, nor to the address of an object.
        del made.filters["random"], made.filters["pprint"]
        del made.globals["lipsum"], made.globals["joiner"], made.globals["cycler"]
        made.globals["range"] = Range()
        made.filters |= FILTERS
        made.filters |= {name: _at_once(filter_) for name, filter_ in made.filters.items()}
        _environment = made
    return _environment


def _at_once(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with a list where it gives its results one by one: what does that is no data, and has an address."""

    @functools.wraps(filter_)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        made = filter_(*args, **kwargs)
        return list(made) if isinstance(made, Iterator) else made

    return filtered


def check(text: str, names: Sequence[str]) -> None:
    """Raise Failed where ``text`` is no template, or speaks of names that are none of ``names``: of all of them."""
    from jinja2 import meta, nodes

    made = environment()
    tree, _ = _compiled(text)
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise Failed("include", node.lineno)
    # As meta.find_undeclared_variables does, which computes constants on its way.
    tracking = meta.TrackingCodeGenerator(made)
    tracking.optimizer = None
    tracking.visit(tree)
    strange = tracking.undeclared_identifiers - {*names}
    found: dict[str, int] = {}
    for name in tree.find_all(nodes.Name):
        if name.ctx == "load" and name.name in strange:
            found[name.name] = min(name.lineno, found.get(name.name, name.lineno))
    if found:
        inorder = sorted(found, key=lambda strange: (found[strange], strange))
        told = [f'"{name[:_MAX_NAME]}"' for name in inorder[:_MAX_NAMES]]
        more = f", and {len(inorder) - len(told)} more" if len(inorder) > len(told) else ""
        raise Failed("unknown", found[inorder[0]], ", ".join(told) + more)


def _compiled(text: str) -> tuple[nodes.Template, Template]:
    """What the text says, and what does it. Raises Failed."""
    from jinja2 import TemplateSyntaxError, nodes

    made = environment()
    try:
        tree = made.parse(text)
        for switch in tree.find_all(nodes.EvalContextModifier):
            # Jinja2 would compute it as it reads the template, optimised or not.
            if not all(isinstance(option.value, nodes.Const) for option in switch.options):
                raise Failed("autoescape", switch.lineno)
        return tree, made.from_string(tree)
    except TemplateSyntaxError as error:
        # Its text quotes the template, which is the class's.
        raise Failed("syntax", error.lineno, str(error.message)) from None
    except RecursionError:
        raise Failed("deep") from None
    except (ArithmeticError, SyntaxError, TypeError, ValueError) as error:
        raise Failed("fails", 0, type(error).__name__) from None


def render(text: str, sources: Mapping[str, Any], room: int) -> str:
    """What the template comes to. Raises Failed, past ``room`` characters too, and MemoryError."""
    from jinja2 import UndefinedError
    from jinja2.exceptions import SecurityError

    _, template = _compiled(text)
    parts: list[str] = []
    try:
        for part in template.generate(sources):
            room -= len(part)
            if room < 0:
                raise Failed("output")
            parts.append(part)
    except UndefinedError as error:
        raise Failed("undefined", _line(error.__traceback__), _name(str(error.message), text)) from None
    except SecurityError as error:
        raise Failed("forbidden", _line(error.__traceback__)) from None
    except Unwritable as error:
        raise Failed("unwritable", _line(error.__traceback__), error.problem) from None
    except RecursionError as error:
        raise Failed("deep", _line(error.__traceback__)) from None
    except Exception as error:  # a program can raise anything, and its text may show a value
        if isinstance(error, Failed | MemoryError):
            raise
        raise Failed("fails", _line(error.__traceback__), type(error).__name__) from None
    return "".join(parts)


def _line(trace: TracebackType | None) -> int:
    """The template's line that an error comes from, the innermost; 0 where that is not known."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TEMPLATE_FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _name(message: str, text: str) -> str:
    """The name that an undefined error is about, where the template itself has it: a value may be used as a name."""
    from jinja2 import nodes

    told: set[str] = set()
    with contextlib.suppress(RecursionError):
        for node in environment().parse(text).find_all((nodes.Name, nodes.Getattr, nodes.Const)):
            name = getattr(node, {nodes.Name: "name", nodes.Getattr: "attr"}.get(type(node), "value"))
            if isinstance(name, str) and len(name) <= _MAX_NAME:
                told.add(name)
    found = [name for name in told if message == f"{name!r} is undefined" or message.endswith(f" attribute {name!r}")]
    return max(found, key=len, default="")


# -- filters -------------------------------------------------------------------------------------------------------


def _known(value: Any) -> Any:
    """The value; an undefined one raises, as it does wherever it is used."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        str(value)
    return value


def _as_text(value: Any) -> str:
    try:
        return text_of(_known(value))
    except (TypeError, ValueError):
        raise Unwritable("is neither text nor data") from None


def _written(value: Any) -> Any:
    """What ``{{ }}`` writes: text as it is, other data as JSON, and nothing else."""
    if value is None or isinstance(value, bool | int | float | list | tuple | dict):
        return _as_text(value)
    if isinstance(value, str):
        return value
    _known(value)
    raise Unwritable("is neither text nor data; a list is made by | list")


def _finalized(_: object, value: Any) -> Any:
    """``_written`` as Jinja2 has to call it so as not to try it on constants while it reads the template."""
    return _written(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON, compact, or over several lines."""
    try:
        if indent is None:
            return compact(_known(value))
        return json.dumps(_known(value), ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError):
        raise Unwritable("cannot be written as JSON") from None


def to_base64(value: Any) -> str:
    """The UTF-8 of a text in base64."""
    return base64.b64encode(_as_text(value).encode()).decode()


def from_base64(value: Any) -> str:
    """The text whose UTF-8 in base64 the value is."""
    try:
        return base64.b64decode("".join(_as_text(value).split()), validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise Unwritable("is not base64 of a text") from None


def to_yaml(value: Any) -> str:
    """The value in one line of YAML."""
    try:
        return yaml_scalar(_known(value))
    except (TypeError, ValueError):
        raise Unwritable("cannot be written as YAML") from None


def to_pem(value: Any) -> str:
    """The PEM blocks of a text, or of a list of texts, one after another, each once."""
    pending, blocks = [_known(value)], []
    while pending:
        part = pending.pop(0)
        if isinstance(part, list | tuple):
            pending[:0] = part
        else:
            blocks += [block for _, block in pem_blocks(_as_text(part))]
    if not blocks:
        raise Unwritable("holds no PEM block")
    return "\n".join(dict.fromkeys(blocks)) + "\n"


FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    "json": to_json,
    "tojson": to_json,
    "base64": to_base64,
    "b64encode": to_base64,
    "b64decode": from_base64,
    "shell": lambda value: shell_word(_as_text(value)),
    "properties": lambda value: property_value(_as_text(value)),
    "yaml": to_yaml,
    "pem": to_pem,
}
