"""Pure: the strings of a MountRequest -> a typed MountSpec, or InvalidClass with every fault at once."""

from provider.spc.model import (
    AllKeys,
    Encoding,
    Format,
    Login,
    MountSpec,
    ObjectSpec,
    Pkcs12,
    Pod,
    SecretRequest,
    Shape,
    SingleValue,
    Source,
    Template,
    VaultServer,
    Whole,
)
from provider.spc.parameters import mounting_class, mounting_pod
from provider.spc.parser import FaultyClass, Parser

__all__ = [
    "AllKeys",
    "Encoding",
    "FaultyClass",
    "Format",
    "Login",
    "MountSpec",
    "ObjectSpec",
    "Parser",
    "Pkcs12",
    "Pod",
    "SecretRequest",
    "Shape",
    "SingleValue",
    "Source",
    "Template",
    "VaultServer",
    "Whole",
    "mounting_class",
    "mounting_pod",
]
