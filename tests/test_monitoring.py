"""Alerts, dashboard and runbook: what they say fires, exists in the daemon, and is written about."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from provider.telemetry.metrics import FRESH_SECONDS
from tests.live import DATABASE, STATIC, Cluster, Daemon, class_of
from tests.scrape import Scrape
from tests.stand.driver import Driver
from tests.stand.process import free_port
from tests.stand.waiting import eventually
from tests.tools import ROOT, promtool

MONITORING = ROOT / "deploy" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

# The labels of a daemon as Prometheus knows it, and as kube-state-metrics does.
DAEMON = 'namespace="vault-csi-provider", pod="vault-csi-provider-x", instance="10.0.0.1:8080", job="provider"'
OTHER = DAEMON.replace("-x", "-y").replace("0.1:", "0.2:")
HELD = {"namespace": "vault-csi-provider", "pod": "vault-csi-provider-x", "instance": "10.0.0.1:8080"}


@dataclass(frozen=True)
class Case:
    """Series, a value each minute, under which an alert fires at some minute, and under which it does not."""

    fires: Mapping[str, str]
    quiet: Mapping[str, str]
    summary: str
    labels: Mapping[str, str] = field(default_factory=dict)
    minute: int = 20


def buckets(*by_bound: tuple[str, str]) -> dict[str, str]:
    """The series of a histogram of requests."""
    return {f'vault_request_duration_seconds_bucket{{{DAEMON}, le="{bound}"}}': values for bound, values in by_bound}


JOB = {"job": "provider"}
POD = {"pod_namespace": "shop", "pod_name": "web-0"}
FAILING = f'vault_csi_volume_failing_seconds{{{DAEMON}, pod_namespace="shop", pod_name="web-0", mounted='
ENDS = f"vault_csi_lease_earliest_end_seconds{{{DAEMON}, renewal="
UNANSWERED = f'vault_csi_renewals_total{{{DAEMON}, what="lease", outcome="unanswered"}}'
REVOKED = f"vault_csi_revocations_total{{{DAEMON}, outcome="
DESIRED = 'kube_daemonset_status_desired_number_scheduled{daemonset="vault-csi-provider", namespace="n"}'
READY = 'kube_daemonset_status_number_ready{daemonset="vault-csi-provider", namespace="n"}'
RESTARTS = 'kube_pod_container_status_restarts_total{pod="vault-csi-provider-x", container="provider", namespace="n"}'

CASES: dict[str, list[Case]] = {
    "VaultCSIVaultUnreachable": [
        Case(
            fires={
                f'vault_csi_vault_away{{{DAEMON}, address="https://v"}}': "0x10 1x20",
                f'vault_csi_vault_away{{{OTHER}, address="https://v"}}': "0x10 1x20",
            },
            quiet={
                f'vault_csi_vault_away{{{DAEMON}, address="https://v"}}': "1x10 0x20",
                f'vault_csi_vault_away{{{OTHER}, address="https://v"}}': "0x19 1 0x10",
            },
            labels={"address": "https://v"},
            summary="2 nodes get no answer of Vault at https://v",
        )
    ],
    "VaultCSIVaultSealed": [
        Case(
            fires={f'vault_requests_total{{{DAEMON}, method="GET", path="sys/", status="503"}}': "0x10 0+1x20"},
            quiet={
                f'vault_requests_total{{{DAEMON}, method="GET", path="sys/", status="503"}}': "0+1x10 10x20",
                f'vault_requests_total{{{DAEMON}, method="GET", path="sys/", status="500"}}': "0+1x30",
            },
            labels=JOB,
            summary="Vault answers 503, so it is sealed or a load balancer finds no Vault",
        )
    ],
    "VaultCSIVaultFailing": [
        Case(
            fires={
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="200"}}': "0+80x30",
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="none"}}': "0+10x30",
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="502"}}': "0+10x30",
            },
            quiet={
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="200"}}': "0+80x30",
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="none"}}': "0+4x30",
                f'vault_requests_total{{{DAEMON}, method="GET", path="secret/", status="403"}}': "0+16x30",
            },
            labels=JOB,
            summary="20% of the requests to Vault fail",
        )
    ],
    "VaultCSIVaultSlow": [
        Case(
            fires=buckets(("1.0", "0+80x30"), ("2.5", "0+100x30"), ("+Inf", "0+100x30")),
            quiet=buckets(("1.0", "0+95x30"), ("2.5", "0+100x30"), ("+Inf", "0+100x30")),
            labels=JOB,
            summary="One request to Vault in ten takes 1.75s or longer",
        )
    ],
    "VaultCSILoginsDenied": [
        Case(
            fires={f'vault_csi_logins_total{{{DAEMON}, path="auth/jwt/", outcome="denied"}}': "0x5 0+1x30"},
            quiet={
                f'vault_csi_logins_total{{{DAEMON}, path="auth/jwt/", outcome="denied"}}': "0 1x30",
                f'vault_csi_logins_total{{{DAEMON}, path="auth/jwt/", outcome="success"}}': "0+1x30",
            },
            labels={**JOB, "path": "auth/jwt/"},
            summary="Vault denies logins at auth/jwt/",
        )
    ],
    "VaultCSIRemountsFailing": [
        Case(
            fires={f'{FAILING}"true"}}': "_x10 30+60x20"},
            quiet={f'{FAILING}"true"}}': "_x16 30+60x20", f'{FAILING}"false"}}': "30+60x30"},
            labels=POD,
            summary="shop/web-0 gets no new secrets for 10m 30s",
        )
    ],
    "VaultCSIMountsFailing": [
        Case(
            fires={f'{FAILING}"false"}}': "_x1 30+60x40"},
            quiet={f'{FAILING}"false"}}': "_x10 30+60x20", f'{FAILING}"true"}}': "30+60x30"},
            labels=POD,
            summary="shop/web-0 waits for its secrets for 19m 30s",
        )
    ],
    "VaultCSILeaseEnding": [
        Case(
            fires={f'{ENDS}"over"}}': "630-60x10 99999x20", f'{ENDS}"due"}}': "500x30", UNANSWERED: "0x30"},
            # 90 seconds were left when a re-mount brought another.
            quiet={f'{ENDS}"over"}}': "630-60x9 600x20", f'{ENDS}"due"}}': "500x30", UNANSWERED: "0+1x30"},
            labels=HELD,
            summary="A credential that vault-csi-provider-x holds ends in 30s, unrenewed",
            minute=13,
        ),
        Case(
            fires={f'{ENDS}"over"}}': "99999x30", f'{ENDS}"due"}}': "600-60x9 30x20", UNANSWERED: "0x7 0+1x20"},
            # A short TTL that is renewed in time is below a minute all the time.
            quiet={f'{ENDS}"over"}}': "99999x30", f'{ENDS}"due"}}': "40x30", UNANSWERED: "0+1x4 4x30"},
            labels=HELD,
            summary="A credential that vault-csi-provider-x holds ends in 30s, unrenewed",
            minute=16,
        ),
    ],
    "VaultCSIRevocationsFailing": [
        Case(
            fires={f'{REVOKED}"unanswered"}}': "0x3 0+1x30", f'{REVOKED}"revoked"}}': "0+5x30"},
            quiet={f'{REVOKED}"batch"}}': "0+1x30", f'{REVOKED}"revoked"}}': "0+5x30", f'{REVOKED}"refused"}}': "3x30"},
            labels=JOB,
            summary="Tokens of pods that are gone are not revoked",
        )
    ],
    "VaultCSIAuditNotWritten": [
        Case(
            fires={f"vault_csi_audit_outage{{{DAEMON}}}": "0x10 1x20"},
            quiet={f"vault_csi_audit_outage{{{DAEMON}}}": "0 1x10 0x20"},
            labels=HELD,
            summary="The audit log of vault-csi-provider-x is not written",
        ),
        Case(
            fires={f"vault_csi_audit_lines_lost_total{{{DAEMON}}}": "0x15 40x20"},
            quiet={f"vault_csi_audit_lines_lost_total{{{DAEMON}}}": "0 40x40"},
            labels=HELD,
            summary="The audit log of vault-csi-provider-x is not written",
        ),
    ],
    "VaultCSIDaemonAbsent": [
        Case(
            fires={DESIRED: "5x30", READY: "5x5 3x30"},
            quiet={DESIRED: "5x30", READY: "5x12 4x5 5x30"},
            labels={"daemonset": "vault-csi-provider", "namespace": "n"},
            summary="2 nodes are without a provider that is ready",
        )
    ],
    "VaultCSIDaemonRestarts": [
        Case(
            fires={RESTARTS: "0x50 0+1x30"},
            quiet={RESTARTS: "0x50 1x5 2x30", RESTARTS.replace("provider-x", "x"): "0+1x90"},
            labels={"pod": "vault-csi-provider-x", "container": "provider", "namespace": "n"},
            summary="Provider vault-csi-provider-x has restarted 10 times in an hour",
            minute=61,
        )
    ],
}


def test_every_alert_has_its_cases() -> None:
    """Each alert is shown firing and not firing."""
    assert CASES.keys() == ALERTS.keys()


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_alert_fires_when_it_should_and_else_not(name: str, case: Case, tmp_path: Path) -> None:
    """promtool: under the one series the alert fires, with these labels and summary; under the other it does not."""
    rule = ALERTS[name]
    fired = {
        "exp_labels": {**case.labels, "severity": rule["labels"]["severity"]},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given.items()],
            "alert_rule_test": [{"eval_time": f"{case.minute}m", "alertname": name, "exp_alerts": expected}],
        }
        for given, expected in ((case.fires, [fired]), (case.quiet, []))
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "rules.yaml")], "tests": tests}))
    done = subprocess.run([promtool(), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
# What Prometheus puts on what it scrapes.
TARGET = {"job", "node", "namespace", "pod", "instance"}


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
        return Scrape.of(port).value("vault_csi_vault_away", address=cluster.bao.address)

    cluster.bao.seal()
    with pytest.raises(grpc.RpcError, match="sealed"):
        remount()
    eventually(lambda: away() == 1, "Vault is away")
    time.sleep(FRESH_SECONDS)
    scrape = Scrape.of(port)
    assert scrape.value("vault_csi_remount_failures_total", code="FAILED_PRECONDITION") == 1
    assert scrape.values("vault_csi_volume_failing_seconds", pod_name="web", mounted="true") != []
    assert sum(scrape.values("vault_requests_total", status="503")) > 0
    assert scrape.value("secret_rotation_total", secret_type="leased", status="error") == 1
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
            asked = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers))
            assert asked <= labels[name] | TARGET, f"{where}: {name} has no label {asked - labels[name] - TARGET}"


if __name__ == "__main__":
    (MONITORING / "prometheusrule.yaml").write_text(wrapped())
