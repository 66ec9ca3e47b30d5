"""`make demo`: a pod's secrets, from OpenBao to the files of its volume and to the pod's end, told as a story.

The provider runs as a program of its own, as it does on a node. OpenBao and PostgreSQL are real servers; the Kubernetes
API and the CSI driver are the stand's, since both take a cluster. Nothing outlives the demo: not when it ends, not
when it fails, not after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import re
import secrets
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self, TextIO

try:
    import grpc
    import psycopg
    import yaml

    from tests.stand.driver import Driver, DriverError, MountOutcome
    from tests.stand.ecommerce import EXAMPLE, EcommerceStand
    from tests.stand.kubeapi import KubeApi, Pod
    from tests.stand.openbao import OpenBaoError, find_binary
    from tests.stand.process import Process, StandError, free_port
except ModuleNotFoundError as missing:
    if __name__ == "__main__":
        sys.exit(f"The demo stops: the Python package {missing.name} is missing. `make demo` brings all that it needs.")
    raise

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 60
"""The demo takes some 15 s; what is not done by then hangs."""
NEW_API_KEY = "shop-key-0002-rotated"
SWEEP_SECONDS = 1
"""Between two looks for pods that are gone; an installation's default is 60."""
HELD = ("tokens in OpenBao", "leases in OpenBao", "users in PostgreSQL")
_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
"""What Kubernetes makes the ends of pod names of."""


