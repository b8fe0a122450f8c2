"""The accountants by name. Each is imported when asked for, so that a command line's ``--help`` stays quick."""

from __future__ import annotations

import importlib
from typing import cast

from accountants.protocol import Accountant

#: Name -> (module, class, what it is in one phrase).
ACCOUNTANTS: dict[str, tuple[str, str, str]] = {
    "pld": ("accountants.pld", "PldAccountant", "privacy loss distributions, certified upper bound"),
    "tilted": ("accountants.tilted", "TiltedAccountant", "tilted lattice inversion, certified interval"),
    "tilted-edgeworth": (
        "accountants.tilted_edgeworth",
        "TiltedEdgeworthAccountant",
        "tilted normal expansion with Berry-Esseen error, certified interval",
    ),
    "rdp": ("accountants.rdp", "RdpAccountant", "Renyi divergences, certified upper bound"),
    "prv": ("accountants.prv", "PrvAccountant", "privacy random variables (Opacus), certified, remove direction"),
    "allocation": (
        "accountants.allocation",
        "AllocationAccountant",
        "random allocation, certified upper bound",
    ),
    "gdp": ("accountants.gdp", "GdpAccountant", "central limit theorem, asymptotic"),
    "aea1": ("accountants.edgeworth", "Aea1Accountant", "Edgeworth expansion of order 1, estimate"),
    "aea2": ("accountants.edgeworth", "Aea2Accountant", "Edgeworth expansion of order 2, estimate"),
    "aea3": ("accountants.edgeworth", "Aea3Accountant", "Edgeworth expansion of order 3, estimate"),
    "eeai": ("accountants.edgeworth", "EeaiAccountant", "Edgeworth interval with finite-sample error, certified"),
    "contour": ("accountants.laplace_reference", "ContourAccountant", "saddle-line Laplace inversion, reference"),
}

DEFAULT = "pld"


def get_accountant(name: str) -> Accountant:
    """The accountant of that name, with its default settings.

    Raises:
        ValueError: if there is none; with the names that there are.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant={name!r} is unknown; choose from {', '.join(ACCOUNTANTS)}")
    module, cls, _ = ACCOUNTANTS[name]
    return cast(Accountant, getattr(importlib.import_module(module), cls)())
