"""Clip the units of a line: every unit's gradient from its own tokens alone, in shapes that they alone decide.

The layers run on the whole line. What a layer saw and got back is then cut at the units' bounds, and each unit goes
through the layer's rule (:mod:`.rules`) and through :class:`.batched.UnitGradients` as the one row of a microbatch of
its own. So nothing that is computed for a unit has a shape, or a place in memory, that others decide.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from privtrain.clipping import attention, fallback, opacus_rules, refusals
from privtrain.clipping.batched import UnitGradients
from privtrain.clipping.capture import captured
from privtrain.clipping.clipper import PerUnitClipper
from privtrain.clipping.passes import Passes, finite, sums_by_row
from privtrain.clipping.random_state import RandomState
from privtrain.clipping.rules import Gradient
from privtrain.data.lines import Line, Span
from privtrain.data.microbatch import NOBODY, Microbatch
from privtrain.errors import GuaranteeLost, PrivtrainError, UnsupportedLayer
from privtrain.privacy.layout import Layout, Slot

#: A line → [1, tokens] losses, each of its own record alone; zero where nothing is predicted.
TokenLosses = Callable[[Line], torch.Tensor]

#: Bytes that a slice of a tensor must begin at a multiple of to be used in place: what torch's allocations begin at.
_ALIGNED_BYTES = {"cpu": 64}
_MOST_ALIGNED_BYTES = 512
#: Tokens that are run as a row of their own to see which layers the hooks do not.
_NUM_FIRST = 16


class ByUnit(list[Gradient]):
    """One tensor's gradient for each unit of a line: each with one row, all of the unit's tokens."""


class LineGradients(UnitGradients):
    """:class:`.batched.UnitGradients` of a line, each unit's in a collection of its own.

    Args:
        layout: the trainable tensors.
        num_units: units of the line.
        device: where the tensors are.
    """

    def __init__(self, layout: Layout, num_units: int, device: torch.device) -> None:
        super().__init__(layout, [1] * num_units, device)
        self._units = [UnitGradients(layout, [1], device) for _ in range(num_units)]

    @property
    @override
    def released(self) -> frozenset[str]:
        return self._units[0].released if self._units else frozenset()

    @override
    def add(self, name: str, gradient: Gradient | ByUnit) -> None:
        for unit, own in self._each(gradient):
            unit.add(name, own)

    @override
    def measure(self, name: str) -> None:
        for unit in self._units:
            unit.measure(name)

    @override
    def release(self, name: str) -> None:
        for unit in self._units:
            unit.release(name)

    @override
    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        squares, uncancelled = zip(*(unit.squares() for unit in self._units), strict=True)
        return torch.cat(squares, dim=1), torch.cat(uncancelled, dim=1)

    @override
    def tensor_of_unit(self, slot: Slot, index: int) -> torch.Tensor | None:
        return self._units[index].tensor_of_unit(slot, 0)

    @override
    def add_kept(self, name: str, out: torch.Tensor, weights: torch.Tensor) -> None:
        for i, unit in enumerate(self._units):
            unit.add_kept(name, out, weights[i : i + 1])

    @override
    def add_now(self, name: str, out: torch.Tensor, gradient: Gradient | ByUnit, weights: torch.Tensor) -> None:
        for i, (unit, own) in enumerate(self._each(gradient)):
            unit.add_now(name, out, own, weights[i : i + 1])

    @override
    def add_unit(self, out: torch.Tensor, gradient: Gradient | ByUnit, unit: int) -> None:
        collection, own = self._each(gradient)[unit]
        collection.add_unit(out, own, 0)

    @override
    def added_squares(self, squares: torch.Tensor) -> torch.Tensor | None:
        found = [unit.added_squares(squares[:, i : i + 1]) for i, unit in enumerate(self._units)]
        if all(value is None for value in found):
            return None
        return torch.cat([squares[:, i : i + 1] if v is None else v for i, v in enumerate(found)], dim=1)

    def _each(self, gradient: Gradient | ByUnit) -> list[tuple[UnitGradients, Gradient]]:
        assert isinstance(gradient, ByUnit)
        return list(zip(self._units, gradient, strict=True))


class LinePasses(Passes):
    """:class:`.passes.Passes` over a line, whose units are told apart by their tokens.

    Args:
        line: the line.
        arguments: of ``Passes``; ``num_rows`` is the most units that any line may have.
    """

    def __init__(self, line: Line, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_tokens = line.num_tokens
        self._spans = line.units

    @override
    def _tells_apart(self, activation: torch.Tensor, output_gradient: torch.Tensor) -> bool:
        return all(self._tokens_first(value) is not None for value in (activation, output_gradient))

    def _tokens_first(self, value: torch.Tensor) -> torch.Tensor | None:
        """Return a view, [1, tokens, …]; ``None`` if no dimension, or more than one, may be the tokens."""
        shape, num_tokens = value.shape, self._num_tokens
        if sum(size == num_tokens for size in shape[:-1] if value.dim() > 2) > 1:
            return None
        if shape[:2] == (1, num_tokens):
            return value
        if value.dim() == 4 and (shape[0], shape[2]) == (1, num_tokens):
            return value.transpose(1, 2)  # heads come before tokens
        if value.dim() == 2 and shape[0] == num_tokens:
            return value[None]  # rows and tokens in one dimension
        return None

    @override
    def _gradients_of(
        self, module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor
    ) -> dict[str, Any]:
        found: dict[str, ByUnit] = {}
        seen, returned = self._tokens_first(activation), self._tokens_first(output_gradient)
        assert seen is not None
        assert returned is not None
        for span in self._spans:
            own = self._rules[module](module, _own(seen, span), _own(returned, span))
            for name, gradient in own.items():
                found.setdefault(name, ByUnit()).append(gradient)
        return found

    @override
    def _sums(self, *values: torch.Tensor) -> torch.Tensor:
        if not self._spans:
            return torch.zeros(len(values), 0, device=self._device)
        tokens = [value for value in map(self._tokens_first, values) if value is not None]
        by_unit = [[sums_by_row(_own(value, span)) for span in self._spans] for value in tokens]
        return finite(torch.stack([torch.cat(sums) for sums in by_unit]))


def _own(value: torch.Tensor, span: Span) -> torch.Tensor:
    """Return a unit's tokens, [1, tokens, …], aligned as in memory of its own, so that mates do not decide how."""
    own = value[:, slice(*span)].contiguous()
    is_aligned = own.data_ptr() % _ALIGNED_BYTES.get(own.device.type, _MOST_ALIGNED_BYTES) == 0
    return own if is_aligned else own.clone()


