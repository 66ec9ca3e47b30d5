"""What one pod may ask for in a minute: counted, told, given back; and what others see of a pod that floods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from provider.cli import command, guardrails
from provider.render import RenderedFile
from provider.server import Server
from provider.server.limits import (
    AT_ONCE,
    MAX_PARSING_SECONDS,
    MAX_PODS,
    MAX_RENDERING_SECONDS,
    PERIOD,
    PodFloods,
    PodLimits,
    Spending,
)
from provider.settings import MIB, Settings, TlsSettings
from provider.spc import Parser, mounting_pod
from provider.spc.parameters import TOKENS
from provider.telemetry.events import Telemetry
from provider.turns import BULK, BULK_PLACES, Turns
from provider.v1alpha1 import service_pb2 as pb
from provider.v1alpha1 import service_pb2_grpc
from tests.flooder import KINDS
from tests.live import AUDIENCE, Cluster, Daemon, class_of
from tests.spc_classes import GIVEN, attributes
from tests.spc_hostile import CLASSES
from tests.stand.driver import Driver
from tests.stand.kubeapi import Pod
from tests.stand.openbao import OpenBao
from tests.test_server import PASSWORD, Mounting, dialled, result
from tests.test_tls import HandClock
from tests.tools import ROOT

# Seconds that a process may wait for its turn on a machine of two cores, a few times in a mount.
SLICES = 0.05
# No mount of others may take so long, in seconds, however busy the machine is; and few of them half a second. Those of
# one pod in five that stall show in no median.
STALL, SLOW, MOST_SLOW = 4.0, 0.5, 0.05
# The same of a daemon's memory: the manifests give it 384 MiB, of which this leaves a half to the process of templates.
MOST_MEMORY = 200 * MIB
# Mounts of 4 MiB, which together are more than that.
FAILING = 60
# A secret of 57 KiB that takes more than a MiB in memory, and keeps a Vault without an audit log busy for 7 ms.
LARGE_SECRET = {"api_key": "key-2", **{f"more-{number}": [[]] * 2400 for number in range(8)}}
# At once: 3 mounts, 10 objects, 2 MiB.
SMALL = Settings(max_pod_mounts=30, max_pod_objects=100, max_pod_mib=20)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def limits(clock: HandClock) -> PodLimits:
    return PodLimits(SMALL, clock)


def floods(limits: PodLimits, pod: str = "a") -> str:
    """What a pod that is over its share is told."""
    with pytest.raises(PodFloods) as told:
        limits.begin(pod)
    return str(told.value)


def spend(limits: PodLimits, spending: Spending, *amounts: float, pod: str = "a") -> None:
    for amount in amounts:
        limits.check(pod, spending)
        limits.spend(pod, spending, amount)


# --- the account ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spending", "amounts", "told"),
    [
        (Spending.MOUNTS, (1, 1, 1), "share, which is 30 mounts in a minute: .* --max-pod-mounts=60 would allow"),
        (Spending.OBJECTS, (9, 1), "share, which is 100 objects in a minute: .* --max-pod-objects=200 would allow"),
        (Spending.BYTES, (MIB, MIB), "share, which is 20 MiB of files in a minute: .* --max-pod-mib=40 would allow"),
        (
            Spending.PARSING,
            (AT_ONCE * MAX_PARSING_SECONDS,),
            f"share, which is {MAX_PARSING_SECONDS:g} seconds of reading its classes",
        ),
        (
            Spending.RENDERING,
            (AT_ONCE * MAX_RENDERING_SECONDS,),
            f"share, which is {MAX_RENDERING_SECONDS:g} seconds of rendering its files",
        ),
    ],
)
def test_a_pod_that_spent_its_share_is_told_which(
    limits: PodLimits, spending: Spending, amounts: tuple[float, ...], told: str
) -> None:
    """The refusal names what was asked for too often, and the flag and value that allow more; others go on."""
    spend(limits, spending, *amounts)
    assert re.search(told, floods(limits))
    limits.begin("b")


def test_a_large_share_is_told_as_the_flag_takes_it(clock: HandClock) -> None:
    """A refusal's advice can be followed as it stands, however large the number."""
    limits = PodLimits(replace(SMALL, max_pod_objects=2_000_000), clock)
    spend(limits, Spending.OBJECTS, 200_000)
    advised = re.search(r"is 2000000 objects in a minute: .* (--max-pod-objects=\S+) would", floods(limits))
    assert advised is not None
    settings = command.parse([advised[1]], {}, str).settings
    assert settings is not None
    assert settings.max_pod_objects == 4_000_000


