"""Sample texts from a released model: batches of contexts in, tokens out. transformers, or vLLM where it can.

A context is the token ids that a text is sampled after: those of a prompt or conversation, or a begin mark alone.
The random numbers are public: whoever has the model can draw the same texts. That is no loss, since the texts are a
function of the released model, which ε covers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from privtrain.config import Config
from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.run.base_model import locate
from privtrain.run.directory import RunDirectory

if TYPE_CHECKING:
    from privtrain.backends import Backend

Engine = Literal["auto", "transformers", "vllm"]

#: Ranks of adapters that vLLM has kernels for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: How often a context is asked again for a text that is not there yet.
_MOST_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How texts are drawn.

    Attributes:
        num_texts: how many different texts are wanted.
        temperature: divides the logits; above 0.
        top_p: keeps the smallest set of most likely tokens with at least this probability, in (0, 1].
        top_k: keeps this many most likely tokens; 0 keeps all.
        max_new_tokens: most tokens of a text, without its context.
        min_new_tokens: fewest tokens of a text.
        batch_size: contexts in one call of the model.
        seed: of the random numbers; public.
    """

    num_texts: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    min_new_tokens: int
    batch_size: int
    seed: int

    def faults(self) -> list[Fault]:
        """Return what is out of range."""
        rules = [
            ("--num-texts", self.num_texts >= 1, self.num_texts, "at least 1"),
            ("--temperature", 0 < self.temperature <= 100, self.temperature, "above 0 and at most 100"),
            ("--top-p", 0 < self.top_p <= 1, self.top_p, "above 0 and at most 1"),
            ("--top-k", self.top_k >= 0, self.top_k, "0 (all) or above"),
            ("--max-new-tokens", self.max_new_tokens >= 1, self.max_new_tokens, "at least 1"),
            (
                "--min-new-tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                self.min_new_tokens,
                f"from 0 to the {self.max_new_tokens} of --max-new-tokens",
            ),
            ("--batch-size", self.batch_size >= 1, self.batch_size, "at least 1"),
            ("--seed", 0 <= self.seed < 2**63, self.seed, "from 0 to 2**63 - 1"),
        ]
        return [Fault(key, f"given {given}; must be {allowed}") for key, holds, given, allowed in rules if not holds]


