"""The noise multiplier that each accountant asks for, and the ε that a noise multiplier really spends.

Both are cached on disk, because some accountants take long.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable

import accountants
from accountants.answer import Direction
from accountants.calibration import DECIMALS
from accountants.methods.edgeworth import Aea1Accountant, Aea2Accountant, Aea3Accountant
from accountants.methods.prv import PrvAccountant
from accountants.methods.tilted import TiltedAccountant
from accountants.numerics.roots import bracketed_root
from accountants.protocol import Accountant
from accountants.registry import get_accountant
from privtrain.files.atomic import write_json
from privtrain.files.cache import cache_directory

#: Accountants whose answer is an estimate, which bounds nothing; for removing a record alone, as in EW-Tune's code.
ESTIMATES = {"aea1": Aea1Accountant, "aea2": Aea2Accountant, "aea3": Aea3Accountant}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run of DP-SGD under Poisson sampling, and the ε that is asked for it, for adding or removing one record."""

    sampling_prob: float
    num_steps: int
    delta: float
    epsilon: float

    def spent(self, name: str, noise_multiplier: float) -> float:
        """Return the ε of a noise multiplier by the accountant ``name``: a certified upper bound, or its estimate."""
        event = accountants.dp_sgd_event(
            noise_multiplier=noise_multiplier, sampling_prob=self.sampling_prob, num_steps=self.num_steps
        )
        answer = _accountant(name).epsilon(event, self.delta)
        return answer.estimate if name in ESTIMATES else answer.upper

    def true_epsilon(self, noise_multiplier: float) -> float:
        """Return the least certified ε that we can give: tilted's upper end, within about 1e-4 of its lower end."""
        return _true_epsilon(self, noise_multiplier)

    def noise(self, name: str) -> float:
        """Return the noise multiplier at which the accountant ``name`` says that ``epsilon`` is met; four decimals."""
        return _noise(self, name)


def _accountant(name: str) -> Accountant:
    """Return the accountant of a name; ``prv-0.1`` is PRV with an error of 0.1 in ε, as EW-Tune's code allowed."""
    if name in ESTIMATES:
        return ESTIMATES[name](Direction.REMOVE)
    if name.startswith("prv"):
        _, _, error = name.partition("-")
        return PrvAccountant(eps_error=float(error or 0.01))
    if name == "tilted":
        return TiltedAccountant(tolerance=1e-4)  # the studies quote four digits
    return get_accountant(name)


@functools.cache
def _true_epsilon(setting: Setting, noise_multiplier: float) -> float:
    """Return :meth:`Setting.true_epsilon`, from the cache on disk if it is there."""
    return _stored(setting, {"epsilon_of": noise_multiplier}, lambda: setting.spent("tilted", noise_multiplier))


@functools.cache
def _noise(setting: Setting, name: str) -> float:
    """Return :meth:`Setting.noise`, from the cache on disk if it is there."""
    return _stored(setting, {"noise_by": name}, lambda: _calibrated(setting, name))


def _stored(setting: Setting, question: dict[str, float | str], compute: Callable[[], float]) -> float:
    """Return the answer to a question about a setting from the cache on disk; compute and store what is not there."""
    facts = {**dataclasses.asdict(setting), **question}
    key = hashlib.sha256(json.dumps([facts, _code_version()], sort_keys=True).encode()).hexdigest()
    cache = cache_directory() / "noise"
    path = cache / f"{key[:32]}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    value = compute()
    cache.mkdir(parents=True, exist_ok=True)
    write_json(path, {**facts, "value": value})
    return value


def _code_version() -> str:
    """Return a digest of the accountants' code: another version's numbers are not ours."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(accountants.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _calibrated(setting: Setting, name: str) -> float:
    """Return the noise at which an accountant says that ``epsilon`` is met, rounded up to ``DECIMALS``.

    Raised further, step by step, until the accountant certifies it; estimates certify nothing.
    """
    # Tilted's noise is near that of every other accountant.
    guess = 1.0 if name == "tilted" else setting.noise("tilted")
    # Less 1e-3 of a step, so that a root which is a whole step but for the root finder's error is not rounded up.
    value = math.ceil(_root(setting, name, guess) * 10**DECIMALS - 1e-3) / 10**DECIMALS
    while name not in ESTIMATES and setting.spent(name, value) > setting.epsilon:
        value = round(value + 10**-DECIMALS, DECIMALS)
    return value


def _root(setting: Setting, name: str, guess: float) -> float:
    """Return the noise at which the accountant's ε is the one asked for; near a good guess few evaluations find it."""

    @functools.cache
    def excess(noise: float) -> float:
        """Return ε above the one asked for; it falls with the noise."""
        return setting.spent(name, noise) - setting.epsilon

    # Widen an interval around the guess until the root is in it.
    low, high, ratio = guess, guess, 1.01
    while excess(high) > 0:
        low, high, ratio = high, high * ratio, ratio**2
    while excess(low) <= 0:
        low, high, ratio = low / ratio, low, ratio**2
    return bracketed_root(excess, low, high, xtol=2e-5)
