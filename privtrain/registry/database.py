"""Access to the registry's database: URL, schema, pseudonym key, and retries while a server is unreachable.

SQLite, for one machine: a file in rollback-journal mode (write-ahead logging fails on network file systems), written in
``BEGIN IMMEDIATE`` transactions. PostgreSQL, for many: any URL that SQLAlchemy takes. A password in the URL is used and
never shown. The key behind the pseudonyms lies in a file outside the database (see :func:`key_path`).

Beside the key lies the *seen file* (:mod:`.seen`): how many changes of the registry this machine saw. A database that
shows fewer is an older copy, such as a restored backup, and is refused.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.pool import NullPool

from privtrain.config.publishing import RegistrySection
from privtrain.errors import GuaranteeLost, PrivtrainError, RegistryUnreachable
from privtrain.files.atomic import sync_directory, temporary_of
from privtrain.files.private import check_database_file, locked_file, make_missing
from privtrain.privacy.secret import KEY_BYTES, SecretKey, load_key_file
from privtrain.registry.seen import Extent, SeenFile, extent_of
from privtrain.registry.tables import Meta

URL_VARIABLE = "PRIVTRAIN_REGISTRY"
KEY_VARIABLE = "PRIVTRAIN_REGISTRY_KEY"

_MIGRATIONS = pathlib.Path(__file__).parent / "migrations"
_SQLITE_BUSY_SECONDS = 30
_CONNECT_TIMEOUT_SECONDS = 10
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 10.0
#: Two upgrades of one PostgreSQL database take turns on this lock. An arbitrary constant.
_UPGRADE_LOCK = 0x70726976
#: What a retry cannot mend.
_HOPELESS = (
    *("authentication failed", "does not exist", "no password supplied", "permission denied"),
    *("no such table", "unable to open", "readonly", "read-only transaction", "not a database"),
)

T = TypeVar("T")


def registry_url(section: RegistrySection) -> str | None:
    """Return the URL: ``PRIVTRAIN_REGISTRY``, else ``registry.url``, else a default if a data set is named.

    Returns:
        ``None`` if neither is set and ``registry.dataset`` is not either: then the run uses no registry.
    """
    given = os.environ.get(URL_VARIABLE) or section.url
    if given:
        return given
    return None if section.dataset is None else default_url()


def default_url() -> str:
    """Return a SQLite file in the user's data directory."""
    return f"sqlite:///{_data_directory() / 'registry.db'}"


def seen_path(url: sa.URL) -> pathlib.Path:
    """Return the seen file: beside the key, or in the data directory where ``PRIVTRAIN_REGISTRY_KEY`` names the key.

    The latter holds the numbers of several registries, and so does the one beside PostgreSQL's default key.
    """
    if KEY_VARIABLE in os.environ:
        return _data_directory() / "registries.seen"
    path = key_path(url)
    return path.with_name(f"{path.name}.seen")


