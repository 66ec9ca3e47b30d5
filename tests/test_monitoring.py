"""Alerts, dashboard and runbook: what they say fires, exists in the daemon, and is written about."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from provider.cli.command import parse
from provider.cli.flags import FLAGS
from provider.telemetry.families import FAMILIES
from provider.telemetry.metrics import FRESH_SECONDS, METHODS, STATUSES
from provider.telemetry.metrics import OTHER as ANY_OTHER
from tests.live import DATABASE, STATIC, Cluster, Daemon, class_of
from tests.scrape import Scrape
from tests.stand.driver import Driver
from tests.stand.process import free_port
from tests.stand.waiting import eventually
from tests.test_metrics import Told, request
from tests.test_volumes import mounted, refused
from tests.tools import ROOT, promtool

MONITORING = ROOT / "deploy" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

# What the tests' daemons, pods and nodes are called.
POD_LABELS = {"namespace": "vault-csi-provider", "pod": "vault-csi-provider-x", "node": "node-1"}
HELD = {**POD_LABELS, "instance": "10.0.0.1:8080"}
JOB = {"job": "provider"}
WEB = {"pod_namespace": "shop", "pod_name": "web-0", "node": "node-1"}


def named(name: str, **labels: str) -> str:
    """A series as promtool takes it."""
    return name + "{" + ", ".join(f'{label}="{value}"' for label, value in labels.items()) + "}"


def told(name: str, **labels: str) -> str:
    """A series of the daemon on node-1, as Prometheus knows it."""
    return named(name, **HELD, **JOB, **labels)


def of_node(series: str, number: int) -> str:
    """The series of the daemon on another node."""
    return (
        series.replace("provider-x", f"provider-{number}")
        .replace("node-1", f"node-{number}")
        .replace("10.0.0.1:", f"10.0.0.{number}:")
    )


HOUR = 60
"""As many minutes as the series of what an alert must be quiet at have at most."""


NEVER = 1e9
"""For +Inf, which promtool does not read: no lease ends."""


# Series in promtool's words, at a scrape each half minute.
def flat(value: float, minutes: float) -> str:
    """The value for so long."""
    return f"{value:g}x{round(2 * minutes) - 1}"


def grow(start: float, by: float, minutes: float) -> str:
    """A value that changes by so much a minute."""
    return f"{start:g}{by / 2:+g}x{round(2 * minutes) - 1}"


def none(minutes: float) -> str:
    """No series yet."""
    return f"_x{round(2 * minutes)}"


def ended(minutes: float) -> str:
    """The scrape does not have the series any more."""
    return f"stale _x{round(2 * minutes) - 1}"


def line(*parts: str) -> str:
    """One after the other."""
    return " ".join(parts)


@dataclass(frozen=True)
class Fires:
    """Series under which an alert fires at a minute, and is quiet at another before."""

    why: str
    series: Mapping[str, str]
    summary: str
    minute: int
    labels: Mapping[str, str] = field(default_factory=dict)
    quiet_at: int = 0


@dataclass(frozen=True)
class Quiet:
    """Series under which an alert fires at no time."""

    why: str
    series: Mapping[str, str]


AWAY = told("vault_csi_vault_away", address="https://v", known="true")
TYPO = told("vault_csi_vault_away", address="https://typo", known="false")
SEALED = told("vault_csi_vault_looks_total", status="503")
ANSWERED = told("vault_requests_total", method="GET", path="secret/", status="200")
FAILING = told("vault_csi_volume_failing_seconds", pod_namespace="shop", pod_name="web-0", mounted="true")
NEVER_MOUNTED = FAILING.replace('mounted="true"', 'mounted="false"')
OVER = told("vault_csi_lease_earliest_end_seconds", renewal="over")
DUE = told("vault_csi_lease_earliest_end_seconds", renewal="due")
REMOUNT = told("vault_csi_lease_earliest_end_seconds", renewal="remount")
RENEWED = told("vault_csi_renewals_total", what="lease", outcome="renewed")
UNANSWERED = told("vault_csi_renewals_total", what="lease", outcome="unanswered")
REVOKED = told("vault_csi_revocations_total", outcome="revoked")
REFUSED = told("vault_csi_revocations_total", outcome="refused")
UNREVOKED = told("vault_csi_revocations_total", outcome="unanswered")
SWEPT = told("vault_csi_sweeps_total", outcome="done")
UNSWEPT = told("vault_csi_sweeps_total", outcome="failed")
OUTAGE = told("vault_csi_audit_outage")
LOST = told("vault_csi_audit_lines_lost_total")
BUILD = told("vault_csi_build_info", version="1", python="3.11")

# kube-state-metrics'.
DAEMONSET = {"namespace": "vault-csi-provider", "daemonset": "vault-csi-provider"}
MADE = {"created_by_kind": "DaemonSet", "created_by_name": "vault-csi-provider"}
INFO = named("kube_pod_info", **POD_LABELS, **MADE)
UNPLACED = INFO.replace("node-1", "")
READY = named(
    "kube_pod_status_ready", namespace="vault-csi-provider", pod="vault-csi-provider-x", condition="true", uid="u"
)
NODE = named("kube_node_status_condition", node="node-1", condition="Ready", status="true")
DESIRED = named("kube_daemonset_status_desired_number_scheduled", **DAEMONSET)
CURRENT = named("kube_daemonset_status_current_number_scheduled", **DAEMONSET)
RESTARTS = named(
    "kube_pod_container_status_restarts_total",
    namespace="vault-csi-provider",
    pod="vault-csi-provider-x",
    container="provider",
)


def buckets(*by_bound: tuple[str, str]) -> dict[str, str]:
    """The series of a histogram of requests."""
    return {told("vault_request_duration_seconds_bucket", le=bound): values for bound, values in by_bound}


def rolled(nodes: int) -> dict[str, str]:
    """One node after the other gets a new pod, at two minutes each: it is not ready for a minute, and none is before.

    Each pod has series of its own name, and those of the old one end.
    """
    series = {DESIRED: flat(nodes, HOUR), CURRENT: flat(nodes, HOUR)}
    for number in range(1, nodes + 1):
        at = 2 * number
        series[of_node(NODE, number)] = flat(1, HOUR)
        for name, values in (
            (INFO, line(none(at), flat(1, HOUR - at))),
            (READY, line(none(at), flat(0, 1), flat(1, HOUR - at - 1))),
            (BUILD, line(none(at + 1), flat(1, HOUR - at - 1))),
        ):
            old = of_node(name, number)
            series[old] = line(flat(1, at), ended(HOUR - at))
            series[old.replace(f"provider-{number}", f"provider-{number}-new")] = values
    return series


# Vault fails over for 20 seconds, which is one scrape; then all goes on.
FAILOVER = {
    AWAY: line(flat(0, 10), "1", flat(0, 20)),
    SEALED: line(flat(0, 10), flat(25, 20.5)),
    ANSWERED: line(grow(0, 100, 10), grow(1000, 100, 20)),
    told("vault_requests_total", method="GET", path="other", status="none"): line(flat(0, 10), flat(40, 20.5)),
    FAILING: line(none(10), flat(0, 1.5), ended(20)),
    UNANSWERED: line(flat(0, 10), flat(3, 20.5)),
    RENEWED: grow(0, 2, 30),
    DUE: flat(40, 30),
    OVER: line(flat(NEVER, 10), flat(170, 1), flat(NEVER, 20)),
    UNREVOKED: line(flat(0, 10), flat(2, 20)),
    UNSWEPT: line(flat(0, 10), flat(1, 20)),
    SWEPT: grow(0, 1, 30),
    OUTAGE: flat(0, 30),
    LOST: flat(0, 30),
    BUILD: flat(1, HOUR),
}
# The daemon is another process: its counts begin anew.
RESET = {
    ANSWERED: line(grow(0, 100, 20), grow(0, 100, 20)),
    **{
        count: line(flat(70, 20), flat(0, 20))
        for count in (SEALED, UNANSWERED, REFUSED, UNREVOKED, UNSWEPT, LOST, RESTARTS)
    },
    INFO: flat(1, HOUR),
    READY: flat(1, HOUR),
    DUE: flat(40, 40),
    BUILD: flat(1, HOUR),
}
# Prometheus itself is away for five minutes, and comes back to what was before.
AGAIN = {
    **dict.fromkeys((INFO, READY, NODE, BUILD), line(flat(1, 20), ended(5), flat(1, 35))),
    **dict.fromkeys((REFUSED, UNSWEPT, LOST, RESTARTS), line(flat(3, 20), ended(5), flat(3, 35))),
    AWAY: line(flat(0, 20), ended(5), flat(0, 35)),
    SWEPT: line(grow(0, 1, 20), ended(5), grow(25, 1, 35)),
}
# A node is drained and switched off: its daemon is not ready, then the node is not, and at last it is none.
DRAINED = {
    INFO: line(flat(1, 40), ended(20)),
    READY: line(flat(1, 10), flat(0, 30), ended(20)),
    NODE: line(flat(1, 11), flat(0, 29), ended(20)),
    AWAY: line(flat(0, 10), ended(50)),
    OVER: line(flat(NEVER, 10), ended(50)),
    FAILING: line(none(9), flat(0, 1), ended(50)),
    BUILD: line(flat(1, 10), ended(50)),
    of_node(BUILD, 2): flat(1, HOUR),
}
# A pod was deleted after one failed re-mount; its sessions go with the sweep.
DELETED = {
    FAILING: line(none(10), flat(0, 10), ended(20)),
    REMOUNT: line(flat(NEVER, 5), grow(300, -60, 5), flat(NEVER, 30)),
    OVER: flat(NEVER, 40),
    REVOKED: line(flat(0, 12), flat(1, 28)),
    BUILD: flat(1, HOUR),
}
UNEVENTFUL = [
    Quiet("Vault fails over for 20 seconds", FAILOVER),
    Quiet("the daemon starts anew", RESET),
    Quiet("a rolling update of twenty nodes takes forty minutes", rolled(20)),
    Quiet("Prometheus starts anew", AGAIN),
    Quiet("a node is drained and switched off", DRAINED),
    Quiet("a pod is deleted", DELETED),
]
"""What no alert may fire at."""

CASES: dict[str, list[Fires | Quiet]] = {
    "VaultCSIVaultUnreachable": [
        Fires(
            "two nodes get no answer",
            {AWAY: line(flat(0, 10), flat(1, 20)), of_node(AWAY, 2): line(flat(0, 10), flat(1, 20))},
            labels={"address": "https://v"},
            summary="2 nodes get no answer of Vault at https://v",
            minute=13,
            quiet_at=10,
        ),
        Quiet(
            "of twenty nodes one always has lost Vault for half a minute",
            {of_node(AWAY, number): line(flat(0, number / 2 + 1), "1", flat(0, 20)) for number in range(1, 21)},
        ),
        Quiet("a class has a slip in its address", {AWAY: flat(0, 30), TYPO: flat(1, 30)}),
    ],
    "VaultCSIVaultNeverAnswered": [
        Fires(
            "a class has a slip in its address",
            {AWAY: flat(0, 30), TYPO: line(none(5), flat(1, 25))},
            labels={"address": "https://typo"},
            summary="1 nodes have had no answer at https://typo, ever",
            minute=21,
            quiet_at=18,
        ),
        Quiet("the Vault of the flags is away", {AWAY: flat(1, 30)}),
        Quiet("a slip that is corrected", {TYPO: line(flat(1, 10), none(20))}),
    ],
    "VaultCSIVaultSealed": [
        Fires(
            "it is sealed, and the daemon looks once a second",
            {
                AWAY: line(flat(0, 10), flat(1, 20)),
                SEALED: line(flat(0, 10), grow(0, 55, 20)),
                ANSWERED: line(grow(0, 100, 10), flat(1000, 20)),
            },
            labels=JOB,
            summary="Vault answers 503, so it is sealed or a load balancer finds no Vault",
            minute=15,
            quiet_at=10,
        ),
        Fires(
            "a series that begins with the first 503",
            {AWAY: line(none(10), flat(1, 20)), SEALED: line(none(10), grow(1, 55, 20))},
            labels=JOB,
            summary="Vault answers 503, so it is sealed or a load balancer finds no Vault",
            minute=15,
            quiet_at=10,
        ),
        Quiet(
            "one 503 beside traffic",
            {AWAY: flat(0, 30), SEALED: line(flat(0, 10), flat(1, 20)), ANSWERED: grow(0, 100, 30)},
        ),
        Quiet(
            "one node after the other gets some, for half a minute",
            {
                of_node(SEALED, number): line(flat(0, number / 2 + 1), flat(100, 30 - number / 2))
                for number in range(1, 21)
            }
            | {of_node(AWAY, number): line(flat(0, number / 2 + 1), "1", flat(0, 30)) for number in range(1, 21)},
        ),
        Quiet(
            "it does not answer at all",
            {AWAY: line(flat(0, 10), flat(1, 20)), SEALED: line(flat(0, 5), flat(3, 25))},
        ),
        Quiet(
            "an address that leads nowhere, and another Vault that fails over",
            {
                TYPO: flat(1, 30),
                SEALED: line(flat(0, 10), flat(25, 20)),
            },
        ),
    ],
    "VaultCSIVaultFailing": [
        Fires(
            "one request in five",
            {
                ANSWERED: grow(0, 80, 30),
                told("vault_requests_total", method="GET", path="secret/", status="none"): grow(0, 10, 30),
                told("vault_requests_total", method="GET", path="secret/", status="502"): grow(0, 6, 30),
                told("vault_requests_total", method="GET", path="secret/", status="429"): grow(0, 4, 30),
            },
            labels=JOB,
            summary="20% of the requests to Vault fail",
            minute=20,
        ),
        Quiet(
            "one in twenty-five, and what is refused is not failed",
            {
                ANSWERED: grow(0, 80, 30),
                told("vault_requests_total", method="GET", path="secret/", status="none"): grow(0, 4, 30),
                told("vault_requests_total", method="GET", path="secret/", status="403"): grow(0, 16, 30),
            },
        ),
    ],
    "VaultCSIVaultSlow": [
        Fires(
            "one in five takes over a second",
            buckets(("1.0", grow(0, 80, 30)), ("2.5", grow(0, 100, 30)), ("+Inf", grow(0, 100, 30))),
            labels=JOB,
            summary="One request to Vault in ten takes 1.75s or longer",
            minute=20,
        ),
        Quiet(
            "one in twenty does",
            buckets(("1.0", grow(0, 95, 30)), ("2.5", grow(0, 100, 30)), ("+Inf", grow(0, 100, 30))),
        ),
    ],
    "VaultCSILoginsDenied": [
        Fires(
            "again and again",
            {
                told("vault_csi_logins_total", path="auth/jwt/", outcome="denied"): line(flat(0, 5), grow(0, 1, 30)),
            },
            labels={**JOB, "path": "auth/jwt/"},
            summary="Vault denies logins at auth/jwt/",
            minute=20,
            quiet_at=5,
        ),
        Quiet(
            "one was, and others succeed",
            {
                told("vault_csi_logins_total", path="auth/jwt/", outcome="denied"): line(flat(0, 5), flat(1, 30)),
                told("vault_csi_logins_total", path="auth/jwt/", outcome="success"): grow(0, 1, 30),
            },
        ),
    ],
    "VaultCSIRemountsFailing": [
        Fires(
            "one re-mount after the other",
            {FAILING: line(none(10), grow(0, 60, 20))},
            labels=WEB,
            summary="shop/web-0 gets no new secrets for 10m 0s",
            minute=20,
            quiet_at=15,
        ),
        Quiet(
            "failures of less than five minutes, before the pod was deleted", {FAILING: line(none(1), flat(270, 10))}
        ),
        Quiet("it was never mounted", {NEVER_MOUNTED: grow(0, 60, 30)}),
    ],
    "VaultCSIMountsFailing": [
        Fires(
            "one mount after the other",
            {NEVER_MOUNTED: line(none(1), grow(0, 60, 40))},
            labels=WEB,
            summary="shop/web-0 waits for its secrets for 19m 0s",
            minute=20,
            quiet_at=16,
        ),
        Quiet("not for long", {NEVER_MOUNTED: line(none(10), grow(0, 60, 15))}),
        Quiet("it was mounted before", {FAILING: grow(0, 60, 30)}),
    ],
    "VaultCSILeaseEnding": [
        Fires(
            "nothing follows it",
            {OVER: line(grow(630, -60, 10.5), flat(NEVER, 20)), DUE: flat(500, 30), UNANSWERED: flat(0, 30)},
            labels=HELD,
            summary="A credential on node-1 ends in 30s, unrenewed",
            minute=13,
            quiet_at=9,
        ),
        Fires(
            "its renewals are not answered",
            {
                OVER: flat(NEVER, 30),
                DUE: line(grow(600, -60, 9.5), flat(30, 20)),
                UNANSWERED: line(flat(0, 4), grow(0, 2, 26)),
            },
            labels=HELD,
            summary="A credential on node-1 ends in 30s, unrenewed",
            minute=12,
            quiet_at=8,
        ),
        Quiet(
            "a lease of 88 seconds that every re-mount replaces",
            {REMOUNT: " ".join(["88 58"] * 30), OVER: flat(NEVER, 30), DUE: flat(NEVER, 30)},
        ),
        Quiet(
            "a short one that is renewed, and some renewals of another's are tried again",
            {OVER: flat(NEVER, 30), DUE: flat(40, 30), UNANSWERED: line(flat(0, 5), flat(1, 3), flat(2, 22))},
        ),
        Quiet(
            "re-mounts replaced it with 90 seconds left",
            {OVER: line(grow(630, -60, 9.5), flat(600, 20)), DUE: flat(500, 30), UNANSWERED: grow(0, 1, 30)},
        ),
    ],
    "VaultCSIRevocationsFailing": [
        Fires(
            "not answered, again and again",
            {UNREVOKED: line(flat(0, 3), grow(0, 0.7, 40)), REVOKED: grow(0, 5, 43)},
            labels=HELD,
            summary="Tokens of pods that are gone from node-1 are not revoked",
            minute=25,
            quiet_at=15,
        ),
        Fires(
            "refused, which is final",
            {REFUSED: line(flat(0, 3), flat(1, 40))},
            labels=HELD,
            summary="Tokens of pods that are gone from node-1 are not revoked",
            minute=20,
            quiet_at=10,
        ),
        Quiet(
            "one was not answered, and then was",
            {UNREVOKED: line(flat(0, 10), flat(1, 40)), REVOKED: line(flat(0, 11), flat(1, 39))},
        ),
        Quiet(
            "every few minutes one is not answered, and is at the next try",
            {UNREVOKED: line(*(flat(count, 3) for count in range(20))), REVOKED: grow(0, 5, HOUR)},
        ),
        Quiet("those of batch tokens", {told("vault_csi_revocations_total", outcome="batch"): grow(0, 1, 40)}),
        Quiet("refused long ago", {REFUSED: flat(3, 40)}),
    ],
    "VaultCSISweepsFailing": [
        Fires(
            "all of them",
            {UNSWEPT: line(flat(0, 3), grow(0, 1, 60)), SWEPT: flat(0, 63)},
            labels=HELD,
            summary="Pods that are gone from node-1 are not found",
            minute=20,
            quiet_at=15,
        ),
        Fires(
            "all since the right was taken away",
            {UNSWEPT: line(flat(0, 20), grow(0, 1, 60)), SWEPT: line(grow(0, 1, 20), flat(20, 60))},
            labels=HELD,
            summary="Pods that are gone from node-1 are not found",
            minute=52,
            quiet_at=34,
        ),
        Quiet("every second", {UNSWEPT: grow(0, 1, 60), SWEPT: grow(0, 1, 60)}),
        Quiet(
            "the API server was away for ten minutes",
            {
                UNSWEPT: line(flat(0, 20), grow(0, 1, 10), flat(10, 30)),
                SWEPT: line(grow(0, 1, 20), flat(20, 10), grow(20, 1, 30)),
            },
        ),
    ],
    "VaultCSIAuditNotWritten": [
        Fires(
            "it cannot be written",
            {OUTAGE: line(flat(0, 10), flat(1, 20))},
            labels=HELD,
            summary="The audit log on node-1 is not written",
            minute=12,
            quiet_at=10,
        ),
        Fires(
            "lines were lost",
            {LOST: line(flat(0, 15), flat(40, 20))},
            labels=HELD,
            summary="The audit log on node-1 is not written",
            minute=20,
            quiet_at=14,
        ),
        Quiet("it could not for a moment", {OUTAGE: line(flat(0, 10), "1", flat(0, 20))}),
        Quiet("lines were lost long ago", {LOST: flat(40, 40)}),
    ],
    "VaultCSIDaemonAbsent": [
        Fires(
            "its pod is there and not ready",
            {INFO: flat(1, 40), READY: line(flat(1, 5), flat(0, 35)), NODE: flat(1, 40)},
            labels={"namespace": "vault-csi-provider", "node": "node-1"},
            summary="Node node-1 is without a provider that is ready",
            minute=16,
            quiet_at=14,
        ),
        Fires(
            "its pod has never been ready, and another node's is",
            {
                INFO: flat(1, 40),
                NODE: flat(1, 40),
                of_node(INFO, 2): flat(1, 40),
                of_node(READY, 2): flat(1, 40),
                of_node(NODE, 2): flat(1, 40),
            },
            labels={"namespace": "vault-csi-provider", "node": "node-1"},
            summary="Node node-1 is without a provider that is ready",
            minute=12,
            quiet_at=5,
        ),
        Fires(
            "one pod after the other is tried there",
            {
                series.replace("provider-x", f"provider-{number}"): line(none(3 * number), flat(value, 3), ended(40))
                for number in range(10)
                for series, value in ((INFO, 1), (READY, 0))
            }
            | {NODE: flat(1, 40)},
            labels={"namespace": "vault-csi-provider", "node": "node-1"},
            summary="Node node-1 is without a provider that is ready",
            minute=20,
        ),
        Quiet(
            "a surge: beside the pod that is ready there is one that is not",
            {
                INFO: flat(1, 40),
                READY: flat(1, 40),
                NODE: flat(1, 40),
                INFO.replace("provider-x", "provider-y"): flat(1, 40),
                READY.replace("provider-x", "provider-y"): flat(0, 40),
            },
        ),
        Quiet(
            "nodes that come, and have a provider after some minutes",
            {
                of_node(series, number): line(none(number), flat(value, 5), flat(1, 40))
                for number in range(1, 31)
                for series, value in ((INFO, 1), (READY, 0), (NODE, 1))
            },
        ),
        Quiet(
            "another DaemonSet of that name, of another namespace, and another of this one",
            {
                series.replace(old, new): values
                for old, new in (
                    ('namespace="vault-csi-provider"', 'namespace="vault"'),
                    ('by_name="vault-csi-provider"', 'by_name="vault-csi-provider-agent"'),
                )
                for series, values in ((INFO, flat(1, 40)), (READY, flat(0, 40)), (NODE, flat(1, 40)))
            },
        ),
    ],
    "VaultCSIDaemonNotPlaced": [
        Fires(
            "its node has no room",
            {UNPLACED: flat(1, 40), DESIRED: flat(3, 40), CURRENT: flat(3, 40)},
            labels={"namespace": "vault-csi-provider", "pod": "vault-csi-provider-x"},
            summary="Provider vault-csi-provider-x gets no place on its node",
            minute=12,
            quiet_at=8,
        ),
        Fires(
            "a quota or a policy lets none be made",
            {DESIRED: flat(3, 40), CURRENT: line(flat(3, 10), flat(1, 30)), INFO: flat(1, 40)},
            labels=DAEMONSET,
            summary="No pod can be made for 2 nodes by DaemonSet vault-csi-provider",
            minute=22,
            quiet_at=18,
        ),
        Quiet(
            "nodes that come wait for a moment",
            {
                UNPLACED.replace("provider-x", f"provider-{number}"): line(none(number), flat(1, 2), ended(30))
                for number in range(1, 31)
            },
        ),
    ],
    "VaultCSIMetricsAbsent": [
        Fires(
            "all are gone",
            {BUILD: line(flat(1, 10), ended(40))},
            summary="No provider tells its metrics",
            minute=22,
            quiet_at=18,
        ),
        Quiet("one is left", {BUILD: line(flat(1, 10), ended(40)), of_node(BUILD, 2): flat(1, 50)}),
    ],
    "VaultCSINotScraped": [
        Fires(
            "one that is ready",
            {
                INFO: flat(1, 40),
                READY: flat(1, 40),
                BUILD: line(flat(1, 10), ended(40)),
                of_node(BUILD, 2): flat(1, 40),
            },
            labels=POD_LABELS,
            summary="Prometheus gets no metrics of the provider on node-1",
            minute=22,
            quiet_at=18,
        ),
        Quiet("it is not ready", {INFO: flat(1, 40), READY: flat(0, 40), of_node(BUILD, 2): flat(1, 40)}),
        Quiet("none is scraped, which another alert tells", {INFO: flat(1, 40), READY: flat(1, 40)}),
    ],
    "VaultCSIDaemonRestarts": [
        Fires(
            "every minute",
            {RESTARTS: line(flat(0, 50), grow(0, 1, 30)), INFO: flat(1, 80)},
            labels=POD_LABELS,
            summary="The provider on node-1 has restarted 10 times in an hour",
            minute=60,
            quiet_at=50,
        ),
        Quiet("twice", {RESTARTS: line(flat(0, 50), flat(1, 5), flat(2, 30)), INFO: flat(1, 90)}),
        Quiet(
            "another container, and another's pod",
            {
                RESTARTS.replace('container="provider"', 'container="sidecar"'): grow(0, 1, 90),
                RESTARTS.replace("provider-x", "provider-y"): grow(0, 1, 90),
                INFO.replace("provider-x", "provider-y").replace(MADE["created_by_name"] + '"}', 'x"}'): flat(1, 90),
                INFO: flat(1, 90),
            },
        ),
    ],
}


def test_every_alert_has_its_cases() -> None:
    """Each alert is shown firing and not firing."""
    assert CASES.keys() == ALERTS.keys()
    for cases in CASES.values():
        assert {type(case) for case in cases} == {Fires, Quiet}


def promised(names: Iterable[str], tests: list[dict[str, Any]], directory: Path) -> None:
    """promtool finds what the tests say of these alerts, whose rules are evaluated each half minute."""
    rules = directory / "rules.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "given", "rules": [ALERTS[name] for name in names]}]}))
    file = directory / "test.yaml"
    given = {"rule_files": [str(rules)], "evaluation_interval": "30s", "tests": tests}
    file.write_text(yaml.safe_dump(given))
    done = subprocess.run([promtool(), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def promtool_test(
    series: Mapping[str, str], expected: Iterable[tuple[int, str, list[dict[str, Any]]]]
) -> dict[str, Any]:
    """Series, a value each half minute, and which alerts fire at a minute."""
    return {
        "interval": "30s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": alerts} for minute, name, alerts in expected
        ],
    }


@pytest.mark.parametrize("name", CASES)
def test_alert_fires_when_it_should_and_else_not(name: str, tmp_path: Path) -> None:
    """promtool: under some series the alert fires, with these labels and summary; under others at no time."""
    rule = ALERTS[name]
    tests = []
    for case in CASES[name]:
        if isinstance(case, Quiet):
            tests.append(promtool_test(case.series, ((minute, name, []) for minute in range(HOUR))))
            continue
        fired = {
            "exp_labels": {**case.labels, "severity": rule["labels"]["severity"]},
            "exp_annotations": {**rule["annotations"], "summary": case.summary},
        }
        tests.append(promtool_test(case.series, ((case.quiet_at, name, []), (case.minute, name, [fired]))))
    promised([name], tests, tmp_path)


@pytest.mark.parametrize("case", UNEVENTFUL, ids=lambda case: case.why)
def test_what_is_no_trouble_fires_no_alert(case: Quiet, tmp_path: Path) -> None:
    """A failover, a start, an update, a drained node, a deleted pod: no alert fires at any time."""
    expected: list[tuple[int, str, list[dict[str, Any]]]] = [
        (minute, name, []) for name in ALERTS for minute in range(HOUR)
    ]
    promised(ALERTS, [promtool_test(case.series, expected)], tmp_path)


def test_rules_for_the_operator_are_the_rules() -> None:
    """prometheusrule.yaml is rules.yaml for the operator; `python -m tests.test_monitoring` writes it anew."""
    assert (MONITORING / "prometheusrule.yaml").read_text() == wrapped()


def wrapped() -> str:
    """The PrometheusRule."""
    _, _, groups = (MONITORING / "rules.yaml").read_text().partition("groups:\n")
    head = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "vault-csi-provider",
            "namespace": "vault-csi-provider",
            "labels": {"app.kubernetes.io/name": "vault-csi-provider"},
        },
    }
    told = "# Made of rules.yaml: change that, and run `python -m tests.test_monitoring`.\n"
    body = "".join(f"  {line}" if line.strip() else line for line in f"groups:\n{groups}".splitlines(keepends=True))
    return told + yaml.safe_dump(head, sort_keys=False) + "spec:\n" + body


def test_every_alert_has_its_entry_in_the_runbook() -> None:
    """Each alert has an entry of its name in docs/runbook.md, and each entry an alert; the alert's link leads there."""
    entries = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)
    assert entries == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    for name, entry in zip(entries, re.split(r"^## .+$", RUNBOOK, flags=re.MULTILINE)[1:], strict=True):
        told = re.findall(r"^\*\*(.+?)\.\*\*", entry, re.MULTILINE)
        assert told == ["Means", "Users see", "Look", "Do"], name


