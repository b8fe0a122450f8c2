"""EZ-MIA: where the model errs, memorisation shows as gains over the base outweighing losses.

The paper's score is P / N with P the sum of positive and N of negative differences over the tokens that are not the
model's first choice. Its code gives 0, the least member-like value, where there is no error or no loss, that is to the
best memorised records. Here the score is P / (P + N), which orders records as P / N does and is 1 in both cases.
"""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return gains / (gains + losses) over the tokens that the model gets wrong; 1 where it gets none wrong.

    A gain is how much likelier fine-tuning made a token, in nats, a loss how much less likely.
    """
    assert row.target_correct is not None
    if row.target_correct.all():
        return 1.0
    change = (row.target_logp.astype(np.float64) - row.base_logp.astype(np.float64))[~row.target_correct]
    gains, losses = change[change > 0.0].sum(), -change[change < 0.0].sum()
    return float(gains / (gains + losses)) if gains + losses > 0.0 else 0.5  # nothing changed: neither way


ATTACK = DocumentAttack(
    "ez_mia",
    "gains / (gains + losses) of log p_target - log p_base over wrongly predicted tokens (EZ-MIA, 2026)",
    score,
    needs=("target_correct",),
)
