"""The manifests: rendered by kubectl, valid for the Kubernetes API, confined; and examples that fit."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml

import provider
from provider.cli.command import parse
from provider.settings import Settings
from tests.tools import ROOT, kubectl

DAEMONSET = ROOT / "daemonset"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
INSTALLATIONS = {"all": DAEMONSET, "driver-tokens": DAEMONSET / "overlays" / "driver-tokens"}
RIGHTS = {
    "token-request": {("ClusterRole", "", "serviceaccounts/token", "*", "create")},
    "hmac-secret": {
        ("Role", "", "secrets", "vault-csi-provider-hmac-key", "get"),
        ("Role", "", "secrets", "*", "create"),
    },
    "pod-end": {("ClusterRole", "", "pods", "*", "list")},
}
CHOICES = [choice for size in range(len(RIGHTS) + 1) for choice in itertools.combinations(RIGHTS, size)]
# The oldest in which DaemonSets surge, one in between, and the newest that the schemas know.
KUBERNETES = ["1.25", "1.31", kubernetes_validate.latest_version()]
Manifest = dict[str, Any]


def render(directory: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send for a directory."""
    done = subprocess.run([kubectl(), "kustomize", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # kustomize warns of deprecated fields there.
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def overlay(directory: Path, **kustomization: Any) -> list[Manifest]:
    """Render an installation of one's own; its paths are below daemonset/, made relative for kustomize."""
    for field in ("resources", "components"):
        paths = [os.path.relpath(DAEMONSET / path, directory) for path in kustomization.get(field, [])]
        kustomization[field] = paths
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(directory)


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> list[Manifest]:
    """The objects of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def daemonset(manifests: Iterable[Manifest]) -> Manifest:
    """The only DaemonSet."""
    (found,) = of_kind(manifests, "DaemonSet")
    return found


def pod_spec(workload: Manifest) -> Manifest:
    """The pod that an object makes or is."""
    spec: Manifest = workload["spec"] if workload["kind"] == "Pod" else workload["spec"]["template"]["spec"]
    return spec


def container(manifests: Iterable[Manifest]) -> Manifest:
    """The DaemonSet's only container."""
    (found,) = pod_spec(daemonset(manifests))["containers"]
    assert isinstance(found, dict)
    return found


def at(manifest: Any, path: str) -> Any:
    """The value at a dotted path, or None where the path ends early."""
    for key in path.split("."):
        manifest = manifest.get(key) if isinstance(manifest, dict) else None
    return manifest


def rights(manifests: Iterable[Manifest]) -> set[tuple[str, str, str, str, str]]:
    """Every single right that the roles give: scope, API group, resource, name, verb."""
    return {
        (role["kind"], *right)
        for role in of_kind(manifests, "Role", "ClusterRole")
        for rule in role["rules"]
        for right in itertools.product(
            rule["apiGroups"], rule["resources"], rule.get("resourceNames", ["*"]), rule["verbs"]
        )
    }


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number; only the suffixes that the manifests use."""
    number, suffix = re.fullmatch(r"(\d+)(m|Mi|)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 0.001, "Mi": 2.0**20, "": 1.0}[suffix]


def assert_valid(manifests: Iterable[Manifest], version: str) -> None:
    """Every object is one that a Kubernetes version's API takes, with no field that it would drop."""
    for manifest in manifests:
        _validate(json.dumps(manifest), version)


@functools.cache
def _validate(manifest: str, version: str) -> None:
    """Once for each object: most are the same in many installations, and a look takes a tenth of a second."""
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


def assert_sound(manifests: list[Manifest]) -> None:
    """No two objects are one, and whatever an object refers to is there."""
    named = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in manifests]
    assert len(set(named)) == len(named)
    for binding in of_kind(manifests, "RoleBinding", "ClusterRoleBinding"):
        role = binding["roleRef"]
        namespace = binding["metadata"].get("namespace") if role["kind"] == "Role" else None
        assert (role["kind"], namespace, role["name"]) in named
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"], subject["name"]) in named
    for workload in of_kind(manifests, "DaemonSet"):
        namespace = workload["metadata"]["namespace"]
        assert ("ServiceAccount", namespace, pod_spec(workload)["serviceAccountName"]) in named
        assert ("Namespace", None, namespace) in named
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.fixture(scope="module", params=INSTALLATIONS)
def installation(request: pytest.FixtureRequest) -> list[Manifest]:
    """The objects of each installation that the repository offers."""
    return render(INSTALLATIONS[request.param])


@pytest.mark.parametrize("version", KUBERNETES)
def test_installation_is_valid(installation: list[Manifest], version: str) -> None:
    """Each installation renders to objects that fit the API's schemas, none unknown, each reference met."""
    assert_valid(installation, version)
    assert_sound(installation)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("pieces", CHOICES)
def test_each_right_can_be_left_out(tmp_path: Path, pieces: tuple[str, ...], version: str) -> None:
    """Any choice of the RBAC pieces is a valid set with just their rights (docs/contract.md section 4)."""
    chosen = [f"components/{piece}" for piece in pieces]
    manifests = overlay(tmp_path, resources=["base"], components=chosen)
    assert_valid(manifests, version)
    assert_sound(manifests)
    assert rights(manifests) == set().union(*(RIGHTS[piece] for piece in pieces))
    # A pod without a right carries no token that could be stolen; one with a right needs it.
    assert pod_spec(daemonset(manifests))["automountServiceAccountToken"] is bool(pieces)
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("name", "pieces"), [("all", set(RIGHTS)), ("driver-tokens", {"hmac-secret", "pod-end"})])
def test_rights_of_the_installations(name: str, pieces: set[str]) -> None:
    """The whole has every right and nothing else; where the driver sends tokens, none to make tokens."""
    manifests = render(INSTALLATIONS[name])
    assert rights(manifests) == set().union(*(RIGHTS[piece] for piece in pieces))
    bindings = of_kind(manifests, "RoleBinding", "ClusterRoleBinding")
    assert {b["roleRef"]["name"] for b in bindings} == {f"vault-csi-provider-{piece}" for piece in pieces}
    assert all(len(binding["subjects"]) == 1 for binding in bindings)


