"""Lower bounds on epsilon from what an attacker finds, and what they say about the run's claim."""

from attacks.analysis.audit.evaluate import SIGNIFICANCE, Claim, Finding, audit
from attacks.analysis.audit.guesses import GUESS_SHARES, Coins, correct_guesses, fair, guess_counts

__all__ = [
    "GUESS_SHARES",
    "SIGNIFICANCE",
    "Claim",
    "Coins",
    "Finding",
    "audit",
    "correct_guesses",
    "fair",
    "guess_counts",
]
