"""Every metric, declared once with who may see it. An undeclared metric cannot be logged.

``PUBLIC``: a function of the plan, of released values or of time. ``NOISED``: rode on the step through the mechanism,
with noise and within the plan's ε (``privacy.noised_metrics``, adaptive clipping). ``HELD_OUT``: measured on users
that are not trained on, released only if ``tracking.release_held_out_metrics`` says that their text may be.
``PRIVATE``: a raw function of private rows, not covered by ε; stays in ``secret/`` unless ``tracking.private_metrics``
is on, and then the privacy statement says so.
"""

from __future__ import annotations

import enum

from privtrain.config.schema import TrackingSection


class Release(enum.Enum):
    """Who may see a metric."""

    PUBLIC = "public"
    NOISED = "noised"
    HELD_OUT = "held_out"
    PRIVATE = "private"


METRICS: dict[str, Release] = {
    "train/step": Release.PUBLIC,
    "train/lr": Release.PUBLIC,
    "privacy/epsilon": Release.PUBLIC,
    "privacy/epsilon_target": Release.PUBLIC,
    "privacy/delta": Release.PUBLIC,
    "privacy/noise_multiplier": Release.PUBLIC,
    "privacy/budget_fraction": Release.PUBLIC,
    "privacy/num_charged_steps": Release.PUBLIC,
    "privacy/clipping_norm": Release.NOISED,
    "privacy/share_within_norm": Release.NOISED,
    "noised/loss": Release.NOISED,
    "noised/loss_stddev": Release.PUBLIC,
    "noised/clip_fraction": Release.NOISED,
    "noised/clip_fraction_stddev": Release.PUBLIC,
    "perf/step_seconds": Release.PUBLIC,
    "perf/expected_units_per_second": Release.PUBLIC,
    "perf/peak_memory_bytes": Release.PUBLIC,
    "perf/flops_per_token": Release.PUBLIC,
    "eval/held_out_perplexity": Release.HELD_OUT,
    "eval/held_out_loss": Release.HELD_OUT,
    "eval/held_out_accuracy": Release.HELD_OUT,
    "train/loss": Release.PRIVATE,
    "train/num_units": Release.PRIVATE,
    "train/clip_fraction": Release.PRIVATE,
    "train/mean_norm": Release.PRIVATE,
    "train/num_nonfinite_units": Release.PRIVATE,
}


def is_released(name: str, tracking: TrackingSection) -> bool:
    """Whether a metric may leave ``secret/``.

    Raises:
        KeyError: for a metric that nobody declared.
    """
    release = METRICS[name]
    return (
        release in (Release.PUBLIC, Release.NOISED)
        or (release is Release.HELD_OUT and tracking.release_held_out_metrics)
        or tracking.private_metrics
    )
