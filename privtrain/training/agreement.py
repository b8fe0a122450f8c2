"""Stop all ranks where one finds a fault."""

from __future__ import annotations

from privtrain.backends import Backend
from privtrain.errors import SelfTestFailed


def agree_on_fault(fault: str, backend: Backend) -> None:
    """Raise on every rank if any rank found a fault. Every rank calls it: else the others would wait until a time-out.

    Args:
        fault: what this rank found, in words; empty for nothing.
        backend: asks the other ranks.

    Raises:
        SelfTestFailed: with this rank's fault, or saying that another rank's message has it.
    """
    is_found = backend.any_rank(bool(fault))  # a collective, so it is asked first, on every rank
    # This rank's own fault stops it even if the collective should answer wrongly.
    if is_found or fault:
        raise SelfTestFailed(fault or "another rank found a fault; see its message")
