"""That what is analysed is what was sealed: the sides in the signals against the manifest, which the run commits to."""

from __future__ import annotations

import pyarrow.parquet as pq

from attacks.canaries import POOL
from attacks.documents import attack_pseudonym, read_manifest, sides_of
from attacks.errors import AttackInputError
from attacks.signals import HELD_OUT, SIGNALS_PATH, TRAINING
from privtrain.data.manifest import read_sealed
from privtrain.rundir import RunDirectory


def check_sides(run: RunDirectory) -> int:
    """See that the signals of a run put everybody on the side that its sealed coins say.

    Returns:
        How many of the scored training records of held-in users no step could draw, because selection left them out.

    Raises:
        AttackInputError: if the coins were replaced, or the signals are of other coins.
    """
    manifest, key = read_manifest(run), run.load_key("pseudonym")
    sides = {**sides_of(manifest, manifest), POOL: HELD_OUT}
    sealed = {(attack_pseudonym(key, user), side) for user, side in sides.items()}
    table = pq.read_table(run.root / SIGNALS_PATH, columns=["user", "document", "side", "kind"])
    names, documents, sides, kinds = (column.to_pylist() for column in table.columns)
    if not set(zip(names, sides, strict=True)) <= sealed:
        raise AttackInputError(
            f"{run.root / SIGNALS_PATH} has users on other sides than {run.manifest}: it was altered or belongs to "
            f"other coins; delete it and run next: attacks score {run.root}"
        )
    left_out = read_sealed(run.used)["left_out"] if run.used.is_file() else {}
    unused = {(attack_pseudonym(key, user), str(index)) for user, places in left_out.items() for index in places}
    rows = zip(names, documents, kinds, strict=True)
    return sum(kind == TRAINING and (name, document) in unused for name, document, kind in rows)