def test_what_was_spent_comes_back_evenly(limits: PodLimits, clock: HandClock) -> None:
    """Thirty mounts a minute are one in two seconds, and three at once at most, however long the pod was quiet."""
    spend(limits, Spending.MOUNTS, 1, 1, 1)
    clock.seconds += 1.9
    floods(limits)
    clock.seconds += 0.2
    spend(limits, Spending.MOUNTS, 1)
    floods(limits)
    clock.seconds += 10 * PERIOD
    spend(limits, Spending.MOUNTS, 1, 1, 1)
    floods(limits)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 7.0])
def test_a_minutes_share_is_what_the_flag_says(limits: PodLimits, clock: HandClock, seconds: float) -> None:
    """A pod that asks every so often, for an hour, gets its share of a minute in each, and what it may have at once."""
    granted = 0
    for _ in range(int(3600 / seconds)):
        with contextlib.suppress(PodFloods):
            spend(limits, Spending.MOUNTS, 1)
            granted += 1
        clock.seconds += seconds
    assert granted <= 60 * 30 + 3
    assert granted >= min(60 * 30, int(3600 / seconds)) - 3


def test_a_mount_larger_than_the_limit_works_and_is_owed(limits: PodLimits, clock: HandClock) -> None:
    """A class of more objects than a minute's share is slowed down and never refused for good."""
    spend(limits, Spending.OBJECTS, 210)
    clock.seconds += 2 * PERIOD - 0.1
    floods(limits)
    clock.seconds += 0.2
    limits.begin("a")


def test_the_smallest_limit_allows_one_at_a_time(clock: HandClock) -> None:
    """One mount a minute is a mount, and the next one a minute later."""
    smallest = PodLimits(Settings(max_pod_mounts=1), clock)
    spend(smallest, Spending.MOUNTS, 1)
    floods(smallest)
    clock.seconds += PERIOD + 0.1
    spend(smallest, Spending.MOUNTS, 1)


def test_a_refusal_costs_nothing(limits: PodLimits, clock: HandClock) -> None:
    """Kubelet's tries while a pod is refused do not put off the one that succeeds."""
    spend(limits, Spending.MOUNTS, 1, 1, 1)
    for _ in range(100):
        floods(limits)
    clock.seconds += 2.1
    limits.begin("a")


def test_a_limit_of_zero_is_none(clock: HandClock) -> None:
    """The operator may lift each of the three."""
    lifted = PodLimits(Settings(max_pod_mounts=0, max_pod_objects=0, max_pod_mib=0), clock)
    for spending in (Spending.MOUNTS, Spending.OBJECTS, Spending.BYTES):
        spend(lifted, spending, *[1e9] * 3)


def test_pods_that_are_gone_are_forgotten(limits: PodLimits, clock: HandClock) -> None:
    """A node whose pods come and go for years holds those of the last minute."""
    for number in range(1000):
        spend(limits, Spending.MOUNTS, 1, pod=str(number))
        clock.seconds += 1
    assert len(limits._spent) <= PERIOD + 1


def test_the_number_of_pods_is_bounded(limits: PodLimits) -> None:
    """However many come at one time; who was seen last stays."""
    for number in range(MAX_PODS + 100):
        spend(limits, Spending.MOUNTS, 3, pod=str(number))
    assert len(limits._spent) == MAX_PODS
    floods(limits, str(MAX_PODS + 99))


# --- whose mount it is ------------------------------------------------------------------------------------


