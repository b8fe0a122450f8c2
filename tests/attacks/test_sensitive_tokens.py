"""The panel of sensitive and other tokens against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attacks.analysis import sensitive as sensitive_tokens
from attacks.analysis.sensitive import SensitivePanel
from attacks.signals import FRESH, HELD_IN, HELD_OUT, TRAINING, DocumentSignals


def panel_of(memorised: float, num: int = 30, seed: int = 0, learned: float = 0.3):
    """Tuning gains ``learned`` everywhere and ``memorised`` more on the sensitive tokens of what was trained on."""
    rng = np.random.default_rng(seed)
    panel = SensitivePanel()
    for side, kind in ((HELD_IN, TRAINING), (HELD_IN, FRESH), (HELD_OUT, TRAINING), (HELD_OUT, FRESH)):
        for user in range(num):
            size = int(rng.integers(20, 40))
            sensitive = rng.random(size) < 0.3
            base = -4.0 - rng.random(size)
            gain = learned + rng.normal(0, 0.05, size) + memorised * sensitive * (side == HELD_IN and kind == TRAINING)
            row = DocumentSignals(f"{side}-{user}", kind, side, base + gain, base, kind=kind, sensitive=sensitive)
            panel.watch(row)
    return panel


def test_having_learned_the_domain_is_not_memorisation():
    misses = 0
    for seed in range(15):
        found = panel_of(0.0, seed=seed).facts()["difference_in_differences"]["sensitive"]
        misses += not found["interval"][0] <= 0.0 <= found["interval"][1]
        assert abs(found["value"]) < 0.03
    assert misses <= scipy.stats.binom.ppf(0.9995, 15, 0.05)


def test_sensitive_tokens_give_difference_in_differences():
    facts = panel_of(1.0).facts()
    found = facts["difference_in_differences"]
    assert found["sensitive"]["value"] == pytest.approx(1.0, abs=0.05)
    assert found["excess_on_sensitive"]["interval"][0] > 0.9
    assert abs(found["other"]["value"]) < 0.05
    cells = {(cell["tokens"], cell["split"], cell["model"]): cell for cell in facts["cells"]}
    assert len(cells) == 8
    assert cells["sensitive", "test", "base"]["nll"] == pytest.approx(4.5, abs=0.1)
    assert cells["sensitive", "train", "tuned"]["nll"] == pytest.approx(4.5 - 1.3, abs=0.1)
    assert cells["sensitive", "train", "tuned"]["p10"] < cells["sensitive", "train", "tuned"]["nll"]


def test_micro_averages_by_hand():
    panel = SensitivePanel()
    for side in (HELD_IN, HELD_OUT):
        for user, (target, sensitive) in enumerate((([-1.0, -2.0], [True, False]), ([-3.0, -5.0], [True, True]))):
            row = DocumentSignals(
                f"{side}{user}", "0", side, target, [-6.0, -6.0], kind=TRAINING, sensitive=np.array(sensitive)
            )
            panel.watch(row)
    cells = {(c["tokens"], c["split"], c["model"]): c for c in panel.facts()["cells"]}
    assert cells["sensitive", "train", "tuned"]["nll"] == pytest.approx((1 + 3 + 5) / 3)
    assert cells["other", "test", "tuned"]["nll"] == pytest.approx(2.0)
    assert cells["sensitive", "train", "tuned"]["num_tokens"] == 3


def test_without_labels_there_is_no_panel():
    assert SensitivePanel().facts() is None


def users_without_memory(rng, num, kind):
    """[users, tokens, sums] of users who differ in what tuning gained on their texts, whoever was trained on."""
    counts = np.stack([rng.poisson(3, num) * (rng.random(num) < 0.7), rng.integers(20, 60, num)], axis=1).astype(float)
    if kind == "one owns most":
        counts[0, 0] += 200
    gains = rng.normal(0, 0.1, (num, 1)) + (rng.random((num, 1)) < 0.1) * (kind == "rare")
    noise = rng.normal(size=counts.shape) * 0.3 * np.sqrt(counts)
    return np.stack([counts, 4 * counts - gains * counts - noise, 4 * counts], axis=-1)


def null_misses(sizes, num_samples, kind, differences=sensitive_tokens._differences):
    """How often each end of each difference is on the wrong side of 0, at most."""
    misses = np.zeros((3, 2), dtype=int)
    for seed in range(num_samples):
        rng = np.random.default_rng((*sizes, seed))
        sides = [users_without_memory(rng, size, kind) for size in sizes]
        found = differences(*sides)["difference_in_differences"]
        for number, name in enumerate(("sensitive", "other", "excess_on_sensitive")):
            if name in found:
                lower, upper = found[name]["interval"]
                misses[number] += [lower > 0.0, upper < 0.0]
    return int(misses.max())


def percentile_bootstrap(train, test):
    """The planted mutant: resamples of few users know nothing of users that the sample lacks."""
    rng = np.random.default_rng(0)
    drawn = [[side[rng.integers(0, len(side), len(side))].sum(axis=0) for side in (train, test)] for _ in range(200)]
    ends = np.nanquantile([sensitive_tokens._gaps(*sums) for sums in drawn], [0.025, 0.975], axis=0)
    names = ("sensitive", "other", "excess_on_sensitive")
    return {"difference_in_differences": {name: {"interval": ends[:, i]} for i, name in enumerate(names)}}


def test_differences_of_few_users_keep_the_level_short():
    bound = scipy.stats.binom.ppf(0.999, 100, 0.025)
    for sizes, kind in (((5, 5), "alike"), ((20, 5), "one owns most"), ((60, 60), "one owns most")):
        assert null_misses(sizes, 100, kind) <= bound, (sizes, kind)
    assert null_misses((5, 5), 100, "alike", percentile_bootstrap) > bound


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["alike", "rare", "one owns most"])
@pytest.mark.parametrize("sizes", [(5, 5), (20, 5), (5, 20), (20, 20), (60, 60), (300, 20)], ids=str)
def test_differences_keep_the_level(sizes, kind):
    misses = null_misses(sizes, 1000, kind)
    print(f"sensitive tokens, {sizes[0]}+{sizes[1]}, {kind}: an end on the wrong side of 0 in at most {misses / 1000}")
    assert misses <= scipy.stats.binom.ppf(0.9995, 1000, 0.025)


def test_tokens_of_a_kind_that_nobody_has_have_no_difference():
    panel = SensitivePanel()
    for side in (HELD_IN, HELD_OUT):
        for user in "ab":
            logp = np.full(4, -1.0)
            panel.watch(DocumentSignals(side + user, "0", side, logp, logp, kind=TRAINING, sensitive=np.full(4, True)))
    assert list(panel.facts()["difference_in_differences"]) == ["sensitive"]
