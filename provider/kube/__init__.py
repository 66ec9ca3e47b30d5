"""What the provider needs of the Kubernetes API: tokens, the key for object versions, and who lives."""

from provider.kube.hmac_key import HmacKey
from provider.kube.kubernetes import Kubernetes
from provider.kube.pods import NodePods

__all__ = ["HmacKey", "Kubernetes", "NodePods"]