def key_path(url: sa.URL) -> pathlib.Path:
    """Return the key file: ``PRIVTRAIN_REGISTRY_KEY``, else beside the SQLite file or in the data directory.

    Every machine that trains with the registry needs the same file; keep it out of the database's backups.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return pathlib.Path(given)
    file = _sqlite_file(url)
    return _data_directory() / "registry.key" if file is None else file.with_name(f"{file.name}.key")


class Database:
    """An engine that retries, with the registry's schema checked.

    Args:
        url: SQLAlchemy URL, or the path of a SQLite file.
        retry_seconds: how long an unreachable server is waited for.
        read_only: refuse every write, at the database.

    Attributes:
        url: the parsed URL, password included.
        seen: this machine's seen file, which an older copy of the database is found by.
    """

    def __init__(self, url: str, *, retry_seconds: float = 60.0, read_only: bool = False) -> None:
        self.url = _parse(url)
        self._retry_seconds = retry_seconds
        self._read_only = read_only
        self._file = _sqlite_file(self.url)
        # No connection outlives its transaction: jobs run for days, and a server has a hundred connections for all.
        self._engine = sa.create_engine(self.url, connect_args=self._connect_arguments(), poolclass=NullPool)
        if self._file is not None:
            event.listen(self._engine, "connect", self._prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._key: SecretKey | None = None
        self._is_key_checked = False
        # A SQLite file with its key beside it has a seen file of its own there. Registries on PostgreSQL share the one
        # beside their common default key, and all whose key the environment names share another: see seen_path.
        is_for_one_registry = self._file is not None and KEY_VARIABLE not in os.environ
        self.seen = SeenFile(seen_path(self.url), self.shown, is_for_one_registry=is_for_one_registry)

    @property
    def shown(self) -> str:
        """The URL without its password and options."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    def prepare(self) -> None:
        """Make a SQLite registry that does not exist yet, and check the schema.

        Raises:
            PrivtrainError: if the database holds another schema, or none, or its file is open to other users.
            GuaranteeLost: if it is older than this machine knows it, or a file that was used is gone.
            RegistryUnreachable: if no server answers.
        """
        self.check_form()
        known = self.seen.known()
        extent = self.read(extent_of)  # how many changes the database holds now, see .seen
        self.seen.check(known, extent)
        if not self._read_only:
            self.seen.note(extent)

    def check_form(self) -> None:
        """Do what :meth:`prepare` does, but do not ask whether the registry is older than this machine saw it."""
        if self._file is not None and not self._file.exists():
            if self._read_only:
                raise PrivtrainError(f"no registry at {self._file}; make one: privtrain registry init")
            self.upgrade()
        if self._file is not None:
            check_database_file(self._file)
        from alembic.script import ScriptDirectory

        newest = ScriptDirectory.from_config(_alembic_config(None)).get_current_head()
        revision = self.read(_schema_revision)
        if revision is None:
            raise PrivtrainError(f"{self.shown} holds no registry; run: privtrain registry init")
        if revision != newest:
            raise PrivtrainError(
                f"{self.shown} holds a registry of schema {revision}, this version needs {newest}; run: privtrain "
                "registry upgrade"
            )

    def upgrade(self) -> None:
        """Bring the schema to this version; on an empty database, make it. Whole or not at all."""
        if self._file is None:
            self._ensure_key()
            self._retry(self._migrate, write=True)
            return
        make_missing(self._file.parent)
        with locked_file(self._file.with_name(f".{self._file.name}.lock")):
            exists = self._file.exists()
            # A database without tables has forgotten as much as one that is gone.
            is_gone = not exists or self.read(_schema_revision) is None
            # Only a file of what this machine saw that is kept for this registry alone can tell that it is gone.
            if is_gone and KEY_VARIABLE not in os.environ and self.seen.known():
                raise GuaranteeLost(
                    f"the registry {self._file} is gone, and with it what was spent; restore it. If it is lost: remove "
                    f"{self.seen.path} and begin a new one, which knows of no run before"
                )
            self._ensure_key()
            if exists:
                self._retry(self._migrate, write=True)
                return
            # Made under another name and renamed, so that a crash leaves no half-made database.
            temporary = temporary_of(self._file)
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            fresh = Database(f"sqlite:///{temporary}")
            fresh._key = self.key(check=False)
            fresh._retry(fresh._migrate, write=True)
            os.replace(temporary, self._file)
            sync_directory(self._file.parent)

    def key(self, *, check: bool = True) -> SecretKey:
        """Return the key that the registry's pseudonyms are made with, from its file.

        Args:
            check: compare it with the registry's record of its key; not possible before there is one.

        Raises:
            GuaranteeLost: if it is missing, or is not the one that this registry's pseudonyms were made with: then
                nobody who opted out would be recognised.
        """
        if self._key is None:
            path = key_path(self.url)
            # A file that the environment names may be a link, or root's, as a mounted secret is. The default must be
            # this user's own file.
            is_named = KEY_VARIABLE in os.environ
            try:
                key = load_key_file(path.resolve(), owners={os.geteuid(), 0}) if is_named else load_key_file(path)
            except (OSError, GuaranteeLost):
                raise GuaranteeLost(
                    f"the registry's key {path} is missing or damaged; restore it, or set {KEY_VARIABLE} to its file"
                ) from None
            self._key = key
        if check and not self._is_key_checked:
            known = self.read(lambda connection: connection.execute(sa.select(Meta.key_check)).scalar_one())
            if known != _key_check(self._key):
                raise GuaranteeLost(
                    f"{key_path(self.url)} is not the key of {self.shown}: who opted out would not be recognised. "
                    f"Set {KEY_VARIABLE} to the key file that the registry was made with"
                )
            self._is_key_checked = True
        return self._key

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run a query, with retries while the database cannot be reached."""
        return self._retry(work, write=False)

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run one transaction, whole or not at all, and return what ``work`` returns.

        A connection may break after the server committed and before it said so; then ``work`` runs again. So it must
        change nothing more the second time.

        Raises:
            GuaranteeLost: if the registry is older than this machine knows it; nothing is changed then.
        """

        def guarded(connection: sa.Connection) -> tuple[T, Extent]:
            known = self.seen.known()  # read first: the database may meanwhile go on, but never fall behind this
            self.seen.check(known, extent_of(connection))
            return work(connection), extent_of(connection)

        result, extent = self._retry(guarded, write=True)
        self.seen.note(extent)
        return result

    def _retry(self, work: Callable[[sa.Connection], T], *, write: bool) -> T:
        """Run ``work`` in a transaction; repeat while no server answers, with growing pauses, up to a deadline.

        Raises:
            RegistryUnreachable: at the deadline, or at once if no retry can help.
        """
        deadline = time.monotonic() + self._retry_seconds
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                with self._engine.connect() as plain:
                    connection = plain.execution_options(registry_write=write)
                    with connection.begin():
                        return work(connection)
            except (exc.OperationalError, exc.InterfaceError, exc.InternalError) as error:
                reason = self._reason(error)
                if any(text in reason for text in _HOPELESS) or time.monotonic() + wait > deadline:
                    raise RegistryUnreachable(
                        f"cannot reach the registry {self.shown}: {reason.rstrip('.?')}. "
                        "Nothing was reserved by this call; start the server or mend the URL, then run the same command"
                    ) from None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _reason(self, error: exc.DBAPIError) -> str:
        """Return the driver's message without passwords and options of the URL."""
        text = " ".join(str(error.orig).split())
        for secret in (self.url.password, *self.url.query.values()):
            if secret:
                text = text.replace(str(secret), "***")
        return text

    def _connect_arguments(self) -> dict[str, object]:
        """Return the database driver's own arguments: of ``sqlite3.connect`` or of psycopg."""
        if self._file is not None:
            return {"timeout": _SQLITE_BUSY_SECONDS}
        options = "-c default_transaction_read_only=on" if self._read_only else ""
        return {"connect_timeout": _CONNECT_TIMEOUT_SECONDS, "application_name": "privtrain", "options": options}

    def _prepare_sqlite(self, connection: sqlite3.Connection, record: object) -> None:  # noqa: ARG002
        """Set up a new connection; called by SQLAlchemy."""
        # The driver's own transaction handling would commit before a schema change; see _begin_sqlite.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = EXTRA")
        if self._read_only:
            connection.execute("PRAGMA query_only = ON")

    def _ensure_key(self) -> None:
        """Make the pseudonym key if there is none; of two processes that do so at once, the first one's stays."""
        path = key_path(self.url)
        if path.exists():
            return
        make_missing(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)  # of a crash, or a link that somebody put there
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(os.urandom(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # somebody else's key came first
            os.link(temporary, path)
        temporary.unlink()
        sync_directory(path.parent)

    def _migrate(self, connection: sa.Connection) -> None:
        """Upgrade the schema; on a new registry also note its id and the check of its key."""
        from alembic import command

        if self._file is None:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
        command.upgrade(_alembic_config(connection), "head")
        if connection.execute(sa.select(sa.func.count()).select_from(Meta)).scalar_one() == 0:
            check = _key_check(self.key(check=False))
            connection.execute(sa.insert(Meta).values(id=1, key_check=check, uid=secrets.token_hex(16), num_opt_outs=0))


def _schema_revision(connection: sa.Connection) -> str | None:
    """Return the id of the database's newest migration; ``None`` if it holds no registry."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _key_check(key: SecretKey) -> str:
    return key.derive("registry-key-check").hex()[:32]


def _alembic_config(connection: sa.Connection | None):
    """Return the configuration of the migrations; they run on ``connection``, which may be absent to look at them."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))  # an ini file, where % has a meaning
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _parse(url: str) -> sa.URL:
    """Return the URL of a database that the registry can run on; a path is a SQLite file."""
    text = url if "://" in url else f"sqlite:///{pathlib.Path(url).absolute()}"
    try:
        parsed = sa.make_url(text)
    except exc.ArgumentError:
        raise PrivtrainError(f"{URL_VARIABLE} or registry.url is not a database URL (its value is not shown)") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise PrivtrainError(f"the registry runs on sqlite:///FILE or postgresql://..., not on {parsed.drivername}")
    if parsed.drivername == "sqlite" and not parsed.database:
        raise PrivtrainError("a SQLite registry needs a file: sqlite:////absolute/path/registry.db")
    if parsed.drivername != "sqlite":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise PrivtrainError("a registry on PostgreSQL needs: pip install 'privtrain[registry]'") from None
    return parsed


def _sqlite_file(url: sa.URL) -> pathlib.Path | None:
    return pathlib.Path(url.database or "").absolute() if url.drivername == "sqlite" else None


def _data_directory() -> pathlib.Path:
    given = os.environ.get("XDG_DATA_HOME")
    base = pathlib.Path(given) if given else pathlib.Path.home() / ".local" / "share"
    return base / "privtrain"


def _begin_sqlite(connection: sa.Connection) -> None:
    """Begin a transaction; called by SQLAlchemy."""
    write = connection.get_execution_options().get("registry_write", False)
    # A write lock from the start: a transaction that reads first and writes later could not wait for another's lock.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
