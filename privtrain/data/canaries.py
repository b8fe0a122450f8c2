"""Canaries: secrets of our own making that training may or may not see, so that finding them again means something.

A canary is a user with records that carry a secret. The attack job later asks whether the model knows the secrets of
the canaries that were trained on better than those that were held out. Six kinds:

* ``template``: a user who does not exist; each record is "The code of NAME is 1234 5678" with an invented name and
  uniformly drawn digits.
* ``random_tokens``: a user who does not exist; each record is the same string of uniformly drawn tokens.
* ``shared_substring`` (Kandpal et al. 2023, arXiv 2310.09266, section 4): a user who does exist; a substring of one of
  their records is inserted into every one of their records, at a random place between two words.
* ``new_tokens`` (Panda et al. 2025, arXiv 2503.06808, section 4): a user who does not exist; each record is the same
  few tokens from the rarest end of the vocabulary, which no other canary has, and nothing else: all of its loss is on
  the secret. Which tokens those are the tokenizer decides, never the data, for a canary must not depend on anybody.
* ``samples`` (arXiv 2606.10481): a user who does not exist; each record is one text of a file, drawn beforehand from
  the base model at a high temperature (``attacks sample-canaries``).
* ``gradient`` (Andrew et al. 2023, arXiv 2302.03098): a user who does not exist and whose update is a random direction
  (:mod:`privtrain.data.directions`), one and the same however many of its records a step draws; their text is never
  trained on. They stand beside the others.

What it means for the guarantee: nothing. All kinds but ``shared_substring`` add users that are drawn from the run's key
and public files alone; their number is public, and they are sampled, clipped and accounted like everybody.
``shared_substring`` replaces a user's records by a function of that user's records and of key material of that user's
alone (also whether the user is chosen at all), so neighbouring data sets stay neighbouring; nobody is copied, since a
copy would put one person into two units. With ``privacy.unit: example`` it is refused: there it would spread one record
over many units.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from privtrain.config.canaries import CanariesSection
from privtrain.data.corpus import Corpus
from privtrain.errors import ConfigError, DamagedFile, Fault
from privtrain.files import reading
from privtrain.privacy.secret import KeyStream, SecretKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE, RANDOM_TOKENS, SHARED_SUBSTRING = "template", "random_tokens", "shared_substring"
NEW_TOKENS, SAMPLES, GRADIENT = "new_tokens", "samples", "gradient"

GRADIENT_RECORD = "gradient canary"
"""The text of the records of a gradient canary, which no step reads."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_DIGITS_PER_GROUP = 4


@dataclasses.dataclass(frozen=True)
class Canary:
    """One canary user. Everything here is secret.

    Attributes:
        user: id of the user; that of an invented user begins with ``canary-``, which no id of the data does.
        kind: one of the six kinds of the module.
        prefix: text before the secret; empty except for ``template``.
        secret: what is to be found again: digits, tokens as text, or the inserted substring.
        repetitions: how many records carry the secret.
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

    @property
    def is_text(self) -> bool:
        """Whether a model can be asked for the secret: a gradient canary has none, only a random direction."""
        return self.kind != GRADIENT

    @property
    def has_shared_references(self) -> bool:
        """Whether the attack ranks all canaries of this kind among the same secrets that were never planted.

        Canaries of other kinds have reference secrets of their own.
        """
        return self.kind in (RANDOM_TOKENS, SAMPLES)

    def to_json(self) -> dict[str, Any]:
        """Return the canary as a JSON object for the manifest."""
        return {**dataclasses.asdict(self), "records": list(self.records)}

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> Canary:
        """Return the canary that a manifest entry describes."""
        return cls(**{**item, "records": tuple(item["records"])})


def draw_canaries(
    corpus: Corpus,
    section: CanariesSection,
    tokenizer: PreTrainedTokenizerBase | None,
    root_key: SecretKey,
    unit: str = "user",
) -> tuple[Canary, ...]:
    """Draw all canaries of a run, on both sides of the split.

    Randomness comes from the run's key alone; ``shared_substring`` also uses each chosen user's own records.

    Args:
        corpus: the kept records, without canaries.
        section: how many, and of which kind.
        tokenizer: the model's; not needed for ``template``.
        root_key: the run's.
        unit: ``user`` or ``example``; see :func:`_gradient_canaries`.

    Raises:
        ConfigError: if the tokenizer cannot say where its tokens stand, or an invented id is in the data.
    """
    gradient_canaries = _gradient_canaries(corpus, section, root_key, unit)
    if section.kind == SHARED_SUBSTRING:
        return (*_shared_canaries(corpus, section, tokenizer, root_key), *gradient_canaries)
    canaries = []
    listed_secrets = _listed_secrets(section, tokenizer, root_key)
    for number in range(section.num_users):
        stream = root_key.stream("canary", number)
        user = _invented_id(corpus, root_key, "canary id", number)
        repetitions = section.repetitions[number % len(section.repetitions)]  # the listed numbers in turn
        prefix = f"The code of {_name(stream)} is " if section.kind == TEMPLATE else ""
        secret = draw_secret(section, tokenizer, stream) if listed_secrets is None else listed_secrets[number]
        canaries.append(Canary(user, section.kind, prefix, secret, repetitions, (prefix + secret,) * repetitions))
    return (*canaries, *gradient_canaries)


def _gradient_canaries(corpus: Corpus, section: CanariesSection, root_key: SecretKey, unit: str) -> tuple[Canary, ...]:
    """Return the canaries whose update is a random direction.

    Where users are the unit, they have several records each: if training clipped records one by one by mistake, the
    audit would find a canary's direction several times as large. Where records are the unit, each record would be a
    direction of its own, so there is one.
    """
    canaries = []
    for number in range(section.num_gradient_users):
        user = _invented_id(corpus, root_key, "gradient canary id", number)
        repetitions = section.repetitions[number % len(section.repetitions)] if unit == "user" else 1
        canaries.append(Canary(user, GRADIENT, "", GRADIENT_RECORD, repetitions, (GRADIENT_RECORD,) * repetitions))
    return tuple(canaries)


def _invented_id(corpus: Corpus, root_key: SecretKey, purpose: str, number: int) -> str:
    """Return a canary's user id, which no user of the data may have."""
    user = f"canary-{root_key.derive(purpose, number).hex()[:32]}"
    if user in corpus.records:
        raise ConfigError([Fault("data.user_column", "user ids must not start with 'canary-' (reserved)")])
    return user


