"""Correlated noise is the matrix mechanism, exactly; it is drawn again from commitments; a resumed run has the same."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pathlib
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

from attacks.analysis.verdict import epsilon_at
from privtrain.backends import LocalBackend
from privtrain.commands.verify import verify_directory
from privtrain.errors import GuaranteeLost, LedgerCorrupt, SelfTestFailed
from privtrain.job.train import train
from privtrain.ledger.log import verify
from privtrain.ledger.view import verify_run
from privtrain.privacy import correlated
from privtrain.privacy.banded import FRACTION_BITS, Strategy, square_root
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.digits import BLOCK
from privtrain.privacy.fixed_point import grid_exponent
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise, noise_exponent, noised
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.sum_digest import bind, chained_noise
from privtrain.run.consistency import statement_faults
from privtrain.run.statement import PrivacyStatement
from privtrain.training.trainer import Trainer
from tests.conftest import write_config
from tests.privtrain.cells import Cell, make_backend, make_trainer, self_test
from tests.privtrain.interrupted import train_until_killed
from tests.privtrain.ledgers import KEY as LEDGER_KEY
from tests.privtrain.test_replay import nudge_sums_from, state_of
from tests.ranks import run_on_ranks

NORM = 0.3
EXPONENT = grid_exponent(NORM)
STRATEGY = Strategy.rounded([1.0, 0.7, -0.2, 0.4])
KEY = SecretKey.insecure(4, "correlated")


def stddev_of(strategy: Strategy) -> float:
    return 1.7 * strategy.column_norm * NORM


def layout_of(size: int, first: int = 0, whole: int | None = None) -> Layout:
    part = torch.nn.Parameter(torch.zeros(size))
    return Layout({"w": part}, {"w": (first, (whole or size,))})


def history_of(layout: Layout, strategy: Strategy = STRATEGY, stddev: float | None = None) -> NoiseHistory:
    spread = stddev_of(strategy) if stddev is None else stddev
    return NoiseHistory(strategy, layout, torch.device("cpu"), exponent=EXPONENT, stddev=spread)


def noise_of(step: int) -> StepNoise:
    return chained_noise(KEY, step, f"commitment {step}")


def offsets_of(noise: StepNoise, size: int, stddev: float) -> list[int]:
    """u of the first coordinates, in 2**-F of a grid step, drawn as the module says it is."""
    bits = noise_exponent(stddev, EXPONENT - FRACTION_BITS) - (EXPONENT - FRACTION_BITS)
    return [int(value) >> (64 - bits) for value in noise.key.stream("offset", "w", 0).uint64(size)]


def fresh_in_fine_steps(noise: StepNoise, size: int, stddev: float, shift: list[int]) -> list[int]:
    """round((σX + shift) / g)·g by the door alone, in 2**-F of a grid step."""
    fine = EXPONENT - FRACTION_BITS
    total = torch.tensor(shift, dtype=torch.int64)
    found = noised(total, exponent=fine, stddev=stddev, noise=noise, name="w")
    return [int(Fraction(value) / Fraction(2) ** fine) for value in found.tolist()]


def mechanism_faults(release, strategy: Strategy, num_steps: int = 7, size: int = 40) -> list[str]:
    """What is released, against the matrix mechanism in exact rational numbers, step by step.

    M = C S + σX, rounded by the door with an offset u' = ((C S) + u) mod g that knows nothing of S; then the strategy's
    own past releases are taken back and the result is rounded to the grid of S: no history, no noise of the module.
    """
    stddev, rng, faults = stddev_of(strategy), np.random.default_rng(1), []
    fine = 1 << FRACTION_BITS
    spacing = 1 << (noise_exponent(stddev, EXPONENT - FRACTION_BITS) - (EXPONENT - FRACTION_BITS))
    units = [int(c * fine) for c in strategy.coefficients]
    sums = [[int(x) for x in rng.integers(-(1 << 41), 1 << 41, size)] for _ in range(num_steps)]
    released: list[list[int]] = []
    for step, own in enumerate(sums):
        past = list(enumerate(units[: step + 1]))
        mixed = [sum(c * sums[step - j][i] for j, c in past) for i in range(size)]
        offset = [(m + u) % spacing for m, u in zip(mixed, offsets_of(noise_of(step), size, stddev), strict=True)]
        shift = [m - o for m, o in zip(mixed, offset, strict=True)]
        rounded = fresh_in_fine_steps(noise_of(step), size, stddev, shift)
        before = [sum(c * released[step - j][i] for j, c in past[1:]) for i in range(size)]
        exact = [r + o - b for r, o, b in zip(rounded, offset, before, strict=True)]
        released.append([(value + fine // 2) // fine for value in exact])
        found = release(torch.tensor(own), noise_of(step)).tolist()
        if found != [float(np.float32(value * 2.0**EXPONENT)) for value in released[-1]]:
            faults.append(f"step {step}")
    return faults


@hypothesis.given(
    rest=st.lists(st.integers(-5000, 5000).map(lambda n: n / 4096), min_size=1, max_size=5), size=st.integers(1, 9)
)
@hypothesis.settings(max_examples=15)
def test_release_is_a_function_of_the_matrix_mechanism(rest, size):
    strategy = Strategy((1.0, *rest))
    assert mechanism_faults(history_of(layout_of(size), strategy).release, strategy, size=size) == []


MUTANTS = {
    "the sign of the coefficients": lambda h: h._coefficients.neg_(),
    "coefficients in the wrong order": lambda h: h._coefficients.copy_(h._coefficients.flip(0)),
    "half the last coefficient": lambda h: h._coefficients[-1:].div_(2, rounding_mode="floor"),
    "noise of another run": lambda h: h._last.fill_(1 << 40),
    "less noise": lambda h: setattr(h, "_stddev", h._stddev / 2),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_release_by_a_wrong_recursion_is_found(mutant):
    history = history_of(layout_of(40))
    MUTANTS[mutant](history)
    assert mechanism_faults(history.release, STRATEGY)


def test_release_without_the_offset_is_found(monkeypatch):
    """Without u the low digits of C S would show in what is released."""
    monkeypatch.setattr(correlated, "_top_bits", lambda drawn, bits: torch.zeros_like(drawn))
    assert mechanism_faults(history_of(layout_of(40)).release, STRATEGY)


def test_whitened_noise_is_the_planned_gaussian():
    """C w is normal with the spread of fresh noise, and independent from step to step; w itself is not."""
    size, num_steps = 20_000, 8
    history = history_of(layout_of(size))
    steps = np.stack([history.advance(noise_of(t)).numpy() for t in range(num_steps)]).astype(float) * 2.0**EXPONENT
    white = STRATEGY.matrix(num_steps) @ steps / stddev_of(STRATEGY)
    assert stats.kstest(white.ravel(), "norm").pvalue > 1e-3
    covariance = white @ white.T / size
    np.testing.assert_allclose(covariance, np.eye(num_steps), atol=5 / np.sqrt(size))
    expected = np.linalg.inv(STRATEGY.matrix(num_steps))
    found = steps @ steps.T / size / stddev_of(STRATEGY) ** 2
    law = expected @ expected.T
    spread = np.sqrt((law**2 + np.outer(np.diag(law), np.diag(law))) / size)
    assert np.abs((found - law) / spread).max() < 5


@pytest.mark.parametrize("cuts", [[0], [5], [BLOCK - 3], [BLOCK, BLOCK + 100]])
def test_shards_draw_their_own_part_of_the_same_noise(cuts):
    """On any number of ranks: also where a part begins within a keyed block, or is empty."""
    size = BLOCK + 200
    edges = [0, *cuts, size]
    whole = history_of(layout_of(size))
    parts = [history_of(layout_of(b - a, a, size)) for a, b in itertools.pairwise(edges)]
    for step in range(5):
        total = torch.arange(size) * 12_345_677
        expected = whole.release(total, noise_of(step))
        found = [
            p.release(total[a:b], noise_of(step)) for p, (a, b) in zip(parts, itertools.pairwise(edges), strict=True)
        ]
        assert torch.equal(torch.cat(found), expected)


def test_history_drawn_again_from_commitments_is_the_same():
    """Steps that are recalled, without their sums, leave the history that they left when they were taken."""
    one, other = history_of(layout_of(100)), history_of(layout_of(100))
    for step in range(9):
        one.release(torch.arange(100) << step, noise_of(step))
        other.advance(noise_of(step))
    total = torch.arange(100)
    assert torch.equal(one.release(total, noise_of(9)), other.release(total, noise_of(9)))


def test_equal_sums_after_different_ones_do_not_share_noise():
    """Else c_1 times the difference of the sums before would be left in clear."""
    layout = layout_of(50)
    named = {"public": [], "metrics": [], "sum_parts": lambda _: None}
    totals = [torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.int64)]
    first = [bind(KEY, 0, total, layout, previous="", **named) for total in totals]
    second = [bind(KEY, 1, totals[0], layout, previous=before.commitment, **named) for before in first]
    assert len({bound.noise.key.reveal() for bound in (*first, *second)}) == 4
    assert len({bound.commitment for bound in (*first, *second)}) == 4
    again = chained_noise(KEY, 1, second[0].commitment)
    assert again.key.reveal() == second[0].noise.key.reveal(), "drawn again from the ledger alone"
    alone = bind(KEY, 1, totals[0], layout, **named)
    assert alone.commitment not in {bound.commitment for bound in second}


def test_noise_that_outgrows_its_integers_is_refused():
    history = history_of(layout_of(3), Strategy((1.0, 4.0)))  # its inverse grows by 4 a step
    for step in range(7):
        history.advance(noise_of(step))
    with pytest.raises(GuaranteeLost, match="too large to be counted exactly"):
        [history.advance(noise_of(step)) for step in range(7, 20)]


class ForgetsHistory(LocalBackend):
    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return super().add_noise(total, layout, noise, exponent=exponent, stddev=stddev)


def test_self_test_finds_noise_without_or_with_wrong_history(tiny_llama, monkeypatch):
    cell, cpu = Cell(sampling_prob=0.3, num_bands=3), torch.device("cpu")
    with pytest.raises(SelfTestFailed, match="different noise"):
        self_test(make_trainer(ForgetsHistory(cpu), tiny_llama, cell))
    taken_back = NoiseHistory._taken_back
    # Far too much: the sign alone would now and then look right on so few coordinates.
    monkeypatch.setattr(NoiseHistory, "_taken_back", lambda self, last: taken_back(self, -8 * last))
    with pytest.raises(SelfTestFailed, match="does not take back that of the first"):
        self_test(make_trainer(LocalBackend(cpu), tiny_llama, cell))


@pytest.fixture
def banded(tree):
    tree["privacy"] |= {"noise": "banded", "num_bands": 4, "sampling_prob": 0.2, "num_steps": 8}
    tree["performance"] |= {"checkpoint_interval_steps": 4}
    return tree


def adapter(tmp_path: pathlib.Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors")


def test_resumed_run_of_one_band_replays_for_free(banded, tmp_path, monkeypatch, no_self_test):
    banded["privacy"] |= {"num_bands": 1}
    config = write_config(banded, tmp_path / "run.yaml")
    train_until_killed(config, 5)
    train(config)
    assert (state_of(tmp_path, "tiny").generation, state_of(tmp_path, "tiny").num_charged) == (0, 8)


def test_resumed_run_has_the_noise_of_the_undisturbed_one(banded, tmp_path, monkeypatch, no_self_test):
    config = write_config(banded, tmp_path / "run.yaml")
    train_until_killed(config, 5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_recall", forgetful(Trainer._recall))
        with pytest.raises(GuaranteeLost, match="its noise cannot be drawn again"):
            train(config)
    train(config)
    state = state_of(tmp_path, "tiny")
    assert (state.generation, state.num_charged, state.num_groups) == (0, 8, 4)
    assert verify(tmp_path / "runs" / "tiny" / "secret" / "ledger.jsonl").num_groups == 4
    banded["run"]["name"] = "whole"
    train(write_config(banded, tmp_path / "whole.yaml"))
    one, other = adapter(tmp_path, "tiny"), adapter(tmp_path, "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def _histories(name: str, directory: pathlib.Path, cell: Cell) -> list[bool]:
    """Whether a rank's history, drawn again from commitments, is the one that its two steps left."""
    trained, commitments = make_trainer(make_backend(name), directory, cell), []
    release = trained.release

    def keep(*arguments, **named):
        released = release(*arguments, **named)
        commitments.append(released.commitment)
        return released

    trained.release = keep
    for step in range(2):
        trained.train_step(step)
    resumed = make_trainer(make_backend(name), directory, cell)
    resumed._past = commitments
    resumed._recall(2)
    one, other = trained._history, resumed._history
    assert one is not None
    assert other is not None
    assert bool(one._last.any()) or not one._last.numel()
    return [torch.equal(one._last, other._last), trained._previous == resumed._previous, one.num_steps == 2]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["ddp", "zero1"])
