"""A real PostgreSQL from the `pgserver` wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psycopg

from tests.stand.process import Process, StandError, free_port

_START_TIMEOUT = 30.0
_PORT_ATTEMPTS = 3


class Postgres:
    """A PostgreSQL server on 127.0.0.1, used as a context manager; stopped and deleted at its end.

    It listens on TCP only and every login, the superuser's too, is checked by SCRAM-SHA-256: a password
    that OpenBao made up is proven by using it. As root, it runs under the user `nobody`, since PostgreSQL
    refuses root.
    """

    database = "postgres"
    superuser = "postgres"

    def __init__(self) -> None:
        self.superuser_password = secrets.token_urlsafe(16)
        self._directory = Path()
        self._port = 0
        self._owner = _unprivileged_owner()
        self._process: Process | None = None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._port

    def __enter__(self) -> Self:
        # Not TMPDIR where that is a private directory: `nobody` could not come in.
        base = Path(tempfile.gettempdir())
        self._directory = Path(tempfile.mkdtemp(prefix="stand-pg-", dir=base if self._reachable(base) else "/tmp"))
        try:
            if self._owner is not None:
                os.chown(self._directory, *self._owner)
            self._bin = self._find_bin()
            self._initialise()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # Not kill, although nothing is to be kept: the server collects its children, which would stay
            # as zombies in a container whose init does not.
            self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def stop(self) -> None:
        """Shut down at once, ending open sessions; `start` continues with the same data and port."""
        assert self._process is not None
        self._process.stop()

    def start(self) -> None:
        """Start again after `stop`."""
        self._launch()

    def query(
        self,
        sql: str,
        parameters: Sequence[object] = (),
        *,
        user: str | None = None,
        password: str | None = None,
    ) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser or as `user`; returns its rows, none for a command.

        Raises psycopg.Error as PostgreSQL words it.
        """
        with self._connect(user, password) as connection:
            cursor = connection.execute(sql.encode(), parameters or None)
            return cursor.fetchall() if cursor.description is not None else []

    def can_login(self, user: str, password: str) -> bool:
        """Whether the server lets `user` in with `password`; raises psycopg.Error when it cannot be asked."""
        try:
            self._connect(user, password).close()
        except psycopg.OperationalError as error:
            refusals = (
                "authentication failed",
                "not permitted to log in",
                f'role "{user}" does not exist',  # Dropped while it was logging in.
                "no password supplied",  # libpq's own words, for an empty one.
            )
            if any(refusal in str(error) for refusal in refusals):
                return False
            raise
        return True

    def users(self, like: str = "%", *, valid: bool = False) -> list[str]:
        """The names of the login roles that match the SQL pattern; ``valid`` leaves out those whose time is over."""
        rows = self.query(
            "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname LIKE %s "
            "AND (NOT %s OR coalesce(rolvaliduntil > now(), true)) ORDER BY 1",
            (like, valid),
        )
        return [name for (name,) in rows]

    def _connect(self, user: str | None, password: str | None) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host="127.0.0.1",
            port=self._port,
            dbname=self.database,
            user=self.superuser if user is None else user,
            password=self.superuser_password if user is None else password,
            sslmode="disable",
            gssencmode="disable",
            connect_timeout=10,
            autocommit=True,
        )

    def _initialise(self) -> None:
        password_file = self._directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.superuser_password)
        if self._owner is not None:
            os.chown(password_file, *self._owner)
        process = Process(
            [
                str(self._bin / "initdb"),
                f"--pgdata={self._directory / 'data'}",
                f"--username={self.superuser}",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            log=self._directory / "initdb.log",
            cwd=self._directory,
            owner=self._owner,
        )
        status = process.wait(_START_TIMEOUT)
        if status != 0:
            process.kill()
            raise StandError(f"PostgreSQL's initdb failed ({status}):\n{process.log_tail()}")
        password_file.unlink()

    def _start(self) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._port = free_port()
            try:
                self._launch()
                return
            except StandError as error:
                if "Address already in use" not in str(error) or attempt == _PORT_ATTEMPTS:
                    raise

    def _launch(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self._port,
            "unix_socket_directories": "",
            "password_encryption": "scram-sha-256",
            "max_connections": 100,
            "shared_buffers": "16MB",
            # Data that is thrown away needs no durability.
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = process = Process(
            [str(self._bin / "postgres"), "-D", str(self._directory / "data"), *options],
            log=self._directory / "server.log",
            cwd=self._directory,
            owner=self._owner,
            stop_signal=signal.SIGINT,  # PostgreSQL's "fast" shutdown; SIGTERM would wait for its clients.
        )
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            if not process.running:
                raise StandError(f"PostgreSQL ended at its start:\n{process.log_tail()}")
            try:
                # With the password, which shows that it is our server on that port.
                self._connect(None, None).close()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise StandError(f"PostgreSQL is not ready after {_START_TIMEOUT:.0f} s: {error}") from error
            time.sleep(0.02)

    def _find_bin(self) -> Path:
        """The directory of the server's programs, copied where `nobody` may not reach the installed one."""
        # Found, not imported: the package's own start-up creates lock files and a system user.
        spec = importlib.util.find_spec("pgserver")
        if spec is None or spec.origin is None:
            raise StandError("PostgreSQL is missing: `pip install pgserver` brings it (a real server in a wheel)")
        package = Path(spec.origin).parent
        if self._reachable(package / "pginstall" / "bin" / "postgres"):
            return package / "pginstall" / "bin"
        # Both, side by side: the programs look for their libraries by a relative path.
        shutil.copytree(package / "pginstall", self._directory / "pgserver" / "pginstall", symlinks=True)
        libraries = package.parent / "pgserver.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, self._directory / libraries.name)
        for copied in self._directory.iterdir():
            for path in (copied, *copied.rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o755)
        return self._directory / "pgserver" / "pginstall" / "bin"

    def _reachable(self, path: Path) -> bool:
        """Whether the server's user can come to `path` (nothing to ask when it is ours)."""
        if self._owner is None:
            return True
        resolved = path.resolve()
        return all(step.stat().st_mode & stat.S_IXOTH for step in (resolved, *resolved.parents))


def _unprivileged_owner() -> tuple[int, int] | None:
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid
