"""The operator's pages are true: their values are the chart's, their commands run, and who follows one has a secret."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from provider.cli.flags import FLAGS
from provider.settings import MAX_POD_MIB, MAX_POD_MOUNTS, MAX_POD_OBJECTS
from tests.stand.driver import Driver
from tests.stand.kubeapi import KubeApi
from tests.stand.openbao import OpenBao, find_binary
from tests.test_chart import CHART, NAME, assert_all_valid, given, run, template
from tests.test_examples import VAULT
from tests.test_manifests import (
    KUBERNETES,
    RIGHTS,
    assert_valid,
    container,
    of_kind,
    overlay,
    pod_spec,
    rights,
    settings,
)
from tests.test_rolling_update import AUDIENCE, NODE, Node, running
from tests.tools import ROOT, helm, kubectl

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("install", "platforms", "upgrade", "migration")}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, without the indentation of the list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def files(page: str) -> dict[str, str]:
    """The files of a page's YAML, by the name in the comment that each begins with."""
    named = [(re.match(r"# ([\w.-]+\.yaml)\b(.*)", text), text) for text in blocks(page, "yaml")]
    assert all(name for name, _ in named), f"docs/{page}.md has YAML without its file's name"
    return {name[1]: text for name, text in named if name}


# Values of this chart; the driver's and Vault's own are theirs.
VALUES = [
    (page, name)
    for page in PAGES
    for name in files(page)
    if name.endswith("-values.yaml") and name not in ("driver-values.yaml", "vault-values.yaml")
]


@pytest.mark.parametrize(("page", "name"), VALUES)
def test_values_of_the_pages_are_the_charts(tmp_path: Path, page: str, name: str) -> None:
    """Each file of values renders to valid objects in all three versions, and changes something."""
    values = yaml.safe_load(files(page)[name])
    manifests = template(tmp_path, values)
    for version in KUBERNETES:
        assert_all_valid(manifests, version)
    assert manifests != template(tmp_path, {})


@pytest.mark.parametrize("page", PAGES)
def test_other_files_of_the_pages_are_valid(page: str) -> None:
    """Each file of objects fits Kubernetes' schemas; what an operator or the driver brings is left to them."""
    others = ("Kustomization", "SecretProviderClass", "SecurityContextConstraints")
    for name, text in files(page).items():
        if not name.endswith("-values.yaml"):
            manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest["kind"] not in others]
            for version in KUBERNETES:
                assert_valid(manifests, version)


def test_kustomization_opens_addresses(tmp_path: Path) -> None:
    """The overlay of the page gives a hardened daemon with the addresses that it names, and leaves its other flags."""
    overlay_of_page = yaml.safe_load(files("migration")["kustomization.yaml"])
    (resource,) = overlay_of_page.pop("resources")
    del overlay_of_page["apiVersion"], overlay_of_page["kind"]
    understood = settings(overlay(tmp_path, resources=[resource.removeprefix("../daemonset/")], **overlay_of_page))
    assert understood.hardened
    assert understood.allowed_vault_addresses == ("https://other.example.com:8200", "*.vault.example.com")
    assert understood.state_dir == "/state"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_is_there(page: str) -> None:
    """Each helm command that names a chart of this repository names this one, and files of values that a page shows."""
    shown = {name for each in PAGES for name in files(each)}
    text = "\n".join(blocks(page, "sh"))
    assert {path for path in re.findall(r"\bdeploy/[\w./-]+", text) if ROOT / path != CHART} == set()
    assert set(re.findall(r"--(?:values|filename) (\S+)", text)) <= shown
    assert set(re.findall(r"daemonset/([\w-]+)", text)) <= {NAME}


