"""Loss and clip fraction through the mechanism: one joint release of the plan's noise, on every backend, repeatable."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import special, stats

import accountants
from privtrain.backends import LocalBackend
from privtrain.clipping import ClippingDiagnostics
from privtrain.config import validate
from privtrain.errors import ConfigError, SelfTestFailed
from privtrain.job.train import train
from privtrain.models.losses import row_losses
from privtrain.privacy import normal
from privtrain.privacy.noise import StepNoise, noise_exponent
from privtrain.privacy.plan import LOSS, WITHIN_NORM, NoisedMetrics, PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.training import auxiliary_sums
from tests.conftest import write_config
from tests.privtrain.cells import NUM_STEPS, Cell, key_noise_by_step_alone, make_backend, make_trainer, self_test
from tests.privtrain.interrupted import train_until_killed
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    plain_unit_gradient,
    tiny_lora,
)
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
RANGE = (2.0, 7.0)


@pytest.fixture(autouse=True)
def own_rank(monkeypatch):
    """``make_backend`` leaves word of the rank."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")


@pytest.fixture
def noised(tree):
    tree["privacy"]["noised_metrics"] = {"loss_range": list(RANGE), "noise": 1.5}
    return tree


def plan_of(tree) -> PrivacyPlan:
    return PrivacyPlan.build(validate(tree).privacy)


@pytest.mark.parametrize("style", ["flat", "adaptive"])
@pytest.mark.parametrize("release", [["loss"], ["clip_fraction"], ["loss", "clip_fraction"]])
@pytest.mark.parametrize("noise", [None, 1.2])
def test_auxiliary_sums_and_gradient_share_the_plans_noise(noised, style, release, noise):
    noised["privacy"] |= {"clipping_style": style, "noised_metrics": {"release": release, "noise": noise}}
    plan = plan_of(noised)
    own = [2 * auxiliary_sum.noise for auxiliary_sum in plan.auxiliary_sums]
    assert accountants.joint_noise_multiplier(plan.gradient_noise_multiplier, *own) == pytest.approx(
        plan.noise_multiplier, rel=1e-12
    )
    without = plan_of({**noised, "privacy": {**noised["privacy"], "noised_metrics": None, "clipping_style": "flat"}})
    assert plan.epsilon == without.epsilon
    expected = {{"clip_fraction": WITHIN_NORM, "loss": LOSS}[name] for name in release}
    expected |= {WITHIN_NORM} if style == "adaptive" else set()
    assert sorted(auxiliary_sum.name for auxiliary_sum in plan.auxiliary_sums) == sorted(expected), (
        "count and clip fraction are one sum"
    )


def test_the_default_noise_costs_at_most_a_thirtieth(noised):
    noised["privacy"]["noised_metrics"] = {}
    plan = plan_of(noised)
    assert plan.noise_multiplier < plan.gradient_noise_multiplier < 1.033 * plan.noise_multiplier


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": 0.7}, r"privacy\.noised_metrics\.noise: given 0\.7; must exceed 0\.707 of it"),
        ({"noise": 0.5, "release": ["loss"]}, r"given 0\.5; must exceed half the noise multiplier, 0\.5"),
        ({"loss_range": [3, 3]}, "smaller one first"),
        ({"loss_range": [0, math.inf]}, "finite"),
        ({"release": ["loss", "loss"]}, "twice"),
        ({"release": []}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_key(noised, given, message):
    noised["privacy"]["noised_metrics"] = given
    with pytest.raises(ConfigError, match=message):
        plan_of(noised)


@pytest.mark.parametrize("change", [{"noise": 2.0}, {"loss_range": [0, 5]}, {"release": ["loss"]}])
def test_every_setting_changes_the_fingerprint(noised, change):
    before = plan_of(noised).fingerprint()
    noised["privacy"]["noised_metrics"] |= change
    assert plan_of(noised).fingerprint() != before


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    scale=st.sampled_from([1e-3, 1.0, 50.0, 1e6]),
    removed=st.integers(0, 5),
    size=st.integers(1, 6),
    route=st.sampled_from(["batched", "one_unit"]),
)
def test_one_unit_moves_the_vector_by_at_most_one_in_its_noise(tiny_llama, scale, removed, size, route):
    """Gradient and auxiliary sums, each over its noise: together they move by at most 1 / noise_multiplier."""
    plan = Cell(noised_metrics=True).plan
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(6, most_records=3)
    clipper = make_clipper(model, layout, 0.5, lambda ids, mask: scale * row_losses(model, ids, mask), route=route)

    def release(units):
        total = clipped_sum(clipper, units, size).double() / (plan.gradient_noise_multiplier * 0.5)
        sums = auxiliary_sums.sums(plan, clipper.diagnostics)
        return total, [
            sums[auxiliary_sum.name] * 2.0**auxiliary_sums.EXPONENT / auxiliary_sum.noise
            for auxiliary_sum in plan.auxiliary_sums
        ]

    with_unit, without = release(users), release(users[:removed] + users[removed + 1 :])
    moved = float((with_unit[0] - without[0]).square().sum())
    moved += sum((a - b) ** 2 for a, b in zip(with_unit[1], without[1], strict=True))
    assert moved**0.5 <= (1 + 1e-4) / plan.noise_multiplier


