"""Whether a directory could be made at a place, seen before anything is computed that would be lost."""

from __future__ import annotations

import os
import pathlib


def why_unwritable(directory: pathlib.Path) -> str:
    """Return why this user could not make or write into a directory; empty if nothing speaks against it."""
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a directory; choose another place"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"this user may not write into {place}; choose another place, or mend its permissions"
    return ""
