"""The panel of sensitive and other tokens against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

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
        found = panel_of(0.0, seed=seed).facts(seed=0)["difference_in_differences"]["sensitive"]
        misses += not found["interval"][0] <= 0.0 <= found["interval"][1]
        assert abs(found["value"]) < 0.03
    assert misses <= scipy.stats.binom.ppf(0.9995, 15, 0.05)


def test_sensitive_tokens_give_difference_in_differences():
    facts = panel_of(1.0).facts(seed=0)
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
    cells = {(c["tokens"], c["split"], c["model"]): c for c in panel.facts(seed=0)["cells"]}
    assert cells["sensitive", "train", "tuned"]["nll"] == pytest.approx((1 + 3 + 5) / 3)
    assert cells["other", "test", "tuned"]["nll"] == pytest.approx(2.0)
    assert cells["sensitive", "train", "tuned"]["num_tokens"] == 3


def test_without_labels_there_is_no_panel():
    assert SensitivePanel().facts(seed=0) is None
