"""A microbatch waits for its device at most twice, and a tensor of LoRA costs at most three kernels more than plainly.

Kernels are counted on the CPU, where each operation that is no view would be one on a GPU.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from privtrain.clipping import PerUnitClipper, batched
from privtrain.data.lines import LinePacker
from privtrain.data.microbatch import Packer
from privtrain.models.losses import row_losses
from tests.privtrain.test_lines import make
from tests.privtrain.test_parity import build

_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select")
#: Operations of a microbatch as a whole, however many tensors are trained: factors and counts, mostly on the host.
_FIXED = 60
# fmt: off
_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand",
    "lift_fresh", "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as",
}
# fmt: on


class Counted(TorchDispatchMode):
    """Operations by name, copies to the host among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_kernels(self) -> int:
        # The slow path of a fused addition, which a GPU does not take, counts each tensor.
        names = {name for name in self.operations if name not in _VIEWS} - {"_foreach_add_"}
        return sum(self.operations[name] for name in names)


def counted(method: str, route: str, kind: str, monkeypatch) -> tuple[int, float]:
    """Return the waits of a microbatch, and its kernels beyond plain training's, by trained tensor."""
    model, layout = build("llama", method)
    users = [[np.arange(14) + user] for user in range(8)]
    packer = Packer(8, 16, 0) if kind == "rows" else LinePacker(128, 128, 8, 16, 0)
    batches = list(packer.pack(users, packer.num_batches(users)))
    if kind == "rows":
        losses = lambda ids, mask: row_losses(model, ids, mask)  # noqa: E731
        clipper = PerUnitClipper(model, layout, 0.3, losses, torch.device("cpu"), route=route)
    else:
        clipper = make(model, layout, route=route)
    clipper.accumulate(batches[0])  # what is looked at once
    copies: Counter[str] = Counter()
    right = {name: getattr(torch.Tensor, name) for name in ("cpu", "tolist")}
    for name in right:
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, name=name: copies.update([name]) or right[name](self, *a)
        )
    with Counted() as ours:
        clipper.accumulate(batches[0])
    for name, method_of_tensor in right.items():
        monkeypatch.setattr(torch.Tensor, name, method_of_tensor)
    ids = batches[0].input_ids
    with Counted() as plain:
        torch.autograd.grad(row_losses(model, ids, torch.ones_like(ids).bool()).sum(), list(layout.parameters.values()))
    waits = sum(ours.operations[name] for name in _WAITS) + sum(copies.values())
    return waits, (ours.num_kernels - plain.num_kernels - _FIXED) / len(layout.slots)


@pytest.mark.parametrize("kind", ["rows", "lines"])
@pytest.mark.parametrize(("method", "route"), [("lora", "auto"), ("full", "batched")])
def test_a_microbatch_waits_at_most_twice(kind, method, route, monkeypatch):
    waits, _ = counted(method, route, kind, monkeypatch)
    assert waits <= 2


def test_lora_costs_at_most_three_kernels_a_tensor(monkeypatch):
    _, kernels = counted("lora", "auto", "rows", monkeypatch)
    assert kernels <= 3


def test_mutant_norms_of_tensors_one_by_one_cost_more_kernels(monkeypatch):
    monkeypatch.setattr(batched, "_SMALL", 0)
    _, kernels = counted("lora", "auto", "rows", monkeypatch)
    assert kernels > 3


def test_mutant_a_look_at_every_norm_is_counted(monkeypatch):
    right = batched.UnitGradients.complete
    monkeypatch.setattr(
        batched.UnitGradients, "complete", lambda self, name: (right(self, name), self._dense[name].cpu())[0]
    )
    waits, _ = counted("lora", "auto", "rows", monkeypatch)
    assert waits > 2
