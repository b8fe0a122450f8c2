"""Privacy accounting on its own: events in, certified bounds out. numpy, scipy and dp-accounting; never torch.

>>> import accountants
>>> event = accountants.dp_sgd_event(noise_multiplier=1.0, sampling_prob=0.01, num_steps=1000)
>>> round(accountants.epsilon(event, 1e-5).certified_upper(), 2)
1.83
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accountants.answer import BoundKind, Direction, NotCertifiedError, PrivacyAnswer
    from accountants.api import certified_upper, delta, epsilon
    from accountants.calibration import (
        CalibrationError,
        calibrate_count,
        calibrate_noise,
        calibrate_noise_multiplier,
        calibrate_probability,
    )
    from accountants.events import (
        adaptive_clipping_noise,
        dp_sgd_event,
        fixed_size_event,
        joint_noise_multiplier,
        phased_event,
        random_allocation_event,
        shuffled_event,
        truncated_poisson_event,
    )
    from accountants.protocol import Accountant, UnsupportedEventError
    from accountants.registry import ACCOUNTANTS, get_accountant

_HOME = {
    "answer": ("BoundKind", "Direction", "NotCertifiedError", "PrivacyAnswer"),
    "api": ("certified_upper", "delta", "epsilon"),
    "calibration": (
        "CalibrationError",
        "calibrate_count",
        "calibrate_noise",
        "calibrate_noise_multiplier",
        "calibrate_probability",
    ),
    "events": (
        "adaptive_clipping_noise",
        "dp_sgd_event",
        "fixed_size_event",
        "joint_noise_multiplier",
        "phased_event",
        "random_allocation_event",
        "shuffled_event",
        "truncated_poisson_event",
    ),
    "protocol": ("Accountant", "UnsupportedEventError"),
    "registry": ("ACCOUNTANTS", "get_accountant"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "BoundKind",
    "CalibrationError",
    "Direction",
    "NotCertifiedError",
    "PrivacyAnswer",
    "UnsupportedEventError",
    "adaptive_clipping_noise",
    "calibrate_count",
    "calibrate_noise",
    "calibrate_noise_multiplier",
    "calibrate_probability",
    "certified_upper",
    "delta",
    "dp_sgd_event",
    "epsilon",
    "fixed_size_event",
    "get_accountant",
    "joint_noise_multiplier",
    "phased_event",
    "random_allocation_event",
    "shuffled_event",
    "truncated_poisson_event",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: dp-accounting takes a second, the command line's help must not."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"accountants.{_MODULE_OF[name]}"), name)
