"""What is done with the stand, and what came of it. Each scenario raises BenchFailed where an answer is not right.

Counts are of requests that passed the proxy. Times are in seconds, memory in MiB, CPU in seconds of one core.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.load import BenchFailed, Driven, Lane, wall
from tests.bench.stand import DEFAULT, ENGINE_PATH, LOGIN_PATH, Bare, BenchStand, Daemon
from tests.stand.latency import Passed

OBJECTS: Final = 10
PODS: Final = 110
"""kubelet's default limit of a node."""
REMOUNT_SECONDS: Final = 75.0
"""Between two re-mounts of a volume: kubelet's 60 to 90 s (docs/contract.md section 1)."""
HOUR: Final = 3600.0
_MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """How much is done; `FULL` is for the page, `QUICK` for a minute, `SMOKE` shows that it works."""

    runs: int
    boots: int
    pods: int
    round_trips: tuple[float, ...]
    objects: tuple[int, ...]
    rotating_pods: int
    hour_seconds: float
    full_node_pods: int
    full_node_seconds: float
    full_node_rounds: int
    memory_mounts: int
    idle_seconds: float
    agents: tuple[int, ...]
    agent_runs: int


FULL: Final = Plan(
    runs=9,
    boots=6,
    pods=PODS,
    round_trips=(0.0, 0.002, 0.005, 0.020),
    objects=(1, 10, 50, 200),
    rotating_pods=PODS,
    hour_seconds=30.0,
    full_node_pods=250,
    full_node_seconds=80.0,
    full_node_rounds=48,
    memory_mounts=1000,
    idle_seconds=10.0,
    agents=(1, 5, 10),
    agent_runs=3,
)
QUICK: Final = Plan(
    runs=3,
    boots=1,
    pods=PODS,
    round_trips=(0.005,),
    objects=(1, 10, 200),
    rotating_pods=4,
    hour_seconds=6.0,
    full_node_pods=16,
    full_node_seconds=5.0,
    full_node_rounds=4,
    memory_mounts=200,
    idle_seconds=3.0,
    agents=(1, 5),
    agent_runs=1,
)
SMOKE: Final = dataclasses.replace(
    QUICK,
    runs=1,
    pods=12,
    rotating_pods=2,
    hour_seconds=10.0,
    full_node_seconds=1.0,
    idle_seconds=1.0,
    agents=(1,),
)


@dataclass(frozen=True)
class Figure:
    """The results of several runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The most."""
        return max(self.values)


def figure(values: Sequence[float]) -> Figure:
    """The Figure of some results; there must be one."""
    return Figure(tuple(values))


def expect(passed: Passed, what: str, **counts: int) -> None:
    """Raise BenchFailed unless exactly so many `logins`, `reads` (KV), `issued` (credentials) and `others` passed.

    The question which engine serves a path is asked in the background, and not counted here.
    """
    seen = count(passed)
    wanted = {"logins": 0, "reads": 0, "issued": 0, "others": 0} | counts
    if {name: getattr(seen, name) for name in wanted} != wanted:
        raise BenchFailed(f"{what}: {seen} and not {wanted}")


@dataclass(frozen=True)
class Requests:
    """Requests by what they are for."""

    logins: int
    reads: int
    issued: int
    engines: int
    renewals: int
    revocations: int
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


def count(passed: Passed) -> Requests:
    """Sort what passed."""
    logins = passed.under(LOGIN_PATH)
    reads = passed.under("bench/data/")
    issued = passed.under("database/creds/")
    engines = passed.under(ENGINE_PATH)
    renewals = passed.under("auth/token/renew-self") + passed.under("sys/leases/renew")
    revocations = passed.under("auth/token/revoke-self")
    known = logins + reads + issued + engines + renewals + revocations
    return Requests(logins, reads, issued, engines, renewals, revocations, passed.total - known)


# One mount ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Single:
    """One mount by itself, nothing else going on."""

    objects: int
    round_trip: float
    cold: Figure
    warm: Figure


@dataclass(frozen=True)
class Floor:
    """One request over a bare connection that is kept alive."""

    round_trip: float
    read: Figure
    login: Figure


def floor(stand: BenchStand, round_trip: float, runs: int) -> Floor:
    """One read and one login at a round-trip time."""
    stand.proxy.delay(round_trip)
    reads, logins = stand.floors(max(runs, 9))
    return Floor(round_trip, figure(reads), figure(logins))


