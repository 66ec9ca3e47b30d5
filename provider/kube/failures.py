"""How a call of the Kubernetes API fails, within this room."""

from __future__ import annotations


class ApiFailure(Exception):
    """A call that failed.

    ``status`` is the HTTP status, or 0 where no answer came. ``kind`` is the resource that the API server
    says it is about ("pods"), or "". ``reason`` is a sentence for people and holds no credential.
    """

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(status, kind, reason)
        self.status = status
        self.kind = kind
        self.reason = reason


class AnswerTooLarge(ApiFailure):
    """An answer that is larger than its limit, and was not read to its end."""


class NotConfigured(Exception):
    """There is no usable configuration; the message says why and holds no credential."""
