"""What the provider is made of: locks, advisories, bill of materials, licences, and the workflows that release it."""

from __future__ import annotations

import email.message
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.validation.json import JsonStrictValidator

import provider
from requirements import audit, licences, locks, sbom
from tests.tools import ROOT

HASH = "0" * 64
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ZIZMOR = Path(sys.executable).with_name("zizmor")


# -- locks and advisories ------------------------------------------------------------------------------------------


def lock(*lines: str) -> locks.Lock:
    """A lock of these lines, each with a hash."""
    return locks.read("".join(f"{line} \\\n    --hash=sha256:{HASH}\n" for line in lines))


def advisory(affected: str, package: str = "jinja2") -> list[audit.Advisory]:
    """One advisory, as a list says it."""
    text = f'[[advisory]]\nid = "CVE-0-1"\npackage = "{package}"\naffected = ["{affected}"]\nwhat = "it leaks"\n'
    return audit.advisories(text)


def test_locks_have_no_known_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """Each lock is pinned and hashed to its last line, and none has a version of requirements/advisories.toml."""
    assert audit.main([]) == 0, capsys.readouterr().err


def test_audit_sees_every_lock() -> None:
    """The command reads all locks there are, and the list has something to say of what the image holds."""
    held = {pin.name for pin in locks.read(locks.RUNTIME.read_text()).pins}
    known = audit.advisories((locks.HERE / audit.ADVISORIES).read_text())
    assert {"runtime.txt", "build.txt", "dev.txt", "tools.txt"} == {path.name for path in locks.HERE.glob("*.txt")}
    assert len([one for one in known if one.package in held]) >= 10
    assert len({one.id for one in known}) == len(known)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"jinja2>=3 --hash=sha256:{HASH}", "not pinned to one version"),
        (f"jinja2==3.* --hash=sha256:{HASH}", "is no pinned distribution"),
        (f"jinja2==3.1.6,<4 --hash=sha256:{HASH}", "not pinned to one version"),
        ("jinja2==3.1.6", "has no SHA-256"),
        ("jinja2==3.1.6 --hash=md5:0123", "is no pinned distribution"),
        (f"jinja2 @ https://example.com/jinja2.whl#sha256={HASH}", "comes from a URL"),
        ("-e .", "is no pinned distribution"),
        ("--index-url https://example.com/simple", "is no pinned distribution"),
        ("git+https://example.com/jinja2", "is no pinned distribution"),
    ],
)
def test_line_that_is_no_pin_is_a_fault(line: str, says: str) -> None:
    """Whatever would let something else be installed than what was locked is named, and is no pin."""
    found = locks.read(f"# a comment\n{line}\n")
    assert found.pins == ()
    assert len(found.faults) == 1
    assert says in found.faults[0]
    assert audit.faults({"a.txt": found}, []) == [f"a.txt: {found.faults[0]}"]


def test_lock_of_nothing_is_a_fault() -> None:
    """A lock that was emptied does not pass for one without faults."""
    assert audit.faults({"a.txt": locks.read("# nothing\n")}, []) == ["a.txt: pins nothing"]


@pytest.mark.parametrize(
    ("version", "affected", "bad"),
    [
        ("3.1.5", "<3.1.6", True),
        ("3.1.6", "<3.1.6", False),
        ("3.1.6rc1", "<3.2", True),
        ("2.0", ">=3,<3.1.6", False),
        ("3.0", ">=3,<3.1.6", True),
    ],
)
def test_affected_version_is_a_fault(version: str, affected: str, bad: bool) -> None:
    """A version in the range of an advisory is told with lock, advisory and remedy, one outside of it is not."""
    found = audit.faults({"a.txt": lock(f"Jinja2=={version}")}, advisory(affected))
    assert found == ([f"a.txt: jinja2 {version} has CVE-0-1 (it leaks): make upgrade"] if bad else [])


def test_advisory_on_nothing_is_a_fault() -> None:
    """An advisory whose name no lock has would never be found: it is told, not passed over."""
    (found,) = audit.faults({"a.txt": lock("jinja2==3.1.6")}, advisory("<3", package="ninja2"))
    assert "CVE-0-1 is about ninja2, which no lock has" in found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[advisory]]\nid = "A"\npackage = "p"\nwhat = "w"\n', "A: has"),
        ('[[advisory]]\nid = "A"\npackage = "p"\naffected = []\nwhat = "w"\n', "A: names no versions"),
        ('[[advisory]]\nid = "A"\npackage = "p"\naffected = [""]\nwhat = "w"\n', "A: names no versions"),
        ('[[advisory]]\nid = "A"\npackage = "p"\naffected = ["below 3"]\nwhat = "w"\n', "A: Invalid specifier"),
    ],
)
def test_wrong_list_of_advisories_is_no_list(text: str, says: str) -> None:
    """An entry that could match nothing by mistake ends the audit, and says which it is."""
    with pytest.raises(audit.WrongList, match=re.escape(says)):
        audit.advisories(text)


