"""Score documents: signals of every token under the fine-tuned model and under its exact base. No verdicts.

Launched like training (``accelerate launch ... -m attacks score RUN``). The documents are cut into parts before they
are dealt to ranks, and a part is written whole: the signals do not depend on the number of ranks, memory does not grow
with the number of documents, and a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate.utils
import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from rich.progress import track

from attacks import documents as planning
from attacks import labeller
from attacks import variants as rewriting
from attacks.canaries import POOL, plan_canaries
from attacks.columns import Extras, days_of, read_columns, spans_of
from attacks.documents import PSEUDONYM_PURPOSE, Document, attack_pseudonym, sides_of
from attacks.errors import AttackInputError
from attacks.languages import guess_language
from attacks.neural import NeuralScorer
from attacks.pii import PRESIDIO, find_personal_data
from attacks.rundir import read_statement
from attacks.sampling_scheme import SamplingScheme
from attacks.scorer import Scorer, TokenSignals
from attacks.signals import (
    CANARY,
    CANARY_REFERENCE,
    CONTROL_PREFIX,
    HELD_OUT,
    REFERENCES_PATH,
    SCHEMA_NAME,
    SIGNALS_PATH,
    DocumentSignals,
    iterate_signals,
    join_signals,
    write_signals,
)
from attacks.variants import Variants
from privtrain.config import Config, load_config
from privtrain.config.schema import ModelSection
from privtrain.data.canaries import canaries_of, plant
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.encode import Encoder
from privtrain.models import base_dtype, load_adapter, load_base, load_tokenizer, resolve_precision
from privtrain.processes import join_processes
from privtrain.rundir import RunDirectory, write_json
from privtrain.secret import SecretKey

Tokens = npt.NDArray[np.int64]

MAX_TRAINING_RECORDS = 8
"""Beyond it users' very different numbers of records make the interval over records too short."""


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and how.

    Attributes:
        batch_tokens: tokens in one forward pass, padding included.
        num_training_records: records of each user, among those that training could use, beside the fresh ones.
        num_canary_references: secrets that each canary is compared with.
        variants: re-written texts to score too; see ``attacks.variants``.
        sampling: how text would be drawn from the model; see ``attacks.sampling_scheme``.
        spans_column: column of labelled spans, or ``presidio``; without it the spans that were sealed, if any.
        date_column: column of dates, for the blind baseline.
        language_column: column of languages; guessed from the text without it.
    """

    batch_tokens: int = 2048
    num_training_records: int = 2
    num_canary_references: int = 128
    variants: str = ""
    sampling: str = str(SamplingScheme())
    spans_column: str | None = None
    date_column: str | None = None
    language_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.num_training_records <= MAX_TRAINING_RECORDS:
            raise AttackInputError(
                f"--training-records {self.num_training_records}: expected 0 to {MAX_TRAINING_RECORDS}; with more, "
                "users of very different sizes make the interval over records too short"
            )

    @property
    def columns(self) -> list[str]:
        """Columns to read beside the trainer's own."""
        spans = None if self.spans_column == PRESIDIO else self.spans_column
        return [name for name in (spans, self.date_column, self.language_column) if name is not None]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything but the models: which documents, how they become tokens, where the signals go."""

    manifest: Mapping[str, Any]
    sides: Mapping[str, str]
    corpus: Corpus
    extras: Extras
    tokenizer: Any
    encoder: Encoder
    max_length: int
    options: ScoreOptions
    documents: Sequence[Document]
    key: SecretKey
    prefix: Tokens | None
    sealed_spans: Mapping[str, Mapping[str, Sequence[Sequence[int]]]] | None
    target: pathlib.Path
    fingerprint: str
    notes: Mapping[str, Any]

    @property
    def parts(self) -> pathlib.Path:
        """Where finished parts wait; another job's parts have another name."""
        return self.target.parent / f"parts-{self.target.stem}-{self.fingerprint[:12]}"

    def part(self, number: int) -> pathlib.Path:
        """One finished part."""
        return self.parts / f"part-{number:06d}.parquet"


