"""Opacus' per-sample rules for layer types that have none of ours: convolutions, group norms, recurrent cells.

Its recurrent layers (DPLSTM, DPGRU, DPRNN) are made of ``RNNLinear``, which is called once a time step; the gradients
of all calls add up. Its attention (DPMultiheadAttention) is made of plain linear layers that see tokens before rows,
where a rule could take one for the other, and ``EmbeddingBag``'s rule needs offsets that a hook's first input does not
show: both go one unit at a time. Only types whose Opacus rule gives the gradient of each row exactly are listed; its
own rules for linear, embedding and norm layers are not used, since ours keep factors, sum heads and see tied tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from privtrain.clipping.factors import Lookup, Outer

#: Types that have an exact rule in Opacus and none of ours.
_EXACT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)
#: Opacus' own layers are known by name, so that a model without them does not pay for the import.
_RECURRENT = ("opacus.layers.dp_rnn", "RNNLinear")
_TIME_FIRST = ("opacus.layers.dp_multihead_attention", "DPMultiheadAttention")


def covers(module: nn.Module) -> bool:
    """Return whether Opacus has an exact rule for layers of exactly this type."""
    return type(module) in _EXACT or _kind(module) == _RECURRENT


def only_names(module: nn.Module) -> bool:
    """Return whether a module lists parameters that its cells own and use, as Opacus' recurrent layers do."""
    return _kind(module)[0] == _RECURRENT[0] and _kind(module) != _RECURRENT


def is_time_first(module: nn.Module) -> bool:
    """Return whether the layers within see [tokens, rows, features]."""
    return _kind(module) == _TIME_FIRST


def advice(module: nn.Module) -> str:
    """Return what Opacus' validator says of a layer that it cannot clip, as a clause to append; empty if nothing."""
    from opacus.validators import ModuleValidator

    validator = ModuleValidator.VALIDATORS.get(type(module))
    problems = validator(module) if validator is not None else []
    return f" (Opacus: {' '.join(str(problems[0]).split())})" if problems else ""


def _kind(module: nn.Module) -> tuple[str, str]:
    """Return where a module's type is defined, and its name."""
    return type(module).__module__, type(module).__name__


def per_row(
    module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor
) -> dict[str, torch.Tensor | Outer | Lookup]:
    """Return every row's gradients by parameter name, by Opacus' rule for the module's type."""
    from opacus.grad_sample import GradSampleModule

    sampler = GradSampleModule.GRAD_SAMPLERS[type(module)]
    # Opacus skips frozen parameters, and the layer's own are frozen while its gradients are captured.
    twin = copy.copy(module)
    trained = {name: nn.Parameter(p.detach().float()) for name, p in module.named_parameters(recurse=False)}
    twin._parameters = {**module._parameters, **trained}  # a dictionary of its own: a copy shares the module's
    gradients = sampler(twin, [activation.float()], output_gradient.float())
    # Copies: a bias's gradient may be a view of the output's, which other layers get too, and uses are added in place.
    return {name: gradients[p].clone() for name, p in twin.named_parameters(recurse=False)}