class Outside(BaseHTTPRequestHandler):
    """An index that has taken back `shop` 1.0, and an advisory service that knows of what it is told to."""

    wheel = b""
    vulnerable: frozenset[str] = frozenset()

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            self.answer(self.wheel, "application/octet-stream")
        else:
            digest = hashlib.sha256(self.wheel).hexdigest()
            file = "shop-1.0-py3-none-any.whl"
            link = f'<a href="/{file}#sha256={digest}" data-yanked="broken">{file}</a>'
            self.answer(f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        affected = [{"package": asked["package"], "ranges": []}]
        known = [{"id": "PYSEC-0-7", "summary": "it leaks", "affected": affected}] if name in self.vulnerable else []
        self.answer(json.dumps({"vulns": known} if known else {}).encode(), "application/json")

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def tiny_wheel(path: Path) -> bytes:
    """A wheel of the distribution `shop` 1.0 that holds nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        about = "shop-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path.read_bytes()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Outside]]:
    """The two services, which the audit asks in place of the real ones, and a directory with a lock of `shop`."""

    class Here(Outside):
        wheel = tiny_wheel(tmp_path / "shop-1.0-py3-none-any.whl")

    (tmp_path / "locks").mkdir()
    digest = hashlib.sha256(Here.wheel).hexdigest()
    (tmp_path / "locks" / "a.txt").write_text(f"shop==1.0 --hash=sha256:{digest}\n")
    (tmp_path / "locks" / audit.ADVISORIES).write_text("")
    for name in [name for name in os.environ if name.startswith(("UV_", "PIP_"))]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Here) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{address}/simple/")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"{address}/v1/query")
        yield Here
        server.shutdown()


def test_online_audit_tells_what_others_know(
    outside: type[Outside], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --online a version that was taken back and one with a new advisory are told, and the command fails."""
    directory = str(tmp_path / "locks")
    assert audit.main([directory]) == 0
    assert audit.main(["--online", directory]) == 1
    told = capsys.readouterr().err
    assert '`shop==1.0` is yanked (reason: "broken")' in told
    assert "PYSEC" not in told
    outside.vulnerable = frozenset({"shop"})
    assert audit.main(["--online", directory]) == 1
    assert re.search(r"^shop +1\.0 +PYSEC-0-7", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.usefixtures("outside")
def test_online_audit_needs_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service that does not answer is a fault, and not a clean audit."""
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", "http://127.0.0.1:9/v1/query")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple/")
    assert audit.main(["--online", str(tmp_path / "locks")]) == 1
    told = capsys.readouterr().err
    assert "a.txt: uv cannot look it up" in told
    assert "pip-audit: " in told


# -- the bill of materials -----------------------------------------------------------------------------------------


@functools.cache
def bill() -> dict[str, Any]:
    """The committed bill of materials."""
    told: dict[str, Any] = json.loads(sbom.FILE.read_text())
    return told


def test_bill_is_what_the_lock_says() -> None:
    """The committed bill is what `make bills` would write now, whatever order a run of Python happens to have."""
    code = "import sys; from requirements.sbom import bill; sys.stdout.write(bill())"
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        assert made.returncode == 0, made.stderr
        assert made.stdout == sbom.FILE.read_bytes(), "run make bills"


def test_bill_is_cyclonedx() -> None:
    """CycloneDX's own schema accepts the bill, and would object to a wrong one."""
    validator = JsonStrictValidator(sbom.SCHEMA)
    assert validator.validate_str(sbom.FILE.read_text()) is None
    wrong = bill() | {"components": [{"name": "without a type"}]}
    assert validator.validate_str(json.dumps(wrong)) is not None


def test_bill_has_what_the_image_installs() -> None:
    """Each distribution of the runtime lock that Linux installs is in it with version and hashes, and nothing else."""
    text = re.sub(r"\\\n", " ", locks.RUNTIME.read_text())
    pinned = {}
    for line in text.splitlines():
        found = re.match(r"([a-z0-9-]+)==(\S+)( ; .*?)?((?: +--hash=sha256:\S+)+)", line)
        if found and not (found[3] and "== 'emscripten'" in found[3]):
            pinned[found[1]] = (found[2], set(re.findall(r"sha256:(\S+)", found[4])))
    told = {
        part["name"]: (part["version"], {one["content"] for one in part["externalReferences"][0]["hashes"]})
        for part in bill()["components"]
    }
    assert told == pinned
    assert {"cryptography", "grpcio", "httptools", "jinja2"} <= told.keys()
    assert bill()["metadata"]["component"]["version"] == provider.__version__


def test_bill_names_what_needs_what() -> None:
    """Every part is reached from the provider, by the dependencies that the installed distributions declare."""
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in bill()["dependencies"]}
    reached, pending = set(), ["vault-csi-provider"]
    while pending:
        if (part := pending.pop()) not in reached:
            reached.add(part)
            pending += needs.get(part, ())
    assert reached == {"vault-csi-provider", *(part["bom-ref"] for part in bill()["components"])}
    short = {ref.partition("@")[0].removeprefix("pkg:pypi/"): needs[ref] for ref in needs}
    assert any("markupsafe" in ref for ref in short["jinja2"])
    assert not any("markupsafe" in ref for ref in short["vault-csi-provider"])


def test_bill_tells_licences() -> None:
    """Each part has a licence that the image may hold."""
    for part in bill()["components"]:
        (licence,) = part["licenses"]
        licences.judge(part["name"], licence.get("expression") or licence["license"]["id"], licences.ALLOWED)


def test_wheel_is_reproducible_and_has_its_bill(tmp_path: Path) -> None:
    """Built twice, from files of other times, `make dist` gives the same bytes; the bill is in the wheel (PEP 770)."""
    made = []
    for name, when in (("one", 1_000_000_000), ("two", 1_500_000_000)):
        source = tmp_path / name
        source.mkdir()
        for part in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "provider", "requirements"):
            copied = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copied(ROOT / part, source / part)
        for path in source.rglob("*"):
            os.utime(path, (when, when))
        ready = source / "ready"
        done = subprocess.run(
            ["make", "dist", f"BIN={Path(sys.executable).parent}", f"READY={ready}", "-o", str(ready)],
            cwd=source,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.read_bytes() for path in (source / "dist").iterdir()})
    assert made[0] == made[1]
    wheel = f"vault_csi_provider-{provider.__version__}-py3-none-any.whl"
    assert made[0].keys() == {wheel, sbom.FILE.name, "SHA256SUMS"}
    sums = dict(line.split()[::-1] for line in made[0]["SHA256SUMS"].decode().splitlines())
    assert sums == {name: hashlib.sha256(made[0][name]).hexdigest() for name in (wheel, sbom.FILE.name)}
    with zipfile.ZipFile(tmp_path / "one" / "dist" / wheel) as archive:
        inside = f"vault_csi_provider-{provider.__version__}.dist-info/sboms/{sbom.FILE.name}"
        assert archive.read(inside) == sbom.FILE.read_bytes()


