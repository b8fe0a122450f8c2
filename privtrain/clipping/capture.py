"""See each trainable layer's input and output gradient through public forward hooks.

The hook passes the layer's output through an identity :class:`torch.autograd.Function` that keeps the input with
``save_for_backward`` (so gradient checkpointing treats it as any saved tensor) and hands (input, output gradient) to a
sink when the backward pass comes by. No framework method is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Sink = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]


class _Capture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        activation: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004 - makes the result require a gradient even if nothing before it does
        module: nn.Module,
        sink: Sink,
    ) -> torch.Tensor:
        ctx.save_for_backward(activation)
        ctx.module, ctx.sink = module, sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (activation,) = ctx.saved_tensors
        ctx.sink(ctx.module, activation, gradients[0])
        return gradients[0], None, None, None, None


@contextlib.contextmanager
def captured(modules: Mapping[str, nn.Module], parameters: list[nn.Parameter], sink: Sink) -> Iterator[None]:
    """Within the block, every backward pass feeds ``sink`` and leaves no gradient on ``parameters``.

    The parameters are frozen meanwhile: an unclipped gradient never exists anywhere that could leak it.
    """
    anchor = torch.zeros((), requires_grad=True)

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return output
        captured_output = _Capture.apply(output, inputs[0].detach(), anchor, module, sink)
        assert isinstance(captured_output, torch.Tensor)
        return captured_output

    handles = [module.register_forward_hook(hook) for module in modules.values()]
    trainable = [p for p in parameters if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
