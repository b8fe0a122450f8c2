"""The one error that the attack job shows to its user."""

from __future__ import annotations

from privtrain.errors import PrivtrainError


class AttackInputError(PrivtrainError):
    """What was given cannot be evaluated.

    The message is one line: what was given, what is expected, and the command to run next. The command line prints it
    and exits with code 2.
    """
