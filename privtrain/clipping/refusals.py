"""What cannot be clipped exactly is refused by name, with what to do instead; never approximated.

On every route: layers that keep statistics of the data, and losses or capacities that couple units. On the batched
route: models whose layers see rows in a shape that does not tell units apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from privtrain.clipping import opacus_rules
from privtrain.errors import UnsupportedLayer

#: Names of a model configuration's number of experts, by architecture.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ONE_UNIT = "set performance.clipping_route: one_unit"


def refuse_coupled_units(model: nn.Module) -> None:
    """Refuse what makes one unit's gradient, or the released model, depend on another unit outside the clipped sum.

    Raises:
        UnsupportedLayer: naming the module.
    """
    for name, module in model.named_modules():
        tracks = getattr(module, "track_running_stats", False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or tracks:
            raise UnsupportedLayer(
                f"module {name!r} of type {type(module).__name__} mixes units in its statistics and keeps them without "
                f"noise; replace it by GroupNorm or LayerNorm{opacus_rules.advice(module)}"
            )
    for config in configs(model):
        weight = getattr(config, "router_aux_loss_coef", None) or getattr(config, "router_z_loss_coef", None)
        if getattr(config, "output_router_logits", False) and weight:
            raise UnsupportedLayer(
                f"router {_router(model)!r} asks for a load-balancing loss over all tokens of a batch "
                f"(output_router_logits: true, coefficient {weight:g}), which couples units; set output_router_logits: "
                "false in the model's config.json"
            )
        if getattr(config, "expert_capacity", None):
            raise UnsupportedLayer(
                f"router {_router(model)!r} drops tokens when an expert is full (expert_capacity: "
                f"{config.expert_capacity}), so that one unit's tokens depend on another's; choose a model without it"
            )


def refuse_batched_route(model: nn.Module) -> None:
    """Refuse models whose units cannot be told apart, or would round each other, in one batch.

    Raises:
        UnsupportedLayer: naming the module.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedLayer(
            "prompt and prefix tuning repeat one prompt for every row, so its rows cannot be told apart; " + ONE_UNIT
        )
    for name, module in model.named_modules():
        if opacus_rules.is_time_first(module):
            raise UnsupportedLayer(
                f"module {name!r} of type {type(module).__name__} puts tokens before rows, so that its rows cannot be "
                f"told apart; {ONE_UNIT}"
            )
    for name, module in model.named_modules():
        # bitsandbytes' 8-bit layers compute columns with a value above the threshold in another precision.
        threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
        if type(module).__name__.endswith("Linear8bitLt") and threshold > 0:
            raise UnsupportedLayer(
                f"module {name!r} of type {type(module).__name__} takes outlier columns over all rows of a batch "
                f"(llm_int8_threshold: {threshold:g}), so that a loud unit changes the others; set llm_int8_threshold: "
                f"0.0 in the quantization_config of the model's config.json, or {ONE_UNIT}"
            )
    for config in configs(model):
        if has_experts(config):
            raise UnsupportedLayer(
                f"router {_router(model)!r} sorts the tokens of a batch by expert, so that the shapes a unit is "
                f"computed in depend on other units; {ONE_UNIT}"
            )


def refuse_rescaled_positions(model: nn.Module, width: int) -> None:
    """Refuse rows so wide that a module rescales its positions by the longest row that it sees, or ever saw.

    Raises:
        UnsupportedLayer: naming the module, and the longest rows that need no rescaling.
    """
    for name, module in model.named_modules():
        kind, original = _rescaling(module)
        if width > original:
            raise UnsupportedLayer(
                f"module {name!r} rescales positions (rope_type: {kind}) by the longest row of a batch, and rows of "
                f"{width} tokens are beyond the {original} tokens of the original context; set data.max_length: "
                f"{original} or less, or another rope_type in the model's config.json"
            )


def _rescaling(module: nn.Module) -> tuple[str, float]:
    """Return the module's type of rotary positions, and how many tokens a row may have before they are rescaled.

    By transformers' attributes. Empty and infinite if the module rescales nothing by the longest row.
    """
    kind = getattr(module, "rope_type", None)
    kinds = list(kind.values()) if isinstance(kind, dict) else [kind]  # a type for each kind of layer, or one for all
    rescaling = [name for name in kinds if isinstance(name, str) and ("dynamic" in name or name == "longrope")]
    if not rescaling:
        return "", math.inf
    config = getattr(module, "config", None)
    settings = getattr(config, "rope_parameters", None) or {}
    # Settings may be nested by kind of layer too; the shortest context of any of them is the limit.
    of_layers = [part for part in settings.values() if isinstance(part, dict)]
    in_config = [part.get("original_max_position_embeddings") for part in (settings, *of_layers)]
    contexts = [num_tokens for num_tokens in in_config if num_tokens]
    if not contexts:  # where the config says nothing, the module has noted it
        contexts = [getattr(module, "original_max_seq_len", math.inf)]
    return rescaling[0], min(contexts)


def has_experts(config: Any) -> bool:
    """Return whether a model of this configuration has several experts, among which a router sorts the tokens."""
    return any((getattr(config, key, None) or 0) > 1 for key in _NUM_EXPERTS)


def unwrapped(model: Any) -> Any:
    """Return the model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def configs(model: nn.Module) -> Iterator[Any]:
    """Yield the model's configuration, that of the text model within it, and those of parts of that."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return
    yield config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    if inner is not config:
        yield inner
    for part in vars(inner).values():  # DBRX keeps its feed-forward layers' settings in one of their own
        if hasattr(part, "to_dict"):
            yield part


def _router(model: nn.Module) -> str:
    """Return the name of the model's first router, for a message; the model's type if none is recognised."""
    for name, module in model.named_modules():
        if "router" in type(module).__name__.lower() or name.rpartition(".")[2] in ("router", "gate"):
            return name
    return type(model).__name__


def checkpointing(model: nn.Module) -> str | None:
    """Return how transformers checkpoints the model's layers: ``"reentrant"``, ``"non_reentrant"`` or ``None``.

    It is re-entrant as soon as one layer is.
    """
    is_reentrant: list[bool] = []  # of each layer that is checkpointed
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            # A partial of torch's checkpoint, which is re-entrant unless told otherwise.
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            is_reentrant.append(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
    if not is_reentrant:
        return None
    return "reentrant" if any(is_reentrant) else "non_reentrant"
