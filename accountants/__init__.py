"""Privacy accounting on its own: events in, certified bounds out. numpy, scipy and dp-accounting; never torch."""

from accountants.answer import BoundKind, PrivacyAnswer
from accountants.calibration import CalibrationError, calibrate_noise_multiplier
from accountants.events import dp_sgd_event
from accountants.pld import pld_delta as delta
from accountants.pld import pld_epsilon as epsilon

__all__ = [
    "BoundKind",
    "CalibrationError",
    "PrivacyAnswer",
    "calibrate_noise_multiplier",
    "delta",
    "dp_sgd_event",
    "epsilon",
]
