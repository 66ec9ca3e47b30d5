"""The key for object versions: from a file or from a Secret, asked for sparingly, then kept."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from provider.clock import Clock
from provider.errors import KubernetesUnavailable
from provider.kube.kubernetes import MIN_HMAC_KEY_BYTES, Kubernetes
from provider.settings import Settings

_log = logging.getLogger(__name__)

# A node mounts many volumes a minute, and none of them fails for want of a key.
RETRY_SECONDS: Final = 60.0
# The longest that a mount waits for the key; versions are worth less than a pod that starts.
MAX_WAIT_SECONDS: Final = 5.0
# A file that is larger is not a key: a device, or the wrong path.
MAX_KEY_BYTES: Final = 4096


class HmacKey:
    """The HMAC key, from ``settings.hmac_key_file`` where that is set, else from the Secret.

    The file's bytes are the key as they are, less one newline at the end; at least 16 bytes, at most 4096.
    With a file set, the Kubernetes API is not asked, even where the file cannot be used.
    """

    def __init__(self, settings: Settings, kubernetes: Kubernetes, clock: Clock) -> None:
        self._file = settings.hmac_key_file
        self._secret_name = settings.hmac_secret_name
        self._kubernetes = kubernetes
        self._clock = clock
        self.known: bytes | None = None
        """The key, once it is known."""
        self._fetch: asyncio.Task[None] | None = None
        self._asked_at: float | None = None

    async def get(self) -> bytes | None:
        """The key, or None where it is not to be had now; a warning says why, once a minute at most.

        The first success is kept for the life of the process. Until then the key is asked for once a minute
        at most, by one task that all callers share and none of them cancels; none waits longer than
        MAX_WAIT_SECONDS, counted from that task's start.
        """
        now = self._clock.now()
        if self.known is None and (self._asked_at is None or now - self._asked_at >= RETRY_SECONDS):
            self._asked_at = now
            self._fetch = asyncio.create_task(self._ask(), name="hmac-key")
        if self.known is None and self._fetch is not None and self._asked_at is not None:
            left = self._asked_at + MAX_WAIT_SECONDS - now
            await asyncio.wait({self._fetch}, timeout=max(left, 0.0))
        return self.known

    async def close(self) -> None:
        """Stop asking."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait({self._fetch})

    async def _ask(self) -> None:
        try:
            if self._file:
                self.known = await asyncio.to_thread(_read, Path(self._file))
            else:
                self.known = await self._kubernetes.read_or_create_hmac_key(self._secret_name)
        except (KubernetesUnavailable, _Unusable) as error:
            _log.warning("object versions stay empty, trying again in %.0f s: %s", RETRY_SECONDS, error)


class _Unusable(Exception):
    """The key file is not there, or is no key."""


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_KEY_BYTES + 2)
    except OSError as error:
        raise _Unusable(f"--hmac-key-file {path}: {error.strerror}") from error
    key = raw.removesuffix(b"\n")
    if not MIN_HMAC_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise _Unusable(f"--hmac-key-file {path}: a key has {MIN_HMAC_KEY_BYTES} to {MAX_KEY_BYTES} bytes")
    return key