def test_the_pod_is_found_without_reading_the_class() -> None:
    """Also where the rest could not be read."""
    whole = attributes()
    pod = mounting_pod(whole)
    assert pod is not None
    assert (pod.namespace, pod.name, pod.uid) == ("shop", "web-0", GIVEN["csi.storage.k8s.io/pod.uid"])
    assert mounting_pod(whole[:-20]) == pod
    assert mounting_pod(whole.replace("pod.uid", "pod.id")) is None


def test_a_class_cannot_pass_for_another_pod() -> None:
    """A text of the class that looks like the driver's attributes is still a text."""
    forged = '"csi.storage.k8s.io/pod.uid":"victim"'
    for objects in (forged, forged + "\n" + "\\" + forged, json.dumps(forged), "\\" + forged):
        for names in ({"objects": objects}, {"zz": objects}, {objects: "x"}, {"a": "csi.storage.k8s.io/pod.uid"}):
            pod = mounting_pod(json.dumps({**GIVEN, **names}, sort_keys=True))
            assert pod is not None
            assert pod.uid == GIVEN["csi.storage.k8s.io/pod.uid"]
    # A parameter's name may be anything, and come after the driver's.
    for name in ('"csi.storage.k8s.io/pod.uid', '\\"csi.storage.k8s.io/pod.uid', " csi.storage.k8s.io/pod.uid"):
        pod = mounting_pod(json.dumps({**GIVEN, name: "victim"}))
        assert pod is not None
        assert pod.uid == GIVEN["csi.storage.k8s.io/pod.uid"]


# --- over the socket --------------------------------------------------------------------------------------


ONE = "- {objectName: password, secretPath: secret/data/app}"
TEN = "\n".join(f"- objectName: o{number}\n  secretPath: a" for number in range(10))
SOURCES = (
    "- {objectName: o, template: x, sources: {" + ", ".join(f"s{n}: {{secretPath: a{n}}}" for n in range(10)) + "}}"
)
FAULTY = "- {objectName: ../x, secretPath: a}"


class Caller:
    """A driver that mounts for pods; ``refusals`` are what it was told."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: service_pb2_grpc.CSIDriverProviderAsyncStub = service_pb2_grpc.CSIDriverProviderStub(channel)

    async def mount(self, objects: str = ONE, pod: str = "web-0") -> str:
        """How a mount of a pod, whose UID is its name, ends: OK, or code and message."""
        named = {"csi.storage.k8s.io/pod.uid": pod, "csi.storage.k8s.io/pod.name": pod}
        text = attributes(objects, **named)
        request = pb.MountRequest(attributes=text, secrets="null", target_path="/v", permission="420")
        try:
            await self._stub.Mount(request)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {error.details()}"
        return "OK"


@contextlib.asynccontextmanager
async def serving(path: Path, mounts: Mounting, settings: Settings = SMALL) -> AsyncIterator[Caller]:
    """A server within limits whose clock stands still, and its caller."""
    limits = PodLimits(settings, HandClock())
    server = Server(str(path), Parser(settings), mounts, 30, Telemetry(), limits=limits, connection_age=0.2)
    await server.start()
    try:
        async with dialled(path) as channel:
            yield Caller(channel)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("objects", "mounts", "which"),
    [(ONE, 3, "mounts"), (FAULTY, 3, "mounts"), (TEN, 1, "objects"), (SOURCES, 1, "objects")],
    ids=["mounts", "faulty classes", "objects", "sources"],
)
async def test_a_pod_over_its_share_is_refused_and_others_are_not(
    tmp_path: Path, objects: str, mounts: int, which: str
) -> None:
    """FAILED_PRECONDITION, which kubelet tries again, with what was too much; other pods are mounted as before."""
    async with serving(tmp_path / "s", Mounting(PASSWORD)) as caller:
        before = [await caller.mount(objects) for _ in range(mounts)]
        assert all(("INVALID_ARGUMENT" in outcome) if objects is FAULTY else (outcome == "OK") for outcome in before)
        refused = await caller.mount(objects)
        assert refused.startswith("FAILED_PRECONDITION this pod has asked for more than its share")
        assert which in refused
        assert await caller.mount(pod="other") == "OK"


async def test_mounts_at_one_time_do_not_pass_together(tmp_path: Path) -> None:
    """Of many that come before the first of them is read, as many are mounted as the pod's share allows."""
    hostile = json.loads(CLASSES["many sources"]())["objects"]
    settings = replace(SMALL, max_pod_mounts=0)
    async with serving(tmp_path / "s", Mounting(PASSWORD), settings) as caller:
        # While this one is read, they all arrive.
        first = asyncio.create_task(caller.mount(hostile, "other"))
        await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(*(caller.mount(f"{TEN}\n# {number}") for number in range(8)))
        await first
    assert outcomes.count("OK") == 1
    assert sum("more than its share" in outcome for outcome in outcomes) == 7


