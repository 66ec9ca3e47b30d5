"""The README is true: its commands, tables, manifests and links are held against what they speak of."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from provider.cli import command, flags
from provider.errors import MAX_MESSAGE_BYTES, Code
from provider.render import renderer
from provider.render.contents import MAX_FILES
from provider.sandbox.process import MAX_OUTPUT
from provider.sandbox.worker import CPU_SECONDS, FILTERS, MEMORY_BYTES
from provider.settings import (
    MAX_MOUNT_BYTES,
    MAX_OBJECTS,
    MAX_POOLS,
    MAX_RESPONSE_BYTES,
    MAX_YAML_NODES,
    MIB,
    Settings,
)
from provider.spc import Parser, objects, parameters, tables
from provider.spc.expressions import MAX_REGEXES
from provider.spc.shapes import MAX_SOURCES
from provider.telemetry.log import Log
from provider.vault.connections import MAX_SHARED_CONNECTIONS
from provider.vault.memory import KEPT_BYTES, REMEMBERED_BYTES
from tests.spc_classes import GIVEN
from tests.tools import ROOT, kubectl

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, without the indentation of the list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", README, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def manifests(kind: str) -> list[dict[str, Any]]:
    """The documents of one kind in the README's YAML blocks."""
    documents = [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]
    return [document for document in documents if document.get("kind") == kind]