def test_the_namespace_can_be_another(tmp_path: Path) -> None:
    """With kustomize's `namespace` the whole moves: namespace, account, roles and the bindings' subjects."""
    manifests = overlay(tmp_path, resources=["."], namespace="elsewhere")
    assert_sound(manifests)
    assert "namespace: vault-csi-provider" not in yaml.safe_dump_all(manifests)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("securityContext.privileged", False),
        ("securityContext.allowPrivilegeEscalation", False),
        ("securityContext.readOnlyRootFilesystem", True),
        ("securityContext.capabilities", {"drop": ["ALL"]}),
        ("securityContext.seccompProfile.type", "RuntimeDefault"),
    ],
)
def test_container_is_confined(installation: list[Manifest], path: str, expected: object) -> None:
    """Root in the container is without privileges, capabilities, writable image or unusual system calls."""
    assert at(container(installation), path) == expected


def test_pod_sees_nothing_else_of_the_node(installation: list[Manifest]) -> None:
    """Of the host, the pod shares the socket's directory, its own for state, and no namespace or port."""
    pod = pod_spec(daemonset(installation))
    assert {key: pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")} == dict.fromkeys(
        ("hostNetwork", "hostPID", "hostIPC")
    )
    assert pod.keys().isdisjoint({"initContainers", "ephemeralContainers"})
    assert at(pod, "securityContext.seccompProfile.type") == "RuntimeDefault"
    assert sorted((volume["hostPath"] for volume in pod["volumes"]), key=lambda shared: shared["path"]) == [
        {"path": "/run/vault-csi-provider", "type": "DirectoryOrCreate"},
        {"path": "/var/run/secrets-store-csi-providers", "type": "DirectoryOrCreate"},
    ]
    assert all("hostPort" not in port for port in container(installation)["ports"])


