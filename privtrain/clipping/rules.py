"""How a layer's per-row gradients follow from its input and the gradient of its output: one small rule a layer type.

To support another layer type, write a function with the signature of :func:`linear` and register it::

    from privtrain.clipping import rules

    rules.register(MyLayer, my_rule)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from privtrain.errors import UnsupportedLayer

#: (module, input, gradient of output) → {parameter name within the module: per-row gradients [rows, *shape]}, fp32.
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]

_RULES: dict[type[nn.Module], Rule] = {}


def register(layer_type: type[nn.Module], rule: Rule) -> None:
    """Use ``rule`` for layers of exactly this type (a subclass may compute something else)."""
    _RULES[layer_type] = rule


def rule_for(name: str, module: nn.Module) -> Rule:
    """The rule of a module that owns trainable tensors.

    Raises:
        UnsupportedLayer: naming the module, if there is none.
    """
    rule = _RULES.get(type(module))
    if rule is None:
        raise UnsupportedLayer(
            f"trainable module {name!r} of type {type(module).__name__} has no exact per-unit clipping rule "
            f"(known: {', '.join(sorted(t.__name__ for t in _RULES))}); freeze it or register a rule"
        )
    return rule


def linear(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Y = x Wᵀ + b over [rows, tokens, features]: ∂W = Σ_t g_t x_tᵀ, ∂b = Σ_t g_t, materialised per row."""
    gradients = {"weight": torch.einsum("rto,rti->roi", output_gradient, activation)}
    if module.bias is not None:
        gradients["bias"] = output_gradient.sum(dim=1)
    return gradients


register(nn.Linear, linear)
