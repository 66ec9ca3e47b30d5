"""JSON Schemas of a class's parameters and of its objects, for editors: made of the tables that the parser reads.

``python -m provider.spc.schema DIRECTORY...`` writes them; the tests compare what is committed with what this makes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from provider.spc.parameters import KNOWN, NAMES
from provider.spc.shapes import EVERY_KEY, NEVER_WITH, ONLY_WITH
from provider.spc.tables import OBJECT_FIELDS, PARAMETERS, described, map_of

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def _says(field: str, **value: Any) -> dict[str, Any]:
    """An object in which a field is there, and neither null nor empty; or has this value."""
    return {"required": [field], "properties": {field: value or {"not": {"enum": [None, ""]}}}}


# How an object is known that has a shape, as far as fields hang on it.
_OF_SHAPE: Final = {
    "all": _says("secretKey", const=EVERY_KEY),
    "pkcs12": _says("format", const="pkcs12"),
    "template": _says("template"),
}


def objects_schema() -> dict[str, Any]:
    """What the parameter ``objects`` holds, once its YAML is read."""
    item = map_of(OBJECT_FIELDS)
    # A template's secrets may all be in its sources.
    item["required"] = ["objectName"]
    item["anyOf"] = [{"required": ["secretPath"]}, {"required": ["template", "sources"]}]
    item["allOf"] = [
        *({"if": _says(field), "then": _OF_SHAPE[shape]} for field, (shape, _) in ONLY_WITH.items()),
        *(
            {"if": _OF_SHAPE[shape], "then": {"not": _says(field)}}
            for shape, fields in NEVER_WITH.items()
            for field in fields
        ),
    ]
    return {
        "$schema": _DIALECT,
        "title": "objects of a SecretProviderClass for vault-csi-provider",
        "type": "array",
        "minItems": 1,
        "items": item,
    }


def parameters_schema() -> dict[str, Any]:
    """``spec.parameters`` of a SecretProviderClass, in each spelling that the parser knows."""
    usual = {field.name: field for field in PARAMETERS}
    properties = {name: described(usual[_usual(name)]) for name in KNOWN}
    roles = [name for name in KNOWN if _usual(name) == "roleName"]
    return {
        "$schema": _DIALECT,
        "title": "parameters of a SecretProviderClass for vault-csi-provider",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": ["objects"],
        "anyOf": [{"required": [name]} for name in roles],
    }


def _usual(name: str) -> str:
    """The spelling that the table has for a parameter."""
    own = NAMES.get(name)
    return name if own is None else "roleName" if own == "RoleName" else f"vault{own}"


SCHEMAS: Final = {"objects.schema.json": objects_schema, "parameters.schema.json": parameters_schema}


def text(name: str) -> str:
    """A schema as its file holds it."""
    return json.dumps(SCHEMAS[name](), indent=2, ensure_ascii=False) + "\n"


def main(directories: list[str]) -> None:
    """Write the schemas into each of the directories."""
    for directory in directories:
        for name in SCHEMAS:
            Path(directory, name).write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