def single(stand: BenchStand, daemon: Daemon, objects: int, round_trip: float, runs: int) -> Single:
    """A new pod's first mount, and its next; a mount before them lets the daemon open its connections."""
    stand.proxy.delay(round_trip)
    paths = [f"one/{number}" for number in range(objects)]
    cold, warm = [], []
    for run in range(runs + 1):
        lane = stand.static(stand.pod(), paths)
        stand.proxy.forget()
        first = stand.load.drive(daemon.socket, [lane])
        expect(stand.proxy.passed(), "cold mount", logins=1, reads=objects)
        stand.proxy.forget()
        second = stand.load.drive(daemon.socket, [lane])
        expect(stand.proxy.passed(), "warm mount", reads=objects)
        if run:
            cold += first[0].seconds
            warm += second[0].seconds
    return Single(objects, round_trip, figure(cold), figure(warm))


# The node ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boot:
    """All pods of a node at once, before a daemon that has just started.

    `bare_wall` and `bare_cpu` are what the same logins and reads take by `tests.bench.bare`; `vault_cpu` what they take
    of OpenBao, `vault_cpu_default` where the tokens have its default policy too. `reference_wall` and `reference_cpu`
    are what the same mounts take by `tests.bench.reference`.
    """

    pods: int
    reference_wall: Figure
    reference_cpu: Figure
    bare_wall: Figure
    bare_cpu: Figure
    vault_cpu: Figure
    vault_cpu_default: Figure
    wall: Figure
    cpu: Figure
    listening: Figure
    idle: Figure
    after: Figure
    peak: Figure
    requests: Requests
    connections: int


def boot_lanes(stand: BenchStand, pods: int) -> list[Lane]:
    """New pods of as many service accounts, each with OBJECTS secrets of its own."""
    return [
        stand.static(stand.pod(f"boot-{pod}"), [f"boot/{pod}/{number}" for number in range(OBJECTS)])
        for pod in range(pods)
    ]


def boot(stand: BenchStand, runs: int, pods: int, *, round_trip: float = 0.005) -> Boot:
    """A node's boot, each with a daemon of its own; the reference's come before and after it in turns."""
    stand.proxy.delay(round_trip)
    results: list[tuple[float, ...]] = []
    reference: list[tuple[float, float]] = []
    bare: list[Bare] = []
    under_default: list[float] = []
    requests: list[Passed] = []

    def by_provider() -> None:
        with stand.daemon() as daemon:
            seconds, cpu, idle, passed = _booted(stand, daemon, pods)
            results.append((seconds, cpu, daemon.started_in, idle, daemon.memory(), daemon.peak()))
            requests.append(passed)

    def by_reference() -> None:
        with stand.reference() as program:
            seconds, cpu, *_ = _booted(stand, program, pods)
            reference.append((seconds, cpu))

    for run in range(runs):
        bare.append(stand.bare(pods, OBJECTS))
        under_default.append(stand.bare(pods, OBJECTS, DEFAULT).vault_cpu)
        for boots in (by_provider, by_reference)[:: 1 if run % 2 else -1]:
            boots()
    walls, cpus, starts, idles, afters, peaks = (figure(column) for column in zip(*results, strict=True))
    bare_wall, bare_cpu, vault_cpu = (figure(column) for column in zip(*bare, strict=True))
    reference_wall, reference_cpu = (figure(column) for column in zip(*reference, strict=True))
    return Boot(
        pods=pods,
        reference_wall=reference_wall,
        reference_cpu=reference_cpu,
        bare_wall=bare_wall,
        bare_cpu=bare_cpu,
        vault_cpu=vault_cpu,
        vault_cpu_default=figure(under_default),
        wall=walls,
        cpu=cpus,
        listening=starts,
        idle=idles,
        after=afters,
        peak=peaks,
        requests=count(requests[-1]),
        connections=max(passed.most_open for passed in requests),
    )