def panels() -> Iterator[dict[str, Any]]:
    """The panels of the dashboard but for the rows."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> dict[str, str]:
    """Every expression of alerts and panels, by where it is, with Grafana's variables filled in."""
    found = {name: rule["expr"] for name, rule in ALERTS.items()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = (
                target["expr"].replace("$__rate_interval", "5m").replace("$job", ".*").replace("$node", ".*")
            )
    return found


def test_dashboard_can_be_computed(tmp_path: Path) -> None:
    """Each expression of a panel is PromQL, and no two panels share a place or a name."""
    groups = [
        {
            "name": "panels",
            "rules": [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(expressions().values())],
        }
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": groups}))
    done = subprocess.run([promtool(), "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23


# A metric's name, and the label matchers behind it.
METRIC = re.compile(r"\b((?:vault|secret_rotation|process|kube)_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
# Labels that results are told apart, joined or shown by.
GROUPED = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
# What Prometheus puts on what it scrapes.
TARGET = {"job", "node", "namespace", "pod", "instance"}
# Labels with values that others choose.
FREE = {*TARGET, "path", "address", "pod_namespace", "pod_name", "version", "python"}
# The DaemonSet of the manifests, which the chart's rules put their release's in place of.
MANIFEST = yaml.safe_load((ROOT / "daemonset" / "base" / "daemonset.yaml").read_text())
(CONTAINER,) = MANIFEST["spec"]["template"]["spec"]["containers"]
_OURS = {"namespace": {MANIFEST["metadata"]["namespace"]}}
_STATES = {"true", "false", "unknown"}
# kube-state-metrics' labels, and the values that they have or that are ours; None is for those that vary.
# Source: https://github.com/kubernetes/kube-state-metrics/tree/main/docs/metrics
KUBE: dict[str, dict[str, set[str] | None]] = {
    "kube_pod_info": {
        **_OURS,
        "pod": None,
        "node": None,
        "created_by_kind": {MANIFEST["kind"]},
        "created_by_name": {MANIFEST["metadata"]["name"]},
    },
    "kube_pod_status_ready": {**_OURS, "pod": None, "condition": _STATES},
    "kube_pod_container_status_restarts_total": {**_OURS, "pod": None, "container": {CONTAINER["name"]}},
    "kube_node_status_condition": {"node": None, "condition": {"Ready"}, "status": _STATES},
    "kube_daemonset_status_desired_number_scheduled": {**_OURS, "daemonset": {MANIFEST["metadata"]["name"]}},
    "kube_daemonset_status_current_number_scheduled": {**_OURS, "daemonset": {MANIFEST["metadata"]["name"]}},
}


async def known_values() -> dict[str, dict[str, set[str] | None]]:
    """Every metric with its labels, and the values that they can have; None where others choose them.

    What is counted from 0 is told by a daemon that has just begun; what has no series before it happens is of the code.
    """
    beginning = Told()
    beginning.tell(mounted({"a": "1"}), refused(), refused(name="new"), request())
    known: dict[str, dict[str, set[str] | None]] = {name: dict(labels) for name, labels in KUBE.items()}
    for sample in (await beginning.scrape()).samples:
        labels = known.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            values = labels.setdefault(label, None if label in FREE else set())
            if values is not None:
                values.add(value)
    known["vault_requests_total"]["status"] = {*STATUSES.values(), *(f"{digit}xx" for digit in range(1, 6))}
    known["vault_requests_total"]["method"] = {*METHODS, ANY_OTHER}
    known["vault_csi_vault_away"]["known"] = {"true", "false"}
    return known


async def test_labels_and_values_of_rules_and_panels_can_be() -> None:
    """What a rule or a panel asks for by a label's value is a value that the code can give: none is misspelt.

    What they ask of Kubernetes is what the manifests install. Results are grouped and named by labels that are there.
    """
    known = await known_values()
    for where, expression in expressions().items():
        has = set(TARGET)
        for name, matchers in METRIC.findall(expression):
            assert name in known, f"{where}: nobody tells {name}"
            labels = known[name]
            has |= labels.keys()
            for label, operator, asked in MATCHER.findall(matchers):
                if label in TARGET and not name.startswith("kube_"):
                    continue
                assert label in labels, f"{where}: {name} has no label {label}"
                values = labels[label]
                if values is None or not asked:
                    continue
                for each in asked.split("|") if "~" in operator else [re.escape(asked)]:
                    assert any(re.fullmatch(each, value) for value in values), f"{where}: {name} has no {label} {asked}"
        grouped = {label for group in GROUPED.findall(expression) for label in re.findall(r"\w+", group)}
        assert grouped <= has, f"{where}: nothing has a label {grouped - has}"
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert shown <= set(re.findall(r"\w+", " ".join(GROUPED.findall(target["expr"])))), panel["title"]


def test_chart_runs_the_container_that_the_rules_ask_for() -> None:
    """The chart's container has the name that the rules know; its other names are put in by the chart."""
    template = (ROOT / "deploy" / "helm" / "vault-csi-provider" / "templates" / "daemonset.yaml").read_text()
    assert re.findall(r"containers:\n\s+- name: (\S+)", template) == [CONTAINER["name"]]


def test_what_rules_and_panels_name_is_what_a_daemon_tells(tmp_path: Path) -> None:
    """After mounts, one of which failed, a daemon on the stand tells each metric and label of rules and panels.

    And no secret's path or value. When Vault is sealed it tells that too, and that a re-mount fails; then no more.
    """
    port = free_port()
    flags = (f"--health-addr=127.0.0.1:{port}", "--node-name=node-1", "--sweep-interval=1s")
    with Cluster(tmp_path) as cluster, Daemon(cluster, *flags) as daemon, Driver(daemon.socket) as driver:
        cluster.role("app")
        pod = cluster.pod("web")
        mounted = cluster.mount(driver, pod, class_of("app", *DATABASE, *STATIC))
        driver.remount(mounted)
        cluster.bao.write_kv("shop/data/app", {"api_key": "key-2"})
        driver.remount(mounted)
        missing = class_of("app", "{objectName: x, secretPath: shop/data/none, secretKey: y}")
        with pytest.raises(grpc.RpcError, match="shop/data/none"):
            cluster.mount(driver, cluster.pod("other"), missing)
        eventually(
            lambda: Scrape.of(port).value("vault_csi_sweeps_total", outcome="done") > 0, "the daemon looks for pods"
        )
        time.sleep(FRESH_SECONDS)  # an answer of before may be given until then
        scrape = Scrape.of(port)
        _assert_told(scrape)
        assert scrape.value("secret_rotation_total", secret_type="static", status="success") == 1
        assert scrape.value("vault_csi_leases", secret_type="leased") == 1
        assert scrape.value("vault_csi_sessions") == 2
        assert scrape.value("vault_csi_logins_total", path="auth/app/", outcome="success") == 2
        assert scrape.value("vault_csi_mounts_total", code="OK") == 3
        assert scrape.labels("vault_csi_volume_failing_seconds") == [
            {"pod_namespace": "shop", "pod_name": "other", "mounted": "false"}
        ]
        paths = {labels["path"] for labels in scrape.labels("vault_requests_total")}
        assert paths >= {"auth/app/", "database/", "shop/"}
        # A mount alone is named, and nothing of what was read.
        page = "\n".join(str(sample) for sample in scrape.samples)
        for told in ("data/app", "creds/app", "key-1", "key-2", mounted.text("db-password")):
            assert told not in page
        _seal_and_unseal(cluster, port, lambda: driver.remount(mounted))


def _seal_and_unseal(cluster: Cluster, port: int, remount: Callable[[], object]) -> None:
    """What the alerts are there for: a re-mount fails, as Vault is sealed, and nobody else is told."""

    def away() -> float:
        return Scrape.of(port).value("vault_csi_vault_away", address=cluster.bao.address, known="true")

    def sealed() -> float:
        return Scrape.of(port).value("vault_csi_vault_looks_total", status="503")

    cluster.bao.seal()
    with pytest.raises(grpc.RpcError, match="sealed"):
        remount()
    eventually(lambda: away() == 1, "Vault is away")
    time.sleep(FRESH_SECONDS)
    scrape = Scrape.of(port)
    assert scrape.value("vault_csi_remount_failures_total", code="FAILED_PRECONDITION") == 1
    assert scrape.values("vault_csi_volume_failing_seconds", pod_name="web", mounted="true") != []
    assert scrape.value("secret_rotation_total", secret_type="leased", status="error") == 1
    # The daemon looks on while nobody asks for anything.
    answered = sealed()
    eventually(lambda: sealed() >= answered + 3, "it looks again and again, and is answered 503")
    cluster.bao.unseal()
    eventually(lambda: away() == 0, "Vault is back")
    remount()
    eventually(
        lambda: Scrape.of(port).values("vault_csi_volume_failing_seconds", mounted="true") == [], "nothing fails"
    )


def _assert_told(scrape: Scrape) -> None:
    labels: dict[str, set[str]] = {}
    for sample in scrape.samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    for where, expression in expressions().items():
        found = METRIC.findall(expression)
        assert found, where
        for name, matchers in found:
            if name.startswith("kube_"):
                continue
            assert name in labels, f"{where}: no daemon tells {name}"
            asked = {label for label, _, _ in MATCHER.findall(matchers)}
            assert asked <= labels[name] | TARGET, f"{where}: {name} has no label {asked - labels[name] - TARGET}"


# -- the runbook's words -----------------------------------------------------------------------------------------------

# What others say or call so: Kubernetes, kubectl, the driver and Vault.
OTHERS_WORDS = {
    *("provider not found", "Last State", "ContainerCreating", "OOMKilled", "describe pod", "logs --previous"),
    *("spec.affinity", "list", "enableSecretRotation", "requiresRepublish", "tokenRequests", "Sealed true"),
    *("--rotation-poll-interval", "disable_iss_validation", "token_no_default_policy", "ttl", "max_ttl", "update"),
    *("database/", "aws/", "auth/token/revoke-self"),
}
PLACEHOLDER = "\0"
PUNCTUATION = ";:,."


def told_texts() -> list[str]:
    """Every text of the program's code but its docstrings; a place that is filled in is a PLACEHOLDER."""
    found = []
    for file in sorted((ROOT / "provider").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(re.sub(r"%[sdr]", PLACEHOLDER, node.value))
    return found


def says(words: Sequence[str], quoted: Sequence[str]) -> bool:
    """Whether a text of these words has those that are quoted, one behind the other; an ellipsis stands for any.

    What is filled in may be one of them, but not the first, and no two in a row.
    """
    return any(_begins(words[start:], quoted, guess=False) for start in range(len(words)))


def words_of(text: str) -> list[str]:
    """The words of a text, without what is put behind them."""
    return [word.strip(PUNCTUATION) for word in text.split()]


def _begins(words: Sequence[str], quoted: Sequence[str], *, guess: bool) -> bool:
    if not quoted:
        return True
    if quoted[0] == "…":
        return any(_begins(words[start:], quoted[1:], guess=False) for start in range(1, len(words) + 1))
    if not words or (words[0] == PLACEHOLDER and not guess):
        return False
    same = re.fullmatch(".*".join(map(re.escape, words[0].split(PLACEHOLDER))), quoted[0])
    return same is not None and _begins(words[1:], quoted[1:], guess=words[0] != PLACEHOLDER)


def test_program_says_what_the_runbook_quotes() -> None:
    """Each text in quotation marks is one of the program, of the dashboard, or known to be another's."""
    texts = [words_of(text) for text in told_texts()]
    titles = {panel["title"] for panel in panels()}
    prose = re.sub(r"```.*?```|`[^`]*`", "", RUNBOOK, flags=re.DOTALL)
    quotes = {" ".join(quote.split()) for quote in re.findall(r'"([^"]+)"', prose)}
    assert len(quotes) > 10
    for quote in quotes - titles - OTHERS_WORDS:
        assert any(says(words, words_of(quote)) for words in texts), f"nothing says {quote!r}"


def test_runbook_names_what_there_is() -> None:
    """Each name, flag, path and command that the runbook has in code's type is one that works here."""
    texts = {
        *told_texts(),
        *logging.getLevelNamesMapping(),
        MANIFEST["spec"]["template"]["spec"]["priorityClassName"],
    }
    labels = {label for family in FAMILIES for label in family.labels} | TARGET
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "vault-csi-provider" / "values.yaml").read_text())
    flags = {spelling.lstrip("-") for flag in FLAGS for spelling in flag.spellings}
    blocks = [
        line.partition("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", RUNBOOK, re.DOTALL)
        for line in block.splitlines()
    ]
    codes = {
        " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", RUNBOOK, flags=re.DOTALL))
    }
    for code in codes.union(blocks) - OTHERS_WORDS:
        first, *rest = code.split()
        if first in ("kubectl", "vault"):
            _assert_command(rest)
        elif first == "vault-csi-provider":
            assert parse(rest, {}, str).status is not None
        elif code.startswith("--"):
            assert code.partition("=")[0].lstrip("-") in flags, code
            parse([code] if "=" in code else [], {}, str)
        elif "/" in code and not code.startswith("/") and (ROOT / code.partition("/")[0]).is_dir():
            assert (ROOT / code).exists(), code
        else:
            plain = code.strip('"').replace('":"', " ").split()
            assert all(each in texts | labels or _is_value(values, each) for each in plain), code


def _assert_command(arguments: list[str]) -> None:
    """Namespace, DaemonSet and account are the manifests', and so is the command that is run in a pod."""
    name, namespace = MANIFEST["metadata"]["name"], MANIFEST["metadata"]["namespace"]
    account = MANIFEST["spec"]["template"]["spec"]["serviceAccountName"]
    if "-n" in arguments:
        assert arguments[arguments.index("-n") + 1] in (namespace, "NAMESPACE")
    for argument in arguments:
        if argument.startswith("daemonset/"):
            assert argument == f"daemonset/{name}"
        if argument.startswith("--as="):
            assert argument == f"--as=system:serviceaccount:{namespace}:{account}"
    if "--" in arguments:
        program, *rest = arguments[arguments.index("--") + 1 :]
        if program == "vault-csi-provider":
            assert parse(rest, {}, str).status is not None


def _is_value(values: Any, path: str) -> bool:
    """Whether the chart has a value of that path, "a.b" or "a.b=given"."""
    for key in path.partition("=")[0].split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


if __name__ == "__main__":
    (MONITORING / "prometheusrule.yaml").write_text(wrapped())
