"""How a layer's per-row gradients follow from its input and the gradient of its output: one small rule a layer type.

A rule gets the module, its input and the gradient of its output, rows first, and returns for each of its parameters
either the gradient of every row, ``[rows, *shape]`` in fp32, or, where that would be large, its factors
(:class:`~privtrain.clipping.factors.Outer`, :class:`~privtrain.clipping.factors.Lookup`). To support another layer
type, write such a function and register it::

    import torch
    from privtrain.clipping import rules

    class Scale(torch.nn.Module):                       # y = s · x, one s a feature
        def __init__(self, width):
            super().__init__()
            self.s = torch.nn.Parameter(torch.ones(width))

        def forward(self, x):
            return self.s * x

    def scale(module, x, g):                            # x, g: [rows, tokens, features]
        return {"s": (x.float() * g.float()).sum(dim=1)}

    rules.register(Scale, scale)

The start-up self-test compares every trainable tensor with plain autograd, so a wrong rule stops the job.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from privtrain.clipping import opacus_rules
from privtrain.clipping.factors import Lookup, Outer
from privtrain.errors import UnsupportedLayer

#: One parameter's gradient: [rows, *shape] or factors with rows first.
Gradient = torch.Tensor | Outer | Lookup
#: (module, input, gradient of output) → {parameter name within the module: gradient}.
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, Gradient]]

_RULES: dict[type[nn.Module], Rule] = {}

#: Relative error allowed when a rule found by a layer's name is tried on that layer.
_PROBE_TOLERANCE = 1e-3


def register(layer_type: type[nn.Module], rule: Rule) -> None:
    """Use ``rule`` for layers of exactly this type (a subclass may compute something else)."""
    _RULES[layer_type] = rule


def rule_for(name: str, module: nn.Module) -> Rule:
    """Return the rule of a module that owns trainable tensors.

    Transformers has a class of RMS norms for every architecture. They get :func:`rms_norm` by their name, after it has
    been tried on the layer itself against autograd.

    Raises:
        UnsupportedLayer: naming the module, if there is none.
    """
    # A registered rule first, then those that are found by name, then Opacus' own.
    rule = _RULES.get(type(module))
    if rule is None and _looks_like_rms_norm(module) and _agrees_with_autograd(rms_norm, module):
        rule = rms_norm
    if rule is None and _is_scaled_embedding(module):
        rule = scaled_embedding
    if rule is None and opacus_rules.covers(module):
        rule = opacus_rules.per_row
    if rule is None:
        known = ", ".join(sorted(t.__name__ for t in _RULES))
        raise UnsupportedLayer(
            f"trainable module {name!r} of type {type(module).__name__} has no exact per-unit clipping rule (known: "
            f"{known}, RMS norms, convolutions, GroupNorm, DPLSTM); freeze it, register a rule, or set "
            f"performance.clipping_route: one_unit, which is exact for any layer{opacus_rules.advice(module)}"
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        raise UnsupportedLayer(
            f"embedding {name!r} has max_norm or scale_grad_by_freq, which make one row's gradient depend on others"
        )
    return rule


def linear(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Apply ∂W = Σ_t g_t x_tᵀ, ∂b = Σ_t g_t, from y = x Wᵀ + b: x and g are the input's and gradient's tokens t."""
    left, right = _by_token(output_gradient), _by_token(activation)
    gradients: dict[str, Gradient] = {"weight": Outer(left, right)}
    if module.bias is not None:
        gradients["bias"] = left.float().sum(dim=1)
    return gradients


