"""The JSON Schemas for editors: what is committed is what the tables make, and every example is valid by them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from provider.spc import schema
from provider.spc.parameters import KNOWN
from provider.spc.tables import OBJECT_FIELDS, PARAMETERS, PASSWORD_FIELDS, SOURCE_FIELDS
from tests.spc_classes import field_fault, one
from tests.tools import ROOT

EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
VALID = "{objectName: a, secretPath: b}"
OBJECTS = jsonschema.Draft202012Validator(schema.objects_schema())
PARAMETERS_SCHEMA = jsonschema.Draft202012Validator(schema.parameters_schema())


@pytest.mark.parametrize("folder", ["provider/spc", "deploy/schemas"])
def test_committed_schemas_are_what_the_tables_make(folder: str) -> None:
    """Neither the package's copy nor that under deploy/ has drifted from the tables that the parser reads."""
    found = {path.name: path.read_text() for path in (ROOT / folder).glob("*.schema.json")}
    assert found == {name: schema.text(name) for name in schema.SCHEMAS}, "run make schemas"


def test_the_command_writes_them(tmp_path: Path) -> None:
    """``python -m provider.spc.schema DIRECTORY`` writes both files."""
    subprocess.run([sys.executable, "-m", "provider.spc.schema", tmp_path], cwd=ROOT, check=True)
    assert {path.name for path in tmp_path.iterdir()} == set(schema.SCHEMAS)
    jsonschema.Draft202012Validator.check_schema(schema.objects_schema())
    jsonschema.Draft202012Validator.check_schema(schema.parameters_schema())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(example: Path) -> None:
    """Each example's parameters, and the objects in them, are valid by the schemas."""
    (found,) = [m for m in yaml.safe_load_all(example.read_text()) if m["kind"] == "SecretProviderClass"]
    parameters: dict[str, str] = found["spec"]["parameters"]
    PARAMETERS_SCHEMA.validate(parameters)
    OBJECTS.validate(yaml.safe_load(parameters["objects"]))


def test_every_parameter_is_there() -> None:
    """Each spelling that the parser knows is a property, and each row of the table is one of the parser's."""
    assert schema.parameters_schema()["properties"].keys() == set(KNOWN)
    assert {field.name for field in PARAMETERS} <= set(KNOWN)


def test_every_field_is_there_with_its_meaning() -> None:
    """Each field of an object, of a source and of a password is a property that an editor can explain."""
    properties = schema.objects_schema()["items"]["properties"]
    assert list(properties) == [field.name for field in OBJECT_FIELDS]
    assert list(properties["sources"]["additionalProperties"]["properties"]) == [field.name for field in SOURCE_FIELDS]
    assert list(properties["passwordFrom"]["properties"]) == [field.name for field in PASSWORD_FIELDS]
    assert all(found["description"] for found in properties.values())


@pytest.mark.parametrize(
    "fields",
    [
        "secretKey: 5",
        "method: put",
        "secretArgs: {a: [1, null]}",
        "filePermission: 0600",
        "filePermission: '0o600'",
        "filePermission: ''",
        "encoding: Base64",
        "lease: fresh",
        "renewPercent: 33.5",
        "renewPercent: '67'",
        "refreshAfter: 1h30m",
        "refreshAfter: 0",
        "optional: true",
        "secretKey: '*', includes: [a], excludes: [b, 1]",
        "jmesPath: 'a[0]', format: yaml",
        "format: pkcs12, alias: web, legacy: true, passwordFrom: {secretPath: a, secretKey: b}",
        "template: x, sources: {a: {secretPath: b, method: PUT, secretArgs: {c: d}, jmesPath: e}}",
        "lease: null, format: null, encoding: null, includes: null, alias: '', sources: null, template: ''",
        "secretKey: '*', format: yaml, encoding: hex, jmesPath: ''",
    ],
)
def test_what_the_parser_takes_is_valid(fields: str) -> None:
    """An object that parses is valid by the schema too."""
    one(fields)
    OBJECTS.validate([yaml.safe_load("{objectName: password, secretPath: secret/data/web, " + fields + "}")])


@pytest.mark.parametrize(
    "fields",
    [
        "secretKey: [a]",
        "method: a b",
        "filePermission: '999'",
        "filePermission: -1",
        "encoding: rot13",
        "lease: Fresh",
        "renewPercent: 100",
        "refreshAfter: 5",
        "refreshAfter: 1d",
        "optional: maybe",
        "secretKey: '*', includes: a",
        "format: xml",
        "format: pkcs12, passwordFrom: {secretPath: a}",
        "template: x, sources: {a-b: {secretPath: c}}",
        "template: x, sources: {a: {method: GET}}",
        "template: x, sources: [a]",
        "method: CONNECT",
        "includes: [a]",
        "secretKey: a, excludes: [b]",
        "format: yaml, alias: web",
        "legacy: true",
        "passwordFrom: {secretPath: a, secretKey: b}",
        "sources: {a: {secretPath: b}}",
        "secretKey: '*', jmesPath: a",
        "format: pkcs12, secretKey: a",
        "format: pkcs12, jmesPath: a",
        "format: pkcs12, encoding: hex",
        "template: x, secretKey: a",
        "template: x, encoding: hex",
        "template: x, format: json",
    ],
)
def test_what_the_parser_refuses_is_not_valid(fields: str) -> None:
    """A value that the parser refuses is underlined in an editor already."""
    field_fault(fields)
    entry: dict[str, Any] = yaml.safe_load("{objectName: password, secretPath: secret/data/web, " + fields + "}")
    assert not OBJECTS.is_valid([entry])


def test_a_name_and_a_path_are_needed() -> None:
    """Without objectName an object is not valid, nor without secretPath unless a template has sources."""
    assert not OBJECTS.is_valid([{"secretPath": "a"}])
    assert not OBJECTS.is_valid([{"objectName": "a"}])
    assert not OBJECTS.is_valid([{"objectName": "a", "template": "x"}])
    assert OBJECTS.is_valid([{"objectName": "a", "template": "x", "sources": {"b": {"secretPath": "c"}}}])
    assert not OBJECTS.is_valid([{"objectName": "a", "secretPath": "b", "secretkey": "c"}])
    assert not PARAMETERS_SCHEMA.is_valid({"roleName": "a"})
    assert not PARAMETERS_SCHEMA.is_valid({"objects": ""})
    assert PARAMETERS_SCHEMA.is_valid({"objects": "", "baoRoleName": "a"})