def _booted(stand: BenchStand, daemon: Daemon, pods: int) -> tuple[float, float, float, Passed]:
    """A boot of one just started: its seconds, those of CPU, the memory before it, and what passed."""
    lanes = boot_lanes(stand, pods)
    time.sleep(0.5)  # what is done right after the start is not the boot's
    idle, before = daemon.memory(), daemon.cpu()
    stand.proxy.forget()
    driven = stand.load.drive(daemon.socket, lanes)
    cpu, passed = daemon.cpu() - before, stand.proxy.passed()
    expect(passed, "node boot", logins=pods, reads=pods * OBJECTS)
    return wall(driven), cpu, idle, passed


@dataclass(frozen=True)
class Replicas:
    """Pods of one service account and one class, all at once."""

    pods: int
    wanted: int
    reads: Figure
    wall: Figure
    cpu: Figure


def replicas(stand: BenchStand, runs: int, pods: int, *, round_trip: float = 0.005) -> Replicas:
    """Replicas of a deployment, mounted after one pod of it has been: the engine is known, as on a running node."""
    stand.proxy.delay(round_trip)
    paths = [f"replica/{number}" for number in range(OBJECTS)]
    reads, walls, cpus = [], [], []
    with stand.daemon() as daemon:
        stand.load.drive(daemon.socket, [stand.static(stand.pod("replica"), paths)])
        until_quiet(stand)
        for _ in range(runs):
            lanes = [stand.static(stand.pod("replica"), paths) for _ in range(pods)]
            stand.proxy.forget()
            before = daemon.cpu()
            driven = stand.load.drive(daemon.socket, lanes)
            cpus.append(daemon.cpu() - before)
            seen = count(stand.proxy.passed())
            if seen.logins != pods:
                raise BenchFailed(f"replicas: {seen.logins} logins of {pods} pods")
            reads.append(float(seen.reads))
            walls.append(wall(driven))
    return Replicas(pods, pods * OBJECTS, figure(reads), figure(walls), figure(cpus))


def until_quiet(stand: BenchStand) -> None:
    """Return when no request has passed for a moment: what is asked in the background has its answer."""
    before = -1
    while (now := stand.proxy.passed().total) != before:
        before = now
        time.sleep(0.2)


