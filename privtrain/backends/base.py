"""What the trainer needs of a process group, and the parts that all replicated backends share.

A *share* is the units of a step that one rank works on. Where gradients are *sharded*, a rank holds a part of each
tensor; the ranks that together hold one copy are a *shard group*, and several groups are replicas of each other. A
:class:`~privtrain.privacy.layout.Layout` says which coordinates of which tensors a rank's vector has.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from typing_extensions import override

from privtrain.clipping.cooperative import GradientShards
from privtrain.models.weights import BaseSource
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.layout import Layout, Slot
from privtrain.privacy.noise import StepNoise, noised_vector


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the trainable tensors of a model are, as one rank sees it.

    Attributes:
        clipped: the tensors whose clipped sum this rank accumulates.
        stepped: the tensors, or parts of them, that this rank steps; the optimizer holds these.
        share: index of the share of a step's units that this rank works on.
        num_shares: shares into which a step's units are divided.
        shards: set where gradients are in parts. Ranks of a shard group then also work together, on units that no rank
            can clip by itself (:class:`~privtrain.clipping.sharded.ShardedClipper`).
        equal_passes: whether every rank must run equally many forward passes, because weights are gathered in them.
    """

    clipped: Layout
    stepped: Layout
    share: int
    num_shares: int
    shards: GradientShards | None = None
    equal_passes: bool = False

    @property
    def num_replicas(self) -> int:
        """How many shard groups there are; units that ranks work on together are divided among these."""
        return 1 if self.shards is None else self.num_shares // self.shards.size

    @property
    def replica(self) -> int:
        """Index of this rank's shard group: a group is ``shards.size`` ranks whose shares follow each other."""
        return 0 if self.shards is None else self.share // self.shards.size


