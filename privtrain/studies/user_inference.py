"""User inference: whether a user's data were trained on, and what lowers it."""

from __future__ import annotations

from privtrain.studies.findings import Findings
from privtrain.studies.results import Results

TITLE = "User inference"
PAPER = "Kandpal, Pillutla, Oprea, Kairouz, Choquette-Choo and Xu 2023, User Inference Attacks on LLMs, arXiv 2310.09266"


def find(results: Results) -> Findings:
    """Judge the paper's claims by what is complete."""
    return Findings()