def conv1d(_module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Treat GPT-2's Conv1D, y = x W + b, as a linear layer with its weight transposed."""
    left, right = _by_token(activation), _by_token(output_gradient)
    return {"weight": Outer(left, right), "bias": right.float().sum(dim=1)}


def embedding(module: nn.Module, ids: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Apply ∂W[v] = Σ_{t: id_t = v} g_t, from y = W[ids]; none for ``padding_idx``, as in PyTorch. Never one-hot."""
    values = _by_token(output_gradient)
    ids = ids.reshape(values.shape[:2])
    if module.padding_idx is not None:
        values = values.masked_fill(torch.eq(ids, module.padding_idx)[..., None], 0.0)  # pyright: ignore
    return {"weight": Lookup(ids, values)}


def scaled_embedding(module: nn.Module, ids: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Treat Gemma's embedding as the looked-up row times a constant."""
    scale = module.embed_scale
    assert isinstance(scale, torch.Tensor)
    return embedding(module, ids, output_gradient * scale.to(output_gradient.dtype))


def layer_norm(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Apply ∂w = Σ_t g_t ∘ x̂_t, ∂b = Σ_t g_t, from y = x̂ ∘ w + b over the last dimensions."""
    shape: tuple[int, ...] = module.normalized_shape  # pyright: ignore[reportAssignmentType]
    eps: float = module.eps  # pyright: ignore[reportAssignmentType]
    gradient = output_gradient.float()
    gradients: dict[str, Gradient] = {}
    if module.weight is not None:
        normalised = nn.functional.layer_norm(activation.float(), shape, eps=eps)
        gradients["weight"] = _sum_between(gradient * normalised, len(shape))
    if module.bias is not None:
        gradients["bias"] = _sum_between(gradient, len(shape))
    return gradients


def rms_norm(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Gradient]:
    """Apply ∂w = Σ_t g_t ∘ x_t / rms(x_t), from y = x / rms(x) ∘ (w + constant); Gemma's constant 1 changes nothing.

    The small number under the root is called ``variance_epsilon`` or ``eps`` by architecture; None stands for the
    dtype's own. The sum runs over all dimensions but the first and the last: query and key norms see heads there too.
    """
    values = activation.float()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(activation.dtype).eps if eps is None else eps
    normalised = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return {"weight": _sum_between(output_gradient.float() * normalised, 1)}


def _by_token(value: torch.Tensor) -> torch.Tensor:
    """Flatten to [rows, tokens, features], from [rows, features] or [rows, …, features]."""
    return value[:, None] if value.dim() == 2 else value.flatten(1, -2)


def _sum_between(value: torch.Tensor, num_last: int) -> torch.Tensor:
    """Return the sum over all dimensions but the first and the last ``num_last``."""
    dims = tuple(range(1, value.dim() - num_last))
    return value.sum(dim=dims) if dims else value


def _looks_like_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is called an RMS norm and has a weight and nothing else."""
    parameters = dict(module.named_parameters())
    return type(module).__name__.endswith("RMSNorm") and list(parameters) == ["weight"]


def _is_scaled_embedding(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' embeddings that multiply what they look up, as Gemma's."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith("TextScaledWordEmbedding")


def _agrees_with_autograd(rule: Rule, module: nn.Module) -> bool:
    """Return whether ``rule`` gives what autograd gives on random rows of the layer itself.

    For a layer that was found by its name: it may only be called like one with a known rule, and compute another thing.
    """
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = (torch.randn(2, 3, weight.shape[-1], generator=generator).to(weight) for _ in range(2))
    with torch.enable_grad():
        free = {name: p.detach().clone().requires_grad_(True) for name, p in module.named_parameters()}
        output = torch.func.functional_call(module, free, (inputs,))
        # An RMS norm rescales the features of each token, so its output has the shape of its input. A layer whose
        # output has another one, or is a tuple, is no such norm.
        if not isinstance(output, torch.Tensor) or output.shape != inputs.shape:
            return False
        expected = torch.autograd.grad(output, list(free.values()), gradient)
    with torch.no_grad():
        by_rule = rule(module, inputs, gradient)
    tolerance = max(_PROBE_TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    for name, by_autograd in zip(free, expected, strict=True):
        value, wanted = by_rule[name], by_autograd.float()
        if not isinstance(value, torch.Tensor):
            return False
        if not float((value.sum(0) - wanted).norm()) <= tolerance * float(wanted.norm()):  # also where it is NaN
            return False
    return True


register(nn.Linear, linear)
register(Conv1D, conv1d)
register(nn.Embedding, embedding)
register(nn.LayerNorm, layer_norm)
register(nn.RMSNorm, rms_norm)
