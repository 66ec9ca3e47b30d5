"""The audit log of the daemon as a program before real OpenBao and PostgreSQL, and joined with OpenBao's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.live import (
    CERTIFICATE,
    DATABASE,
    NAMESPACE,
    NODE,
    STATIC,
    Cluster,
    Daemon,
    class_of,
    credential,
)
from tests.stand.driver import Driver
from tests.stand.waiting import eventually
from tests.tools import ROOT, jq

PAGE = (ROOT / "docs" / "audit.md").read_text()
SWEEPS = (f"--node-name={NODE}", "--sweep-interval=1s")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("audit")) as cluster:
        yield cluster


class Audited:
    """A daemon that writes an audit log to `path`, and a driver of it."""

    def __init__(self, cluster: Cluster, path: Path, *flags: str) -> None:
        self.path = path
        self.daemon = Daemon(cluster, f"--audit-log={path}", *SWEEPS, *flags)

    def __enter__(self) -> Audited:
        self.daemon.__enter__()
        self.driver = Driver(self.daemon.socket)
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()
        self.daemon.__exit__()

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The lines so far, of one `event` or of all."""
        told: list[dict[str, Any]] = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in told if event in ("", line["event"])]

    def await_lines(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The lines of one `event`, as soon as there are `count`."""
        eventually(lambda: len(self.lines(event)) >= count, f"{count} lines of {event}", seconds=60)
        return self.lines(event)


def test_life_of_a_credential_is_told_without_it(cluster: Cluster, tmp_path: Path) -> None:
    """Login, issue, mount, renewal, refusal and the pod's end each have a line; no value, token or lease id has."""
    cluster.role("told", ttl="6s", token_ttl="6s")
    objects = (*DATABASE, *STATIC, *CERTIFICATE)
    with Audited(cluster, tmp_path / "audit.log") as audited:
        pod = cluster.pod("told")
        tokens = cluster.tokens(pod)
        mounted = audited.driver.mount(pod, class_of("told", *objects), tokens=tokens)
        (lease_id,) = cluster.bao.leases("database/creds/told")
        accessor = cluster.bao.requests("database/creds/told")[0].accessor
        audited.driver.remount(mounted)
        with pytest.raises(grpc.RpcError):
            cluster.mount(audited.driver, pod, class_of("told", "{objectName: a, secretPath: shop/data/none}"), "none")
        with pytest.raises(grpc.RpcError):
            cluster.mount(audited.driver, cluster.pod("stranger"), class_of("told", *STATIC) | {"roleName": "nobody"})
        audited.await_lines("renewal", 2)
        cluster.kube.remove_pod(pod)
        audited.await_lines("revocation")
        lines, text = audited.lines(), audited.path.read_text()
        # The daemon's own words too, since reasons stand in both.
        text += audited.daemon.process.log.read_text()
    (mount,) = audited.lines("mount")
    (login, denied) = audited.lines("login")
    issues = {line["path"]: line for line in audited.lines("issue")}
    assert issues.keys() == {"database/creds/told", "pki/issue/web"}
    assert (mount["pod"], mount["pod_uid"], mount["node"]) == ("told", pod.uid, NODE)
    assert {made["object"]: made["kind"] for made in mount["objects"]} == {
        "db-username": "leased", "db-password": "leased", "api-key": "static", "tls.crt": "issued", "tls.key": "issued",
    }  # fmt: skip
    assert {made["object"]: made["version"] for made in mount["objects"]} == dict(mounted.versions)
    hashed = hashlib.sha256(lease_id.encode()).hexdigest()
    assert mount["objects"][0]["lease_sha256"] == [hashed] == [issues["database/creds/told"]["lease_sha256"]]
    assert mount["objects"][0]["request_ids"] == [issues["database/creds/told"]["request_id"]]
    assert {line["accessor"] for line in (mount, login, *issues.values())} == {accessor}
    names = {path: [wanted["object"] for wanted in line["objects"]] for path, line in issues.items()}
    assert names == {"database/creds/told": ["db-username", "db-password"], "pki/issue/web": ["tls.crt", "tls.key"]}
    assert all(line["milliseconds"] > 0 for line in issues.values())
    assert {line["path"] for line in audited.lines("renewal")} >= {"auth/token", "database/creds/told"}
    asked = asked_of(cluster)
    assert asked[login["request_id"]] == "auth/told/login"
    for renewed in audited.lines("renewal"):
        path = "auth/token/renew-self" if renewed["path"] == "auth/token" else "sys/leases/renew"
        assert asked[renewed["request_id"]] == path
    assert (denied["outcome"], denied["code"]) == ("refused", "PERMISSION_DENIED")
    missing, stranger = audited.lines("refusal")
    assert (missing["code"], missing["objects"]) == ("NOT_FOUND", [{"object": "a", "paths": ["shop/data/none"]}])
    assert (stranger["code"], stranger["role"]) == ("PERMISSION_DENIED", "nobody")
    (revoked, *_) = audited.lines("revocation")
    assert (revoked["outcome"], revoked["why"], revoked["accessor"]) == ("ok", "pod gone", accessor)
    assert (audited.path.stat().st_mode & 0o777, lines[0]["event"]) == (0o600, "start")
    user, password = credential_of(mounted.files)
    secrets = {"key-1", password, user, mounted.files["tls.key"].contents.decode(), lease_id, *tokens.values()}
    assert [secret for secret in secrets if secret in text] == []
    assert not re.search(r"\b(?:hvs|s)\.[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{10,}", text)
    told = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert {field for line in lines for field in (line["event"], *line)} - told == set()
    assert {field for made in mount["objects"] for field in made} - told == set()


def asked_of(cluster: Cluster) -> dict[str, str]:
    """The path of each request that OpenBao's own log has an answer to, by its id."""
    entries = map(json.loads, cluster.bao.audit_path.read_text().splitlines())
    return {
        entry["request"]["id"]: entry["request"]["path"]
        for entry in entries
        if entry["type"] == "response" and "id" in entry["request"]
    }


def credential_of(files: Any) -> tuple[str, str]:
    return files["db-username"].contents.decode(), files["db-password"].contents.decode()


def test_what_is_issued_on_every_mount_is_told_each_time(cluster: Cluster, tmp_path: Path) -> None:
    """Under `lease: fresh` each mount has an issue of its own for a lease and for a certificate, joined by request."""
    cluster.role("fresh")
    fresh = [entry.replace("{", "{lease: fresh, ", 1) for entry in (DATABASE[0], CERTIFICATE[0])]
    # A certificate that is stored is no more than a secret, whatever its keys are called.
    cluster.bao.write_kv("shop/data/stored", {"certificate": "c", "serial_number": "1", "expiration": 4_000_000_000})
    stored = "{objectName: stored, lease: fresh, secretPath: shop/data/stored}"
    with Audited(cluster, tmp_path / "audit.log") as audited:
        volume = cluster.mount(audited.driver, cluster.pod("fresh"), class_of("fresh", *fresh, stored))
        audited.driver.remount(volume)
        audited.await_lines("remount")
        mounts = [*audited.lines("mount"), *audited.lines("remount")]
    kinds = {"db-username": "leased", "tls.crt": "issued", "stored": "static"}
    assert [{made["object"]: made["kind"] for made in mount["objects"]} for mount in mounts] == [kinds] * 2
    supplied = {
        (name, made["object"], made["kind"])
        for mount in mounts
        for made in mount["objects"]
        for name in made["request_ids"]
        if made["kind"] != "static"
    }
    issues = audited.lines("issue")
    told = {(line["request_id"], wanted["object"], line["kind"]) for line in issues for wanted in line["objects"]}
    assert (told, len(issues)) == (supplied, 4)
    assert all(0 < line["ttl_seconds"] <= 3600 for line in issues)


def test_issue_names_the_class_that_asked(cluster: Cluster, tmp_path: Path) -> None:
    """Of two volumes of a pod that are mounted at once, the one whose class has no credential is not named for it."""
    cluster.role("classes")
    with (
        Audited(cluster, tmp_path / "audit.log") as audited,
        Driver(audited.daemon.socket) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        pod = cluster.pod("classes")
        cluster.bao.pause()
        leased = pool.submit(cluster.mount, audited.driver, pod, class_of("classes", *DATABASE), "leased")
        time.sleep(0.3)
        static = pool.submit(cluster.mount, second, pod, class_of("classes", *STATIC), "static")
        time.sleep(0.3)
        cluster.bao.resume()
        for under_way in (leased, static):
            under_way.result()
        (issue,) = audited.await_lines("issue")
    assert issue["class"] == "leased"
    assert [wanted["object"] for wanted in issue["objects"]] == ["db-username", "db-password"]


def test_pods_that_shared_a_read_have_its_request(cluster: Cluster, tmp_path: Path) -> None:
    """Two pods that got the answer of one request both name it, and OpenBao's own log has it once."""
    cluster.role("shared")
    with (
        Audited(cluster, tmp_path / "audit.log") as audited,
        Driver(audited.daemon.socket) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        pods = [cluster.kube.add_pod(NAMESPACE, name, service_account="web", node=NODE) for name in ("one", "two")]
        drivers = (audited.driver, second)
        volumes = [
            cluster.mount(driver, pod, class_of("shared", *STATIC)) for driver, pod in zip(drivers, pods, strict=True)
        ]
        # Until two re-mounts came so close together that they had one read; mostly the first time.
        for attempt in range(20):
            cluster.bao.write_kv("shop/data/app", {"api_key": f"key-of-{attempt}"})
            before = len(cluster.bao.requests("shop/data/app"))
            cluster.bao.pause()
            under_way = [pool.submit(driver.remount, volume) for driver, volume in zip(drivers, volumes, strict=True)]
            time.sleep(0.2 * (attempt + 1))
            cluster.bao.resume()
            for future in under_way:
                future.result()
            if len(cluster.bao.requests("shop/data/app")) == before + 1:
                break
        one, two = audited.await_lines("remount", 2 * (attempt + 1))[-2:]
    assert {one["pod"], two["pod"]} == {"one", "two"}
    (request_id,) = one["objects"][0]["request_ids"]
    assert two["objects"][0]["request_ids"] == [request_id]
    answers = [json.loads(line) for line in cluster.bao.audit_path.read_text().splitlines()]
    found = [entry for entry in answers if entry["type"] == "response" and entry["request"].get("id") == request_id]
    assert [entry["request"]["path"] for entry in found] == ["shop/data/app"]


def recipes() -> dict[str, str]:
    """The commands of the page, by the heading that they stand below."""
    parts = re.split(r"^### (.*)$", PAGE.split("## Recipes")[1], flags=re.MULTILINE)[1:]
    return {
        heading: "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def follow(recipe: str, directory: Path, **environ: str) -> list[list[str]]:
    """The cells of the lines that the page's commands print in a directory."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "jq").unlink(missing_ok=True)
    (programs / "jq").symlink_to(jq())
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", recipe], cwd=directory, env={"PATH": path, **environ}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_recipes_of_the_page(cluster: Cluster, tmp_path: Path) -> None:
    """The page's own commands tell which pods got which version of a secret, who had a lease, and who was refused."""
    cluster.role("recipe")
    with Audited(cluster, tmp_path / "audit.log") as audited:
        cluster.bao.write_kv("shop/data/recipe", {"password": "first"})
        secret = "{objectName: pass, secretPath: shop/data/recipe, secretKey: password}"
        wanted, wrong = class_of("recipe", secret, *DATABASE), class_of("recipe", "{objectName: a, secretPath: shop/b}")
        volumes = {name: cluster.mount(audited.driver, cluster.pod(name), wanted) for name in ("early", "late")}
        user, _ = credential(volumes["early"])
        cluster.bao.write_kv("shop/data/recipe", {"password": "second"})
        for _ in range(2):
            audited.driver.remount(volumes["early"])
        cluster.mount(audited.driver, cluster.pod("new"), wanted)
        with pytest.raises(grpc.RpcError):
            cluster.mount(audited.driver, cluster.pod("wrong"), wrong)
        audited.await_lines("refusal")
        leases = cluster.bao.leases("database/creds/recipe")
        mounts = audited.lines("mount")
    # As an outage may leave it: a cut line does not end the recipe.
    with audited.path.open("a") as file:
        file.write('{"time":"cut o')
    shutil.copy(cluster.bao.audit_path, tmp_path / "vault-audit.log")
    versions, lease, refused = recipes().values()
    told = follow(versions.replace("shop/data/app", "shop/data/recipe"), tmp_path)
    assert [row[1:] for row in told] == [
        [NODE, "shop/early", "pass", "version 1"],
        [NODE, "shop/late", "pass", "version 1"],
        [NODE, "shop/early", "pass", "version 2"],
        [NODE, "shop/new", "pass", "version 2"],
    ]
    assert [row[0] for row in told] == sorted(row[0] for row in told)
    (early,) = [line for line in mounts if line["pod"] == "early"]
    digests = {digest for made in early["objects"] for digest in made["lease_sha256"]}
    (lease_id,) = [each for each in leases if hashlib.sha256(each.encode()).hexdigest() in digests]
    found = [json.loads("\t".join(row)) for row in follow(lease, tmp_path, LEASE_ID=lease_id)]
    assert {line["pod"] for line in found} == {"early"}
    assert {line["event"] for line in found} == {"issue", "mount", "remount"}
    (hash_line,) = follow(re.findall(r"^(printf .*)$", PAGE, re.MULTILINE)[0], tmp_path, LEASE_ID=lease_id)
    assert hash_line == [hashlib.sha256(lease_id.encode()).hexdigest()]
    ((_, event, pod, code, reason),) = follow(refused, tmp_path)
    assert (event, pod, code) == ("refusal", "shop/wrong", "PERMISSION_DENIED")
    assert "shop/b" in reason
    assert user not in audited.path.read_text()


def test_mounts_go_on_while_it_cannot_be_written(cluster: Cluster, tmp_path: Path) -> None:
    """With its directory gone mounts succeed and the log says so once; what waited is written when it is back."""
    cluster.role("gone")
    directory, away = tmp_path / "audit", tmp_path / "away"
    directory.mkdir()
    path = directory / "audit.log"
    with Audited(cluster, path) as audited:
        cluster.mount(audited.driver, cluster.pod("before"), class_of("gone", *STATIC))
        audited.await_lines("mount")
        directory.rename(away)
        for name in ("during", "too"):
            cluster.mount(audited.driver, cluster.pod(name), class_of("gone", *STATIC))
        eventually(lambda: audited.daemon.said("the audit log cannot be written"), "the outage is told")
        away.rename(directory)
        eventually(lambda: audited.daemon.said("the audit log is written again"), "its end is told")
        # The log tells it after the first of the lines that waited.
        told = audited.await_lines("mount", 3)
        assert [line["pod"] for line in told] == ["before", "during", "too"]
        said = [event["message"] for event in audited.daemon.events()]
    assert sum(message.startswith("the audit log cannot be written") for message in said) == 1


def test_daemon_that_ends_in_an_outage_says_what_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """With its directory gone until the end, the log counts the lines; the next daemon goes on after a torn one."""
    cluster.role("ended")
    directory = tmp_path / "audit"
    directory.mkdir()
    path = directory / "audit.log"
    with Audited(cluster, path) as audited:
        audited.await_lines("start")
        shutil.rmtree(directory)
        cluster.mount(audited.driver, cluster.pod("ended"), class_of("ended", *STATIC))
        eventually(lambda: audited.daemon.said("the audit log cannot be written"), "the outage is told")
        audited.daemon.terminate()
        (lost,) = [event for event in audited.daemon.events() if event["message"].startswith("the daemon ends, and")]
    assert lost["lines"] == 2  # of the login and of the mount
    directory.mkdir()
    path.write_text('{"event":"remount","torn')
    with Audited(cluster, path):
        eventually(lambda: "start" in path.read_text(), "the next one writes")
    torn, start = path.read_text().splitlines()
    assert (torn, json.loads(start)["event"]) == ('{"event":"remount","torn', "start")


class Quiet(Daemon):
    """A daemon whose log need not say when it serves mounts: its socket is there from then on."""

    def said(self, words: str) -> bool:
        return self.socket.exists()


@pytest.mark.parametrize("level", ["info", "warn"])
def test_stderr_has_both_logs(cluster: Cluster, level: str) -> None:
    """On stderr each line of the audit log is one of JSON among those of the log, whatever the log's level is."""
    cluster.role(level)
    with Quiet(cluster, "--audit-log=stderr", f"--log-level={level}") as daemon, Driver(daemon.socket) as driver:
        cluster.mount(driver, cluster.pod(level), class_of(level, *STATIC))
        daemon.terminate()
        lines = daemon.events()
    assert [line["event"] for line in lines if "severity" not in line] == ["start", "login", "mount"]
    assert (level == "info") == any(line.get("message") == "mounted" for line in lines)


def test_off_costs_nothing() -> None:
    """Without an audit log none of it is loaded."""
    script = (
        "import asyncio, sys\n"
        "from provider.cli import parts\n"
        "from provider.settings import Settings\n"
        "from provider.telemetry.lines import LineWriter\n"
        "async def run():\n"
        "    async with parts.build(Settings(kubeconfig='/none'), stderr=LineWriter('stderr', print)):\n"
        "        print('provider.telemetry.audit' in sys.modules)\n"
        "asyncio.run(run())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
