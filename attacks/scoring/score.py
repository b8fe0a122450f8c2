"""Score documents: log-probabilities of every token under the fine-tuned model and under its exact base. No verdicts.

Launched like training (``accelerate launch ... -m attacks score RUN``). The documents are cut into parts, which are
assigned to ranks and written whole: the signals do not depend on the number of ranks, memory does not grow with the
number of documents, and a job that was killed continues where it stopped.

A part counts only if its seal says that it is of this target, these documents and these settings; whatever cannot be
shown to be is scored again. So rows of two models never meet in one file.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import accelerate.utils
import numpy as np
import torch
from accelerate import PartialState
from rich.progress import track

from attacks import evidence
from attacks.alone import alone
from attacks.errors import AttackInputError
from attacks.reporting.record import PART_SCHEMA_NAME, record_path, write_scoring
from attacks.scoring import documents as planning
from attacks.scoring import labeller, planned
from attacks.scoring import target as targets
from attacks.scoring import variants as rewriting
from attacks.scoring.columns import days_of, spans_of
from attacks.scoring.documents import Document, attack_pseudonym
from attacks.scoring.job import Job, ScoreOptions, Tokens, prepare_job
from attacks.scoring.languages import guess_language
from attacks.scoring.neural import NeuralScorer
from attacks.scoring.pii import PRESIDIO, find_personal_data
from attacks.scoring.planned import DocumentKey
from attacks.scoring.sampling_scheme import SamplingScheme
from attacks.scoring.scorer import Scorer, TokenSignals
from attacks.scoring.variants import Variants
from attacks.signals import (
    CANARY,
    CANARY_REFERENCE,
    CONTROL_PREFIX,
    REFERENCES_PATH,
    SIGNALS_PATH,
    DocumentSignals,
    join_signals,
    write_signals,
)
from privtrain.config import Config
from privtrain.config.model import ModelSection
from privtrain.errors import PrivtrainError, RunBusy, UnsafePath
from privtrain.models.load import base_dtype, load_adapter, load_base, resolve_precision
from privtrain.process.group import join_processes
from privtrain.run.directory import RunDirectory


def score_run(
    run_path: pathlib.Path, options: ScoreOptions | None = None, *, documents_of: pathlib.Path | None = None
) -> None:
    """Write the signals of a finished run; nothing to do if they are there and sealed as those of this very job.

    Args:
        run_path: directory of a finished run.
        options: what is scored.
        documents_of: another run whose documents are scored under this run's model instead, as a shadow or reference of
            it; the signals then go to that run, with the sides that the users have in this one.

    Raises:
        AttackInputError: if the run is not finished, its manifest is broken, or its data changed since training.
        PrivtrainError: if what it released is not what its statement and its ledger say; nothing is scored then.
        RunBusy: if another job scores, analyses or reports the same signals.
    """
    options = options or ScoreOptions()
    run, attacked = RunDirectory(run_path), RunDirectory(documents_of or run_path)
    if documents_of is not None and run.root.resolve() == attacked.root.resolve():
        raise AttackInputError(f"{run.root} is no shadow of itself; give --documents-of another run")
    run.check_private()
    attacked.check_private()
    evidence.verified_statement(run_path)
    config = evidence.read_config(run)
    if config.data.is_classification:
        raise AttackInputError("attacks score tokens of texts; a run with data.format: classification predicts none")
    state, device = join_processes(config.performance.collective_timeout_seconds)
    try:
        signals_path = attacked.root / SIGNALS_PATH
        if documents_of is not None:
            signals_path = attacked.root / REFERENCES_PATH / f"shadow-{run_path.resolve().name}.parquet"
        if config.performance.num_threads is not None:
            torch.set_num_threads(config.performance.num_threads)
        with _held(signals_path, state):
            job = prepare_job(
                run, attacked, config, options, signals_path, resolve_precision(config.performance.precision, device)
            )
            if _is_done(job, state):
                return
            target, base = load_scorers(run, config, device, SamplingScheme.parse(options.sampling))
            num_documents = _score_parts(job, target, base, state)
        if state.is_main_process:
            print(f"scored {num_documents} documents; next: attacks analyse {attacked.root}")
    finally:
        state.destroy_process_group()


@contextlib.contextmanager
def _held(signals_path: pathlib.Path, state: PartialState) -> Iterator[None]:
    """Lock the signals file while the block runs: rank 0 takes the lock, and all ranks raise its error if it cannot."""
    with contextlib.ExitStack() as stack:
        problem: PrivtrainError | None = None
        if state.is_main_process:
            try:
                stack.enter_context(alone(signals_path, is_writer=True))
            except (RunBusy, UnsafePath) as error:
                problem = error
        (problem,) = accelerate.utils.broadcast_object_list([problem])
        if problem is not None:
            raise problem
        yield


def _is_done(job: Job, state: PartialState) -> bool:
    """Return whether this job's signals are there already; rank 0 looks and tells the other ranks."""
    reason = job.why_not_done() if state.is_main_process else ""
    (reason,) = accelerate.utils.broadcast_object_list([reason])
    if state.is_main_process and not reason:
        print(f"{job.signals_path} is already there; delete it to score again")
        shutil.rmtree(job.parts, ignore_errors=True)  # of a job that was killed while it removed them
    elif state.is_main_process and (job.signals_path.exists() or record_path(job.signals_path).exists()):
        print(f"{job.signals_path} is scored again: {reason}")
    return not reason


