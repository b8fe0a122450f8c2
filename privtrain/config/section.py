"""Base class of every section of the configuration: unknown keys are errors, and all conflicts are reported at once."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Self

import pydantic


class ConflictError(ValueError):
    """Keys of a section that do not go together; carries all of them at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Section(pydantic.BaseModel):
    """Base of every section: frozen, strict about names; every number is finite."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, each sentence with the full names of the keys."""
        yield from ()

    @pydantic.model_validator(mode="after")
    def _without_conflicts(self) -> Self:
        if problems := list(self.conflicts()):
            raise ConflictError(problems)
        return self


def without_shell_names(path: pathlib.Path | None) -> pathlib.Path | None:
    """Return the path unchanged; refuse one with ``~`` or a variable, which no shell has expanded in a configuration.

    Raises:
        ValueError: if it begins with ``~`` or holds ``$``: a directory of that very name would be made.
    """
    if path is not None and (str(path).startswith("~") or "$" in str(path)):
        raise ValueError(f"given {str(path)!r}; write the directory out: ~ and variables are not read here")
    return path
