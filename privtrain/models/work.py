"""What one row (one record) costs to compute: operations, kernels and layers, counted without weights.

One forward and one backward pass of the real architecture are recorded on torch's meta device, where tensors have
shapes and no values. Attention is counted whole, though kernels that know that it is causal leave half of it out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from privtrain.config import Config
from privtrain.models.memory import meta_model


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts for one row of ``num_tokens`` tokens.

    Attributes:
        num_tokens: tokens of the row.
        forward_flops: operations of the forward pass; a multiplication and an addition are two.
        activation_flops: operations of the backward pass without those for gradients of weights.
        weight_shapes: (outputs, inputs) of each trained matrix that tokens are multiplied by.
        num_trained: trained parameters.
        num_trained_tensors: trained tensors.
        num_frozen: parameters that are not trained.
        num_kernels: kernels that forward and backward pass launch.
    """

    num_tokens: int
    forward_flops: float
    activation_flops: float
    weight_shapes: tuple[tuple[int, int], ...]
    num_trained: int
    num_trained_tensors: int
    num_frozen: int
    num_kernels: int

    @property
    def weight_flops(self) -> float:
        """Operations for the gradients of trained matrices, if each is multiplied out once."""
        return 2.0 * self.num_tokens * sum(p * d for p, d in self.weight_shapes)

    @property
    def plain_flops(self) -> float:
        """Operations of a forward and a backward pass without privacy."""
        return self.forward_flops + self.activation_flops + self.weight_flops


def count_work(config: Config) -> Work:
    """Count the work of one row of ``data.max_length`` tokens through a configuration's model.

    Raises:
        ConfigError: if the model's config cannot be loaded.
    """
    dtype = torch.float32 if config.training.releases_model else torch.bfloat16
    model, base = meta_model(config, dtype)
    return count_model(model, base.dtype, config.data.max_length)


def count_model(model: Any, dtype: torch.dtype, num_tokens: int) -> Work:
    """Count the work of one row of ``num_tokens`` tokens through a model on the meta device.

    ``dtype`` is that of the base, for the attention mask.
    """
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    # A ready-made mask: transformers would look into the values of one that it makes itself.
    mask = torch.zeros(1, 1, num_tokens, num_tokens, dtype=dtype, device="meta")
    kernels = _Kernels()
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with kernels, forward:
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = logits.float().log_softmax(-1).sum()
    with kernels, backward:
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes: list[tuple[int, int]] = []
    for module in model.modules():
        if _multiplies(module) and module.weight.requires_grad:
            num_outputs, num_inputs = module.weight.shape
            shapes.append((int(num_outputs), int(num_inputs)))
    weight_flops = 2 * num_tokens * sum(p * d for p, d in shapes)  # as Work.weight_flops
    return Work(
        num_tokens=num_tokens,
        forward_flops=forward.get_total_flops(),
        activation_flops=backward.get_total_flops() - weight_flops,
        weight_shapes=tuple(shapes),
        num_trained=sum(p.numel() for p in trained),
        num_trained_tensors=len(trained),
        num_frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        num_kernels=kernels.count,
    )


def _multiplies(module: Any) -> bool:
    """Return whether a module multiplies its input by a matrix; an embedding only looks rows up."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding)


class _Kernels(TorchDispatchMode):
    """Counts operations that compute something: views of a tensor cost no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
