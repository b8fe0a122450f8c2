"""The digest of a data set: over every kept record by owner, in canonical order, however the records are held."""

from __future__ import annotations

import hashlib


class RecordDigest:
    """SHA-256 over users in order, each with its records in reading order."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._is_open = False

    def user(self, identifier: bytes) -> None:
        """Begin a user; the one before is over."""
        self._end_user()
        self._is_open = True
        self.record(identifier)

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
