"""A cluster of three real OpenBao servers with raft storage, whose leader can be killed or made to step down."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.stand.openbao import _PROBE_TIMEOUT, _START_TIMEOUT, OpenBao, OpenBaoError
from tests.stand.process import StandError
from tests.stand.waiting import eventually

NODES = 3
"""The fewest that still have a majority when one is gone."""
_STABLE_SECONDS = 1
"""How long a node that has joined is watched before it may vote; OpenBao's own 10 s would be waited for each time."""
_VOTERS_TIMEOUT = 60.0


class RaftNode(OpenBao):
    """One server of the cluster; it joins `first`, or is the first itself where that is None."""

    def __init__(self, number: int, first: RaftNode | None) -> None:
        super().__init__(storage="raft")
        self.name = f"node-{number}"
        self._first = first

    def _config(self) -> dict[str, object]:
        config = super()._config()
        raft: dict[str, object] = {
            "path": str(self._directory / "data"),
            "node_id": self.name,
            "performance_multiplier": 1,  # The shortest elections: a few seconds.
            # How often it is looked at who may vote by now.
            "autopilot_update_interval": "500ms",
            "autopilot_reconcile_interval": "1s",
        }
        if self._first is not None:
            raft["retry_join"] = [{"leader_api_addr": self._first.address}]
        config["storage"] = {"raft": raft}
        # OpenBao's standbys answer reads by themselves, also with what they have not heard of yet; Vault's forward.
        config["disable_standby_reads"] = True
        return config

    def _open_storage(self) -> None:
        if self._first is not None and not self._unseal_key:
            self._await(self._seen_initialised)
            self._unseal_key, self.root_token = self._first._unseal_key, self._first.root_token
            self.unseal()
        else:
            super()._open_storage()

    def _seen_initialised(self) -> None:
        if not self.api("GET", "sys/seal-status", token="")["initialized"]:
            raise BlockingIOError("the node has not joined yet")

    def _await_active(self) -> None:
        # A standby serves too, by forwarding; so a node that comes back to a cluster is ready as one.
        self._await(lambda: self.api("GET", "sys/health?standbyok=true", token="", timeout=_PROBE_TIMEOUT))
        self._await(lambda: self.api("GET", "auth/token/lookup-self", timeout=_PROBE_TIMEOUT))

    @property
    def is_active(self) -> bool:
        """Whether it is the cluster's leader, and serves as that."""
        try:
            self.api("GET", "sys/health", token="", timeout=_PROBE_TIMEOUT)
        except (OpenBaoError, OSError, http.client.HTTPException):
            return False
        return True


class RaftCluster(OpenBao):
    """Three servers on 127.0.0.1, used as a context manager. Calls of the API go to the active one.

    `nodes` are the servers; each can be killed, and started again on its own storage.
    """

    def __init__(self) -> None:
        super().__init__(storage="raft")
        first = RaftNode(0, None)
        self.nodes: Sequence[RaftNode] = (first, *(RaftNode(number, first) for number in range(1, NODES)))
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            first = parts.enter_context(self.nodes[0])
            self.root_token = first.root_token
            eventually(lambda: first.is_active, "the first node leads", seconds=_START_TIMEOUT)
            fields = {"server_stabilization_time": f"{_STABLE_SECONDS}s"}
            first.api("POST", "sys/storage/raft/autopilot/configuration", fields)
            for node in self.nodes[1:]:
                parts.enter_context(node)
            eventually(lambda: self._voters() == NODES, "every node may vote", seconds=_VOTERS_TIMEOUT)
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def active(self, *, seconds: float = _START_TIMEOUT) -> RaftNode:
        """The leader; StandError when there is none for so long."""
        found: list[RaftNode] = []

        def look() -> bool:
            found[:] = [node for node in self.nodes if node.is_active]
            return len(found) == 1

        eventually(look, "the cluster has a leader", seconds=seconds)
        return found[0]

    def kill_leader(self) -> RaftNode:
        """End the leader with SIGKILL, and return it when another leads."""
        leader = self.active()
        leader.kill()
        self.active()
        return leader

    def step_down(self) -> RaftNode:
        """Make the leader give up leading, and return it when another leads."""
        leader = self.active()
        leader.api("PUT", "sys/step-down")
        eventually(lambda: self.active() is not leader, "another node leads", seconds=_START_TIMEOUT)
        return leader

    @property
    def address(self) -> str:
        """The first node's, whatever it is just now."""
        return self.nodes[0].address

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        return self.active()._connection(timeout)

    @property
    def _socket_path(self) -> Path:
        raise StandError("each node has a socket of its own")

    def _voters(self) -> int:
        servers = self.api("GET", "sys/storage/raft/configuration")["data"]["config"]["servers"]
        return sum(server["voter"] for server in servers)
