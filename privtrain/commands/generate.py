"""``privtrain generate``: sample a corpus from a released model, and measure it where only its owner looks.

Two directories, never mixed: the corpus with the run's privacy statement, which may be shared, and a report in the
run's ``secret/``, which compares the corpus with the private records. No text is dropped or kept because of what the
report says: a corpus that was filtered by private records would be covered by no ε.

A *condition* is what a text is sampled after: nothing, a prompt, a conversation or a label. Its *context* is the same
as token ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privtrain.commands.corpus import sampling
from privtrain.commands.corpus.conditions import Condition, Text, contexts_of, digest_input, ends_of, read_conditions
from privtrain.commands.corpus.report import report_of
from privtrain.commands.corpus.sampling import Engine, Sampler, SamplingSettings
from privtrain.commands.outputs import output_faults
from privtrain.config import Config, load_config
from privtrain.config.data import DataSection, FilesSource
from privtrain.config.model import ModelSection
from privtrain.data.corpus import normal_form, source_files
from privtrain.errors import ConfigError, Fault
from privtrain.files import reading, strict_yaml
from privtrain.files.atomic import replace_directory, write_atomically
from privtrain.process.console import say
from privtrain.process.group import num_launched
from privtrain.run import bundle, generated
from privtrain.run.base_model import changed_base_files, check_model
from privtrain.run.directory import RunDirectory
from privtrain.run.places import own_config
from privtrain.run.release import banner

if TYPE_CHECKING:
    import torch

    from privtrain.backends import Backend


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What is sampled: the options of the command line.

    Attributes:
        num_texts: how many different texts.
        prompts: JSON lines file of public prompts or conversations that texts are sampled after.
        labels: instead of ``prompts``, labels that texts are sampled for.
        template: prompt for a label; ``{label}`` in it stands for the label.
        temperature: divides the logits.
        top_p: keeps the smallest set of most likely tokens with at least this probability; 1 keeps all.
        top_k: keeps this many most likely tokens; 0 keeps all.
        max_new_tokens: most tokens of a text; None: what ``data.max_length`` leaves after the longest condition.
        min_new_tokens: fewest tokens of a text.
        batch_size: texts that are sampled at once.
        seed: of the random numbers; public.
        engine: library that samples; ``auto``: vLLM if it is installed and can, else transformers.
        base_model: directory of the base model; by default where the run had it.
        copy_tokens: consecutive tokens of a training record in a text that make it a copy, for the private report.
    """

    num_texts: int = 1000
    prompts: pathlib.Path | None = None
    labels: tuple[str, ...] = ()
    template: str = "{label}"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    min_new_tokens: int = 1
    batch_size: int = 32
    seed: int = 0
    engine: Engine = "auto"
    base_model: pathlib.Path | None = None
    copy_tokens: int = 50