@pytest.mark.parametrize("page", PAGES)
def test_helm_takes_the_pages_commands(tmp_path: Path, page: str) -> None:
    """Each command that installs this chart, with the values and the --set that it has, gives what is valid."""
    for name, text in {name: text for each in PAGES for name, text in files(each).items()}.items():
        (tmp_path / name).write_text(text)
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("helm ") and "deploy/helm" in line]
    assert commands
    for command in commands:
        asked = command[command.index("deploy/helm/vault-csi-provider") :]
        options = [*itertools.chain(*(pair for pair in itertools.pairwise(asked) if pair[0] in TAKEN))]
        done = run("template", NAME, CHART, "--skip-tests", *options, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_all_valid(yaml.safe_load_all(done.stdout), KUBERNETES[-1])
        assert {word for word in asked if word.startswith("--")} <= {*TAKEN, "--wait", "--timeout", "--take-ownership"}


# Options of helm that say what is rendered.
TAKEN = ("--values", "--set", "--namespace")


def test_following_the_page_mounts_the_secret(tmp_path: Path) -> None:
    """From an empty Vault: the page's commands for Vault, its values for the chart, its class and its pod. The pod's
    volume holds the password that the page says, with the rights that its values leave."""
    values = yaml.safe_load(files("install")["provider-values.yaml"])
    del values["vaultAddress"]
    manifests = list(yaml.safe_load_all(files("install")["app.yaml"]))
    (account,), (secret_class,), (pod,) = (
        of_kind(manifests, kind) for kind in ("ServiceAccount", "SecretProviderClass", "Pod")
    )
    with Node(tmp_path, prepared=False, **values) as node, ExitStack() as stack:
        prepare_vault(node, tmp_path)
        assert rights(node.manifests) == RIGHTS["hmac-secret"] | RIGHTS["pod-end"]
        provider = stack.enter_context(running(node, 0))
        provider.wait_ready()
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        assert pod_spec(pod)["serviceAccountName"] == account["metadata"]["name"]
        started = node.kube.add_pod(namespace, name, service_account=account["metadata"]["name"], node=NODE)
        token = node.kube.issue_token(namespace, started.service_account, audiences=[AUDIENCE], pod=started)
        driver = stack.enter_context(Driver(node.socket))
        mounted = driver.mount(started, secret_class["spec"]["parameters"], tokens={AUDIENCE: token})
        (password,) = re.findall(r"The last one prints `([^`]+)`", PAGES["install"])
        assert mounted.text("password") == password
        assert f"password={password}" in PAGES["install"]


def prepare_vault(node: Node, home: Path) -> None:
    """Run what the page has between its marks, with a real kubectl where it reads the kubeconfig alone."""
    reviewer = node.kube.issue_token(*node.kube.reviewer, ttl=3600)
    (home / "reviewer").write_text(reviewer)
    # The Secret's token is the stand's reviewer's, and comes a moment after the Secret; every other command is
    # kubectl's.
    secret = (
        f'*"get secret vault-reviewer"*) [ -e {home}/asked ] && base64 -w0 < {home}/reviewer; echo >> {home}/asked ;;'
    )
    shims = {"kubectl": f'case "$*" in {secret} *) exec {kubectl()} "$@" ;; esac'}
    kubeconfig = str(node.kube.write_kubeconfig(home / "admin"))
    shell(home, marked("vault"), shims, {"KUBECONFIG": kubeconfig, **vault_as_root(node.bao)})
    assert len((home / "asked").read_text().splitlines()) == 2


def marked(name: str) -> str:
    """The commands of the page between its marks of a name."""
    (part,) = re.findall(rf"<!-- {name}: begin.*?-->\n(.*?)<!-- {name}: end -->", PAGES["install"], re.DOTALL)
    return "".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL))


def vault_as_root(bao: OpenBao) -> dict[str, str]:
    """The variables with which the command vault reaches a server."""
    return {"VAULT_ADDR": bao.address, "VAULT_TOKEN": bao.root_token}


