"""A guess at a text's language, coarse on purpose: the blind baseline asks only whether the two sides differ in it."""

from __future__ import annotations

import collections
import unicodedata

_COMMON_WORDS = {
    "en": "the of and to in is that it for was with you not are this have",
    "de": "der die und das ist nicht ein zu mit den von für auf sich dem ich",
    "fr": "le la les et des est que une pas pour dans vous qui sur avec je",
    "es": "el los y que una es por con para las del se no su lo como",
    "pt": "o os e que uma não é por com para as do da em se mais",
    "it": "il che non di per una sono con gli della è mi si lo ma più",
    "nl": "de het een en van is niet dat op te zijn met voor je ik maar",
}
_LANGUAGES_OF = collections.defaultdict(list)
for _language, _words in _COMMON_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF[_word].append(_language)


def guess_language(text: str) -> str:
    """Return the language whose commonest words occur most, such as ``"en"``; else the script, or ``"unknown"``."""
    votes: collections.Counter[str] = collections.Counter()
    for word in text.lower().split():
        votes.update(_LANGUAGES_OF.get(word.strip(".,;:!?\"'()"), ()))
    scripts: collections.Counter[str] = collections.Counter()
    for letter in filter(str.isalpha, text):
        # A letter's Unicode name begins with its script, such as "LATIN SMALL LETTER A".
        script, *_ = unicodedata.name(letter, "UNKNOWN").split()
        scripts[script.lower()] += 1
    script = max(scripts, key=lambda name: (scripts[name], name), default="unknown")
    if script != "latin" or not votes:
        return script
    return max(votes, key=lambda language: (votes[language], language))