@hypothesis.given(losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=6), data=st.data())
def test_no_loss_moves_its_sum_by_more_than_one_half(losses, data):
    plan = Cell(noised_metrics=True).plan
    counts = ClippingDiagnostics(unit_losses=dict(enumerate(losses)))
    extra = data.draw(st.floats(allow_nan=True, allow_infinity=True))
    before = auxiliary_sums.sums(plan, counts)[LOSS]
    counts.add_loss(len(losses), extra)
    assert abs(auxiliary_sums.sums(plan, counts)[LOSS] - before) * 2.0**auxiliary_sums.EXPONENT <= 0.5


@pytest.mark.parametrize("route", ["batched", "one_unit"])
def test_metrics_without_noise_are_means_over_units(tiny_llama, route):
    """Against one plain forward pass a user; units span microbatches of two rows."""
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(5, most_records=3)
    losses, norms = [], []
    for records in users:
        total, count = 0.0, sum(len(tokens) - 1 for tokens in records)
        for tokens in records:
            mask = torch.arange(len(tokens))[None] > 0
            total += float(row_losses(model, torch.from_numpy(tokens)[None], mask).detach())
        losses.append(total / count)
        norms.append(float(plain_unit_gradient(model, layout, records).norm()))
    norm = float(np.median(norms)) * 1.2
    clipper = make_clipper(model, layout, norm, route=route)
    assert torch.allclose(
        clipped_sum(clipper, users, 2).double(), brute_force_sum(model, layout, users, norm), atol=1e-5
    )
    low, high = min(losses) + 0.01, max(losses) + 1
    settings = NoisedMetrics(("loss", "clip_fraction"), (low, high), 0.0)
    plan = dataclasses.replace(Cell(noise_multiplier=0.0).plan, noised_metrics=settings, expected_batch_size=len(users))
    released = auxiliary_sums.release(
        plan, auxiliary_sums.sums(plan, clipper.diagnostics), StepNoise(SecretKey.insecure(0, "x"))
    )
    found = auxiliary_sums.metrics(plan, released)
    assert found["noised/loss"] == pytest.approx(np.mean(np.maximum(losses, low)), rel=1e-5)
    assert found["noised/clip_fraction"] == pytest.approx(np.mean(np.array(norms) > norm), abs=1e-6)


def test_the_trainers_real_noise_is_the_accounted_one(tiny_llama):
    """Nobody is drawn, so what a step releases is noise; its spread is the one that is stated beside each number."""
    cell = Cell(sampling_prob=1e-9, noised_metrics=True)
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, cell)
    plan, rows = trainer.plan, []
    for step in range(400):
        trainer.clipper.reset()
        released = trainer.release(trainer.clipper, SecretKey.insecure(1, "noise"), step)
        rows.append([*auxiliary_sums.metrics(plan, released.auxiliary_sums).values()])
    loss, loss_stddev, share, share_stddev = np.array(rows).T
    low, high = stats.chi2.interval(1 - 1e-6, len(rows))
    for centred, stddev in ((loss - 4.0, loss_stddev[0]), (share - 0.5, share_stddev[0])):
        assert low < (centred**2).sum() / stddev**2 < high
    assert abs(np.corrcoef(loss, share)[0, 1]) < 0.25
    assert [loss_stddev[0], share_stddev[0]] == [plan.metric_stddevs["loss"], plan.metric_stddevs["clip_fraction"]]
    assert loss_stddev[0] == pytest.approx(8 * plan.auxiliary_sums[0].noise / plan.expected_batch_size)


