"""EW-Tune: DP fine-tuning of encoders with the noise of each accountant, and the ε that it really spends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from privtrain.studies.findings import Findings
from privtrain.studies.noise import Setting
from privtrain.studies.results import Results

TITLE = "EW-Tune: noise by accountant, and what it spends"
PAPER = "Behnia, Ebrahimi, Pacheco, Padmanabhan 2022, EW-Tune, arXiv 2210.15042"


def settle(values: Mapping[str, str], tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The noise that the cell's accountant asks for, rounded up."""
    scale = 10 ** settings["noise_decimals"]
    noise = setting_of(tree["privacy"], settings).noise(values["accountant"])
    return {"privacy.noise_multiplier": math.ceil(noise * scale - 1e-6) / scale}


def setting_of(privacy: Mapping[str, Any], settings: Mapping[str, Any]) -> Setting:
    """What is accounted for in a cell."""
    return Setting(privacy["sampling_prob"], privacy["num_steps"], privacy["target_delta"], settings["target_epsilon"])


def find(results: Results) -> Findings:
    """Under construction."""
    return Findings()
