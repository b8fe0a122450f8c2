"""A PostgreSQL server of the tests' own: Debian's binaries, a private socket, an unprivileged user, a password."""

from __future__ import annotations

import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import tempfile
import time

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

PASSWORD = "correct-horse-battery"


def binaries() -> pathlib.Path | None:
    """Where Debian keeps the newest server's programs."""
    found = sorted(
        pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parent.parent.name)
    )
    return found[-1].parent if found else None


def unprivileged() -> str | None:
    """The server refuses to run as root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


class PostgresServer:
    """Start, kill and restart."""

    def __init__(self) -> None:
        found = binaries()
        assert found is not None
        self._binaries = found
        self._user = unprivileged()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        (self.directory / "password").write_text(PASSWORD)
        if self._user is not None:
            for path in (self.directory, self.directory / "password"):
                shutil.chown(path, self._user)
        arguments = ["-D", f"{self.directory}/data", "-U", "privtrain", "--auth=scram-sha-256", "-E", "UTF8"]
        done = subprocess.run(
            [self._binaries / "initdb", *arguments, "--no-sync", f"--pwfile={self.directory}/password"],
            capture_output=True,
            text=True,
            user=self._user,
            cwd=self.directory,
        )
        assert done.returncode == 0, done.stderr
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://privtrain:{PASSWORD}@/{database}?host={self.directory}"

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._binaries / "postgres", "-D", f"{self.directory}/data", "-k", str(self.directory)),
                    *(
                        "-c",
                        "listen_addresses=",
                        "-c",
                        "shared_buffers=16MB",
                        "-c",
                        "max_connections=64",
                        "-c",
                        "fsync=off",
                    ),
                ],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self.directory,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._execute("SELECT 1")
                return
            except sa.exc.OperationalError:
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and all its backends."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # children that are not reaped yet still hold the shared memory
            try:
                os.killpg(self._process.pid, 0)
                time.sleep(0.02)
            except ProcessLookupError:
                break

    def new_database(self) -> str:
        """The URL of the database, emptied: one for all tests, since making one takes a second."""
        self._execute("DROP SCHEMA public CASCADE")
        self._execute("CREATE SCHEMA public")
        return self.url()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=60)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _execute(self, text: str) -> None:
        url = sa.make_url(self.url()).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(text))
