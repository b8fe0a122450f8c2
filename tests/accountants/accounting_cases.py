"""Settings and helpers that several tests of the accountants share."""

import itertools
import math

import numpy as np
from laplace_reference import contour_delta

import accountants
from accountants.mixtures import composition

SAMPLING = (0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0)
NOISE = (0.3, 0.6, 1.0, 4.0, 20.0)
STEPS = (1, 30, 1000, 100_000, 1_000_000)
DELTAS = (1e-18, 1e-10, 1e-6, 0.1)
GRID = list(itertools.product(SAMPLING, NOISE, STEPS, DELTAS))

#: GLUE settings of EW-Tune: task -> (sampling probability, steps).
GLUE = {
    "SST-2": (2000 / 67349, 660),
    "QNLI": (2000 / 104743, 1040),
    "QQP": (2000 / 363849, 3620),
    "MNLI": (2000 / 392702, 3920),
}


def dp_sgd(sampling_prob, noise_multiplier, num_steps):
    return accountants.dp_sgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, num_steps=num_steps)


def worst_contour_delta(event, epsilon):
    """The exact reference's delta, the worse direction."""
    composed = composition(event)
    return max(contour_delta(composed, epsilon, add=add) for add in (False, True))


def simulated_losses(sampling_prob, noise_multiplier, num_steps, num_samples, rng, add=False):
    """Losses of whole runs, simulated: under Q for remove, under P (negated) for add."""
    total = np.zeros(num_samples)
    mu = 1 / noise_multiplier
    for _ in range(num_steps):
        z = rng.standard_normal(num_samples)
        if not add:
            z += mu * (rng.random(num_samples) < sampling_prob)
        with np.errstate(over="ignore"):
            total += np.log1p(sampling_prob * np.expm1(mu * z - mu * mu / 2))
    return -total if add else total


def hockey_stick(losses, epsilon):
    """Sample mean of (1 - e^(eps - loss))_+ and its standard error."""
    values = np.maximum(-np.expm1(epsilon - losses), 0.0)
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))
