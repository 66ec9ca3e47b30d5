"""Pure: the strings of a MountRequest -> a typed MountSpec, or InvalidClass with every fault at once."""

from provider.spc.model import Encoding, Login, MountSpec, ObjectSpec, Pod, SecretRequest, VaultServer

__all__ = ["Encoding", "Login", "MountSpec", "ObjectSpec", "Pod", "SecretRequest", "VaultServer"]
