"""Errors that a user can act on. Each says what was given, what is allowed and which key to change."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

#: The user has to change something.
EXIT_WRONG_INPUT = 2
#: The guarantee, a budget or a released file does not hold; nothing is released.
EXIT_REFUSED_RELEASE = 3
#: The machine failed the job (a lost rank, a full disk): nothing is lost, the same command goes on.
EXIT_MACHINE_FAILED = 4
#: EX_TEMPFAIL: the job was asked to stop, saved itself, and is to be queued again.
EXIT_PREEMPTED = 75


class PrivtrainError(Exception):
    """Base of the errors that end a command with one clear message instead of a traceback."""

    exit_code = EXIT_WRONG_INPUT


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration or command line.

    Attributes:
        path: dotted key (``privacy.num_steps``) or option (``--output``); empty for a fault of the whole.
        problem: what was given and what is allowed.
        line: line of the file where the key stands, from 1.
    """

    path: str
    problem: str
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.line is None else f"line {self.line}: "
        return where + (f"{self.path}: {self.problem}" if self.path else self.problem)


class ConfigError(PrivtrainError):
    """A configuration or command that cannot be run.

    Args:
        faults: everything that is wrong, not only the first.
        source: the file that the configuration was read from.
    """

    def __init__(self, faults: Sequence[Fault], source: str = "") -> None:
        self.faults = tuple(faults)
        self.source = source
        head = f"{source}: " if source else ""
        if len(self.faults) == 1:
            message = f"{head}{self.faults[0]}"
        else:
            message = f"{head}{len(self.faults)} faults\n" + "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(message)


class DamagedFile(PrivtrainError):  # noqa: N818
    """A file that cannot be used: missing, of another kind or form, or altered. The message is one line.

    Args:
        path: the file.
        problem: what is wrong, as the end of a sentence that begins with the file; never a value of a record.
        remedy: what to restore, or the command to run next.
        line: the line, or the row from 1, where there is one.
    """

    def __init__(
        self, path: os.PathLike[str] | str, problem: str, remedy: str = "", *, line: int | None = None
    ) -> None:
        self.path, self.problem, self.line = path, problem, line
        name = str(path)
        if not name.isprintable():  # a name may hold line breaks; the message stays one line
            name = name.encode("unicode_escape", errors="backslashreplace").decode("ascii")
        super().__init__(f"{name} {problem}" + (f"; {remedy}" if remedy else ""))


class PlanMismatch(PrivtrainError):  # noqa: N818 - the name the design uses
    """The run directory belongs to another plan, data set or run."""


class UnsafePath(PrivtrainError):  # noqa: N818
    """A private directory or key lies where, or as, another user could have read or planted it."""


class RunBusy(PrivtrainError):  # noqa: N818
    """Another process holds the run directory."""


class UnsupportedLayer(PrivtrainError):  # noqa: N818
    """A trainable tensor for which no exact per-unit rule is known."""


class ModelFailed(PrivtrainError):  # noqa: N818
    """The model's own forward or backward pass fails, without anything of clipping."""


class SelfTestFailed(PrivtrainError):  # noqa: N818
    """The start-up self-test could not establish the guarantee; nothing was trained."""

    exit_code = EXIT_REFUSED_RELEASE


class GuaranteeLost(PrivtrainError):  # noqa: N818
    """A check during training failed; the job stops rather than release without a guarantee."""

    exit_code = EXIT_REFUSED_RELEASE


class WorseThanBase(PrivtrainError):  # noqa: N818
    """The trained model is worse than its base on public rows, and ``release.if_worse`` says to release nothing."""

    exit_code = EXIT_REFUSED_RELEASE


class LedgerCorrupt(PrivtrainError):  # noqa: N818
    """The contribution ledger was altered or damaged anywhere but at its torn tail."""

    exit_code = EXIT_REFUSED_RELEASE


class ProofRejected(PrivtrainError):  # noqa: N818
    """A proof of a user's part in a run that does not hold."""

    exit_code = EXIT_REFUSED_RELEASE


class VerificationFailed(PrivtrainError):  # noqa: N818
    """A released directory that is not what was released; names every file and field that does not hold."""

    exit_code = EXIT_REFUSED_RELEASE

    def __init__(self, problems: Sequence[str], directory: pathlib.Path) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{directory} is not what was released", *(f"  {item}" for item in problems)]))


class SigningFailed(PrivtrainError):  # noqa: N818
    """A release that stands, and could not be signed as ``release.signing_key`` asks."""


class RegistryUnreachable(PrivtrainError):  # noqa: N818
    """The budget registry did not answer in time; without it no training starts."""

    exit_code = EXIT_REFUSED_RELEASE


class ClockRefused(PrivtrainError):  # noqa: N818
    """A registry without a server cannot tell whether this machine's clock is right; a person has to confirm it."""

    exit_code = EXIT_REFUSED_RELEASE


class BudgetExceeded(PrivtrainError):  # noqa: N818
    """A run would spend more than a budget allows; says what is left and which knob fits. Nothing was reserved."""

    exit_code = EXIT_REFUSED_RELEASE


class RankLost(PrivtrainError):  # noqa: N818
    """Another rank died, or gave no sign of life for ``performance.heartbeat_timeout_seconds``."""

    exit_code = EXIT_MACHINE_FAILED


#: What is said where a collective of ranks breaks off; gloo reports a broken connection as a plain RuntimeError.
_COLLECTIVE_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "tcpstore", "store->get")


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, came from a collective: then another rank failed, not the model.

    Args:
        error: what was caught; code of a model may have caught the collective's error and raised its own.
    """
    chain = [error]
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in chain:  # a chain may end in a circle
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(map(_breaks_off, chain))


def _breaks_off(error: BaseException) -> bool:
    """Return whether this error itself is that of a collective that broke off, by its class or its words."""
    # torch.distributed.DistError by its name: torch is slow to import, and a command may do without.
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COLLECTIVE_WORDS)


class StorageFailed(PrivtrainError):  # noqa: N818
    """The disk of the run directory is full, or a quota or file size limit was reached."""

    exit_code = EXIT_MACHINE_FAILED


class Preempted(PrivtrainError):  # noqa: N818
    """SIGTERM or SIGUSR1 on any rank: all ranks saved the job together and left."""

    exit_code = EXIT_PREEMPTED