def score_run(
    run_path: pathlib.Path, options: ScoreOptions | None = None, *, documents_of: pathlib.Path | None = None
) -> None:
    """Writes the signals of a finished run; nothing to do if they are there.

    Args:
        run_path: directory of a finished run.
        options: what is scored.
        documents_of: another run whose documents are scored under this run's model instead, as a shadow or reference of
            it; the signals then go to that run, with the sides that the users have in this one.

    Raises:
        AttackInputError: if the run is not finished, its manifest is broken, or its data changed since training.
    """
    options = options or ScoreOptions()
    read_statement(run_path)
    run, attacked = RunDirectory(run_path), RunDirectory(documents_of or run_path)
    config = load_config(run.resolved_config)
    if config.data.is_classification:
        raise AttackInputError("attacks score tokens of texts; a run with data.format: classification predicts none")
    state, device = join_processes(config.performance.collective_timeout_seconds)
    try:
        target = attacked.root / SIGNALS_PATH
        if documents_of is not None:
            target = attacked.root / REFERENCES_PATH / f"shadow-{run_path.resolve().name}.parquet"
        if target.is_file():
            next(iterate_signals(target), None)
            if state.is_main_process:
                print(f"{target} is already there; delete it to score again")
            return
        if config.performance.num_threads is not None:
            torch.set_num_threads(config.performance.num_threads)
        job = _prepare(run, attacked, config, options, target)
        tuned, base = load_scorers(run, config, device, SamplingScheme.parse(options.sampling))
        num_documents = _score_parts(job, tuned, base, state)
        if state.is_main_process:
            print(f"scored {num_documents} documents; next: attacks analyse {attacked.root}")
    finally:
        state.destroy_process_group()


def _prepare(
    run: RunDirectory, attacked: RunDirectory, config: Config, options: ScoreOptions, target: pathlib.Path
) -> Job:
    """Reads everything that is needed besides the models."""
    own = planning.read_manifest(run)
    manifest = own if attacked.root == run.root else planning.read_manifest(attacked)
    attacked_config = config if attacked.root == run.root else load_config(attacked.resolved_config)
    data = attacked_config.data
    if attacked_config.model != config.model:
        raise AttackInputError(f"{run.root} starts from another base model than {attacked.root}; expected the same one")
    tokenizer = load_tokenizer(config.model)
    natural = load_corpus(data, attacked_config.performance.index_dir)
    corpus = plant(natural, canaries_of(manifest))
    variants = Variants.parse(options.variants)
    documents = planning.plan_documents(
        manifest, corpus, options.num_training_records, with_controls=variants.control_prefix
    )
    if attacked.root == run.root:
        root_key = run.load_key("root")
        documents += plan_canaries(manifest, config.canaries, tokenizer, root_key, options.num_canary_references)
    has_spans = options.spans_column or (run.root / planning.SPANS_PATH).is_file()
    if data.format != "text" and (options.variants or has_spans):
        raise AttackInputError(
            f"re-written texts and sensitive spans need data.format: text; {run.root} was trained on {data.format}"
        )
    prefix = rewriting.recall_prefix(manifest, corpus, tokenizer, data.max_length) if variants.recall else None
    settings = [
        SCHEMA_NAME,
        PSEUDONYM_PURPOSE,
        manifest["sha256"],
        run.privacy.read_text(encoding="utf-8"),
        dataclasses.asdict(options),
        config.model.model_dump(mode="json"),
        config.performance.precision,
    ]
    return Job(
        manifest=manifest,
        sides={**sides_of(own, manifest), POOL: HELD_OUT},
        corpus=corpus,
        extras=read_columns(data, natural, options.columns, _records_of(documents)),
        tokenizer=tokenizer,
        encoder=Encoder(data, tokenizer),
        max_length=data.max_length,
        options=options,
        documents=planning.in_order(documents, corpus),
        key=attacked.load_key("pseudonym"),
        prefix=prefix,
        sealed_spans=planning.read_spans(attacked, manifest) if options.spans_column is None else None,
        target=target,
        fingerprint=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        notes=_notes(options),
    )


def _records_of(documents: Sequence[Document]) -> set[tuple[str, int]]:
    """The documents that are records of the data as they stand there."""
    return {(document.user, document.index) for document in documents if document.text is None}


