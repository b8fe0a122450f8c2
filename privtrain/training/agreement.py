"""Stop all ranks where one finds a fault."""

from __future__ import annotations

from privtrain.backends import Backend
from privtrain.errors import SelfTestFailed


def agree_on_fault(fault: str, backend: Backend) -> None:
    """Raise on every rank if ``fault`` is not empty on any, which would otherwise wait for it until the time-out.

    Raises:
        SelfTestFailed: with this rank's fault, or a word about another's.
    """
    if backend.any_rank(bool(fault)) or fault:
        raise SelfTestFailed(fault or "another rank found a fault; see its message")
