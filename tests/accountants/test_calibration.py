import pytest
from accounting_cases import dp_sgd

import accountants
from accountants import calibration
from accountants.units import group_event

MNLI = {"sampling_prob": 2000 / 392702, "num_steps": 3920}


@pytest.mark.parametrize("accountant", ["pld", "tilted", "rdp"])
def test_the_noise_meets_the_target_and_no_smaller_noise_does(accountant):
    noise = accountants.calibrate_noise_multiplier(target_epsilon=8.0, target_delta=1e-6, accountant=accountant, **MNLI)
    spent = [
        accountants.epsilon(dp_sgd(MNLI["sampling_prob"], s, 3920), 1e-6, accountant=accountant).certified_upper()
        for s in (noise, noise - 1e-4)
    ]
    assert spent[0] <= 8.0 < spent[1]


def test_the_mnli_noise_is_a_tenth_of_a_percent_from_the_best():
    noise = accountants.calibrate_noise_multiplier(target_epsilon=8.0, target_delta=1e-6, **MNLI)
    exact = accountants.epsilon(dp_sgd(MNLI["sampling_prob"], noise - 6e-4, 3920), 1e-6, accountant="contour")
    assert exact.estimate > 8.0


def test_every_parameter_can_be_found():
    target = {"target_epsilon": 2.0, "target_delta": 1e-5, "accountant": "tilted"}
    group = {"noise_multiplier": 4.0, "sampling_prob": 0.01, "num_steps": 1000}
    steps = accountants.calibrate_count(lambda n: dp_sgd(0.01, 1.0, int(n)), name="num_steps", **target)
    prob = accountants.calibrate_probability(lambda q: dp_sgd(q, 1.0, 1000), **target)
    records = accountants.calibrate_count(
        lambda k: group_event(num_records=int(k), **group), name="num_records", largest=1024, **target
    )

    def spent(event):
        return accountants.epsilon(event, 1e-5, accountant="tilted").upper

    assert spent(dp_sgd(0.01, 1.0, steps)) <= 2.0 < spent(dp_sgd(0.01, 1.0, round(1.01 * steps)))
    assert spent(dp_sgd(prob, 1.0, 1000)) <= 2.0 < spent(dp_sgd(1.005 * prob, 1.0, 1000))
    assert (
        spent(group_event(num_records=records, **group)) <= 2.0 < spent(group_event(num_records=records + 1, **group))
    )


@pytest.mark.campaign
def test_other_samplers_are_calibrated_too():
    def make(noise):
        return accountants.truncated_poisson_event(
            noise_multiplier=noise, sampling_prob=0.1, max_batch_size=40, num_units=200, num_steps=5
        )

    noise = calibration.calibrate_noise(make, target_epsilon=3.0, target_delta=1e-5)
    assert 0.995 * 3.0 <= accountants.epsilon(make(noise), 1e-5).certified_upper() <= 3.0


@pytest.mark.parametrize(("epsilon", "message"), [(0.0, "positive"), (float("inf"), "finite"), (1e-9, "above")])
def test_impossible_targets_are_refused(epsilon, message):
    with pytest.raises(ValueError, match=message):
        accountants.calibrate_noise_multiplier(
            target_epsilon=epsilon, target_delta=1e-10, sampling_prob=1.0, num_steps=1000
        )


def test_an_epsilon_without_end_is_answered_in_few_steps(monkeypatch):
    """The least noise that is searched is enough; less is not tried, whose distributions are ever larger."""
    tried = []
    spent = calibration._Judge.spent

    def counted(judge, value):
        tried.append(value)
        return spent(judge, value)

    monkeypatch.setattr(calibration._Judge, "spent", counted)
    noise = accountants.calibrate_noise_multiplier(
        target_epsilon=1e9, target_delta=1e-5, sampling_prob=0.1, num_steps=4, accountant="tilted"
    )
    assert noise == calibration.SMALLEST_NOISE == min(tried)
    assert len(tried) <= 10
