"""Classes as the driver sends them, for the tests of provider.spc."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from provider.errors import InvalidClass
from provider.settings import Settings
from provider.spc import Encoding, MountSpec, ObjectSpec, Parser, SecretRequest, SingleValue, Source, Whole

TOKENS: Final = "csi.storage.k8s.io/serviceAccount.tokens"

# What the driver adds, and the one parameter that every class needs besides its objects.
GIVEN: Final = {
    "csi.storage.k8s.io/pod.name": "web-0",
    "csi.storage.k8s.io/pod.namespace": "shop",
    "csi.storage.k8s.io/pod.uid": "8f3c2c1e-5b7a-4d0c-9a52-0c9de8b2a6b1",
    "csi.storage.k8s.io/serviceAccount.name": "web",
    "csi.storage.k8s.io/ephemeral": "true",
    "secretProviderClass": "web-secrets",
    "roleName": "web",
}
OBJECT: Final = "- objectName: password\n  secretPath: secret/data/web\n"


def plain(
    name: str,
    request: SecretRequest,
    key: str | None,
    mode: int = 0o644,
    encoding: Encoding = Encoding.UTF8,
    **options: Any,
) -> ObjectSpec:
    """An object of docs/contract.md section 2: the value of ``key``, or the whole response."""
    shape = Whole() if key is None else SingleValue(key, encoding)
    return ObjectSpec(name, (Source("secret", request),), shape, mode, **options)


def value(spec: ObjectSpec) -> SingleValue:
    """The shape of an object that is one value."""
    assert isinstance(spec.shape, SingleValue)
    return spec.shape


def attributes(objects: str = OBJECT, **parameters: str) -> str:
    """The attributes of a class with these parameters over GIVEN; "" takes one away."""
    given = {**GIVEN, "objects": objects, **parameters}
    return json.dumps({key: value for key, value in given.items() if value}, ensure_ascii=False)


def parse(
    attributes: str, secrets: str = "null", permission: str = "420", settings: Settings | None = None
) -> MountSpec:
    """What a fresh Parser makes of the request."""
    return Parser(settings or Settings()).parse(attributes, secrets, "/pods/web-0/mount", permission)


def parse_class(objects: str = OBJECT, **parameters: str) -> MountSpec:
    """What a class comes to under default settings."""
    return parse(attributes(objects, **parameters))


def one(fields: str) -> ObjectSpec:
    """The one object of a class, from its fields in YAML's flow style, over a legal name and path."""
    return parse_class("- {objectName: password, secretPath: secret/data/web, " + fields + "}").objects[0]


def body(secret_args: str) -> str | None:
    """The JSON that ``secretArgs`` become, given in YAML's flow style."""
    sensitive = one("secretArgs: " + secret_args).request.body
    return None if sensitive is None else sensitive.reveal()


def faults(objects: str = OBJECT, **parameters: str) -> tuple[str, ...]:
    """The faults of a class that is refused."""
    with pytest.raises(InvalidClass) as refused:
        parse_class(objects, **parameters)
    return refused.value.faults


def fault(objects: str = OBJECT, **parameters: str) -> str:
    """The only fault of a class."""
    (found,) = faults(objects, **parameters)
    return found


def field_fault(fields: str) -> str:
    """The only fault of a class with one object, its fields as for ``one``."""
    return fault("- {objectName: password, secretPath: secret/data/web, " + fields + "}")
