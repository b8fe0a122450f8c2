"""A scoring job before any model is loaded: which documents, how they become tokens, and what counts as finished."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks import evidence
from attacks.errors import AttackInputError
from attacks.reporting.record import PART_SCHEMA_NAME, read_scoring, record_path
from attacks.scoring import documents as planning
from attacks.scoring import planned
from attacks.scoring import target as targets
from attacks.scoring import variants as rewriting
from attacks.scoring.canaries import POOL, plan_canaries
from attacks.scoring.columns import Extras, read_columns
from attacks.scoring.documents import PSEUDONYM_PURPOSE, Document, sides_of
from attacks.scoring.pii import PRESIDIO
from attacks.scoring.planned import DocumentKey
from attacks.scoring.sampling_scheme import SamplingScheme
from attacks.scoring.variants import Variants
from attacks.signals import HELD_OUT, SCHEMA_NAME
from privtrain.config import Config
from privtrain.config.model import ModelSection
from privtrain.data.canaries import canaries_of, plant
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.manifest import split_commitment
from privtrain.errors import DamagedFile
from privtrain.files.reading import file_sha256
from privtrain.models.limits import num_ids_of
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey
from privtrain.run.directory import RunDirectory
from privtrain.run.sources import read_sources

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
        variants: re-written texts to score too; see ``attacks.scoring.variants``.
        sampling: how text would be drawn from the model; see ``attacks.scoring.sampling_scheme``.
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
    """Everything but the models: which documents, how they become tokens, where the signals go.

    Documents are scored in parts, each written and sealed as it is finished, so that a killed job can go on.

    Attributes:
        run: whose model is asked.
        attacked: whose documents are scored; another run where ``run`` is its shadow.
        model: the base model.
        digests: of the target: statement, released files, base model; see :mod:`attacks.scoring.target`.
        manifest: the split of ``attacked``.
        sides: user to ``"held_in"`` or ``"held_out"``, in the split of ``run``.
        corpus: records of ``attacked``, canaries included.
        extras: values of columns that the trainer does not read.
        tokenizer: the model's.
        encoder: texts to tokens, as training does.
        max_length: tokens of a document at most.
        options: what was asked for.
        documents: all documents, longest first.
        key: of the attack's pseudonyms.
        prefix: tokens that the variant ``recall`` puts before each document; None without it.
        sealed_spans: user to record index (as text) to [start, end) spans of sensitive text; None without any.
        signals_path: the file to write.
        fingerprint: digest of everything that a score depends on; parts of another one are not taken over.
        facts: what the record of the scoring says beside the documents.
    """

    run: RunDirectory
    attacked: RunDirectory
    model: ModelSection
    digests: Mapping[str, Any]
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
    signals_path: pathlib.Path
    fingerprint: str
    facts: Mapping[str, Any]

    @property
    def parts(self) -> pathlib.Path:
        """Directory of finished parts; a job with another fingerprint has another one."""
        return self.signals_path.parent / f"parts-{self.signals_path.stem}-{self.fingerprint[:12]}"

    def part(self, number: int) -> pathlib.Path:
        """Return the path of one finished part."""
        return self.parts / f"part-{number:06d}.parquet"

    def keys(self, documents: Sequence[Document]) -> list[DocumentKey]:
        """Return what the signals call these documents: pseudonym, name, kind and side."""
        return planned.keys_of(documents, self.sides, self.key)

    def part_facts(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Return what the record of a finished part says, if it is of this job and these documents."""
        return {"fingerprint": self.fingerprint, "planned": planned.facts_of(self.keys(documents))}

    def sealed_part(self, number: int, documents: Sequence[Document]) -> str | None:
        """Return the SHA-256 of a finished part of this job; None if it is missing, damaged or another job's.

        Args:
            number: of the part.
            documents: that it must hold.
        """
        path = self.part(number)
        try:
            scoring = read_scoring(self.attacked, path, schema=PART_SCHEMA_NAME)
            scoring.check()
        except (DamagedFile, AttackInputError):
            return None
        for name, expected in self.part_facts(documents).items():
            if scoring.facts.get(name) != expected:
                return None
        return scoring.facts["signals_sha256"]

    def why_not_done(self) -> str:
        """Return why the job must still be done, in words; empty if this job's signals are there already."""
        if not self.signals_path.exists() and not record_path(self.signals_path).exists():
            return "there is none"
        try:
            scoring = read_scoring(self.attacked, self.signals_path)
            scoring.check()
        except DamagedFile as error:
            return f"it {error.problem}" if error.path == self.signals_path else f"its record {error.problem}"
        if scoring.facts.get("fingerprint") != self.fingerprint:
            return "it is of another target, other documents or other settings"
        if scoring.facts.get("planned") != planned.facts_of(self.keys(self.documents)):
            return "it is of other documents"
        return ""


