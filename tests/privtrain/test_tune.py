"""``privtrain tune``: the best of a secret number of trials, charged once; nothing of the others leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtrain.commands.plan import _accountants
from privtrain.config import validate
from privtrain.config.publishing import TrackingSection
from privtrain.errors import BudgetExceeded, ConfigError, GuaranteeLost, PlanMismatch, PrivtrainError, WorseThanBase
from privtrain.job import tune as module
from privtrain.job.train import train
from privtrain.job.tune import Draw, best_trial, tune
from privtrain.privacy.plan import PrivacyPlan, Tuning
from privtrain.privacy.secret import SecretKey
from privtrain.run.directory import RunDirectory
from tests.conftest import write_config

CANDIDATES = ["training.learning_rate=0.01", "training.learning_rate=0.03 training.schedule=linear"]


@pytest.fixture
def tuned(tree, tmp_path):
    """A configuration that may be tuned, private, with public rows to choose by."""
    del tree["privacy"]["insecure_seed"]
    rows = [{"text": f"public {number} alder elm"} for number in range(6)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["evaluation"] = {"kind": "files", "paths": [str(tmp_path / "public.jsonl")]}
    tree["privacy"]["tuning"] = {"mean_trials": 3}
    return tree


@pytest.fixture
def three_trials(monkeypatch):
    """The first and third trial take the first candidate."""
    draw = Draw((0, 1, 0), (0.1, 0.2, 0.3))
    monkeypatch.setattr(Draw, "of", classmethod(lambda cls, *a: draw))


class FakeTrials:
    """Trials that train nothing: their scores, and how often each was started."""

    def __init__(self, scores, fail_at=None):
        self.scores, self.fail_at, self.started = scores, fail_at, []

    def __call__(self, config, *, trial):
        run = RunDirectory(config.run.directory)
        if run.is_complete():
            return
        number = int(run.root.parent.name)
        self.started.append(number)
        if number == self.fail_at:
            raise GuaranteeLost("the power went out")
        if self.scores[number] is None:
            raise WorseThanBase("worse")
        trial.check_release()
        run.adapter.mkdir(parents=True)
        rows = [{"eval/loss": 9.0}, {"eval/loss": self.scores[number]}, {"train/lr": 0.1}]
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.privacy.write_text("{}")
        run.release.write_text(str(number))


@pytest.fixture
def without_ledgers(monkeypatch):
    monkeypatch.setattr(module, "_set_file_times", lambda run: None)


def test_tuning_releases_the_best_and_states_the_whole(tuned, tmp_path, three_trials, no_self_test):
    from privtrain.run.bundle import check_released

    path = write_config(tuned, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="privtrain tune"):
        train(path)
    tune(path, [], CANDIDATES)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    check_released(run.root)
    statement = json.loads(run.privacy.read_text())
    assert statement["tuning"] == {"mean_trials": 3.0, "distribution": "geometric"}
    plan = PrivacyPlan.from_body(statement["plan"])
    assert statement["epsilon"] == plan.recomputed_epsilon()
    alone = dataclasses.replace(plan, tuning=None)
    assert statement["epsilon"] > 1.2 * alone.recomputed_epsilon()
    place = tmp_path / "runs" / "tiny.tune"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    left = sorted(p.name for p in (place / "trials").iterdir() if (p / "tiny" / "release.json").exists())
    assert len(left) == 2
    losses = {}
    for root in (run.root, *(place / "trials" / name / "tiny" for name in left)):
        losses[root] = module._score(RunDirectory(root))
    assert min(losses, key=losses.__getitem__) == run.root
    before = run.release.read_bytes()
    tune(path, [], CANDIDATES)
    assert run.release.read_bytes() == before
    from privtrain.commands.verify import verify_directory

    verify_directory(run.root)


@pytest.mark.parametrize(
    ("scores", "winner"),
    [([3.0, 2.0, 4.0], 1), ([3.0, math.nan, 4.0], 0), ([None, 5.0, None], 1), ([2.0, 7.0, 2.0], 0)],
)
def test_the_least_loss_on_public_rows_wins(
    tuned, tmp_path, three_trials, monkeypatch, without_ledgers, scores, winner
):
    monkeypatch.setattr(module, "train", FakeTrials(scores))
    tune(write_config(tuned, tmp_path / "c.yaml"), [], CANDIDATES)
    assert (tmp_path / "runs" / "tiny" / "release.json").read_text() == str(winner)


def test_an_aborted_tuning_releases_nothing_and_goes_on(tuned, tmp_path, three_trials, monkeypatch, without_ledgers):
    path = write_config(tuned, tmp_path / "c.yaml")
    first = FakeTrials([3.0, 2.0, 1.0], fail_at=1)
    monkeypatch.setattr(module, "train", first)
    with pytest.raises(GuaranteeLost):
        tune(path, [], CANDIDATES)
    assert not (tmp_path / "runs" / "tiny").exists()
    again = FakeTrials([9.0, 2.0, 1.0])
    monkeypatch.setattr(module, "train", again)
    tune(path, [], CANDIDATES)
    assert (first.started, again.started) == ([0, 1], [1, 2])  # none counts twice
    assert (tmp_path / "runs" / "tiny" / "release.json").read_text() == "2"


def test_no_trial_better_than_the_base_releases_nothing(tuned, tmp_path, three_trials, monkeypatch):
    monkeypatch.setattr(module, "train", FakeTrials([None, None, None]))
    with pytest.raises(GuaranteeLost, match="nothing is released"):
        tune(write_config(tuned, tmp_path / "c.yaml"), [], CANDIDATES)


def test_a_tuning_is_charged_once_and_stays_charged(tuned, tmp_path, three_trials, monkeypatch, without_ledgers):
    from privtrain.job import reservation
    from privtrain.registry.evidence import LedgerEvidence
    from privtrain.registry.store import Registry

    url = f"sqlite:///{tmp_path}/registry.db"
    tuned["registry"] = {"url": url, "dataset": "people"}
    path = write_config(tuned, tmp_path / "c.yaml")
    config = validate(tuned)
    plan = PrivacyPlan.build(config.privacy, config.training)
    registry = Registry(url)
    registry.set_budget("people", epsilon=plan.epsilon * 1.01, delta=plan.delta)
    monkeypatch.setattr(module, "train", FakeTrials([3.0, 2.0, 1.0], fail_at=2))
    with pytest.raises(GuaranteeLost):
        tune(path, [], CANDIDATES)
    with pytest.raises(GuaranteeLost, match="had begun"):  # nothing is given back
        reservation.refund_run(tmp_path / "runs" / "tiny.tune", url)
    with pytest.raises(BudgetExceeded):
        tune(path, ["run.name=other"], CANDIDATES)
    monkeypatch.setattr(module, "train", FakeTrials([3.0, 2.0, 1.0]))
    head = "a" * 64
    shown = LedgerEvidence(4, head, "b" * 64, plan.fingerprint())
    monkeypatch.setattr(reservation, "evidence_of_release", lambda *a: shown)
    monkeypatch.setattr(reservation.BudgetReservation, "_contributions", lambda self: {})
    tune(path, [], CANDIDATES)
    uid = json.loads((tmp_path / "runs" / "tiny.tune" / "secret" / "identity.json").read_text())["tracker_id"]
    assert registry.is_settled(uid, head)
    tune(path, [], CANDIDATES)  # and no second charge
    with pytest.raises(BudgetExceeded):
        tune(path, ["run.name=other"], CANDIDATES)


@pytest.mark.parametrize(
    ("candidates", "problem"),
    [
        ([], "--try"),
        (["training.learning_rate=0.1", "privacy.num_steps=2"], "changes privacy"),
        (["training.learning_rate=0.1", "data.max_length=30"], "changes data"),
        (["training.learning_rate=0.1", "tracking.release_held_out_metrics=true"], "changes tracking"),
    ],
)
def test_candidates_are_one_mechanism(tuned, tmp_path, candidates, problem):
    with pytest.raises(ConfigError, match=problem):
        tune(write_config(tuned, tmp_path / "c.yaml"), [], candidates)


def test_another_list_of_candidates_is_refused(tuned, tmp_path, three_trials, monkeypatch, without_ledgers):
    path = write_config(tuned, tmp_path / "c.yaml")
    monkeypatch.setattr(module, "train", FakeTrials([3.0, 2.0, 1.0], fail_at=1))
    with pytest.raises(GuaranteeLost):
        tune(path, [], CANDIDATES)
    with pytest.raises(PlanMismatch, match="list of candidates"):
        tune(path, [], CANDIDATES[:1])


def test_a_run_that_is_there_is_not_replaced(tuned, tmp_path, three_trials):
    path = write_config(tuned, tmp_path / "c.yaml")
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.create()
    run.identity.write_text("{}")
    with pytest.raises(PrivtrainError, match="already"):
        tune(path, [], CANDIDATES)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sampling": "random_allocation", "sampling_prob": None, "steps_per_epoch": 4}, "poisson"),
        ({"accountant": "pld"}, "rdp"),
        ({"noise_multiplier": 0}, "needs noise"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tuned, change, problem):
    tuned["privacy"] |= change
    with pytest.raises(ConfigError, match=problem):
        validate(tuned)


def test_noise_is_calibrated_to_the_whole_procedure(tuned):
    tuned["privacy"] |= {"noise_multiplier": None, "target_epsilon": 3.0}
    config = validate(tuned)
    plan = PrivacyPlan.build(config.privacy)
    assert 2.9 < plan.epsilon <= 3.0
    assert plan.recomputed_epsilon() == plan.epsilon
    assert PrivacyPlan.from_body(plan.body()) == plan
    lone = PrivacyPlan.build(config.privacy.model_copy(update={"tuning": None}))
    assert plan.noise_multiplier > lone.noise_multiplier
    assert plan.fingerprint() != dataclasses.replace(plan, tuning=Tuning(4.0, "geometric")).fingerprint()
    assert [row["name"] for row in _accountants(plan)] == ["rdp"]
    banded = config.privacy.model_copy(update={"noise": "banded", "sampling": "cyclic_poisson", "num_bands": 2})
    assert PrivacyPlan.build(banded).epsilon <= 3.0


def test_every_mirror_is_kept_from_trials():
    """Whoever adds a key that shows runs to others has to say here whether it does."""
    published_with_the_release = {"private_metrics", "release_measurements", "release_held_out_metrics"}
    switches = {name for name, field in TrackingSection.model_fields.items() if field.annotation is bool}
    assert switches == {*module.MIRRORS, *published_with_the_release}


@given(
    scores=st.lists(st.one_of(st.floats(), st.sampled_from([1.0, 2.0])), min_size=1, max_size=8),
    ties=st.lists(st.floats(0, 1), min_size=8, max_size=8, unique=True),
)
def test_best_trial_is_a_total_order(scores, ties):
    number = best_trial(scores, ties)
    finite = [score for score in scores if math.isfinite(score)]
    if finite:
        assert scores[number] == min(finite)
    equal = [i for i, score in enumerate(scores) if score == scores[number] or not finite]
    assert ties[number] == min(ties[i] for i in equal)


def test_the_draw_is_a_function_of_the_key():
    key, tuning = SecretKey.generate(), Tuning(6.0, "geometric")
    draw = Draw.of(key, tuning, 3)
    assert draw == Draw.of(key, tuning, 3)
    assert len(draw.candidates) == len(draw.ties) >= 1
    assert all(0 <= candidate < 3 for candidate in draw.candidates)
    many = [Draw.of(SecretKey.generate(), tuning, 3) for _ in range(300)]
    assert 4 < sum(len(d.candidates) for d in many) / 300 < 8