def test_history_on_two_ranks_is_drawn_again_bit_by_bit(tiny_llama, name):
    cell = Cell(sampling_prob=0.3, num_bands=3)
    assert run_on_ranks(2, _histories, name, tiny_llama, cell) == [[True] * 3] * 2


def test_released_banded_run_verifies_and_its_cap_is_the_plans(banded, tmp_path):
    """Statement, card, ledger and the attack job's bound say one thing; a statement of other bands is refused."""
    del banded["privacy"]["insecure_seed"]
    banded["privacy"] |= {"num_bands": "auto", "noise_multiplier": None, "target_epsilon": 6.0, "sampling_prob": 0.1}
    train(write_config(banded, tmp_path / "run.yaml"))
    run = tmp_path / "runs" / "tiny"
    assert "every file by SHA-256" in verify_directory(run).checked
    assert "matches privacy.json" in verify_run(run)
    statement = json.loads((run / "privacy.json").read_text())
    plan = PrivacyPlan.from_body(statement["plan"])
    assert plan.correlated is not None
    bands = plan.correlated.num_bands
    assert statement["mechanism"]["strategy"]["num_bands"] == bands == state_of(tmp_path, "tiny").num_groups
    assert f"noise correlated over {bands} steps" in (run / "adapter" / "README.md").read_text()
    assert epsilon_at(PrivacyStatement.model_validate(statement), plan.delta) == pytest.approx(plan.epsilon, rel=1e-3)
    for path, value in (
        (("mechanism", "strategy", "num_bands"), bands + 1),
        (("mechanism", "strategy", "column_norm"), 1.0),
        (("sampling", "num_bands"), 2 * bands),
        (("plan", "strategy", "coefficients"), [1.0]),
        (("plan", "strategy", "coefficients"), [*plan.correlated.coefficients[:-1], 0.0]),
    ):
        forged = copy.deepcopy(statement)
        *parents, last = path
        functools.reduce(lambda node, key: node[key], parents, forged)[last] = value
        assert statement_faults(forged), path