class LineClipper(PerUnitClipper):
    """A :class:`.clipper.PerUnitClipper` that also takes lines; rows go as they do there.

    Guarantee: as for ``PerUnitClipper``, with the self-test's proof that a unit adds the same bits wherever it stands.
    A line that cannot be computed exactly is refused: there is no other route for it.

    Args:
        token_losses: a line → [1, tokens] losses, each of its own record alone.
        arguments: of ``PerUnitClipper``.
        options: likewise.
    """

    def __init__(self, token_losses: TokenLosses, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._token_losses = token_losses
        self._longest = 0
        # Looked at once, before the self-test remembers the state of the model: transformers keeps what it finds.
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
        if self._open is not None and line.owners[:1] != (self._open.owner,):
            raise GuaranteeLost("a unit's records are not contiguous across lines; this is a bug, report it")
        if self.route == "one_unit":
            raise UnsupportedLayer("lines need a rule for every layer; this is a bug, report it")
        longest = max((stop - first for first, stop in line.records), default=0)
        if longest > self._longest:
            refusals.refuse_rescaled_positions(self._model, longest)
            self._longest = longest
        self._refuse_hidden_uses(_first_tokens(line))
        before = RandomState.of(self._device)
        if self._add_line(line):
            return
        for index in range(len(line.owners)):
            with before.replayed():
                self._add_line(line.alone(index), is_alone=True)

    def _add_line(self, line: Line, *, is_alone: bool = False) -> bool:
        """Add the units of a line; false, and nothing added, if something in it is not finite."""
        gradients = LineGradients(self.layout, len(line.owners), self._device)
        names = {module: name for name, module in self._modules.items()}
        # As many units as there may be, not as there are: what is let go for want of memory is multiplied another way.
        most = line.num_tokens
        passes = LinePasses(line, names, self._rules, self._slots, gradients, most, self._memory_budget, self._device)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(attention.within_records(self._model, line))
                calls = stack.enter_context(captured(self._modules, list(self.layout.parameters.values()), 1))
                losses = passes.first(calls, lambda: self._token_losses(line) * line.token_weight)[0].tolist()
                if line.owners and not self._is_rehearsed:
                    passes.rehearse(calls)
                    self._is_rehearsed = True
            except Exception as failure:
                if isinstance(failure, PrivtrainError) or fallback.is_elsewhere(failure):
                    raise
                raise UnsupportedLayer(f"a packed line failed: {fallback.in_words(failure)}") from failure
            own = [sum(losses[first:stop]) for first, stop in line.units]
            is_finite = all(math.isfinite(loss) for loss in own) and self._is_finite(gradients)
            if not is_finite and not is_alone and len(own) > 1:
                return False
            for owner, loss in zip(line.owners, own, strict=True):
                self.diagnostics.add_loss(owner, loss)
            self._add_units(line, passes, calls)
        return True


def _first_tokens(line: Line) -> Microbatch:
    """Return the first tokens of a line as a row: to look at the model, not to train on."""
    return Microbatch(
        line.input_ids[:, :_NUM_FIRST],
        line.target_mask[:, :_NUM_FIRST],
        line.token_weight[:, 0],
        torch.full((1,), NOBODY, device=line.input_ids.device),
        owners=(),
        last_continues=False,
    )