def section(heading: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows in a text, heads left out."""
    table = re.findall(r"^ *\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in table]
    rules = [number for number, row in enumerate(cells) if all(re.fullmatch("-+", cell) for cell in row)]
    heads = {number - 1 for number in rules} | set(rules)
    return [row for number, row in enumerate(cells) if number not in heads]


def names(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`]+)`", text))


def test_flag_table_is_the_programs() -> None:
    """The flag table is what the program's own table makes, so it holds every flag, default and variable."""
    found = re.search(r"<!-- flags: begin.*?-->\n(.*?)<!-- flags: end -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == flags.markdown_table(), "put what provider.cli.flags.markdown_table() gives between the markers"


def test_flag_table_agrees_with_help() -> None:
    """Each row of the flag table is in `vault-csi-provider --help`, with its default and variable, and no other is."""
    done = subprocess.run(
        [sys.executable, "-m", "provider.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    helped = re.findall(r"^  --(\S+)(?: (\S+))? {2,}(\S+) +(\S+)\n {6}(\S.*)$", done.stdout, re.MULTILINE)
    shown = []
    for flag, default, variable, meaning in rows(section("Flags").split("Variables without a flag")[0]):
        name, _, placeholder = flag.strip("`").removeprefix("--").partition("=")
        shown.append((name, placeholder, default.strip("`") or "-", variable.strip("`") or "-", meaning))
    assert shown == helped


def test_wrong_flag_ends_as_the_readme_says() -> None:
    """A wrong flag is one line on stderr and exit status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "provider.cli", "--endpont=/tmp/x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_variables_without_a_flag_are_read() -> None:
    """Each variable of the table is one that the code reads; one with a flag is not among them."""
    told = {name for first, *_ in rows(section("Flags").split("Variables without a flag")[1]) for name in names(first)}
    source = "\n".join(path.read_text() for path in (ROOT / "provider").rglob("*.py"))
    assert {name for name in told if name not in source} == set()
    assert told & {flag.variable for flag in flags.FLAGS} == set()
    assert {"VAULT_PROXY_ADDR", "POD_NAME", "POD_NAMESPACE"} <= told


def test_variables_that_are_told_not_to_be_read_are_not() -> None:
    """The README's variables that are not read are those that the log warns of, and Vault's token; none is read."""
    (told,) = re.findall(r"command lines are not read, .*?: (.*?)\.\n", section("Flags"), re.DOTALL)
    variables = {name for name in names(told) if name != "BAO_"}
    assert variables == {"VAULT_TOKEN", *command.UNREAD}
    spelled = variables | {name.replace("VAULT_", "BAO_") for name in variables}
    assert command.parse([], dict.fromkeys(spelled, "x"), str) == command.parse([], {}, str)


def test_make_targets_exist() -> None:
    """Each `make ...` of README and CONTRIBUTING is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+)(?: [a-z]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= set(re.findall(r"\b([a-z]+)\b", re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.M)[0]))
    named = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert {"demo", "test"} <= named
    contributing = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named <= targets
    assert {"test", "unit", "check", "lock", "stubs", "upgrade"} <= contributing & targets


def test_first_screen_says_what_how_and_where() -> None:
    """What this is, the two commands and the installation come first."""
    start = "\n".join(README.splitlines()[:30])
    assert "HashiCorp Vault and OpenBao" in start
    assert blocks("sh")[0].splitlines()[0].startswith("make demo")
    assert blocks("sh")[0].splitlines()[1].startswith("make test")
    assert "## Install it in a cluster" in start


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Each link to a file leads to one that exists, and each link to a heading to a heading of its page."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_classes_are_accepted() -> None:
    """Each SecretProviderClass is one that the provider takes, without a warning."""
    classes = manifests("SecretProviderClass")
    assert classes
    for secret_class in classes:
        attributes = secret_class["spec"]["parameters"] | {
            "secretProviderClass": secret_class["metadata"]["name"],
            "csi.storage.k8s.io/pod.name": "app",
            "csi.storage.k8s.io/pod.namespace": "default",
            "csi.storage.k8s.io/pod.uid": "uid-1",
            "csi.storage.k8s.io/serviceAccount.name": "app",
        }
        spec = Parser(Settings()).parse(json.dumps(attributes), "null", "/volume", "420")
        assert spec.warnings == ()
        assert [wanted.name for wanted in spec.objects] == ["password"]


def test_pod_mounts_the_class() -> None:
    """The pod's volume names the class, in its namespace, its container mounts the volume, and its account is made."""
    (pod,), (secret_class,) = manifests("Pod"), manifests("SecretProviderClass")
    (volume,) = pod["spec"]["volumes"]
    assert volume["csi"]["volumeAttributes"]["secretProviderClass"] == secret_class["metadata"]["name"]
    assert pod["metadata"]["namespace"] == secret_class["metadata"]["namespace"]
    assert [mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]] == [volume["name"]]
    account, namespace = pod["spec"]["serviceAccountName"], pod["metadata"]["namespace"]
    # Kubernetes makes no pod for an account that is not there.
    (made,) = manifests("ServiceAccount")
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (account, namespace)
    role = secret_class["spec"]["parameters"]["roleName"]
    set_up = "\n".join(blocks("sh"))
    assert f"auth/kubernetes/role/{role} audience=vault" in set_up
    assert f"bound_service_account_names={account} bound_service_account_namespaces={namespace}" in set_up


def test_overlay_renders(tmp_path: Path) -> None:
    """The overlay of the installation gives the DaemonSet with the image and the address that it names."""
    shutil.copytree(ROOT / "daemonset", tmp_path / "daemonset")
    (overlay,) = [block for block in blocks("yaml") if "kind: Kustomization" in block]
    (tmp_path / "my-cluster").mkdir()
    (tmp_path / "my-cluster" / "kustomization.yaml").write_text(overlay)
    done = subprocess.run([kubectl(), "kustomize", tmp_path / "my-cluster"], capture_output=True, text=True, check=True)
    (daemonset,) = [found for found in yaml.safe_load_all(done.stdout) if found["kind"] == "DaemonSet"]
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.com/vault-csi-provider:0.1.0"
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["VAULT_ADDR"] == "https://vault.example.com:8200"
    assert "NODE_NAME" in variables


def test_components_are_those_of_the_manifests() -> None:
    """The table has each component, and says of one alone that it is not in by itself, as it is."""
    told = {first.strip("`").partition("`")[0]: first for first, *_ in rows(section("Install it in a cluster"))}
    components = ROOT / "daemonset" / "components"
    assert told.keys() == {path.name for path in components.iterdir()}
    usual = yaml.safe_load((ROOT / "daemonset" / "kustomization.yaml").read_text())["components"]
    apart = {name for name, first in told.items() if "not in by itself" in first}
    assert {Path(path).name for path in usual} == told.keys() - apart


def test_driver_values_give_tokens_for_the_role() -> None:
    """The driver's values ask for tokens of the audience that the role wants."""
    (values,) = [yaml.safe_load(block) for block in blocks("yaml") if "tokenRequests:" in block]
    assert values["tokenRequests"] == [{"audience": "vault"}]
    assert values["enableSecretRotation"] is True


def test_parameter_table_is_the_parsers() -> None:
    """The table has each parameter that the parser knows, in its usual spelling, and no other."""
    told = {name for first, *_ in rows(section("Parameters of a class")) for name in names(first)}
    usual = {name for name in parameters.KNOWN if not name.startswith(("bao", "openbao"))} - {"vaultRoleName"}
    assert told == usual
    others = {name for name in parameters.KNOWN if name.startswith(("bao", "openbao"))}
    prefixed = {name.removeprefix("vault") for name in parameters.KNOWN if name.startswith("vault")}
    assert others == {prefix + name for prefix in ("bao", "openbao") for name in prefixed}


def test_object_table_is_the_parsers() -> None:
    """The table has each field that the parser knows, and no other."""
    told = [first.strip("`") for first, *_ in rows(section("Fields of an object"))]
    assert sorted(told) == sorted(objects.FIELDS)


def test_field_table_is_the_parsers() -> None:
    """The table of fields is what the parser's own table makes."""
    found = re.search(r"<!-- fields: begin.*?-->\n(.*?)<!-- fields: end -->", README, re.DOTALL)
    assert found is not None
    made = tables.markdown_table(tables.OBJECT_FIELDS)
    assert found[1] == made, "put what provider.spc.tables.markdown_table(OBJECT_FIELDS) gives between the markers"


WISHES = [row for row in rows(section("Secrets in the form that an application reads")) if "objectName" not in row[0]]


@pytest.mark.parametrize(
    ("wish", "write"), [row for row in WISHES if len(row) == 2 and ":" in row[1] and row[1].startswith("`")]
)
def test_what_one_writes_for_a_wish_is_an_object(wish: str, write: str) -> None:
    """Each line of "I want, write" has fields that make an object, besides a name and a path where it has none."""
    fields = {"objectName": "a", "secretPath": "b"}
    entries = dict(text.replace("\\|", "|").split(": ", 1) for text in re.findall(r"`([^`]+)`", write))
    lines = [f"{name}: {value}" for name, value in (fields | entries).items()]
    attributes = {**GIVEN, "objects": "- " + "\n  ".join(lines)}
    spec = Parser(Settings()).parse(json.dumps(attributes), "null", "/volume", "420")
    assert spec.warnings == ()
    assert (
        spec.objects[0]
        != Parser(Settings())
        .parse(json.dumps({**GIVEN, "objects": "- {objectName: a, secretPath: b}"}), "null", "/volume", "420")
        .objects[0]
    )
    for link in re.findall(r"\]\(([^)]+)\)", wish):
        assert (ROOT / link).exists()


def test_filters_are_the_workers() -> None:
    """The table of filters has each filter that templates have besides Jinja2's own, and no other."""
    text = section("Secrets in the form that an application reads").split("### Templates")[1]
    told = {name.partition("(")[0] for first, *_ in rows(text) for name in names(first)}
    assert told == FILTERS.keys() - {"tojson", "b64encode"}


def test_error_table_quotes_the_code() -> None:
    """Each message that the table quotes is one of the code's, and each code that leaves the provider is in it."""
    # Adjacent literals are one message: their seams go.
    source = "\n".join(path.read_text() for path in sorted((ROOT / "provider").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = rows(section("Errors, and what to do"))
    assert {code.strip("`") for code, *_ in table} == {code.value for code in Code}
    for _, says, _ in table:
        quoted = names(says)
        assert quoted, says
        assert {phrase for phrase in quoted if phrase.strip() not in source} == set()


def test_log_lines_are_the_codes() -> None:
    """Each log line to look for is one that the code writes."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "provider").rglob("*.py")))
    (lines,) = re.findall(r"^Lines to look for: (.*?)\n\n", section("Logs and health"), re.MULTILINE | re.DOTALL)
    told = {" ".join(line.split()) for line in names(lines)}
    assert len(told) == 5
    assert {line for line in told if line not in source} == set()


def test_log_has_the_fields_that_the_readme_names(capfd: pytest.CaptureFixture[str]) -> None:
    """An event has the fields of every event, under the names that the README gives."""
    with Log("info", "json"):
        logging.getLogger("provider.readme").info("an event", extra={"pod": "default/app"})
    event = json.loads(capfd.readouterr().err)
    (listed,) = re.findall(r"an event on stderr: (.*?), and what", section("Logs and health"), re.DOTALL)
    assert names(listed) == event.keys() - {"pod"}


def test_limits_are_the_codes() -> None:
    """Each limit of the table has the value that holds."""
    settings = Settings()
    told = {name: value for name, value, _ in rows(section("Limits"))}
    assert told == {
        "objects of a class": f"{MAX_OBJECTS:,}",
        "values in `objects`, YAML aliases followed": f"{MAX_YAML_NODES:,}",
        "files of a volume, all together": f"{MAX_MOUNT_BYTES // MIB} MiB",
        "their number": f"{MAX_FILES:,}",
        "rendering of a mount, templates and expressions aside: processor time": f"{renderer.MAX_SECONDS:g} s",
        "templates and expressions of a mount: processor time": f"{CPU_SECONDS} s",
        "their memory": f"{MEMORY_BYTES // MIB} MiB",
        "their output": f"{MAX_OUTPUT // MIB} MiB",
        "sources of a template": str(MAX_SOURCES),
        "includes and excludes of a class": str(MAX_REGEXES),
        "one response of Vault": f"{MAX_RESPONSE_BYTES // MIB} MiB",
        "time for a mount": f"{settings.mount_timeout:g} s",
        "connections to one Vault, for each TLS setting": str(settings.max_connections),
        "connections to all Vaults but the daemon's own": str(MAX_SHARED_CONNECTIONS),
        "Vault servers whose idle connections are kept": str(MAX_POOLS),
        "answers that are remembered under `refreshAfter`, of all volumes": f"{REMEMBERED_BYTES // MIB} MiB",
        "credentials that are kept, of all pods": f"{KEPT_BYTES // MIB} MiB",
        "mounts, objects and MiB of one pod in a minute": (
            f"{settings.max_pod_mounts}, {settings.max_pod_objects:,} and {settings.max_pod_mib}"
        ),
        "sessions kept between mounts": f"{settings.cache_size:,}",
        "an error message": f"{MAX_MESSAGE_BYTES // 1024} KiB",
    }
    assert f"at most {flags.MAX_MOUNT_SECONDS:g}s" in section("Limits")


def test_one_diagram_tells_a_credentials_life() -> None:
    """The section on a credential's life has one diagram, from the first mount to the pod's end."""
    text = section("What happens to a credential from mount to the pod's end")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    for step in ("first mount", "log in", "renew", "next re-mount", "pod is gone", "revoke"):
        assert step in diagram, step
    assert diagram.count("[") == diagram.count("]")
    assert diagram.count('"') % 2 == 0


def test_architecture_names_every_room() -> None:
    """The page of two screens has each room of the package in its table, and no other."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(page.splitlines()) <= 120
    rooms = page.split("## Rooms of `provider/`")[1].split("\n## ")[0]
    told = {name for first, *_ in rows(rooms) for name in names(first)}
    package = ROOT / "provider"
    modules = {path.parent.name for path in package.glob("*/__init__.py")} | {
        path.stem for path in package.glob("*.py")
    }
    assert told == modules - {"__init__"}
