"""Private directories and keys: what is checked of them before every use, and how they are made and opened.

Somebody who comes first can leave a link, a directory of their own or a key that they know where a run will look. So a
private directory is never a link, belongs to this process's user and is closed to all others (0700); a key is a regular
file of that user with one name, closed to all others (0600) and of the right size, and is opened without following a
link. Nothing is mended in silence: what lay open may have been copied. Each error says which check failed.

Checks come before use, and another process of the same user, or root, can change what was checked: both are trusted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import stat
from collections.abc import Collection, Iterator

from privtrain.errors import RunBusy, UnsafePath

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private_directory(path: pathlib.Path) -> None:
    """Make a directory and whatever parents are missing, each 0700; check the directory, whoever made it.

    Raises:
        UnsafePath: as :func:`check_private_directory`.
    """
    make_missing(path)
    check_private_directory(path)


def make_public_directory(path: pathlib.Path) -> None:
    """Make a directory that others may read but not write; check it, whoever made it.

    Raises:
        UnsafePath: if it is a link or no directory, another user's, or others may write there.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise UnsafePath(f"{path} is a link or no directory; what is written there would go elsewhere. Remove it")
    check_directory_around(path)


def make_missing(path: pathlib.Path) -> None:
    """Make a directory and whatever parents are missing, each readable by its owner alone; what is there is kept."""
    # mkdir(parents=True) would give the parents the default mode, not this one.
    for directory in [*reversed(path.parents), path]:
        if not os.path.lexists(directory):
            directory.mkdir(mode=0o700, exist_ok=True)


