"""Exact joint clipping: the sum over units of each unit's whole gradient, scaled to at most the clipping norm.

A unit's gradient is formed over all of its rows in the step, also when they span microbatches, and clipped once
(user-wise DP-SGD: Chua et al. 2024, arXiv 2406.14322, section 3). The norm is taken of the very fp32 tensors that are
summed, so no cancellation, autocast or rounding in forward and backward can loosen the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from privtrain.clipping import rules
from privtrain.clipping.capture import captured
from privtrain.data.microbatch import Microbatch
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.layout import Layout

#: (input_ids, target_mask) → [rows] losses, each of its own row alone.
RowLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class ClippingDiagnostics:
    """What happened on this rank in a step. Private: none of it is covered by ε."""

    num_units: int = 0
    num_clipped: int = 0
    num_nonfinite: int = 0
    sum_norms: float = 0.0
    sum_losses: float = 0.0


@dataclasses.dataclass
class _OpenUnit:
    """A unit whose rows continue in the next microbatch, with its gradient so far."""

    owner: int
    gradients: dict[str, torch.Tensor]


class PerUnitClipper:
    """Accumulates Σ_u g_u · min(1, C / ‖g_u‖) over the units of a step.

    Guarantee: for the add-or-remove-one relation the L2 sensitivity of ``total`` is ``sensitivity`` (times 1 + 1e-5 for
    fp32 rounding), whatever the unit's records; a unit whose gradient is not finite contributes zero. Assumes that
    ``row_losses`` gives each row a loss of that row alone; the start-up self-test compares with plain autograd.

    Args:
        model: the model that ``row_losses`` runs.
        layout: its trainable tensors.
        clipping_norm: C > 0.
        row_losses: see :data:`RowLosses`.
        device: where ``total`` lives.

    Raises:
        UnsupportedLayer: if a trainable tensor belongs to a layer without an exact rule.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, clipping_norm: float, row_losses: RowLosses, device: torch.device
    ) -> None:
        self.layout = layout
        self.total = layout.zeros(device)
        self.diagnostics = ClippingDiagnostics()
        self._clipping_norm = clipping_norm
        self._row_losses = row_losses
        self._device = device
        self._modules, self._rules, self._names = _cover(model, layout)
        self._open: _OpenUnit | None = None

    @property
    def sensitivity(self) -> float:
        """Largest change of ``total``, summed over ranks, when one unit is added or removed."""
        return self._clipping_norm

    def reset(self) -> None:
        """Begin a step."""
        self.total.zero_()
        self.diagnostics = ClippingDiagnostics()
        self._open = None

    def accumulate(self, batch: Microbatch) -> None:
        """Add the clipped gradients of the units that end in ``batch``; keep the one that continues.

        Args:
            batch: rows on this clipper's device; the units of a rank come in the same order in every microbatch.
        """
        gradients = self._unit_gradients(batch)
        if self._open is not None:
            if batch.owners[:1] != (self._open.owner,):
                raise GuaranteeLost("a unit's rows are not contiguous across microbatches; this is a bug, report it")
            for name, value in self._open.gradients.items():
                gradients[name][0] += value
            self._open = None
        complete = len(batch.owners)
        if batch.last_continues:
            complete -= 1
            self._open = _OpenUnit(batch.owners[-1], {name: g[-1].clone() for name, g in gradients.items()})
        self._add_clipped({name: g[:complete] for name, g in gradients.items()}, complete)

    def finish(self) -> torch.Tensor:
        """End the step on this rank and return the flat clipped sum.

        Raises:
            GuaranteeLost: if a unit was left open, or an unclipped gradient exists on a trainable tensor.
        """
        if self._open is not None:
            raise GuaranteeLost("the last unit of the step was never closed; this is a bug, report it")
        loose = [name for name, p in self.layout.parameters.items() if p.grad is not None]
        if loose:
            raise GuaranteeLost(f"unclipped gradients appeared on {loose[:3]}; something else runs a backward pass")
        return self.total

    def _unit_gradients(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """Per-unit gradients of this microbatch alone: name → [units, *shape], fp32."""
        num_rows = batch.input_ids.shape[0]
        kept = batch.owner >= 0
        owner = batch.owner[kept]
        found: dict[str, torch.Tensor] = {
            slot.name: torch.zeros((len(batch.owners), *slot.shape), dtype=torch.float32, device=self._device)
            for slot in self.layout.slots
        }

        def sink(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> None:
            if activation.dim() != 3 or activation.shape[0] != num_rows or output_gradient.shape[0] != num_rows:
                raise UnsupportedLayer(
                    f"module {self._names[module]!r} saw an input of shape {tuple(activation.shape)} for {num_rows} "
                    "rows; its tokens cannot be told apart by owner"
                )
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                per_row = self._rules[module](module, activation[kept].float(), output_gradient[kept].float())
                for local_name, value in per_row.items():
                    name = _join(self._names[module], local_name)
                    if name in found:
                        found[name].index_add_(0, owner, value)

        with captured(self._modules, list(self.layout.parameters.values()), sink):
            losses = self._row_losses(batch.input_ids, batch.target_mask) * batch.row_weight
            losses.sum().backward()
        self.diagnostics.sum_losses += float(losses.detach().nansum())
        return found

    def _add_clipped(self, gradients: dict[str, torch.Tensor], num_units: int) -> None:
        if num_units == 0:
            return
        squares = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()])
        norms = torch.linalg.vector_norm(squares, dim=0)
        finite = torch.isfinite(norms)
        factors = torch.where(finite, self._clipping_norm / norms.clamp(min=self._clipping_norm), 0.0)
        for slot in self.layout.slots:
            # 0 · NaN is NaN, so a non-finite unit is masked out, not multiplied away.
            clean = gradients[slot.name].flatten(1)
            clean = clean if bool(finite.all()) else torch.where(finite[:, None], clean, 0.0)
            self.layout.view(self.total, slot).add_((factors @ clean).view(slot.shape))
        self.diagnostics.num_units += num_units
        self.diagnostics.num_clipped += int((norms[finite] > self._clipping_norm).sum())
        self.diagnostics.num_nonfinite += int((~finite).sum())
        self.diagnostics.sum_norms += float(norms[finite].sum())