def _listed_secrets(
    section: CanariesSection, tokenizer: PreTrainedTokenizerBase | None, root_key: SecretKey
) -> list[str] | None:
    """Return a secret for each canary, if the kind takes them from a public list; None if it draws each by itself."""
    if section.kind == SAMPLES and section.num_users:
        return shuffled_samples(section, root_key)
    if section.kind == NEW_TOKENS and section.num_users:
        assert tokenizer is not None
        return _rare_secrets(section, tokenizer, root_key)
    return None


def shuffled_samples(section: CanariesSection, root_key: SecretKey) -> list[str]:
    """Return the texts of ``samples_file`` in an order drawn from the run's key.

    The first ``num_users`` are the canaries' secrets; the others are never planted, and the attack compares with them.

    Raises:
        ConfigError: if the file cannot be read, or has too few different texts.
    """
    assert section.samples_file is not None
    texts = _samples_of(section.samples_file)
    if len(texts) < section.num_users:
        problem = f"{section.samples_file} holds {len(texts)} different texts; expected at least num_users"
        raise ConfigError([Fault("canaries.samples_file", f"{problem} = {section.num_users}")])
    order = np.argsort(root_key.stream("canary samples").uint64(len(texts)), kind="stable")
    return [texts[place] for place in order.tolist()]


def _samples_of(path: pathlib.Path) -> list[str]:
    """Return the different texts of a file with one JSON string a line."""
    try:
        lines = reading.read_bytes(path, follow_links=True).decode("utf-8").splitlines()
        texts = [json.loads(line) for line in lines if line.strip()]
    except (DamagedFile, OSError, ValueError) as error:
        problem = f"{path} cannot be read as one JSON string a line ({type(error).__name__})"
        raise ConfigError(
            [Fault("canaries.samples_file", f"{problem}; make it with attacks sample-canaries")]
        ) from None
    if not all(isinstance(text, str) and text.strip() for text in texts):
        problem = f"{path} holds something that is no text, or an empty one; expected one JSON string a line"
        raise ConfigError([Fault("canaries.samples_file", problem)])
    return list(dict.fromkeys(texts))


def _rare_secrets(section: CanariesSection, tokenizer: PreTrainedTokenizerBase, root_key: SecretKey) -> list[str]:
    """Return a secret for each canary: a few rare tokens that no other canary has, as words separated by spaces."""
    wanted = section.num_users * section.num_tokens
    rare = _rarest_words(tokenizer, wanted)
    if len(rare) < wanted:
        problem = (
            f"new_tokens needs canaries.num_users x canaries.num_tokens = {wanted} tokens that are words; "
            f"this tokenizer has {len(rare)}; take fewer, or another kind"
        )
        raise ConfigError([Fault("canaries.kind", problem)])
    order = np.argsort(root_key.stream("canary new tokens").uint64(wanted), kind="stable").tolist()  # a random order
    words = [str(tokenizer.decode([rare[place]])).strip() for place in order]
    size = section.num_tokens
    return [" ".join(words[first : first + size]) for first in range(0, wanted, size)]