class Sampler(Protocol):
    """Draws one text after each context."""

    def draw(self, contexts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Return the new tokens after each context, without the end mark; the same for the same contexts and seed."""
        ...


class TransformersSampler:
    """Draws texts by ``model.generate``; shorter contexts of a batch are padded on the left.

    Args:
        model: in evaluation mode, on the device that it computes on; its own generation settings are put aside.
        settings: how to draw.
        ends: ids of the tokens that end a text.
        pad_id: id that rows are padded with.
        banned: ids that are never drawn, since they stand for no text.
    """

    def __init__(
        self, model: Any, settings: SamplingSettings, *, ends: Sequence[int], pad_id: int, banned: Sequence[int]
    ) -> None:
        from transformers import GenerationConfig

        self._model, self._ends, self._pad_id = model, list(ends), pad_id
        # What a base sets for itself (a repetition penalty, other end marks) is not what was asked for. In a model with
        # an adapter the base lies at model.base_model.model.
        for owner in (model, getattr(getattr(model, "base_model", None), "model", None)):
            if owner is not None and hasattr(owner, "generation_config"):
                owner.generation_config = GenerationConfig()
        self._generation = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None,
            eos_token_id=self._ends,
            pad_token_id=pad_id,
            suppress_tokens=list(banned) or None,
            use_cache=True,
        )

    def draw(self, contexts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Return the new tokens of each context; see :class:`Sampler`."""
        import torch

        width = max(map(len, contexts))
        rows = [[self._pad_id] * (width - len(ids)) + list(ids) for ids in contexts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in contexts]
        device = next(self._model.parameters()).device
        ids = torch.tensor(rows, device=device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            drawn = self._model.generate(
                input_ids=ids,
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._generation,
            )
        # Rows begin with their context; but with virtual tokens some versions of PEFT return the new tokens alone.
        has_contexts = drawn.shape[1] > width and torch.equal(drawn[:, :width], ids)
        new = drawn[:, width:] if has_contexts else drawn
        return [_until(row, self._ends) for row in new.tolist()]


class SharedSampler:
    """Draws several batches at once, one on each rank; all ranks get all texts.

    A batch has the contexts and the seed that it has on one rank, so the texts do not depend on the number of ranks.

    Args:
        sampler: this rank's.
        settings: the size of a batch, and the longest text.
        backend: the job's processes; all of them draw together.
    """

    def __init__(self, sampler: Sampler, settings: SamplingSettings, backend: Backend) -> None:
        self._sampler, self._settings, self._backend = sampler, settings, backend

    def draw(self, contexts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Return the new tokens of each context, of which there is at most a batch for each rank."""
        import torch

        start = self._backend.rank * self._settings.batch_size  # of this rank's batch
        mine = contexts[start : start + self._settings.batch_size]
        # A row for each text: how many tokens it has, and these. Each rank fills its rows; the sum has them all.
        table = torch.zeros(len(contexts), 1 + self._settings.max_new_tokens, dtype=torch.int64)
        drawn = self._sampler.draw(mine, seed + start) if mine else []
        for row, tokens in zip(table[start : start + len(mine)], drawn, strict=True):
            row[0] = len(tokens)
            row[1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        table = table.to(self._backend.device)
        self._backend.reduce(table)
        return [row[1 : 1 + row[0]] for row in table.tolist()]


class VllmSampler:
    """Draws texts by vLLM, which loads base and adapter itself.

    Args:
        model: directory or hub name of base or model.
        tokenizer: directory of the released tokenizer.
        adapter: directory of a LoRA adapter; None if ``model`` holds all weights.
        rank: of the adapter.
        settings: how to draw.
        ends: tokens that end a text.
    """

    def __init__(
        self,
        model: str,
        tokenizer: pathlib.Path,
        adapter: pathlib.Path | None,
        rank: int,
        settings: SamplingSettings,
        *,
        ends: Sequence[int],
    ) -> None:
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self._vllm, self._settings, self._ends = vllm, settings, list(ends)
        options: dict[str, Any] = {}
        if adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": next(size for size in _VLLM_RANKS if size >= rank)}
        self._llm = vllm.LLM(model=model, tokenizer=str(tokenizer), seed=settings.seed, **options)
        self._request = None if adapter is None else LoRARequest("released", 1, str(adapter))

    def draw(self, contexts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Return the new tokens of each context; see :class:`Sampler`."""
        settings = self._settings
        parameters = [
            self._vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,  # vLLM's "all"
                max_tokens=settings.max_new_tokens,
                min_tokens=settings.min_new_tokens,
                stop_token_ids=self._ends,
                seed=seed + number,
                detokenize=False,
            )
            for number in range(len(contexts))
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in contexts]
        outputs = self._llm.generate(prompts, parameters, lora_request=self._request, use_tqdm=False)
        return [_until(list(output.outputs[0].token_ids), self._ends) for output in outputs]


def _until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first end mark."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:place])
    return list(tokens)


def why_not_vllm(config: Config) -> str:
    """Return why vLLM cannot serve a run's release, or is not there; empty if nothing speaks against it."""
    lora = config.lora
    if importlib.util.find_spec("vllm") is None:
        return "it is not installed: pip install vllm"
    if config.training.has_virtual_tokens:
        return f"it has no virtual tokens of training.method: {config.training.method}"
    if config.model.quantization is not None or config.model.gguf_file is not None:
        return "the base is held in another form than the one that it would load"
    if config.training.method == "lora" and (lora.use_dora or lora.modules_to_save):
        return "its adapters have neither DoRA nor lora.modules_to_save"
    if config.training.method == "lora" and lora.rank > _VLLM_RANKS[-1]:
        return f"its adapters have a rank of at most {_VLLM_RANKS[-1]}"
    return ""


def chosen_engine(engine: Engine, config: Config, *, is_alone: bool = True) -> Literal["transformers", "vllm"]:
    """Return the library that samples; ``auto`` chooses vLLM if it is installed and can serve the run.

    Args:
        engine: the one asked for.
        config: of the run.
        is_alone: whether the job is one process; vLLM starts its own.

    Raises:
        ConfigError: if vLLM is asked for and cannot.
    """
    if engine == "transformers":
        return engine
    problem = why_not_vllm(config)
    if not problem and not is_alone:
        problem = "it starts its own processes, and a launcher has started several; start privtrain by itself"
    if not problem:
        return "vllm"
    if engine == "vllm":
        raise ConfigError([Fault("--engine", f"vllm cannot serve this run: {problem}; use transformers")])
    return "transformers"


def vllm_sampler(
    config: Config, section: ModelSection, run: RunDirectory, settings: SamplingSettings, ends: Sequence[int]
) -> VllmSampler:
    """Return a sampler of what a run released: all weights, or an adapter on the base model that ``section`` names."""
    is_whole = config.training.releases_model
    path = str(run.model) if is_whole else locate(section).path
    return VllmSampler(path, run.released, None if is_whole else run.adapter, config.lora.rank, settings, ends=ends)


def distinct(
    sampler: Sampler,
    contexts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    decode: Any,
    key: Any,
    *,
    num_ranks: int = 1,
) -> Iterator[tuple[int, str]]:
    """Yield different texts, as many after each context as after the others, each as (number of the context, text).

    Empty texts, and texts drawn before after the same context, are left out and drawn again, a few times at most. What
    is left out depends on the sampled texts alone, so ε covers the choice.

    Args:
        sampler: draws.
        contexts: token ids to sample after.
        settings: how many, and how.
        decode: token ids → text.
        key: text → a normal form; two texts with the same one count as one text.
        num_ranks: how many batches ``sampler`` draws at once.
    """
    share, rest = divmod(settings.num_texts, len(contexts))
    wanted = [share + (number < rest) for number in range(len(contexts))]  # texts still to draw, by context
    seen: set[tuple[int, str]] = set()
    seed = settings.seed
    for _ in range(_MOST_ROUNDS):
        lacking = [number for number, count in enumerate(wanted) for _ in range(count)]
        for start in range(0, len(lacking), num_ranks * settings.batch_size):
            batch = lacking[start : start + num_ranks * settings.batch_size]
            drawn = sampler.draw([contexts[number] for number in batch], seed)
            seed += len(batch)  # a sampler may use seed, seed + 1, ... for the texts of a batch
            for number, tokens in zip(batch, drawn, strict=True):
                text = decode(tokens)
                if not text.strip() or (number, key(text)) in seen:
                    continue
                seen.add((number, key(text)))
                wanted[number] -= 1
                yield number, text
        if not any(wanted):
            return
