"""docs/benchmarks.md: made of a run's results, and nothing in it by hand."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tests.bench import chart
from tests.bench.profile import RATE, Cost
from tests.bench.results import Results
from tests.bench.scenarios import OBJECTS, REMOUNT_SECONDS, Figure
from tests.bench.stand import ROOT
from tests.bench.targets import (
    AWAY,
    BOOT_CPU,
    BOOT_WALL,
    REFERENCE_CPU,
    REFERENCE_WALL,
    Target,
    growth,
    quarters,
    slowness,
    slowness_of_boots,
    targets,
)

PAGE: Final = ROOT / "docs" / "benchmarks.md"
PICTURE: Final = "images/benchmarks.png"
README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- benchmarks: begin, made by make bench -->\n"
KEPT_UP: Final = 0.03
"""How far behind its pace an hour of re-mounts may fall before its page says so."""
END: Final = "<!-- benchmarks: end -->\n"

_WHY: Final = (
    # Longest match first: a function of a file, else the file's folder.
    ("Connection.data_received provider/http/", "llhttp, in C, reads Vault's answers; once a read"),
    ("Runner.run asyncio/", "the event loop itself, uvloop's C: reading and writing sockets, timers, gRPC's wake-ups"),
    ("Timeout.", "each wait is bounded by what is left of the mount's time, so each has a timer"),
    ("timeout asyncio/", "each wait is bounded by what is left of the mount's time, so each has a timer"),
    ("create_task asyncio/", "one task a read, so that reads go out at once and whoever asks again joins it"),
    (
        "provider/sessions/",
        "the session's own rules: what is kept, joined, shared; without them each re-mount issues anew",
    ),
    (
        "provider/http/",
        "a request is written and its answer waited for, on a connection that is found, bounded and kept",
    ),
    ("provider/vault/", "one request as Vault wants it, its answer checked; a few microseconds a read"),
    ("provider/server/", "the driver's messages, decoded, checked and encoded"),
    ("provider/telemetry/", "a line of JSON for each mount"),
    ("provider/state", "a session's file, sealed, so that a restart logs nobody in again"),
    ("provider/", "the mount's own work"),
    ("JSONEncoder.", "lines of the log, logins and sealed sessions are JSON"),
    ("json/", "Vault answers in JSON"),
    ("hvac/", "Vault's endpoints as hvac knows them"),
    ("uvloop/", "the event loop, in C, and what starts it"),
    ("asyncio/", "what it takes to have 64 requests in flight on one thread"),
    ("grpc/", "the driver's calls"),
    ("threading.py", "a class is read in a thread, so that a large one holds nobody up"),
    ("concurrent/", "a class is read in a thread, so that a large one holds nobody up"),
    ("", "a library's or the interpreter's own work"),
)


def write(results: Results, *, quick: bool) -> Path:
    """Write page and picture, and the README's table; of a quick run only the first two, below build/."""
    page = ROOT / "build" / PAGE.name if quick else PAGE
    shown = chart.panels(results)
    chart.draw(shown, page.parent / PICTURE)
    page.write_text(render(results, chart.text(shown)))
    if not quick:
        readme = README.read_text()
        README.write_text(quoted.sub(lambda _: BEGIN + headline(results) + END, readme))
    return page.relative_to(ROOT)


quoted: Final = re.compile(re.escape(BEGIN) + "(.*?)" + re.escape(END), re.DOTALL)
"""The table that page and README have in common, markers included."""


def terminal(promises: Sequence[Target]) -> str:
    """The promises as a terminal shows them."""
    wide = max(len(one.name) for one in promises)
    lines = [f"{'':{wide}}  {'limit':>9}  {'measured':>9} {'':11}  at the reference's speed"]
    for one in promises:
        measured = f"{_number(one.measured):>9} {one.unit:4} {'' if one.met else 'MISSED':6}"
        computed = "-" if one.at_reference is None else f"{_number(one.at_reference)} {one.unit}"
        missed = "" if one.at_reference is None or one.met_at_reference else "MISSED"
        lines.append(f"{one.name:{wide}}  {_number(one.limit):>9}  {measured}  {computed:>12} {missed}".rstrip())
    return "\n".join([*lines, "", counted(promises)])


