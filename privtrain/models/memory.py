"""Memory of one rank by part, from the configuration alone: the model is built on torch's meta device, without weights.

Activations are counted, not guessed: one forward pass on the meta device, and the sizes of the tensors that autograd
saves. What a fused attention kernel would not keep (rows x heads x tokens x tokens) is left out. Allocator overhead,
kernels' workspaces and the framework itself (about 1 GiB on CUDA) come on top.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from privtrain.config import Config
from privtrain.errors import ConfigError, Fault, PrivtrainError
from privtrain.files import reading
from privtrain.run.base_model import locate

if TYPE_CHECKING:
    import torch

    from privtrain.data.lines import LinePacker

_FP32_BYTES = 4
#: The clipped sum is integers.
_SUM_BYTES = 8
#: AdamW keeps two moments a parameter, in fp32.
_OPTIMIZER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class LaunchLayout:
    """What of the model is divided among ranks, from an accelerate config.

    Attributes:
        num_ranks: processes over all machines.
        shards_parameters: ZeRO-3, FSDP2: base and trained weights are divided.
        shards_gradients: ZeRO-2 and above.
        shards_optimizer: ZeRO-1 and above.
        offloads_optimizer: optimizer state lies in the host's memory.
    """

    num_ranks: int = 1
    shards_parameters: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    offloads_optimizer: bool = False

    @classmethod
    def from_accelerate(cls, path: pathlib.Path) -> LaunchLayout:
        """Read an accelerate config.

        Raises:
            ConfigError: if the file is none.
        """
        try:
            content = reading.read_yaml(path, follow_links=True)
            kind = content["distributed_type"]
            num_ranks = int(content["num_processes"])
        except (PrivtrainError, KeyError, TypeError, ValueError) as error:
            raise ConfigError([Fault("--accelerate", f"{path} is not an accelerate config: {error!r}")]) from None
        deepspeed = content.get("deepspeed_config") or {}
        stage = int(deepspeed.get("zero_stage", 0)) if kind == "DEEPSPEED" else 0
        fsdp = kind == "FSDP"
        return cls(
            num_ranks,
            shards_parameters=fsdp or stage >= 3,
            shards_gradients=fsdp or stage >= 2,
            shards_optimizer=fsdp or stage >= 1,
            offloads_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
        )


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What the model of a run amounts to.

    Attributes:
        num_trained: trained parameters.
        memory_bytes: part → bytes of device memory on one rank.
    """

    num_trained: int
    memory_bytes: dict[str, int]


