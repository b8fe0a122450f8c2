"""Rows that the start-up probes plant, and the passes over them.

A planted row is a record of random tokens. *Loud* rows, told by their first token, enter the model with huge
activations (:func:`.hooks.loud_rows`). A *width* is a number of tokens, padding included, that the packer makes rows
of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from privtrain.clipping import refusals
from privtrain.data.microbatch import NOBODY, Microbatch
from privtrain.data.records import Record
from privtrain.privacy.layout import Slot
from privtrain.training.agreement import agree_on_fault
from privtrain.training.trainer import Trainer

#: Tokens of the short unit, at least.
_SHORT = 4


@dataclasses.dataclass(frozen=True)
class PlantedRows:
    """What the probes of one trainer share.

    Attributes:
        trainer: about to train; its adapter has been moved off its starting point, where half of LoRA has no gradient.
        vocabulary_size: planted token ids are below this.
    """

    trainer: Trainer
    vocabulary_size: int

    @property
    def _loud(self) -> int:
        """Id of the first token of loud rows; no other row begins with it, and it is not the padding's."""
        return 1 if self.trainer.packer.pad_id != 1 else 3

    @property
    def _quiet(self) -> int:
        """Id of the first token of all other planted rows; also an id for padding other than the packer's."""
        return 2 if self.trainer.packer.pad_id != 2 else 3

    @property
    def _other_pad(self) -> int:
        """Another id than the packer's for padding, which no token may read.

        The packer's for a model with experts: these run on all tokens that are routed to them, padding among them, and
        how many there are decides how kernels round.
        """
        return self.trainer.packer.pad_id if self._has_experts() else self._quiet

    @property
    def _precision(self) -> str:
        """Of forward and backward passes: ``"fp32"`` or ``"bf16"``."""
        autocast = self.trainer.autocast
        return "bf16" if autocast.fast_dtype == torch.bfloat16 and autocast._enabled else "fp32"

    def _tolerance(self, by_bytes: dict[int, float]) -> float:
        """Return the tolerance of the job's precision, of those by bytes of a number: 4 for fp32, 2 for less."""
        is_low = self._precision == "bf16" or weight_bytes(self.trainer.model) < 4
        return by_bytes[2 if is_low else 4]

    def _widths(self) -> list[int]:
        """Return the widths of rows that the packer makes, ascending, from the first that holds a short unit."""
        packer = self.trainer.packer
        widths = sorted({packer.width([np.zeros(length)]) for length in range(1, packer.max_length + 1)})
        wide_enough = [width for width in widths if width >= _SHORT]
        return wide_enough or widths[-1:]

    def _record(self, length: int, seed: int, *, is_loud: bool = False) -> Record:
        """Return a planted record of random tokens; :func:`.hooks.loud_rows` makes it loud by its first token."""
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary_size, size=length)
        tokens[0] = self._loud if is_loud else self._quiet
        return self.trainer.objective.plant(tokens)

    def _batch(
        self,
        rows: Sequence[Record],
        width: int,
        weights: Sequence[float] | None = None,
        num_rows: int | None = None,
        pad_id: int | None = None,
    ) -> Microbatch:
        """Return a microbatch of one row for each record, each a unit of its own, and then padding rows.

        Args:
            rows: the records.
            width: tokens of a row.
            weights: factor of each record's loss; by default 1.
            num_rows: rows in all; by default no padding rows.
            pad_id: id that pads rows; by default the packer's.
        """
        num_rows = num_rows or len(rows)
        pad_id = self.trainer.packer.pad_id if pad_id is None else pad_id
        input_ids = np.full((num_rows, width), pad_id, dtype=np.int64)
        mask = np.zeros((num_rows, width), dtype=bool)
        row_weight = np.zeros(num_rows, dtype=np.float32)
        owner = np.full(num_rows, NOBODY, dtype=np.int64)
        for i, record in enumerate(rows):
            input_ids[i, : len(record)] = record.tokens
            mask[i, : len(record)] = record.is_target
            row_weight[i] = 1.0 if weights is None else weights[i]
            owner[i] = i
        tensors = (torch.from_numpy(array) for array in (input_ids, mask, row_weight, owner))
        batch = Microbatch(*tensors, owners=tuple(range(len(rows))), last_continues=False)
        return batch.to(self.trainer.backend.device)

    def _losses(self, batch: Microbatch) -> torch.Tensor:
        """Return [rows] losses of the job's own forward pass, leaving no gradients."""
        return self._passed(lambda: self.trainer.row_losses(batch.input_ids, batch.target_mask))

    def _passed(self, losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the [rows] ``losses`` of a forward pass, leaving no gradients.

        Where a forward pass gathers sharded weights, a backward pass must follow, which frees them.
        """
        placement = self.trainer.placement
        if placement.shards is not None:  # gradients are sharded too: handed over, and forgotten
            with placement.shards.collecting(_forget):
                row_losses = losses()
                row_losses.sum().backward()
        elif placement.equal_passes:  # only the frozen base is sharded: gradients are left on the parameters
            row_losses = losses()
            row_losses.sum().backward()
            for parameter in placement.clipped.parameters.values():
                parameter.grad = None
        else:
            with torch.no_grad():
                row_losses = losses()
        return row_losses.detach()

    def _agree(self, fault: str) -> None:
        """Raise SelfTestFailed on every rank if any rank has a ``fault``; its words, or those of another rank."""
        agree_on_fault(fault, self.trainer.backend)

    def _has_experts(self) -> bool:
        """Return whether the model routes tokens to experts, so that other tokens decide the shapes it computes in."""
        configs = refusals.configs(refusals.unwrapped(self.trainer.model))
        return any(refusals.has_experts(config) for config in configs)


def _forget(_slot: Slot, _part: torch.Tensor) -> None:
    """Drop a gradient that a backward pass hands over."""


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a number in the weights, of the shortest where types are mixed."""
    return min((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)


def moved(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return max |one - other| / max |one|; infinite if that is NaN."""
    change = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(change) else change


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are equal bit for bit, but for the sign of zero."""
    return one.shape == other.shape and bool(torch.all((one == other) | (one.isnan() & other.isnan())))
