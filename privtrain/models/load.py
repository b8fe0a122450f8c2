"""Load a base model and its tokenizer, and choose the precision to compute in."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.models.complete import new_modules
from privtrain.run.base_model import ModelLocation, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: What transformers, safetensors, tokenizers and pickle raise at files that they cannot read, and torch at sizes in
#: config.json that no layer can have.
LOADING_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    EOFError,
    ArithmeticError,
    AssertionError,
    pickle.UnpicklingError,
    SafetensorError,
    hub_errors.StrictDataclassError,  # a value of config.json that cannot be
)

#: Code that lies beside a model's weights is never run.
NO_FOREIGN_CODE = {"trust_remote_code": False}


#: How files begin that a tokenizer is loaded from.
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")


def load_architecture(model: ModelSection) -> PretrainedConfig:
    """Return what ``config.json`` says of the base model.

    Raises:
        ConfigError: if it cannot be read.
    """
    from transformers import AutoConfig

    location = locate(model)
    try:
        config = AutoConfig.from_pretrained(location.path, **NO_FOREIGN_CODE, **location.arguments)
    except LOADING_FAILURES as error:
        problem = f"cannot read the configuration in {_shown(location)}: {reason_of(error)}"
        raise ConfigError([Fault("model", problem)]) from None
    _check_reads_text_alone(config, location)
    return config


def _check_reads_text_alone(config: PretrainedConfig, location: ModelLocation) -> None:
    """Raise if a model reads images or sound too: no record reaches those parts, and noise alone would train them."""
    if config.get_text_config() is config:  # else the part for text has a configuration of its own
        return
    problem = (
        f"{_shown(location)} is a {config.model_type}, which reads more than text: no record reaches its other parts, "
        "and noise alone would train them. Save its language model by itself, or take a model for text"
    )
    raise ConfigError([Fault("model", problem)])


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer.

    Raises:
        ConfigError: if it cannot be loaded or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    location = locate(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.path, **NO_FOREIGN_CODE, **location.arguments)
    except LOADING_FAILURES as error:
        reason = reason_of(error)
        directory = pathlib.Path(location.path)
        has_tokenizer_file = any(any(directory.glob(f"{name}*")) for name in _TOKENIZER_FILES)
        if directory.is_dir() and not has_tokenizer_file and model.gguf_file is None:
            reason = "it has no tokenizer.json, nor another tokenizer file; save the tokenizer beside the weights"
        raise ConfigError([Fault("model", f"cannot load a tokenizer from {_shown(location)}: {reason}")]) from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's name for the mark that ends a text
    if tokenizer.eos_token_id is None:
        raise ConfigError([Fault("model", "the tokenizer has no end-of-text token; set one in its files")])
    return tokenizer


def _shown(location: ModelLocation) -> str:
    """Return how errors name a model's place: a path that is not here was taken for a name on the hub."""
    is_here = pathlib.Path(location.path).is_dir()
    return location.path if is_here else f"{location.path} (no directory here, so a name on the hub)"


def load_base(model: ModelSection, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the base model in ``dtype``, frozen. The adapter stays in fp32 whatever the base is held in.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, model, dtype)


