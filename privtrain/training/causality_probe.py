"""Probe the real model at start-up: nobody looks ahead, and nobody reads the padding.

This is about what is learned, not about privacy: a token's loss must not move when later tokens change or vanish, or
when the row is padded further. A model that sees the token it predicts learns to copy it. Every rank runs the same
passes, as a sharded model needs, and what one rank finds stops all.
"""

from __future__ import annotations

import math

import torch

from privtrain.clipping import refusals
from privtrain.data.records import Record
from privtrain.models.losses import CausalLM
from privtrain.training.planted_rows import PlantedRows, moved, weight_bytes

#: Change of logits, relative to the largest, that the rounding of other shapes explains, by bytes of a weight.
_OTHER_SHAPE = {4: 1e-4, 2: 5e-2}
#: The same where every shape is the same: none is expected.
_SAME_SHAPE = 1e-6


class CausalityProbe(PlantedRows):
    """Demands that what is predicted at a token depends on the tokens up to it alone."""

    def check(self) -> None:
        """Raise if logits move with later tokens or padding, in the narrowest or the widest row that the job may have.

        Raises:
            SelfTestFailed: naming the model's class.
        """
        widths = self._widths()
        faults = []
        for width in sorted({widths[0], widths[-1]}):
            record = self._record(max(2, width - 1), 4)
            plain = self._logits(record, width)
            # Every rank runs the same passes, so all are run whatever the first ones show.
            faults += [
                self._not_finite(plain),
                self._looks_ahead(record, width, plain),
                self._reads_padding(record, width, plain),
            ]
        self._agree(next(filter(None, faults), ""))

    def _not_finite(self, logits: torch.Tensor) -> str:
        """Return in words that logits are not finite (-inf may stand for an id that the model never predicts)."""
        if not (torch.isnan(logits).any() or (logits == torch.inf).any()):
            return ""
        return (
            f"the outputs of {self._model_class} on made-up tokens are not finite: its weights hold NaN or infinity, "
            "or it overflows; fetch the model again, or set performance.precision: fp32"
        )

    def _looks_ahead(self, record: Record, width: int, plain: torch.Tensor) -> str:
        """Return in words how the logits of a record's first half move with its second half; empty if they do not.

        The second half is changed, and left out.

        Args:
            record: in a row of ``width`` tokens.
            width: tokens of the row.
            plain: the record's logits.
        """
        if not isinstance(self.trainer.objective, CausalLM):  # a classifier may read all of a record
            return ""
        half = math.ceil(len(record) / 2)
        changed = record.tokens.copy()
        changed[half:] = (changed[half:] + 1) % self.vocabulary_size
        by_change = moved(plain[:half], self._logits(Record.of(changed), width)[:half])
        by_absence = moved(plain[:half], self._logits(Record.of(record.tokens[:half]), width))
        if max(by_change, by_absence) <= self._same_shape:
            return ""
        what = "change" if by_change >= by_absence else "vanish"
        is_encoder = getattr(refusals.unwrapped(self.trainer.model).config, "is_decoder", None) is False
        way_out = "set is_decoder: true in the model's config.json" if is_encoder else "choose a causal language model"
        return (
            f"the model class {self._model_class} is not causal: logits move by {max(by_change, by_absence):.2g} when "
            f"tokens behind {what}, so it would learn to copy the token that it predicts; {way_out}"
        )

    def _reads_padding(self, record: Record, width: int, plain: torch.Tensor) -> str:
        """Return in words how a record's logits move with the padding behind it; the arguments are as above."""
        by_pad_ids = moved(plain, self._logits(record, width, pad_id=self._quiet))
        by_width = moved(plain, self._logits(record, self._widths()[-1]))
        if by_pad_ids <= self._same_shape and by_width <= self._tolerance(_OTHER_SHAPE):
            return ""
        return (
            f"the model class {self._model_class} reads the padding behind a record: logits move by {by_pad_ids:.2g} "
            f"with the ids that stand there, by {by_width:.2g} with their number. Choose a model whose tokens do not "
            "depend on what stands behind them"
        )

    @property
    def _model_class(self) -> str:
        """Name of the model's class."""
        return type(refusals.unwrapped(self.trainer.model)).__name__

    @property
    def _same_shape(self) -> float:
        """Change of logits that is explained where every shape is the same: but experts compute in other shapes."""
        return self._tolerance(_OTHER_SHAPE) if self._has_experts() else _SAME_SHAPE

    def _logits(self, record: Record, width: int, pad_id: int | None = None) -> torch.Tensor:
        """Return the logits of a record in a row of ``width`` tokens: [its tokens, ids], or [labels] of a classifier.

        Without autocast if the weights are fp32, so that rounding hides little. By default padded with the packer's id.
        """
        batch = self._batch([record], width, pad_id=pad_id)
        outputs: list[torch.Tensor] = []
        handle = self.trainer.model.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output.logits if hasattr(output, "logits") else output[0])
        )
        try:
            if weight_bytes(self.trainer.model) < 4:
                self._losses(batch)
            else:
                objective, model = self.trainer.objective, self.trainer.model
                self._passed(lambda: objective.losses(model, batch.input_ids, batch.target_mask))
        finally:
            handle.remove()
        first_pass = outputs[0]
        (logits,) = first_pass.detach().float()  # the only row's
        if logits.ndim != 2:
            return logits  # a classifier's
        of_row = logits[-width:]  # without virtual tokens, which prompt tuning puts in front
        return of_row[: len(record)]
