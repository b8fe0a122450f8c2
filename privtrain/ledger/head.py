"""The head file: the number of records and the last hash, kept beside the log so that truncation is detected.

A hash chain shows any change but its own shortening. After each record the number of records and the hash of the last
one (the log's *head*) go into the older of two *slots* of 128 bytes, which are overwritten in place: no rename, and a
torn write spoils one slot only. So one slot holds the last record's, the other the one's before. The record is on disk
before its slot is written, so the file is never ahead of an undamaged log and at most one behind.
Whoever can rewrite this file and the log together can still shorten both; the anchors against that are outside
``secret/``: the head in ``privacy.json`` and the model card, and any head that was noted elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Iterator

from privtrain.errors import LedgerCorrupt, RunBusy
from privtrain.files.atomic import sync_directory
from privtrain.files.private import open_private_file
from privtrain.ledger.chain import GENESIS, LedgerState

_SLOT_BYTES = 128

#: (number of records, hash of the last one), or ``None`` for a slot that is no such thing.
Slot = tuple[int, str] | None


def head_path(log: pathlib.Path) -> pathlib.Path:
    """Return where the head file of a log is."""
    return log.with_suffix(".head")


class HeadFile:
    """The head file of an open log, locked for its one writer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, num_records: int, head: str) -> None:
        """Store the log's number of records and the hash of the last one."""
        slot = _encode(num_records, head)
        if os.pwrite(self._descriptor, slot, (num_records % 2) * _SLOT_BYTES) != len(slot):
            raise OSError("a short write to the ledger's head file")
        os.fsync(self._descriptor)


@contextlib.contextmanager
def opened_head(log: pathlib.Path) -> Iterator[HeadFile]:
    """Lock the head file of a log, and so the log, for writing; create it for a new log.

    Raises:
        RunBusy: if another process writes this log.
        UnsafePath: if the head file is a link, another user's or has a second name.
    """
    path = head_path(log)
    if not path.exists() and log.exists():
        raise LedgerCorrupt(f"{path} is gone, so records cut off the end of {log} would not be missed; restore it")
    descriptor = open_private_file(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock(descriptor, log)
        if not log.exists() and os.fstat(descriptor).st_size < 2 * _SLOT_BYTES:  # new, or a crash while it was made
            os.pwrite(descriptor, _encode(0, GENESIS) * 2, 0)
            os.fsync(descriptor)
            sync_directory(path.parent)
        yield HeadFile(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, log: pathlib.Path) -> None:
    """Lock the head file for this process; do without a lock on a file system that has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunBusy(f"another process writes {log}; wait for it") from None
    except OSError as error:
        # Lustre without the mount option "flock". Writes still notice a second writer by the size of the file.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def check_head(log: pathlib.Path, state: LedgerState, end: int) -> int:
    """Compare the log with its head file.

    Returns:
        By how many records the head file is behind: 0, or 1 after a crash.

    Raises:
        LedgerCorrupt: if records are missing at the end of the log, or the head file was altered.
    """
    path = head_path(log)
    content = _read(path, log)
    slots = [_decode(content[0]), _decode(content[1])]
    known = [slot for slot in slots if slot is not None]
    if not known:
        raise LedgerCorrupt(f"{path}: both slots are damaged; whether {log} lost its last records is unknown")
    num_records, head = max(known)
    if num_records > state.num_records:  # the head file is written after the log, so the log was longer
        raise LedgerCorrupt(
            f"{log}: ends after {state.num_records} records at byte {end}, but {num_records} were on disk: records "
            "were removed or damaged. Restore the log from a backup, or start a new run with another run.name"
        )
    lag = state.num_records - num_records
    heads = (state.head, *state.earlier_heads)  # of the last three records, the last first
    if lag > 1 or head != heads[lag]:
        raise LedgerCorrupt(f"{path}: byte {(num_records % 2) * _SLOT_BYTES}: not the head of {log}; it was replaced")
    other = (num_records + 1) % 2  # the slot of the record before
    earlier = (max(num_records - 1, 0), heads[lag + 1])  # what it must hold; a new head file holds 0 records twice
    # It may be half overwritten, if a crash came while it took the record by which the head file is behind.
    is_torn = lag == 1 and _is_torn(content[other], _encode(*earlier), _encode(state.num_records, state.head))
    if slots[other] != earlier and not is_torn:
        raise LedgerCorrupt(f"{path}: byte {other * _SLOT_BYTES}: a damaged slot")
    return lag


def _is_torn(content: bytes, old: bytes, new: bytes) -> bool:
    """Return whether every byte of ``content`` is that of ``old`` or of ``new``, as after an unfinished overwrite."""
    return all(byte in (a, b) for byte, a, b in zip(content, old, new, strict=True))


def _encode(num_records: int, head: str) -> bytes:
    """Return a slot: 20 decimal digits, the hash, and a checksum of both that fills the slot up."""
    content = f"{num_records:020d} {head} "
    check = hashlib.sha256(content.encode()).hexdigest()[: _SLOT_BYTES - len(content) - 1]
    return f"{content}{check}\n".encode()


def _read(path: pathlib.Path, log: pathlib.Path) -> list[bytes]:
    """Return the bytes of the two slots."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise LedgerCorrupt(f"{path} is gone, so records cut off the end of {log} would not be missed") from None
    if len(content) != 2 * _SLOT_BYTES:
        raise LedgerCorrupt(f"{path}: has {len(content)} bytes, not {2 * _SLOT_BYTES}; it was altered")
    return [content[:_SLOT_BYTES], content[_SLOT_BYTES:]]


def _decode(slot: bytes) -> Slot:
    """Return what a slot holds; ``None`` if its checksum does not hold."""
    try:
        count, head, _ = slot.decode("ascii").split(" ")
        decoded = int(count), head
    except ValueError:
        return None
    return decoded if _encode(*decoded) == slot else None
