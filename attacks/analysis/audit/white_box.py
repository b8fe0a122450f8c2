"""White box for the owner: gradient canaries looked for in the noised sum of every step.

A gradient canary is an invented unit whose clipped gradient is a fixed random direction; a coin decided if training
added it. The noised sum of a step is the sum of all clipped gradients plus noise, as the run kept it.

A canary's direction u is a vector of fair signs over sqrt(d), drawn independently of everything (Andrew et al. 2023,
arXiv 2302.03098). Its inner products with the T noised sums Y_1..Y_T, in clipping norms, are the signals. Of a canary
that was left out they are, given the sums, normal with mean 0 and covariance G = Y Yᵀ / d up to 1/sqrt(d), whatever
mechanism made the sums: u knows nothing of them. Of one that joined step t the t-th is about 1 more.

The score is the logarithm of a likelihood ratio that adds up over steps, each joined with chance q:

    sum_t log(1 - q + q exp(a_t · x - b_t / 2)).

For independent noise G is diagonal, a_t · x = x_t / G_tt and b_t = 1 / G_tt; this is then the likelihood ratio of the
sampled Gaussian mechanism, so nobody can guess better. G is measured, not claimed, and may not be diagonal, and then
which steps a canary joined together would matter. So two such ratios are averaged: that of the diagonal, which sees
noise that is missing or too small, and one that takes each step as the only one joined, with a_t row t of G⁻¹ and b_t
its diagonal, which sees noise that is used twice. Which canaries were in training is in neither.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from attacks.analysis.arrays import FloatArray
from attacks.analysis.audit.guesses import Coins
from attacks.scoring.documents import read_manifest
from privtrain.data.canaries import Canary, canaries_of
from privtrain.data.directions import blocks, signs
from privtrain.errors import DamagedFile
from privtrain.files.reading import file_sha256
from privtrain.run.directory import NOISED_SUMS_SCHEMA, RunDirectory
from privtrain.run.sealing import read_sealed_file
from privtrain.run.statement import PrivacyStatement

GRADIENTS = "gradient canaries"
ACCESS = "noised sum of every step (owner)"

_CANARIES_AT_ONCE = 1024
_NUMBERS_AT_ONCE = 1 << 23
_RIDGE = 1e-9
"""Of the mean variance, added to G: sums without noise may depend on each other."""


def gradient_coins(run: RunDirectory, statement: PrivacyStatement) -> Coins | None:
    """Return the gradient canaries with their scores; None if the run planted none or kept no sums.

    Raises:
        DamagedFile: if sums are not as they were sealed.
    """
    if not os.path.lexists(run.noised_sums) or not os.path.lexists(run.manifest):
        return None
    manifest = read_manifest(run)
    canaries = [canary for canary in canaries_of(manifest) if not canary.is_text]
    if not canaries:
        return None
    held_in = set(manifest["held_in"])
    signals, covariance = projections(run, canaries)
    scores = score(signals, covariance, _sampling_prob(statement))
    is_in = np.array([canary.user in held_in for canary in canaries], dtype=np.bool_)
    return Coins(
        scores,
        is_in,
        prob_in=0.5,
        unit=statement.unit,
        name=GRADIENTS,
        score=f"likelihood ratio over inner products with {covariance.shape[0]} noised sums",
        access=ACCESS,
        are_independent=True,
    )


def projections(run: RunDirectory, canaries: list[Canary]) -> tuple[FloatArray, FloatArray]:
    """Return the canaries' inner products with the noised sums, and what these look like for a left-out canary.

    Args:
        run: with sealed sums.
        canaries: gradient canaries.

    Returns:
        [canaries, steps] inner products in clipping norms, and [steps, steps] their covariance for a canary that was
        left out.

    Raises:
        DamagedFile: if sums are not as they were sealed.
    """
    index = read_sealed_file(run, run.noised_sums_index, schema=NOISED_SUMS_SCHEMA, remedy="restore it")
    # "tensors" lists (name, number of coordinates), "steps" lists (step, SHA-256 of the file of its noised sum).
    num_coordinates = sum(num for _, num in index["tensors"])
    paths = [run.noised_sum(step) for step, _ in index["steps"]]
    for path, (_, digest) in zip(paths, index["steps"], strict=True):
        _check(path, digest, num_coordinates)
    key = run.load_key("root")
    products = np.zeros((len(canaries), len(paths)))
    gram = np.zeros((len(paths), len(paths)))
    # Directions are made anew from the key, a block of a tensor's coordinates at a time, since all would fill the
    # memory.
    begin = 0  # of the tensor, in the flat vector of all coordinates
    for tensor, num in index["tensors"]:
        for block, start, size in blocks(num):
            for first in range(0, len(canaries), _CANARIES_AT_ONCE):
                group = canaries[first : first + _CANARIES_AT_ONCE]
                directions = np.stack([signs(key, canary.user, tensor, block, size) for canary in group])
                for offset, part in _parts(paths, begin + start, size):
                    of_part = directions[:, offset : offset + len(part)]
                    products[first : first + len(group)] += _products(of_part, part)
                    # The sums are read again for every group of canaries, but enter the Gram matrix once.
                    if first == 0:
                        gram += part.astype(np.float64).T @ part
        begin += num
    # ``signs`` are 1 and -1; a direction is those over sqrt(d).
    return products / np.sqrt(num_coordinates), gram / num_coordinates


def _parts(paths: Sequence[pathlib.Path], begin: int, size: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield the sums of all steps over a block of coordinates, in parts that fit into memory.

    Each part is (offset within the block, [coordinates, steps]). No file stays open, however many steps there are.
    """
    width = max(1, _NUMBERS_AT_ONCE // len(paths))
    for offset in range(0, size, width):
        chosen = slice(begin + offset, begin + min(offset + width, size))
        yield offset, np.stack([np.array(np.load(path, mmap_mode="r")[chosen]) for path in paths], axis=1)


def _products(directions: npt.NDArray[np.int8], part: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the inner products [canaries, steps]; signs are int8, and only some rows at a time become fp32."""
    groups = np.array_split(directions, 1 + directions.size // _NUMBERS_AT_ONCE)
    return np.concatenate([group.astype(np.float32) @ part for group in groups])


def score(signals: FloatArray, covariance: FloatArray, sampling_prob: float) -> FloatArray:
    """Return each canary's score, the module's average of two likelihood ratios, in logarithms: higher if likelier in.

    Args:
        signals: [canaries, steps] inner products with the noised sums.
        covariance: [steps, steps] of a canary that was left out.
        sampling_prob: q, chance that a canary joins a step.
    """
    num_steps = covariance.shape[0]
    ridge = _RIDGE * max(float(np.trace(covariance)) / num_steps, 1e-30)  # never 0, or nothing could be inverted
    whole = np.linalg.inv(covariance + ridge * np.eye(num_steps))
    alone = np.diag(1.0 / (np.diag(covariance) + ridge))
    # The average up to a constant factor, which orders canaries alike.
    return np.logaddexp(_log_ratio(signals, alone, sampling_prob), _log_ratio(signals, whole, sampling_prob))


def _log_ratio(signals: FloatArray, inverse: FloatArray, sampling_prob: float) -> FloatArray:
    """Return the module's sum over steps for each canary, with a_t row t of ``inverse`` and b_t its diagonal."""
    ratios = signals @ inverse - np.diag(inverse) / 2.0
    with np.errstate(divide="ignore"):  # log 0 = -inf is right where every unit joins every step
        absent, present = np.log([1.0 - sampling_prob, sampling_prob])
    return np.logaddexp(absent, present + ratios).sum(axis=1)


def _check(path: pathlib.Path, digest: str, num_coordinates: int) -> None:
    """Raise unless a sum is as it was sealed."""
    if file_sha256(path) != digest:
        raise DamagedFile(path, "is not the sum that was sealed at the release", "restore it")
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.shape != (num_coordinates,) or values.dtype != np.float32:
        raise DamagedFile(path, "is of another size than the model", "restore it")


def _sampling_prob(statement: PrivacyStatement) -> float:
    """Return about how likely a unit is to join a step; it sharpens the score, and no bound depends on it.

    A scheme without a probability has one participation an epoch: 1 / steps, or 1/2 where no epoch is stated.
    """
    if statement.sampling.sampling_prob is not None:
        return statement.sampling.sampling_prob
    steps_per_epoch = getattr(statement.sampling, "steps_per_epoch", None)
    return 1.0 / steps_per_epoch if steps_per_epoch else 0.5