def load_scorers(
    run: RunDirectory, config: Config, device: torch.device, scheme: SamplingScheme | None = None
) -> tuple[Scorer, Scorer]:
    """The fine-tuned model and its exact base: one set of weights with the adapter on and off, or two models.

    Args:
        run: a finished run; what it released is loaded, whatever backend trained it.
        config: its configuration.
        device: where the models go.
        scheme: under which every token's probability is wanted too.
    """
    precision = resolve_precision(config.performance.precision, device)
    dtype = base_dtype(precision, device)
    base = load_base(config.model, dtype)

    def scorer(network: Any, context: Any = contextlib.nullcontext) -> NeuralScorer:
        return NeuralScorer(network, device, precision, context, scheme)

    if config.training.releases_model:
        tuned = load_base(ModelSection(name_or_path=str(run.model)), dtype)
        return scorer(tuned), scorer(base)
    model = load_adapter(base, run.adapter)
    if _changes_the_base(model):
        return scorer(model), scorer(load_base(config.model, dtype))
    return scorer(model), scorer(model, model.disable_adapter)


def _changes_the_base(model: torch.nn.Module) -> bool:
    """Whether disabling the adapter would not give the base back: trained biases or whole modules."""
    settings = next(iter(model.peft_config.values()))  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    return getattr(settings, "bias", "none") != "none" or bool(getattr(settings, "modules_to_save", None))


def _score_parts(job: Job, tuned: Scorer, base: Scorer, state: PartialState) -> int:
    """Scores what is not there yet, each part on one rank, and joins all parts."""
    parts = planning.in_parts(job.documents)
    # One listing for all ranks: each rank's own could already see what another has just written.
    missing = [[number for number in range(len(parts)) if not job.part(number).is_file()]]
    accelerate.utils.broadcast_object_list(missing)
    mine = missing[0][state.process_index :: state.num_processes]
    for number in track(mine, "scoring", disable=not state.is_main_process):
        write_signals(job.part(number), score_documents(job, parts[number], tuned, base))
    state.wait_for_everyone()
    num_documents = 0
    if state.is_main_process:
        absent = [number for number in range(len(parts)) if not job.part(number).is_file()]
        if absent:
            raise AttackInputError(
                f"{len(absent)} parts not found in {job.parts}: all ranks must see the run directory; "
                "score on one machine or on a shared file system"
            )
        if "labeller" in job.notes:
            print(f"{job.notes['labeller']['name']} {labeller.sentence(job.notes['labeller'])}")
        write_json(job.target.with_suffix(".json"), job.notes, mode=0o600)
        num_documents = join_signals(job.target, [job.part(number) for number in range(len(parts))])
        shutil.rmtree(job.parts)
    state.wait_for_everyone()
    return num_documents


def _notes(options: ScoreOptions) -> dict[str, Any]:
    """What stands beside the signals: how they were made, and how good the labeller is where one was used."""
    found: dict[str, Any] = {"options": dataclasses.asdict(options)}
    if options.spans_column == PRESIDIO:
        found["labeller"] = labeller.measure_presidio()
    return found


def score_documents(job: Job, documents: Sequence[Document], tuned: Scorer, base: Scorer) -> list[DocumentSignals]:
    """Signals of the documents of one part."""
    texts = [document.text_in(job.corpus) for document in documents]
    tokens = planning.tokens_of(texts, job.encoder)
    documents, texts, tokens = _with_control_prefixes(documents, texts, tokens)
    batch_tokens = job.options.batch_tokens
    target_signals, base_signals = (score_sequences(scorer, tokens, batch_tokens) for scorer in (tuned, base))
    names = [attack_pseudonym(job.key, document.user) for document in documents]
    means = _variant_means(job, names, documents, texts, tokens, tuned, base)
    rows = []
    for place, document in enumerate(documents):
        target, reference = target_signals[place], base_signals[place]
        if rewriting.RECALL in means[place]:
            assert job.prefix is not None
            num_shared = min(len(tokens[place]), job.max_length - len(job.prefix) + 1) - 1
            means[place][rewriting.RECALL_PLAIN] = float(target.logp[:num_shared].mean(dtype=np.float64))
        rows.append(
            DocumentSignals(
                names[place],
                document.name,
                job.sides[document.user],
                target.logp,
                reference.logp,
                kind=document.kind,
                target_correct=target.correct,
                target_mean=target.mean,
                target_variance=target.variance,
                target_sampled_logp=target.sampled_logp,
                base_correct=reference.correct,
                base_mean=reference.mean,
                base_variance=reference.variance,
                base_sampled_logp=reference.sampled_logp,
                token_ids=tokens[place][1:].astype(np.int32),
                variants=means[place],
                **_facts(job, document, texts[place], len(tokens[place]) - 1),
            )
        )
    return rows


