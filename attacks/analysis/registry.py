"""All attacks that the analysis runs. A new one is a file with an ``ATTACK`` and a line here."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from attacks.analysis import cost
from attacks.analysis.membership import (
    calibrated,
    ez_mia,
    lira,
    loss,
    lowercase,
    min_k,
    min_k_plus_plus,
    neighbourhood,
    ratio,
    recall,
    rmia,
    wbc,
    zlib_ratio,
)
from attacks.analysis.memorisation import canary_panel, extraction_panel
from attacks.analysis.protocol import Attack, ReferenceAttack
from attacks.scoring import labeller
from privtrain.run.statement import PrivacyStatement

ATTACKS: dict[str, Attack] = {}

Panel = Callable[[pathlib.Path, PrivacyStatement, int], dict[str, Any] | None]

PANELS: dict[str, Panel] = {
    "cost": cost.panel,
    "labeller": labeller.panel,
    "canaries": canary_panel.panel,
    "extraction": extraction_panel.panel,
}
"""Evaluations that are not one score per unit, such as exposure of canaries. Each maps (run, statement, seed) to a
panel of the report, or to None where the run lacks what it needs. ``attacks.json`` holds them under ``panels``."""


def register(attack: Attack) -> None:
    """Add an attack under its name; every later analysis runs it.

    Raises:
        ValueError: if the name is taken.
    """
    if attack.name in ATTACKS:
        raise ValueError(f"an attack named {attack.name!r} is registered already")
    ATTACKS[attack.name] = attack


def reference_attacks() -> list[ReferenceAttack]:
    """Return the attacks that need shadow models."""
    return [attack for attack in ATTACKS.values() if isinstance(attack, ReferenceAttack)]


for _module in (
    loss,
    ratio,
    zlib_ratio,
    lowercase,
    min_k,
    min_k_plus_plus,
    neighbourhood,
    recall,
    ez_mia,
    wbc,
    calibrated,
    lira,
    rmia,
):
    register(_module.ATTACK)