# Re-mounts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """An hour of re-mounts of some pods, every REMOUNT_SECONDS. `cpu` is of the daemon, in seconds per mount.

    `late` is by what part of the hour the machine fell behind, 0 where the pace does not matter: what goes by time,
    renewals and reads under `refreshAfter`, is then too little or too much for the mounts that were made.
    """

    name: str
    pods: int
    mounts: int
    requests: Requests
    cpu: float
    first: Requests
    late: float


def rotation(
    stand: BenchStand,
    name: str,
    lanes: Sequence[Lane],
    *flags: str,
    hour: float = 0.0,
    check: Callable[[Sequence[Driven]], None] = lambda _: None,
) -> Rotation:
    """Mount once, then re-mount as often as an hour has re-mounts.

    `hour` is how many seconds stand for it, where durations matter (whoever calls shortens them alike); 0 goes as
    fast as it can, which changes no count where none do. `check` sees the answers of first mounts and re-mounts.
    """
    rounds = round(HOUR / REMOUNT_SECONDS)
    stand.proxy.delay(0.0)
    period = hour / rounds
    with stand.daemon(*flags) as daemon:
        stand.proxy.forget()
        first_driven = stand.load.drive(daemon.socket, lanes)
        until_quiet(stand)
        first = count(stand.proxy.passed())
        stand.proxy.forget()
        before = daemon.cpu()
        again = [
            dataclasses.replace(lane, rounds=rounds, period=period, offset=period * number / len(lanes))
            for number, lane in enumerate(lanes)
        ]
        driven = stand.load.drive(daemon.socket, again)
        until_quiet(stand)
        cpu = daemon.cpu() - before
        requests = count(stand.proxy.passed())
    check([*first_driven, *driven])
    mounts = rounds * len(lanes)
    late = max(0.0, wall(driven) / hour - 1) if hour else 0.0
    return Rotation(name, len(lanes), mounts, requests, cpu / mounts, first, late)


def seconds_of(duration: float, hour: float) -> str:
    """A duration of `duration` real seconds where `hour` seconds stand for an hour, as a flag takes it."""
    return f"{duration * hour / HOUR:.3f}s"


def rotations(stand: BenchStand, pods: int, hour: float) -> list[Rotation]:
    """An hour of re-mounts for static and dynamic secrets, kept and read anew."""

    def static(**parameters: str) -> list[Lane]:
        return [
            stand.static(stand.pod(f"boot-{pod}"), [f"boot/{pod}/{number}" for number in range(OBJECTS)], **parameters)
            for pod in range(pods)
        ]

    def dynamic(role: str = "app", **fields: str) -> list[Lane]:
        return [stand.dynamic(stand.pod(f"boot-{pod}"), role, **fields) for pod in range(pods)]

    def one_each(driven: Sequence[Driven]) -> None:
        """A pod has one credential all the time, and it opens the database."""
        users = {}
        for first, later in zip(driven[:pods], driven[pods:], strict=True):
            if len(first.answers) != 1 or first.answers != later.answers:
                raise BenchFailed("a kept credential changed")
            users[first.answers[0]["username"].decode()] = first.answers[0]["password"].decode()
        if len(users) != pods:
            raise BenchFailed("two pods share a credential")
        _log_in(stand, users)

    def never_twice(driven: Sequence[Driven]) -> None:
        """Each mount has another credential; the last ones open the database."""
        users = [answer["username"] for lane in driven for answer in lane.answers]
        mounts = sum(len(lane.times) for lane in driven)
        if len(set(users)) != mounts:
            raise BenchFailed(f"{len(set(users))} credentials for {mounts} mounts")
        last = [lane.answers[-1] for lane in driven[pods:]]
        _log_in(stand, {answer["username"].decode(): answer["password"].decode() for answer in last})

    # Whole seconds, since Vault's TTLs are.
    ttl = f"{round(hour)}s"
    stand.role("hour", ttl, f"{round(24 * hour)}s")
    after = seconds_of(300, hour)
    return [
        rotation(stand, "10 static objects", static()),
        rotation(stand, "10 static objects, `refreshAfter: 5m`", static(refreshAfter=after), hour=hour),
        rotation(
            stand, "10 static objects, nothing kept (`--cache-size=0`)", static(), "--cache-size=0", "--state-dir="
        ),
        rotation(stand, "database credential, kept", dynamic("hour"), hour=hour, check=one_each),
        rotation(stand, "database credential, `lease: fresh`", dynamic(lease="fresh"), check=never_twice),
    ]


def _log_in(stand: BenchStand, users: Mapping[str, str]) -> None:
    for user, password in users.items():
        if not stand.postgres.can_login(user, password):
            raise BenchFailed(f"PostgreSQL does not let {user} in")


@dataclass(frozen=True)
class FromMemory:
    """Re-mounts that are answered without Vault: seconds of the daemon's CPU, and of time, for each."""

    name: str
    cpu: Figure
    took: Figure