# -- licences ------------------------------------------------------------------------------------------------------


def test_licences_are_those_of_the_locks() -> None:
    """The page lists each dependency with its licence as installed, and each is one that is allowed."""
    assert licences.PAGE.read_text() == licences.page(), "run make bills"


@pytest.mark.parametrize(
    ("licence", "fine"),
    [
        ("MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("Apache-2.0 AND BSD-2-Clause", True),
        ("GPL-3.0-only", False),
        ("MIT AND AGPL-3.0-only", False),
        ("LGPL-3.0-only", False),
        ("Beerware-ish", False),
        ("see LICENSE", False),
    ],
)
def test_licence_that_is_not_allowed_stops_the_build(licence: str, fine: bool) -> None:
    """An expression has to be met by licences of the list; a choice is, where one branch is."""
    if fine:
        licences.judge("shop", licence, licences.ALLOWED)
    else:
        with pytest.raises(licences.UnknownLicence, match="shop"):
            licences.judge("shop", licence, licences.ALLOWED)


def metadata(**fields: str) -> Any:
    """The metadata of a distribution `shop`."""
    message = email.message.Message()
    message["Name"] = "shop"
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License": "Apache 2.0"}, "Apache-2.0"),
        ({"License": "the whole text of it", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT"),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, None),
        ({"License": "do what you like"}, None),
        ({}, None),
    ],
)
def test_licence_is_what_the_metadata_says(fields: dict[str, str], licence: str | None) -> None:
    """The licence is read where metadata has it; where it does not say which, that is an error and no guess."""
    if licence:
        assert licences.expression(metadata(**fields)) == licence
    else:
        with pytest.raises(licences.UnknownLicence, match="shop: its metadata names no licence"):
            licences.expression(metadata(**fields))


# -- workflows -----------------------------------------------------------------------------------------------------


def parsed(path: Path) -> dict[str, Any]:
    """A workflow. YAML 1.1 reads its `on` as true."""
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text())
    workflow["on"] = workflow.pop(True)
    return workflow


