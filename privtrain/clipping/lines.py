"""Clip the units of a line: every unit's gradient from its own tokens alone, in shapes that they alone decide.

A *line* (:mod:`privtrain.data.lines`) is a microbatch of one long row that holds the records of whole units, one after
another. The layers run on the whole line. The input of a layer and the gradient of its output are then moved into
*slots*, one for each unit, of a constant number and size: rows of a microbatch, which go through the layer's rule
(:mod:`.rules`) and :class:`.batched.UnitGradients` as any others. A unit with a line of its own is one row, where it
lies. (A layout's slots, the places of trainable tensors, are another thing of that name.)
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from privtrain.clipping import attention, fallback, opacus_rules, refusals
from privtrain.clipping.batched import UnitGradients
from privtrain.clipping.capture import captured
from privtrain.clipping.clipper import PerUnitClipper
from privtrain.clipping.passes import Passes
from privtrain.clipping.random_state import RandomState
from privtrain.clipping.rules import Gradient
from privtrain.data.lines import Line
from privtrain.data.microbatch import NOBODY, Microbatch
from privtrain.errors import GuaranteeLost, PrivtrainError, UnsupportedLayer

#: A line → [1, tokens] losses, each of its own record alone; zero where nothing is predicted.
TokenLosses = Callable[[Line], torch.Tensor]

#: Tokens of a line that are run as a row, to find trainable tensors that the hooks do not see.
_NUM_FIRST = 16
#: Tensors whose slots are kept for the next call: layers that share an input are called one after another.
_NUM_RECENT = 2


class Slots:
    """Moves tokens of a line into slots, a row for each unit.

    In a line that units share all slots have one length, a constant. A line for one unit is one slot as it is.

    Args:
        line: the line; its ``units`` are pairs of a unit's first token and one past its last.
        device: where its tensors are.
    """

    def __init__(self, line: Line, device: torch.device) -> None:
        self._shape = line.num_slots, line.slot_tokens
        # Of a line for one unit: where its tokens stop and padding begins.
        self._stop = line.units[0][1] if line.units and line.num_slots == 1 else line.num_tokens
        #: What tells a tensor from others, the tensor, and its slots.
        self._recent: collections.deque[tuple[tuple[object, ...], torch.Tensor, torch.Tensor]]
        self._recent = collections.deque(maxlen=_NUM_RECENT)
        if line.num_slots > 1:
            place = torch.arange(line.slot_tokens)  # of a token in its slot
            bounds = [*line.units, *[(0, 0)] * (line.num_slots - len(line.units))]  # slots without a unit are empty
            first, stop = (torch.tensor(side)[:, None] for side in zip(*bounds, strict=True))
            is_empty = place >= stop - first
            # Place in the line of each token of each slot. A slot is filled up with its unit's own first token, whose
            # gradient counts as zero there.
            self._index = (first + place.where(~is_empty, 0)).flatten().to(device, non_blocking=True)
            self._is_empty = is_empty.to(device, non_blocking=True)

    def rows(self, tokens: torch.Tensor, *, is_zero_beyond: bool) -> torch.Tensor:
        """Put each unit's tokens into a row: [1, tokens, …] → [slots, tokens of a slot, …].

        Args:
            tokens: a layer's input, or the gradient of its output.
            is_zero_beyond: whether zeros fill up a slot. Of two tensors that are multiplied, one is enough.
        """
        num_slots, _ = self._shape
        if num_slots == 1:
            return tokens[:, : self._stop]
        # The same memory in the same shape, not written to since.
        key = tokens.data_ptr(), tokens.shape, tokens.stride(), tokens.dtype, tokens._version, is_zero_beyond
        for known, _, rows in self._recent:
            if known == key:
                return rows
        rows = tokens[0].index_select(0, self._index).unflatten(0, self._shape)
        if is_zero_beyond:
            rows.masked_fill_(self._is_empty.view(*self._shape, *[1] * (rows.dim() - 2)), 0)
        # Holding the tensor keeps its address from being given to another one.
        self._recent.append((key, tokens, rows))
        return rows


class LinePasses(Passes):
    """:class:`.passes.Passes` over a line, whose units are told apart by their tokens.

    Args:
        line: the line.
        arguments: of ``Passes``; rows are the line's slots.
    """

    def __init__(self, line: Line, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_tokens = line.num_tokens
        self._slots_of_line = Slots(line, self._device)

    @override
    def _tells_apart(self, activation: torch.Tensor, output_gradient: torch.Tensor) -> bool:
        """Return whether one dimension of both is the line's tokens."""
        return all(self._tokens_first(value) is not None for value in (activation, output_gradient))

    def _tokens_first(self, value: torch.Tensor) -> torch.Tensor | None:
        """Return a view, [1, tokens, …]; ``None`` if no dimension, or more than one, may be the tokens."""
        shape, num_tokens = value.shape, self._num_tokens
        # As many heads as tokens, say: which of the two dimensions is which cannot be told.
        num_candidates = sum(size == num_tokens for size in shape[:-1])
        if value.dim() > 2 and num_candidates > 1:
            return None
        if shape[:2] == (1, num_tokens):
            return value
        if value.dim() == 4 and (shape[0], shape[2]) == (1, num_tokens):
            return value.transpose(1, 2)  # heads come before tokens
        if value.dim() == 2 and shape[0] == num_tokens:
            return value[None]  # rows and tokens in one dimension
        return None

    def _rows(self, value: torch.Tensor, *, is_zero_beyond: bool) -> torch.Tensor:
        """Return a layer's input, or the gradient of its output, in slots: see :meth:`Slots.rows`."""
        tokens = self._tokens_first(value)
        assert tokens is not None
        return self._slots_of_line.rows(tokens, is_zero_beyond=is_zero_beyond)

    @override
    def _gradients_of(
        self, module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor
    ) -> dict[str, Gradient]:
        """Apply the module's rule to rows of tokens, one for each unit's slot."""
        activation_rows = self._rows(activation, is_zero_beyond=False)
        gradient_rows = self._rows(output_gradient, is_zero_beyond=True)
        return super()._gradients_of(module, activation_rows, gradient_rows)

    @override
    def _sums(self, *values: torch.Tensor) -> torch.Tensor:
        """Return sums by slot, as the parent's by row."""
        return super()._sums(*(self._rows(value, is_zero_beyond=True) for value in values))