def from_memory(stand: BenchStand, runs: int, *, mounts: int = 1000, pods: int = 20) -> list[FromMemory]:
    """Re-mounts under `refreshAfter` and of kept leases, back to back, by `pods` pods."""
    stand.proxy.delay(0.005)
    paths = [f"one/{number}" for number in range(OBJECTS)]
    kinds = {
        "10 objects under `refreshAfter`": [stand.static(stand.pod(), paths, refreshAfter="1h") for _ in range(pods)],
        "a kept database credential": [stand.dynamic(stand.pod()) for _ in range(pods)],
    }
    found = []
    for name, lanes in kinds.items():
        with stand.daemon() as daemon:
            stand.load.drive(daemon.socket, lanes)
            until_quiet(stand)
            cpus, times = [], []
            for _ in range(runs):
                stand.proxy.forget()
                before = daemon.cpu()
                again = [dataclasses.replace(lane, rounds=mounts // pods) for lane in lanes]
                stand.load.drive(daemon.socket, again)
                cpus.append((daemon.cpu() - before) / mounts)
                one = stand.load.drive(daemon.socket, [dataclasses.replace(lanes[0], rounds=20)])
                times.append(statistics.median(one[0].seconds))
                if stand.proxy.passed().total:
                    raise BenchFailed(f"{name}: {stand.proxy.passed()} for what is in memory")
        found.append(FromMemory(name, figure(cpus), figure(times)))
    return found


@dataclass(frozen=True)
class FullNode:
    """A full node's re-mounts at kubelet's pace, and an hour's worth of them as fast as it goes.

    `core` is the part of one core that the daemon took at that pace; `memory` has MiB after each round of the hour,
    the first mounts' at its beginning.
    """

    pods: int
    seconds: float
    mounts: int
    core: float
    memory: tuple[float, ...]


def full_node(stand: BenchStand, pods: int, seconds: float, hour_rounds: int) -> FullNode:
    """`pods` pods of OBJECTS static objects, re-mounted once over `seconds`; then `hour_rounds` times."""
    stand.proxy.delay(0.005)
    paths = [[f"boot/{pod % PODS}/{number}" for number in range(OBJECTS)] for pod in range(pods)]
    lanes = [stand.static(stand.pod(f"boot-{pod}"), paths[pod]) for pod in range(pods)]
    with stand.daemon() as daemon:
        stand.load.drive(daemon.socket, lanes)
        until_quiet(stand)
        before = daemon.cpu()
        began = time.monotonic()
        spread = [dataclasses.replace(lane, offset=seconds * at / pods) for at, lane in enumerate(lanes)]
        stand.load.drive(daemon.socket, spread)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        core = (daemon.cpu() - before) / (time.monotonic() - began)
        stand.proxy.delay(0.0)
        memory = [daemon.memory()]
        for _ in range(hour_rounds):
            stand.load.drive(daemon.socket, lanes)
            memory.append(daemon.memory())
    return FullNode(pods, seconds, pods, core, tuple(memory))


# Large volumes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """A large volume's mount, and the slowest of the small mounts that went on beside it."""

    name: str
    took: Figure
    beside: Figure


def large(stand: BenchStand, daemon: Daemon, runs: int) -> tuple[Figure, list[Large]]:
    """Volumes of one large object and of many objects, with a volume of one object re-mounted back to back beside.

    The first figure is the small volume's mounts with nothing beside.
    """
    stand.proxy.delay(0.005)
    small = stand.static(stand.pod(), ["one/0"])
    stand.load.drive(daemon.socket, [small])
    alone = stand.load.drive(daemon.socket, [dataclasses.replace(small, rounds=20 * runs)])[0].seconds

    def measure(name: str, paths: Sequence[str]) -> Large:
        lane = stand.static(stand.pod(), paths)
        stand.load.drive(daemon.socket, [lane])
        took, beside = [], []
        for _ in range(runs):
            # The small ones are there before it, and after.
            around = dataclasses.replace(small, rounds=40)
            driven = stand.load.drive(daemon.socket, [dataclasses.replace(lane, offset=0.05), around])
            began, ended = driven[0].times[0]
            held = [end - start for start, end in driven[1].times if end > began and start < ended]
            if not held:
                raise BenchFailed("the small mounts had ended before the large one began")
            took.append(ended - began)
            beside.append(max(held))
        return Large(name, figure(took), figure(beside))

    found = [measure(f"{number} objects", [f"one/{at}" for at in range(number)]) for number in (50, 100, 200)]
    # Once its storage in memory holds values of megabytes, a boot's requests cost OpenBao five times the CPU.
    for size in (1.0, 2.0, 3.9):
        stand.secret(f"large/{size:g}", round(size * _MIB))
        found.append(measure(f"one object of {size:g} MiB", [f"large/{size:g}"]))
    return figure(alone), found


# Doing nothing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idle:
    """A daemon that holds the sessions of a booted node, and is left alone. All are per second but `memory`."""

    pods: int
    loop_wakeups: float
    all_wakeups: float
    core: float
    memory: float


def idle(stand: BenchStand, seconds: float, pods: int) -> Idle:
    """Watch it for a while, once the boot's connections have been told to go."""
    stand.proxy.delay(0.005)
    lanes = boot_lanes(stand, pods)
    with stand.daemon() as daemon:
        stand.load.drive(daemon.socket, lanes)
        until_quiet(stand)
        time.sleep(3)
        before, cpu, began = daemon.wakeups(), daemon.cpu(), time.monotonic()
        time.sleep(seconds)
        after, took = daemon.wakeups(), time.monotonic() - began
        return Idle(
            pods,
            (after[0] - before[0]) / took,
            (after[1] - before[1]) / took,
            (daemon.cpu() - cpu) / took,
            daemon.memory(),
        )


def start_up(stand: BenchStand, runs: int) -> Figure:
    """Seconds from exec until the socket is there."""
    times = []
    for _ in range(runs):
        with stand.daemon() as daemon:
            times.append(daemon.started_in)
    return figure(times)
