"""The mean of the weights after the last steps, which is released in place of the last weights.

It costs no privacy: ε covers the weights after every step, and any function of them is post-processing. Where the
learning rate does not decay, a mean over a run's last steps takes out part of the noise (Rakhlin et al. 2012, arXiv
1109.5647; with privacy De et al. 2022, arXiv 2204.13650, section 4.6).

The mean is kept in the optimizer's state beside AdamW's moments, 4 bytes a trained weight. So it is saved in
checkpoints and sharded over ranks as the moments are.
"""

from __future__ import annotations

import torch

from privtrain.backends import Backend

#: The entry of a parameter's optimizer state that holds the mean.
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
            state[_KEY].lerp_(parameter.detach(), 1 / num_included)  # the running mean


def install(optimizer: torch.optim.Optimizer, backend: Backend) -> bool:
    """Put the mean in place of the weights, on every rank; return whether there is one. Safe to repeat."""
    trained = [(parameter, state) for parameter, state in _trained(optimizer) if _KEY in state]
    for parameter, state in trained:
        parameter.detach().copy_(state[_KEY])
    backend.publish()
    return bool(trained)


def _trained(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
