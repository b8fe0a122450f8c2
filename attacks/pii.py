"""Personal data found by Microsoft Presidio, for data without labels. Optional: ``pip install 'privtrain[pii]'``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from attacks.errors import AttackInputError

PRESIDIO = "presidio"
_SPACY_MODEL = "en_core_web_sm"

Span = tuple[int, int]


def find_personal_data(text: str) -> list[Span]:
    """Character spans that Presidio takes for personal data, with its English defaults.

    Raises:
        AttackInputError: if Presidio or its spaCy model is not installed.
    """
    return [(found.start, found.end) for found in _analyzer().analyze(text=text, language="en")]


def recall(found: Iterable[Sequence[Span]], labelled: Iterable[Sequence[Span]]) -> tuple[int, int]:
    """How many labelled characters a labeller found: what its silence is worth.

    Args:
        found: spans of each text by the labeller.
        labelled: the true ones.

    Returns:
        (characters found, characters labelled).
    """
    num_found = num_labelled = 0
    for mine, truth in zip(found, labelled, strict=True):
        characters = {place for start, end in truth for place in range(start, end)}
        num_labelled += len(characters)
        num_found += len(characters & {place for start, end in mine for place in range(start, end)})
    return num_found, num_labelled


@functools.cache
def _analyzer() -> Any:
    try:
        import spacy.util  # pyright: ignore[reportMissingImports] - an optional extra
        from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
        from presidio_analyzer.nlp_engine import NlpEngineProvider  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AttackInputError(
            f"spans by presidio need it installed: pip install 'privtrain[pii]' and the spaCy model {_SPACY_MODEL}, "
            "or name a column of labelled spans"
        ) from None
    # Presidio would download a missing model; private text is not scored by a job that calls out.
    if not spacy.util.is_package(_SPACY_MODEL):
        raise AttackInputError(
            f"the spaCy model {_SPACY_MODEL} is not installed: python -m spacy download {_SPACY_MODEL}"
        )
    models = [{"lang_code": "en", "model_name": _SPACY_MODEL}]
    provider = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
    return AnalyzerEngine(nlp_engine=provider.create_engine(), supported_languages=["en"])