def load_scorers(
    run: RunDirectory, config: Config, device: torch.device, scheme: SamplingScheme | None = None
) -> tuple[Scorer, Scorer]:
    """Return the fine-tuned model and its exact base: one set of weights with the adapter on and off, or two models.

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
        target = load_base(ModelSection(name_or_path=str(run.model)), dtype)
        return scorer(target), scorer(base)
    model = load_adapter(base, run.adapter)
    if _changes_the_base(model):
        return scorer(model), scorer(load_base(config.model, dtype))
    return scorer(model), scorer(model, model.disable_adapter)


def _changes_the_base(model: torch.nn.Module) -> bool:
    """Return whether the adapter trained parts of the base itself, so that disabling it does not give the base back.

    PEFT does so for biases (``bias``) and for whole modules (``modules_to_save``).
    """
    settings = next(iter(model.peft_config.values()))  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    return getattr(settings, "bias", "none") != "none" or bool(getattr(settings, "modules_to_save", None))


def _score_parts(job: Job, target: Scorer, base: Scorer, state: PartialState) -> int:
    """Score the missing parts, each on one rank, join all parts, and seal the result.

    Returns:
        The number of documents on rank 0; 0 on other ranks.
    """
    parts = planning.in_parts(job.documents)
    # One listing for all ranks: each rank's own could already see what another has just written.
    missing: list[int] = []
    if state.is_main_process:
        missing = [number for number, part in enumerate(parts) if job.sealed_part(number, part) is None]
    (missing,) = accelerate.utils.broadcast_object_list([missing])
    mine = missing[state.process_index :: state.num_processes]  # taken in turn
    for number in track(mine, "scoring", disable=not state.is_main_process):
        write_signals(job.part(number), score_documents(job, parts[number], target, base))
        write_scoring(job.attacked, job.part(number), job.part_facts(parts[number]), schema=PART_SCHEMA_NAME)
    state.wait_for_everyone()
    num_documents = 0
    if state.is_main_process:
        num_documents = _join(job, parts)
    state.wait_for_everyone()
    return num_documents


def _join(job: Job, parts: Sequence[Sequence[Document]]) -> int:
    """Join the parts into the signals file and seal it; return the number of documents.

    Raises:
        AttackInputError: if a part is missing, the parts are not all that was planned, or the target changed since.
    """
    sealed = [job.sealed_part(number, documents) for number, documents in enumerate(parts)]
    digests = [digest for digest in sealed if digest is not None]
    num_absent = len(sealed) - len(digests)
    if num_absent:
        raise AttackInputError(
            f"{num_absent} parts not found in {job.parts}: all ranks must see the run directory; "
            "score on one machine or on a shared file system"
        )
    now = {**targets.digests_of(job.run, job.model), "precision": job.digests["precision"]}
    changed = targets.differing(job.digests, now)
    if changed:
        shutil.rmtree(job.parts)
        raise AttackInputError(
            f"{job.run.root} changed while it was scored ({', '.join(changed)}); restore it and run the same command "
            "again"
        )
    paths = [job.part(number) for number in range(len(parts))]
    # Signals count only with their record: remove the old one first, so that a crash leaves no record that fits.
    record_path(job.signals_path).unlink(missing_ok=True)
    keys = [DocumentKey(*key) for key in join_signals(job.signals_path, paths, digests)]
    wrong = planned.difference(job.keys(job.documents), keys)
    if wrong:
        job.signals_path.unlink()
        raise AttackInputError(f"{job.parts} holds other documents than planned: {wrong}; delete it and score again")
    facts = {
        **job.facts,
        "planned": planned.facts_of(job.keys(job.documents)),
        "documents": planned.facts_of(keys),
        "num_parts": len(parts),
    }
    if job.options.spans_column == PRESIDIO:
        facts["labeller"] = labeller.measure_presidio()
        print(f"{facts['labeller']['name']} {labeller.sentence(facts['labeller'])}")
    write_scoring(job.attacked, job.signals_path, facts)
    shutil.rmtree(job.parts)
    return len(keys)


def score_documents(job: Job, documents: Sequence[Document], target: Scorer, base: Scorer) -> list[DocumentSignals]:
    """Return the signals of the documents of one part.

    Args:
        job: what is scored, and how.
        documents: of the part.
        target: the fine-tuned model.
        base: the model that fine-tuning started from.
    """
    texts = [document.text_in(job.corpus) for document in documents]
    tokens = planning.tokens_of(texts, job.encoder)
    documents, texts, tokens = _with_control_prefixes(documents, texts, tokens)
    target_signals = score_sequences(target, tokens, job.options.batch_tokens)
    base_signals = score_sequences(base, tokens, job.options.batch_tokens)
    names = [attack_pseudonym(job.key, document.user) for document in documents]
    means = _variant_means(job, names, documents, texts, tokens, target, base)
    rows = []
    for place, document in enumerate(documents):
        of_target, of_base = target_signals[place], base_signals[place]
        num_predicted = len(tokens[place]) - 1  # all tokens but the first
        if rewriting.RECALL in means[place]:
            assert job.prefix is not None
            # To compare with: the mean without the prefix, over the same tokens, as many as fit behind it.
            num_shared = min(num_predicted, job.max_length - len(job.prefix))
            means[place][rewriting.RECALL_PLAIN] = float(of_target.logp[:num_shared].mean(dtype=np.float64))
        rows.append(
            DocumentSignals(
                user=names[place],
                document=document.name,
                side=job.sides[document.user],
                target_logp=of_target.logp,
                base_logp=of_base.logp,
                kind=document.kind,
                target_correct=of_target.correct,
                target_mean=of_target.mean,
                target_variance=of_target.variance,
                target_sampled_logp=of_target.sampled_logp,
                base_correct=of_base.correct,
                base_mean=of_base.mean,
                base_variance=of_base.variance,
                base_sampled_logp=of_base.sampled_logp,
                token_ids=tokens[place][1:].astype(np.int32),
                variants=means[place],
                **_facts(job, document, texts[place], num_predicted),
            )
        )
    return rows


def _with_control_prefixes(
    documents: Sequence[Document], texts: Sequence[str], tokens: Sequence[Tokens]
) -> tuple[list[Document], list[str], list[Tokens]]:
    """Replace the first tokens of a part's control documents by another control document's.

    Documents, texts and tokens are parallel lists, as given and as returned. Control documents that find no other
    user's prompt within the part are left out.
    """
    controls = [place for place, document in enumerate(documents) if document.kind == CONTROL_PREFIX]
    users_of_controls = [documents[place].user for place in controls]
    exchanged = rewriting.exchange_prefixes(users_of_controls, [tokens[place] for place in controls])
    tokens_at: dict[int, Tokens | None] = dict(enumerate(tokens))
    tokens_at.update(zip(controls, exchanged, strict=True))  # None: left out
    kept = {place: ids for place, ids in tokens_at.items() if ids is not None}
    return [documents[place] for place in kept], [texts[place] for place in kept], list(kept.values())


def score_sequences(scorer: Scorer, sequences: Sequence[Tokens], batch_tokens: int) -> list[TokenSignals]:
    """Return the signals of each sequence, in the order given; forward passes are batches of similar length."""
    return _in_batches(scorer.score, sequences, batch_tokens)


_Result = TypeVar("_Result")


def _in_batches(
    ask: Callable[[Sequence[Tokens]], Sequence[_Result]], sequences: Sequence[Tokens], batch_tokens: int
) -> list[_Result]:
    """Return what ``ask`` makes of each sequence, in the order given; it gets a batch of similar length at a time."""
    results: dict[int, _Result] = {}  # place of the sequence → its result
    for batch in planning.compose_batches([len(tokens) for tokens in sequences], batch_tokens):
        of_batch = ask([sequences[place] for place in batch])
        results.update(zip(batch, of_batch, strict=True))
    return [results[place] for place in range(len(sequences))]


def _variant_means(
    job: Job,
    names: Sequence[str],
    documents: Sequence[Document],
    texts: Sequence[str],
    tokens: Sequence[Tokens],
    target: Scorer,
    base: Scorer,
) -> list[dict[str, float]]:
    """Return, for each document, name of a re-written text to its mean log-probability under the target.

    Args:
        job: what is scored, and how.
        names: pseudonyms of the documents' owners.
        documents: of the part.
        texts: of the documents.
        tokens: of the documents.
        target: the model that is asked.
        base: the model that proposes words for neighbours.
    """
    wanted = Variants.parse(job.options.variants)
    rewritten = rewriting.rewrite(
        wanted, texts, tokens, encoder=job.encoder, max_length=job.max_length, prefix=job.prefix
    )
    # A document as long as the prefix leaves nothing to predict.
    rewritten = [item for item in rewritten if len(item.tokens) - 1 > item.first]
    if wanted.num_neighbours:
        proposals = _in_batches(lambda batch: rewriting.propose(base, batch), tokens, job.options.batch_tokens)
        labels = [f"{name}/{document.index}" for name, document in zip(names, documents, strict=True)]
        rewritten += rewriting.neighbours(labels, tokens, proposals, wanted.num_neighbours)
    means: list[dict[str, float]] = [{} for _ in documents]
    scored = score_sequences(target, [item.tokens for item in rewritten], job.options.batch_tokens)
    for item, signals in zip(rewritten, scored, strict=True):
        of_document = signals.logp[item.first :]  # without a prefix
        means[item.place][item.name] = float(of_document.mean(dtype=np.float64))
    return means


def _facts(job: Job, document: Document, text: str, num_tokens: int) -> dict[str, Any]:
    """Return the fields of ``DocumentSignals`` that need no model: sizes, sensitive tokens, date and language.

    Canaries, their references and controls have sizes only.
    """
    sizes = {**planning.text_facts(text), **planning.user_facts(job.manifest, job.corpus, document.user)}
    if document.kind in (CANARY, CANARY_REFERENCE, CONTROL_PREFIX):
        return sizes
    extra = job.extras.get((document.user, document.index), {})  # further columns of the document's row
    options = job.options
    spans = None
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
    stated_language = extra.get(options.language_column) if options.language_column else None
    return {
        **sizes,
        "sensitive": is_sensitive,
        "date": days_of(extra.get(options.date_column)) if options.date_column else None,
        "language": str(stated_language) if stated_language else guess_language(text),
    }
