"""ZeRO stages 1 to 3, launched by a DeepSpeed config.

* Stage 1, and LoRA at any stage: each rank sums its own units; one reduce-scatter, own part noised and stepped, one
  all-gather (:class:`~.split.SplitStep`).
* Stages 2 and 3 with all weights trained: gradients are in parts too; each rank works on its own units
  (:mod:`privtrain.clipping.sharded`).
* Stage 3: DeepSpeed shards the weights and gathers a layer while it computes.

DeepSpeed is driven where it brings something that torch does not: ``zero.Init`` and the stage 3 engine. Its optimizer
is not used: between its gradient reduction and its step there is no place for clipping per unit and for noise on a
rank's own part, and its step skips updates when gradients overflow, which a private step must not. What stages 1 and 2
do is a reduce-scatter, a step on a part and an all-gather; that is done here, in fp32, over named parts of tensors, so
that noise, replay and checkpoints are the same as in every other backend. The optimizer may live on the CPU
(``offload_optimizer``).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from privtrain.backends.base import Placement
from privtrain.backends.group import all_gather_flat
from privtrain.backends.sharded import ShardedBackend
from privtrain.backends.shards import ReducedShards, equal_part, part_size
from privtrain.backends.split import SplitStep
from privtrain.errors import ConfigError, Fault
from privtrain.models.weights import BaseSource
from privtrain.privacy.layout import Layout


@dataclasses.dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed config has a meaning here.

    Attributes:
        stage: 1, 2 or 3.
        offload_optimizer: whether parameters and optimizer state of a rank's parts are kept on the CPU.
    """

    stage: int
    offload_optimizer: bool = False

    @classmethod
    def from_launch(cls) -> ZeroSettings:
        """Read the accelerate config, or the DeepSpeed JSON file that it names.

        Raises:
            ConfigError: naming every setting that privtrain cannot honour.
        """
        from accelerate.utils import DeepSpeedPlugin

        config: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
        zero: dict[str, Any] = config.get("zero_optimization", {})
        faults = [Fault(f"zero_optimization.{key}", problem) for key, problem in _zero_faults(zero)]
        if _number(config.get("gradient_clipping")):
            problem = "clips the noised sum once more; set 0.0 (privacy.clipping_norm clips each unit)"
            faults.append(Fault("gradient_clipping", problem))
        if config.get("fp16", {}).get("enabled") is True:
            problem = "skips steps that overflow, which depends on the data; set performance.precision instead"
            faults.append(Fault("fp16.enabled", problem))
        if faults:
            raise ConfigError(faults, "DeepSpeed config")
        device = (zero.get("offload_optimizer") or {}).get("device", "none")
        return cls(int(zero["stage"]), offload_optimizer=device == "cpu")


