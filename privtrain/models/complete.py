"""Whether a base model's files have all its weights: transformers fills in random ones, and only warns.

Only what a task adds to a base may be missing: a classifier's head, and the pooling layer before it. These modules are
new: they are trained, and saved with the adapter. The *body* is the part that classifiers and language models of an
architecture share (``base.base_model_prefix``, e.g. ``bert``). Tied weights and buffers are no weights of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from privtrain.errors import ConfigError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3

#: Names of tensors in old checkpoints that are no weights: newer classes of transformers compute them.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".position_ids", ".token_type_ids")


def new_modules(base: PreTrainedModel, info: Mapping[str, Any], place: str, *, is_classifier: bool) -> list[str]:
    """Return the names of the modules of a loaded model whose weights are new: a classifier's head and pooling layer.

    Args:
        base: the model as transformers loaded it.
        info: what ``from_pretrained`` reports: missing, mismatched and unexpected keys.
        place: where the files are, for errors.
        is_classifier: whether the base was loaded as a sequence classifier; only that may have new modules.

    Raises:
        ConfigError: naming the weights that are missing or of another shape, or that the files hold beyond the model.
    """
    weights = dict(base.named_parameters(remove_duplicate=False))
    unexpected = sorted(info.get("unexpected_keys", ()))
    missing = sorted(name for name in info.get("missing_keys", ()) if name in weights)
    # name → (shape in the file, shape in the model)
    misshapen = {name: (in_file, in_model) for name, in_file, in_model in info.get("mismatched_keys", ())}
    # A classifier's head may be missing, or be of another number of labels: it is made anew. All else is a fault.
    new: set[str] = set()
    if is_classifier:
        new = {name for name in {*missing, *misshapen} if _is_head(base, name)}
    of_other_shape = sorted(name for name in misshapen if name not in new)
    lacking = [name for name in missing if name not in new and name not in misshapen]  # each is in one list only

    faults = []
    if lacking:
        faults.append(Fault("model", _lack(base, place, lacking, unexpected, num_weights=len(weights))))
    if of_other_shape:
        shapes = _listed_shapes({name: misshapen[name] for name in of_other_shape})
        faults.append(Fault("model", f"{place} has weights of other shapes: {shapes}"))
    unread = [name for name in unexpected if _changes_a_part(base, name)]
    if unread and not faults:  # where weights are lacking, those may be them under other names; `_lack` tells of it
        problem = (
            f"{place} holds {len(unread)} weights that a {type(base).__name__} of its config.json does not read "
            f"({_listed(unread)}); the model would be another one. Mend config.json, or fetch the model again"
        )
        faults.append(Fault("model", problem))
    if faults:
        raise ConfigError(faults)

    # The module of a new weight is the body's pooling layer, or a child of the model: ``score.weight`` → score.
    pooler = f"{base.base_model_prefix}.pooler"
    modules: set[str] = set()
    for name in new:
        child, _, _ = name.partition(".")
        modules.add(pooler if name.startswith(f"{pooler}.") else child)
    return sorted(modules)


def _lack(base: PreTrainedModel, place: str, lacking: list[str], unexpected: list[str], *, num_weights: int) -> str:
    """Return in words which weights the files lack, and what to do.

    Args:
        base: the model.
        place: where the files are.
        lacking: names of the weights that are not there.
        unexpected: names in the files that fit none of the model's.
        num_weights: of the whole model.
    """
    counts = f"{len(lacking)} of {num_weights} weights"
    problem = f"{place} lacks {counts} of {type(base).__name__} ({_listed(lacking)})"
    hint = f"; it holds others under names that fit none ({_listed(unexpected)})" if unexpected else ""
    prefix = _wrapper(lacking, unexpected)
    if prefix:
        remedy = f"their names begin with {prefix!r}, as of a wrapped model (PEFT, DDP, compiled): save the one inside"
    else:
        remedy = "fetch the model again, or mend its config.json"
    return f"{problem}{hint}; {remedy}"


def _wrapper(lacking: Iterable[str], unused: Iterable[str]) -> str:
    """Return what stands before a missing weight's name in the name of one that is not read; empty if nothing does."""
    names = list(unused)
    wanted = (f".{name}" for name in lacking)
    return next((name[: 1 - len(end)] for end in wanted for name in names if name.endswith(end)), "")


def _is_head(base: PreTrainedModel, name: str) -> bool:
    """Return whether a weight is no part of the body that classifiers and language models share."""
    prefix = base.base_model_prefix
    return not name.startswith(f"{prefix}.") or name.startswith(f"{prefix}.pooler.")


def _changes_a_part(base: PreTrainedModel, name: str) -> bool:
    """Return whether a weight that the model does not read would change a part that the model has.

    For example ``bert.encoder.layer.12.…`` in a BERT of 12 layers (0 to 11): the file has a further layer of
    ``bert.encoder``, so it is of another model. Weights of a part that the model lacks as a whole (a pooling layer, a
    vision tower) may stay unread.
    """
    body, _, rest = name.partition(".")
    part = f"{body}.{rest.partition('.')[0]}"
    has_part = any(path == part for path, _ in base.named_modules())
    return body == base.base_model_prefix and has_part and not name.endswith(_BUFFERS)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", … {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _listed_shapes(misshapen: Mapping[str, tuple[Iterable[int], Iterable[int]]]) -> str:
    """Return in words the first weights of other shapes: name → (shape in the file, shape in the model)."""
    listed = []
    for name, (in_file, in_model) in list(misshapen.items())[:_SHOWN]:
        listed.append(f"{name}: {_shape(in_file)} in the file, {_shape(in_model)} by config.json")
    more = f" and {len(misshapen) - _SHOWN} more" if len(misshapen) > _SHOWN else ""
    return f"{', '.join(listed)}{more}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
