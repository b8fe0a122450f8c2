"""Privacy, utility and efficiency of full fine-tuning, LoRA and both under DP."""

from __future__ import annotations

from privtrain.studies.findings import Findings
from privtrain.studies.results import Results

TITLE = "Privacy, utility and efficiency"
PAPER = "Das et al. 2025, Revisiting Privacy, Utility, and Efficiency Trade-offs when Fine-Tuning LLMs, arXiv 2502.13313"


def find(results: Results) -> Findings:
    """Judge the paper's claims by what is complete."""
    return Findings()