@pytest.mark.parametrize("cell", [Cell(noised_metrics=True), Cell(sampling_prob=0.3, num_bands=3, noised_metrics=True)])
def test_the_self_test_finds_an_auxiliary_sum_without_its_noise(tiny_llama, monkeypatch, cell):
    monkeypatch.setattr(auxiliary_sums, "noised", lambda total, *, exponent, **_: total.double() * 2.0**exponent)
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, cell)
    with pytest.raises(SelfTestFailed, match="was released as"):
        self_test(trainer)


def points_released(plan, shares, losses, num_steps=8) -> np.ndarray:
    """What is published of some units, in points of the public grids: [steps, auxiliary sums]."""
    counts = ClippingDiagnostics(shares_within=shares, unit_losses=dict(enumerate(losses)))
    totals = auxiliary_sums.reduced(plan, counts, LocalBackend(CPU))
    rows = []
    for step in range(num_steps):
        released = auxiliary_sums.release(
            plan, totals, StepNoise(SecretKey(SecretKey.insecure(0, "x").derive("step", step)))
        )
        grids = [
            2.0 ** noise_exponent(auxiliary_sum.noise, auxiliary_sums.EXPONENT) for auxiliary_sum in plan.auxiliary_sums
        ]
        rows.append(
            [released[r.name] * plan.expected_batch_size / g for r, g in zip(plan.auxiliary_sums, grids, strict=True)]
        )
    return np.array(rows)


def num_told_apart(plan, num_trials, num_steps=10) -> int:
    """Guess from the digits of the published share alone whether a 24th user was there, as often right as is returned.

    Mironov's attack: which float64 can a sampler of 52 digits reach from the sum with the user, and which not?
    """
    auxiliary_sum = next(auxiliary_sum for auxiliary_sum in plan.auxiliary_sums if auxiliary_sum.name == WITHIN_NORM)
    num_right = 0
    for trial in range(num_trials):
        counts = ClippingDiagnostics(shares_within=[1.0] * (23 + trial % 2))
        totals = auxiliary_sums.reduced(plan, counts, LocalBackend(CPU))
        key = SecretKey.insecure(trial, "trial")
        seen = [
            auxiliary_sums.release(plan, totals, StepNoise(SecretKey(key.derive("step", step))))[WITHIN_NORM]
            for step in range(num_steps)
        ]
        guess = all(can_reach(12.0, value * plan.expected_batch_size, auxiliary_sum.noise) for value in seen)
        num_right += guess == bool(trial % 2)
    return num_right


def can_reach(total, released, stddev) -> bool:
    nearest = round(special.ndtr((released - total) / stddev) * 2.0**52 - 0.5)
    candidates = (np.arange(nearest - 40, nearest + 41) + 0.5) * 2.0**-52
    return bool((total + stddev * special.ndtri(candidates) == released).any())