async def test_what_files_hold_is_counted(tmp_path: Path) -> None:
    """A pod whose files came to its MiB is refused, though it has few of them."""
    large = result(RenderedFile("password", 0o600, b"x" * (2 * MIB)))
    async with serving(tmp_path / "s", Mounting(large)) as caller:
        assert await caller.mount() == "OK"
        assert "20 MiB of files" in await caller.mount()
        assert await caller.mount(pod="other") == "OK"


async def test_reading_hostile_classes_is_counted(tmp_path: Path) -> None:
    """Another hostile class each time is read for a few tenths of a second, and then no more."""
    hostile = json.loads(CLASSES["many sources"]())["objects"]
    async with serving(tmp_path / "s", Mounting(PASSWORD), Settings()) as caller:
        told = await asyncio.gather(*(caller.mount(f"{hostile}\n# {number}") for number in range(6)))
        told.append(await caller.mount(f"{hostile}\n# 7"))
    assert any(outcome.startswith("INVALID_ARGUMENT") for outcome in told)
    assert sum("seconds of reading its classes" in outcome for outcome in told[:-1]) >= 3
    assert "seconds of reading its classes" in told[-1]


async def test_classes_of_others_are_read_between_those_of_one_pod(tmp_path: Path) -> None:
    """However many large classes a pod has waiting, another pod's is read after one of them at most."""
    hostile = json.loads(CLASSES["many sources"]())["objects"]
    async with serving(tmp_path / "s", Mounting(PASSWORD), Settings()) as caller:
        ended: list[str] = []

        async def mount(objects: str, pod: str) -> None:
            await caller.mount(objects, pod)
            ended.append(pod)

        many = [asyncio.create_task(mount(f"{hostile}\n# {number}", "flooder")) for number in range(8)]
        await asyncio.sleep(0.05)
        await mount(ONE, "other")
        assert ended.index("other") <= 2
        await asyncio.gather(*many)


async def test_who_has_hundreds_of_reads_waiting_is_served_two_at_a_time() -> None:
    """From when places come back, and until what waits is what a class of two hundred objects has."""
    turns = Turns(60)
    held: list[int] = []
    now = 0

    async def read() -> None:
        nonlocal now
        await turns.take("bulk")
        now += 1
        held.append(now)
        await asyncio.sleep(0)
        now -= 1
        turns.give("bulk")

    await asyncio.gather(*(read() for _ in range(600)))
    began, ended = held.index(max(held)) + 1, 600 - BULK
    assert max(held[:began]) > 50
    assert max(held[began + 60 : ended]) == BULK_PLACES
    assert turns.free == 60


# --- what is told at the start ----------------------------------------------------------------------------