def prepare_job(
    run: RunDirectory,
    attacked: RunDirectory,
    config: Config,
    options: ScoreOptions,
    signals_path: pathlib.Path,
    precision: str,
) -> Job:
    """Read everything that a scoring needs besides the models.

    Args:
        run: whose model is asked.
        attacked: whose documents are scored; the same run, unless ``run`` is its shadow: trained for comparison, on the
            same data under another split.
        config: of ``run``.
        options: what is scored.
        signals_path: the file to write.
        precision: ``"fp32"`` or ``"bf16"``, of the forward passes.

    Raises:
        AttackInputError: if manifest, data or base model are not those that the run was trained with, or an option does
            not fit the data.
    """
    digests = {**targets.digests_of(run, config.model), "precision": precision}
    evidence.check_base(run, digests["base"])
    own = planning.read_manifest(run)
    is_shadow = attacked.root != run.root
    manifest = planning.read_manifest(attacked) if is_shadow else own
    attacked_config = evidence.read_config(attacked) if is_shadow else config
    data = attacked_config.data
    if not _have_one_base(attacked_config, config, digests["base"]):
        raise AttackInputError(f"{run.root} starts from another base model than {attacked.root}; expected the same one")

    # Which documents.
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(data, tokenizer, num_ids_of(config.model))
    natural = evidence.read_corpus(attacked_config)
    corpus = plant(natural, canaries_of(manifest))
    variants = Variants.parse(options.variants)
    # Controls: the same records after another user's first tokens.
    documents = planning.plan_documents(
        manifest, corpus, options.num_training_records, with_controls=variants.control_prefix
    )
    if not is_shadow:  # shadows are trained without canaries
        root_key = run.load_key("root")
        documents += plan_canaries(manifest, config.canaries, tokenizer, root_key, options.num_canary_references)

    # What is known of them beside their text.
    has_spans = options.spans_column or (run.root / planning.SPANS_PATH).is_file()
    if data.format != "text" and (options.variants or has_spans):
        raise AttackInputError(
            f"re-written texts and sensitive spans need data.format: text; {run.root} was trained on {data.format}"
        )
    prefix = rewriting.recall_prefix(manifest, corpus, encoder, data.max_length) if variants.recall else None
    digests_of_files = read_sources(attacked) if options.columns else ()
    extras = read_columns(data, natural, options.columns, digests_of_files, _records_of(documents))
    sealed_spans = planning.read_spans(attacked, manifest) if options.spans_column is None else None

    # Whatever a score depends on: a finished part counts only for a job with the same fingerprint.
    template = data.chat_template_file
    settings = {
        "schemas": [SCHEMA_NAME, PSEUDONYM_PURPOSE],
        "coins": [own["sha256"], manifest["sha256"]],
        "target": digests,
        "options": dataclasses.asdict(options),
        "model": _model_settings(config),
        # The records are in the manifest's digest, wherever they lie.
        "data": data.model_dump(mode="json", exclude={"source", "evaluation", "chat_template_file"}),
        "template": None if template is None else file_sha256(template, follow_links=True),
        "canaries": config.canaries.model_dump(mode="json"),
        "extras": hashlib.sha256(repr(sorted(extras.items())).encode("utf-8", errors="surrogatepass")).hexdigest(),
        "spans": hashlib.sha256(json.dumps(sealed_spans, sort_keys=True).encode()).hexdigest(),
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    share = data.held_out_fraction
    return Job(
        run=run,
        attacked=attacked,
        model=config.model,
        digests=digests,
        manifest=manifest,
        # POOL owns the references that canaries of a kind share; nobody trained on them.
        sides={**sides_of(own, manifest), POOL: HELD_OUT},
        corpus=corpus,
        extras=extras,
        tokenizer=tokenizer,
        encoder=encoder,
        max_length=data.max_length,
        options=options,
        documents=planning.in_order(documents, corpus),
        key=attacked.load_key("pseudonym"),
        prefix=prefix,
        sealed_spans=sealed_spans,
        signals_path=signals_path,
        fingerprint=fingerprint,
        facts={
            "options": dataclasses.asdict(options),
            "target": digests,
            "fingerprint": fingerprint,
            "split_commitment": split_commitment(attacked.load_key("root"), manifest["sha256"]),
            # For the audit, which needs the chance of a coin and reads no configuration.
            "prob_held_in": 1.0 - share if 0.0 < share < 1.0 else None,
        },
    )


_SOFTWARE = ("torch", "transformers", "tokenizers", "peft")
"""Another version may round otherwise: a resumed scoring is to equal one that was not interrupted."""


def _have_one_base(attacked: Config, own: Config, own_digests: Any) -> bool:
    """Return whether two runs start from one base model; its place may be written in two ways, so files decide then.

    ``own_digests`` are of the files of the second one's base.
    """
    if attacked.model == own.model:
        return True
    has_own_settings = _model_settings(attacked) == _model_settings(own)
    return has_own_settings and targets.base_digests(attacked.model) == own_digests


def _model_settings(config: Config) -> dict[str, Any]:
    """Return how a run's base is loaded, without the place of its files, whose digests say more."""
    return config.model.model_dump(mode="json", exclude={"name_or_path"})


def _records_of(documents: Sequence[Document]) -> set[tuple[str, int]]:
    """Return (user, record index) of the documents that are records of the data; canaries bring their own text."""
    return {(document.user, document.index) for document in documents if document.text is None}
