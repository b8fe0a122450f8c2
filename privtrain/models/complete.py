"""Whether a base model has all its weights: transformers puts random ones in the place of what a file lacks.

Only what a task adds to a base may be new: a classifier's head, and the pooling layer before it. It is trained, saved
with the adapter and said. Tied weights and buffers are no weights of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from privtrain.errors import ConfigError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3

#: What old checkpoints hold of a body beside its weights, and newer classes compute.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".position_ids", ".token_type_ids")


def new_modules(base: PreTrainedModel, info: Mapping[str, Any], place: str, *, is_classifier: bool) -> list[str]:
    """Return the modules of a loaded model whose weights are new: children of it, and its body's pooling layer.

    Raises:
        ConfigError: naming the weights that are missing or of another shape.
    """
    own = dict(base.named_parameters(remove_duplicate=False))
    missing = sorted(name for name in info.get("missing_keys", ()) if name in own)
    shaped = {name: (found, wanted) for name, found, wanted in info.get("mismatched_keys", ())}
    allowed = {name for name in {*missing, *shaped} if is_classifier and _is_head(base, name)}
    lacking = [name for name in missing if name not in allowed and name not in shaped]
    others = sorted(name for name in shaped if name not in allowed)
    faults = []
    if lacking:
        problem = f"{place} lacks {len(lacking)} of {len(own)} weights of {type(base).__name__} ({_listed(lacking)})"
        unused = sorted(info.get("unexpected_keys", ()))
        hint = f"; it holds others under names that fit none ({_listed(unused)})" if unused else ""
        faults.append(Fault("model", f"{problem}{hint}; fetch the model again, or mend its config.json"))
    if others:
        shown = [
            f"{name}: {_shape(shaped[name][0])} in the file, {_shape(shaped[name][1])} by config.json"
            for name in others[:_SHOWN]
        ]
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        faults.append(Fault("model", f"{place} has weights of other shapes: {', '.join(shown)}{more}"))
    unread = sorted(name for name in info.get("unexpected_keys", ()) if _changes_a_part(base, name))
    if unread and not faults:
        problem = (
            f"{place} holds {len(unread)} weights that a {type(base).__name__} of its config.json does not read "
            f"({_listed(unread)}); the model would be another one. Mend config.json, or fetch the model again"
        )
        faults.append(Fault("model", problem))
    if faults:
        raise ConfigError(faults)
    pooler = f"{base.base_model_prefix}.pooler"
    return sorted({pooler if name.startswith(f"{pooler}.") else name.partition(".")[0] for name in allowed})


def _is_head(base: PreTrainedModel, name: str) -> bool:
    """Return whether a weight is no part of the body that classifiers and language models share."""
    prefix = base.base_model_prefix
    return not name.startswith(f"{prefix}.") or name.startswith(f"{prefix}.pooler.")


def _changes_a_part(base: PreTrainedModel, name: str) -> bool:
    """Return whether a weight that is not read belongs to a part that the body has: a further layer, or a bias.

    Of BERT: ``bert.encoder.layer.12.…`` does where there are 12 layers, since ``bert.encoder`` exists. A part that the
    body does not have at all (a pooling layer, a vision tower) may stay unread.
    """
    body, _, rest = name.partition(".")
    part = f"{body}.{rest.partition('.')[0]}"
    has_part = any(path == part for path, _ in base.named_modules())
    return body == base.base_model_prefix and has_part and not name.endswith(_BUFFERS)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", … {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