def test_the_guardrails_are_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Open or closed: one line at the start has them all."""
    caplog.set_level(logging.INFO)
    guardrails.tell(Settings())
    (bare,) = caplog.records
    assert bare.getMessage().startswith("guardrails: open")
    assert (bare.vault_addresses, bare.tls_files, bare.skip_tls_verify) == ("any", "any", "allowed")  # type: ignore[attr-defined]
    caplog.clear()
    guardrails.tell(Settings(hardened=True))
    (hardened,) = caplog.records
    assert hardened.getMessage() == "guardrails: hardened"
    assert (hardened.vault_addresses, hardened.tls_files) == ("--vault-addr alone", "none")  # type: ignore[attr-defined]
    assert (hardened.skip_tls_verify, hardened.unknown_fields) == ("refused", "refused")  # type: ignore[attr-defined]
    caplog.clear()
    opened = Settings(
        hardened=True,
        allowed_vault_addresses=("*.example.com",),
        tls_root="/tls",
        allow_skip_tls_verify=True,
        unknown_fields_fail=False,
        max_pod_mounts=0,
    )
    guardrails.tell(opened)
    (told,) = caplog.records
    assert (told.vault_addresses, told.tls_files) == ("*.example.com", "below /tls")  # type: ignore[attr-defined]
    assert (told.skip_tls_verify, told.unknown_fields) == ("allowed", "warned of")  # type: ignore[attr-defined]
    assert told.pod_mounts_a_minute == "any"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (Settings(vault_addr="http://vault:8200"), "--vault-addr allows http://vault:8200 without TLS"),
        (Settings(allowed_vault_addresses=("http://*.lab",)), "--allowed-vault-addresses allows http://*.lab"),
        (Settings(tls=TlsSettings(skip_verify=True)), "--vault-tls-skip-verify is on"),
    ],
)
def test_what_the_operators_own_flags_leave_open_is_warned_of(
    settings: Settings, warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Hardened, an address by http that the operator names stays allowed, and the log says what that means."""
    guardrails.tell(replace(settings, hardened=True))
    assert any(
        record.levelno == logging.WARNING and record.getMessage().startswith(warned) for record in caplog.records
    )