def steps(path: Path) -> list[dict[str, Any]]:
    """All steps of a workflow's jobs."""
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def test_there_are_workflows_for_all_of_it() -> None:
    """CI, the daily audit and the release are there."""
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "audit.yml", "release.yml"}


def test_linter_has_nothing_to_say_of_the_workflows(tmp_path: Path) -> None:
    """zizmor finds nothing in them, down to style, and is awake: it objects to an action by its tag."""
    command: list[str | Path] = [ZIZMOR, "--offline", "--no-progress", "--persona", "pedantic"]
    done = subprocess.run([*command, ROOT / ".github"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    worse = tmp_path / ".github" / "workflows" / "ci.yml"
    worse.parent.mkdir(parents=True)
    worse.write_text(re.sub(r"checkout@[0-9a-f]{40} # (\S+)", r"checkout@\1", WORKFLOWS[1].read_text()))
    done = subprocess.run([*command, worse], capture_output=True, text=True)
    assert done.returncode != 0
    assert "unpinned-uses" in done.stdout


def test_every_action_is_pinned_by_digest() -> None:
    """Each action is one commit, with the version that it is beside it, and the same in each workflow."""
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        uses = re.findall(r"uses: (\S+)(.*)$", path.read_text(), re.MULTILINE)
        assert len(uses) == len([step for step in steps(path) if "uses" in step])
        for action, comment in uses:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action
            pins.setdefault(action.partition("@")[0], set()).add(action + comment)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    assert "actions/checkout" in pins


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_may_read_and_no_more(path: Path) -> None:
    """A workflow as a whole may read the repository; what a job writes it names, and only the release writes."""
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    written = {
        name: {right for right, kind in job.get("permissions", {}).items() if kind == "write"}
        for name, job in workflow["jobs"].items()
    }
    signing = {"id-token", "attestations"}
    release: dict[str, set[str]] = {
        "build": set(),
        "attest": signing,
        "image": signing | {"packages"},
        "publish": {"contents"},
    }
    assert written == (release if path.name == "release.yml" else {name: set() for name in written})
    assert all(isinstance(job["timeout-minutes"], int) for job in workflow["jobs"].values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_forks_get_no_secret(path: Path) -> None:
    """No workflow runs a fork's code with this repository's rights or secrets; none leaves its token on the disk."""
    text = path.read_text()
    triggers = set(parsed(path)["on"])
    assert triggers <= {"push", "pull_request", "schedule", "workflow_dispatch"}
    assert "secrets." not in text
    assert "secrets:" not in text
    if path.name == "release.yml":
        assert parsed(path)["on"] == {"push": {"tags": ["v*"]}}
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_nothing_is_put_into_a_script(path: Path) -> None:
    """What others write (a branch's or a tag's name) reaches a script as a variable, never as its text; each parses."""
    for step in steps(path):
        script = step.get("run", "")
        assert "${{" not in script, script
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_workflows_run_what_is_there() -> None:
    """Each make target, file and artifact that a workflow names exists."""
    targets = set(re.findall(r"^([a-z]+)(?: [a-z]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in WORKFLOWS:
        scripts = "\n".join(step.get("run", "") for step in steps(path))
        assert set(re.findall(r"\bmake ([a-z]+)", scripts)) <= targets
        for named in re.findall(r"(?<![\w/])((?:requirements|\.ci)/[\w./-]+)", scripts):
            assert (ROOT / named).is_file(), named
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "cosign sign --yes" in release
    assert "attest-build-provenance" in release
    assert sbom.FILE.name in release


def test_release_builds_on_the_image_that_the_dockerfile_names() -> None:
    """The script's line that reads the base image out of the Dockerfile finds it, with or without a digest."""
    (script,) = [
        step["run"] for step in steps(ROOT / ".github" / "workflows" / "release.yml") if step.get("id") == "push"
    ]
    (line,) = [line for line in script.splitlines() if line.startswith("base=")]
    done = subprocess.run(["bash", "-euc", f'{line}\necho "${{base%%@*}}"'], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"python:3\.\d+-slim\n", done.stdout), done.stderr


def test_installed_is_what_is_told() -> None:
    """The versions of bill and page are those that the tests run on."""
    told = {part["name"]: part["version"] for part in bill()["components"]}
    assert told == {name: importlib.metadata.version(name) for name in told}
