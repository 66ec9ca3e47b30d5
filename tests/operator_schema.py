"""What of the Prometheus operator's resources this project writes, as a strict JSON Schema.

Kubernetes' own schemas know nothing of custom resources, and what packages carry of this operator's is a client with
models. So the fields that chart and files use are written down here, with the types, the required ones and the patterns
that the operator's definitions of monitoring.coreos.com/v1 have for them, as they stand in the models that are
generated from releases 0.80 and 0.93 of those definitions. It is narrower than they are: a field that is not here is
refused, be it misspelled or only new to this project, and whoever adds one looks it up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from jsonschema import Draft202012Validator

DURATION: Final = "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$"

_DURATION: Final = {"type": "string", "pattern": DURATION}
_STRINGS: Final = {"type": "object", "additionalProperties": {"type": "string"}}


def _fields(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {"type": "object", "properties": fields, "required": [*required], "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    """A list that is not empty: nothing here writes an empty one but by mistake."""
    return {"type": "array", "items": items, "minItems": 1}


_ENDPOINT: Final = _fields(
    {
        "port": {"type": "string"},
        "path": {"type": "string"},
        "interval": _DURATION,
        "scrapeTimeout": _DURATION,
        "relabelings": _list(
            _fields(
                {
                    "sourceLabels": _list({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
                    "targetLabel": {"type": "string"},
                }
            )
        ),
    }
)
_SELECTOR: Final = _fields({"matchLabels": _STRINGS})
_RULE: Final = _fields(
    {
        "alert": {"type": "string"},
        "expr": {"type": ["string", "integer"]},
        "for": _DURATION,
        "labels": _STRINGS,
        "annotations": _STRINGS,
    },
    "expr",
)
_SPECS: Final = {
    "PodMonitor": _fields({"selector": _SELECTOR, "podMetricsEndpoints": _list(_ENDPOINT)}, "selector"),
    "ServiceMonitor": _fields({"selector": _SELECTOR, "endpoints": _list(_ENDPOINT)}, "selector", "endpoints"),
    "PrometheusRule": _fields(
        {"groups": _list(_fields({"name": {"type": "string", "minLength": 1}, "rules": _list(_RULE)}, "name"))}
    ),
}
OPERATOR_KINDS: Final = tuple(_SPECS)
_METADATA: Final = _fields(
    {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": _STRINGS, "annotations": _STRINGS}, "name"
)
_KINDS: Final = {
    kind: Draft202012Validator(
        _fields(
            {
                "apiVersion": {"const": "monitoring.coreos.com/v1"},
                "kind": {"const": kind},
                "metadata": _METADATA,
                "spec": spec,
            },
            "apiVersion",
            "kind",
            "metadata",
            "spec",
        )
    )
    for kind, spec in _SPECS.items()
}


def assert_operator_valid(manifests: Iterable[dict[str, Any]]) -> None:
    """Every object of the operator's kinds among these is one that it takes, with no field that it would drop."""
    for manifest in manifests:
        if manifest["kind"] in _KINDS:
            _KINDS[manifest["kind"]].validate(manifest)