def test_digits_of_a_metric_tell_nothing_of_who_was_there(monkeypatch):
    plan = Cell(noised_metrics=True).plan
    assert 70 <= num_told_apart(plan, 200) <= 130

    def in_floating_point(total, *, exponent, stddev, noise, name, **_):
        u = ((noise.key.stream("noise", name, 0).uint64(1) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return total.double() * 2.0**exponent + stddev * torch.from_numpy(special.ndtri(u))

    monkeypatch.setattr(auxiliary_sums, "noised", in_floating_point)
    assert num_told_apart(plan, 20) == 20


def is_on_grid(points: np.ndarray) -> bool:
    return bool((np.abs(points - np.round(points)) < 1e-6).all())


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    losses=st.lists(st.floats(-5, 20) | st.just(math.nan), min_size=1, max_size=20),
)
def test_neighbours_release_the_same_set_of_numbers_the_grid(shares, losses):
    """Which last digits can occur is all that the digits of a number can tell; here all neighbours have the same."""
    plan = Cell(noised_metrics=True).plan
    assert is_on_grid(points_released(plan, shares, losses))
    assert is_on_grid(points_released(plan, shares[1:], losses[1:]))


def test_metric_beside_the_door_is_off_the_grid_and_refused(tiny_llama, monkeypatch):
    """The mutant: noise added to the exact sum in float64, as all 53 digits of it."""

    def beside(total, *, exponent, stddev, noise, name, first=0):
        x = normal.quantiles(torch.from_numpy(noise.key.stream("noise", name, 0).uint64(1).view("<i8")))
        return total.double() * 2.0**exponent + stddev * x

    trainer = make_trainer(LocalBackend(CPU), tiny_llama, Cell(noised_metrics=True))
    monkeypatch.setattr(auxiliary_sums, "noised", beside)
    assert not is_on_grid(points_released(trainer.plan, [0.25], [3.0]))
    with pytest.raises(SelfTestFailed, match="was released as"):
        self_test(trainer)


@hypothesis.given(data=st.data(), shares=st.lists(st.floats(0, 1), max_size=30))
def test_sums_do_not_depend_on_order_or_on_who_has_which_unit(data, shares):
    plan = Cell(noised_metrics=True).plan
    order = data.draw(st.permutations(shares))
    cut = data.draw(st.integers(0, len(shares)))
    whole, *parts = (
        auxiliary_sums.sums(plan, ClippingDiagnostics(shares_within=part, unit_losses=dict(enumerate(part))))
        for part in (shares, order[:cut], order[cut:])
    )
    assert whole == {name: sum(part[name] for part in parts) for name in whole}


def released_by(name: str, directory, cells) -> list[list[float]]:
    found = []
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = make_trainer(make_backend(name), directory, cell)
        self_test(trainer)
        rows: list[float] = []
        release = trainer.release

        def kept(*arguments, release=release, rows=rows, **named):
            released = release(*arguments, **named)
            rows += released.auxiliary_sums.values()
            return released

        trainer.release = kept
        key_noise_by_step_alone(trainer)
        for step in range(NUM_STEPS):
            trainer.train_step(step)
        found.append(rows)
    return found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp", "zero3", *[pytest.param(name, marks=pytest.mark.campaign) for name in ("zero2", "fsdp2")]]
)
def test_two_ranks_release_what_one_process_does(tiny_llama, name):
    cells = [Cell(noised_metrics=True), Cell("full", noised_metrics=True, style="adaptive")]
    expected = released_by("local", tiny_llama, cells)
    ranks = run_on_ranks(2, released_by, name, tiny_llama, cells)
    assert ranks[0] == ranks[1]
    for found, alone in zip(ranks[0], expected, strict=True):
        assert len(found) == 2 * NUM_STEPS
        assert found == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("noise", [{}, {"noise": "banded", "num_bands": 2}])
def test_killed_job_releases_the_same_numbers_everywhere(noised, tmp_path, noise, no_self_test):
    noised["privacy"] |= {"num_steps": 6, **noise}
    whole, broken = (
        write_config({**noised, "run": {**noised["run"], "name": name}}, tmp_path / f"{name}.yaml")
        for name in ("whole", "broken")
    )
    train(whole)
    train_until_killed(broken, 4)
    train(broken)

    def metrics(name):
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "noised" in k} for line in lines if "train/lr" in line]

    assert metrics("broken") == metrics("whole")
    assert len({row["noised/loss"] for row in metrics("whole")}) == 6
    assert {row["noised/loss_stddev"] for row in metrics("whole")} == {5.0 * 1.5 / 6}
    assert "train/loss" not in (tmp_path / "runs" / "whole" / "metrics.jsonl").read_text()
    mechanism = json.loads((tmp_path / "runs" / "whole" / "privacy.json").read_text())["mechanism"]
    assert mechanism["noise_multiplier"] == 1.0
    assert mechanism["noised_metrics"]["loss_range"] == list(RANGE)
    assert mechanism["noised_metrics"]["gradient_noise_multiplier"] > 1.1
    card = (tmp_path / "runs" / "whole" / "adapter" / "README.md").read_text()
    assert "loss (± 1.2), clip_fraction (± 0.25)" in card


def test_metrics_without_noise_are_not_called_noised(tree):
    """They would be the raw loss, published."""
    del tree["privacy"]["noise_multiplier"]
    tree["privacy"] |= {"noise_multiplier": 0.0, "noised_metrics": {}}
    with pytest.raises(ConfigError, match="raw loss"):
        validate(tree)
