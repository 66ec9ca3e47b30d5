"""What the metrics are called and mean: one table that Prometheus, docs/metrics.md and the tests of alerts read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Pods that are named since their mounts fail, those first that have been failing longest: enough to look at, and a
# whole node's pods may fail when Vault does.
MAX_FAILING: Final = 50


@dataclass(frozen=True, slots=True)
class Family:
    """Metrics of one name, as OpenMetrics has it: a counter's samples have ``_total`` behind it, an info's ``_info``.

    ``buckets`` are a histogram's upper bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    meaning: str
    unit: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def sample(self) -> str:
        """The name to ask Prometheus for; a histogram's has ``_bucket``, ``_count`` and ``_sum`` behind it."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


REQUESTS: Final = Family(
    "vault_requests",
    "counter",
    ("method", "path", "status"),
    "HTTP requests to Vault. path is the auth or engine mount; status is none where no answer came. Those of the "
    "daemon's own auth mount are known beforehand.",
)
LOOKS: Final = Family(
    "vault_csi_vault_looks",
    "counter",
    ("status",),
    "Looks at Vaults that do not answer, one a second at most, by what came; none where nothing did. They are none of "
    "the requests.",
)
REQUEST_SECONDS: Final = Family(
    "vault_request_duration_seconds",
    "histogram",
    ("method", "path"),
    "Seconds from sending a request to Vault to its answer, of those that were answered.",
    "seconds",
    (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
ROTATIONS: Final = Family(
    "secret_rotation",
    "counter",
    ("secret_type", "status"),
    "Objects that a re-mount changed (status success), and for each failed re-mount the secret types of its volume "
    "(status error).",
)
MOUNTS: Final = Family("vault_csi_mounts", "counter", ("code",), "Mounts by the gRPC code of their answer.")
MOUNT_SECONDS: Final = Family(
    "vault_csi_mount_duration_seconds",
    "histogram",
    ("outcome",),
    "Seconds that a mount took.",
    "seconds",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
REMOUNT_FAILURES: Final = Family(
    "vault_csi_remount_failures",
    "counter",
    ("code",),
    "Mounts that failed of volumes that had been mounted: their pods run on with what they have, and nobody is told.",
)
OBJECTS: Final = Family("vault_csi_mounted_objects", "counter", (), "Objects of the mounts that succeeded.")
FILES: Final = Family("vault_csi_mounted_files", "counter", (), "Files of the mounts that succeeded.")
BYTES: Final = Family(
    "vault_csi_mounted_bytes", "counter", (), "Bytes of the files of the mounts that succeeded.", "bytes"
)
ANSWERS: Final = Family(
    "vault_csi_answers",
    "counter",
    ("supply",),
    "Distinct reads of the mounts that succeeded: asked of Vault (read), a lease or certificate that the pod has "
    "(kept), or younger than refreshAfter (remembered).",
)
SHARED: Final = Family(
    "vault_csi_shared_reads", "counter", (), "Reads that took the answer to another pod's that was under way."
)
LOGINS: Final = Family(
    "vault_csi_logins",
    "counter",
    ("path", "outcome"),
    "Logins by auth mount: success, denied by Vault, no_token (Kubernetes gave none), unanswered, or failed otherwise.",
)
ISSUED: Final = Family(
    "vault_csi_issued", "counter", ("secret_type",), "Leases and certificates that Vault gave to pods."
)
RENEWALS: Final = Family(
    "vault_csi_renewals",
    "counter",
    ("what", "outcome"),
    "Renewals of tokens and leases: renewed, refused (it lives to its end), gone, or unanswered and tried again.",
)
REVOCATIONS: Final = Family(
    "vault_csi_revocations",
    "counter",
    ("outcome",),
    "Revocations of tokens: revoked, batch (a batch token, which none can revoke), refused (left to expire), or "
    "unanswered and tried again.",
)
SWEEPS: Final = Family(
    "vault_csi_sweeps",
    "counter",
    ("outcome",),
    "Looks for pods that are gone: done, or failed, which revokes nothing.",
)
GONE: Final = Family("vault_csi_pods_gone", "counter", (), "Pods that were found gone, and whose tokens are revoked.")
KILLS: Final = Family(
    "vault_csi_template_kills", "counter", ("limit",), "Templates and expressions ended by force, by their limit."
)
LOG_LOST: Final = Family(
    "vault_csi_log_lines_lost", "counter", (), "Lines of the log that found no room, as stderr was not read."
)
AUDIT_LOST: Final = Family("vault_csi_audit_lines_lost", "counter", (), "Lines of the audit log that were not written.")
AUDIT_OUTAGE: Final = Family(
    "vault_csi_audit_outage", "gauge", (), "1 while the audit log cannot be written, and its lines wait."
)
SESSIONS: Final = Family("vault_csi_sessions", "gauge", (), "Sessions of pods with Vault.")
LEASES: Final = Family("vault_csi_leases", "gauge", ("secret_type",), "Leases and certificates that are kept for pods.")
EARLIEST_END: Final = Family(
    "vault_csi_lease_earliest_end_seconds",
    "gauge",
    ("renewal",),
    "Seconds to the end of the lease or certificate that ends first: of those that are going to be renewed (due), of "
    "those that a re-mount is going to replace in time (remount), and of those that nothing is known to follow (over); "
    "+Inf where there is none.",
    "seconds",
)
AWAY: Final = Family(
    "vault_csi_vault_away",
    "gauge",
    ("address", "known"),
    "1 for a Vault that does not answer, so that mounts are refused at once. The one of the daemon's flags is always "
    "here, and known; so is one that has answered this daemon. Another (false) may be a slip in a class.",
)
FAILING: Final = Family(
    "vault_csi_failing_volumes", "gauge", (), "Volumes whose last mount failed, and that are still tried."
)
FAILING_SECONDS: Final = Family(
    "vault_csi_volume_failing_seconds",
    "gauge",
    ("pod_namespace", "pod_name", "mounted"),
    "Seconds from the first to the last failed mount of a pod's volume, while its mounts fail: 0 after one failure. "
    "mounted says whether one had succeeded, so that the pod runs with what it had. "
    f"The {MAX_FAILING} pods that have been failing longest.",
    "seconds",
)
BUILD: Final = Family("vault_csi_build", "info", ("version", "python"), "The daemon's version, and Python's.")

# All of the above, in their order.
FAMILIES: Final = tuple(found for found in vars().values() if isinstance(found, Family))
