"""Cross-entropy in chunks of tokens, so that no fp32 copy of all logits exists, nor all logits where the head allows.

A line is one long row of tokens, a forward pass of its own. Its logits in fp32, their log-probabilities and the
gradients of both are the largest activation of a step. Here they exist for one chunk of tokens at a time:

* :func:`cross_entropy` takes logits that exist, of any head, trained, tied or post-processed: two tensors of their size
  and type are held for the backward pass, the logits and their gradient.
* :class:`FrozenHead` forms logits chunk by chunk, and none are held. Since the head is frozen, the gradient is needed
  for hidden states alone. A token's loss depends on its own hidden state, so the gradient of that is computed together
  with the loss, and multiplied by the gradient of the loss in the backward pass.

Values differ from ``torch.nn.functional.cross_entropy`` by rounding. Chunks divide a line evenly, so that a token is
computed in the same shapes wherever it stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Tokens of a chunk, at most, on a CPU (whose cache is small) and on other devices (where few kernels are wanted).
_CPU_CHUNK, CHUNK = 64, 512
#: A line is not divided if its chunks would be smaller than this.
_SMALLEST_CHUNK = 16
#: Tokens that :class:`FrozenHead` is compared with the model on.
_NUM_TRIED = 5


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return [tokens] fp32 losses -log p(target), each from its own row of the logits [tokens, vocabulary] alone."""
    return _OfLogits.apply(logits, targets)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class FrozenHead:
    """A causal language model that is a decoder and then a frozen linear layer over its hidden states, nothing else.

    Attributes:
        decoder: from input ids and positions to hidden states.
        head: from hidden states to logits.
    """

    decoder: nn.Module
    head: nn.Linear

    @classmethod
    def of(cls, model: Any) -> FrozenHead | None:
        """Return decoder and head of ``model``; ``None`` if it has more than these, or the head is trained or hooked.

        The model may scale hidden states, or cap logits, in code of its own. So logits of a few tokens are compared.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
        # transformers says in base_model_prefix which attribute is the decoder: "model", "transformer", ...
        decoder = getattr(base, getattr(base, "base_model_prefix", None) or "", None)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if not isinstance(decoder, nn.Module) or decoder is base or type(head) is not nn.Linear:
            return None
        has_hooks = bool(head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
        is_whole = type(head.weight.data) is torch.Tensor and head.weight.dim() == 2  # not divided among ranks
        is_trained = any(parameter.requires_grad for parameter in head.parameters())
        if has_hooks or not is_whole or is_trained:
            return None
        frozen = cls(decoder, head)
        return frozen if frozen._is_all_of(base) else None

    def _is_all_of(self, base: nn.Module) -> bool:
        """Return whether decoder and head alone give the model's logits, bit for bit, on a few tokens."""
        modes = {module: module.training for module in base.modules()}
        ids = torch.arange(_NUM_TRIED, device=self.head.weight.device)[None]
        try:
            base.eval()
            with torch.no_grad():
                hidden = getattr(self.decoder(input_ids=ids), "last_hidden_state", None)
                return hidden is not None and torch.equal(self.head(hidden), base(input_ids=ids).logits)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def losses(self, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return [tokens] fp32 -log p(target) of the tokens of a line.

        Args:
            targets: [tokens] ids: for each token the one to predict after it.
            inputs: the decoder's inputs by name, each [1, tokens].
        """
        hidden = self.decoder(**inputs).last_hidden_state[0]
        return _OfHidden.apply(hidden, self.head, targets, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _OfLogits(torch.autograd.Function):
    """Cross-entropy of [tokens, vocabulary] logits, of which fp32 copies exist a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses, normalisers = [], []
        for logits_chunk, targets_chunk in _chunks(logits, targets):
            chunk_losses, chunk_normalisers = _losses(logits_chunk, targets_chunk)
            losses.append(chunk_losses)
            normalisers.append(chunk_normalisers)
        ctx.save_for_backward(logits, targets, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = torch.empty_like(ctx.saved_tensors[0])  # as large as all logits, written chunk by chunk
        for logits, targets, normalisers, gradient_of_loss, out in _chunks(*ctx.saved_tensors, gradients[0], result):
            out.copy_(_gradient(logits, targets, normalisers).mul_(gradient_of_loss[:, None]))
        return result, None


class _OfHidden(torch.autograd.Function):
    """Cross-entropy of [tokens, width] hidden states under a frozen head: logits exist a chunk at a time.

    ``forward`` computes the gradients of hidden states too, where they are needed, while it has the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, needs_gradient: bool
    ) -> torch.Tensor:
        gradients_of_hidden = torch.empty_like(hidden)  # of each token's own loss
        device_type, losses = hidden.device.type, []
        # Cast once for all chunks; autocast would cast the weight for each.
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else head.weight.dtype
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        for hidden_chunk, targets_chunk, out in _chunks(hidden, targets, gradients_of_hidden):
            logits = nn.functional.linear(hidden_chunk.to(dtype), weight, bias)
            chunk_losses, normalisers = _losses(logits, targets_chunk)
            losses.append(chunk_losses)
            if needs_gradient:
                out.copy_(_gradient(logits, targets_chunk, normalisers).to(dtype) @ weight)
        ctx.save_for_backward(gradients_of_hidden)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients_of_hidden,) = ctx.saved_tensors
        chained = (gradients_of_hidden * gradients[0][:, None]).to(gradients_of_hidden.dtype)
        return chained, None, None, None  # nothing for head, targets and needs_gradient


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same chunk of tokens, the first dimension, of every tensor, as views that can be written to.

    All chunks are equally long: a divisor of the number of tokens.
    """
    num_tokens, device = len(tensors[0]), tensors[0].device
    size = math.gcd(num_tokens, _CPU_CHUNK if device.type == "cpu" else CHUNK)
    if size < _SMALLEST_CHUNK:
        size = num_tokens
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [tokens] losses, and [tokens] normalisers log Σ exp(logit), both fp32."""
    wide = logits.float()
    normalisers = wide.logsumexp(dim=1)
    return normalisers - wide.gather(1, targets[:, None])[:, 0], normalisers


def _gradient(logits: torch.Tensor, targets: torch.Tensor, normalisers: torch.Tensor) -> torch.Tensor:
    """Return [tokens, vocabulary] fp32 gradients of each token's loss by its logits: softmax minus one-hot target."""
    softmax = logits.float().sub(normalisers[:, None]).exp_()
    return softmax.scatter_add_(1, targets[:, None], torch.full_like(softmax[:, :1], -1.0))
