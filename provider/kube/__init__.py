"""What the provider needs of the Kubernetes API: tokens for pods, and the key for object versions."""

from provider.kube.hmac_key import HmacKey
from provider.kube.kubernetes import Kubernetes

__all__ = ["HmacKey", "Kubernetes"]
