"""What the cells of a study found: values read from their run directories, and intervals over seeds."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from privtrain.studies.recipe import Cell, Recipe

CONFIDENCE = 0.95

#: Fewer seeds than this give an interval that rests on normality alone; reports say so.
FEW_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t-interval.

    Attributes:
        values: one a seed.
        same_split: of a difference, whether at each seed both runs had the same held-in and held-out users, by
            ``split_commitment`` of their privacy statements; ``None`` if it is no difference, or a statement lacks it.
    """

    values: tuple[float, ...]
    same_split: bool | None = dataclasses.field(default=None, compare=False)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean; ``None`` for a single seed."""
        return self.interval_at(CONFIDENCE)

    def interval_at(self, confidence: float) -> tuple[float, float] | None:
        """Return the t-interval of the mean at a confidence; ``None`` for a single seed."""
        if self.n < 2:
            return None
        half = float(stats.t.ppf(0.5 + confidence / 2, self.n - 1) * np.std(self.values, ddof=1) / self.n**0.5)
        return self.mean - half, self.mean + half

    def text(self, digits: int = 3, factor: float = 1.0) -> str:
        """Return the estimate for a table: ``0.812 (0.801 to 0.823; n=5)``, its numbers multiplied by ``factor``."""
        if self.interval is None:
            return f"{factor * self.mean:.{digits}f} (n=1, no interval)"
        low, high = (factor * end for end in self.interval)
        return f"{factor * self.mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}; n={self.n})"

    def to_json(self) -> dict[str, Any]:
        """Return what the report holds of it."""
        return {"mean": self.mean, "interval": self.interval, "n": self.n, "values": list(self.values)}


@dataclasses.dataclass(frozen=True)
class CellResult:
    """A complete cell; several have the same run directory where their jobs are the same."""

    cell: Cell
    run: pathlib.Path

    @functools.cached_property
    def _metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Released metric → its (step, value) pairs, in order."""
        by_name: dict[str, list[tuple[int, float]]] = {}
        for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for name, value in row.items():
                if isinstance(value, int | float):
                    by_name.setdefault(name, []).append((row["train/step"], value))
        return by_name

    def metric(self, name: str) -> float:
        """Return the last value of a released metric.

        Raises:
            KeyError: if the run released none.
        """
        _, value = self._metrics[name][-1]
        return value

    def first(self, name: str) -> float:
        """Return the first value of a released metric."""
        _, value = self._metrics[name][0]
        return value

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a released metric."""
        return self._metrics[name]

    @functools.cached_property
    def split_commitment(self) -> str | None:
        """What the run committed to before training: equal for runs of equal seed, users and canaries."""
        path = self.run / "privacy.json"
        if not path.exists():
            return None
        return json.loads(path.read_text(encoding="utf-8")).get("split_commitment")

    def json(self, path: str) -> Any:
        """Return a JSON file of the run directory, e.g. ``privacy.json`` or ``report/attacks.json``."""
        return json.loads((self.run / path).read_text(encoding="utf-8"))


#: What to measure of a cell: the name of a metric, or a function.
Measure = str | Callable[[CellResult], float]


class Results:
    """Everything that is complete.

    Attributes:
        recipe: the study's.
        cells: the complete cells, in the order of the grid.
        planned: all cells of the grid.
    """

    def __init__(self, recipe: Recipe, cells: Sequence[CellResult], planned: Sequence[Cell]) -> None:
        self.recipe = recipe
        self.cells = tuple(cells)
        self.planned = tuple(planned)

    def where(self, **values: str) -> list[CellResult]:
        """Complete cells of these axis values, in the order of the grid."""
        return [r for r in self.cells if all(r.cell.values[axis] == value for axis, value in values.items())]

    def values_of(self, axis: str) -> list[str]:
        """Return the values of an axis that the grid has, in its order."""
        return list(dict.fromkeys(cell.values[axis] for cell in self.planned))

    def estimate(self, measure: Measure, **values: str) -> Estimate | None:
        """Return the mean over the seeds of these axis values; ``None`` if nothing of them is complete."""
        measured = [_measured(result, measure) for result in self.where(**values)]
        return Estimate(tuple(measured)) if measured else None

    def difference(self, measure: Measure, first: Mapping[str, str], second: Mapping[str, str]) -> Estimate | None:
        """Return the mean of first minus second, paired by seed; ``None`` if no seed has both.

        Args:
            measure: what to measure of a cell.
            first: axis → value of the first cells.
            second: axis → value of the cells to subtract.
        """
        pairs = self.by_seed(first, second)
        if not pairs:
            return None
        values = tuple(_measured(one, measure) - _measured(other, measure) for one, other in pairs)
        return Estimate(values, same_split=have_same_split(pairs))

    def by_seed(self, *sides: Mapping[str, str]) -> list[tuple[CellResult, ...]]:
        """Return for each seed the results of all sides, in their order; seeds that a side lacks are left out.

        Args:
            sides: axis → value of the cells of each side.
        """
        of_sides = [{result.cell.seed: result for result in self.where(**side)} for side in sides]
        first, *others = of_sides
        common_seeds = [seed for seed in first if all(seed in other for other in others)]
        return [tuple(of_side[seed] for of_side in of_sides) for seed in common_seeds]


def have_same_split(groups: Sequence[Sequence[CellResult]]) -> bool | None:
    """Return whether the results of each group committed to the same split; ``None`` if one committed to none."""
    splits = [{result.split_commitment for result in group} for group in groups]
    if not all(all(distinct) for distinct in splits):
        return None
    return all(len(distinct) == 1 for distinct in splits)


def noise_multiplier(result: CellResult) -> float:
    """Return the noise multiplier that a cell was trained with, by its statement: a measure."""
    return result.json("privacy.json")["mechanism"]["noise_multiplier"]


def minus(first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """Return the first minus second, paired by seed; ``None`` unless both are known for equally many seeds."""
    if first is None or second is None or first.n != second.n:
        return None
    values = tuple(a - b for a, b in zip(first.values, second.values, strict=True))
    if first.same_split is None or second.same_split is None:
        return Estimate(values)
    return Estimate(values, same_split=first.same_split and second.same_split)


def _measured(result: CellResult, measure: Measure) -> float:
    return result.metric(measure) if isinstance(measure, str) else measure(result)