def counted(promises: Sequence[Target]) -> str:
    """How many are met, as measured and at the reference's speed."""
    met = sum(one.met for one in promises)
    computed = sum(one.met_at_reference for one in promises)
    return (
        f"{met} of {len(promises)} are met as measured; {computed} of {len(promises)} at the reference's speed, those "
        "that do not depend on speed counted as measured."
    )


def reference(results: Results) -> str:
    """What the reference's boot took here and where the targets were set."""
    return (
        f"{results.boot.reference_wall.median:.2f} s, {results.boot.reference_cpu.median:.2f} s of CPU; where the "
        f"targets were set: {REFERENCE_WALL:g} s, {REFERENCE_CPU:g} s"
    )


def headline(results: Results) -> str:
    """The table that the README quotes."""
    ten, boot, agents = results.single(10, AWAY), results.boot, results.agents[-1]
    floor = results.floor(AWAY)
    kept = next(one for one in results.rotations if "credential, kept" in one.name)
    fresh = next(one for one in results.rotations if "lease: fresh" in one.name)
    rows = [
        (
            f"a pod's first mount, 10 objects, Vault {AWAY * 1000:g} ms away",
            f"{_ms(ten.cold)}; one login and one read by themselves take "
            f"{(floor.login.median + floor.read.median) * 1000:.1f} ms",
        ),
        ("its re-mount", f"{_ms(ten.warm)}; one read by itself takes {floor.read.median * 1000:.1f} ms"),
        ("its re-mount under `refreshAfter`", f"{_ms(results.from_memory[0].took)}, no request to Vault"),
        (
            f"a node's boot: {boot.pods} pods of {OBJECTS} objects each, all at once",
            f"{boot.wall.median:.2f} s, {boot.cpu.median:.2f} s of CPU; its requests by a bare client: "
            f"{boot.bare_wall.median:.2f} s, {boot.bare_cpu.median:.2f} s",
        ),
        ("memory: started; after that boot", f"{boot.idle.median:.0f} MiB; {boot.after.median:.0f} MiB"),
        (
            f"database users made for {kept.pods} pods in an hour of re-mounts",
            f"{kept.requests.issued}; issuing at each re-mount: {fresh.requests.issued:,}",
        ),
        (
            f"an agent as a sidecar, {agents.pods} pods",
            f"{agents.private.median:.0f} MiB, files there after {agents.ready.median:.1f} s",
        ),
        ("that boot by the program that the targets were set by, which keeps nothing", reference(results)),
    ]
    return _table(("what", "median"), rows)


