"""The class of the demo with everything behind it: a shop that reads its database's credential and a key."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

import yaml

from tests.stand.kubeapi import KubeApi, Pod
from tests.stand.openbao import OpenBao
from tests.stand.postgres import Postgres
from tests.stand.process import StandError

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "ecommerce.yaml"
"""The manifest whose SecretProviderClass is mounted."""

NAMESPACE = "ecommerce"
SERVICE_ACCOUNT = "ecommerce-service-account"
AUDIENCE = "vault"
"""What the CSIDriver object of an installation names in `tokenRequests`."""

POLICY = """
path "ecommerce/data/user-service/*"            { capabilities = ["read"] }
path "ecommerce/data/payment-service/*"         { capabilities = ["read"] }
path "ecommerce/data/shared/*"                  { capabilities = ["read"] }
path "database/creds/ecommerce-readonly"        { capabilities = ["read"] }
path "database/creds/ecommerce-readwrite"       { capabilities = ["read"] }
"""

_READ_ONLY = 'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{{name}}";'
_READ_WRITE = 'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{{name}}";'


class EcommerceStand:
    """PostgreSQL, the Kubernetes API and OpenBao set up for the shop, used as a context manager.

    Policies, roles and secrets are those that the example's comment sets up: role `ecommerce-app` for the
    service account `ecommerce-service-account` of namespace `ecommerce`, the database roles
    `ecommerce-readonly` and `ecommerce-readwrite` (1h, at most 24h), and the key `api_key` at
    `ecommerce/data/shared/config`.

    `audience` is what the login role asks of a token and what `tokens` are for: an installation whose
    CSIDriver object has `tokenRequests`. With None it has none: the driver sends no token, and the role
    names no audience, for which OpenBao takes a token of any (it asks the TokenReview for the token's own).
    `audit` is OpenBao's.
    """

    api_key = "shop-key-0001"
    """The first value of `api_key`; `rotate_api_key` changes it."""

    def __init__(self, *, audience: str | None = AUDIENCE, audit: bool = False) -> None:
        self._audience = audience
        self.postgres = Postgres()
        self.kube = KubeApi()
        self.openbao = OpenBao(audit=audit)
        self.pod = self.kube.add_pod(NAMESPACE, "shop-7d4b9c6f5-x2x8p", service_account=SERVICE_ACCOUNT)
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as parts:
            parts.enter_context(self.postgres)
            parts.enter_context(self.kube)
            parts.enter_context(self.openbao)
            self._fill_database()
            self._set_up_openbao()
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    @property
    def parameters(self) -> dict[str, str]:
        """The example class's parameters, with this stand's address for the cluster's."""
        return example_parameters(EXAMPLE) | {"vaultAddress": self.openbao.address}

    def tokens(self, pod: Pod | None = None) -> dict[str, str] | None:
        """Fresh tokens of `pod` (default: `self.pod`), by audience, as the driver sends them."""
        if self._audience is None:
            return None
        bound = pod or self.pod
        token = self.kube.issue_token(bound.namespace, bound.service_account, audiences=[self._audience], pod=bound)
        return {self._audience: token}

    def rotate_api_key(self, value: str) -> None:
        """Write a new version of the secret that holds `api_key`."""
        self.openbao.write_kv("ecommerce/data/shared/config", {"api_key": value})

    def _fill_database(self) -> None:
        self.postgres.query("CREATE TABLE products (id int PRIMARY KEY, name text NOT NULL, price numeric(8, 2))")
        self.postgres.query("INSERT INTO products VALUES (1, 'Teapot', 24.90), (2, 'Kettle', 39.00)")

    def _set_up_openbao(self) -> None:
        bao = self.openbao
        bao.mount_kv("ecommerce")
        bao.write_kv("ecommerce/data/shared/config", {"api_key": self.api_key})
        bao.write_kv("ecommerce/data/user-service/config", {"session_secret": "shop-session-0001"})
        bao.write_kv("ecommerce/data/payment-service/config", {"merchant_id": "shop-merchant-0001"})
        bao.enable_database(self.postgres)
        bao.database_role("ecommerce-readonly", "1h", "24h", _READ_ONLY)
        bao.database_role("ecommerce-readwrite", "1h", "24h", _READ_WRITE)
        bao.write_policy("ecommerce-policy", POLICY)
        bao.enable_kubernetes_auth("kubernetes", self.kube)
        bao.role(
            "kubernetes",
            "ecommerce-app",
            bound_service_account_names=[SERVICE_ACCOUNT],
            bound_service_account_namespaces=[NAMESPACE],
            token_policies=["ecommerce-policy"],
            token_ttl="24h",
            **({} if self._audience is None else {"audience": self._audience}),
        )


def example_parameters(manifest: Path) -> dict[str, str]:
    """The `spec.parameters` of the one SecretProviderClass in a manifest; StandError when there is none."""
    for document in yaml.safe_load_all(manifest.read_text()):
        if document is not None and document["kind"] == "SecretProviderClass":
            parameters: dict[str, str] = document["spec"]["parameters"]
            return parameters
    raise StandError(f"{manifest} has no SecretProviderClass")