def check_private_directory(path: pathlib.Path) -> None:
    """Raise unless a directory is no link, belongs to this process's user and is closed to all others.

    Raises:
        UnsafePath: saying which of these it is not, and what to do.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise UnsafePath(f"{path} is a link, which can lead anywhere; put the directory itself there")
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafePath(f"{path} is not a directory; remove it, or choose another place")
    _check_owner(path, status)
    if status.st_mode & _OTHERS:
        raise UnsafePath(
            f"{path} can be read by other users of this machine (mode {stat.S_IMODE(status.st_mode):04o}), who may "
            f"have copied or planted what is in it. If you are sure that nobody did: chmod 700 {path}; if not, choose "
            "another place (for a run: another run.name). On a file system that keeps no modes, choose another one"
        )


def check_private_tree(path: pathlib.Path) -> list[pathlib.Path]:
    """Check a private directory, and that nothing below is a link, another user's, or neither file nor directory.

    Returns:
        Files and directories below whose own permissions let others in; they are closed now. Nobody could reach them,
        since the directory above them was closed.

    Raises:
        UnsafePath: naming the first that is not as it must be.
    """
    check_private_directory(path)
    tightened = []
    for child in sorted(path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # another job may be at work here; it is refused later
            status = child.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise UnsafePath(f"{child} is a link, which can lead anywhere; put what it leads to in its place")
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise UnsafePath(f"{child} is neither a file nor a directory; remove it")
            _check_owner(child, status)
            if status.st_mode & _OTHERS:
                child.chmod(stat.S_IMODE(status.st_mode) & stat.S_IRWXU)
                tightened.append(child)
    return tightened


def check_directory_around(path: pathlib.Path) -> None:
    """Raise if other users of this machine could put something into a directory, or in place of what lies there.

    Others may read it. A sticky bit does not help: it keeps others from removing, not from adding.

    Raises:
        UnsafePath: if it, or a link in its place, is another user's (but for root's), or others may write there.
    """
    # First of the link itself, if it is one, then of the directory that it leads to.
    _check_owner(path, path.lstat(), (os.geteuid(), 0))
    status = path.stat()
    _check_owner(path, status, (os.geteuid(), 0))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafePath(
            f"{path} can be written by other users of this machine (mode {stat.S_IMODE(status.st_mode):04o}), who "
            f"could put something else in place of what is in it; run: chmod go-w {path}"
        )


def check_database_file(path: pathlib.Path) -> None:
    """Raise unless a database file is this user's alone, in a directory where nobody else can put another in its place.

    Raises:
        UnsafePath: saying which of the two it is not, or that somebody else's journal lies beside it.
    """
    check_directory_around(path.parent)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePath(f"{path} is a link or no regular file; give the file itself")
    _check_owner(path, status)
    if status.st_mode & _OTHERS:
        raise UnsafePath(f"{path} can be read or changed by other users of this machine; run: chmod 600 {path}")
    # SQLite plays back a journal that it finds, so somebody else's would rewrite the registry.
    for suffix in ("-journal", "-wal", "-shm"):
        companion = path.with_name(f"{path.name}{suffix}")
        with contextlib.suppress(FileNotFoundError):
            beside = companion.lstat()
            if not stat.S_ISREG(beside.st_mode):
                raise UnsafePath(f"{companion} is a link or no regular file; remove it")
            _check_owner(companion, beside)


def check_empty(path: pathlib.Path, allowed: Collection[str]) -> None:
    """Raise unless a directory that is about to be used for the first time is empty.

    Args:
        path: the directory.
        allowed: names that it may hold all the same, which an earlier start that failed leaves behind.

    Raises:
        UnsafePath: naming what is in it.
    """
    names = sorted(child.name for child in path.iterdir() if child.name not in allowed)
    if names:
        raise UnsafePath(
            f"{path} belongs to a run that has not begun, but holds {', '.join(names[:5])}: whoever put it there may "
            "know it. Remove the directory, or set another run.name"
        )


def read_private_file(path: pathlib.Path, *, owners: Collection[int] | None = None) -> bytes:
    """Return the content of a private file, which was opened without following a link.

    Args:
        path: the file; its directory is the caller's to check.
        owners: users that it may belong to; this process's alone if not given.

    Raises:
        FileNotFoundError: if it is not there.
        UnsafePath: if it is a link or no regular file, is another user's, open to others, or has a second name.
    """
    # O_NONBLOCK: opening a pipe in its place would otherwise wait for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise UnsafePath(f"{path} is a link, which can lead anywhere; put the file itself there") from None
        if error.errno in (errno.EACCES, errno.ENXIO):
            why = os.strerror(error.errno)
            raise UnsafePath(f"{path} cannot be opened ({why}): it is another user's or no file") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafePath(f"{path} is no regular file; remove it")
        _check_owner(path, status, owners)
        if status.st_mode & _OTHERS:
            raise UnsafePath(
                f"{path} can be read by other users of this machine (mode {stat.S_IMODE(status.st_mode):04o}). If you "
                f"are sure that nobody did: chmod 600 {path}"
            )
        if status.st_nlink != 1:
            raise UnsafePath(f"{path} has {status.st_nlink} names (hard links), so it lies elsewhere too; copy it")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def open_private_file(path: pathlib.Path, flags: int) -> int:
    """Return a descriptor of a private file to be written, made if ``flags`` say so; it is 0600 from here on.

    Args:
        path: the file, in a private directory.
        flags: of ``os.open``, such as ``os.O_WRONLY | os.O_CREAT | os.O_APPEND``; do not truncate before it is checked.

    Raises:
        FileNotFoundError: if it is not there and not to be made.
        UnsafePath: if it is a link or no regular file, is another user's, or has a second name.
    """
    assert not flags & os.O_TRUNC
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise UnsafePath(f"{path} is a link or no regular file; restore the file itself") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafePath(f"{path} is no regular file; restore the file itself")
        _check_owner(path, status)
        if status.st_nlink != 1:
            raise UnsafePath(f"{path} has {status.st_nlink} names (hard links), so others may write it; copy it")
        os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_lock_file(path: pathlib.Path) -> int:
    """Return a descriptor of a lock file in a private directory, made if it is not there; no link is followed.

    Raises:
        UnsafePath: if it is a link.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise UnsafePath(f"{path} is a link or no regular file; remove it") from None
        raise


@contextlib.contextmanager
def locked_file(path: pathlib.Path, *, busy: str = "") -> Iterator[int]:
    """Hold the lock of a file while the block runs, and yield the file's descriptor; no link is followed.

    Args:
        path: the lock file, made if it is not there.
        busy: message of the error if another process holds the lock; if empty, wait for it instead.

    Raises:
        RunBusy: with ``busy``.
        UnsafePath: if it is a link.
    """
    descriptor = _open_lock_file(path)
    try:
        try:
            at_once = fcntl.LOCK_NB if busy else 0  # without the flag it waits for the lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | at_once)
        except BlockingIOError:
            raise RunBusy(busy) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _check_owner(path: pathlib.Path, status: os.stat_result, owners: Collection[int] | None = None) -> None:
    """Raise UnsafePath unless a file belongs to one of ``owners`` (user ids); by default to this process's user."""
    allowed = (os.geteuid(),) if owners is None else owners
    if status.st_uid not in allowed:
        raise UnsafePath(
            f"{path} belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}: its owner may know "
            "or change what is in it. Run as its owner, or choose another place (for a run: another run.output_dir or "
            "run.name). Network mounts that give files to a fixed user hold no private directory of another one"
        )