def render(results: Results, in_words: str) -> str:
    """The whole page."""
    machine = results.machine
    promises = targets(results)
    parts = [
        "# Benchmarks\n",
        "Made by `make bench`, which measures on the machine that it runs on and writes this page. Each figure is the "
        "median of several runs, with the least and the most in brackets.\n",
        f"{BEGIN}{headline(results)}{END}",
        f"![Three groups of bars; the paragraph below has their numbers]({PICTURE})\n",
        f"The picture in words: {in_words}\n",
        "## Targets\n",
        f"{counted(promises)} Medians count.\n",
        _reference(results),
        _table(
            ("target", "limit", "measured", "", "at the reference's speed", ""),
            (
                (
                    one.name,
                    f"{_number(one.limit)} {one.unit}",
                    f"{_number(one.measured)} {one.unit}",
                    _verdict(one.met),
                    "-" if one.at_reference is None else f"{_number(one.at_reference)} {one.unit}",
                    "" if one.at_reference is None else _verdict(one.met_at_reference),
                )
                for one in promises
            ),
        ),
        "## How it is measured\n",
        _method(results),
        f"Machine: {machine.processor}, {machine.cores} cores, {machine.memory_gib:.0f} GiB, Linux "
        f"{machine.kernel}; load average before the run {machine.load:.1f}. The daemon shares the cores with "
        "OpenBao, PostgreSQL, the Kubernetes API's stand-in, the proxy and the load. "
        f"{', '.join(f'{name} {version}' for name, version in machine.versions)}. {machine.day}, "
        f"{results.took / 60:.0f} minutes.\n",
        "## One mount\n",
        "Floors are one request over a bare connection that is kept alive, in the same run, through the same proxy. "
        "A cold mount is a new pod's first: one login, then all reads at once, at most 64 in flight. A warm one is "
        "the same pod's re-mount: the reads alone. In brackets behind the ratio is what it is a multiple of.\n",
        _table(
            ("round trip", "one read", "one login"),
            ((f"{one.round_trip * 1000:g} ms", _ms(one.read), _ms(one.login)) for one in results.floors),
        ),
        _singles(results),
        "## A node's boot\n",
        f"{results.boot.pods} pods, each with a service account and {OBJECTS} secrets of its own, all at once, "
        f"before a daemon that has just started, {AWAY * 1000:g} ms away from Vault. The bare client sends the same "
        "logins and reads over as many connections by the same HTTP client and does nothing else: less is not to be "
        "had from it on this machine, beside this OpenBao. The reference is that of the targets. The last row is "
        f"{results.replicas.pods} replicas of one class on a daemon that knows the engine.\n",
        _boot(results),
        f"OpenBao itself takes {_s(results.boot.vault_cpu)} of CPU for the bare client's logins and reads. Where the "
        "pods' tokens have its `default` policy too, which it parses anew at each request, it takes "
        f"{_s(results.boot.vault_cpu_default)}; [scale.md](scale.md#settings-that-matter) has what to grant instead.\n",
        "## An hour of re-mounts\n",
        f"{results.rotations[0].pods} pods, re-mounted every {REMOUNT_SECONDS:g} s for an hour, that is "
        f"{results.rotations[0].mounts:,} mounts; their first mounts are not in it. Requests are counted at the "
        "proxy. Where time decides (`refreshAfter`, TTLs of an hour) all durations are shortened alike; elsewhere "
        "re-mounts come as fast as they can. Reading everything again is not a claim about another program: it is "
        "this provider, told to keep nothing or to issue at each mount.\n",
        _rotations(results),
        _lateness(results),
        "Answered from memory, without a request:\n",
        _table(
            ("re-mount of", "CPU of the daemon", "time"),
            ((one.name, _ms(one.cpu, 2), _ms(one.took)) for one in results.from_memory),
        ),
        "## A full node, and an idle one\n",
        _node(results),
        "## Large volumes\n",
        "A large volume is mounted while a volume of one object is re-mounted back to back; the last column is the "
        f"slowest of those that overlapped. By itself the small one takes {_ms(results.small_alone)}.\n",
        _table(
            ("volume", "its mount", "slowest small mount beside"),
            ((one.name, _ms(one.took), _ms(one.beside)) for one in results.large),
        ),
        "## Vault Agent as a sidecar, beside it\n",
        f"`bao agent` from the same release, one process a pod, each rendering the same {OBJECTS} secrets to a "
        "file, all started at once. Resident memory counts the program's text once for each process; proportional "
        "memory shares it out, so it is what a node loses.\n",
        _table(
            ("pods", "until the files are there", "proportional memory", "resident memory", "CPU"),
            ((one.pods, _s(one.ready), _mib(one.private), _mib(one.resident), _s(one.cpu)) for one in results.agents),
        ),
        f"The provider holds {results.boot.after.median:.0f} MiB for {results.boot.pods} pods.\n",
        "## Where the CPU goes\n",
        f"py-spy, {RATE} samples a second of the thread that runs Python, while a node boots "
        f"({results.profile.samples:,} samples). A function's own part, C code that it calls included:\n",
        _table(
            ("function", "part", "why it remains"),
            (
                (f"`{one.function}` in `{one.where}`", f"{one.part * 100:.0f} %", _why(one))
                for one in results.profile.costs
            ),
        ),
        "What this means for a fleet: [scale.md](scale.md).",
    ]
    return "\n".join(_wrapped(part) for part in parts)


