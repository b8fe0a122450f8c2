"""Opacus' per-sample rules for layer types that have none of ours: convolutions and group norms.

Only types whose Opacus rule gives the gradient of each row exactly are listed; its own rules for linear, embedding and
norm layers are not used, since ours keep factors, sum heads and see tied tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from privtrain.clipping.factors import Lookup, Outer

_EXACT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)


def covers(module: nn.Module) -> bool:
    """Whether Opacus has an exact rule for layers of exactly this type."""
    return type(module) in _EXACT


def per_row(
    module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor
) -> dict[str, torch.Tensor | Outer | Lookup]:
    """The rule itself: gradients of every row by parameter name."""
    from opacus.grad_sample import GradSampleModule

    sampler = GradSampleModule.GRAD_SAMPLERS[type(module)]
    # Opacus skips frozen parameters, and the layer's own are frozen while its gradients are captured.
    twin = copy.copy(module)
    for name, parameter in module.named_parameters(recurse=False):
        twin._parameters = twin._parameters | {name: nn.Parameter(parameter.detach().float())}
    found = sampler(twin, [activation.float()], output_gradient.float())
    return {name: found[p] for name, p in twin.named_parameters(recurse=False)}
