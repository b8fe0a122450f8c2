"""Adaptive quantile clipping: one joint release of the plan's noise multiplier, norms that everyone can recompute."""

from __future__ import annotations

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

import accountants
from privtrain.backends import DdpBackend, LocalBackend
from privtrain.clipping import ClippingDiagnostics, styles
from privtrain.config import validate
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.data.units import UnitData
from privtrain.errors import ConfigError, GuaranteeLost
from privtrain.job.train import train
from privtrain.ledger.log import NullLedger
from privtrain.privacy.noise import StepNoise
from privtrain.privacy.plan import AdaptiveClipping, PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.tracking import NullTracker
from privtrain.training import auxiliary_sums
from privtrain.training.auxiliary_sums import next_norm
from privtrain.training.trainer import Trainer
from tests.conftest import write_config
from tests.privtrain.interrupted import train_until_killed
from tests.privtrain.models_for_tests import clipped_sum, invented_users, make_clipper, tiny_lora
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


@pytest.fixture
def adaptive(tree):
    tree["privacy"] |= {"clipping_style": "adaptive", "adaptive_clipping": {"count_noise": 0.8, "learning_rate": 0.5}}
    return tree


class Listening(LocalBackend):
    """Keeps the standard deviation that every step's noise was asked to have, and the noised sum."""

    def __init__(self):
        super().__init__(CPU)
        self.stddevs = []
        self.sums = []

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        vector = super().add_noise(total, layout, noise, exponent=exponent, stddev=stddev)
        self.stddevs.append(stddev)
        self.sums.append(vector.clone())
        return vector


def make_trainer(tree, directory, users, backend) -> Trainer:
    config = validate(tree)
    return Trainer(
        plan=PrivacyPlan.build(config.privacy),
        training=config.training,
        model=tiny_lora(directory)[0],
        units=UnitData(tuple(map(str, range(len(users)))), tuple(tuple(map(Record.of, u)) for u in users), 0),
        backend=backend,
        key=SecretKey.insecure(3, "test"),
        generation=0,
        ledger=NullLedger(),
        tracker=NullTracker(),
        autocast=torch.autocast("cpu", enabled=False),
        packer=Packer(4, 16, 0),
    )


@pytest.fixture
def restored(tiny_llama):
    """The tiny model is shared between tests."""
    _, layout = tiny_lora(tiny_llama)
    before = [p.detach().clone() for p in layout.parameters.values()]
    yield
    with torch.no_grad():
        for p, value in zip(layout.parameters.values(), before, strict=True):
            p.copy_(value)


def test_the_plan_accounts_for_gradient_and_count_together(adaptive):
    plan = PrivacyPlan.build(validate(adaptive).privacy)
    assert plan.adaptive_clipping is not None
    joint = accountants.joint_noise_multiplier(plan.gradient_noise_multiplier, 2 * plan.adaptive_clipping.count_noise)
    assert joint == pytest.approx(plan.noise_multiplier, rel=1e-12)
    assert plan.gradient_noise_multiplier > plan.noise_multiplier
    flat = {**adaptive["privacy"], "clipping_style": "flat", "adaptive_clipping": None}
    assert PrivacyPlan.build(validate({**adaptive, "privacy": flat}).privacy).epsilon == plan.epsilon


def test_default_count_noise_is_cheap_too_little_refused(adaptive):
    adaptive["privacy"]["adaptive_clipping"] = None
    plan = PrivacyPlan.build(validate(adaptive).privacy)
    assert plan.gradient_noise_multiplier < 1.033 * plan.noise_multiplier
    adaptive["privacy"]["adaptive_clipping"] = {"count_noise": 0.5}
    with pytest.raises(ConfigError, match=r"privacy\.adaptive_clipping\.count_noise: given 0\.5; must exceed"):
        PrivacyPlan.build(validate(adaptive).privacy)
    adaptive["privacy"] |= {"clipping_style": "flat"}
    with pytest.raises(ConfigError, match=r"belongs to privacy\.clipping_style: adaptive"):
        validate(adaptive)


@pytest.mark.parametrize("change", [{"target_quantile": 0.6}, {"learning_rate": 0.4}, {"count_noise": 0.9}])
def test_every_setting_changes_the_fingerprint(adaptive, change):
    before = PrivacyPlan.build(validate(adaptive).privacy).fingerprint()
    adaptive["privacy"]["adaptive_clipping"] |= change
    assert PrivacyPlan.build(validate(adaptive).privacy).fingerprint() != before