def _wrapped(part: str) -> str:
    """A part of the page with lines of at most 120 characters, where Markdown lets a line be broken."""
    lines = []
    for line in part.rstrip("\n").split("\n"):
        whole = line.startswith(("#", "|", "!", "<"))
        deeper = "  " if line.startswith("- ") else ""
        lines += [line] if whole else textwrap.wrap(line, 120, subsequent_indent=deeper) or [""]
    return "\n".join(lines) + "\n"


def _reference(results: Results) -> str:
    boot = results.boot
    return (
        "The limits in seconds were set on another machine, by a program of this architecture that does nothing else: "
        "grpc.aio on uvloop, hvac's calls over aiohttp, libyaml's loader. There it booted the node in "
        f"{REFERENCE_WALL:g} s and {REFERENCE_CPU:g} s of CPU. `tests/bench/reference.py` is that program, rebuilt: it "
        "keeps no session, lease or version, writes no file and no line, and leaves the garbage collector as Python "
        "has it, whose settings are a part of the provider. On this machine, in turns with the "
        f"provider, it took {_s(boot.reference_wall)} and {_s(boot.reference_cpu)} of CPU, so this machine takes "
        f"{slowness_of_boots(results):.1f} times as long for a boot, and {slowness(results):.1f} times the CPU. Side "
        "by side, as measured: the provider, with everything built in, boots the node in "
        f"{boot.wall.median / boot.reference_wall.median:.2f} times the reference's time and with "
        f"{boot.cpu.median / boot.reference_cpu.median:.2f} times its CPU; the limits allow "
        f"{BOOT_WALL / REFERENCE_WALL:g} and {BOOT_CPU / REFERENCE_CPU:g}.\n\n"
        "A time at the reference's speed is the measured one divided by the factor of CPU, and the time until all pods "
        "are mounted by the factor of boots: a computation and not a measurement. Round trips, which no machine "
        "shortens, are divided with it.\n"
    )


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _method(results: Results) -> str:
    return (
        "- The daemon is the program that daemonset/ runs, with its flags: version key from a Secret, sessions "
        "sealed in a directory in memory, pods swept, one line of JSON a mount.\n"
        "- OpenBao is a real server in dev mode, PostgreSQL too. Logins are of the kubernetes method, so each costs "
        "OpenBao a TokenReview at the Kubernetes API's stand-in. The pods' tokens do without the `default` policy, "
        "unless it is said.\n"
        "- Between daemon and OpenBao stands a TCP proxy, a process of its own, that adds half a round trip each "
        "way (and a whole one for a new connection's handshake) and counts requests by method and path.\n"
        "- The driver's side is a process of its own, over one gRPC connection as the driver's. Each answer is "
        "compared with what Vault holds, byte for byte, after the clock has stopped; database credentials are tried "
        "on PostgreSQL. A wrong byte or one request too many ends the run.\n"
        "- CPU is user and system time of the daemon's process, from /proc; memory is its resident set.\n"
    )


def _singles(results: Results) -> str:
    rows = []
    for one in results.singles:
        floor = results.floor(one.round_trip)
        bare = floor.login.median + floor.read.median
        rows.append(
            (
                one.objects,
                f"{one.round_trip * 1000:g} ms",
                _ms(one.cold),
                f"{one.cold.median / bare:.1f} x ({bare * 1000:.1f} ms)",
                _ms(one.warm),
                f"{one.warm.median / floor.read.median:.1f} x ({floor.read.median * 1000:.1f} ms)",
            )
        )
    return _table(("objects", "round trip", "cold", "to login + read", "warm", "to one read"), rows)


