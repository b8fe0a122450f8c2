"""That what is analysed is what was sealed: the sides in the signals against the manifest, which the run commits to."""

from __future__ import annotations

import pyarrow.parquet as pq

from attacks.canaries import POOL
from attacks.documents import attack_pseudonym, read_manifest, sides_of
from attacks.errors import AttackInputError
from attacks.signals import HELD_OUT, SIGNALS_PATH
from privtrain.rundir import RunDirectory


def check_sides(run: RunDirectory) -> None:
    """See that the signals of a run put everybody on the side that its sealed coins say.

    Raises:
        AttackInputError: if the coins were replaced, or the signals are of other coins.
    """
    manifest, key = read_manifest(run), run.load_key("pseudonym")
    sides = {**sides_of(manifest, manifest), POOL: HELD_OUT}
    sealed = {(attack_pseudonym(key, user), side) for user, side in sides.items()}
    found = pq.read_table(run.root / SIGNALS_PATH, columns=["user", "side"])
    names, sides = (found[name].to_pylist() for name in ("user", "side"))
    if not set(zip(names, sides, strict=True)) <= sealed:
        raise AttackInputError(
            f"{run.root / SIGNALS_PATH} has users on other sides than {run.manifest}: it was altered or belongs to "
            f"other coins; delete it and run next: attacks score {run.root}"
        )
