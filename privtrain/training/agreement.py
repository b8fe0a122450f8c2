"""Stop all ranks where one finds a fault."""

from __future__ import annotations

import torch

from privtrain.backends import Backend
from privtrain.errors import SelfTestFailed


def agree_on_fault(fault: str, backend: Backend) -> None:
    """Raise on every rank if ``fault`` is not empty on any, which would otherwise wait for it until the time-out.

    Raises:
        SelfTestFailed: with this rank's fault, or a word about another's.
    """
    num_faulty = torch.tensor([float(bool(fault))], device=backend.device)
    backend.reduce(num_faulty)
    if fault or not float(num_faulty) == 0:
        raise SelfTestFailed(fault or "another rank found a fault; see its message")
