"""A Secrets Store CSI driver provider for HashiCorp Vault and OpenBao."""

# The one place where the version is written: the packaging metadata reads it from here.
__version__ = "0.1.0"