def test_real_noise_is_the_accounted_event_at_every_norm(adaptive, tiny_llama, restored):
    """Nobody is ever drawn, so what a step releases is its noise: measured, not read off the settings."""
    adaptive["privacy"] |= {"sampling_prob": 1e-9, "num_steps": 300}
    backend = Listening()
    trainer = make_trainer(adaptive, tiny_llama, invented_users(2, 1), backend)
    plan = trainer.plan
    norms, changes = [], []
    for step in range(plan.num_steps):
        norms.append(trainer.clipping_norm)
        trainer.train_step(step)
        changes.append(np.log(trainer.clipping_norm / norms[-1]))
    assert max(norms) / min(norms) > 1.3
    # Invert next_norm: what was released of the count, noise alone.
    counts = -np.array(changes) / plan.adaptive_clipping.learning_rate * plan.expected_batch_size
    gradient = torch.cat([value / norm for value, norm in zip(backend.sums, norms, strict=True)]).double()
    z_gradient, z_count = float(gradient.std()), 2 * counts.std()
    assert z_gradient == pytest.approx(plan.gradient_noise_multiplier, rel=0.01)
    low, high = stats.chi2.interval(1 - 1e-6, len(counts))
    assert low < (counts**2).sum() / plan.adaptive_clipping.count_noise**2 < high
    assert accountants.joint_noise_multiplier(z_gradient, z_count) == pytest.approx(plan.noise_multiplier, rel=0.1)
    for stddev, norm in zip(backend.stddevs, norms, strict=True):
        sensitivity = norm * (1 + 1e-5)
        assert accountants.joint_noise_multiplier(stddev / sensitivity, 1.6) == pytest.approx(
            plan.noise_multiplier, rel=1e-9
        )


@hypothesis.settings(max_examples=12)
@hypothesis.given(norm=st.floats(1e-3, 30), removed=st.integers(0, 5), size=st.integers(1, 6))
def test_unit_moves_gradient_and_count_by_at_most_one(tiny_llama, norm, removed, size):
    """In units of each part's noise, the whole release moves by at most 1 / noise_multiplier, whatever the norm."""
    gradient_noise = accountants.adaptive_clipping_noise(1.0, 0.8)
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(6, most_records=3)
    clipper = make_clipper(model, layout, 1.0, style="adaptive")

    def release(units):
        clipper.clipping_norm = norm
        total = clipped_sum(clipper, units, size).double()
        count = sum(share - 0.5 for share in clipper.diagnostics.shares_within)
        return total / (gradient_noise * norm), count / 0.8

    with_unit, without = release(users), release(users[:removed] + users[removed + 1 :])
    moved = float((with_unit[0] - without[0]).square().sum()) + (with_unit[1] - without[1]) ** 2
    assert moved**0.5 <= 1 + 1e-4


def test_count_of_a_unit_is_bounded_and_steps_at_norm():
    norms = torch.tensor([0.0, 0.9, 0.995, 1.0, 1.005, 1.1, 1e30, float("inf"), float("nan")], dtype=torch.float64)
    assert styles.within(norms, 1.0).tolist() == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0])
    nudged = styles.within(norms[:6] * (1 + 1e-7), 1.0) - styles.within(norms[:6], 1.0)
    assert float(nudged.abs().max()) < 1e-4, "rounding must not move the count"


def test_the_norm_finds_the_quantile(adaptive):
    settings = AdaptiveClipping(target_quantile=0.8, learning_rate=0.2, count_noise=2.0)
    plan = PrivacyPlan.build(validate(adaptive).privacy)
    plan = dataclasses.replace(plan, adaptive_clipping=settings, expected_batch_size=100)
    key, backend = SecretKey.insecure(0, "x"), LocalBackend(CPU)
    rng = np.random.default_rng(0)
    norm, path = 30.0, []
    for step in range(200):
        unit_norms = rng.lognormal(0, 1, size=100)
        counts = ClippingDiagnostics(shares_within=(unit_norms <= norm).astype(float).tolist())
        noise = StepNoise(SecretKey(key.derive("step", step)))
        share = auxiliary_sums.share_within(
            auxiliary_sums.release(plan, auxiliary_sums.reduced(plan, counts, backend), noise)
        )
        norm = next_norm(settings, norm, share, initial_norm=30.0)
        path.append(norm)
    assert np.median(path[100:]) == pytest.approx(np.exp(0.8416), rel=0.1)