def forgetful(recall):
    def without_past(self, step):
        self._past = ()
        recall(self, step)

    return without_past


def test_diverging_replay_charges_whole_rounds(banded, tmp_path, monkeypatch, no_self_test):
    banded["privacy"] |= {"num_steps": 12}
    config = write_config(banded, tmp_path / "run.yaml")
    train_until_killed(config, 4)
    with monkeypatch.context() as patch:
        drawn = nudge_sums_from(4, patch)
        train(config)
    state = state_of(tmp_path, "tiny")
    assert drawn == [(1, step) for step in range(4, 8)]
    assert [(entry.generation, entry.step) for entry in state.path][3:] == [(0, 3), *[(1, s) for s in range(4, 8)]]
    assert state.num_charged == 9, "two rounds of the first mechanism, of which the second was begun, and one after"


def test_unit_in_two_groups_is_found_in_the_ledger(tmp_path):
    from privtrain.ledger.log import open_ledger

    path = tmp_path / "ledger.jsonl"
    named = {"plan_fingerprint": "p", "records_per_unit": 3, "pseudonym_key": LEDGER_KEY, "num_groups": 3}
    for users in ([0, 1, 2], [0, 1, 2], [0, 1, 0]):  # the last one wrong
        with open_ledger(path, **named) as ledger:
            if ledger.state.generation < 0:
                ledger.begin_session(generation=0, from_step=0, environment="e")
            for user in users:
                step = len(ledger.state.path)
                ledger.intend(0, step, [(f"user-{user}", 1), (f"other-{step % 3}", 1)])
                ledger.commit(0, step, "c" * 64)
        if users[-1] == 2:
            assert verify(path).num_groups == 3
    with pytest.raises(LedgerCorrupt, match=r"steps 6 and 8 of generation 0.*3 groups"):
        verify(path)


def test_square_root_is_a_strategy_for_training():
    assert (
        mechanism_faults(history_of(layout_of(8), root := Strategy.rounded(square_root(8))).release, root, size=8) == []
    )