def test_namespace_admits_the_pod(installation: list[Manifest]) -> None:
    """Pod Security lets hostPath pass, and the quota admits the pod's priority class outside kube-system."""
    (namespace,) = of_kind(installation, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    (quota,) = of_kind(installation, "ResourceQuota")
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    assert scope["values"] == [pod_spec(daemonset(installation))["priorityClassName"]]


def test_resources_are_asked_for_and_limited(installation: list[Manifest]) -> None:
    """The scheduler knows what the provider needs, memory has an end, and the CPU is not throttled."""
    resources = container(installation)["resources"]
    assert resources["requests"].keys() == {"cpu", "memory"}
    assert resources["limits"].keys() == {"memory"}
    assert 0 < quantity(resources["requests"]["memory"]) <= quantity(resources["limits"]["memory"])
    assert quantity(resources["requests"]["cpu"]) > 0


def test_every_linux_node_has_a_provider(installation: list[Manifest]) -> None:
    """Taints keep it from no Linux node, and it is among the last to be evicted."""
    pod = pod_spec(daemonset(installation))
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"


def test_an_update_leaves_no_gap(installation: list[Manifest]) -> None:
    """The new pod takes the socket over before the old one goes, and the old one may finish its mounts."""
    workload = daemonset(installation)
    assert workload["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert pod_spec(workload)["terminationGracePeriodSeconds"] > settings(installation).mount_timeout


def settings(manifests: Iterable[Manifest]) -> Settings:
    """What the daemon makes of the container's arguments and literal variables; refuses what it does not know."""
    spec = container(manifests)
    environment = {v["name"]: v["value"] for v in spec["env"] if "value" in v}
    command = parse(spec["args"], environment, version=str)
    assert command.settings is not None
    return command.settings


def test_daemon_takes_its_arguments(installation: list[Manifest]) -> None:
    """The daemon understands how the manifest starts it, and logs as cluster software is expected to."""
    understood = settings(installation)
    assert understood.vault_addr == "https://vault.vault.svc:8200"
    assert understood.log_format == "json"


def test_the_named_secret_is_the_daemons(installation: list[Manifest]) -> None:
    """The one Secret that may be read is the one that the daemon asks for."""
    may_get = {right[3] for right in rights(installation) if right[2] == "secrets" and right[4] == "get"}
    assert may_get == {settings(installation).hmac_secret_name}


def test_socket_is_where_the_driver_looks(installation: list[Manifest]) -> None:
    """The endpoint is in the driver's directory, by the classes' provider (docs/contract.md section 1)."""
    endpoint = PurePosixPath(settings(installation).endpoint)
    path, writable = host_path_at(installation, str(endpoint.parent))
    assert path == "/var/run/secrets-store-csi-providers"
    assert writable
    assert {c["spec"]["provider"] + ".sock" for _, c in CLASSES} == {endpoint.name}


def host_path_at(manifests: Iterable[Manifest], path: str) -> tuple[str, bool]:
    """What of the host is mounted at a path of the container, and whether it may write there."""
    manifests = list(manifests)
    (mount,) = [mount for mount in container(manifests)["volumeMounts"] if mount["mountPath"] == path]
    (volume,) = [volume for volume in pod_spec(daemonset(manifests))["volumes"] if volume["name"] == mount["name"]]
    return volume["hostPath"]["path"], not mount.get("readOnly")


def test_sessions_outlive_the_pod_and_end_with_the_node(installation: list[Manifest]) -> None:
    """The state directory is the node's, writable, the same for old and new pod, and in memory."""
    path, writable = host_path_at(installation, settings(installation).state_dir)
    assert PurePosixPath(path).is_relative_to("/run")
    assert writable


def test_state_can_be_left_out(tmp_path: Path) -> None:
    """Without its component the daemon keeps nothing on the node; with it, the other arguments stay."""
    without = overlay(tmp_path, resources=["base"])
    assert settings(without).state_dir == ""
    assert [volume["name"] for volume in pod_spec(daemonset(without))["volumes"]] == ["providers"]
    with_state = overlay(tmp_path, resources=["base"], components=["components/session-state"])
    assert container(with_state)["args"] == [*container(without)["args"], "-state-dir=/state"]
    assert rights(with_state) == set()


def test_pods_that_are_gone_are_looked_for(installation: list[Manifest]) -> None:
    """The installations have what revocation needs: it is on, and the right to list pods is there."""
    assert settings(installation).revoke
    assert RIGHTS["pod-end"] <= rights(installation)


def test_every_right_says_why() -> None:
    """Whoever reads a rule of RBAC finds a comment right above it."""
    rules = [
        (path, before)
        for path in DAEMONSET.glob("components/*/rbac.yaml")
        for before, line in itertools.pairwise(path.read_text().splitlines())
        if line.startswith("  - apiGroups:")
    ]
    assert len(rules) == sum(len(role["rules"]) for role in of_kind(render(DAEMONSET), "Role", "ClusterRole"))
    assert [str(path) for path, before in rules if not before.startswith("  # ")] == []


def test_probes_ask_the_health_server(installation: list[Manifest]) -> None:
    """Liveness and readiness are asked at the port that -health-addr opens."""
    spec = container(installation)
    ports = {port["name"]: port["containerPort"] for port in spec["ports"]}
    probes = {name: spec[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health/ready",
        "readiness": "/health/ready",
        "liveness": "/health/live",
    }
    _, _, port = settings(installation).health_addr.rpartition(":")
    assert {ports[probe["port"]] for probe in probes.values()} == {int(port)}


def test_pod_knows_who_and_where_it_is(installation: list[Manifest]) -> None:
    """Node, pod and namespace come from the pod itself, and Vault's address is set."""
    variables = {variable["name"]: variable for variable in container(installation)["env"]}
    assert {name: at(variable, "valueFrom.fieldRef.fieldPath") for name, variable in variables.items()} == {
        "NODE_NAME": "spec.nodeName",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "VAULT_ADDR": None,
    }
    assert variables["VAULT_ADDR"]["value"].startswith("https://")


def test_image_is_this_version(tmp_path: Path) -> None:
    """The manifests run the version that they are part of, and an overlay can name another registry."""
    assert container(render(DAEMONSET))["image"] == f"vault-csi-provider:{provider.__version__}"
    images = [{"name": "vault-csi-provider", "newName": "registry.example.com/vault-csi-provider"}]
    moved = container(overlay(tmp_path, resources=["."], images=images))
    assert moved["image"] == f"registry.example.com/vault-csi-provider:{provider.__version__}"


def test_private_ca_is_mounted_where_classes_name_it(tmp_path: Path) -> None:
    """With components/vault-ca, the CA file that an example names is mounted, and is the default."""
    manifests = overlay(tmp_path, resources=["."], components=["components/vault-ca"])
    assert_valid(manifests, KUBERNETES[-1])
    spec = container(manifests)
    named = {c["spec"]["parameters"].get("vaultCACertPath") for _, c in CLASSES} - {None}
    assert named == {v["value"] for v in spec["env"] if v["name"] == "VAULT_CACERT"}
    (mount,) = [mount for mount in spec["volumeMounts"] if mount["name"] == "vault-ca"]
    assert mount["readOnly"] is True
    assert {str(PurePosixPath(path).parent) for path in named} == {mount["mountPath"]}
    # What the base had is still there.
    assert {volume["name"] for volume in pod_spec(daemonset(manifests))["volumes"]} == {
        "providers",
        "state",
        "vault-ca",
    }


def load(example: Path) -> list[Manifest]:
    """The objects of one example."""
    return list(yaml.safe_load_all(example.read_text()))


CLASSES = [(path, m) for path in EXAMPLES for m in of_kind(load(path), "SecretProviderClass")]


def objects(secret_class: Manifest) -> list[Manifest]:
    """A class's objects, out of their string."""
    parsed = yaml.safe_load(secret_class["spec"]["parameters"]["objects"])
    assert isinstance(parsed, list)
    return parsed


def assert_strings(mapping: object) -> None:
    """A value is a map of string to string."""
    assert isinstance(mapping, dict)
    assert all(isinstance(item, str) for pair in mapping.items() for item in pair), mapping


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(example: Path, version: str) -> None:
    """Every built-in object of an example fits the API's schema, with no unknown field."""
    assert_valid((m for m in load(example) if m["kind"] != "SecretProviderClass"), version)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_class_has_the_resource_shape(example: Path) -> None:
    """The class has the fields of the driver's custom resource and no other, with values of their types."""
    (secret_class,) = of_kind(load(example), "SecretProviderClass")
    assert secret_class.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert secret_class["apiVersion"] == "secrets-store.csi.x-k8s.io/v1"
    spec = secret_class["spec"]
    assert spec.keys() - {"secretObjects"} == {"provider", "parameters"}
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,30}", spec["provider"])
    assert_strings(spec["parameters"])
    for copy in spec.get("secretObjects", []):
        assert copy.keys() - {"labels", "annotations"} == {"secretName", "type", "data"}
        assert_strings({key: value for key, value in copy.items() if key in ("secretName", "type")})
        for mapping in (copy.get("labels", {}), copy.get("annotations", {}), *copy["data"]):
            assert_strings(mapping)
        assert all(entry.keys() == {"objectName", "key"} for entry in copy["data"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_fits_together(example: Path) -> None:
    """The pod mounts its file's class as its file's account; a copied object is one that is mounted."""
    manifests = load(example)
    (workload,) = of_kind(manifests, "Pod", "Deployment")
    (account,) = of_kind(manifests, "ServiceAccount")
    (secret_class,) = of_kind(manifests, "SecretProviderClass")
    namespaces = {m["metadata"]["namespace"] for m in (workload, account, secret_class)}
    made = {m["metadata"]["name"] for m in of_kind(manifests, "Namespace")}
    assert len(namespaces) == 1
    assert namespaces == (made or {"default"})

    pod = pod_spec(workload)
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (volume,) = pod["volumes"]
    assert volume["csi"] == {
        "driver": "secrets-store.csi.k8s.io",
        "readOnly": True,
        "volumeAttributes": {"secretProviderClass": secret_class["metadata"]["name"]},
    }
    (app,) = pod["containers"]
    (mount,) = app["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)

    names = [entry["objectName"] for entry in objects(secret_class)]
    assert len(set(names)) == len(names)
    copies = {copy["secretName"]: copy["data"] for copy in secret_class["spec"].get("secretObjects", [])}
    assert {entry["objectName"] for data in copies.values() for entry in data} <= set(names)
    for variable in app.get("env", []):
        source = variable["valueFrom"]["secretKeyRef"]
        assert source["key"] in {entry["key"] for entry in copies[source["name"]]}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_pod_can_read_its_files(example: Path) -> None:
    """Files belong to root: a container of another user or group mounts none that is closed to it."""
    manifests = load(example)
    (workload,) = of_kind(manifests, "Pod", "Deployment")
    context = pod_spec(workload)["securityContext"]
    (secret_class,) = of_kind(manifests, "SecretProviderClass")
    if context.get("runAsUser", 0) == 0:
        needed = 0o400
    elif context["runAsGroup"] == 0:
        needed = 0o040
    else:
        needed = 0o004
    for entry in objects(secret_class):
        assert entry.get("filePermission", 0o644) & needed, entry["objectName"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_container_is_confined(example: Path) -> None:
    """What people copy is a good habit: no capabilities, no escalation, seccomp on, no API token."""
    (workload,) = of_kind(load(example), "Pod", "Deployment")
    pod = pod_spec(workload)
    (app,) = pod["containers"]
    assert at(app, "securityContext") == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert at(pod, "securityContext.seccompProfile.type") == "RuntimeDefault"
    assert pod["automountServiceAccountToken"] is False


def test_examples_are_listed() -> None:
    """The page of the examples links to each of them, and to nothing else of their kind."""
    page = (ROOT / "deploy" / "examples" / "README.md").read_text()
    linked = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", page, re.MULTILINE)
    assert sorted(linked) == [(path.name, path.name) for path in EXAMPLES]