class DemoFailed(Exception):
    """The story went another way than it should; the message says where."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What the demo needs of the manifest: a Deployment, and the class that its volume names."""

    namespace: str
    name: str
    service_account: str
    replicas: int
    class_name: str
    mount_path: str
    parameters: Mapping[str, str]

    @classmethod
    def read(cls, manifest: Path) -> Self:
        """The one Deployment of a manifest with its SecretProviderClass; DemoFailed where they do not fit."""
        documents = {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text())}
        deployment, secret_class = documents["Deployment"], documents["SecretProviderClass"]
        pod = deployment["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if "csi" in volume]
        named = volume["csi"]["volumeAttributes"]["secretProviderClass"]
        if named != secret_class["metadata"]["name"]:
            raise DemoFailed(f"{manifest.name}: its Deployment mounts {named}, which is not in it")
        (mount,) = [at for at in pod["containers"][0]["volumeMounts"] if at["name"] == volume["name"]]
        return cls(
            namespace=deployment["metadata"]["namespace"],
            name=deployment["metadata"]["name"],
            service_account=pod["serviceAccountName"],
            replicas=deployment["spec"]["replicas"],
            class_name=named,
            mount_path=mount["mountPath"],
            parameters=secret_class["spec"]["parameters"],
        )

    def scale_up(self, kube: KubeApi) -> list[Pod]:
        """Its pods, created with the names that a ReplicaSet gives."""
        replica_set = f"{self.name}-{_random(10)}"
        return [
            kube.add_pod(self.namespace, f"{replica_set}-{_random(5)}", service_account=self.service_account)
            for _ in range(self.replicas)
        ]


class Teller:
    """Writes the story: numbered chapters, lines below them. Bold headings on a terminal, plain text elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._bold, self._plain = ("\x1b[1m", "\x1b[0m") if out.isatty() else ("", "")
        self._chapters = 0

    def chapter(self, heading: str) -> None:
        """Begin the next chapter."""
        self._chapters += 1
        self.say()
        self.say(f"{self._bold}{self._chapters}. {heading}{self._plain}")

    def tell(self, *lines: str) -> None:
        """Lines of the chapter."""
        for line in lines:
            self.say(f"   {line}")

    def say(self, line: str = "") -> None:
        """One line, at once: a story that is piped somewhere is followed as it goes."""
        print(line, file=self._out, flush=True)


class Provider:
    """The daemon as a program: started, killed and stopped. Its log is `provider.log` in `directory`."""

    def __init__(self, directory: Path, kube: KubeApi, vault_address: str, node: str) -> None:
        self.socket = directory / "vault.sock"
        self._health_port = free_port()
        self.flags = (
            f"-endpoint={self.socket}",
            f"-vault-addr={vault_address}",
            f"-health-addr=127.0.0.1:{self._health_port}",
            f"--kubeconfig={kube.write_kubeconfig(directory / 'kubeconfig')}",
            f"--state-dir={directory / 'state'}",
            f"--node-name={node}",
            f"--sweep-interval={SWEEP_SECONDS}s",
        )
        self._log = directory / "provider.log"
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop()

    @property
    def pid(self) -> int:
        """The process id of the one that runs, or ran last."""
        return self._running.pid

    def start(self) -> None:
        """Start it, and return when it says that mounts can come; StandError when it ends before."""
        # A developer's shell may speak of another Vault, or of a proxy.
        theirs = re.compile(r"(VAULT|BAO)_.*|(https?|all)_proxy", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not theirs.fullmatch(name)}
        command = [sys.executable, "-m", "provider.cli", *self.flags]
        self._process = Process(command, log=self._log, cwd=ROOT, env=environment)
        while not self._ready():
            if not self._process.running:
                raise StandError(f"the provider ended at its start:\n{self._process.log_tail()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash does."""
        self._running.kill()

    def stop(self) -> int:
        """Ask it to stop; returns its exit status."""
        return self._running.stop()

    @property
    def _running(self) -> Process:
        assert self._process is not None  # Used as a context manager.
        return self._process

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._health_port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Demo:
    """The story, chapter by chapter. `directory` is where the socket and the volumes go."""

    def __init__(self, teller: Teller, stand: EcommerceStand, provider: Provider, directory: Path) -> None:
        self._teller = teller
        self._stand = stand
        self._provider = provider
        self._directory = directory

    def play(self) -> None:
        """Tell it from the first mount to the pods' end and beyond; DemoFailed where it is not as it should be."""
        with Driver(self._provider.socket) as driver:
            pods, deployment = self._apply()
            mounted = self._mount(driver, deployment, pods)
            self._log_in(mounted)
            mounted = self._rotate(driver, mounted)
            self._crash(driver, mounted)
            self._delete(deployment, pods)
            self._explain(driver, deployment)

    def _apply(self) -> tuple[list[Pod], Deployment]:
        self._teller.chapter(f"kubectl apply -f {EXAMPLE.relative_to(ROOT)}")
        deployment = Deployment.read(EXAMPLE)
        objects = yaml.safe_load(deployment.parameters["objects"])
        pods = deployment.scale_up(self._stand.kube)
        self._teller.tell(
            f"SecretProviderClass {deployment.class_name}: Vault role {deployment.parameters['roleName']},",
            *(f"  {wanted['objectName']:12} {wanted['secretPath']} -> {wanted['secretKey']}" for wanted in objects),
            f"Deployment {deployment.name}: {deployment.replicas} pods of service account {deployment.service_account}",
            *(f"  {pod.name}" for pod in pods),
        )
        return pods, deployment

    def _mount(self, driver: Driver, deployment: Deployment, pods: Sequence[Pod]) -> list[MountOutcome]:
        self._teller.chapter("Kubelet mounts each pod's volume, through the CSI driver, from the provider")
        mounted = []
        for pod in pods:
            target = self._directory / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / "secrets-store" / "mount"
            outcome = driver.mount(
                pod,
                deployment.parameters,
                tokens=self._stand.tokens(pod),
                target_path=target,
                class_name=deployment.class_name,
            )
            mounted.append(outcome)
            self._teller.tell(f"{pod.name}  (in the container: {deployment.mount_path})", *tree(outcome))
        self._teller.tell(
            "Names are links through ..data, which a later mount swaps at once. Versions are HMACs: they tell",
            "that a file changed, and nothing of what is in it.",
        )
        return mounted

    def _log_in(self, mounted: Sequence[MountOutcome]) -> None:
        self._teller.chapter("Each pod logs in to PostgreSQL with the files in its volume")
        for outcome in mounted:
            user, rows = self._select(outcome)
            self._teller.tell(
                f"user {user}",
                f"  its password of {len(outcome.text('db-password'))} characters is right; SELECT gives {rows}",
            )
        _check(len({outcome.text("db-username") for outcome in mounted}) == len(mounted), "two pods share a user")

    def _rotate(self, driver: Driver, mounted: Sequence[MountOutcome]) -> list[MountOutcome]:
        self._teller.chapter("The API key is rotated in OpenBao; a minute later kubelet mounts again")
        self._stand.rotate_api_key(NEW_API_KEY)
        again = self._remount(driver, mounted)
        old, new = mounted[0], again[0]
        for name in sorted(new.versions):
            before, after = old.versions[name][:12], new.versions[name][:12]
            changed = f"{before} -> {after}" if before != after else f"{after}, as before"
            self._teller.tell(f"{name:12} version {changed}")
        _check(new.text("api-key") == NEW_API_KEY, "the rotated key did not arrive")
        _check(old.versions["api-key"] != new.versions["api-key"], "the rotated key kept its version")
        self._unchanged(mounted, again)
        self._teller.tell(
            "The key is new. The database credential is the same: the provider keeps it alive, and does not",
            f"make a user for every mount. Users that PostgreSQL has for these pods: {len(self._users())}.",
        )
        return again

    def _crash(self, driver: Driver, mounted: Sequence[MountOutcome]) -> None:
        self._teller.chapter(f"kill -9 {self._provider.pid}: the provider crashes, and is started again")
        logins = self._stand.openbao.token_accessors()
        self._provider.kill()
        self._select(mounted[0])
        self._teller.tell("While it is away: the pod's database login goes on working.")
        self._provider.start()
        again = self._remount(driver, mounted)
        self._unchanged(mounted, again)
        fresh = self._stand.openbao.token_accessors() - logins
        _check(not fresh, f"the new process logged in {len(fresh)} times")
        self._teller.tell(
            f"Back as process {self._provider.pid}, after the next mounts: the same files, the same database users,",
            "no new login to OpenBao. Sessions are sealed in --state-dir, which lives in memory on a node.",
        )

    def _delete(self, deployment: Deployment, pods: Sequence[Pod]) -> None:
        self._teller.chapter(f"kubectl -n {deployment.namespace} delete deployment {deployment.name}")
        held = self._counts()
        for pod in pods:
            self._stand.kube.remove_pod(pod)
        _await(lambda: not self._users(), "the users of pods that are gone are still in PostgreSQL")
        _await(lambda: self._counts() == (0, 0, 0), "tokens or leases of pods that are gone are still in OpenBao")
        self._teller.tell(
            "Nobody tells a provider that a pod is gone. It looks every --sweep-interval, and revokes:",
            *(f"  {what:22} before {count}, now 0" for what, count in zip(HELD, held, strict=True)),
        )

    def _explain(self, driver: Driver, deployment: Deployment) -> None:
        self._teller.chapter("A new pod comes, with a wrong path in its class. kubectl describe pod says")
        (pod,) = dataclasses.replace(deployment, name="ecommerce-reports", replicas=1).scale_up(self._stand.kube)
        wrong = [{"objectName": "api-key", "secretPath": "ecommerce/shared/config", "secretKey": "api_key"}]
        parameters = {**deployment.parameters, "objects": yaml.safe_dump(wrong)}
        target = self._directory / "pods" / pod.uid / "mount"
        try:
            driver.mount(
                pod, parameters, tokens=self._stand.tokens(pod), target_path=target, class_name="reports-secrets"
            )
        except grpc.RpcError as error:
            self._teller.tell(*_wrapped(f"{error.code().name}: {error.details()}", 96))
        else:
            raise DemoFailed("a wrong path was mounted")

    def _remount(self, driver: Driver, mounted: Sequence[MountOutcome]) -> list[MountOutcome]:
        return [driver.remount(outcome, tokens=self._stand.tokens(outcome.pod)) for outcome in mounted]

    def _unchanged(self, mounted: Sequence[MountOutcome], again: Sequence[MountOutcome]) -> None:
        """The database credentials are those of before, and there are no others."""
        for before, after in zip(mounted, again, strict=True):
            for name in ("db-username", "db-password"):
                _check(before.files[name] == after.files[name], f"{name} of {after.pod.name} changed")
                _check(before.versions[name] == after.versions[name], f"the version of {name} changed")
            self._select(after)
        _check(len(self._users()) == len(mounted), f"PostgreSQL has {len(self._users())} users for these pods")

    def _select(self, outcome: MountOutcome) -> tuple[str, str]:
        """What the application does: log in with the files, and read. The user, and what it read."""
        user, password = outcome.text("db-username"), outcome.text("db-password")
        rows = self._stand.postgres.query("SELECT name FROM products ORDER BY id", user=user, password=password)
        _check(bool(rows), "the table is empty")
        return user, ", ".join(name for (name,) in rows)

    def _users(self) -> list[str]:
        """The users that OpenBao made."""
        return self._stand.postgres.users("v-%")

    def _counts(self) -> tuple[int, int, int]:
        """Tokens but root's, leases, and users."""
        tokens = len(self._stand.openbao.token_accessors()) - 1
        return tokens, len(self._stand.openbao.leases("database/creds/ecommerce-readonly")), len(self._users())


def tree(outcome: MountOutcome) -> Iterator[str]:
    """A volume's directory in lines: links, modes, sizes and versions, and no contents."""
    names = sorted(outcome.files)
    for name in names:
        path = outcome.target / name
        mode = stat.filemode(path.stat().st_mode)
        shown = f"{name} -> {os.readlink(path)}"
        yield f"  {shown:34} {mode}  {path.stat().st_size:3} bytes  version {outcome.versions[name][:12]}"
    yield f"  ..data -> {os.readlink(outcome.target / '..data')}"


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise DemoFailed inside when it is not left in time; main thread only."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise DemoFailed(f"it is not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoFailed(otherwise)


def _await(condition: Callable[[], bool], otherwise: str, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        _check(time.monotonic() < until, otherwise)
        time.sleep(0.1)


def _random(length: int) -> str:
    return "".join(secrets.choice(_SUFFIX_LETTERS) for _ in range(length))


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` characters; a longer word stands alone."""
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    yield line


def run(out: TextIO) -> None:
    """Build everything, play, and stop everything. Raises DemoFailed, StandError and what the parts raise."""
    teller = Teller(out)
    if sys.platform != "linux":
        raise DemoFailed("the provider runs on Linux nodes, and so does its demo")
    find_binary()  # What is missing is said before anything is started.
    teller.say("Secrets from OpenBao to a pod's files, and back to nothing. No cluster is needed.")
    with contextlib.ExitStack() as parts:
        parts.enter_context(_time_limit(LIMIT_SECONDS))
        directory = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="demo-")))
        teller.chapter("The surroundings start")
        stand = parts.enter_context(EcommerceStand())
        teller.tell(
            f"PostgreSQL      127.0.0.1:{stand.postgres.port}: a shop's database",
            f"OpenBao         {stand.openbao.address}: its API key, and the right to make database users",
            f"Kubernetes API  {stand.kube.url}: a stand-in",
        )
        provider = parts.enter_context(Provider(directory, stand.kube, stand.openbao.address, stand.pod.node))
        teller.tell(f"the provider    process {provider.pid}, at {provider.socket}", "  vault-csi-provider")
        teller.tell(*(f"    {flag}" for flag in provider.flags))
        Demo(teller, stand, provider, directory).play()
        teller.chapter("The provider is told to stop, and all the rest with it")
        status = provider.stop()
        _check(status == 0, f"the provider's exit status is {status}")
        teller.tell("Its exit status is 0. Nothing is left running, and no file either.")
    teller.chapter("What to try next")
    teller.tell(
        "make test                  everything that has to hold, on the same servers",
        "README.md                  into your cluster: the driver, the provider, your first class",
        "deploy/examples/           classes for KV, databases, certificates and synced Secrets",
        "tests/demo.py              this story as a program: change the class in the example, and run it again",
    )


def main() -> int:
    """Run the demo on stdout and return its exit code: 0, 1 when it fails, 130 after Ctrl-C."""
    try:
        run(sys.stdout)
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.", file=sys.stderr)
        return 130
    except grpc.RpcError as error:
        failure = f"the provider refused a mount: {error.code().name}: {error.details()}"
    except (DemoFailed, DriverError, OpenBaoError, StandError, psycopg.Error, OSError) as error:
        failure = str(error)
    else:
        return 0
    print(f"\nThe demo stops: {failure}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
