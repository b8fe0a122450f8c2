"""Select the trainable parameters (``training.method``) and freeze the rest.

* ``lora``: low-rank adapters (rsLoRA, DoRA), also on embeddings, and whole copies of ``lora.modules_to_save``.
* ``full``: every weight.
* ``bias``: every bias, and a classifier's head (BitFit: Ben Zaken et al. 2021, arXiv 2106.10199).
* ``prompt_tuning``, ``prefix_tuning``: virtual tokens before every record.

Trainable tensors are fp32 whatever the base is held in, and start from a public seed, the same on every rank.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch

from privtrain.config import Config
from privtrain.config.model import LoraSection
from privtrain.errors import ConfigError, Fault
from privtrain.models.load import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What PEFT raises at modules that it cannot adapt, such as routers and fused experts.
_PEFT_FAILURES = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, RuntimeError, ImportError)
_SHOWN_NAMES = 8

#: Public seed of new tensors' initial values, which do not depend on data.
INIT_SEED = 0

#: Names of the heads of transformers' sequence classifiers.
_HEADS = ("classifier", "score", "classification_head")


def make_trainable(base: PreTrainedModel, config: Config, init_seed: int) -> torch.nn.Module:
    """Return the model to train: what ``training.method`` trains is unfrozen or added, everything else is frozen.

    Args:
        base: the frozen base model; it is changed in place, or wrapped.
        config: says what is trained.
        init_seed: public seed of the initial values of new tensors.

    Raises:
        ConfigError: if the model has nothing of the kind to train.
    """
    method, name = config.training.method, config.model.public_name
    if method == "full":
        return base.requires_grad_(True)
    if method == "bias":
        return _train_biases(base)
    if method == "lora":
        model = add_lora(base, config.lora, init_seed, name, is_classifier=config.data.is_classification)
    else:
        model = _add_prompt(base, method, config.prompt.num_virtual_tokens, init_seed, name)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT copies modules_to_save in the base's precision
            parameter.data = parameter.data.float()
    return model


def _train_biases(base: PreTrainedModel) -> PreTrainedModel:
    """Unfreeze all biases, and the head of a classifier."""
    biases = [p for name, p in base.named_parameters() if name.endswith("bias")]
    if not biases:
        problem = f"{type(base).__name__} has no bias to train; use lora"
        raise ConfigError([Fault("training.method", problem)])
    for parameter in biases:
        parameter.requires_grad_(True)
    modules = dict(base.named_modules())
    # privtrain_new_modules: those that the base's files lack, as loading noted on the model.
    for name in modules.keys() & {*_HEADS, *getattr(base, "privtrain_new_modules", ())}:
        modules[name].requires_grad_(True)
    return base


def _add_prompt(base: PreTrainedModel, method: str, num_virtual_tokens: int, init_seed: int, public_name: str) -> Any:
    """Wrap the base with trainable virtual tokens, whose initial values are the same on every rank.

    ``public_name`` is what the saved adapter calls its base model.
    """
    import peft

    kind = peft.PromptTuningConfig if method == "prompt_tuning" else peft.PrefixTuningConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        try:
            model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens))
        except _PEFT_FAILURES as error:
            raise ConfigError([Fault("training.method", f"{method}: PEFT refuses: {reason_of(error)}")]) from None
    model.peft_config["default"].base_model_name_or_path = public_name
    return model


def _check_names(base: PreTrainedModel, lora: LoraSection) -> None:
    """Raise unless every name of ``lora`` matches a module of the model; PEFT would be content if one of them does.

    Raises:
        ConfigError: for each name that matches none, with similar names of modules.
    """
    known: set[str] = set()
    for module_name, _ in base.named_modules():
        if module_name:  # the model itself has none
            known.update(_endings(module_name))
    # What to suggest: last parts of names, without the numbers of layers.
    last_parts = sorted(ending for ending in known if "." not in ending and not ending.isdigit())
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules  # a str is "all-linear"
    faults = []
    for key, names in (("lora.target_modules", targets), ("lora.modules_to_save", lora.modules_to_save)):
        for name in names:
            if name in known:
                continue
            near = difflib.get_close_matches(name, last_parts, n=3, cutoff=0.5) or last_parts[:_SHOWN_NAMES]
            faults.append(Fault(key, f"no module of {type(base).__name__} is named {name}; near: {', '.join(near)}"))
        if key == "lora.target_modules" and lora.target_modules == []:
            faults.append(Fault(key, "names no module; give names, or all-linear"))
    if faults:
        raise ConfigError(faults)


def _endings(name: str) -> list[str]:
    """Return what PEFT takes for a name of a module: ``a.b.c`` → ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def add_lora(
    base: PreTrainedModel, lora: LoraSection, init_seed: int, public_name: str, *, is_classifier: bool = False
) -> torch.nn.Module:
    """Wrap the base with a fresh LoRA adapter, the same on every rank.

    Args:
        base: the frozen base model.
        lora: rank, alpha, dropout and target modules.
        init_seed: public seed of the adapter's initial values (they do not depend on data).
        public_name: what the saved adapter calls its base model.
        is_classifier: the base is a sequence classifier; its head is trained too, and saved with the adapter.

    Raises:
        ConfigError: if no module matches ``lora.target_modules``.
    """
    import peft

    _check_names(base, lora)
    # A head that the base's files lack is trained and saved with the adapter: loaded elsewhere, the base would have
    # another random one.
    modules_to_save = list(dict.fromkeys([*lora.modules_to_save, *getattr(base, "privtrain_new_modules", ())]))
    config = peft.LoraConfig(
        r=lora.rank,
        # 16, not 16.0, as other readers of adapter_config.json expect; PEFT accepts a float.
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=modules_to_save or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        try:
            model = peft.get_peft_model(base, config)
        except _PEFT_FAILURES as error:
            raise ConfigError([Fault("lora.target_modules", f"PEFT refuses: {reason_of(error)}")]) from None
    if lora.freeze_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.requires_grad_(False)
    model.peft_config["default"].base_model_name_or_path = public_name
    return model