def load_classifier(
    model: ModelSection, dtype: torch.dtype, *, labels: Sequence[int | str], init_seed: int
) -> PreTrainedModel:
    """Load the base as a sequence classifier, frozen. A head that its files lack is drawn by seed, equal on all ranks.

    Decoders classify at the last token before the padding id: see :func:`~privtrain.models.limits.pad_classifier`.

    Args:
        model: where it is.
        dtype: of its weights.
        labels: names of the classes, in order.
        init_seed: public seed of a fresh head.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    names = {i: str(label) for i, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        return _load(
            AutoModelForSequenceClassification,
            model,
            dtype,
            is_classifier=True,
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )


def _load(
    auto_class: Any, model: ModelSection, dtype: torch.dtype, *, is_classifier: bool = False, **options: Any
) -> PreTrainedModel:
    """Load the base's weights, frozen, with its failures as faults of the configuration.

    Raises:
        ConfigError: if transformers cannot load it, or it holds an adapter.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would show its own
    location = locate(model)
    if model.quantization is not None:
        options["quantization_config"] = _quantization(model.quantization, dtype)
    try:
        # Weights of other shapes do not stop the loading: new_modules below refuses them, with all their names.
        with _unreported():
            base, info = auto_class.from_pretrained(
                location.path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **NO_FOREIGN_CODE,
                **options,
                **location.arguments,
            )
    except (torch.OutOfMemoryError, MemoryError):  # no fault of the configuration
        raise
    except LOADING_FAILURES as error:
        reason = reason_of(error)
        if reason.startswith("Unrecognized configuration class"):
            task = "sequence classifier" if is_classifier else "causal language model"
            reason = f"transformers has no {task} of its kind (model_type in config.json); take another base model"
        raise ConfigError([Fault("model", f"cannot load a model from {_shown(location)}: {reason}")]) from None

    if getattr(base, "_hf_peft_config_loaded", False):
        raise ConfigError(
            [Fault("model", f"{location.path} is an adapter, or holds one; merge it first: privtrain export --merge")]
        )
    _check_reads_text_alone(base.config, location)
    # Modules that the files lack, such as a classifier's head: what makes the model trainable reads this list.
    base.privtrain_new_modules = new_modules(base, info, location.path, is_classifier=is_classifier)
    # transformers has turned a GGUF file into plain weights; with this entry left the model could not be saved.
    if getattr(base.config, "quantization_config", None) is not None and model.gguf_file:
        delattr(base.config, "quantization_config")
    switch_cache_off(base)
    _keep_packing(base)
    return base.requires_grad_(False)


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Keep transformers' report of missing weights off the console, which advises to train a head that is trained next.

    What must not be missing is refused with its names.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def switch_cache_off(base: PreTrainedModel) -> None:
    """Switch the cache of keys and values off for training; :func:`saved_as_loaded` restores the config for saving."""
    base.privtrain_use_cache = getattr(base.config, "use_cache", None)  # type: ignore[assignment]
    base.config.use_cache = False


@contextlib.contextmanager
def saved_as_loaded(model: Any) -> Iterator[None]:
    """Within the block, give the model's config the ``use_cache`` that it was loaded with, e.g. to save it."""
    if not hasattr(model, "privtrain_use_cache"):
        yield
        return
    own = model.config.use_cache
    if model.privtrain_use_cache is None:
        del model.config.use_cache
    else:
        model.config.use_cache = model.privtrain_use_cache
    try:
        yield
    finally:
        model.config.use_cache = own


def _keep_packing(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    On CPUs with AVX512-BF16, bitsandbytes repacks them in the first pass without gradients, for a kernel that rounds
    otherwise than training does, and that fails for widths that are no multiple of 64.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """Return transformers' settings for ``model.quantization``: nf4 or int8."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        # With a threshold above zero, columns with outliers anywhere in the batch are computed in higher precision for
        # all rows: one unit would change the others.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_adapter(base: PreTrainedModel, directory: pathlib.Path) -> torch.nn.Module:
    """Return the base with a released adapter on it; ``disable_adapter()`` gives the base back."""
    import peft

    return peft.PeftModel.from_pretrained(base, str(directory))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``"bf16"`` or ``"fp32"``: ``"auto"`` becomes bf16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that the frozen base's weights are held in, for passes in ``precision`` on a device.

    On a CPU, autocast over fp32 weights is the faster way to compute in bf16 (measured: with bf16 weights the backward
    pass takes half as long again). On an accelerator bf16 weights save memory and the conversion.
    """
    return torch.bfloat16 if precision == "bf16" and device.type != "cpu" else torch.float32


def _cpu_has_bf16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def reason_of(error: Exception) -> str:
    """Return in one line why a model, its configuration or its tokenizer cannot be loaded."""
    words = str(error)
    if isinstance(error, hub_errors.StrictDataclassError):
        return f"config.json is no configuration of a model: {' '.join(words.split())}"
    if "trust_remote_code" in words:
        return "it needs code that lies beside its weights, which is never run; take a model that transformers knows"
    if "weights_only" in words:
        return "pytorch_model.bin is damaged, or holds more than weights; save the model as safetensors"
    if isinstance(error, json.JSONDecodeError):
        return f"one of its files is not JSON, or is cut short ({words}); fetch it again"
    if isinstance(error, KeyError):  # whose words are the key alone
        return f"its files name {words}, which transformers does not know"
    return (words.strip().splitlines() or [type(error).__name__])[0]
