"""Every metric, declared once with who may see it. An undeclared metric cannot be logged.

``PUBLIC``: a function of the plan and of released values alone. ``NOISED``: released with the gradient in the same
Gaussian mechanism, so within the plan's ε (``privacy.noised_metrics``, adaptive clipping). The others are not covered
by ε, so they stay in ``secret/`` unless a key of their own publishes them, and then the privacy statement says so:

* ``MEASURED``: times, throughput and memory, ``tracking.release_measurements``. A step takes as long as the records
  that were drawn, so its seconds tell who was in it.
* ``HELD_OUT``: on users that are not trained on, ``tracking.release_held_out_metrics``.
* ``PRIVATE``: raw functions of private rows, ``tracking.private_metrics``.
"""

from __future__ import annotations

import enum

from privtrain.config.publishing import TrackingSection


class Release(enum.Enum):
    """Who may see a metric."""

    PUBLIC = "public"
    NOISED = "noised"
    MEASURED = "measured"
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
    "perf/flops_per_token": Release.PUBLIC,  # counted on planted tokens
    "perf/step_seconds": Release.MEASURED,
    "perf/expected_units_per_second": Release.MEASURED,
    "perf/peak_memory_bytes": Release.MEASURED,
    # On data.evaluation, which is public: a function of released weights and of public rows.
    "eval/loss": Release.PUBLIC,
    "eval/perplexity": Release.PUBLIC,
    "eval/accuracy": Release.PUBLIC,
    "eval/loss_difference": Release.PUBLIC,
    "eval/loss_difference_low": Release.PUBLIC,
    "eval/loss_difference_high": Release.PUBLIC,
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
    """Return whether a metric may leave ``secret/``.

    Raises:
        KeyError: for a metric that nobody declared.
    """
    return {
        Release.PUBLIC: True,
        Release.NOISED: True,
        Release.MEASURED: tracking.release_measurements,
        Release.HELD_OUT: tracking.release_held_out_metrics,
        Release.PRIVATE: tracking.private_metrics,
    }[METRICS[name]]