class LineClipper(PerUnitClipper):
    """A :class:`.clipper.PerUnitClipper` that also takes lines; rows go as they do there.

    Guarantee: as for ``PerUnitClipper``, with the self-test's proof that a unit adds the same bits wherever it stands.
    A line that cannot be computed exactly is refused: there is no other route for it.

    Args:
        token_losses: a line → [1, tokens] losses, each of its own record alone.
        arguments: of ``PerUnitClipper``.
        in_one_kernel: the attribute.
        options: of ``PerUnitClipper``.

    Attributes:
        in_one_kernel: whether attention within all records of a line goes through one kernel, where it fits.
    """

    def __init__(self, token_losses: TokenLosses, *arguments: Any, in_one_kernel: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._token_losses = token_losses
        self.in_one_kernel = in_one_kernel
        self._longest = 0  # tokens of the longest record so far
        # Why attention cannot be kept within records, or nothing. Looked at once, before the self-test remembers the
        # state of the model: transformers keeps what it finds.
        self._other_attention = attention.refusal(self._model)

    def refuse_lines(self) -> None:
        """Refuse what cannot work on lines, before any pass.

        Raises:
            UnsupportedLayer: naming what.
        """
        if self._equal_passes:
            raise UnsupportedLayer("ranks that gather a sharded base together need rows, of equal number")
        if self.route == "one_unit":
            raise UnsupportedLayer(self.fallback_reason or "units go one at a time, row by row")
        for name, module in self._modules.items():
            if self._rules[module] is opacus_rules.per_row:
                raise UnsupportedLayer(f"module {name!r} of type {type(module).__name__} needs each record in a row")
        if self._other_attention:
            raise UnsupportedLayer(self._other_attention)

    @override
    def accumulate(self, batch: Microbatch | Line) -> None:
        if isinstance(batch, Microbatch):
            super().accumulate(batch)
        else:
            self._accumulate_line(batch)

    def _accumulate_line(self, line: Line) -> None:
        """Add the units of a line; if something in it is not finite, each unit in a pass of its own."""
        if self._open is not None and line.owners[:1] != (self._open.owner,):
            raise GuaranteeLost("a unit's records are not contiguous across lines; this is a bug, report it")
        if self.route == "one_unit":
            raise UnsupportedLayer("lines need a rule for every layer; this is a bug, report it")
        if not line.owners:
            return  # of a rank with fewer units than others; no rank waits for another within a line
        longest = max((stop - first for first, stop in line.records), default=0)
        if longest > self._longest:
            refusals.refuse_rescaled_positions(self._model, longest)
            self._longest = longest
        self._refuse_hidden_uses(_first_tokens(line))
        before = RandomState.of(self._device)
        if self._add_line(line):
            return
        self.num_split += 1
        for index in range(len(line.owners)):
            with before.replayed():
                self._add_line(line.alone(index), is_alone=True)

    def _add_line(self, line: Line, *, is_alone: bool = False) -> bool:
        """Add the units of a line, or nothing and return false: something in it is not finite."""
        gradients = UnitGradients(self.layout, [1] * len(line.owners), self._device)
        names = {module: name for name, module in self._modules.items()}
        # Memory is reckoned for as many units as there may be, not as there are: what is deferred to a second pass is
        # multiplied in another way, and must not depend on who shares the line.
        num_rows = line.num_slots
        passes = LinePasses(
            line, names, self._rules, self._slots, gradients, num_rows, self._memory_budget, self._device
        )
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(attention.within_records(self._model, line, in_one_kernel=self.in_one_kernel))
                calls = stack.enter_context(captured(self._modules, list(self.layout.parameters.values()), 1))
                losses = passes.first(calls, lambda: self._token_losses(line) * line.token_weight)
                if line.owners and not self._is_rehearsed:
                    passes.rehearse(calls)
                    self._is_rehearsed = True
            except Exception as failure:
                if isinstance(failure, PrivtrainError) or fallback.is_elsewhere(failure):
                    raise
                raise UnsupportedLayer(f"a packed line failed: {fallback.in_words(failure)}") from failure
            measured = self._measured_once(losses, gradients)
            unit_losses = [sum(measured.losses[first:stop]) for first, stop in line.units]
            if not is_alone and len(unit_losses) > 1 and not measured.is_finite(unit_losses):
                return False
            for owner, loss in zip(line.owners, unit_losses, strict=True):
                self.diagnostics.add_loss(owner, loss)
            self._add_units(line, passes, calls, measured)
        return True


def _first_tokens(line: Line) -> Microbatch:
    """Return the first tokens of a line as a row of nobody's: to look at the model, not to train on."""
    return Microbatch(
        line.input_ids[:, :_NUM_FIRST],
        line.target_mask[:, :_NUM_FIRST],
        line.token_weight[:, 0],
        torch.full((1,), NOBODY, device=line.input_ids.device),
        owners=(),
        last_continues=False,
    )
