"""One model out of a released adapter and its base, checked by what it computes on fixed tokens.

Merging adds the adapter's products to the base's weights. Where embedding and head share one weight and the adapter
changes one of them, they get separate weights first: the other one keeps the base's values. Weights are fp32 until the
end, so that merging rounds once.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import torch

from privtrain.config import Config
from privtrain.config.model import ModelSection
from privtrain.errors import VerificationFailed
from privtrain.models.limits import num_embedded, pad_classifier
from privtrain.models.load import load_adapter, load_base, load_classifier, load_tokenizer, saved_as_loaded
from privtrain.models.trainable import INIT_SEED
from privtrain.run.directory import RunDirectory
from privtrain.run.places import own_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Most that outputs may differ, relative to the largest of them: a merged model adds in another order, in fp32, through
#: many layers.
_TOLERANCE = 1e-3
#: Tokens that outputs are compared on.
_NUM_TOKENS = 16


def whole_model(run: RunDirectory, base_model: pathlib.Path | None) -> Any:
    """Return the model that a run released, in fp32; an adapter is merged into its base.

    Args:
        run: a finished run.
        base_model: directory of the base model; by default where the run had it.

    Raises:
        ConfigError: if the base cannot be loaded.
        VerificationFailed: if the merged model computes something else than base and adapter.
    """
    if run.model.exists():
        import transformers

        (architecture,) = transformers.AutoConfig.from_pretrained(str(run.model)).architectures or []
        return getattr(transformers, architecture).from_pretrained(str(run.model), dtype=torch.float32).eval()
    run.check_private()
    base = _base(own_config(run), base_model)
    _untie(base, run.adapter)
    adapted: Any = load_adapter(base, run.adapter).eval()
    expected = outputs(adapted)
    merged = adapted.merge_and_unload(safe_merge=True).eval()
    check_outputs(expected, outputs(merged), run.adapter)
    return merged


def _base(config: Config, base_model: pathlib.Path | None) -> PreTrainedModel:
    """Return the run's base model in fp32: a classifier with its labels, or a language model.

    ``base_model`` is its directory; ``None``: where the run had it.
    """
    section = config.model
    if base_model is not None:
        section = ModelSection(name_or_path=str(base_model), gguf_file=section.gguf_file)
    if config.data.labels is None:
        return load_base(section, torch.float32)
    base = load_classifier(section, torch.float32, labels=config.data.labels, init_seed=INIT_SEED)
    pad_classifier(base, load_tokenizer(section))
    return base


def _untie(base: PreTrainedModel, adapter: pathlib.Path) -> None:
    """Give the head a weight of its own if it shares the embedding's and the adapter changes either of them."""
    import peft

    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    settings: Any = peft.PeftConfig.from_pretrained(str(adapter))
    # What the adapter changes: whole names of modules, or their ends ("lm_head").
    adapted = {*(settings.target_modules or ()), *(settings.modules_to_save or ())}
    names = [name for name, module in base.named_modules() if module is embedding or module is head]
    is_changed = any(f".{name}".endswith(f".{ending}") for name in names for ending in adapted)
    if not is_changed:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """Round the weights of an fp32 model to values that ``dtype`` has, and return it; they stay fp32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
    return model


def save_weights(model: Any, directory: pathlib.Path) -> None:
    """Save a model by ``save_pretrained``, with the config that it was loaded with: training changes a key of it."""
    with saved_as_loaded(model):
        model.save_pretrained(str(directory))


def reopened(model: Any, directory: pathlib.Path) -> Any:
    """Load a model of the same class from a directory, as users of the release will, in fp32."""
    return type(model).from_pretrained(str(directory), dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    """Return the logits of a model on fixed tokens, in fp32, to compare with those of another model."""
    ids = torch.arange(_NUM_TOKENS)[None] * 7 % num_embedded(model)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def check_outputs(expected: torch.Tensor, given: torch.Tensor, place: pathlib.Path) -> None:
    """Raise unless two models compute the same, up to rounding.

    Args:
        expected: :func:`outputs` of the base with its adapter.
        given: those of the merged or re-opened model.
        place: its directory, for the error.

    Raises:
        VerificationFailed: saying by how much they differ.
    """
    if expected.shape != given.shape:
        problem = f"outputs have shape {list(given.shape)}; the base with its adapter gives {list(expected.shape)}"
        raise VerificationFailed([problem], place)
    if not torch.isfinite(given).all():
        raise VerificationFailed(["outputs are not finite; export it with --dtype fp32"], place)
    difference = float((expected - given).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if difference > _TOLERANCE * scale:
        problem = f"outputs on fixed tokens differ by {difference:.3g} from those of the base with its adapter"
        raise VerificationFailed([problem], place)
