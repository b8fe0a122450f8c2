"""Canaries: secrets of our own making that training may or may not see, so that finding them again means something.

A canary is a user. Three kinds:

* ``template``: a user who does not exist; each record is "The code of NAME is 1234 5678" with an invented name and
  uniformly drawn digits.
* ``random_tokens``: a user who does not exist; each record is the same string of uniformly drawn tokens.
* ``shared_substring`` (Kandpal et al. 2023, arXiv 2310.09266, section 4): a user who does exist; a substring of one of
  their records is inserted into every one of their records, at a random place between two words.

What it means for the guarantee: nothing. The first two kinds add users that are drawn from the run's key and nothing
else; their number is public, and they are sampled, clipped and accounted like everybody. The third replaces a user's
records by a function of that user's records and of key material of that user's alone (also whether the user is chosen
at all), so neighbouring data sets stay neighbouring; nobody is copied, since a copy would put one person into two
units. With ``privacy.unit: example`` it is refused: there it would spread one record over many units.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privtrain.config.schema import CanariesSection
from privtrain.data.corpus import Corpus
from privtrain.errors import ConfigError, Fault
from privtrain.privacy.secret import KeyStream, SecretKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE, RANDOM_TOKENS, SHARED_SUBSTRING = "template", "random_tokens", "shared_substring"

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_DIGITS_PER_GROUP = 4


@dataclasses.dataclass(frozen=True)
class Canary:
    """One canary user. Everything here is secret.

    Attributes:
        user: its id; no id of the data begins like one of a user that does not exist.
        kind: one of the three kinds.
        prefix: text before the secret; empty but for ``template``.
        secret: what is to be found again: digits, tokens as text, or the inserted substring.
        repetitions: records that carry the secret.
        records: all records of the user, in their order.
    """

    user: str
    kind: str
    prefix: str
    secret: str
    repetitions: int
    records: tuple[str, ...]

    @property
    def is_invented(self) -> bool:
        """Whether the user does not exist."""
        return self.kind != SHARED_SUBSTRING

    def to_json(self) -> dict[str, Any]:
        """Return the canary as a JSON object for the manifest."""
        return {**dataclasses.asdict(self), "records": list(self.records)}

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> Canary:
        """Return the canary that a manifest entry describes."""
        return cls(**{**item, "records": tuple(item["records"])})


def draw_canaries(
    corpus: Corpus, section: CanariesSection, tokenizer: PreTrainedTokenizerBase | None, root_key: SecretKey
) -> tuple[Canary, ...]:
    """Every canary of a run: a function of the key, and for ``shared_substring`` of each chosen user's own records.

    Args:
        corpus: the kept records, without canaries.
        section: how many, and of which kind.
        tokenizer: the model's; not needed for ``template``.
        root_key: the run's.

    Raises:
        ConfigError: if the tokenizer cannot say where its tokens stand, or an invented id is in the data.
    """
    if section.kind == SHARED_SUBSTRING:
        chosen = (
            _shared(user, texts, section, tokenizer, root_key)
            for user, texts in corpus.records.items()
            if section.user_fraction > 0 and root_key.stream("canary user", user).uniform(1)[0] < section.user_fraction
        )
        return tuple(canary for canary in chosen if canary is not None)
    found = []
    for number in range(section.num_users):
        stream = root_key.stream("canary", number)
        user = f"canary-{root_key.derive('canary id', number).hex()[:32]}"
        if user in corpus.records:
            raise ConfigError([Fault("data.user_column", "user ids must not start with 'canary-' (reserved)")])
        repetitions = section.repetitions[number % len(section.repetitions)]
        prefix = f"The code of {_name(stream)} is " if section.kind == TEMPLATE else ""
        secret = draw_secret(section, tokenizer, stream)
        found.append(Canary(user, section.kind, prefix, secret, repetitions, (prefix + secret,) * repetitions))
    return tuple(found)


def draw_secret(section: CanariesSection, tokenizer: PreTrainedTokenizerBase | None, stream: KeyStream) -> str:
    """Draw a secret from the distribution of this kind, for a canary or for a candidate that it is compared with."""
    if section.kind == TEMPLATE:
        return digits_of(int(stream.uint64(1)[0]) % 10**section.num_digits, section.num_digits)
    assert tokenizer is not None
    ids: list[int] = []
    while len(ids) < section.num_tokens:
        token = int(stream.uint64(1)[0]) % len(tokenizer)
        text = str(tokenizer.decode([token]))
        # Bytes that are no character by themselves would not survive as text, special tokens mean something else.
        if text.strip() and text.isprintable() and "\ufffd" not in text and token not in tokenizer.all_special_ids:
            ids.append(token)
    return str(tokenizer.decode(ids)).strip()


def digits_of(number: int, num_digits: int) -> str:
    """Return a number as digits in groups of four: ``1234 5678``."""
    digits = f"{number:0{num_digits}d}"
    return " ".join(digits[at : at + _DIGITS_PER_GROUP] for at in range(0, num_digits, _DIGITS_PER_GROUP))


def canaries_of(manifest: Mapping[str, Any]) -> tuple[Canary, ...]:
    """Return the canaries that a manifest names; none in one of the first form."""
    return tuple(Canary.from_json(item) for item in manifest.get("canaries", ()))


def plant(corpus: Corpus, canaries: Iterable[Canary]) -> Corpus:
    """Return the corpus with canary users added, and records of ``shared_substring`` users replaced.

    Its digest stays that of the data without canaries.
    """
    planted = {canary.user: canary.records for canary in canaries}
    if not planted:
        return corpus
    records: Any = corpus.records
    return dataclasses.replace(corpus, records=collections.ChainMap(planted, records))


def _name(stream: KeyStream) -> str:
    """Return an invented name of two three-syllable words, one of 70**6."""
    draws = stream.uint64(12)
    letters = [(_VOWELS if at % 2 else _CONSONANTS)[int(d) % (5 if at % 2 else 14)] for at, d in enumerate(draws)]
    return " ".join("".join(letters[at : at + 6]).capitalize() for at in (0, 6))


def _shared(
    user: str,
    texts: Sequence[str],
    section: CanariesSection,
    tokenizer: PreTrainedTokenizerBase | None,
    root_key: SecretKey,
) -> Canary | None:
    """Return a canary: one record's substring put into all of a user's records; ``None`` if all are too short."""
    assert tokenizer is not None
    if not tokenizer.is_fast:
        problem = "shared_substring needs a fast tokenizer, which says where a token stands in the text"
        raise ConfigError([Fault("canaries.kind", problem)])
    stream = root_key.stream("canary substring", user)
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = encoded["offset_mapping"]
    eligible = [index for index, spans in enumerate(places) if len(spans) >= section.num_tokens]
    if not eligible:
        return None
    source = eligible[int(stream.uint64(1)[0]) % len(eligible)]
    first = int(stream.uint64(1)[0]) % (len(places[source]) - section.num_tokens + 1)
    start, end = places[source][first][0], places[source][first + section.num_tokens - 1][1]
    secret = texts[source][start:end].strip()
    if not secret:
        return None
    records = tuple(_inserted(text, secret, stream) for text in texts)
    return Canary(user, SHARED_SUBSTRING, "", secret, len(records), records)


def _inserted(text: str, secret: str, stream: KeyStream) -> str:
    words = text.split(" ")
    at = int(stream.uint64(1)[0]) % (len(words) + 1)
    return " ".join([*words[:at], secret, *words[at:]])