def shell(
    home: Path, script: str, programs: Mapping[str, str], environment: Mapping[str, str], *, fails: bool = False
) -> str:
    """Run commands in a shell that has these programs, each a line of shell, and the command vault. Its output."""
    tools = home / "tools"
    tools.mkdir(exist_ok=True)
    vault = VAULT.replace("BAO", str(find_binary()))
    for name, text in {"vault": vault, **{name: f"#!/bin/sh\n{line}\n" for name, line in programs.items()}}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home), **environment}
    done = subprocess.run(["/bin/sh", "-eu"], input=script, cwd=home, env=environ, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_vault_of_the_cluster_needs_no_account_of_its_own(tmp_path: Path) -> None:
    """The page's commands for a Vault in the cluster stand by themselves: they read no file and no Secret. (A pod has
    the API server's CA; this Vault is in none, and so is given one.)"""
    script = marked("vault in the cluster")
    assert "@" not in script
    with OpenBao() as bao, KubeApi() as kube:
        (tmp_path / "ca.crt").write_bytes(kube.ca_pem)
        shell(tmp_path, f"{script.rstrip()} kubernetes_ca_cert=@ca.crt\n", {}, vault_as_root(bao))
        config = bao.api("GET", "auth/kubernetes/config")["data"]
    assert config["kubernetes_host"] == "https://kubernetes.default.svc"
    assert not config.get("token_reviewer_jwt_set")


def test_image_of_the_page_is_the_one_that_is_installed(tmp_path: Path) -> None:
    """What the page builds and pushes is what its values have the nodes pull."""
    values = yaml.safe_load(files("install")["provider-values.yaml"])
    image = container(template(tmp_path, values))["image"]
    text = "\n".join(blocks("install", "sh"))
    assert re.findall(r"docker (?:build --tag|push) (\S+)", text) == [image, image]


def test_constraints_of_openshift_name_the_account(tmp_path: Path) -> None:
    """The accounts that the page's SCC admits are those of the provider's pod and of the pod of `helm test`."""
    constraints = yaml.safe_load(files("platforms")["scc.yaml"])
    done = run("template", NAME, CHART, "--namespace", NAME, "--values", given(tmp_path, {}), home=tmp_path)
    pods = of_kind([*yaml.safe_load_all(done.stdout)], "DaemonSet", "Pod")
    accounts = {f"system:serviceaccount:{NAME}:{pod_spec(pod)['serviceAccountName']}" for pod in pods}
    assert len(pods) == 2
    assert accounts == {*constraints["users"]}
    kinds = {kind for pod in pods for volume in pod_spec(pod)["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {*constraints["volumes"]}


@contextmanager
def cluster_with(release: str, chart: str, version: str) -> Iterator[str]:
    """The address of a Kubernetes API that has a Helm release, and nothing else."""
    told = {
        "name": release,
        "namespace": release,
        "version": 1,
        "info": {"status": "deployed"},
        "chart": {"metadata": {"name": chart, "version": version, "apiVersion": "v2", "appVersion": "1.2.3"}},
    }
    stored = base64.b64encode(gzip.compress(json.dumps(told).encode()))
    name = f"sh.helm.release.v1.{release}.v1"
    secret = {
        "metadata": {"name": name, "namespace": release, "labels": {"name": release, "owner": "helm", "version": "1"}},
        "type": "helm.sh/release.v1",
        "data": {"release": base64.b64encode(stored).decode()},
    }

    class Secrets(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mine = f"name%3D{release}%2C" in self.path or self.path.endswith(name)
            body: dict[str, Any] = {"apiVersion": "v1", "kind": "SecretList", "items": [secret] if mine else []}
            answer = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is told of a request."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Secrets) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("release", ["vault", "openbao"])
def test_the_old_provider_goes_and_nothing_else_moves(tmp_path: Path, release: str) -> None:
    """The page's commands turn the old provider off with the chart's version that is installed, and stop where there is
    no such release: without a version Helm would move Vault itself to the newest chart."""
    (script,) = [
        block for block in blocks("migration", "sh") if f"upgrade {release} " in block and "csi.enabled" in block
    ]
    asked = tmp_path / "asked"
    shims = {
        "helm": f'case "$*" in *upgrade*) printf "%s\\n" "$@" > {asked} ;; *) exec {helm()} "$@" ;; esac',
        "kubectl": "true",
    }
    with cluster_with(release, release, "0.28.1") as address:
        shell(tmp_path, script, shims, {"HELM_KUBEAPISERVER": address, "KUBECONFIG": os.devnull})
        upgrade = asked.read_text().splitlines()
        asked.unlink()
        with_other = script.replace(f"metadata {release}", "metadata other")
        told = shell(tmp_path, with_other, shims, {"HELM_KUBEAPISERVER": address, "KUBECONFIG": os.devnull}, fails=True)
    assert upgrade[upgrade.index("--version") + 1] == "0.28.1"
    assert {"--reuse-values", "csi.enabled=false"} <= {*upgrade}
    assert "no such release" in told
    assert not asked.exists()


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_guardrail_is_in_the_table_of_defaults() -> None:
    """Each flag of the guardrails is in the table of what differs from the Go providers, with its chart value, and the
    limits that it states are the daemon's."""
    (table,) = re.findall(r"<!-- hardened: begin -->\n(.*?)<!-- hardened: end -->", PAGES["migration"], re.DOTALL)
    told = set(re.findall(r"`--([\w-]+)`", table))
    guardrails = {flag.name for flag in FLAGS if flag.group == next(f.group for f in FLAGS if f.name == "hardened")}
    assert told == guardrails - {"hardened"}
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {name for *_, opened in rows(table) for name in re.findall(r"`([a-z]\w+)(?:: \w+)?`", opened)}
    assert named <= values.keys()
    limits = next(row[2] for row in rows(table) if "in a minute" in row[0])
    assert limits == f"{MAX_POD_MOUNTS}, {MAX_POD_OBJECTS:,} and {MAX_POD_MIB}"


def test_pages_name_values_that_exist() -> None:
    """What stands in backticks as a value of the chart, with a dot or a sign of equality, is one."""
    defaults: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    unknown = []
    for page, text in PAGES.items():
        for path in re.findall(r"`([a-z]\w+(?:\.\w+)+)(?:=[^`]*)?`", text):
            first, *others = path.split(".")
            if first not in defaults:
                continue
            place: Any = defaults
            for part in (first, *others):
                place = place.get(part) if isinstance(place, dict) else None
                if place is None and (first, *others) != ("metrics", "port"):
                    unknown.append(f"{page}: {path}")
                    break
    assert unknown == []
