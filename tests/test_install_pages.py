"""The operator's pages are true: their values are the chart's, their commands run, and who follows one has a secret."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from provider.cli.flags import FLAGS
from provider.settings import MAX_POD_MIB, MAX_POD_MOUNTS, MAX_POD_OBJECTS
from tests.stand.driver import Driver
from tests.stand.openbao import find_binary
from tests.test_chart import CHART, NAME, kubernetes_own, template
from tests.test_examples import VAULT
from tests.test_manifests import KUBERNETES, RIGHTS, assert_valid, of_kind, overlay, pod_spec, rights, settings
from tests.test_rolling_update import AUDIENCE, NODE, Node, running
from tests.tools import ROOT, kubectl

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
        assert_valid(kubernetes_own(manifests), version)
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
    (part,) = re.findall(r"<!-- vault: begin.*?-->\n(.*?)<!-- vault: end -->", PAGES["install"], re.DOTALL)
    script = "".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL))
    tools = home / "tools"
    tools.mkdir()
    reviewer = node.kube.issue_token(*node.kube.reviewer, ttl=3600)
    (home / "reviewer").write_text(reviewer)
    # The Secret's token is the stand's reviewer's; every other command is kubectl's.
    secret = f'*"get secret vault-reviewer"*) base64 -w0 < {home}/reviewer'
    shims = {
        "vault": VAULT.replace("BAO", str(find_binary())),
        "kubectl": f'#!/bin/sh\ncase "$*" in {secret} ;; *) exec {kubectl()} "$@" ;; esac\n',
    }
    for name, text in shims.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HOME": str(home),
        "KUBECONFIG": str(node.kube.write_kubeconfig(home / "admin")),
        "VAULT_ADDR": node.bao.address,
        "VAULT_TOKEN": node.bao.root_token,
    }
    done = subprocess.run(["/bin/sh", "-eu"], input=script, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
