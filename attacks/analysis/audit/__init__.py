"""Lower bounds on epsilon from what an attacker finds, and what they say about the run's claim."""

from attacks.analysis.audit.evaluate import SIGNIFICANCE, Claim, Finding, audit
from attacks.analysis.audit.guesses import Coins, Guess, correct_guesses, declared_guesses, fair, telling_guesses

__all__ = [
    "SIGNIFICANCE",
    "Claim",
    "Coins",
    "Finding",
    "Guess",
    "audit",
    "correct_guesses",
    "declared_guesses",
    "fair",
    "telling_guesses",
]
