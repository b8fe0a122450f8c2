"""What is trained of a base model, by ``training.method``; everything else of it stays frozen.

* ``lora``: low-rank adapters (rsLoRA, DoRA), also on embeddings, and whole copies of ``lora.modules_to_save``.
* ``full``: every weight.
* ``bias``: every bias, and a classifier's head (BitFit: Ben Zaken et al. 2021, arXiv 2106.10199).
* ``prompt_tuning``, ``prefix_tuning``: virtual tokens before every record.

Trainable tensors are fp32 whatever the base is held in, and start from a public seed, the same on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from privtrain.config import Config
from privtrain.config.schema import LoraSection
from privtrain.errors import ConfigError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from privtrain.models.load import _first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Names of the heads of transformers' sequence classifiers.
_HEADS = ("classifier", "score", "classification_head")


def make_trainable(base: PreTrainedModel, config: Config, init_seed: int) -> torch.nn.Module:
    """The model to train.

    Args:
        base: the frozen base model.
        config: names the method and its settings.
        init_seed: public seed of new tensors.

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
    biases = [p for name, p in base.named_parameters() if name.endswith("bias")]
    if not biases:
        problem = f"{type(base).__name__} has no bias to train; use lora"
        raise ConfigError([Fault("training.method", problem)])
    for parameter in biases:
        parameter.requires_grad_(True)
    for name, module in base.named_children():
        if name in _HEADS:
            module.requires_grad_(True)
    return base


def _add_prompt(base: PreTrainedModel, method: str, num_virtual_tokens: int, init_seed: int, public_name: str) -> Any:
    import peft

    kind = peft.PromptTuningConfig if method == "prompt_tuning" else peft.PrefixTuningConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens))
    model.peft_config["default"].base_model_name_or_path = public_name
    return model


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

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT accepts a float
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        try:
            model = peft.get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError([Fault("lora.target_modules", _first_line(error))]) from None
    model.peft_config["default"].base_model_name_or_path = public_name
    return model
