"""Pure: the strings of a MountRequest -> a typed MountSpec, or InvalidClass with every fault at once."""

from provider.spc.model import Encoding, Login, MountSpec, ObjectSpec, Pod, SecretRequest, VaultServer
from provider.spc.parser import Parser

__all__ = ["Encoding", "Login", "MountSpec", "ObjectSpec", "Parser", "Pod", "SecretRequest", "VaultServer"]
