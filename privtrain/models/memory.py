"""Predict the memory of one rank, part by part, from the configuration alone.

The model is built on torch's meta device, where tensors have shapes and no values.

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

if TYPE_CHECKING:
    import torch

    from privtrain.data.lines import LinePacker

_FP32_BYTES = 4
#: The clipped sum over units is int64.
_SUM_BYTES = 8
#: AdamW keeps two moments a parameter, in fp32.
_OPTIMIZER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class LaunchLayout:
    """What of the model is divided among ranks ("sharded"), from an accelerate config.

    Attributes:
        num_ranks: processes over all machines.
        shards_parameters: base and trained weights are divided: ZeRO-3, FSDP2.
        shards_gradients: gradients and their sum are divided too: ZeRO-2 and above.
        shards_optimizer: the optimizer's state is divided: ZeRO-1 and above.
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
    """How large the model of a run is.

    Attributes:
        num_trained: number of trained parameters.
        memory_bytes: part of the memory, in words → bytes of device memory on one rank.
    """

    num_trained: int
    memory_bytes: dict[str, int]


def model_size(config: Config, layout: LaunchLayout, num_bands: int = 1) -> ModelSize:
    """Return the number of trained parameters, and the device memory of one rank by part.

    Args:
        config: a valid configuration; the model's own config must be at hand, its weights need not.
        layout: how the job is launched.
        num_bands: steps that correlated noise is spread over (1: independent noise); one sum is kept for each but one.

    Raises:
        ConfigError: if the model's config cannot be loaded.
    """
    import torch

    is_full = config.training.releases_model
    dtype = torch.float32 if is_full or config.performance.precision == "fp32" else torch.bfloat16
    model, base = meta_model(config, dtype)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    trained = sum(sizes)
    frozen_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)

    # Over how many ranks each is divided; an adapter is never divided, only its base.
    has_sharded_gradients = is_full and layout.shards_gradients
    num_base_parts = layout.num_ranks if layout.shards_parameters else 1
    num_trained_parts = layout.num_ranks if layout.shards_parameters and is_full else 1
    num_gradient_parts = layout.num_ranks if has_sharded_gradients else 1
    num_optimizer_parts = layout.num_ranks if layout.shards_optimizer and is_full else 1

    num_units = _num_units_held(config, has_sharded_gradients)
    state_bytes = _OPTIMIZER_BYTES + (_FP32_BYTES if config.training.num_averaged_steps else 0)
    # Each rank's whole sum is reduced into parts: where the optimizer alone is divided, both are there at once.
    num_sums = 2 if layout.shards_optimizer and not has_sharded_gradients else 1
    parts = {
        "frozen base": frozen_bytes // num_base_parts,
        "trained weights": trained * _FP32_BYTES // num_trained_parts,
        "optimizer state": 0 if layout.offloads_optimizer else trained * state_bytes // num_optimizer_parts,
        "clipped sum and noise": (num_sums * _SUM_BYTES + _FP32_BYTES) * trained // num_gradient_parts,
        "gradients of units": num_units * trained * _FP32_BYTES // num_gradient_parts,
    }
    if has_sharded_gradients and config.performance.reduce_once:
        parts["sum of own units"] = trained * _SUM_BYTES
    elif has_sharded_gradients:
        # One tensor of the clipped sum at a time is whole, until its parts are with their ranks.
        parts["tensor on its way"] = max(sizes) * _SUM_BYTES
    if num_bands > 1:
        parts["history of noise"] = (num_bands - 1) * trained * _SUM_BYTES // layout.num_ranks
    activations, logits = _activation_bytes(config, model, base)
    return ModelSize(trained, {**parts, "activations": activations, "logits": logits})