# --- on the stand -----------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_that_floods_leaves_others_their_latency(tmp_path: Path, kind: str) -> None:
    """A real daemon, a real Vault, and a pod that mounts as fast as it is answered: it gets refusals, while the median
    of others' mounts stays within twice what it was just before, and a few slices of a busy machine's processor.
    """
    with Cluster(tmp_path, bao=OpenBao()) as cluster, contextlib.ExitStack() as parts:
        cluster.role("app")
        daemon = parts.enter_context(Daemon(cluster))
        driver = parts.enter_context(Driver(daemon.socket))
        fields = "secretPath: shop/data/app, secretKey: api_key"
        small = class_of("app", *(f"{{objectName: o{number}, {fields}}}" for number in range(10)))
        pods = [cluster.kube.add_pod("shop", f"other-{number}", service_account="app") for number in range(5)]

        def taken_within(seconds: float) -> list[float]:
            taken = []
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for pod in pods:
                    began = time.monotonic()
                    cluster.mount(driver, pod, small)
                    taken.append(time.monotonic() - began)
                    time.sleep(0.02)
            return taken

        taken_within(1)
        usual = statistics.median(taken_within(4))
        flooder = cluster.kube.add_pod("shop", "flooder", service_account="app")
        name, count = ("large", 300) if kind == "answers" else ("app", 1000)
        cluster.bao.write_kv("shop/data/large", LARGE_SECRET)
        asked = (
            f"{{objectName: o{n}, secretPath: 'shop/data/{name}?n={n}', secretKey: api_key}}" for n in range(count)
        )
        token = {"token": cluster.tokens(flooder)[AUDIENCE], "expirationTimestamp": "2100-01-01T00:00:00Z"}
        given = {
            **class_of("app", *asked),
            **GIVEN,
            "roleName": "app",
            "csi.storage.k8s.io/pod.name": flooder.name,
            "csi.storage.k8s.io/pod.uid": flooder.uid,
            "csi.storage.k8s.io/serviceAccount.name": "app",
            TOKENS: json.dumps({AUDIENCE: token}),
        }
        flooding = subprocess.Popen(
            [sys.executable, "-m", "tests.flooder", str(daemon.socket), kind, "8"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert flooding.stdin is not None
        assert flooding.stdout is not None
        with flooding:
            flooding.stdin.write(json.dumps(given) + "\n")
            flooding.stdin.flush()
            assert flooding.stdout.readline() == "flooding\n"
            taken = taken_within(8)
            flooding.stdin.close()
            told = json.loads(flooding.stdout.readline())
        assert told["outcomes"]["REFUSED"] > 0, told
        assert set(told["outcomes"]) <= {"OK", "REFUSED", "INVALID_ARGUMENT", "TOO_LARGE"}, told
        # A Vault that has the same two processors is what large answers keep busy, and nothing here can spare it that.
        if kind != "answers":
            assert statistics.median(taken) <= 2 * usual + SLICES, (usual, taken, told)
        assert max(taken) < STALL, (usual, sorted(taken)[-5:], told)
        assert sum(seconds > SLOW for seconds in taken) <= MOST_SLOW * len(taken), (usual, sorted(taken)[-9:], told)
        assert peak_memory(daemon) < MOST_MEMORY


def peak_memory(daemon: Daemon) -> int:
    """The most bytes that the daemon has had in memory until now."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


@pytest.mark.parametrize("parameters", [{}, {"refreshAfter": "1h"}], ids=["read each time", "remembered"])
def test_a_class_of_large_answers_takes_little_memory(tmp_path: Path, parameters: dict[str, str]) -> None:
    """A hardened daemon, a real Vault, and a class of 60 objects of a secret that is large in memory, in several pods
    at once: it is told what is too much, and others are mounted meanwhile.
    """
    with Cluster(tmp_path, bao=OpenBao()) as cluster, contextlib.ExitStack() as parts:
        cluster.role("app")
        cluster.bao.write_kv("shop/data/large", LARGE_SECRET)
        daemon = parts.enter_context(Daemon(cluster, "--hardened"))
        driver = parts.enter_context(Driver(daemon.socket))

        def mount(pod: Pod, objects: Sequence[str]) -> str:
            """How it ends: the first file, or the message."""
            try:
                mounted = cluster.mount(driver, pod, class_of("app", *objects) | parameters)
            except grpc.RpcError as error:
                return f"{error.code().name} {error.details()}"
            return mounted.text("o0")

        small = ["{objectName: o0, secretPath: shop/data/app, secretKey: api_key}"]
        wanted = []
        for pod in range(4):  # each reads its own, which nobody shares
            paths = [f"secretPath: 'shop/data/large?n={pod}-{number}'" for number in range(60)]
            many = [f"{{objectName: o{n}, {path}, secretKey: api_key}}" for n, path in enumerate(paths)]
            wanted += [small, many[:2], many]
        with ThreadPoolExecutor(len(wanted)) as threads:
            pods = [cluster.kube.add_pod("shop", f"pod-{n}", service_account="app") for n in range(len(wanted))]
            ended = list(threads.map(mount, pods, wanted))
        for objects, outcome in zip(wanted, ended, strict=True):
            if len(objects) == 60:
                assert outcome.startswith("FAILED_PRECONDITION"), outcome
                assert "come to more than 32 MiB in memory" in outcome
            else:
                assert outcome == ("key-1" if objects is small else "key-2")
        assert peak_memory(daemon) < MOST_MEMORY


def test_mounts_that_fail_keep_nothing(tmp_path: Path) -> None:
    """A class of large secrets and one that is not there fails each time, as often as kubelet tries: what it read goes
    with each try.
    """
    with Cluster(tmp_path) as cluster, Daemon(cluster) as daemon, Driver(daemon.socket) as driver:
        cluster.role("app")
        cluster.bao.write_kv("shop/data/large", {"key": "x" * 900 * 1024})
        objects = [f"{{objectName: o{n}, secretPath: shop/data/large, secretKey: key}}" for n in range(4)]
        objects.append("{objectName: none, secretPath: shop/data/none, secretKey: key}")
        for number in range(FAILING):
            with pytest.raises(grpc.RpcError) as failed:
                cluster.mount(driver, cluster.pod(f"app-{number}"), class_of("app", *objects))
            assert failed.value.code() is grpc.StatusCode.NOT_FOUND
        assert peak_memory(daemon) < MOST_MEMORY