class Backend(abc.ABC):
    """One rank's view of the job. Every method but ``describe`` is called by all ranks in the same order."""

    rank: int
    world_size: int
    device: torch.device
    #: Name of the backend and of what it shards. A step is replayed bit for bit only under the same kind.
    kind: str

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the only one that writes."""
        return self.rank == 0

    @abc.abstractmethod
    def describe(self) -> str:
        """Return a phrase for people: kind, ranks and device."""

    @abc.abstractmethod
    def load_base(self, source: BaseSource) -> torch.nn.Module:
        """Return the base model on this rank's device, frozen; sharded where the backend shards weights."""

    @abc.abstractmethod
    def place(self, model: torch.nn.Module) -> Placement:
        """Take charge of the model's trainable tensors, and return where they are.

        Called once for each model, when it is complete and on its device.
        """

    @abc.abstractmethod
    def reduce(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` (fp32 or int64, any shape) on every rank by its SUM over ranks."""

    @abc.abstractmethod
    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        """Return the SUM of all ranks' clipped sums, of those coordinates that this rank steps.

        Args:
            total: this rank's clipped sum: int64, laid out as ``Placement.clipped``.

        Returns:
            int64, laid out as ``Placement.stepped``; the same bits for the same units, however they are shared out.
        """

    def add_noise(
        self,
        total: torch.Tensor,
        layout: Layout,
        noise: StepNoise,
        *,
        exponent: int,
        stddev: float,
        history: NoiseHistory | None = None,
    ) -> torch.Tensor:
        """Return the fp32 sum with the step's noise, from the reduced int64 sum.

        Args:
            total: the sum, laid out as ``Placement.stepped``, in units of 2**``exponent``.
            layout: of the sum.
            noise: the key of this step and sum.
            exponent: of the sum's grid.
            stddev: of the fresh noise.
            history: where noise is correlated, the noise of the steps before, on the coordinates of
                :meth:`noised_layout`; this step's is added to it.

        Returns:
            Laid out as ``Placement.stepped``; the same bits on any number of ranks.
        """
        if history is not None:
            return history.release(total, noise)
        return noised_vector(total, layout, exponent=exponent, stddev=stddev, noise=noise)

    def noised_layout(self, layout: Layout) -> Layout:
        """Return the part of ``layout`` (``Placement.stepped``) whose noise this rank draws.

        All ranks together draw each coordinate's noise once.
        """
        return layout

    @abc.abstractmethod
    def apply(self, vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
        """Step the optimizer on ``vector / divide_by``, laid out as ``Placement.stepped``, and :meth:`publish`."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Put the parameters that each rank stepped into the model of every rank that computes with them."""

    @abc.abstractmethod
    def whole(self, slot: Slot, part: torch.Tensor) -> torch.Tensor | None:
        """Return a whole tensor on rank 0's CPU, put together from every rank's ``part``; ``None`` on other ranks.

        ``slot`` says which coordinates of which tensor this rank's part is.
        """

    @abc.abstractmethod
    def sum_parts(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` by its sum over the ranks that hold the parts of one copy of the trainable tensors."""

    def local_tensors(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what this rank holds of each of the model's tensors."""
        for name, parameter in model.named_parameters():
            yield name, parameter.detach()

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is set on any rank."""
        flags = torch.tensor([float(flag)], device=self.device)
        self.reduce(flags)
        return float(flags) != 0  # a sum that is not a number is no agreement either

    def from_main(self, make: Callable[[], bytes]) -> bytes:
        """Return rank 0's ``make()``, on every rank; the others do not call it."""
        return self._broadcast(make() if self.is_main else None)

    def json_from_main(self, make: Callable[[], Any]) -> Any:
        """Return the JSON value of rank 0's ``make()``, on every rank."""
        return json.loads(self.from_main(lambda: json.dumps(make()).encode()))

    @abc.abstractmethod
    def _broadcast(self, value: bytes | None) -> bytes:
        """Return rank 0's bytes, on every rank; the others pass ``None``."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Wait for every rank."""

    @abc.abstractmethod
    def main_alone(self) -> contextlib.AbstractContextManager[None]:
        """Return a block for work that rank 0 alone does and that may take long.

        All ranks enter the block and leave it together; meanwhile no collective's time-out runs. That rank 0 lives is
        for :class:`~.watch.Watch` to see. If it leaves by an error, the others find out in the collective at the end.
        """

    @abc.abstractmethod
    def gather_digests(self, value: bytes) -> list[bytes]:
        """Return every rank's 32 bytes, by rank, on every rank."""

    @abc.abstractmethod
    def combined_digest(self, value: bytes) -> bytes:
        """Return one digest for the job: this rank's if all hold the same, else that of all ranks' digests."""

    @abc.abstractmethod
    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors are bit-identical on every rank."""

    @abc.abstractmethod
    def parameters_agree(self, model: torch.nn.Module) -> bool:
        """Return whether every rank that holds a trainable tensor, or the same part of it, holds the same bits."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the process group."""


class ReplicatedBackend(Backend):
    """Reduction and update where every rank holds all trainable tensors: ``local`` and ``ddp``.

    All ranks step the same bits, so their parameters stay identical without a broadcast.
    """

    rank: int
    world_size: int
    device: torch.device

    @override
    def load_base(self, source: BaseSource) -> torch.nn.Module:
        return source.whole().to(self.device)  # pyright: ignore[reportArgumentType]

    @override
    def place(self, model: torch.nn.Module) -> Placement:
        layout = Layout.of(model)
        return Placement(layout, layout, share=self.rank, num_shares=self.world_size)

    @override
    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        self.reduce(total)
        return total

    @override
    def apply(self, vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
        step_optimizer(vector, layout, optimizer, divide_by)

    @override
    def publish(self) -> None:
        """Do nothing: the tensors that are stepped are the model's own."""

    @override
    def whole(self, slot: Slot, part: torch.Tensor) -> torch.Tensor | None:
        return part.detach().cpu().view(slot.whole_shape) if self.rank == 0 else None

    @override
    def sum_parts(self, vector: torch.Tensor) -> None:
        """Do nothing: every rank holds all parts."""

    @override
    def combined_digest(self, value: bytes) -> bytes:
        return value


def step_optimizer(vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
    """Step the optimizer on ``vector / divide_by``, on whichever device it keeps its parameters.

    ``vector`` is divided in place: a second one would be as large as all gradients.
    """
    vector.div_(divide_by)
    for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
        parameter.grad = layout.view(vector, slot).to(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def all_equal(values: Sequence[bytes]) -> bool:
    """Return whether all values are the same one."""
    return len(set(values)) == 1


def digest(tensors: Sequence[torch.Tensor]) -> bytes:
    """Return SHA-256 over the exact bits of the tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor.numel():
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.digest()


__all__ = ["Backend", "Placement", "ReplicatedBackend", "all_equal", "digest", "step_optimizer"]