def _boot(results: Results) -> str:
    boot, replicas = results.boot, results.replicas
    return (
        _table(
            ("", "until all are mounted", "CPU of it", "logins", "reads sent of those wanted"),
            (
                ("bare client", _s(boot.bare_wall), _s(boot.bare_cpu), boot.pods, f"{boot.pods * OBJECTS:,}"),
                ("reference", _s(boot.reference_wall), _s(boot.reference_cpu), boot.pods, f"{boot.pods * OBJECTS:,}"),
                (
                    f"{boot.pods} pods",
                    _s(boot.wall),
                    _s(boot.cpu),
                    boot.requests.logins,
                    f"{boot.requests.reads:,} of {boot.pods * OBJECTS:,}",
                ),
                (
                    f"{replicas.pods} replicas",
                    _s(replicas.wall),
                    _s(replicas.cpu),
                    replicas.pods,
                    f"{_spread(replicas.reads, '{:.0f}')} of {replicas.wanted:,}",
                ),
            ),
        )
        + "\n"
        + _table(
            ("memory of the daemon", "MiB"),
            (
                ("started", _mib(boot.idle)),
                ("after the boot", _mib(boot.after)),
                ("at most", _mib(boot.peak)),
            ),
        )
    )


def _rotations(results: Results) -> str:
    return _table(
        ("class", "requests", "logins", "reads", "credentials issued", "renewals", "revocations", "CPU a mount"),
        (
            (
                one.name,
                f"{one.requests.total:,}",
                f"{one.requests.logins:,}",
                f"{one.requests.reads:,}",
                f"{one.requests.issued:,}",
                f"{one.requests.renewals:,}",
                f"{one.requests.revocations:,}",
                f"{one.cpu * 1000:.1f} ms",
            )
            for one in results.rotations
        ),
    )


def _lateness(results: Results) -> str:
    late = max(one.late for one in results.rotations)
    return (
        f"Those that go by time took {late * 100:.0f} % longer than they should, as the machine was busy: their counts "
        "of requests are off by as much."
        if late > KEPT_UP
        else f"Those that go by time kept their pace, to {KEPT_UP * 100:.0f} %."
    )


def _node(results: Results) -> str:
    full, idle = results.full_node, results.idle
    memory = full.memory
    return (
        f"- {full.pods} pods of {OBJECTS} static objects, re-mounted once over {full.seconds:g} s: "
        f"{full.core * 100:.1f} % of one core.\n"
        f"- The same re-mounted {len(memory) - 1} times as fast as it goes: resident memory, each quarter's "
        f"median, {', '.join(f'{size:.0f}' for size in quarters(memory))} MiB; {growth(memory):.1f} MiB gained in the "
        f"half hour from the second to the last; {min(memory):.0f} to {max(memory):.0f} MiB at any time.\n"
        f"- Left alone with the sessions of {idle.pods} pods: the event loop's thread wakes {idle.loop_wakeups:.1f} "
        f"times a second, all threads together (gRPC's own among them) {idle.all_wakeups:.1f} times; "
        f"{idle.core * 100:.2f} % of one core, {idle.memory:.0f} MiB.\n"
        f"- From exec to the socket: {_s(results.start_up)}.\n"
    )


def _why(cost: Cost) -> str:
    return next(why for words, why in _WHY if words in f"{cost.function} {cost.where}")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _spread(values: Figure, form: str) -> str:
    return f"{form.format(values.median)} ({form.format(values.low)}-{form.format(values.high)})"


def _ms(values: Figure, digits: int = 1) -> str:
    return _spread(Figure(tuple(value * 1000 for value in values.values)), f"{{:.{digits}f}}") + " ms"


def _s(values: Figure) -> str:
    return _spread(values, "{:.2f}") + " s"


def _mib(values: Figure) -> str:
    return _spread(values, "{:.0f}") + " MiB"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
