"""See each trainable layer's input and output gradient through public forward hooks.

The hook passes the layer's output through an identity :class:`torch.autograd.Function` that keeps the input with
``save_for_backward`` (so gradient checkpointing treats it as any saved tensor) and hands (input, output gradient) to a
sink when a backward pass comes by. No framework method is replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from privtrain.clipping import opacus_rules
from privtrain.errors import UnsupportedLayer
from privtrain.privacy.layout import Slot

#: Called with a module, its input, and the gradient of its output, whenever a backward pass reaches the module.
Sink = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]


@dataclasses.dataclass
class Calls:
    """Which modules the forward pass called, with a handle on each in the graph.

    Attributes:
        anchors: a leaf of the graph for each module; ``backward(inputs=anchors)`` runs only what leads to them.
        sink: what every backward pass feeds; may be changed between two passes over one graph.
        num_calls: how often each module was called in the forward pass, in the order of first calls: a module that is
            called once is complete when a backward pass reaches it.
        num_values: how many numbers the inputs and outputs of these calls have, by module: the memory to keep them.
        last: the module that was called last, and its input, part of the graph.
        is_forward: whether calls are those of the forward pass; cleared before the first backward pass.
    """

    anchors: dict[nn.Module, torch.Tensor]
    sink: Sink | None = None
    num_calls: dict[nn.Module, int] = dataclasses.field(default_factory=dict)
    num_values: dict[nn.Module, int] = dataclasses.field(default_factory=dict)
    last: tuple[nn.Module, torch.Tensor] | None = None
    is_forward: bool = True


class _Capture(torch.autograd.Function):
    """The identity on a module's output, whose backward pass hands activation and output gradient to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        activation: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004 - makes the result require a gradient even if nothing before it does
        module: nn.Module,
        calls: Calls,
    ) -> torch.Tensor:
        ctx.save_for_backward(activation)
        ctx.module, ctx.calls = module, calls
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (activation,) = ctx.saved_tensors
        assert ctx.calls.sink is not None, "a backward pass before its sink was set"
        ctx.calls.sink(ctx.module, activation, gradients[0])
        return gradients[0], None, None, None, None


@contextlib.contextmanager
def captured(modules: Mapping[str, nn.Module], parameters: list[nn.Parameter], num_rows: int) -> Iterator[Calls]:
    """Feed the result's ``sink`` by every backward pass in the block, and leave no gradient on ``parameters``.

    The block is one forward pass and one or more backward passes over its graph; the caller clears the result's
    ``is_forward`` in between, since gradient checkpointing calls modules once more during a backward pass.

    The parameters are frozen meanwhile: an unclipped gradient never exists anywhere that could leak it. Backward passes
    reach the modules all the same, by their anchors. A layer that is
    called once for all rows, as learned positions are with ids of shape [1, tokens], has its output expanded to
    ``num_rows``: what autograd would have summed over rows when it broadcasts stays apart.
    """
    calls = Calls({module: torch.empty((), requires_grad=True) for module in modules.values()})
    names = {module: name for name, module in modules.items()}

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        """Count the call, and send the output through ``_Capture``, by row where the module saw one for all."""
        activation = inputs[0] if inputs else next(iter(keywords.values()), None)
        if calls.is_forward:
            calls.num_calls[module] = calls.num_calls.get(module, 0) + 1
            sizes = [value.numel() for value in (activation, output) if isinstance(value, torch.Tensor)]
            calls.num_values[module] = calls.num_values.get(module, 0) + sum(sizes)
        if not torch.is_grad_enabled():  # as in gradient checkpointing's first call, which leaves no graph
            return output
        if not isinstance(activation, torch.Tensor) or not isinstance(output, torch.Tensor):
            raise UnsupportedLayer(
                f"module {names[module]!r} of type {type(module).__name__} does not map one tensor to one tensor, "
                "which is what a clipping rule needs"
            )
        if calls.is_forward:
            calls.last = module, activation
        activation = activation.detach()  # kept for the sink alone, which needs no gradient of it
        if num_rows > 1 and output.shape[0] == 1 == activation.shape[0]:
            activation = activation.expand(num_rows, *activation.shape[1:])
            output = output.expand(num_rows, *output.shape[1:])
        return _Capture.apply(output, activation, calls.anchors[module], module, calls)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules.values()]
    trainable = [p for p in parameters if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield calls
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def owning_modules(model: nn.Module, slot_of: Mapping[int, Slot]) -> dict[str, nn.Module]:
    """Return the modules that own a trainable tensor, by name; a tied tensor has several owners.

    Args:
        model: the model.
        slot_of: id of each trainable tensor → its place in the layout.

    Raises:
        UnsupportedLayer: if a tensor has no owner.
    """
    modules: dict[str, nn.Module] = {}
    owned: set[int] = set()
    for name, module in model.named_modules():
        trainable = [p for p in module.parameters(recurse=False) if id(p) in slot_of]
        if trainable and not opacus_rules.only_names(module):
            modules[name] = module
            owned.update(map(id, trainable))
    if len(owned) < len(slot_of):
        raise UnsupportedLayer(f"{len(slot_of) - len(owned)} trainable tensors belong to no module of the model")
    return modules