def _num_units_held(config: Config, has_sharded_gradients: bool) -> int:
    """Return how many units' whole gradients are in memory at once."""
    if has_sharded_gradients and config.performance.clipping_route == "two_pass":
        return 0  # each tensor's is let go as soon as its norm is taken
    if config.training.releases_model:
        return 1
    # Of an adapter, those of a microbatch.
    if config.performance.packing == "lines":  # with "auto" rows may be chosen
        return max(num_slots for _, num_slots in _line_packer(config).slots())
    return config.performance.microbatch_size


def meta_model(config: Config, dtype: torch.dtype) -> tuple[Any, Any]:
    """Build the model of a configuration on the meta device.

    Returns:
        The model to train (with its adapter, if there is one), and the base model inside it.

    Raises:
        ConfigError: if the model's config cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from privtrain.models.load import LOADING_FAILURES, load_architecture, reason_of
    from privtrain.models.trainable import make_trainable

    if config.training.has_virtual_tokens:
        raise ConfigError([Fault("training.method", f"memory is not estimated for {config.training.method}")])
    architecture: Any = load_architecture(config.model)
    architecture.use_cache = False
    auto_class = AutoModelForCausalLM
    if config.data.labels is not None:
        auto_class = AutoModelForSequenceClassification
        architecture.num_labels = len(config.data.labels)
        architecture.pad_token_id = architecture.pad_token_id or 0
    with torch.device("meta"):
        try:
            base = auto_class.from_config(architecture, dtype=dtype)
        except LOADING_FAILURES as error:
            raise ConfigError([Fault("model", f"config.json describes no model: {reason_of(error)}")]) from None
        return make_trainable(base.requires_grad_(False), config, 0), base


def _activation_bytes(config: Config, model: Any, base: Any) -> tuple[int, int]:
    """Return the bytes that a microbatch's forward pass keeps for the backward pass, and those of the loss's logits.

    Args:
        config: the configuration.
        model: the model to train, on the meta device.
        base: its base model.
    """
    import torch

    from privtrain.models.head_loss import CHUNK

    rows, tokens = config.performance.microbatch_size, config.data.max_length
    is_line = config.performance.packing == "lines"
    if is_line:
        rows, tokens = 1, _line_packer(config).num_tokens
    # Storages by address: several tensors may be views of one.
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def note_saved(tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd saves, unless it is a weight or an attention matrix: fused kernels keep none."""
        storage = tensor.untyped_storage()
        is_attention = tensor.dim() >= 3 and tensor.shape[-2:] == (tokens, tokens)
        if storage._cdata not in weights and not is_attention:
            saved[storage._cdata] = tensor
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    # A ready-made mask: transformers would look into the values of one that it makes itself.
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=base.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note_saved, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=mask).logits
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if config.performance.gradient_checkpointing:
        # Every layer's input is kept, and all else of one layer at a time.
        num_layers = int(base.config.num_hidden_layers)
        inputs = num_layers * rows * tokens * int(base.config.hidden_size) * base.dtype.itemsize
        total = inputs + total // num_layers
    # How the loss of rows and lines holds logits: see privtrain.models.head_loss.
    if not is_line:  # log-probabilities in fp32 and their gradient
        logit_bytes = 2 * logits.numel() * _FP32_BYTES
    elif not _has_frozen_head(base):  # logits and their gradient
        logit_bytes = 2 * logits.numel() * logits.element_size()
    else:  # both, of one chunk of tokens alone
        logit_bytes = 2 * min(tokens, CHUNK) * logits.shape[-1] * _FP32_BYTES
    return total, logit_bytes


def _has_frozen_head(base: Any) -> bool:
    head = base.get_output_embeddings()
    return head is not None and not any(p.requires_grad for p in head.parameters())


def _line_packer(config: Config) -> LinePacker:
    """Return what packs records into lines for this configuration on a GPU; its padding id is of no account here."""
    from privtrain.data.lines import LinePacker

    performance = config.performance
    return LinePacker.of(
        config.data.max_length, performance.microbatch_size, 0, performance.microbatch_tokens, device_type="cuda"
    )
