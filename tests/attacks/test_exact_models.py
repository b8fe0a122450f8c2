"""Without any network: models of known distributions, for which the statistic, its bounds and its AUROC are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attacks.analysis import features, statistics
from attacks.analysis.lift import lift
from attacks.scoring.score import score_sequences
from attacks.signals import FRESH, HELD_IN, HELD_OUT, DocumentSignals
from tests.attacks.exact_models import Categorical, ExactModel, Markov, Mixture

LENGTH = 3


def law(rng, size=3, spread=1.0):
    return rng.dirichlet(np.full(size, spread))


def users_of(kind, num, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    if kind == "categorical":
        return [Categorical(law(rng, spread=spread)) for _ in range(num)]
    return [Markov([law(rng, spread=spread) for _ in range(3)]) for _ in range(num)]


def rows_of(target: ExactModel, base: ExactModel, documents, sides):
    """Through the pipeline's own batching: documents by user to signals."""
    flat = [tokens for mine in documents for tokens in mine]
    tuned, reference = (iter(score_sequences(model, flat, 64)) for model in (target, base))
    return [
        DocumentSignals(f"u{user:04d}", f"{number:04d}", sides[user], next(tuned).logp, next(reference).logp)
        for user, mine in enumerate(documents)
        for number in range(len(mine))
    ]


@pytest.mark.parametrize("kind", ["categorical", "markov"])
def test_a_mixture_is_the_law_that_it_says(kind):
    mixture = Mixture([0.2, 0.5, 0.3], users_of(kind, 3, 0))
    total = 0.0
    for document in mixture.documents(LENGTH):
        direct = sum(w * model.probability(document) for w, model in zip(mixture.weights, mixture.models, strict=True))
        assert mixture.probability(document) == pytest.approx(direct, rel=1e-12)
        total += direct
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["categorical", "markov"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_statistic_lies_in_the_bounds_of_proposition_1(kind, share, spread):
    """Kandpal et al. 2023, proposition 1: log a + KL(D_u, D_others) < E T <= a chi2(D_u, D_others), by enumeration."""
    models = users_of(kind, 4, 1, spread)
    own, others = models[0], Mixture([1.0, 1.0, 1.0], models[1:])
    target = Mixture([share, 1.0 - share], [own, others])
    documents = own.documents(LENGTH)
    p_own, p_others = (np.array([model.probability(d) for d in documents]) for model in (own, others))
    rows = rows_of(target, others, [[np.array(d)] for d in documents], [HELD_IN] * len(documents))
    ratios = np.array([float((row.target_logp.astype(float) - row.base_logp).sum()) for row in rows])
    expected = float(p_own @ ratios)
    divergence = float(p_own @ np.log(p_own / p_others))
    chi_squared = float((p_own**2 / p_others).sum() - 1.0)
    assert expected == pytest.approx(float(p_own @ np.log(share * p_own / p_others + 1.0 - share)), abs=1e-5)
    assert math.log(share) + divergence < expected <= share * chi_squared + 1e-5


def test_user_statistic_converges_to_its_expectation():
    models = users_of("markov", 3, 2, 0.5)
    others = Mixture([1.0, 1.0], models[1:])
    target = Mixture([0.4, 0.6], [models[0], others])
    rng = np.random.default_rng(0)
    documents = [[models[0].draw(rng, LENGTH) for _ in range(1500)], [models[1].draw(rng, LENGTH)]]
    scored = features.collect(rows_of(target, others, documents, [HELD_IN, HELD_OUT]), [])
    table = scored.documents[FRESH]
    found = lift(table.scores["sequence_sum"], table.owner, 2)[0]
    every = models[0].documents(LENGTH)
    p_own = np.array([models[0].probability(d) for d in every])
    ratios = np.array([math.log(target.probability(d) / others.probability(d)) for d in every])
    error = math.sqrt(float(p_own @ ratios**2) - float(p_own @ ratios) ** 2) / math.sqrt(1500)
    assert found == pytest.approx(float(p_own @ ratios), abs=4 * error)


def test_auroc_of_one_document_equals_enumeration():
    """Held-in users write by D, held-out by E, both known: P(T > T') + P(T = T') / 2 over all pairs of documents."""
    inside, outside = users_of("categorical", 2, 5)
    base = Mixture([1.0, 1.0], [inside, outside])
    target = Mixture([3.0, 1.0], [inside, outside])
    every = base.documents(LENGTH)
    ratios = np.array([math.log(target.probability(d) / base.probability(d)) for d in every])
    p_in, p_out = (np.array([model.probability(d) for d in every]) for model in (inside, outside))
    higher = (ratios[:, None] > ratios[None] + 1e-12) + 0.5 * (abs(ratios[:, None] - ratios[None]) <= 1e-12)
    exact = float(p_in @ higher @ p_out)
    rng = np.random.default_rng(3)
    documents = [[model.draw(rng, LENGTH)] for model in [inside] * 1200 + [outside] * 1200]
    scored = features.collect(rows_of(target, base, documents, [HELD_IN] * 1200 + [HELD_OUT] * 1200), [])
    values = np.round(scored.documents[FRESH].scores["sequence_sum"], 5)
    sides = values[scored.is_held_in], values[~scored.is_held_in]
    interval = statistics.delong_interval(*sides, level=0.999)
    assert interval.lower <= exact <= interval.upper
    assert exact > 0.55


def test_target_equal_to_base_gives_exactly_one_half():
    model = users_of("markov", 1, 0)[0]
    rng = np.random.default_rng(0)
    documents = [[model.draw(rng, 4) for _ in range(2)] for _ in range(20)]
    scored = features.collect(rows_of(model, model, documents, [HELD_IN] * 10 + [HELD_OUT] * 10), [])
    values = scored.documents[FRESH].scores["token_mean"]
    assert (values == 0.0).all()
    assert statistics.auroc(values[:20], values[20:]) == 0.5
