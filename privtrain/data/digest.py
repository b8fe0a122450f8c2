"""The digest of a data set: over every kept record by owner, in canonical order, however the records are held."""

from __future__ import annotations

import hashlib


class RecordDigest:
    """SHA-256 over users in order, each with its records in reading order.

    Ids and records are preceded by their length, and a user is closed by a length that nothing has, so that no two data
    sets give the same bytes.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._is_open = False

    def user(self, identifier: bytes) -> None:
        """Begin a user: records that are added from now on are this user's."""
        self._end_user()
        self._is_open = True
        self.record(identifier)  # an id enters the digest as a record does

    def record(self, text: bytes) -> None:
        """Add a record of the current user."""
        self._sha.update(len(text).to_bytes(8, "little") + text)

    def hexdigest(self) -> str:
        """Return the digest of what was added; nothing may follow."""
        self._end_user()
        return self._sha.hexdigest()

    def _end_user(self) -> None:
        if self._is_open:
            self._sha.update(b"\xff" * 8)
        self._is_open = False