def _zero_faults(zero: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) of ZeRO options that cannot be honoured."""
    if zero.get("stage") not in (1, 2, 3):
        yield "stage", f"given {zero.get('stage')}; must be 1, 2 or 3 (for none, launch/accelerate/ddp.yaml)"
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        allowed = ("none", "cpu") if name == "offload_optimizer" else ("none",)
        if device not in allowed:
            yield f"{name}.device", f"given {device}; must be {' or '.join(allowed)}"
    for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            yield name, "rounds what is exchanged; set false"
    if _number(zero.get("zero_hpz_partition_size")) > 1:
        yield "zero_hpz_partition_size", "is not supported; set 1"


def _number(value: Any) -> float:
    """Return a setting as a number; 0 if it is none, such as "auto"."""
    return float(value) if isinstance(value, int | float) else 0.0


class ZeroBackend(ShardedBackend):
    """Optimizer, gradients and weights in parts, by stage."""

    def __init__(self, device: torch.device, settings: ZeroSettings) -> None:
        super().__init__(device)
        self.settings = settings
        self.kind = f"zero{settings.stage}" + ("-offload" if settings.offload_optimizer else "")
        self._optimizer_device = torch.device("cpu") if settings.offload_optimizer else device
        #: Where gradients are in parts: the model's trainable tensors, and this rank's part of each, which is stepped.
        #: Both empty where a :class:`.SplitStep` does the step: at stage 1, and of LoRA at any stage.
        self._weights_in_parts: dict[str, torch.nn.Parameter] = {}
        self._layout = Layout({})
        #: DeepSpeed's, at stage 3.
        self._engine: Any = None

    @override
    def load_base(self, source: BaseSource) -> torch.nn.Module:
        """Load the base; at stage 3 each module is cut into parts as soon as it is made, and filled part by part."""
        if self.settings.stage < 3:
            return source.whole().to(self.device)  # pyright: ignore[reportArgumentType]
        import deepspeed
        from transformers.initialization import no_init_weights
        from transformers.integrations.deepspeed import prevent_arange_dtype_change

        with torch.device("meta"):
            source.empty()  # whatever it imports must not be imported while zero.Init has torch.Tensor replaced
        os.environ.setdefault("LOCAL_RANK", str(self.rank))  # deepspeed.zero.Init asks for it
        config = _stage_3_config()
        if self.device.type == "cpu":
            # Else it compiles a library at the first start, under a lock that a killed start leaves behind for good.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Not by `dtype=`: on a processor without fp16, DeepSpeed 0.19.8 takes bf16 whatever is asked for.
        is_bf16 = source.dtype == torch.bfloat16
        cut = deepspeed.zero.Init(config_dict_or_path={**config, "bf16": {"enabled": is_bf16}})
        # zero.Init would make the frequencies of rotary positions in the dtype of the weights.
        with prevent_arange_dtype_change(), cut, no_init_weights():
            model = source.empty()
        model.tie_weights()
        parameters = dict(model.named_parameters())
        read = source.reader({name: _shape(p) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            first, count = equal_part(math.prod(_shape(parameter)), self.rank, self.world_size)
            if count:
                _part(parameter)[:count].copy_(read(name, first, count))
        self._engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
        held = {_part(parameter).dtype for parameter in parameters.values()}
        assert held == {source.dtype}, f"DeepSpeed holds the weights in {held}, not {source.dtype}"
        return model

    @override
    def place(self, model: torch.nn.Module) -> Placement:
        """Split the step as stage 1 does if gradients stay whole; else step this rank's part of each tensor."""
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        is_sharded = any(_is_partitioned(p) for p in trainable.values())
        self._split, self._shards, self._weights_in_parts, self._layout = None, None, {}, Layout({})
        if self.settings.stage == 1 or not (is_sharded or _trains_everything(model)):
            self._split = SplitStep(model, self._optimizer_device, equal_passes=self.settings.stage == 3)
            return self._split.placement
        stepped: dict[str, torch.nn.Parameter] = {}
        parts: dict[str, tuple[int, tuple[int, ...]]] = {}  # name → (first coordinate held, shape of the whole tensor)
        for name, parameter in trainable.items():
            first, count = equal_part(math.prod(_shape(parameter)), self.rank, self.world_size)
            stepped[name] = torch.nn.Parameter(self._mine(parameter, first, count).to(self._optimizer_device))
            parts[name] = (first, _shape(parameter))
        self._layout = Layout(stepped, parts)
        self._weights_in_parts = trainable
        self._shards = ReducedShards(trainable, self._layout, None, self.device, repeats_backward=not is_sharded)
        return Placement(self._layout, self._layout, self.rank, self.world_size, self._shards, equal_passes=True)

    @override
    def publish(self) -> None:
        """Put what the ranks have stepped into the model of every rank.

        * Stage 1, and LoRA at any stage: the super class gathers all parts. ``_weights_in_parts`` and ``_layout`` are
          empty then, and nothing else is done.
        * Stage 2, all weights trained: the model's tensors are whole on every rank; each is filled from all parts.
        * Stage 3, all weights trained: of each tensor the model holds this rank's part alone, which is filled.

        This rank's part is copied only where its optimizer keeps it elsewhere (``offload_optimizer``).
        """
        super().publish()
        if self._engine is not None and self._weights_in_parts:
            # DeepSpeed keeps a layer whose backward it did not see, such as the embedding, with its old values.
            self._engine.optimizer.partition_all_parameters()
        for slot in self._layout.slots:
            weight, mine = self._weights_in_parts[slot.name], self._layout.parameters[slot.name].detach()
            local = self._mine(weight, slot.first, slot.num_coordinates)
            if local.data_ptr() != mine.data_ptr():  # else the optimizer has stepped the model's own memory
                local.copy_(mine)
            if not _is_partitioned(weight):
                self._gather(weight, local)

    @override
    def local_tensors(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            yield name, _part(parameter) if _is_partitioned(parameter) else parameter.detach()

    @override
    def parameters_agree(self, model: torch.nn.Module) -> bool:
        """Return true for parts of stage 3, which have no second copy; else compare."""
        has_parts = bool(self._weights_in_parts) and self.settings.stage == 3
        return has_parts or super().parameters_agree(model)

    def _mine(self, weight: torch.nn.Parameter, first: int, count: int) -> torch.Tensor:
        """Return this rank's ``count`` coordinates of a tensor from ``first`` on: flat, sharing memory."""
        if _is_partitioned(weight):
            return _part(weight)[:count]
        return weight.detach().view(-1)[first : first + count]

    def _gather(self, weight: torch.nn.Parameter, local: torch.Tensor) -> None:
        """Fill a weight that is whole on every rank from every rank's part, of which ``local`` is this rank's."""
        size = part_size(weight.numel(), self.world_size)
        gathered = torch.empty(size * self.world_size, dtype=weight.dtype, device=weight.device)
        all_gather_flat(gathered, torch.nn.functional.pad(local, (0, size - len(local))))
        weight.detach().view(-1).copy_(gathered[: weight.numel()])


def _stage_3_config() -> dict[str, Any]:
    """Return what DeepSpeed needs to cut modules as they are made."""
    zero = {
        "stage": 3,
        # A small tensor that stays whole on every rank would not see its own update.
        "stage3_param_persistence_threshold": 0,
    }
    return {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero}


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether stage 3 has cut a tensor, which then has DeepSpeed's attributes."""
    return hasattr(parameter, "ds_tensor")


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return this rank's part of a tensor that stage 3 cut: flat, padded, sharing memory."""
    part: torch.Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return part.detach()


def _trains_everything(model: torch.nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters())
