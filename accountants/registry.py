"""The accountants by name. Each is imported when asked for, so that a command line's ``--help`` stays quick."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from accountants.protocol import Accountant
from accountants.validation import check_event

if TYPE_CHECKING:
    import dp_accounting

#: Name -> (module, class, what it is in one phrase).
ACCOUNTANTS: dict[str, tuple[str, str, str]] = {
    "pld": ("accountants.methods.pld", "PldAccountant", "privacy loss distributions, certified upper bound"),
    "tilted": ("accountants.methods.tilted", "TiltedAccountant", "tilted lattice inversion, certified interval"),
    "tilted-edgeworth": (
        "accountants.methods.tilted_edgeworth",
        "TiltedEdgeworthAccountant",
        "tilted normal expansion with Berry-Esseen error, certified interval",
    ),
    "rdp": ("accountants.methods.rdp", "RdpAccountant", "Renyi divergences, certified upper bound"),
    "prv": (
        "accountants.methods.prv",
        "PrvAccountant",
        "privacy random variables (Opacus), certified, remove direction",
    ),
    "allocation": (
        "accountants.methods.allocation",
        "AllocationAccountant",
        "random allocation, certified upper bound",
    ),
    "gdp": ("accountants.methods.gdp", "GdpAccountant", "central limit theorem, asymptotic"),
    "aea1": (
        "accountants.methods.edgeworth",
        "Aea1Accountant",
        "Edgeworth expansion of order 1, both directions, estimate",
    ),
    "aea2": (
        "accountants.methods.edgeworth",
        "Aea2Accountant",
        "Edgeworth expansion of order 2, both directions, estimate",
    ),
    "aea3": (
        "accountants.methods.edgeworth",
        "Aea3Accountant",
        "Edgeworth expansion of order 3, both directions, estimate",
    ),
    "eeai": (
        "accountants.methods.edgeworth",
        "EeaiAccountant",
        "Edgeworth interval with finite-sample error, certified",
    ),
}

#: Kind of event -> the accountants that can certify it, the best first; the first kind found in an event decides.
_FITTING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("RandomAllocationDpEvent", ("allocation",)),
    ("SampledWithoutReplacementDpEvent", ("rdp",)),
    ("RepeatAndSelectDpEvent", ("rdp",)),
    ("TruncatedSubsampledGaussianDpEvent", ("pld",)),
)
_PLAIN = ("pld", "tilted", "rdp")


def fitting(event: dp_accounting.DpEvent, relation: str = "ADD_OR_REMOVE_ONE") -> tuple[str, ...]:
    """Return the accountants that can certify an event under a relation, the default one first.

    Raises:
        ValueError: if the event is malformed.
    """
    check_event(event)
    kinds = _kinds(event)
    for kind, names in _FITTING:
        if kind in kinds:
            return names
    return ("pld", "rdp") if relation == "REPLACE_ONE" else _PLAIN


def _kinds(event: dp_accounting.DpEvent) -> set[str]:
    """Return the names of the classes of an event and of all events in it."""
    inner = [getattr(event, "event", None), *getattr(event, "events", ())]
    return {type(event).__name__}.union(*(_kinds(part) for part in inner if part is not None))


def get_accountant(name: str) -> Accountant:
    """Return the accountant of that name, with its default settings.

    Raises:
        ValueError: if there is none; with the names that there are.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant={name!r} is unknown; choose from {', '.join(ACCOUNTANTS)}")
    module, cls, _ = ACCOUNTANTS[name]
    return cast(Accountant, getattr(importlib.import_module(module), cls)())
