"""PyTorch's FSDP2 (``fully_shard``): every rank holds equal parts of the weights and gathers a layer while it computes.

* LoRA: the frozen base is sharded, adapters are on every rank (:class:`~.split.SplitStep`).
* All weights trained: weights, gradients and optimizer are sharded, and each rank works on its own units
  (:mod:`privtrain.clipping.sharded`). Where a shard group works on a unit together, FSDP reduces its gradient in fp32
  as a SUM.
* HSDP: a mesh of replicas times shards. Replicas add up their parts once a logical step.

accelerate launches, and its config says how many replicas there are; it cannot build FSDP on a CPU and is not asked to.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from privtrain.backends.base import Placement, digest
from privtrain.backends.noise_share import SharedNoise
from privtrain.backends.sharded import ShardedBackend
from privtrain.backends.shards import ArrivingShards
from privtrain.backends.split import SplitStep
from privtrain.errors import ConfigError, Fault
from privtrain.models.weights import BaseSource, PartReader
from privtrain.privacy.layout import Layout


def replicas_from_launch() -> int:
    """Return how many replicas the accelerate config asks for.

    Raises:
        ConfigError: if the config asks for something whose guarantee or effect we do not establish.
    """
    faults = []
    if os.environ.get("FSDP_VERSION", "2") != "2":
        faults.append(Fault("fsdp_config.fsdp_version", "is 1; set 2 (see launch/accelerate/fsdp2.yaml)"))
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        problem = "is not supported; set false, or use launch/accelerate/zero3-offload.yaml"
        faults.append(Fault("fsdp_config.fsdp_offload_params", problem))
    for name in ("TP", "CP", "SP"):  # tensor, context and sequence parallelism
        if int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) > 1:
            problem = "splits a unit's activations over ranks, which clipping does not support; set 1"
            faults.append(Fault(f"parallelism_config.parallelism_config_{name.lower()}_size", problem))
    if faults:
        raise ConfigError(faults, "accelerate config")
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))


class Fsdp2Backend(SharedNoise, ShardedBackend):
    """A base sharded by ``fully_shard`` over the ranks of one replica.

    Args:
        device: this rank's device.
        num_replicas: replicas of the sharded model; 1 shards over all ranks.
        timeout: of collectives among the ranks of a replica.

    Raises:
        ConfigError: if the number of replicas does not divide the number of ranks.
    """

    def __init__(self, device: torch.device, num_replicas: int = 1, timeout: datetime.timedelta | None = None) -> None:
        super().__init__(device)
        if num_replicas < 1 or self.world_size % num_replicas:
            problem = f"given {num_replicas}; must divide the {self.world_size} processes"
            raise ConfigError([Fault("parallelism_config_dp_replicate_size", problem)], "accelerate config")
        self.kind = "fsdp2" if num_replicas == 1 else f"fsdp2 ({num_replicas} replicas)"
        self._num_replicas = num_replicas
        size = self.world_size // num_replicas
        # Ranks that follow one another are a replica: its shard group. Ranks in the same place of every replica hold
        # the same part: their replicate group.
        self._replica = self.rank // size
        self._shard_group: Any = dist.group.WORLD
        self._replicate_group: Any = None
        if num_replicas > 1:
            replicas = [list(range(first, first + size)) for first in range(0, self.world_size, size)]
            same_place = [list(range(place, self.world_size, size)) for place in range(size)]
            # Every rank makes every group, as torch asks.
            shard_groups = [dist.new_group(ranks, timeout) for ranks in replicas]
            replicate_groups = [dist.new_group(ranks, timeout) for ranks in same_place]
            self._shard_group = shard_groups[self._replica]
            self._replicate_group = replicate_groups[self.rank % size]
        # FSDP knows of its own replica alone: adding up replicas is ours, once a logical step. The mesh has no names,
        # since PEFT takes a named one for tensor parallelism and makes adapters of the size of a part.
        self._mesh = DeviceMesh.from_group(self._shard_group, device.type)
        #: Where gradients are in parts: the model's trainable tensors, and this rank's parts, which are stepped.
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._layout = Layout({})

    @property
    @override
    def is_contributor(self) -> bool:
        return self._replica == 0

    @override
    def load_base(self, source: BaseSource) -> torch.nn.Module:
        """Load the base layer by layer: one layer at a time is whole, and only as empty memory."""
        with init_empty_weights(include_buffers=False):
            model = source.empty()
        model.tie_weights()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        layers = set(getattr(model, "_no_split_modules", None) or ())  # transformers' names of the layers' classes
        memo: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                _allocate(module, self.device, memo)
                self._shard(module)
        _allocate(model, self.device, memo)
        model = model.to(self.device)  # pyright: ignore[reportArgumentType] - buffers
        self._shard(model)
        self._fill(model, source.reader(shapes))
        return model

    @override
    def place(self, model: torch.nn.Module) -> Placement:
        """Split the step over all ranks if trained tensors are whole (LoRA); else step each rank's shards."""
        _reshard(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._split, self._shards, self._weights = None, None, {}  # forget a model that was placed before
        if not any(isinstance(p, DTensor) for p in trainable.values()):
            self._split = SplitStep(model, self.device, equal_passes=True)
            return self._split.placement
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gradients are to be added up over ranks, where FSDP takes their mean
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

        # The optimizer steps parameters of its own that share the memory of this rank's parts.
        stepped = {name: torch.nn.Parameter(_local(p)) for name, p in trainable.items()}
        # name → (first coordinate held, shape of the whole tensor)
        parts = {name: (_first(p), tuple(p.shape)) for name, p in trainable.items()}
        layout = Layout(stepped, parts)
        self._weights = {name: trainable[name] for name in layout.parameters}
        self._layout = layout

        reshard = functools.partial(_reshard, model)
        self._shards = ArrivingShards(trainable, layout, self._shard_group, self.device, reshard)
        return Placement(layout, layout, self.rank, self.world_size, self._shards, equal_passes=True)

    @override
    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the SUM over all ranks; each replica has added up its shard group's already."""
        if self._shards is not None and self._num_replicas > 1:
            assert total.dtype == torch.int64
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._replicate_group)
        return super().reduce_total(total)

    @override
    def holders(self) -> dist.ProcessGroup | None:
        """Return the ranks that hold this rank's part in every replica; ``None`` if no other rank holds it."""
        return self._replicate_group if self._shards is not None else None

    @override
    def publish(self) -> None:
        """Copy stepped values into the model's shards, where these are not the very memory that was stepped."""
        super().publish()
        for name, weight in self._weights.items():
            local, stepped = _local(weight), self._layout.parameters[name].detach()
            if local.data_ptr() != stepped.data_ptr():
                local.copy_(stepped)

    @override
    def local_tensors(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        _reshard(model)
        for name, parameter in model.named_parameters():
            yield name, _local(parameter) if isinstance(parameter, DTensor) else parameter.detach()

    @override
    def parameters_agree(self, model: torch.nn.Module) -> bool:
        """Return whether each rank's parts are bit-identical in all replicas."""
        if self._split is not None:
            return super().parameters_agree(model)
        digests = self.gather_digests(digest(list(self._layout.parameters.values())))
        size = self.world_size // self._num_replicas
        # Rank r holds the same part as rank r mod size, which is in the first replica.
        return all(digests[rank] == digests[rank % size] for rank in range(self.world_size))

    def _shard(self, module: torch.nn.Module) -> None:
        """Cut the module's weights over the shard group; gradients are added up over ranks in fp32."""
        fully_shard(module, mesh=self._mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))

    def _fill(self, model: torch.nn.Module, read: PartReader) -> None:
        """Read this rank's part of every weight."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                local = _local(parameter)
                if local.numel():
                    local.copy_(read(name, _first(parameter), local.numel()))


def _reshard(model: torch.nn.Module) -> None:
    """Reshard all weights: after a forward or an interrupted backward pass a model holds some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that is cut along its first dimension: flat, sharing memory."""
    assert isinstance(parameter, DTensor)
    return parameter.detach().to_local().view(-1)  # pyright: ignore[reportAttributeAccessIssue]


def _first(parameter: torch.Tensor) -> int:
    """Return the first coordinate, in the whole tensor, of this rank's part.

    FSDP gives each rank equally many rows, one after another; the last ranks' may be fewer or none.
    """
    assert isinstance(parameter, DTensor)
    mesh, num_rows = parameter.device_mesh, parameter.shape[0]
    rows_per_rank = -(-num_rows // mesh.size())  # rounded up
    first_row = min(mesh.get_local_rank() * rows_per_rank, num_rows)
    rows_held = min(rows_per_rank, num_rows - first_row)
    width = math.prod(parameter.shape[1:])
    assert _local(parameter).numel() == rows_held * width, "another way of sharding than Shard(0)"
    return first_row * width


def _allocate(
    module: torch.nn.Module, device: torch.device, memo: dict[torch.nn.Parameter, torch.nn.Parameter]
) -> None:
    """Give the module's weights memory but no values, where they have none (device "meta").

    ``memo`` keeps which new tensor stands for which old one, so that tied weights stay tied.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if parameter.is_meta and not isinstance(parameter, DTensor):
                if parameter not in memo:
                    empty = torch.empty_like(parameter, device=device)
                    memo[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(child, name, memo[parameter])
