"""What shuffling fixed batches certainly costs: the reason why shuffled batches are accounted without amplification."""

import math

import numpy as np
from scipy import special

from accountants.mixtures import Array


def shuffle_lower_bound(noise_multiplier: float, num_batches: int, num_epochs: int, delta: float) -> float:
    """Return a certified lower bound on epsilon for shuffled fixed batches (zero-out): what shuffling certainly costs.

    The other units contribute so that, after a shift, every batch without the unit has mean 0 and the unit's own batch
    has mean 2 with it and 1 without (all others -1, the unit +1 or 0, in units of the clipping norm). The test is the
    largest batch sum w, with laws F_with(c) = Phi((c-2)/s) Phi(c/s)^(t-1) and F_without(c) = Phi((c-1)/s)
    Phi(c/s)^(t-1) (the shape of Chua et al. 2024, arXiv
    2403.17673). Post-processing to buckets of w and rounding the composed buckets' losses down can only lower epsilon.
    """
    spread = noise_multiplier
    cuts = np.linspace(-10 * spread, 2 + 10 * spread, 4001)
    shared = (num_batches - 1) * special.log_ndtr(cuts / spread)
    laws: list[Array] = []
    for own in (2.0, 1.0):
        cdf = np.exp(special.log_ndtr((cuts - own) / spread) + shared)
        laws.append(np.maximum(np.diff(np.concatenate([[0.0], cdf, [1.0]])), 0.0))
    return _compose_buckets(laws[0], laws[1], num_epochs, delta)


def _compose_buckets(first: Array, second: Array, count: int, delta: float) -> float:
    spacing = 1e-3
    keep = (first > 1e-300) & (second > 1e-300)
    index = np.floor((np.log(first[keep]) - np.log(second[keep])) / spacing).astype(np.int64)
    low = int(index.min())
    span = int(index.max()) - low
    length = 1 << max(1, math.ceil(math.log2(span * count + 1)))
    mass = np.bincount(index - low, weights=first[keep], minlength=length)
    total = np.maximum(np.fft.irfft(np.fft.rfft(mass) ** count, length) - 1e-15, 0.0)
    losses = spacing * (low * count + np.arange(length))
    best = 0.0
    exceed = np.cumsum(total[::-1])[::-1]
    discounted = np.cumsum((total * np.exp(-np.clip(losses, -500, 500)))[::-1])[::-1]
    curve = exceed - np.exp(np.clip(losses, -500, 500)) * discounted
    good = np.flatnonzero(curve >= delta)
    if len(good):
        best = max(float(losses[good[-1]]), 0.0)
    return best
