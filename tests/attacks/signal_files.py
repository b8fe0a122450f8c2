"""All signals of a file at once: tests compare documents, the analysis streams them."""

from __future__ import annotations

import pathlib

from attacks.signals import DocumentSignals, iterate_signals


def read_signals(path: pathlib.Path) -> list[DocumentSignals]:
    """Return the signals of every document, sorted by (side, user, document)."""
    return sorted(iterate_signals(path), key=lambda row: (row.side, row.user, row.document))