def _join(module_name: str, parameter_name: str) -> str:
    return f"{module_name}.{parameter_name}" if module_name else parameter_name


def _cover(
    model: nn.Module, layout: Layout
) -> tuple[dict[str, nn.Module], dict[nn.Module, rules.Rule], dict[nn.Module, str]]:
    """Find the module and rule of every trainable tensor, or refuse."""
    wanted = {id(p): name for name, p in layout.parameters.items()}
    modules: dict[str, nn.Module] = {}
    covered: set[int] = set()
    for module_name, module in model.named_modules():
        own = [(_join(module_name, local), p) for local, p in module.named_parameters(recurse=False)]
        trainable = [(name, p) for name, p in own if id(p) in wanted]
        if not trainable:
            continue
        for name, parameter in trainable:
            if id(parameter) in covered:
                raise UnsupportedLayer(f"{name!r} is tied to {wanted[id(parameter)]!r}; a tied tensor has no rule yet")
            if wanted[id(parameter)] != name:
                raise UnsupportedLayer(
                    f"{name!r} is also known as {wanted[id(parameter)]!r}; a tied tensor has no rule yet"
                )
            covered.add(id(parameter))
        modules[module_name] = module
    missing = sorted(name for key, name in wanted.items() if key not in covered)
    if missing:
        raise UnsupportedLayer(f"trainable tensors that no module owns: {missing[:5]}")
    if not modules:
        raise UnsupportedLayer("the model has no trainable tensor")
    names = {module: name for name, module in modules.items()}
    return modules, {module: rules.rule_for(name, module) for name, module in modules.items()}, names
