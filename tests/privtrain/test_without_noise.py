"""What studies compare DP with: clipping without noise, batch clipping, no clipping, and what a token costs."""

from __future__ import annotations

import pytest
import torch

from privtrain.backends import LocalBackend
from privtrain.clipping import exact_sum, styles
from privtrain.config import validate
from privtrain.data.invented_customers import customer_records
from privtrain.errors import ConfigError
from privtrain.training.cost import flops_per_token
from tests.privtrain import cells
from tests.privtrain.cells import Cell


def _released(trainer, step=0):
    """A step's clipped sum as it is released, and the plain sum of the units' gradients."""
    drawn = trainer.sampler.draw(step)
    sums = []
    for clipping_norm in (trainer.clipping_norm, 1e6 if trainer.plan.clipping_style == "flat" else 1.0):
        clipper = trainer.new_clipper(trainer.row_losses, "auto")
        clipper.clipping_norm = clipping_norm
        clipper.reset()
        for batch in trainer.microbatches(drawn):
            clipper.accumulate(batch)
        if not sums:
            sums.append(trainer.release(clipper, trainer._key, step)[0].clone())
        else:
            sums.append(exact_sum.as_float32(clipper.finish(), clipper.grid_exponent))
    return sums


@pytest.mark.parametrize("clipping_norm", [1e-3, 1e2])
def test_batch_clipping_bounds_the_mean_of_a_step_and_no_unit(tiny_llama, clipping_norm):
    cell = Cell(method="full", style="batch", clipping_norm=clipping_norm, noise_multiplier=0.0)
    trainer = cells.make_trainer(LocalBackend(cells.CPU), tiny_llama, cell)
    cells.self_test(trainer)
    released, plain = _released(trainer)
    batch_size = trainer.plan.expected_batch_size
    expected = plain * min(1.0, clipping_norm / float(plain.norm() / batch_size))
    truncated = 7 * len(plain) ** 0.5 * 2.0 ** styles.grid_exponent("batch", max(1.0, clipping_norm))
    assert float((released - expected).norm()) <= 1e-5 * float(expected.norm()) + truncated
    assert float(released.norm()) / batch_size <= clipping_norm * (1 + 1e-5)


def test_a_very_large_norm_is_no_clipping_at_all(tiny_llama):
    cell = Cell(method="full", clipping_norm=1e6, noise_multiplier=0.0)
    trainer = cells.make_trainer(LocalBackend(cells.CPU), tiny_llama, cell)
    cells.self_test(trainer)
    released, plain = _released(trainer)
    assert torch.equal(released, plain)
    assert trainer.clipper.diagnostics.num_clipped == 0


def test_batch_clipping_needs_that_there_is_no_noise(tree):
    tree["privacy"] |= {"clipping_style": "batch", "noise_multiplier": 0}
    validate(tree)
    tree["privacy"]["noise_multiplier"] = 1.0
    with pytest.raises(ConfigError, match=r"needs privacy\.noise_multiplier: 0"):
        validate(tree)


def test_the_factor_of_a_batch_is_one_below_the_norm():
    assert [styles.batch_factor(norm, 2.0) for norm in (0.0, 1.0, 2.0, 4.0)] == [1.0, 1.0, 1.0, 0.5]


def test_operations_of_a_token_are_those_of_the_layers(tiny_llama):
    """Forward 2 N; backward 2 N for activations and 2 N for weights that are trained; norms of units on top."""
    costs = {}
    for method in ("full", "lora"):
        trainer = cells.make_trainer(LocalBackend(cells.CPU), tiny_llama, Cell(method=method, microbatch_size=4))
        costs[method] = flops_per_token(trainer, trainer.packer, vocabulary_size=200)
        assert flops_per_token(trainer, trainer.packer, vocabulary_size=200) == costs[method]
        assert not trainer.clipper.total.any()
    with_head = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora" not in name)
    assert 3 * with_head < costs["lora"] < costs["full"] < 20 * with_head


def test_repeated_messages_are_earlier_ones_of_the_same_customer():
    def number(repeat_prob):
        records = list(customer_records(60, seed=1, mean_records=10, repeat_prob=repeat_prob))
        return len(records), len({(r.user, r.text) for r in records})

    assert number(0.0)[0] == number(0.0)[0]
    many, distinct = number(0.5)
    assert distinct < 0.75 * many
    with pytest.raises(ConfigError, match="repeat_prob"):
        list(customer_records(2, seed=1, repeat_prob=1.5))