def _with_control_prefixes(
    documents: Sequence[Document], texts: Sequence[str], tokens: Sequence[Tokens]
) -> tuple[list[Document], list[str], list[Tokens]]:
    """The control documents of a part get each other's first tokens; those for which there are none are left out."""
    chosen = [place for place, document in enumerate(documents) if document.kind == CONTROL_PREFIX]
    found: dict[int, Tokens | None] = dict(enumerate(tokens))
    users = [documents[place].user for place in chosen]
    found |= zip(chosen, rewriting.exchange_prefixes(users, [tokens[place] for place in chosen]), strict=True)
    kept = {place: ids for place, ids in found.items() if ids is not None}
    return [documents[place] for place in kept], [texts[place] for place in kept], list(kept.values())


def score_sequences(scorer: Scorer, sequences: Sequence[Tokens], batch_tokens: int) -> list[TokenSignals]:
    """Signals of each sequence, in order, in batches of similar length."""
    found: dict[int, TokenSignals] = {}
    for batch in planning.compose_batches([len(tokens) for tokens in sequences], batch_tokens):
        found.update(zip(batch, scorer.score([sequences[place] for place in batch]), strict=True))
    return [found[place] for place in range(len(sequences))]


def _variant_means(
    job: Job,
    names: Sequence[str],
    documents: Sequence[Document],
    texts: Sequence[str],
    tokens: Sequence[Tokens],
    tuned: Scorer,
    base: Scorer,
) -> list[dict[str, float]]:
    """Mean log-probability under the target of every re-written text, by document and name."""
    wanted = Variants.parse(job.options.variants)
    rewritten = rewriting.rewrite(
        wanted, texts, tokens, tokenizer=job.tokenizer, max_length=job.max_length, prefix=job.prefix
    )
    # A document as long as the prefix leaves nothing to predict.
    rewritten = [item for item in rewritten if len(item.tokens) - 1 > item.first]
    if wanted.num_neighbours:
        proposals: dict[int, Tokens] = {}
        for batch in planning.compose_batches([len(ids) for ids in tokens], job.options.batch_tokens):
            proposals.update(zip(batch, rewriting.propose(base, [tokens[place] for place in batch]), strict=True))
        labels = [f"{name}/{document.index}" for name, document in zip(names, documents, strict=True)]
        ordered = [proposals[place] for place in range(len(tokens))]
        rewritten += rewriting.neighbours(labels, tokens, ordered, wanted.num_neighbours)
    found: list[dict[str, float]] = [{} for _ in documents]
    scored = score_sequences(tuned, [item.tokens for item in rewritten], job.options.batch_tokens)
    for item, signals in zip(rewritten, scored, strict=True):
        found[item.place][item.name] = float(signals.logp[item.first :].mean(dtype=np.float64))
    return found


def _facts(job: Job, document: Document, text: str, num_tokens: int) -> dict[str, Any]:
    """What is known of a document and its owner without any model."""
    extra = job.extras.get((document.user, document.index), {})
    options = job.options
    spans = None
    if document.kind in (CANARY, CANARY_REFERENCE, CONTROL_PREFIX):
        return {**planning.text_facts(text), **planning.user_facts(job.manifest, job.corpus, document.user)}
    if options.spans_column == PRESIDIO:
        spans = find_personal_data(text)
    elif options.spans_column is not None:
        spans = spans_of(extra[options.spans_column], extra["offset"])
    elif job.sealed_spans is not None:
        pairs = job.sealed_spans.get(document.user, {}).get(str(document.index), ())
        spans = [(start, end) for start, end in pairs]
    is_sensitive = None
    if spans is not None:
        is_sensitive = planning.sensitive_tokens(text, spans, job.tokenizer, num_tokens)
    told = extra.get(options.language_column) if options.language_column else None
    return {
        **planning.text_facts(text),
        **planning.user_facts(job.manifest, job.corpus, document.user),
        "sensitive": is_sensitive,
        "date": days_of(extra.get(options.date_column)) if options.date_column else None,
        "language": str(told) if told else guess_language(text),
    }
