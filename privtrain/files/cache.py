"""Where a user's caches lie."""

from __future__ import annotations

import os
import pathlib


def cache_directory() -> pathlib.Path:
    """Return ``$XDG_CACHE_HOME/privtrain``, by default ``~/.cache/privtrain``; it need not exist."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "privtrain"
