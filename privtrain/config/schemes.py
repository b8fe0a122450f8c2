"""Rules of each sampling scheme, and of each way to derive a user's guarantee from that of records.

A rule says which keys, neighbouring relations and accountants go together. The schema checks configurations by this
table; :mod:`privtrain.privacy.sampling` and :mod:`privtrain.privacy.user_level`, which carry the schemes out, read it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Relation = Literal["add_or_remove_one", "zero_out"]
Accountant = Literal["pld", "tilted", "rdp", "allocation"]
SchemeName = Literal["poisson", "cyclic_poisson", "truncated_poisson", "random_allocation", "shuffle"]
UserAccountingName = Literal["none", "group", "mixture"]


@dataclasses.dataclass(frozen=True)
class SchemeRules:
    """What goes with a sampling scheme.

    Attributes:
        needs: keys of ``privacy`` that the scheme cannot do without.
        takes: further keys that it reads.
        relations: neighbouring relations for which its privacy analysis holds; the first is the one to recommend.
        accountants: accountants that can certify its ε; the first is the default.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    relations: tuple[Relation, ...] = ("add_or_remove_one", "zero_out")
    accountants: tuple[Accountant, ...] = ("pld", "tilted", "rdp")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that the scheme reads."""
        return *self.needs, *self.takes


SCHEME_RULES: dict[SchemeName, SchemeRules] = {
    "poisson": SchemeRules(needs=("sampling_prob",)),
    "cyclic_poisson": SchemeRules(needs=("sampling_prob", "num_bands")),
    "truncated_poisson": SchemeRules(
        needs=("sampling_prob", "max_batch_size", "max_num_units"), relations=("zero_out",), accountants=("pld",)
    ),
    "random_allocation": SchemeRules(
        needs=("steps_per_epoch",), takes=("steps_per_unit",), accountants=("allocation",)
    ),
    "shuffle": SchemeRules(needs=("steps_per_epoch", "max_num_units"), relations=("zero_out",)),
}


@dataclasses.dataclass(frozen=True)
class UserAccountingRules:
    """What goes with a way to derive users' guarantee from that of records (:mod:`privtrain.privacy.user_level`).

    Attributes:
        sampling: the sampling scheme of records for which the derivation holds.
        accountants: accountants that can certify its ε; the first is the default.
    """

    sampling: SchemeName
    accountants: tuple[Accountant, ...]


#: ``tilted`` is as tight as ``pld`` on mixtures, many times faster, and good at the tiny δ that group privacy needs.
USER_ACCOUNTING_RULES: dict[UserAccountingName, UserAccountingRules | None] = {
    "none": None,
    "group": UserAccountingRules("poisson", ("tilted", "rdp")),
    "mixture": UserAccountingRules("poisson", ("tilted", "pld", "rdp")),
}
