"""The backward passes over one microbatch: one where memory allows, two where it does not.

The first pass takes every unit's norm and keeps a layer's per-unit gradients only within a budget. A layer whose
gradients it drops is *deferred*. If there are any, a second pass runs over the same graph, from the head's input if the
head was kept and no further than to the layers it is needed for, and adds the clipped sum layer by layer (two passes:
Li et al. 2021, arXiv 2110.05679; here within the layers and not through re-weighted losses).

Why not the ordinary gradient of Σ_u factor_u · loss_u? Its backward pass would be rounded differently from the one
whose norms were taken; autocast would round the sum over all rows to bf16, so that a unit's presence changed what the
others add; a row that is NaN would poison everybody; and clipping per layer has no such loss. So the second pass is
the first one again, without the factors: it multiplies each unit's own rows by the unit's factor in fp32 as the
gradient of a layer is formed, and leaves rows of factor zero out. Dropout is the same because the forward pass is not
repeated, or repeated by gradient checkpointing from the random state that it stored. That the passes agree is checked,
for every layer and row, on sums over what both passes saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from privtrain.clipping.batched import UnitGradients
from privtrain.clipping.capture import Calls
from privtrain.clipping.factors import exact_fp32
from privtrain.clipping.random_state import RandomState
from privtrain.clipping.rules import Gradient, Rule
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.privacy.layout import Slot

_BYTES_OF_A_NUMBER = 4


class Passes:
    """All backward passes over one microbatch.

    Args:
        names: the modules that own trainable tensors, with their names in the model.
        rules: for each of them, how its rows' gradients follow from its input and output gradient (:mod:`.rules`).
        slots: for each of them, the places of its tensors in the layout, by the tensors' names within the module.
        gradients: where the first pass collects.
        num_rows: rows of the microbatch, padding included.
        memory_budget: bytes that per-unit gradients may take when the first pass is over, besides those of layers that
            share a tensor, which wait for each other in any case.
        device: where the tensors are.
        repeats_forward: whether a second pass runs the forward pass again, with the same dropout, because the graph of
            the first is good for one backward pass.
        starts_at_head: whether a second pass may begin at the head's input; not where weights are gathered for a whole
            pass, which begins with the losses.
        defers_refusals: whether a pass runs to its end where a layer's rows cannot be told apart, with the error in
            ``refusal``: ranks that gather weights together must all reach the end.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        rules: Mapping[nn.Module, Rule],
        slots: Mapping[nn.Module, Mapping[str, Slot]],
        gradients: UnitGradients,
        num_rows: int,
        memory_budget: float,
        device: torch.device,
        *,
        repeats_forward: bool = False,
        starts_at_head: bool = True,
        defers_refusals: bool = False,
    ) -> None:
        self.gradients = gradients
        self.refusal: UnsupportedLayer | None = None
        self._names = names
        self._rules = rules
        self._num_rows = num_rows
        self._memory_budget = memory_budget
        self._device = device
        self._slots = slots
        #: Modules that are called once, with tensors that no other module has: complete after this call.
        self._alone: set[nn.Module] = set()
        self._deferred: set[nn.Module] = set()
        #: What the first pass saw in a deferred module, as sums by row: :meth:`_sums`.
        self._seen: dict[nn.Module, torch.Tensor] = {}
        #: Where a second pass over the same graph starts: a tensor, and the gradient for it.
        self._start: tuple[torch.Tensor, torch.Tensor | None] | None = None
        #: Or the forward pass, and the random state that it began with.
        self._forward: tuple[Callable[[], torch.Tensor], RandomState] | None = None
        self._repeats_forward = repeats_forward
        self._starts_at_head = starts_at_head and not repeats_forward
        self._defers_refusals = defers_refusals

    def first(self, calls: Calls, row_losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the forward and the first backward pass; return [rows] losses without a graph.

        Args:
            calls: of the block that captures them.
            row_losses: the forward pass: [rows] weighted losses.

        Raises:
            UnsupportedLayer: if a layer's rows cannot be told apart. Nothing was added anywhere then.
        """
        # Run the forward pass, and choose which modules' gradients to defer.
        calls.sink = self._collect_or_defer if self._defers_refusals else self._collect
        before = RandomState.of(self._device) if self._repeats_forward else None
        losses = row_losses()
        calls.is_forward = False
        self._plan(calls)

        # A backward pass runs from the losses or, where a second one may start there, from the head's input ("neck").
        start: torch.Tensor = losses.sum()
        gradient_of_start: torch.Tensor | None = None
        neck = self._neck(calls, losses) if self._deferred and self._starts_at_head else None
        if neck is not None:
            # The part of the graph behind it, logits included, is freed here and not run again.
            (gradient_of_start,) = torch.autograd.grad(start, neck)
            start = neck
        calls.last = None  # lets go of a part of the graph
        keeps_graph = bool(self._deferred) and not self._repeats_forward
        torch.autograd.backward(start, gradient_of_start, retain_graph=keeps_graph)

        # Note where a second pass begins.
        if before is not None:
            self._forward = row_losses, before
        elif self._deferred:
            self._start = start, gradient_of_start
        return losses.detach()

    @property
    def is_complete(self) -> bool:
        """Whether the first pass keeps everything: a function of the model and the shape of the microbatch."""
        return not self._deferred

    @property
    def deferred(self) -> frozenset[str]:
        """Names of the slots that a second pass is for, the same whoever has a row in the microbatch."""
        return frozenset(slot.name for module in self._deferred for slot in self._slots[module].values())

    def rehearse(self, calls: Calls) -> None:
        """Run the second pass over every row without adding anything, to see whether it works on this model.

        Where it does not, nothing of the microbatch was added to the sum yet.
        """
        if not self.is_complete:
            everyone = torch.arange(self.gradients.num_rows, device=self._device)
            self.again(calls, lambda _slot, _gradient: None, everyone)

    def again(self, calls: Calls, add: Callable[[Slot, Gradient], None], used_rows: torch.Tensor) -> None:
        """Run one more pass over the graph, which hands ``add`` the gradient of every tensor that was deferred.

        Args:
            calls: of the block that captures them.
            add: called once for each tensor.
            used_rows: which rows ``add`` uses, by their places among the rows of units; what the layers see of these
                rows must be what they saw in the first pass.

        Raises:
            GuaranteeLost: if it is not, or a deferred module does not come by once.
        """
        missing = set(self._seen)  # deferred modules that this pass has not reached yet
        # Module → whether it saw other values than before, on the device. Looked at when all is added, so that nobody
        # waits for the device meanwhile: a sum that is wrong by then is never released.
        differs: dict[nn.Module, torch.Tensor] = {}

        def sink(module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> None:
            """Note if the second pass saw other values; hand a module's gradients to ``add`` if they were deferred."""
            if module not in self._deferred:
                return
            if module not in missing:
                raise GuaranteeLost(f"module {self._names[module]!r} was differentiated twice in one pass; report it")
            missing.discard(module)
            with exact_fp32(self._device):
                sums = self._sums(activation, output_gradient)
                before = self._seen[module]
                differs[module] = (sums.index_select(1, used_rows) != before.index_select(1, used_rows)).any()
                by_name = self._gradients_of(module, activation, output_gradient)
                for local_name, slot in self._slots[module].items():
                    add(slot, by_name[local_name])

        calls.sink = sink
        if self._forward is not None:
            row_losses, before = self._forward
            with before.replayed():
                row_losses().sum().backward()
        else:
            assert self._start is not None
            start, gradient_of_start = self._start
            anchors = [calls.anchors[module] for module in self._seen]  # goes no further back than to these
            torch.autograd.backward(start, gradient_of_start, retain_graph=True, inputs=anchors)
        self._refuse_differences(differs)
        if missing:
            names = sorted(self._names[module] for module in missing)
            raise GuaranteeLost(f"the second backward pass did not reach {names[:3]}; this is a bug, report it")

    def _refuse_differences(self, differs: Mapping[nn.Module, torch.Tensor]) -> None:
        """Raise if a second pass saw other values than the first: module → whether it did, still on the device."""
        if not differs:
            return
        for module, is_other in zip(differs, torch.stack(list(differs.values())).cpu().numpy(), strict=True):
            if is_other:
                raise GuaranteeLost(
                    f"module {self._names[module]!r} was not the same in two backward passes over the same rows "
                    "(random numbers outside torch, or kernels that are not deterministic); "
                    "set performance.clipping_route: batched or one_unit"
                )

    def _plan(self, calls: Calls) -> None:
        """Choose what to defer: modules that come last in the forward pass, so that the second pass can stop early.

        Modules are counted in the order of their first calls until the budget is spent; the others are deferred. What
        is called twice or shares a tensor is kept, since its uses wait for each other in any case.
        """
        num_owners: dict[str, int] = {}
        for slots in self._slots.values():
            for slot in slots.values():
                num_owners[slot.name] = num_owners.get(slot.name, 0) + 1
        num_bytes = 0
        for module, num_calls in calls.num_calls.items():
            if num_calls > 1 or any(num_owners[slot.name] > 1 for slot in self._slots[module].values()):
                continue
            self._alone.add(module)
            # Kept is a gradient for each row, or the factors that it is made of, whichever is less.
            dense = sum(slot.num_coordinates for slot in self._slots[module].values()) * self._num_rows
            num_bytes += _BYTES_OF_A_NUMBER * min(dense, calls.num_values[module])
            if num_bytes > self._memory_budget:
                self._deferred.add(module)

    def _neck(self, calls: Calls, losses: torch.Tensor) -> torch.Tensor | None:
        """Return the head's input if a second pass may start from it, else ``None``.

        The head is the module that was called last. It must be kept, and no path in the graph may lead from the losses
        to another module around its input. Searched from the losses backwards, without going beyond that input.
        """
        if calls.last is None:
            return None
        module, neck = calls.last
        if module in self._deferred or calls.num_calls[module] > 1 or neck.grad_fn is None:
            return None
        # Every module has a leaf of its own in the graph, its anchor: to reach another one's is a way around.
        others = {id(anchor) for other, anchor in calls.anchors.items() if other is not module}
        open_nodes, seen = [losses.grad_fn], {losses.grad_fn}
        while open_nodes:
            node = open_nodes.pop()
            if node is None or id(getattr(node, "variable", None)) in others:
                return None
            # The edges of the graph, against the direction of the forward pass: (node, which of its outputs).
            for earlier, output_nr in node.next_functions:
                if earlier is neck.grad_fn:
                    if output_nr != neck.output_nr:  # another output of the same node goes around the input
                        return None
                elif earlier is not None and earlier not in seen:
                    seen.add(earlier)
                    open_nodes.append(earlier)
        return neck

    def _collect_or_defer(self, module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> None:
        """Collect, but keep a refusal until the pass is over: other ranks wait in it."""
        try:
            self._collect(module, activation, output_gradient)
        except UnsupportedLayer as refusal:
            self.refusal = self.refusal or refusal

    def _tells_apart(self, activation: torch.Tensor, output_gradient: torch.Tensor) -> bool:
        """Return whether a layer's input and output gradient both have a first dimension for the rows."""
        if activation.dim() < 2 or output_gradient.dim() < 1:
            return False
        return activation.shape[0] == self._num_rows and output_gradient.shape[0] == self._num_rows

    def _gradients_of(
        self, module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor
    ) -> dict[str, Gradient]:
        """Apply the module's rule: name of a tensor within the module → its gradient of every row."""
        return self._rules[module](module, activation, output_gradient)

    def _sums(self, *values: torch.Tensor) -> torch.Tensor:
        """Return the sum of each value over each row, [values, rows of units]: what two passes are compared by.

        Equal values have equal sums, and other values hardly ever.
        """
        return finite(torch.stack([sums_by_row(value) for value in values])[:, self.gradients.rows])

    def _collect(self, module: nn.Module, activation: torch.Tensor, output_gradient: torch.Tensor) -> None:
        """Apply a module's rule, and keep its gradients or, of a deferred module, their norms alone."""
        if not self._tells_apart(activation, output_gradient):
            raise UnsupportedLayer(
                f"module {self._names[module]!r} saw an input of shape {tuple(activation.shape)} for {self._num_rows} "
                "rows; its tokens cannot be told apart by owner. Set performance.clipping_route: one_unit"
            )
        if not self.gradients.num_rows:  # padding alone: nothing to collect, but a second pass has to find its modules
            if module in self._deferred:
                self._seen[module] = self._sums(activation, output_gradient)
            return
        with exact_fp32(self._device):
            is_kept = module not in self._deferred
            by_name = self._gradients_of(module, activation, output_gradient)
            for local_name, slot in self._slots[module].items():
                if local_name not in by_name:
                    raise UnsupportedLayer(f"the rule of {self._names[module]!r} gives no gradient for {local_name!r}")
                self.gradients.add(slot.name, by_name[local_name])
                if not is_kept:
                    self.gradients.drop(slot.name)
                elif module in self._alone:
                    self.gradients.complete(slot.name)
            if not is_kept:
                self._seen[module] = self._sums(activation, output_gradient)


def slots_of(module: nn.Module, slot_of: Mapping[int, Slot]) -> dict[str, Slot]:
    """Return the slots of a module's own trainable tensors by their names within it, from slots by tensors' ids."""
    own = {name: slot_of.get(id(parameter)) for name, parameter in module.named_parameters(recurse=False)}
    return {name: slot for name, slot in own.items() if slot is not None}


def sums_by_row(value: torch.Tensor) -> torch.Tensor:
    """Return [rows] fp32 sums of [rows, …]."""
    return value.flatten(1).sum(dim=1, dtype=torch.float32)


def finite(sums: torch.Tensor) -> torch.Tensor:
    """Return ``sums`` with infinity for NaN: a row that is NaN in both passes is the same in both."""
    return sums.nan_to_num(nan=torch.inf)
