"""How far this machine has seen a registry, so that an older copy of it is refused.

A database that was restored from a backup has forgotten what was reserved since, and of two copies each lets the last
of a budget be spent. So every machine keeps in a file, the *seen file*, beside the key and outside the database, how
many changes it saw: numbers that only grow. A registry that shows fewer is older than it was. Nothing is reserved or
settled in it until a person has said how to go on (``privtrain registry restored``).

Not seen: a machine that never used the newer one, and a copy of the directory with key and this file.
"""

from __future__ import annotations

import dataclasses
import pathlib

import sqlalchemy as sa

from privtrain.errors import DamagedFile, GuaranteeLost, PrivtrainError
from privtrain.files import reading
from privtrain.files.atomic import write_json
from privtrain.files.private import locked_file, make_missing
from privtrain.registry.tables import Meta, Population, Settlement

#: Number of an :class:`Extent` → what it counts, in words.
_WORDS = {
    "num_charges": "changes of budgets",
    "last_settlement": "settlements",
    "num_opt_outs": "opt-outs",
}


@dataclasses.dataclass(frozen=True)
class Extent:
    """Numbers of a registry that only grow.

    Attributes:
        uid: which registry it is, or of which it is a copy.
        num_charges: changes of what is reserved, charged or allowed.
        last_settlement: the newest settlement's id.
        num_opt_outs: users on the do-not-train list.
    """

    uid: str
    num_charges: int
    last_settlement: int
    num_opt_outs: int

    @property
    def counts(self) -> dict[str, int]:
        """The numbers that only grow, by name."""
        counts = dataclasses.asdict(self)
        del counts["uid"]
        return counts


def extent_of(connection: sa.Connection) -> Extent:
    """Return how far a registry has come: what its database counts now."""
    charges = sa.select(sa.func.coalesce(sa.func.sum(Population.version), 0)).scalar_subquery()
    settlement = sa.select(sa.func.coalesce(sa.func.max(Settlement.id), 0)).scalar_subquery()
    counted = connection.execute(sa.select(Meta.uid, charges, settlement, Meta.num_opt_outs)).one()
    uid, num_charges, last_settlement, num_opt_outs = counted
    return Extent(uid, int(num_charges), int(last_settlement), int(num_opt_outs))


class SeenFile:
    """The file in which this machine keeps what it saw of one or more registries, by their ids.

    Args:
        path: the file.
        shown: the registry's name in messages.
        is_for_one_registry: whether the file is for one registry alone. Then a registry with an id that the file lacks
            is not a new one: it is a copy from before it had an id, or was made again.
    """

    def __init__(self, path: pathlib.Path, shown: str, *, is_for_one_registry: bool = False) -> None:
        self.path = path
        self._shown = shown
        self._is_for_one_registry = is_for_one_registry

    def known(self) -> dict[str, dict[str, int]]:
        """Return id of a registry → name of a number → the largest that this machine saw; empty without a file.

        Raises:
            DamagedFile: if the file is damaged.
        """
        if not self.path.exists() and not self.path.is_symlink():  # a link to nothing is damage, not a missing file
            return {}
        remedy = "restore it, or remove it if you know that the registry was not restored from a backup"
        content = reading.read_json(self.path, remedy=remedy, max_bytes=1 << 20)
        for counts in content.values():
            if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
                raise DamagedFile(self.path, "does not hold numbers of changes", remedy)
        return content

    def missing(self, known: dict[str, dict[str, int]], extent: Extent) -> str:
        """Return in words what a registry lacks of what this machine saw of it; empty if nothing.

        Args:
            known: what the file holds, of :meth:`known`.
            extent: what the registry shows now.
        """
        if self._is_for_one_registry and known and extent.uid not in known:
            # The file's one registry has got another id: no number of it can be compared.
            return "the changes noted under its earlier id"
        seen = known.get(extent.uid, {})
        lacking = {name: seen.get(name, 0) - count for name, count in extent.counts.items()}
        return ", ".join(f"{number} {_WORDS[name]}" for name, number in lacking.items() if number > 0)

    def check(self, known: dict[str, dict[str, int]], extent: Extent) -> None:
        """Raise if a registry is older than it was when it was last used from here.

        Raises:
            GuaranteeLost: saying how much is missing, and how to go on.
        """
        missing = self.missing(known, extent)
        if missing:
            raise GuaranteeLost(
                f"the registry {self._shown} is older than this machine knows it ({missing} are missing): it "
                "was restored from a backup, or is one of two copies; what was reserved since would not be charged. Go "
                "on with the newest. If that one is lost: privtrain registry restored --confirm"
            )

    def note(self, extent: Extent) -> None:
        """Remember how far a registry has come, unless the file already says as much.

        Raises:
            PrivtrainError: if the file cannot be written.
        """
        seen = self.known().get(extent.uid, {})
        # -1: a number that the file lacks is to be written, also if it is 0.
        if any(seen.get(name, -1) < count for name, count in extent.counts.items()):
            self._write(extent, lowers=False)

    def accept(self, extent: Extent) -> None:
        """Remember these numbers even where they are lower; a file of one registry alone also forgets other ids."""
        self._write(extent, lowers=True)

    def _write(self, extent: Extent, *, lowers: bool) -> None:
        """Write a registry's numbers into the file: the larger of old and new or, with ``lowers``, the new ones."""
        try:
            make_missing(self.path.parent)
            with locked_file(self.path.with_name(f".{self.path.name}.lock")):
                known = self.known()
                before = {} if lowers else known.get(extent.uid, {})
                counts = {name: max(before.get(name, 0), count) for name, count in extent.counts.items()}
                others = {} if lowers and self._is_for_one_registry else known
                write_json(self.path, {**others, extent.uid: counts}, mode=0o600)
        except OSError as error:
            raise PrivtrainError(
                f"cannot write {self.path} ({error.strerror}), which tells a registry that was restored from a backup; "
                "give this user the right to, or set XDG_DATA_HOME to a directory of its own"
            ) from None
