"""The mean of the weights after the last steps: post-processing, since every one of those weights is covered by ε.

The steps of a plan are what ε is computed for, with all that leaves each of them: so a function of the weights after
several steps costs nothing. A mean over a run's tail takes out part of its noise where the learning rate does not decay
(Rakhlin et al. 2012, arXiv 1109.5647; with privacy De et al. 2022, arXiv 2204.13650, section 4.6).

The mean is kept beside AdamW's moments, 4 bytes a trained weight: checkpoints, and whoever shards the optimizer, carry
it as they carry those.
"""

from __future__ import annotations

import torch

from privtrain.backends import Backend

#: The entry of an optimizer's state that holds it.
_KEY = "average"


def include(optimizer: torch.optim.Optimizer, step: int, *, num_steps: int, num_averaged: int) -> None:
    """Take the weights after a step into the mean, if it is one of the last ``num_averaged`` of ``num_steps``.

    Args:
        optimizer: has stepped.
        step: counts from 0.
        num_steps: of the plan.
        num_averaged: steps whose weights are averaged; 0 for none.
    """
    num_included = step + 1 - (num_steps - num_averaged)
    if num_included < 1:
        return
    for parameter, state in _trained(optimizer):
        if num_included == 1:
            state[_KEY] = parameter.detach().clone()
        else:
            state[_KEY].lerp_(parameter.detach(), 1 / num_included)


def install(optimizer: torch.optim.Optimizer, backend: Backend) -> bool:
    """Put the mean in place of the weights, on every rank; return whether there is one. Repeatable."""
    trained = [(parameter, state) for parameter, state in _trained(optimizer) if _KEY in state]
    for parameter, state in trained:
        parameter.detach().copy_(state[_KEY])
    backend.publish()
    return bool(trained)


def _trained(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