def model_size(config: Config, layout: LaunchLayout, num_bands: int = 1) -> ModelSize:
    """Return trained parameters, and device memory of one rank by part.

    Args:
        config: a valid configuration; the model's own config must be at hand, its weights need not.
        layout: how the job is launched.
        num_bands: of the noise; the history of correlated noise holds a sum for each band but one.

    Raises:
        ConfigError: if the model's config cannot be loaded.
    """
    import torch

    is_full = config.training.releases_model
    dtype = torch.float32 if is_full or config.performance.precision == "fp32" else torch.bfloat16
    model, base = meta_model(config, dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    parameters = layout.num_ranks if layout.shards_parameters else 1
    gradients = layout.num_ranks if layout.shards_gradients and is_full else 1
    optimizer = layout.num_ranks if layout.shards_optimizer and is_full else 1
    rows = config.performance.microbatch_size
    if config.performance.packing == "lines":  # "auto" may keep rows
        rows = max(num_slots for _, num_slots in _line_packer(config).slots())
    in_parts = is_full and layout.shards_gradients
    holds_no_unit = in_parts and config.performance.clipping_route == "two_pass"
    units = 0 if holds_no_unit else 1 if is_full else rows
    state_bytes = _OPTIMIZER_BYTES + (_FP32_BYTES if config.training.num_averaged_steps else 0)
    # Reduced into parts of its own where each rank has a whole one.
    num_sums = 2 if layout.shards_optimizer and not in_parts else 1
    parts = {
        "frozen base": frozen // parameters,
        "trained weights": trained * _FP32_BYTES // (parameters if is_full else 1),
        "optimizer state": 0 if layout.offloads_optimizer else trained * state_bytes // optimizer,
        "clipped sum and noise": (num_sums * _SUM_BYTES + _FP32_BYTES) * trained // gradients,
        "gradients of units": units * trained * _FP32_BYTES // gradients,
    }
    if in_parts and config.performance.reduce_once:
        parts["sum of own units"] = trained * _SUM_BYTES
    elif in_parts:  # one tensor of the clipped sum is whole, until its parts are with their ranks
        parts["tensor on its way"] = max(p.numel() for p in model.parameters() if p.requires_grad) * _SUM_BYTES
    if num_bands > 1:
        parts["history of noise"] = (num_bands - 1) * trained * _SUM_BYTES // layout.num_ranks
    activations, logits = _activation_bytes(config, model, base)
    return ModelSize(trained, {**parts, "activations": activations, "logits": logits})


def meta_model(config: Config, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model of a configuration with what is trained of it, and its base, without values.

    Raises:
        ConfigError: if the model's config cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from privtrain.models.trainable import make_trainable

    if config.training.has_virtual_tokens:
        raise ConfigError([Fault("training.method", f"memory is not estimated for {config.training.method}")])
    location = locate(config.model)
    try:
        architecture = AutoConfig.from_pretrained(location.path, **location.arguments)
    except (OSError, ValueError) as error:
        problem = f"cannot load the model's config from {location.path}: {str(error).splitlines()[0]}"
        raise ConfigError([Fault("model", problem)]) from None
    architecture.use_cache = False
    kind = AutoModelForCausalLM
    if config.data.labels is not None:
        kind, architecture.num_labels = AutoModelForSequenceClassification, len(config.data.labels)
        architecture.get_text_config().pad_token_id = architecture.pad_token_id or 0
    with torch.device("meta"):
        base = kind.from_config(architecture, dtype=dtype)
        return make_trainable(base.requires_grad_(False), config, 0), base


def _activation_bytes(config: Config, model: Any, base: Any) -> tuple[int, int]:
    """Return bytes that a microbatch's forward pass keeps, and those of logits and their gradient."""
    import torch

    from privtrain.models.head_loss import CHUNK

    rows, tokens = config.performance.microbatch_size, config.data.max_length
    is_line = config.performance.packing == "lines"
    if is_line:
        rows, tokens = 1, _line_packer(config).num_tokens
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd saves, but for weights and attention matrices, which kernels do not keep."""
        storage = tensor.untyped_storage()
        is_attention = tensor.dim() >= 3 and tensor.shape[-2:] == (tokens, tokens)
        if storage._cdata not in weights and not is_attention:
            saved[storage._cdata] = tensor
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    # A ready-made mask: transformers would look into the values of one that it makes itself.
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=base.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=mask).logits
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if config.performance.gradient_checkpointing:
        num_layers = int(base.config.num_hidden_layers)
        inputs = num_layers * rows * tokens * int(base.config.hidden_size) * base.dtype.itemsize
        total = inputs + total // num_layers
    if not is_line:  # log-probabilities in fp32 and their gradient
        return total, 2 * logits.numel() * _FP32_BYTES
    head = base.get_output_embeddings()
    if head is None or any(p.requires_grad for p in head.parameters()):
        return total, 2 * logits.numel() * logits.element_size()
    return total, 2 * min(tokens, CHUNK) * logits.shape[-1] * _FP32_BYTES


def _line_packer(config: Config) -> LinePacker:
    from privtrain.data.lines import LinePacker

    performance = config.performance
    return LinePacker.of(
        config.data.max_length, performance.microbatch_size, 0, performance.microbatch_tokens, device_type="cuda"
    )