def generate(run: pathlib.Path, output: pathlib.Path, options: GenerateOptions) -> str:
    """Sample a corpus into a new directory; where the run's ``secret/`` is at hand, measure it there.

    Every process of the job calls this: they share out the batches of texts, and rank 0 writes. Each checks the files
    that it reads, which may be on a disk of its own machine.

    Args:
        run: a finished run.
        output: directory to make.
        options: what is sampled.

    Returns:
        Lines that say what was written where, and what the owner should read; nothing on other ranks than 0.

    Raises:
        ConfigError: with every fault; nothing is written then.
        RankLost: if another process died; nothing is written if it was while sampling.
        VerificationFailed: if the run does not hold what was released.
    """
    directory = RunDirectory(run)
    _check(directory, output, options)
    manifest = bundle.check_released(run)
    config, section = _configuration(directory, options, manifest)
    _check_prompts(options.prompts, config.data)
    conditions = read_conditions(config.data, options.prompts, options.labels, options.template)
    engine = sampling.chosen_engine(options.engine, config, is_alone=num_launched() == 1)
    tokenizer = _tokenizer(directory)
    contexts = contexts_of(conditions, config.data, tokenizer, config.data.max_length)
    room = config.data.max_length - max(map(len, contexts))  # tokens left for a text after the longest context
    settings = SamplingSettings(
        num_texts=options.num_texts,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens or room,
        min_new_tokens=options.min_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    faults = settings.faults()
    if settings.max_new_tokens > room:
        problem = f"given {settings.max_new_tokens}; data.max_length={config.data.max_length} leaves {room}"
        faults.append(Fault("--max-new-tokens", problem))
    if faults:
        raise ConfigError(faults)
    with _ranks(engine, config) as backend:
        sampler = _sampler(engine, config, section, directory, settings, tokenizer, backend.device)
        texts = _sampled(sampler, conditions, contexts, settings, tokenizer, backend)
        if not texts:
            raise ConfigError([Fault("RUN", "its model wrote no text: every sample was empty. Give --min-new-tokens")])
        lines = []
        with backend.main_alone():
            if backend.is_main:
                described = _write(directory, manifest, output, config.data, conditions, texts, engine, settings)
                lines = _lines(directory, config, output, texts, described, options, tokenizer)
    return "\n".join(lines)


def _lines(
    run: RunDirectory,
    config: Config,
    output: pathlib.Path,
    texts: Sequence[Text],
    described: Mapping[str, Any],
    options: GenerateOptions,
    tokenizer: Any,
) -> list[str]:
    """Return what is said of a corpus that was written; where ``secret/`` is at hand, make the private report first."""
    lines = [f"wrote {len(texts)} different texts to {output}; check them with: privtrain verify {output}"]
    if len(texts) < options.num_texts:
        lines.append(f"asked for {options.num_texts}; the rest were empty or repeated. Raise --temperature")
    if not run.manifest.is_file():  # the manifest, in secret/, says which users were trained on
        return [*lines, "not compared with the training data: the run's secret/ is not here"]
    return lines + report_of(run, config, texts, described, tokenizer, options.copy_tokens)


@contextlib.contextmanager
def _ranks(engine: str, config: Config) -> Iterator[Backend]:
    """Yield the job's processes, which share out the texts; vLLM, which takes its GPUs itself, is one process alone."""
    import torch

    from privtrain.backends import LocalBackend
    from privtrain.job.stop import StopRequest
    from privtrain.job.supervise import process_group

    if config.performance.num_threads is not None:
        torch.set_num_threads(config.performance.num_threads)
    if engine == "vllm":
        yield LocalBackend(torch.device("cpu"))
        return
    with process_group(config.performance, StopRequest()) as backend:  # nothing to save: a signal ends a rank at once
        yield backend


def _check(run: RunDirectory, output: pathlib.Path, options: GenerateOptions) -> None:
    """Raise ConfigError with everything that can be seen to be wrong before the run's files are read."""
    faults = output_faults(run, output)
    if options.copy_tokens < 1:
        faults.append(Fault("--copy-tokens", f"given {options.copy_tokens}; must be at least 1"))
    if faults:
        raise ConfigError(faults)


def _configuration(
    run: RunDirectory, options: GenerateOptions, manifest: bundle.ReleaseManifest
) -> tuple[Config, ModelSection]:
    """Return the run's configuration, and the ``model`` section that says where the base model is on this machine.

    Raises:
        ConfigError: if an adapter was released and its base is not at hand, or is not the one of the release.
    """
    if run.resolved_config.exists():  # in secret/, with local paths; the published copy has none
        run.check_private()
        config = own_config(run)
    else:
        config = load_config(run.config)
    section = config.model
    if options.base_model is not None:
        place = {"name_or_path": str(options.base_model), "package": None}
        section = section.model_copy(update=place)
    if config.training.releases_model:  # all weights were released; no base is needed
        return config, section
    if faults := check_model(section):
        remedy = "" if options.base_model else "; say where the base model is with --base-model DIRECTORY"
        raise ConfigError([Fault("--base-model", f"{fault.problem}{remedy}") for fault in faults])
    if wrong := changed_base_files(section, manifest.base_model):
        problem = f"is not the base model of the release: other {', '.join(wrong[:3])}"
        raise ConfigError([Fault("--base-model", problem)])
    return config, section


def _check_prompts(prompts: pathlib.Path | None, data: DataSection) -> None:
    """Raise if prompts are read from a file of private rows."""
    if prompts is None or not isinstance(data.source, FilesSource):
        return
    if prompts.resolve() in {file.resolve() for file in source_files(data.source)}:
        problem = f"{prompts} is a file of data.source, whose rows are private; prompts must be public"
        raise ConfigError([Fault("--prompts", problem)])


def _tokenizer(run: RunDirectory) -> Any:
    """Return the released tokenizer, with an end mark."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(run.released))
    # BERT-like tokenizers have no end mark; records were encoded with the separator in its place.
    if tokenizer.eos_token_id is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def _sampler(
    engine: str,
    config: Config,
    section: ModelSection,
    run: RunDirectory,
    settings: SamplingSettings,
    tokenizer: Any,
    device: torch.device,
) -> Sampler:
    """Load the released model into the chosen engine.

    Args:
        engine: ``transformers`` or ``vllm``.
        config: the run's configuration.
        section: where the base model of an adapter is.
        run: the run, with its adapter or model.
        settings: how to draw.
        tokenizer: the released one.
        device: of this rank; vLLM chooses its own.
    """
    ends = ends_of(config.data, tokenizer)
    if engine == "vllm":
        return sampling.vllm_sampler(config, section, run, settings, ends)
    from privtrain.models.limits import num_embedded, padding_id
    from privtrain.models.load import base_dtype, load_adapter, load_base, resolve_precision

    dtype = base_dtype(resolve_precision(config.performance.precision, device), device)
    if config.training.releases_model:
        model: Any = load_base(ModelSection(name_or_path=str(run.model)), dtype)
    else:
        model = load_adapter(load_base(section, dtype), run.adapter)
    num_ids = num_embedded(model)
    # Never sampled: rows of the embedding that no token has, and special tokens that do not end a text.
    unused_ids = set(range(len(tokenizer), num_ids))
    special_ids = {token_id for token_id in tokenizer.all_special_ids if token_id < num_ids}
    banned = sorted(unused_ids | (special_ids - set(ends)))
    if section.quantization is None:  # quantised weights were loaded onto the device
        model = model.to(device)
    return sampling.TransformersSampler(
        model.eval(), settings, ends=ends, pad_id=padding_id(model, tokenizer), banned=banned
    )


def _sampled(
    sampler: Sampler,
    conditions: Sequence[Condition],
    contexts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    tokenizer: Any,
    backend: Backend,
) -> list[Text]:
    """Sample and decode different texts, each with its condition; ``contexts[i]`` are the tokens of condition i.

    Every rank returns all of them.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    texts: list[Text] = []
    shared = sampling.SharedSampler(sampler, settings, backend)
    drawn = sampling.distinct(shared, contexts, settings, decode, normal_form, num_ranks=backend.world_size)
    for number, text in drawn:
        texts.append(Text(conditions[number], text))
        if len(texts) % 500 == 0 and backend.is_main:
            say(f"{len(texts)} of {settings.num_texts} texts")
    return texts


def _write(
    run: RunDirectory,
    manifest: bundle.ReleaseManifest,
    output: pathlib.Path,
    data: DataSection,
    conditions: Sequence[Condition],
    texts: Sequence[Text],
    engine: str,
    settings: SamplingSettings,
) -> dict[str, Any]:
    """Write what may be shared: texts, privacy statement, card, and a description that binds them to the release.

    Returns:
        The description as written (``corpus.json``): settings, digests of files, and the digest over all of it.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        rows = [json.dumps(text.condition.row(text.written, data), ensure_ascii=False) for text in texts]
        write_atomically(temporary / generated.TEXTS, "".join(f"{row}\n" for row in rows))
        shutil.copy(run.privacy, temporary / "privacy.json")
        statement = reading.read_json(run.privacy)
        write_atomically(temporary / "README.md", _card(run, statement, len(texts), settings))
        facts = {
            "num_texts": len(texts),
            "conditions_sha256": hashlib.sha256(digest_input(conditions).encode()).hexdigest(),
            "sampling": {"engine": engine, **dataclasses.asdict(settings), "num_conditions": len(conditions)},
        }
        described = generated.describe(manifest, temporary, facts, is_private=statement["private"])
        replace_directory(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return described


def _card(run: RunDirectory, statement: Mapping[str, Any], num_texts: int, settings: SamplingSettings) -> str:
    """Return the card of the corpus: a data set's front matter, then the privacy statement as the run's card has it."""
    model_card = (run.released / "README.md").read_text(encoding="utf-8")
    section = model_card[model_card.index("## Privacy statement") :]
    covered = generated.COVERED if statement["private"] else generated.NOT_COVERED
    front = strict_yaml.dump({"tags": ["synthetic", "differential-privacy", "privtrain"]})
    return (
        f"---\n{front}---\n\n# Texts sampled from {run.root.resolve().name}\n\n{banner(dict(statement))}"
        f"{num_texts} texts that a model wrote. {covered}\n\n{generated.ASSUMPTION}\n\n"
        f"Sampled at temperature {settings.temperature:g}, top-p {settings.top_p:g}, at most {settings.max_new_tokens} "
        f"new tokens.\n\n{section}"
    )
