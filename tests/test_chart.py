"""The Helm chart: rendered by helm over a matrix of values, valid for the Kubernetes API, and the manifests' equal."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

import provider
from provider.cli.command import parse
from provider.cli.flags import FLAGS
from provider.errors import InvalidSetting
from tests.operator_schema import DURATION, OPERATOR_KINDS, assert_operator_valid
from tests.test_cli import daemon
from tests.test_manifests import (
    DAEMONSET,
    KUBERNETES,
    RIGHTS,
    Manifest,
    assert_sound,
    assert_valid,
    at,
    container,
    daemonset,
    host_path_at,
    of_kind,
    overlay,
    pod_spec,
    rights,
    settings,
)
from tests.tools import ROOT, helm

CHART = ROOT / "deploy" / "helm" / "vault-csi-provider"
NAME = "vault-csi-provider"
ADDRESS = "https://vault.vault.svc:8200"
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())

PEER = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "vault"}}}]
# Each value once at least, in another place than its default, and those together that meet in a template.
MATRIX: dict[str, dict[str, Any]] = {
    "an address alone": {},
    "names": {"nameOverride": "secrets", "fullnameOverride": "node-secrets", "providerName": "openbao"},
    "long names": {"fullnameOverride": "a" * 80},
    "vault": {"vaultNamespace": "team/a", "vaultAuthMountPath": "k8s/one"},
    "unix": {"vaultAddress": "unix:///run/proxy.sock", "networkPolicy": {"enabled": True}},
    "http": {"vaultAddress": "http://vault", "networkPolicy": {"enabled": True}},
    "ca of a ConfigMap": {"vaultCA": {"configMap": "vault-ca", "key": "root.pem"}},
    "ca of a Secret, not hardened": {"vaultCA": {"secret": "vault-ca"}, "hardened": False},
    "image": {
        "image": {"registry": "registry.example.com", "repository": "team/provider", "digest": f"sha256:{'a' * 64}"},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "tag": {"image": {"tag": "1.2.3", "pullPolicy": "Always"}},
    "volumes": {
        "volumes": [{"name": "tls", "secret": {"secretName": "vault-tls"}}],
        "volumeMounts": [{"name": "tls", "mountPath": "/vault/tls", "readOnly": True}],
        "tlsRoot": "/vault/tls",
    },
    "resources": {"resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}},
    "hmac secret": {"hmacSecretName": "versions"},
    "host network": {"hostNetwork": True, "healthPort": 9808},
    "host network, OnDelete": {"hostNetwork": True, "daemonSet": {"updateStrategy": {"type": "OnDelete"}}},
    "without surge": {"daemonSet": {"updateStrategy": {"maxUnavailable": "10%"}}},
    "surge of a part": {"daemonSet": {"updateStrategy": {"maxSurge": "25%", "maxUnavailable": 0}}},
    "security contexts in strings": {
        "daemonSet": {
            "securityContext": {
                "pod": "runAsNonRoot: false\n",
                "container": "runAsUser: 0\ncapabilities:\n  drop: [ALL]\n",
            }
        }
    },
    "daemonSet": {
        "daemonSet": {
            "annotations": {"team": "platform"},
            "extraLabels": {"team": "platform"},
            "providersDir": "/etc/kubernetes/secrets-store-csi-providers",
            "kubeletRootDir": "/var/lib/k0s/kubelet",
            "securityContext": {
                "pod": {"runAsNonRoot": False},
                "container": {"seLinuxOptions": {"type": "spc_t"}},
            },
        }
    },
    "pod": {
        "pod": {
            "annotations": {"team": "platform"},
            "extraLabels": {"team": "platform"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "nodeSelector": {"disk": "ssd"},
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "virtual", "operator": "DoesNotExist"}]}]
                    }
                }
            },
        },
        "metrics": {"scrapeAnnotations": True},
    },
    "pod in strings": {
        "pod": {
            "annotations": 'release: "{{ .Release.Name }}"',
            "tolerations": "- key: dedicated\n  operator: Exists\n",
            "nodeSelector": "disk: ssd\nkubernetes.io/os: linux\n",
            "affinity": "nodeAffinity:\n  preferredDuringSchedulingIgnoredDuringExecution: []\n",
        },
        "serviceAccount": {"annotations": "team: platform\n"},
    },
    "priority": {"priorityClassName": "high", "priorityClassQuota": True},
    "no quota": {"priorityClassQuota": False, "terminationGracePeriodSeconds": 130},
    "large numbers": {
        "terminationGracePeriodSeconds": 1_000_000,
        "daemonSet": {"updateStrategy": {"maxSurge": 100_000}},
        "maxPodMounts": 10_000_000,
        "startupProbe": {"failureThreshold": 10_000_000},
    },
    "socket of OpenBao's chart": {"daemonSet": {"endpoint": "/provider/openbao.sock"}},
    "account": {"serviceAccount": {"name": "secrets", "annotations": {"a": "b"}, "extraLabels": {"team": "platform"}}},
    "an account that is there": {"serviceAccount": {"create": False, "name": "there"}, "rbac": {"create": False}},
    "probes": {
        "startupProbe": {"failureThreshold": 90},
        "readinessProbe": {"initialDelaySeconds": 5, "successThreshold": 2},
        "livenessProbe": {"failureThreshold": 2, "initialDelaySeconds": 5, "periodSeconds": 5, "timeoutSeconds": 3},
    },
    "logs": {"logLevel": "warn", "extraArgs": ["-log-format=text", "-mount-timeout=70s"]},
    "debug": {"debug": True, "extraEnvironmentVars": {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".svc"}},
    "opened": {
        "allowedVaultAddresses": ["https://other.example.com:8200", "*.vault.example.com"],
        "allowSkipTLSVerify": True,
        "tlsRoot": "/etc/tls",
        "unknownFields": "warn",
        "maxPodMounts": 100,
        "maxPodObjects": 5000,
        "maxPodMiB": 64,
    },
    "not hardened": {"hardened": False, "unknownFields": "error", "allowSkipTLSVerify": False, "maxPodMounts": 0},
    "state": {"stateDir": {"hostPath": "/var/lib/vault-csi-provider"}},
    "no state": {"stateDir": {"enabled": False}},
    "sweep": {"sweep": {"interval": "2m"}, "refreshAfter": "10m", "templates": False},
    "no sweep": {"sweep": {"enabled": False}},
    "driver's tokens": {"rbac": {"tokenRequest": False}},
    "no right": {"rbac": {"tokenRequest": False, "hmacSecret": False}, "sweep": {"enabled": False}},
    "no metrics": {"metrics": {"enabled": False, "scrapeAnnotations": True}, "networkPolicy": {"enabled": True}},
    "metrics apart": {
        "metrics": {"port": 9102, "scrapeAnnotations": True},
        "monitors": {
            "podMonitor": {
                "enabled": True,
                "labels": {"release": "prometheus"},
                "interval": "1m",
                "scrapeTimeout": "5s",
            }
        },
        "networkPolicy": {"enabled": True, "metricsFrom": PEER},
    },
    "monitors": {
        "monitors": {
            "podMonitor": {"enabled": True, "interval": "", "scrapeTimeout": None},
            "prometheusRule": {
                "enabled": True,
                "labels": {"release": "prometheus"},
                "runbook": "https://wiki.example.com/runbook",
            },
        }
    },
    "a Service to scrape": {
        "metrics": {"port": 9102},
        "monitors": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "x"}, "interval": "1m", "scrapeTimeout": "5s"}
        },
    },
    "audit to stderr": {"auditLog": {"destination": "stderr"}},
    "audit to a file": {"auditLog": {"destination": "file", "hostPath": "/var/log/audit/vault"}},
    "network policy": {
        "networkPolicy": {
            "enabled": True,
            "vault": PEER,
            "dns": PEER,
            "apiServer": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
            "vaultPorts": [8200, 8210],
            "apiServerPorts": [6443],
            "extraEgress": [{"ports": [{"protocol": "TCP", "port": 3128}]}],
        }
    },
    "no tests": {"tests": {"enabled": False}},
}


class Strict(yaml.SafeLoader):
    """Of two keys of one name YAML's readers take either, or neither: here they are a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A map whose keys are each there once."""
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"twice in one map: {keys}"
        return super().construct_mapping(node, deep)


