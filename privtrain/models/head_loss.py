"""Cross-entropy in chunks of tokens, so that no fp32 copy of all logits exists, nor all logits where the head allows.

A line's logits in fp32, their log-probabilities and the gradients of both are the largest activation of a step. Here
each chunk of tokens has its own and lets them go:

* :func:`cross_entropy` takes logits that exist, of any head, trained, tied or post-processed: two tensors of their size
  and type remain of a pass, the logits and their gradient.
* :class:`FrozenHead` forms them chunk by chunk: none remain. A token's loss depends on its own hidden state alone, so
  that the gradient of the state is known with the loss, and is multiplied by that of the loss later.

Values differ from ``torch.nn.functional.cross_entropy`` by rounding. Chunks divide a line evenly, so that a token is
computed in the same shapes wherever it stands.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

#: Tokens of a chunk, at most: few enough for a CPU's cache; a GPU has kernels to save.
_CPU_CHUNK, CHUNK = 64, 512
#: A line whose length has no divisor from here on is one chunk.
_SMALLEST_CHUNK = 16
#: Tokens that a head is tried on.
_NUM_TRIED = 5


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return [tokens] fp32 -log p(target), each of its own row of [tokens, vocabulary] logits alone."""
    return _OfLogits.apply(logits, targets)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class FrozenHead:
    """A causal language model that is a decoder and then a frozen linear layer over its hidden states, nothing else.

    Attributes:
        decoder: input ids and positions to hidden states.
        head: from these to logits.
    """

    decoder: nn.Module
    head: nn.Linear

    @classmethod
    def of(cls, model: Any) -> FrozenHead | None:
        """Return the two parts of ``model``; ``None`` if it is not made so, or its head is trained or hooked.

        That nothing comes between, or after (a scale, a cap), is seen from logits of a few tokens, bit for bit.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(base, getattr(base, "base_model_prefix", None) or "", None)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if not isinstance(decoder, nn.Module) or decoder is base or type(head) is not nn.Linear:
            return None
        is_watched = bool(head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
        is_whole = type(head.weight.data) is torch.Tensor and head.weight.dim() == 2  # not in parts over ranks
        if is_watched or not is_whole or any(parameter.requires_grad for parameter in head.parameters()):
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
            targets: [tokens]; the token that each is to predict.
            inputs: of the decoder, [1, tokens].
        """
        hidden = self.decoder(**inputs).last_hidden_state[0]
        return _OfHidden.apply(hidden, self.head, targets, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _OfLogits(torch.autograd.Function):
    """Cross-entropy of [tokens, vocabulary] logits, of which fp32 copies exist a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        parts = [_losses(own, wanted) for own, wanted in zip(*_chunks(logits, targets), strict=True)]
        losses, normalisers = (torch.cat(side) for side in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, normalisers)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = torch.empty_like(ctx.saved_tensors[0])
        sides = _chunks(*ctx.saved_tensors, gradients[0], result)
        for logits, targets, normalisers, gradient, out in zip(*sides, strict=True):
            out.copy_(_gradient(logits, targets, normalisers).mul_(gradient[:, None]))
        return result, None


class _OfHidden(torch.autograd.Function):
    """Cross-entropy of [tokens, width] hidden states under a frozen head: logits exist a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, needs_gradient: bool
    ) -> torch.Tensor:
        by_token = torch.empty_like(hidden)
        kind, losses = hidden.device.type, []
        is_cast = torch.is_autocast_enabled(kind)
        # Once for all chunks, where autocast would cast the weight for each.
        dtype = torch.get_autocast_dtype(kind) if is_cast else head.weight.dtype
        weight, bias = (None if side is None else side.to(dtype) for side in (head.weight, head.bias))
        assert weight is not None
        for own, wanted, out in zip(*_chunks(hidden, targets, by_token), strict=True):
            logits = nn.functional.linear(own.to(dtype), weight, bias)
            loss, normalisers = _losses(logits, wanted)
            losses.append(loss)
            if needs_gradient:
                out.copy_(_gradient(logits, wanted, normalisers).to(dtype) @ weight)
        ctx.save_for_backward(by_token)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (by_token,) = ctx.saved_tensors
        return (by_token * gradients[0][:, None]).to(by_token.dtype), None, None, None


def _chunks(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    num_tokens, device = len(tensors[0]), tensors[0].device
    size = math.gcd(num_tokens, _CPU_CHUNK if device.type == "cpu" else CHUNK)
    return [tensor.split(size if size >= _SMALLEST_CHUNK else num_tokens) for tensor in tensors]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [tokens] losses, and the logarithms of Σ exp(logit)."""
    wide = logits.float()
    normalisers = wide.logsumexp(dim=1)
    return normalisers - wide.gather(1, targets[:, None])[:, 0], normalisers


def _gradient(logits: torch.Tensor, targets: torch.Tensor, normalisers: torch.Tensor) -> torch.Tensor:
    """Return [tokens, vocabulary] fp32: of each loss by its logits."""
    shares = logits.float().sub(normalisers[:, None]).exp_()
    return shares.scatter_add_(1, targets[:, None], torch.full_like(shares[:, :1], -1.0))