def _rarest_words(tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """Return at most ``wanted`` ids of tokens that are whole words, from the vocabulary's end.

    Byte-pair vocabularies number tokens in the order of their merging, so the last ones are the rarest.
    """
    tokens: list[int] = []
    for token in range(len(tokenizer) - 1, -1, -1):
        if len(tokens) == wanted:
            break
        word = str(tokenizer.decode([token])).strip()
        if not word.isalnum() or token in tokenizer.all_special_ids:
            continue
        # Written after another word, it must come back as this one token. The first word, without a space before it,
        # may take two tokens.
        encoded: Any = tokenizer(f"{word} {word}", add_special_tokens=False, verbose=False)
        if encoded["input_ids"][-1] == token and len(encoded["input_ids"]) <= 3:
            tokens.append(token)
    return tokens


def draw_secret(section: CanariesSection, tokenizer: PreTrainedTokenizerBase | None, stream: KeyStream) -> str:
    """Draw a secret, for a canary or for a candidate that it is compared with.

    The kind ``template`` has digits for a secret; ``random_tokens`` and ``shared_substring`` have tokens, which take
    the tokenizer. The other kinds do not draw secrets one by one.
    """
    if section.kind == TEMPLATE:
        number = int(stream.uint64(1)[0]) % 10**section.num_digits
        return digits_of(number, section.num_digits)
    assert tokenizer is not None
    ids: list[int] = []
    while len(ids) < section.num_tokens:
        token = int(stream.uint64(1)[0]) % len(tokenizer)
        text = str(tokenizer.decode([token]))
        # Tokens that are part of a character would not survive as text (U+FFFD); special tokens mean something else.
        if text.strip() and text.isprintable() and "\ufffd" not in text and token not in tokenizer.all_special_ids:
            ids.append(token)
    return str(tokenizer.decode(ids)).strip()


def digits_of(number: int, num_digits: int) -> str:
    """Return a number as digits in groups of four: ``1234 5678``."""
    digits = f"{number:0{num_digits}d}"
    return " ".join(digits[first : first + _DIGITS_PER_GROUP] for first in range(0, num_digits, _DIGITS_PER_GROUP))


def canaries_of(manifest: Mapping[str, Any]) -> tuple[Canary, ...]:
    """Return the canaries that a manifest names; manifests of the first form have none."""
    return tuple(Canary.from_json(item) for item in manifest.get("canaries", ()))


def plant(corpus: Corpus, canaries: Iterable[Canary]) -> Corpus:
    """Return the corpus with canary users added, and records of ``shared_substring`` users replaced.

    Its digest stays that of the data without canaries.
    """
    planted = {canary.user: canary.records for canary in canaries}
    if not planted:
        return corpus
    records: Any = corpus.records
    return dataclasses.replace(corpus, records=collections.ChainMap(planted, records))  # the first mapping wins


def _name(stream: KeyStream) -> str:
    """Return an invented name of two words of three syllables each, e.g. "Mavoke Tiluna": one of 70**6."""
    letters = []
    for place, draw in enumerate(stream.uint64(12)):
        alphabet = _VOWELS if place % 2 else _CONSONANTS
        letters.append(alphabet[int(draw) % len(alphabet)])
    first, second = "".join(letters[:6]), "".join(letters[6:])
    return f"{first.capitalize()} {second.capitalize()}"


def _shared_canaries(
    corpus: Corpus, section: CanariesSection, tokenizer: PreTrainedTokenizerBase | None, root_key: SecretKey
) -> list[Canary]:
    """Return the real users whom a coin of their own makes canaries, except where all of a user's records are short."""
    if not section.user_fraction > 0:
        return []
    canaries = []
    for user, texts in corpus.records.items():
        (coin,) = root_key.stream("canary user", user).uniform(1)
        if coin < section.user_fraction:
            canary = _shared_substring(user, texts, section, tokenizer, root_key)
            if canary is not None:
                canaries.append(canary)
    return canaries


def _shared_substring(
    user: str,
    texts: Sequence[str],
    section: CanariesSection,
    tokenizer: PreTrainedTokenizerBase | None,
    root_key: SecretKey,
) -> Canary | None:
    """Return a real user as a canary: a substring of one of their records is put into all of them.

    Return ``None`` if all records are shorter than the ``section.num_tokens`` tokens of the substring.
    """
    assert tokenizer is not None
    if not tokenizer.is_fast:
        problem = "shared_substring needs a fast tokenizer, which says where a token stands in the text"
        raise ConfigError([Fault("canaries.kind", problem)])
    stream = root_key.stream("canary substring", user)
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_spans = encoded["offset_mapping"]  # of each record: (first character, one past the last) of each token
    eligible = [index for index, spans in enumerate(token_spans) if len(spans) >= section.num_tokens]
    if not eligible:
        return None
    source = eligible[int(stream.uint64(1)[0]) % len(eligible)]
    spans = token_spans[source]
    first = int(stream.uint64(1)[0]) % (len(spans) - section.num_tokens + 1)
    start, _ = spans[first]
    _, end = spans[first + section.num_tokens - 1]
    secret = texts[source][start:end].strip()
    if not secret:  # white space alone
        return None
    records = tuple(_inserted(text, secret, stream) for text in texts)
    return Canary(user, SHARED_SUBSTRING, "", secret, len(records), records)


def _inserted(text: str, secret: str, stream: KeyStream) -> str:
    """Return the text with the secret at a random place between two words, or at an end."""
    words = text.split(" ")
    num_before = int(stream.uint64(1)[0]) % (len(words) + 1)
    return " ".join([*words[:num_before], secret, *words[num_before:]])
