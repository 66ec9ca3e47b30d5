"""The bill of materials of the wheel, in CycloneDX: `python -m requirements.sbom` writes it anew.

It says what Linux installs with the wheel: each distribution of the runtime lock with its version, its licence, the
SHA-256 of each file that the lock admits, and what needs what. It is made of the lock and of what is installed alone,
so that it is the same wherever and whenever it is made; it is committed, since the wheel is built of the repository.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
import uuid
from collections.abc import Mapping
from importlib.metadata import metadata, requires
from typing import Any, Final

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import provider
from requirements.licences import ALLOWED, UnknownLicence, expression, judge
from requirements.locks import HERE, IMAGE, ROOT, RUNTIME, Pin, read

FILE: Final = HERE / "vault-csi-provider.cdx.json"
SCHEMA: Final = SchemaVersion.V1_6

_NAME: Final = "vault-csi-provider"


def bill() -> str:
    """The bill of materials of the lock as it is, as JSON. Raises UnknownLicence."""
    text = RUNTIME.read_text()
    pins = {pin.name: pin for pin in read(text).pins if pin.installed}
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    root = Component(
        name=_NAME,
        version=provider.__version__,
        type=ComponentType.APPLICATION,
        description=project["description"],
        licenses=[LicenseExpression(project["license"])],
        purl=PackageURL("pypi", name=_NAME, version=provider.__version__),
        bom_ref=_NAME,
    )
    # One bill, one number: of what it says, not of when it was made.
    number = uuid.uuid5(uuid.NAMESPACE_URL, f"{root.purl}#{hashlib.sha256(text.encode()).hexdigest()}")
    bom = Bom(serial_number=number)
    bom.metadata.component = root
    parts = {name: _part(pin) for name, pin in pins.items()}
    for part in parts.values():
        bom.components.add(part)
    bom.register_dependency(root, [parts[name] for name in _needed(project["dependencies"], {""}, pins)])
    for name, extras in _asked_for(project["dependencies"], pins).items():
        bom.register_dependency(parts[name], [parts[other] for other in _needed(requires(name), extras, pins)])
    told: dict[str, Any] = json.loads(make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string())
    # A time would make each bill another one.
    del told["metadata"]["timestamp"]
    return json.dumps(told, indent=1, sort_keys=True) + "\n"


def _part(pin: Pin) -> Component:
    licence = expression(metadata(pin.name))
    judge(pin.name, licence, ALLOWED)
    purl = PackageURL("pypi", name=pin.name, version=str(pin.version))
    # Of its files, any of which may be what is installed; a component's own hashes would be of one content.
    files = [
        ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION,
            url=XsUri(str(purl)),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content) for content in pin.hashes],
        )
    ]
    return Component(
        name=pin.name,
        version=str(pin.version),
        type=ComponentType.LIBRARY,
        licenses=[LicenseExpression(licence)],
        purl=purl,
        bom_ref=str(purl),
        external_references=files,
    )


def _needed(written: list[str] | None, extras: set[str], pins: Mapping[str, Pin]) -> dict[str, set[str]]:
    """What requirements with these extras come to on Linux, by name: the extras that they ask for."""
    needed: dict[str, set[str]] = {}
    for requirement in map(Requirement, written or ()):
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({**IMAGE, "extra": extra}) for extra in extras
        )
        if wanted and name in pins:
            needed.setdefault(name, {""}).update(requirement.extras)
    return needed


def _asked_for(dependencies: list[str], pins: Mapping[str, Pin]) -> dict[str, set[str]]:
    """Each distribution of the lock, with the extras that whatever needs it asks for."""
    asked = _needed(dependencies, {""}, pins)
    changed = True
    while changed:
        changed = False
        for name in list(asked):
            for other, extras in _needed(requires(name), asked[name], pins).items():
                if not extras <= asked.get(other, set()):
                    asked.setdefault(other, set()).update(extras)
                    changed = True
    return asked


def main() -> int:
    """Write the bill; 1, and a line that says why, where a licence is unknown or not allowed."""
    try:
        FILE.write_text(bill())
    except UnknownLicence as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