def run(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run helm with nothing of this machine's configuration."""
    places = {f"HELM_{place}_HOME": str(home / place.lower()) for place in ("CACHE", "CONFIG", "DATA")}
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": os.devnull, **places}
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, env=environ, cwd=home)


def given(home: Path, values: Mapping[str, Any]) -> Path:
    """A file of values, with an address. In JSON, since PyYAML leaves strings without quotes that Helm takes for
    numbers."""
    path = home / "values.yaml"
    path.write_text(json.dumps({"vaultAddress": ADDRESS, **values}))
    return path


def template(
    home: Path, values: Mapping[str, Any], *flags: str, release: str = NAME, namespace: str = NAME
) -> list[Manifest]:
    """What `helm install` would send for some values, the tests' pod left out, and without a word of warning."""
    values_file = given(home, values)
    done = run(
        "template", release, CHART, "--namespace", namespace, "--values", values_file, "--skip-tests", *flags, home=home
    )
    assert done.returncode == 0, done.stderr
    # It says so of each string that stands in for a map, and takes the string.
    assert [line for line in done.stderr.splitlines() if "cannot overwrite table with non table" not in line] == []
    return [manifest for manifest in yaml.load_all(done.stdout, Strict) if manifest is not None]


def refusal(home: Path, values: Mapping[str, Any]) -> str:
    """What helm says of values that it does not take."""
    done = run("template", NAME, CHART, "--values", given(home, values), home=home)
    assert done.returncode != 0, done.stdout
    return done.stderr


def with_namespace(manifests: list[Manifest], name: str = NAME) -> list[Manifest]:
    """With the namespace, which helm does not make from a template."""
    return [*manifests, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}]


