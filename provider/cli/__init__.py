"""The program: its flags, the parts it is built of, and its life from start to signal."""

from provider.cli.daemon import main

__all__ = ["main"]