def test_no_released_share_can_make_the_norm_jump():
    settings = AdaptiveClipping(0.5, 1.0, 1.0)
    assert next_norm(settings, 2.0, 1e9, initial_norm=1.0) == pytest.approx(2 / np.e)
    assert next_norm(settings, 2.0, -1e9, initial_norm=1.0) == pytest.approx(2 * np.e)


@pytest.mark.parametrize("share", [1e9, -1e9])
@pytest.mark.parametrize("initial_norm", [1e-3, 1.0, 50.0])
def test_a_norm_that_runs_away_stops_the_job_by_name(share, initial_norm):
    settings, norms = AdaptiveClipping(0.5, 1.0, 1.0), [initial_norm]

    def run_away():
        for _ in range(100):
            norms.append(next_norm(settings, norms[-1], share, initial_norm=initial_norm))

    with pytest.raises(GuaranteeLost, match=r"privacy\.clipping_norm .*privacy\.adaptive_clipping\.learning_rate"):
        run_away()
    assert 1e11 < max(norms[-1] / initial_norm, initial_norm / norms[-1]) <= 1e12


def test_the_trainer_stops_when_its_norm_runs_away(adaptive, tiny_llama, restored):
    trainer = make_trainer(adaptive, tiny_llama, invented_users(2, 1), Listening())
    trainer.clipping_norm = 1e-13
    with pytest.raises(GuaranteeLost, match="past a factor of"):
        trainer.train_step(0)


def _shares(plan, world_counts):
    backend = DdpBackend(CPU)
    counts = ClippingDiagnostics(shares_within=world_counts[backend.rank])
    return auxiliary_sums.release(
        plan, auxiliary_sums.reduced(plan, counts, backend), StepNoise(SecretKey.insecure(0, "x"))
    )


@pytest.mark.dist
def test_every_rank_gets_the_share_of_all_units_with_one_noise(adaptive):
    plan = PrivacyPlan.build(validate(adaptive).privacy)
    shares = [1.0, 0.1, 0.3, 0.0, 1.0, 0.7, 1 / 3]
    (alone,) = run_on_ranks(1, _shares, plan, [shares])
    assert run_on_ranks(2, _shares, plan, [shares[4:], shares[:4][::-1]]) == [alone, alone]


def _metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["privacy/clipping_norm"] for line in lines if "privacy/clipping_norm" in line]


def test_a_killed_job_goes_on_with_the_norm_it_had(adaptive, tmp_path, no_self_test):
    adaptive["privacy"]["num_steps"] = 7
    whole, broken = (
        write_config({**adaptive, "run": {**adaptive["run"], "name": name}}, tmp_path / f"{name}.yaml")
        for name in ("whole", "broken")
    )
    train(whole)
    train_until_killed(broken, 5)
    train(broken)
    runs = tmp_path / "runs"
    norms = _metrics(runs / "whole")
    assert len(set(norms)) == 7
    assert norms[0] == 1.0
    assert _metrics(runs / "broken") == norms
    adapters = [load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    statement = json.loads((runs / "whole" / "privacy.json").read_text())
    assert statement["mechanism"]["noise_multiplier"] == 1.0
    assert statement["mechanism"]["adaptive_clipping"]["count_noise"] == 0.8
    assert statement["mechanism"]["adaptive_clipping"]["gradient_noise_multiplier"] > 1.2
    assert "following quantile 0.5" in (runs / "whole" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("mutant", ["count noise forgotten", "gradient noise not raised"])
def test_the_noise_test_can_fail(adaptive, tiny_llama, restored, monkeypatch, mutant):
    import privtrain.training.auxiliary_sums as module

    if mutant == "count noise forgotten":
        monkeypatch.setattr(module, "noised", lambda total, *, exponent, **_: total.double() * 2.0**exponent)
    else:
        monkeypatch.setattr(PrivacyPlan, "gradient_noise_multiplier", property(lambda self: self.noise_multiplier))
    with pytest.raises((AssertionError, ValueError)):
        test_real_noise_is_the_accounted_event_at_every_norm(adaptive, tiny_llama, None)