def kubernetes_own(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Without the custom resources of an operator."""
    return [manifest for manifest in manifests if manifest["kind"] not in OPERATOR_KINDS]


def assert_all_valid(manifests: Iterable[Manifest], version: str) -> None:
    """Each object fits the schemas of what it is of: a Kubernetes version's, or the Prometheus operator's."""
    manifests = list(manifests)
    assert_valid(kubernetes_own(manifests), version)
    assert_operator_valid(manifests)


def normal(manifests: Iterable[Manifest]) -> dict[tuple[str, str], Manifest]:
    """The objects by kind and name, without what only helm writes, and lists whose order means nothing sorted."""
    helms = {"helm.sh/chart", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"}

    def plain(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: plain(inner, name) for name, inner in value.items() if name not in helms}
        if isinstance(value, list):
            items = [plain(item) for item in value]
            return sorted(items, key=functools.partial(json.dumps, sort_keys=True)) if key in UNORDERED else items
        return value

    return {(m["kind"], m["metadata"]["name"]): plain(m) for m in manifests}


UNORDERED = {"args", "env", "volumes", "volumeMounts"}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({"resources": ["."]}, {}),
    "driver-tokens": ({"resources": ["overlays/driver-tokens"]}, {"rbac": {"tokenRequest": False}}),
    "no session-state": (
        {"resources": ["base"], "components": [f"components/{piece}" for piece in RIGHTS]},
        {"stateDir": {"enabled": False}},
    ),
    "no hmac-secret": (
        {
            "resources": ["base"],
            "components": [f"components/{p}" for p in ("token-request", "pod-end", "session-state")],
        },
        {"rbac": {"hmacSecret": False}},
    ),
    "vault-ca": (
        {"resources": ["."], "components": ["components/vault-ca"]},
        {"vaultCA": {"configMap": "vault-ca"}},
    ),
    "network-policy": (
        {"resources": ["."], "components": ["components/network-policy"]},
        {"networkPolicy": {"enabled": True}},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_chart_and_manifests_say_the_same(tmp_path: Path, case: str) -> None:
    """kubectl's objects and helm's are equal, field for field, but for helm's labels and the namespace, which helm
    makes from no template."""
    kustomization, values = SAME[case]
    manifests = normal(overlay(tmp_path, **copy.deepcopy(kustomization)))
    namespace = manifests.pop(("Namespace", NAME))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    assert normal(template(tmp_path, values)) == manifests


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Manifest]]:
    """The objects of a case of the matrix, rendered once; not to be changed."""
    home = tmp_path_factory.mktemp("rendered")
    return functools.cache(lambda case: template(home, MATRIX[case]))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", MATRIX)
def test_every_choice_of_values_is_valid(rendered: Callable[[str], list[Manifest]], case: str, version: str) -> None:
    """Whatever the values, the objects fit a Kubernetes version's schemas, none unknown, and refer to what is there."""
    manifests = rendered(case)
    assert_all_valid(manifests, version)
    named = [*with_namespace(manifests)]
    if case == "an account that is there":
        named.append({"kind": "ServiceAccount", "metadata": {"name": "there", "namespace": NAME}})
    assert_sound(named)


@pytest.mark.parametrize("case", MATRIX)
def test_every_choice_of_values_runs(rendered: Callable[[str], list[Manifest]], case: str) -> None:
    """Whatever the values, the daemon takes its arguments, the volumes are mounted, the probes find their port, an
    update is one that the API server admits, and the token is there where a right is."""
    manifests = rendered(case)
    workload = daemonset(manifests)
    pod, spec = pod_spec(workload), container(manifests)
    understood = settings(manifests)
    assert understood.endpoint.startswith("/provider/")
    mounted, volumes = ([v["name"] for v in at_list] for at_list in (spec["volumeMounts"], pod["volumes"]))
    assert sorted(mounted) == sorted(volumes)
    assert len({mount["mountPath"] for mount in spec["volumeMounts"]}) == len(mounted)
    assert len({variable["name"] for variable in spec["env"]}) == len(spec["env"])
    ports = {port["name"]: port["containerPort"] for port in spec["ports"]}
    assert ports["health"] == int(understood.health_addr.rpartition(":")[2])
    for probe in ("startup", "readiness", "liveness"):
        assert spec[f"{probe}Probe"]["httpGet"]["port"] in ports
    rolling = workload["spec"]["updateStrategy"].get("rollingUpdate")
    if rolling is not None:
        assert [str(most) in ("0", "0%") for most in rolling.values()].count(True) == 1
        # Two pods of the node's own network do not fit beside each other.
        assert not (pod.get("hostNetwork") and rolling["maxSurge"])
    if case != "an account that is there":
        assert pod["automountServiceAccountToken"] is bool(rights(manifests))
    assert pod["terminationGracePeriodSeconds"] > understood.mount_timeout


@pytest.mark.parametrize("case", MATRIX)
def test_lint_finds_nothing(tmp_path: Path, case: str) -> None:
    """`helm lint --strict` takes the chart with whatever values."""
    done = run("lint", "--strict", CHART, "--values", given(tmp_path, MATRIX[case]), home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def leaves(values: Mapping[str, Any], *above: str) -> Iterable[tuple[str, ...]]:
    """The path of each value; what Kubernetes defines is one value."""
    for name, value in values.items():
        path = (*above, name)
        if isinstance(value, dict) and value and "properties" in schema_at(path):
            yield from leaves(value, *path)
        else:
            yield path


def schema_at(path: Iterable[str]) -> dict[str, Any]:
    """The schema's part for a value; fails where it has none."""
    found = SCHEMA
    for name in path:
        found = found["properties"][name]
        if "$ref" in found:
            found = SCHEMA["definitions"][found["$ref"].rpartition("/")[2]]
    return found


def test_schema_knows_each_value_and_no_other() -> None:
    """Each value of values.yaml has its place in the schema; what else is there is ignored, and says so."""

    def names(schema: Mapping[str, Any], *above: str) -> Iterable[tuple[str, ...]]:
        for name in schema["properties"]:
            inner = schema_at((*above, name))
            if "properties" in inner and "$ref" not in schema["properties"][name]:
                yield from names(inner, *above, name)
            else:
                yield (*above, name)

    known = set(names(SCHEMA))
    # A probe is one value: its fields are Kubernetes' own.
    taken = {path[:1] if path[0].endswith("Probe") else path for path in leaves(DEFAULTS)}
    assert {path for path in taken if path not in known} == set()
    others = {("global", "imagePullSecrets"), ("global", "externalVaultAddr"), ("enabled",), ("agent",)}
    assert known - taken == others


def test_matrix_has_every_value() -> None:
    """Each value of values.yaml is given by some case, so that none is without a test."""

    def paths(values: Mapping[str, Any], *above: str) -> Iterable[tuple[str, ...]]:
        for name, value in values.items():
            yield (*above, name)
            if isinstance(value, dict):
                yield from paths(value, *above, name)

    tried = {path for values in MATRIX.values() for path in paths(values)} | {("vaultAddress",)}
    assert {path for path in leaves(DEFAULTS) if path not in tried and not path[0].endswith("Probe")} == set()
    assert {path[0] for path in tried} >= {"startupProbe", "readinessProbe", "livenessProbe"}


def test_every_value_says_what_it_is_for() -> None:
    """Whoever reads values.yaml finds a comment at each value of the first level, or at a part of it."""
    text = (CHART / "values.yaml").read_text()
    silent = []
    for block in re.split(r"\n\n+", text):
        silent += re.findall(r"^([A-Za-z]+):", block, re.MULTILINE) if "#" not in block else []
    assert silent == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vaultAdress": ADDRESS}, "vaultAdress"),
        ({"vaultAddress": "vault:8200"}, "/vaultAddress"),
        ({"vaultAddress": ""}, "vaultAddress: where Vault or OpenBao is"),
        ({"providerName": "my vault"}, "/providerName"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"logLevel": "loud"}, "/logLevel"),
        ({"sweep": {"interval": "soon"}}, "/sweep/interval"),
        ({"healthPort": 0}, "/healthPort"),
        ({"auditLog": {"destination": "syslog"}}, "/auditLog/destination"),
        ({"readinessProbe": {"httpGet": {}}}, "/readinessProbe"),
        ({"pod": {"priority": 1}}, "/pod"),
        ({"unknownFields": "ignore"}, "/unknownFields"),
        ({"vaultCA": {"configMap": "a", "secret": "b"}}, "not both"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
        ({"monitors": {"podMonitor": {"enabled": True}}, "metrics": {"enabled": False}}, "nothing to scrape"),
        ({"monitors": {"serviceMonitor": {"enabled": True}}, "metrics": {"enabled": False}}, "nothing to scrape"),
        ({"monitors": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}}, "not both"),
        ({"monitors": {"prometheusRule": {"enabled": True}}, "metrics": {"enabled": False}}, "nothing to alert on"),
        ({"hostNetwork": True, "daemonSet": {"updateStrategy": {"maxSurge": 1}}}, "has to be 0"),
        ({"daemonSet": {"updateStrategy": {"maxSurge": 1, "maxUnavailable": 1}}}, "one has to be 0"),
        ({"daemonSet": {"updateStrategy": {"maxSurge": 0, "maxUnavailable": 0}}}, "one has to be 0"),
        ({"daemonSet": {"updateStrategy": {"maxSurge": "00"}}}, "/daemonSet/updateStrategy/maxSurge"),
        ({"daemonSet": {"updateStrategy": {"maxUnavailable": "101%"}}}, "/daemonSet/updateStrategy/maxUnavailable"),
        ({"daemonSet": {"endpoint": "/run/vault.sock"}}, "/daemonSet/endpoint"),
        ({"daemonSet": {"endpoint": "/provider/a.sock"}, "providerName": "b"}, "daemonSet.endpoint"),
        ({"global": {"externalVaultAddr": "vault:8200"}}, "/global/externalVaultAddr"),
        ({"extraEnvironmentVars": {"VAULT_ADDR": ADDRESS}}, "VAULT_ADDR is set by the chart"),
        (
            {"extraEnvironmentVars": {"VAULT_CACERT": "/a"}, "vaultCA": {"secret": "b"}},
            "VAULT_CACERT is set by the chart",
        ),
        ({"volumes": [{"name": "state", "emptyDir": {}}]}, "volumes: state"),
        ({"fullnameOverride": "My Name"}, "/fullnameOverride"),
        ({"fullnameOverride": "1st", "monitors": {"serviceMonitor": {"enabled": True}}}, "a Service's name"),
        ({"nameOverride": "a.b"}, "/nameOverride"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    """A value that is misspelled, of the wrong kind, or at odds with another is refused by name, before anything is
    installed."""
    assert said in refusal(tmp_path, values)


# Every value that the csi section of Vault's chart has, with what people put there.
VAULTS_SECTION = """
enabled: true
image: {repository: registry.example.com/vault-csi-provider, tag: 0.1.0, pullPolicy: IfNotPresent}
volumes: [{name: tls, secret: {secretName: vault-tls}}]
volumeMounts: [{name: tls, mountPath: /vault/tls, readOnly: true}]
resources: {requests: {cpu: 50m, memory: 128Mi}, limits: {memory: 256Mi}}
hmacSecretName: versions
hostNetwork: false
daemonSet:
  updateStrategy: {type: RollingUpdate, maxUnavailable: ""}
  annotations: {}
  providersDir: /var/run/secrets-store-csi-providers
  kubeletRootDir: /var/lib/kubelet
  extraLabels: {team: platform}
  securityContext: {pod: {}, container: {}}
pod:
  annotations: |
    team: "{{ .Release.Name }}"
  tolerations: |
    - operator: Exists
  nodeSelector: {}
  affinity: {}
  extraLabels: {}
agent: {enabled: false, image: {repository: hashicorp/vault}}
priorityClassName: system-node-critical
serviceAccount: {annotations: {}, extraLabels: {}}
readinessProbe: {failureThreshold: 2, initialDelaySeconds: 5, periodSeconds: 5, successThreshold: 1, timeoutSeconds: 3}
livenessProbe: {failureThreshold: 2, initialDelaySeconds: 5, periodSeconds: 5, successThreshold: 1, timeoutSeconds: 3}
logLevel: info
debug: false
extraArgs: ["-vault-tls-ca-cert=/vault/tls/ca.crt"]
"""


def test_the_csi_section_of_vaults_chart_works(tmp_path: Path) -> None:
    """What stands below `csi` in the values of Vault's chart is taken as it is, and means the same."""
    manifests = template(tmp_path, yaml.safe_load(VAULTS_SECTION), release="vault", namespace="vault")
    assert_valid(manifests, KUBERNETES[-1])
    assert_sound(with_namespace(manifests, "vault"))
    understood = settings(manifests)
    assert (understood.hmac_secret_name, understood.tls.ca_cert) == ("versions", "/vault/tls/ca.crt")
    spec = container(manifests)
    assert spec["image"] == "registry.example.com/vault-csi-provider:0.1.0"
    assert spec["resources"]["limits"] == {"memory": "256Mi"}
    assert {mount["name"] for mount in spec["volumeMounts"]} == {"providers", "state", "tls"}
    assert spec["livenessProbe"]["initialDelaySeconds"] == 5
    workload = daemonset(manifests)
    assert workload["metadata"]["labels"]["team"] == "platform"
    assert at(workload, "spec.template.metadata.annotations") == {"team": "vault"}
    # An empty context there leaves ours: it does not open the container.
    assert spec["securityContext"] == DEFAULTS["daemonSet"]["securityContext"]["container"]
    may_get = {right[3] for right in rights(manifests) if right[2] == "secrets" and right[4] == "get"}
    assert may_get == {"versions"}


@pytest.mark.parametrize("pieces", [*itertools.product([False, True], repeat=3)])
def test_each_right_can_be_left_out(tmp_path: Path, pieces: tuple[bool, ...]) -> None:
    """Any choice of rights renders just these, and the daemon does not try what it has no right to."""
    tokens, secret, sweep = pieces
    values = {"rbac": {"tokenRequest": tokens, "hmacSecret": secret}, "sweep": {"enabled": sweep}}
    manifests = template(tmp_path, values)
    chosen = [piece for piece, wanted in zip(RIGHTS, pieces, strict=True) if wanted]
    assert rights(manifests) == set().union(*(RIGHTS[piece] for piece in chosen))
    assert settings(manifests).revoke is sweep


def test_every_right_says_why() -> None:
    """Whoever reads a rule of the chart's roles finds a comment right above it, as in the manifests."""
    lines = (CHART / "templates" / "rbac.yaml").read_text().splitlines()
    rules = [before for before, line in itertools.pairwise(lines) if line.startswith("  - apiGroups:")]
    assert len(rules) == len(set().union(*RIGHTS.values()))
    assert [before for before in rules if not before.startswith("  # ")] == []


def test_version_is_the_providers() -> None:
    """Chart, appVersion and so the image are of the version that they are part of."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == provider.__version__


def test_two_releases_of_one_namespace_stay_apart(tmp_path: Path) -> None:
    """A second release, for classes that say `provider: openbao`, shares no object, socket or pod with the first."""
    first = template(tmp_path, {})
    second = template(
        tmp_path, {"providerName": "openbao", "stateDir": {"hostPath": "/run/openbao"}}, release="openbao"
    )
    assert normal(first).keys().isdisjoint(normal(second).keys())
    selectors = [daemonset(each)["spec"]["selector"]["matchLabels"] for each in (first, second)]
    labels = [daemonset(each)["spec"]["template"]["metadata"]["labels"] for each in (first, second)]
    assert selectors[0].items() <= labels[0].items()
    assert not selectors[0].items() <= labels[1].items()
    assert settings(first).endpoint != settings(second).endpoint


def policy(manifests: Iterable[Manifest]) -> Manifest:
    """The only NetworkPolicy's spec."""
    (found,) = of_kind(manifests, "NetworkPolicy")
    spec: Manifest = found["spec"]
    return spec


def reached(manifests: Iterable[Manifest]) -> set[tuple[str, int]]:
    """Every protocol and port that the pod may reach somewhere."""
    return {(p["protocol"], p["port"]) for rule in policy(manifests)["egress"] for p in rule["ports"]}


DNS = {("UDP", 53), ("TCP", 53)}
API = {("TCP", 443), ("TCP", 6443)}


@pytest.mark.parametrize(
    ("address", "port"),
    [
        (ADDRESS, {("TCP", 8200)}),
        ("https://vault.example.com", {("TCP", 443)}),
        ("http://vault", {("TCP", 80)}),
        ("https://[2001:db8::1]:8300/prefix", {("TCP", 8300)}),
        ("https://[2001:db8::1]", {("TCP", 443)}),
        ("unix:///run/vault.sock", set()),
    ],
)
def test_policy_opens_vaults_port(tmp_path: Path, address: str, port: set[tuple[str, int]]) -> None:
    """The pod reaches DNS, the API server and the port of the address, and nothing else."""
    manifests = template(tmp_path, {"vaultAddress": address, "networkPolicy": {"enabled": True}})
    assert reached(manifests) == DNS | API | port
    assert policy(manifests)["policyTypes"] == ["Ingress", "Egress"]
    selected = policy(manifests)["podSelector"]["matchLabels"]
    assert selected.items() <= daemonset(manifests)["spec"]["template"]["metadata"]["labels"].items()


def test_policy_narrows_to_peers(tmp_path: Path) -> None:
    """Peers that are named hold for their own direction, and a pod without a right does not reach the API server."""
    manifests = template(tmp_path, MATRIX["network policy"])
    dns, vault, api, extra = policy(manifests)["egress"]
    assert (dns["to"], vault["to"]) == (PEER, PEER)
    assert [port["port"] for port in vault["ports"]] == [8200, 8210]
    assert api == {"ports": [{"protocol": "TCP", "port": 6443}], "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}
    assert extra == {"ports": [{"protocol": "TCP", "port": 3128}]}
    without = template(tmp_path, {**MATRIX["no right"], "networkPolicy": {"enabled": True}})
    assert reached(without) == DNS | {("TCP", 8200)}


@pytest.mark.parametrize(
    ("values", "port", "number"),
    [
        ({}, "health", 8080),
        ({"healthPort": 9808}, "health", 9808),
        ({"metrics": {"port": 9102}}, "metrics", 9102),
        ({"metrics": {"port": 8080}}, "health", 8080),
    ],
)
def test_metrics_are_scraped_where_they_are(tmp_path: Path, values: dict[str, Any], port: str, number: int) -> None:
    """Monitor, policy and annotations name the port at which the daemon serves its metrics."""
    asked = {
        "monitors": {"podMonitor": {"enabled": True}},
        "networkPolicy": {"enabled": True, "metricsFrom": PEER},
        **values,
        "metrics": {"scrapeAnnotations": True, **values.get("metrics", {})},
    }
    manifests = template(tmp_path, asked)
    understood = settings(manifests)
    assert (understood.metrics_addr or understood.health_addr) == f":{number}"
    assert {p["name"]: p["containerPort"] for p in container(manifests)["ports"]}[port] == number
    (monitor,) = of_kind(manifests, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (port, "/metrics")
    selected = monitor["spec"]["selector"]["matchLabels"]
    assert selected.items() <= daemonset(manifests)["spec"]["template"]["metadata"]["labels"].items()
    (rule,) = policy(manifests)["ingress"]
    assert rule == {"ports": [{"protocol": "TCP", "port": port}], "from": PEER}
    annotations = daemonset(manifests)["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(number)


def test_without_metrics_nothing_is_let_in(tmp_path: Path) -> None:
    """With metrics off, the daemon serves none, no annotation names them, and the policy lets nobody in."""
    manifests = template(tmp_path, MATRIX["no metrics"])
    assert settings(manifests).metrics_addr == "off"
    assert policy(manifests)["ingress"] == []
    assert "annotations" not in daemonset(manifests)["spec"]["template"]["metadata"]


def test_alerts_are_those_of_the_monitoring(tmp_path: Path) -> None:
    """The chart's rule holds the very groups of deploy/monitoring, with Prometheus' templates as they are there."""
    rules = (ROOT / "deploy" / "monitoring" / "rules.yaml").read_text()
    copied = (CHART / "files" / "rules.yaml").read_text()
    assert copied == rules, "cp deploy/monitoring/rules.yaml deploy/helm/vault-csi-provider/files/"
    (rule,) = of_kind(template(tmp_path, MATRIX["monitors"]), "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    there = "https://wiki.example.com/runbook#"
    assert rule["spec"] == yaml.safe_load(rules.replace("docs/runbook.md#", there))
    assert "docs/runbook.md#" in rules
    # Alerts that go by the namespace, and by the name of the DaemonSet and its pods, go by this release's.
    named = {**MATRIX["monitors"], "fullnameOverride": "secrets"}
    (other,) = of_kind(template(tmp_path, named, namespace="elsewhere"), "PrometheusRule")
    told = "".join(str(rule["expr"]) for group in other["spec"]["groups"] for rule in group["rules"])
    assert {'namespace="elsewhere"', 'daemonset="secrets"', 'created_by_name="secrets"'} <= {*re.split("[{,} ]", told)}
    assert "vault-csi-provider" not in told
    assert 'container="provider"' in told
    assert container(template(tmp_path, {}))["name"] == "provider"


@pytest.mark.parametrize("file", ["podmonitor", "servicemonitor", "prometheusrule"])
def test_monitors_are_those_of_the_monitoring(tmp_path: Path, file: str) -> None:
    """The chart's objects for the Prometheus operator are those of deploy/monitoring, field for field."""
    switch = {"podmonitor": "podMonitor", "servicemonitor": "serviceMonitor", "prometheusrule": "prometheusRule"}[file]
    made = normal(template(tmp_path, {"monitors": {switch: {"enabled": True}}}))
    there = normal(yaml.safe_load_all((ROOT / "deploy" / "monitoring" / f"{file}.yaml").read_text()))
    assert {key: made[key] for key in made.keys() - normal(template(tmp_path, {})).keys()} == there


def parts(values: Mapping[str, Any], *above: str) -> Iterable[tuple[str, ...]]:
    """The path of each value, and of each map of values that the schema knows."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict) and value and "properties" in schema_at((*above, name)):
            yield from parts(value, *above, name)


def nested(path: Iterable[str], value: Any) -> dict[str, Any]:
    """A value at its path, as a file of values has it."""
    for name in reversed([*path]):
        value = {name: value}
    given_values: dict[str, Any] = value
    return given_values


@pytest.mark.parametrize("path", [*parts(DEFAULTS)], ids=".".join)
def test_a_value_that_is_taken_away(tmp_path: Path, path: tuple[str, ...]) -> None:
    """null is Helm's way to take a default away. Where the schema lets it be null, what is left is valid and the daemon
    starts with it; everywhere else helm refuses, and names what is missing."""
    *above, name = path
    schema = schema_at(path)
    kinds = [schema, *schema.get("anyOf", [])]
    removable = any("null" in kind.get("type", ()) or None in kind.get("enum", ()) for kind in kinds)
    assert removable != (name in schema_at(above).get("required", ()))
    values = nested(path, None)
    if removable and path != ("vaultAddress",):
        manifests = template(tmp_path, values)
        assert_valid(manifests, KUBERNETES[-1])
        assert "" not in (settings(manifests).endpoint, settings(manifests).vault_addr)
        if name.endswith("Probe"):
            assert name not in container(manifests)
    else:
        assert name in refusal(tmp_path, {"vaultAddress": ADDRESS, **values})


# Names that YAML takes for a number, a boolean or nothing where they stand without quotes.
LOOKALIKES = ["123", "1e3", "0b1", "true", "null", "on", "0x1f", "010"]


@pytest.mark.parametrize("name", LOOKALIKES)
def test_names_stay_names(tmp_path: Path, name: str) -> None:
    """Whatever name an object, a release or a namespace has, it is a string in what is installed."""
    every: dict[str, Any] = {
        **dict.fromkeys(("nameOverride", "vaultNamespace", "vaultAuthMountPath", "hmacSecretName"), name),
        **{"priorityClassName": name, "providerName": name, "imagePullSecrets": [{"name": name}]},
        "vaultCA": {"configMap": name, "key": name},
        "image": {"tag": name, "repository": name},
        "serviceAccount": {"name": name, "extraLabels": {"team": name}, "annotations": {"team": name}},
        "daemonSet": {"extraLabels": {"team": name}, "annotations": {"team": name}, "providersDir": "/a:"},
        "pod": {"extraLabels": {"team": name}, "annotations": {"team": name}, "nodeSelector": {"disk": name}},
        "extraEnvironmentVars": {"NAME": name},
        "monitors": {
            "podMonitor": {"enabled": True, "labels": {"release": name}, "interval": "0", "scrapeTimeout": "0"},
            "prometheusRule": {"enabled": True, "runbook": "*page"},
        },
        "networkPolicy": {"enabled": True},
    }
    for values in (every, {**every, "vaultCA": {"secret": name}}):
        manifests = template(tmp_path, values, release=name, namespace=name)
        assert_all_valid(manifests, KUBERNETES[-1])
        assert_sound(with_namespace(manifests, name))
        understood = settings(manifests)
        assert (understood.vault_namespace, understood.vault_mount, understood.hmac_secret_name) == (name,) * 3
        assert understood.endpoint == f"/provider/{name}.sock"
    named = {m["metadata"]["name"] for m in template(tmp_path, {"fullnameOverride": name})}
    assert {name} < named


OWN_LABELS = ["app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart"]
LABELLED = [path for path in leaves(DEFAULTS) if path[-1] in ("labels", "extraLabels")]


@pytest.mark.parametrize("label", OWN_LABELS)
@pytest.mark.parametrize("path", LABELLED, ids=".".join)
def test_own_labels_are_the_charts(tmp_path: Path, path: tuple[str, ...], label: str) -> None:
    """A label by which the chart or Helm finds an object is nobody else's to set: it would be there twice."""
    place = "/".join(["", *path, label.replace("/", "~1")])
    assert f"at '{place}'" in refusal(tmp_path, nested(path, {label: "mine"}))


def test_own_annotations_can_be_set(tmp_path: Path) -> None:
    """Whoever annotates the pod wins over the chart's annotations for Prometheus, which are then there once."""
    pod = {"annotations": {"prometheus.io/scrape": "false"}}
    manifests = template(tmp_path, {"metrics": {"scrapeAnnotations": True}, "pod": pod})
    annotations = daemonset(manifests)["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "false",
        "prometheus.io/port": "8080",
        "prometheus.io/path": "/metrics",
    }


# As Go reads them and as it does not, below the least that a sweep may have and above.
DURATIONS = [
    *("0", "0s", "00", "1", "60", "s", "1s", "90s", "1m30s", "1h30m", "300ms", "999ms", "1000ms", "1.5s"),
    *("0.5s", "0.5s0.5s", "500ms500ms", "1s1s", ".5h", "5.m", "1ns", "1us", "1µs", "1μs", "1000000us", "1d"),
    *("1w", "1y", "1S", "1M", "1H", "-1s", "+1s", "1e3s", "1,5s", "1..5s", ".", ".s", "1.s", "1s.", "0x1s"),
    *("\u0661s", "1m1h", "1hour", "0.01m", "0.02m", "off", "never"),
]


@pytest.mark.parametrize("duration", ["", "1 s", " 1s", "1s\n", *DURATIONS])
@pytest.mark.parametrize(
    ("path", "flag"), [(("sweep", "interval"), "sweep-interval"), (("refreshAfter",), "refresh-after")]
)
def test_durations_are_those_that_the_daemon_reads(
    tmp_path: Path, path: tuple[str, ...], flag: str, duration: str
) -> None:
    """The chart takes a duration if and only if the daemon does, which would else end at once, on every node."""
    try:
        parse([f"-{flag}={duration}"], {}, version=str)
        taken = True
    except InvalidSetting:
        taken = False
    if taken:
        understood = settings(template(tmp_path, nested(path, duration)))
        asked = parse([f"-{flag}={duration}"], {}, version=str).settings
        assert asked is not None
        assert (understood.sweep_interval, understood.refresh_after) == (asked.sweep_interval, asked.refresh_after)
    else:
        assert path[-1] in refusal(tmp_path, nested(path, duration))


# Values that become flags or variables of the daemon, at the edge of what it reads.
ODD: dict[str, tuple[list[Any], list[Any]]] = {
    "vaultAddress": (
        ["https://vault:65535", "https://[2001:db8::1]:8200", "http://vault/prefix/", "unix:///run/x.sock"],
        [
            *("https://vault:0", "https://vault:65536", "https://user:word@vault", "https://vault?x=1"),
            *("https://vault#x", "https://[vault]", "https://:8200", "unix://run/x.sock", "unix:///run/x.sock?x"),
        ],
    ),
    "allowedVaultAddresses": (
        [
            *(["*"], ["*.example.com", "vault", "Vault.example.com:8200"], ["10.0.0.1:8200", "[2001:db8::1]:443"]),
            *(["https://vault.example.com:*/a/b.c/", "http://*", "unix:///run/a/vault.sock"],),
        ],
        [
            *([""], ["a,b"], ["a b"], ["vault/path"], ["https://vault/a/../b"], ["https://vault/%41"], ["10.0.0.256"]),
            *(["127.1"], ["vault:0"], ["vault:65536"], ["ftp://vault"], ["https://vault?x"], ["-vault"], ["v*"]),
            *(["unix://run/x"], ["unix:///run/../x"], ["https://user@vault"], ["0x7f.1"]),
        ],
    ),
    "tlsRoot": (["/", "/tls", "/tls/", "/..tls/.x/..."], ["tls", "/tls/..", "/../tls", "/tls/../x"]),
    "maxPodMounts": ([0, 10_000_000], [-1, 10_000_001]),
    "maxPodMiB": ([0, 10_000_000], [-1, 10_000_001]),
    "vaultNamespace": (["team/a", "team b"], ["team\n", "\x7f"]),
    "vaultAuthMountPath": (["k8s/one"], ["k8s\t"]),
    "hmacSecretName": (["a.b-c"], ["-a", "A", "a_b", "a" * 254]),
}


@pytest.mark.parametrize("name", ODD)
def test_the_daemon_takes_what_the_chart_takes(tmp_path: Path, name: str) -> None:
    """At the edge of what is allowed, a value is refused by the schema, or it is one with which the daemon starts."""
    taken, refused = ODD[name]
    for value in taken:
        assert settings(template(tmp_path, {name: value})).hardened
    for value in refused:
        assert f"/{name}" in refusal(tmp_path, {name: value})


@pytest.mark.parametrize("duration", ["1.5m", "1m1h", "90", "1h ", "soon", "-1s", "1S", "1us"])
@pytest.mark.parametrize("field", ["interval", "scrapeTimeout"])
@pytest.mark.parametrize("monitor", ["podMonitor", "serviceMonitor"])
def test_durations_of_monitors_are_the_operators(tmp_path: Path, monitor: str, field: str, duration: str) -> None:
    """A duration that the Prometheus operator's definition does not have is refused before it gets there."""
    assert re.fullmatch(DURATION, duration) is None
    assert f"/monitors/{monitor}/{field}" in refusal(tmp_path, nested(("monitors", monitor, field), duration))


@pytest.mark.parametrize(
    ("interval", "timeout", "taken"),
    [
        ("10s", "10s", True),
        ("5s", "10s", False),
        ("1h", "59m60s", True),
        ("1m", "1m1ms", False),
        ("1d", "23h", True),
        ("", "10s", True),
        ("5s", "", True),
        (None, None, True),
    ],
)
def test_no_scrape_takes_longer_than_the_interval(
    tmp_path: Path, interval: str | None, timeout: str | None, taken: bool
) -> None:
    """The operator passes over a monitor whose timeout is above its interval, and nothing is scraped: it is refused.
    What is empty is left to Prometheus."""
    monitor = {"enabled": True, "interval": interval, "scrapeTimeout": timeout}
    values = {"monitors": {"podMonitor": monitor}}
    if not taken:
        assert "scrapeTimeout" in refusal(tmp_path, values)
        return
    manifests = template(tmp_path, values)
    assert_operator_valid(manifests)
    (endpoint,) = of_kind(manifests, "PodMonitor")[0]["spec"]["podMetricsEndpoints"]
    assert (endpoint.get("interval"), endpoint.get("scrapeTimeout")) == (interval or None, timeout or None)


@pytest.mark.parametrize("kind", OPERATOR_KINDS)
def test_operators_schema_knows_no_other_field(tmp_path: Path, kind: str) -> None:
    """Wherever a field of the operator's objects is misspelled, a field too many or of another type, it shows."""
    monitor = {"ServiceMonitor": "serviceMonitor", "PodMonitor": "podMonitor", "PrometheusRule": "prometheusRule"}[kind]
    (made,) = of_kind(template(tmp_path, {"monitors": {monitor: {"enabled": True}}}), kind)
    assert_operator_valid([made])

    def maps(value: Any, name: str = "") -> Iterable[dict[str, Any]]:
        """Each map in there that has fields; labels and annotations have names of anybody's."""
        if isinstance(value, dict) and name not in ("labels", "annotations", "matchLabels"):
            yield value
            for field, inner in value.items():
                yield from maps(inner, field)
        elif isinstance(value, list):
            for inner in value:
                yield from maps(inner)

    places = [place for place in maps(made["spec"]) if place]
    assert len(places) > 3
    for place in places:
        for field, value in [*place.items()]:
            for wrong in ({f"{field}s": value}, {field: {"a": [value]}}):
                del place[field]
                place.update(wrong)
                with pytest.raises(ValidationError):
                    assert_operator_valid([made])
                place.pop(next(iter(wrong)))
                place[field] = value
    assert_operator_valid([made])


@pytest.mark.parametrize("empty", [[], None])
@pytest.mark.parametrize("path", [path for path in leaves(DEFAULTS) if path[0] == "networkPolicy"], ids=".".join)
def test_an_empty_list_opens_nothing(tmp_path: Path, path: tuple[str, ...], empty: list[Any] | None) -> None:
    """No list of the network policy, when empty, makes a rule without ports, which would let everything through; the
    ports are the same as ever, or fewer."""
    if path[-1] == "enabled":
        return
    values = {"networkPolicy": {"enabled": True, path[-1]: empty}}
    manifests = template(tmp_path, values)
    assert_all_valid(manifests, KUBERNETES[-1])
    rules = [*policy(manifests)["egress"], *policy(manifests)["ingress"]]
    assert all(rule["ports"] for rule in rules)
    api = set() if path[-1] == "apiServerPorts" else API
    assert reached(manifests) == DNS | api | {("TCP", 8200)}


def test_quota_is_none_of_kube_system(tmp_path: Path) -> None:
    """In kube-system a quota of the class would count kube-proxy and the network's pods; there the chart has none."""
    (quota,) = of_kind(template(tmp_path, {}, namespace="elsewhere"), "ResourceQuota")
    assert quota["metadata"]["namespace"] == "elsewhere"
    assert of_kind(template(tmp_path, {}, namespace="kube-system"), "ResourceQuota") == []


GLOBAL = {"imagePullSecrets": ["registry", {"name": "other"}], "externalVaultAddr": "https://vault.example.com"}


def test_global_values_of_vaults_chart_count(tmp_path: Path) -> None:
    """What Vault's chart has below `global` for all its parts holds here too, and this chart's own values win."""
    manifests = template(tmp_path, {"vaultAddress": "", "global": GLOBAL})
    assert settings(manifests).vault_addr == "https://vault.example.com"
    secrets = [{"name": "registry"}, {"name": "other"}]
    assert pod_spec(daemonset(manifests))["imagePullSecrets"] == secrets
    own = template(tmp_path, {"global": {**GLOBAL, "tlsDisable": True}, "imagePullSecrets": [{"name": "mine"}]})
    assert settings(own).vault_addr == ADDRESS
    assert pod_spec(daemonset(own))["imagePullSecrets"] == [{"name": "mine"}]
    tested = run("template", NAME, CHART, "--values", given(tmp_path, {"global": GLOBAL}), home=tmp_path)
    (pod,) = of_kind(yaml.load_all(tested.stdout, Strict), "Pod")
    assert pod["spec"]["imagePullSecrets"] == secrets


def test_strings_of_vaults_chart_count(tmp_path: Path) -> None:
    """Security contexts may be strings with templates, `enabled` a dash, and the socket's path stands for the name."""
    contexts = {"pod": "runAsNonRoot: {{ false }}", "container": "seLinuxOptions:\n  type: {{ .Release.Name }}"}
    values = {"enabled": "-", "daemonSet": {"securityContext": contexts, "endpoint": "unix:///provider/openbao.sock"}}
    manifests = template(tmp_path, values)
    assert pod_spec(daemonset(manifests))["securityContext"] == {"runAsNonRoot": False}
    assert container(manifests)["securityContext"] == {"seLinuxOptions": {"type": NAME}}
    assert settings(manifests).endpoint == "/provider/openbao.sock"
    same = {"providerName": "openbao", "daemonSet": {"securityContext": contexts}}
    assert manifests == template(tmp_path, same)


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        ({"annotations": "a: [b"}, "pod.annotations: the string is no YAML"),
        ({"tolerations": "all"}, "pod.tolerations: the string holds neither a map nor a list"),
        ({"affinity": "{{ .Values.nothing }"}, "unexpected"),
    ],
)
def test_strings_that_are_no_yaml_are_refused(tmp_path: Path, pod: dict[str, str], said: str) -> None:
    """A string that does not hold what it stands for is refused by the value's name, not with a line of the output."""
    assert said in refusal(tmp_path, {"pod": pod})


def test_strings_may_hold_nothing(tmp_path: Path) -> None:
    """A string whose template comes to nothing is as good as none."""
    nothing = "{{ if .Values.debug }}a: b{{ end }}"
    pod = {"annotations": nothing, "nodeSelector": nothing, "affinity": "# none\n", "tolerations": " "}
    manifests = template(tmp_path, {"pod": pod})
    assert_valid(manifests, KUBERNETES[-1])
    spec = pod_spec(daemonset(manifests))
    assert not any(spec.get(field) for field in ("nodeSelector", "affinity", "tolerations"))


def test_kubelets_directory_changes_nothing(tmp_path: Path) -> None:
    """Wherever kubelet keeps its pods, nothing of it is mounted: the driver writes the files."""
    moved = template(tmp_path, {"daemonSet": {"kubeletRootDir": "/var/lib/k0s/kubelet"}})
    assert moved == template(tmp_path, {})
    assert "kubelet" not in json.dumps(moved)


def test_hardened_and_opened(tmp_path: Path) -> None:
    """The chart installs hardened; each of its values opens one thing, by a flag."""
    flags = {flag.name for flag in FLAGS}
    closed = container(template(tmp_path, {}))["args"]
    assert "-hardened" in closed
    assert "-hardened" not in container(template(tmp_path, {"hardened": False}))["args"]
    opened = set(container(template(tmp_path, MATRIX["opened"]))["args"]) - set(closed)
    assert opened == {
        "-allowed-vault-addresses=https://other.example.com:8200,*.vault.example.com",
        "-allow-skip-tls-verify=true",
        "-tls-root=/etc/tls",
        "-unknown-fields=warn",
        "-max-pod-mounts=100",
        "-max-pod-objects=5000",
        "-max-pod-mib=64",
    }
    assert {argument.lstrip("-").partition("=")[0] for argument in [*opened, "-hardened"]} <= flags


def test_audit_file_is_on_the_node(tmp_path: Path) -> None:
    """The audit log's file lies in a directory of the node that outlives the pod, and may be written."""
    manifests = template(tmp_path, MATRIX["audit to a file"])
    audit = Path(settings(manifests).audit_log)
    assert audit.name == "audit.log"
    assert host_path_at(manifests, str(audit.parent)) == ("/var/log/audit/vault", True)
    assert settings(template(tmp_path, {})).audit_log == "off"
    assert settings(template(tmp_path, MATRIX["audit to stderr"])).audit_log == "stderr"


def test_helm_test_asks_a_real_daemon(tmp_path: Path) -> None:
    """The command of `helm test` gets its answer over the socket of a daemon that serves, and fails without one."""
    done = run("template", NAME, CHART, "--values", given(tmp_path, {}), home=tmp_path)
    (pod,) = of_kind(yaml.safe_load_all(done.stdout), "Pod")
    assert_valid([pod], KUBERNETES[-1])
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    # Security context constraints name accounts: the pod is admitted as the provider is, and without its token.
    assert pod["spec"]["serviceAccountName"] == NAME
    assert pod["spec"]["automountServiceAccountToken"] is False
    (asking,) = pod["spec"]["containers"]
    python, option, script = asking["command"]
    assert (python, option) == ("python", "-c")
    selector = daemonset(yaml.safe_load_all(done.stdout))["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= pod["metadata"]["labels"].items()
    # In the container the driver's directory is at /provider.
    assert "unix:/provider/vault.sock" in script
    socket = tmp_path / "vault.sock"
    here = script.replace("/provider/vault.sock", str(socket))
    impatient = [sys.executable, "-c", here.replace("timeout=30", "timeout=0.2")]
    assert subprocess.run(impatient, cwd=ROOT, capture_output=True, text=True).returncode != 0
    with daemon("tests.daemon", socket) as serving:
        serving.told("mounts are served")
        told = subprocess.run([sys.executable, "-c", here], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert provider.__version__ in told.stdout


@pytest.mark.parametrize(
    ("values", "said", "unsaid"),
    [
        ({}, "close to cluster-admin", "Not hardened"),
        ({"rbac": {"tokenRequest": False}}, "vault-csi-provider status", "close to cluster-admin"),
        ({"hardened": False}, "Not hardened", "in the clear"),
        ({"vaultAddress": "http://vault:8200"}, "in the clear", "Not hardened"),
        ({"agent": {"enabled": True}}, "`agent` is ignored", "hostNetwork"),
        ({"hostNetwork": True}, "With hostNetwork", "`agent`"),
        ({"healthPort": 9808}, "vault-csi-provider status -health-addr=:9808", "hostNetwork"),
        ({"daemonSet": {"updateStrategy": {"maxUnavailable": "1"}}}, "no new pod serves before", "With OnDelete"),
        ({"daemonSet": {"updateStrategy": {"maxSurge": "10%"}}}, "Look:", "no new pod serves before"),
        ({"daemonSet": {"updateStrategy": {"type": "OnDelete"}}}, "With OnDelete", "no new pod serves before"),
        ({"networkPolicy": {"enabled": True, "apiServerPorts": []}}, "apiServerPorts is empty", "hostNetwork"),
    ],
)
def test_notes_say_what_matters(tmp_path: Path, values: dict[str, Any], said: str, unsaid: str) -> None:
    """What helm prints after an install names what is risky in these values, and nothing that is not."""
    done = run(
        "install",
        NAME,
        CHART,
        "--namespace",
        NAME,
        "--dry-run=client",
        "--values",
        given(tmp_path, values),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    _, _, notes = done.stdout.partition("NOTES:")
    assert said in notes
    assert unsaid not in notes
    assert "pod-security.kubernetes.io/enforce=privileged" in notes


def test_package_holds_the_chart_alone(tmp_path: Path) -> None:
    """`helm package` takes the chart, with its schema and rules, and nothing else."""
    done = run("package", CHART, "--destination", tmp_path, home=tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"{NAME}-{provider.__version__}.tgz") as archive:
        packed = {Path(name).relative_to(NAME) for name in archive.getnames()}
    here = {path.relative_to(CHART) for path in CHART.rglob("*") if path.is_file()}
    assert packed == here


def test_manifests_are_where_the_pages_say() -> None:
    """The directories that are compared here are the ones that an installation names."""
    assert (DAEMONSET / "kustomization.yaml").is_file()
    assert (DAEMONSET / "overlays" / "driver-tokens" / "kustomization.yaml").is_file()
