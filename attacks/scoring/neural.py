"""Transformers models as scorers: exact fp32 log-softmax whatever the model computes in, in blocks that fit a cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch

from attacks.scoring.sampling_scheme import SamplingScheme
from attacks.scoring.scorer import TokenSignals

_TOKENS_PER_BLOCK_ON_CPU = 16
_TOKENS_PER_BLOCK_ON_ACCELERATOR = 4096

# A model may mask a part of its vocabulary with -inf; 0 * -inf would then be NaN.
_LOWEST_LOGIT = -1e4


class NeuralScorer:
    """A causal language model.

    Rows are padded on the right and a causal model does not look there, so a token's value does not depend on padding
    or on the other rows.

    Args:
        model: anything that gives ``.logits`` for ``input_ids``.
        device: where it is put.
        precision: ``"bf16"`` computes the forward pass in bf16; what follows it is fp32 always.
        context: entered around every forward pass, for example ``model.disable_adapter``.
        scheme: also gives every token's probability under it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        precision: str = "fp32",
        context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        scheme: SamplingScheme | None = None,
    ) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self._is_bf16 = precision == "bf16"
        self._context = context
        self._scheme = scheme

    def score(self, sequences: Sequence[npt.NDArray[np.int64]]) -> list[TokenSignals]:
        """Return the signals of each sequence's tokens after its first, from one forward pass over all sequences."""
        labels = torch.from_numpy(np.concatenate([tokens[1:] for tokens in sequences])).to(self._device)
        blocks: list[tuple[torch.Tensor, ...]] = []  # of each block the signals, in the order of TokenSignals' fields
        for start, block in self._blocks(sequences):
            chosen = labels[start : start + len(block)]
            # First, since the other signals overwrite the block.
            sampled = () if self._scheme is None else (sampled_logp(block, chosen, self._scheme),)
            blocks.append((*_signals_of(block, chosen), *sampled))
        # Blocks run over all sequences in a row: join each kind of signal, then cut it where sequences end.
        ends = np.cumsum([len(tokens) - 1 for tokens in sequences])[:-1]
        by_kind = [np.split(torch.cat(parts).cpu().numpy(), ends) for parts in zip(*blocks, strict=True)]
        return [TokenSignals(*of_sequence) for of_sequence in zip(*by_kind, strict=True)]

    def likeliest(self, sequences: Sequence[npt.NDArray[np.int64]], count: int) -> list[npt.NDArray[np.int64]]:
        """Return [len - 1, count] per sequence: the most likely tokens at each position after the first."""
        indices = [block.topk(count, dim=-1).indices.cpu().numpy() for _, block in self._blocks(sequences)]
        ends = np.cumsum([len(tokens) - 1 for tokens in sequences])[:-1]
        return np.split(np.concatenate(indices), ends)

    def logits(self, sequences: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
        """Return the bare forward pass: [rows, tokens, vocabulary], padded with token 0."""
        width = max(map(len, sequences))
        ids = np.zeros((len(sequences), width), dtype=np.int64)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = tokens
        autocast = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16)
        with torch.inference_mode(), autocast, self._context():
            # Prompt tuning puts virtual tokens before the row's own: only the last ``width`` logits are the row's.
            return self._model(input_ids=torch.from_numpy(ids).to(self._device)).logits[:, -width:]

    def _blocks(self, sequences: Sequence[npt.NDArray[np.int64]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first token, fp32 logits [tokens, vocabulary]) in blocks of a few tokens.

        Tokens are counted over all sequences in a row, without padding; each sequence has len - 1 predicted tokens.
        """
        with torch.inference_mode():
            logits = self.logits(sequences)
            width = logits.shape[1]
            places = np.concatenate([np.arange(len(tokens) - 1) + row * width for row, tokens in enumerate(sequences)])
            flat, index = logits.reshape(-1, logits.shape[-1]), torch.from_numpy(places).to(self._device)
            on_cpu = self._device.type == "cpu"
            size = _TOKENS_PER_BLOCK_ON_CPU if on_cpu else _TOKENS_PER_BLOCK_ON_ACCELERATOR
            for start in range(0, len(places), size):
                yield start, flat.index_select(0, index[start : start + size]).float()


def sampled_logp(logits: torch.Tensor, labels: torch.Tensor, scheme: SamplingScheme) -> torch.Tensor:
    """Return [tokens] log-probability of each label under the sampling scheme; -inf where it cannot be drawn.

    Args:
        logits: [tokens, vocabulary], fp32; left as it is.
        labels: [tokens].
        scheme: temperature first, then top k, then top p of what is left. Of tokens that tie for the last place some
            are counted as left out, and a label among them still as drawable.
    """
    label_logits = logits.gather(1, labels[:, None]) / scheme.temperature
    if scheme.top_k == 0 and scheme.top_p == 1.0:
        return (label_logits - (logits / scheme.temperature).logsumexp(dim=-1, keepdim=True))[:, 0]
    size = scheme.top_k or logits.shape[-1]
    kept = logits.topk(min(size, logits.shape[-1]), dim=-1).values / scheme.temperature  # in descending order
    if scheme.top_p < 1.0:
        # Drop a token if those before it hold the share top_p already.
        shares = kept.softmax(dim=-1)
        kept = kept.masked_fill(shares.cumsum(dim=-1) - shares >= scheme.top_p, -math.inf)
    # The lowest logit that can still be drawn; a label below it cannot.
    lowest = kept.masked_fill(kept == -math.inf, math.inf).min(dim=-1, keepdim=True).values
    logp = label_logits - kept.logsumexp(dim=-1, keepdim=True)
    return logp.masked_fill(label_logits < lowest, -math.inf)[:, 0]


def _signals_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return four [tokens] tensors, as ``TokenSignals`` defines them: logp, correct, mean and variance.

    Args:
        logits: [tokens, vocabulary], fp32; overwritten, to save memory.
        labels: [tokens].
    """
    highest, best = logits.max(dim=-1, keepdim=True)
    shifted = logits.sub_(highest).clamp_(min=_LOWEST_LOGIT)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    logp = shifted.gather(1, labels[:, None])[:, 0] - log_total
    weighted = weights.mul_(shifted)
    first = weighted.sum(dim=-1) / total
    second = torch.linalg.vecdot(weighted, shifted) / total
    # log p = shifted - log_total: the shift moves the mean and leaves the variance.
    return logp, best[:, 0] == labels, first - log_total, (second - first**2).clamp_(min=0.0)
