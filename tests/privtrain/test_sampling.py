"""Global Poisson draw, whole users to ranks, equal numbers of microbatches."""

from __future__ import annotations

import itertools

import hypothesis
import numpy as np
from hypothesis import strategies as st
from scipy import stats

from privtrain.config.privacy import PrivacySection
from privtrain.data.microbatch import NOBODY, Packer
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import DrawnUnit, UnitSampler, assign_to_ranks
from privtrain.privacy.secret import SecretKey


def make_plan(**changes) -> PrivacyPlan:
    values = {
        "sampling_prob": 0.3,
        "expected_batch_size": 6,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "num_steps": 5,
        "records_per_user": 3,
    }
    return PrivacyPlan.build(PrivacySection(**{**values, **changes}))


def sampler_of(plan: PrivacyPlan, key: SecretKey, num_records, first_step: int = 0) -> UnitSampler:
    return UnitSampler(plan.scheme, plan.records_per_unit, key, num_records, first_step)


def test_the_draw_is_poisson_with_at_most_k_distinct_records():
    num_records = [1 + i % 7 for i in range(60)]
    sampler = sampler_of(make_plan(), SecretKey.insecure(0, "s"), num_records)
    counts = np.zeros(60)
    sizes = []
    for step in range(2000):
        drawn = sampler.draw(step)
        assert [d.unit for d in drawn] == sorted({d.unit for d in drawn})
        for d in drawn:
            assert len(set(d.record_indices)) == len(d.record_indices) == min(3, num_records[d.unit])
            assert max(d.record_indices) < num_records[d.unit]
        counts[[d.unit for d in drawn]] += 1
        sizes.append(len(drawn))
    assert (
        stats.chisquare(
            np.histogram(counts, bins=[0, 580, 600, 620, 2001])[0],
            60 * np.diff(stats.binom(2000, 0.3).cdf([-1, 579, 599, 619, 2000])),
        ).pvalue
        > 1e-3
    )
    assert abs(np.var(sizes) - 60 * 0.3 * 0.7) < 4 * 60 * 0.21 * np.sqrt(2 / 2000)


def test_probability_zero_draws_nobody_one_everybody():
    sizes = [2] * 10
    assert sampler_of(make_plan(sampling_prob=1e-9), SecretKey.insecure(0, "s"), sizes).draw(0) == []
    assert len(sampler_of(make_plan(sampling_prob=1.0), SecretKey.insecure(0, "s"), sizes).draw(0)) == 10


@hypothesis.given(costs=st.lists(st.integers(1, 50), max_size=30), num_ranks=st.integers(1, 8), seed=st.integers(0, 3))
def test_dealing_gives_every_unit_to_exactly_one_rank_evenly(costs, num_ranks, seed):
    drawn = [DrawnUnit(i * 3 + seed, (0,)) for i in range(len(costs))]
    shares = assign_to_ranks(drawn, costs, num_ranks)
    assert sorted(d.unit for share in shares for d in share) == [d.unit for d in drawn]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


unit_sizes = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=6), max_size=6)


def units_of(sizes: list[list[int]]) -> list[list[np.ndarray]]:
    value = iter(range(1, 10_000))
    return [[np.array([next(value) for _ in range(n)]) for n in records] for records in sizes]


@hypothesis.given(sizes=unit_sizes, microbatch_size=st.integers(1, 5), extra=st.integers(0, 3))
def test_packing_keeps_every_token_and_equal_weights(sizes, microbatch_size, extra):
    units = units_of(sizes)
    packer = Packer(microbatch_size, max_length=9, pad_id=0)
    num_batches = packer.num_batches(units) + extra
    batches = list(packer.pack(units, num_batches))
    assert len(batches) == num_batches
    seen, weight = [], np.zeros(len(units))
    for batch in batches:
        for row, owner in enumerate(batch.owner.tolist()):
            tokens = batch.input_ids[row][batch.target_mask[row]].tolist()
            if owner == NOBODY:
                assert tokens == []
                assert float(batch.row_weight[row]) == 0
                continue
            seen += tokens
            weight[batch.owners[owner]] += float(batch.row_weight[row]) * len(tokens)
    assert sorted(seen) == [t for unit in units for record in unit for t in record[1:].tolist()]
    assert np.allclose(weight, 1)
    for batch, following in itertools.pairwise(batches):
        assert batch.last_continues == bool(batch.owners and batch.owners[-1:] == following.owners[:1])


@hypothesis.given(sizes=unit_sizes, others=unit_sizes, microbatch_size=st.integers(1, 5))
def test_shape_of_a_unit_depends_on_that_unit_alone(sizes, others, microbatch_size):
    """Invariant 3 in low precision: batch mates must not change how a unit's gradient is rounded."""
    packer = Packer(microbatch_size, max_length=9, pad_id=0)
    for units in (units_of(sizes), units_of(sizes + others)):
        shapes = {}
        for batch in packer.pack(units, packer.num_batches(units)):
            for owner in batch.owners:
                shapes.setdefault(owner, set()).add(tuple(batch.input_ids.shape))
        for owner, found in shapes.items():
            assert found == {(microbatch_size, packer.width(units[owner]))}
