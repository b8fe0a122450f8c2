"""User-level DP by example sampling and by user sampling, at equal (ε, δ) for a user.

* ``group``: Group Privacy (Chua et al. 2024). Records are sampled; a user has at most k; ε of a record is converted.
* ``mixture``: the same training, accounted for exactly (ELS of Charles et al. 2024, mixture of Gaussians).
* ``user``: User-wise DP-SGD (Chua et al.), which is ULS of Charles et al.: users are sampled, each with at most k
  records, and clipped once.

Axes of the grid: ``method`` (these three), ``k`` (most records of a user), ``epsilon`` (for a user), ``selection``
(which k records of a user are kept: ``random`` but for a few cells), and maybe model and data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privtrain.studies.figures import AxisLabels, Level, Series, curves_figure, places_figure
from privtrain.studies.findings import (
    Claim,
    Figure,
    Findings,
    Statement,
    Table,
    judge_best,
    judge_direction,
    judge_fact,
)
from privtrain.studies.results import Estimate, Results, minus, noise_multiplier

TITLE = "User-level DP: group privacy against sampling users"
PAPER = (
    "Chua et al. 2024, Mind the Privacy Unit, arXiv 2406.14322; Charles et al. 2024, Fine-Tuning LLMs with User-Level "
    "DP, arXiv 2407.07737"
)

_PERPLEXITY = "eval/held_out_perplexity"
NAMES = {"group": "Group Privacy", "mixture": "ELS, mixture accounting", "user": "User-wise DP-SGD (ULS)"}


def settle(values: Mapping[str, str], tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the overrides of a cell: the expected batch size and, where records are sampled, unit and accounting.

    The expected batch size is the sampling probability times the number of sampled units. That number is a public
    constant of the recipe, on which no guarantee depends.

    Args:
        values: axis → value of the cell.
        tree: the cell's configuration, with the sampling probability.
        settings: of the recipe. ``populations``: value of the axis ``data`` (or ``here``) → ``num_users`` held in, and
            ``num_records``: k → their records, at most k of each.
    """
    population = settings["populations"][values.get("data", "here")]
    sampling_prob = tree["privacy"]["sampling_prob"]
    num_units = population["num_users"] if values["method"] == "user" else population["num_records"][values["k"]]
    overrides: dict[str, Any] = {"privacy.expected_batch_size": float(f"{sampling_prob * num_units:.3g}")}
    if values["method"] != "user":
        overrides |= {"privacy.unit": "example", "privacy.user_accounting": values["method"]}
    return overrides


def find(results: Results) -> Findings:
    """Judge the papers' claims by what is complete, for each data set and model of the grid."""
    views = [_View(results, values) for values in _other_values(results)]
    return Findings(
        claims=[claim for view in views for claim in view.claims()],
        tables=[view.table() for view in views],
        figures=[figure for view in views for figure in view.figures()],
        notes=_notes(results),
        numbers={view.name: view.numbers() for view in views},
    )


class _View:
    """The cells of one model and data set, and what is compared between them.

    Arguments ``method``, ``k``, ``epsilon`` and ``selection`` of its methods are values of the axes, as texts.

    Args:
        results: everything that is complete.
        values: axis → value for the other axes, such as model and data set; maybe none.

    Attributes:
        name: of model and data set, as a key; "here" if the grid has one of each.
        words: of model and data set, for the end of a title.
        selection_k, selection_epsilon: of the cells that compare selections; empty if there are none.
    """

    def __init__(self, results: Results, values: Mapping[str, str]) -> None:
        self.results, self.values = results, values
        self.name = ", ".join(values.values()) or "here"
        self.words = f" on {self.name}" if values else ""
        self.methods, self.ks = results.values_of("method"), results.values_of("k")
        self.epsilons, self.selections = results.values_of("epsilon"), results.values_of("selection")
        # The cells that compare selections have one k and one ε: any of them tells both.
        comparing = [cell.values for cell in results.planned if cell.values["selection"] != "random"]
        self.selection_k = comparing[0]["k"] if comparing else ""
        self.selection_epsilon = comparing[0]["epsilon"] if comparing else ""

    def cell(self, method: str, k: str, epsilon: str, selection: str = "random") -> dict[str, str]:
        """Return the axis values of one cell."""
        return {**self.values, "method": method, "k": k, "epsilon": epsilon, "selection": selection}

    def perplexity(self, method: str, k: str, epsilon: str, selection: str = "random") -> Estimate | None:
        """Return the held-out perplexity of a cell over seeds."""
        return self.results.estimate(_PERPLEXITY, **self.cell(method, k, epsilon, selection))

    def best_k(self, method: str, epsilon: str) -> str | None:
        """Return the k of a method's least mean perplexity; ``None`` unless the cells of all its k are complete.

        It is chosen on the held-out users that perplexity is reported on, for every method alike.
        """
        planned = self.planned("k", method=method, epsilon=epsilon, selection="random")
        if not all(self.is_complete(method, k, epsilon) for k in planned):
            return None
        estimates = {k: self.perplexity(method, k, epsilon) for k in planned}
        means = {k: estimate.mean for k, estimate in estimates.items() if estimate is not None}
        return min(means, key=means.__getitem__) if means else None

    def planned(self, axis: str, **values: str) -> list[str]:
        """Return the values of an axis that the grid has in combination with these values of other axes."""
        wanted = {**self.values, **values}.items()
        cells = [cell for cell in self.results.planned if wanted <= cell.values.items()]
        return list(dict.fromkeys(cell.values[axis] for cell in cells))  # each once, in the order of the grid

    def is_complete(self, method: str, k: str, epsilon: str, selection: str = "random") -> bool:
        """Return whether every seed of a cell is there."""
        estimate = self.perplexity(method, k, epsilon, selection)
        return estimate is not None and estimate.n == len(self.results.recipe.seeds)

    def best(self, method: str, epsilon: str) -> Estimate | None:
        """Return a method's perplexity at its best k."""
        k = self.best_k(method, epsilon)
        return None if k is None else self.perplexity(method, k, epsilon)

    def gap(self, first: str, second: str, epsilon: str) -> Estimate | None:
        """Return the perplexity of the first method minus that of the second, each at its best k, paired by seed."""
        k_first, k_second = self.best_k(first, epsilon), self.best_k(second, epsilon)
        if k_first is None or k_second is None:
            return None
        return self.results.difference(
            _PERPLEXITY, self.cell(first, k_first, epsilon), self.cell(second, k_second, epsilon)
        )

    def noise(self, method: str, k: str, epsilon: str) -> float | None:
        """Return the noise multiplier of a cell's complete runs; ``None`` if there are none."""
        estimate = self.results.estimate(noise_multiplier, **self.cell(method, k, epsilon))
        return None if estimate is None else estimate.mean

    def claims(self) -> list[Claim]:
        """Return the papers' claims, judged."""
        chua, charles = "Chua et al. 2024", "Charles et al. 2024"
        smallest, largest, few, many = self.epsilons[0], self.epsilons[-1], self.ks[0], self.ks[-1]
        # (claim, citation, the paper's result, difference in perplexity that is positive if the claim holds)
        judged: list[tuple[str, str, str, Estimate | None]] = [
            (
                f"User-wise DP-SGD has lower perplexity than Group Privacy at ε = {epsilon}",
                f"{chua}, main finding",
                "lower at every ε",
                self.gap("group", "user", epsilon),
            )
            for epsilon in self.epsilons
        ]
        judged += [
            (
                f"its lead is larger at ε = {smallest} than at {largest}",
                chua,
                "most at small ε",
                minus(self.gap("group", "user", smallest), self.gap("group", "user", largest)),
            ),
            (
                f"Group Privacy loses by many records a user (k = {many} against {few}, ε = {smallest})",
                chua,
                "prefers small k",
                self._between("group", (many, smallest), (few, smallest)),
            ),
            (
                f"User-wise DP-SGD gains by k > 1 (k = {many} against {few}, ε = {largest})",
                chua,
                "gains, then flat",
                self._between("user", (few, largest), (many, largest)),
            ),
            (
                f"sampling users beats sampling examples at strong privacy, ε = {smallest}",
                charles,
                "ULS better",
                self.gap("mixture", "user", smallest),
            ),
        ]
        claims = [
            judge_direction(Statement(f"{statement}{self.words}", citation, paper), difference)
            for statement, citation, paper, difference in judged
        ]
        return [*claims, self._accounting(charles), *(self._selection_claims(chua) if self.selection_k else [])]

    def _between(self, method: str, first: tuple[str, str], second: tuple[str, str]) -> Estimate | None:
        """Return a method's perplexity at the first (k, epsilon) minus that at the second, paired by seed."""
        return self.results.difference(_PERPLEXITY, self.cell(method, *first), self.cell(method, *second))

    def _accounting(self, charles: str) -> Claim:
        """Judge the claim that mixture accounting asks for less noise than group privacy; ``charles``: the citation."""
        ratios: dict[tuple[str, str], float] = {}  # (k, ε) → noise by mixture over noise by group, where both are known
        for k in self.ks:
            for epsilon in self.epsilons:
                mixture, group = self.noise("mixture", k, epsilon), self.noise("group", k, epsilon)
                if mixture is not None and group is not None:
                    ratios[k, epsilon] = mixture / group
        claim = Statement(
            f"mixture accounting asks for less noise than group privacy at equal k and ε{self.words}",
            charles,
            "far below group privacy",
        )
        reason = f"noise multipliers of {len(ratios)} pairs of complete cells"
        if not ratios:
            return judge_fact(claim, None, ours="no pair is complete", reason=reason)
        k, epsilon = min(ratios, key=ratios.__getitem__)
        ours = f"down to {ratios[k, epsilon]:.3f} of it (k = {k}, ε = {epsilon})"
        return judge_fact(claim, max(ratios.values()) < 1, ours=ours, reason=reason)

    def _selection_claims(self, chua: str) -> list[Claim]:
        """Judge for two methods which selection of a user's records is the best; ``chua``: the citation."""
        claims = []
        for method, best in (("group", "longest"), ("user", "random_chunk")):
            k, epsilon = self.selection_k, self.selection_epsilon
            planned = self.planned("selection", method=method, k=k, epsilon=epsilon)
            leads: dict[str, Estimate] = {}  # other selection → its perplexity minus that of the claimed best
            # The best of a part is not the best: nothing is judged unless all selections are complete.
            if all(self.is_complete(method, k, epsilon, selection) for selection in planned):
                claimed = self.cell(method, k, epsilon, best)
                for other in planned:
                    lead = self.results.difference(_PERPLEXITY, self.cell(method, k, epsilon, other), claimed)
                    if other != best and lead is not None:
                        leads[other.replace("_", " ")] = lead
            words = f"{best.replace('_', ' ')} is the best selection for {NAMES[method]}{self.words}"
            claims.append(judge_best(Statement(words, f"{chua}, data selection", "best of six"), leads))
        return claims

    def table(self) -> Table:
        """Return a table of perplexity and noise: a row for each method and k, a column for each ε."""
        rows = []
        for method in self.methods:
            for k in self.ks:
                entries = {epsilon: self._entry(method, k, epsilon) for epsilon in self.epsilons}
                if any(entries.values()):
                    texts = [entry or self._absence(method, k, epsilon) for epsilon, entry in entries.items()]
                    rows.append([f"{NAMES[method]}, k = {k}", *texts])
        columns = ("method", *(f"ε = {epsilon}" for epsilon in self.epsilons))
        note = "Held-out perplexity (95 % t-interval over seeds) and noise multiplier σ; ε is for a user, at equal δ."
        base = self.base()
        if base is not None:
            note += f" Before training: {base.mean:.2f}."
        return Table(f"Held-out perplexity{self.words}", columns, rows, note)

    def _entry(self, method: str, k: str, epsilon: str) -> str:
        estimate, noise = self.perplexity(method, k, epsilon), self.noise(method, k, epsilon)
        return "" if estimate is None else f"{estimate.text(2)}, σ {noise:.3g}"

    def _absence(self, method: str, k: str, epsilon: str) -> str:
        """Return in words why a cell has no result."""
        is_planned = epsilon in self.planned("epsilon", method=method, k=k, selection="random")
        return "not complete" if is_planned else "not in the grid"

    def base(self) -> Estimate | None:
        """Return perplexity before training."""
        return self.results.estimate(lambda result: result.first(_PERPLEXITY), **self.values)

    def figures(self) -> list[Figure]:
        """Return figures of perplexity against ε, against k, and by selection, and of noise against k.

        Only those with points. Against k they are at the ε of the cells that compare selections, else at the smallest.
        """
        slug = "".join(f"-{value}" for value in self.values.values())
        base = self.base()
        levels = [] if base is None else [Level("before training", base.mean)]
        epsilon = self.selection_epsilon or self.epsilons[0]
        at_epsilon = f"at ε = {epsilon}"
        by_epsilon, by_k, noise = [], [], []
        for method in self.methods:
            bests = [(float(each), self.best(method, each)) for each in self.epsilons]
            perplexities = [(float(k), self.perplexity(method, k, epsilon)) for k in self.ks]
            noises = [(float(k), self.noise(method, k, epsilon)) for k in self.ks]
            by_epsilon.append(Series.through(NAMES[method], bests))
            by_k.append(Series.through(NAMES[method], perplexities))
            noise.append(Series.through(NAMES[method], noises))
        against_epsilon = self._curves(
            f"epsilon{slug}",
            "held-out perplexity against ε",
            by_epsilon,
            AxisLabels("ε for a user", "held-out perplexity", "log"),
            levels,
            "Each method at its best k. 95 % t-intervals over seeds.",
        )
        against_k = self._curves(
            f"k{slug}",
            f"held-out perplexity against k {at_epsilon}",
            by_k,
            AxisLabels("records a user, k", "held-out perplexity", "log"),
            levels,
            f"{at_epsilon} for a user.",
        )
        noise_against_k = self._curves(
            f"noise{slug}",
            f"noise multiplier against k {at_epsilon}",
            noise,
            AxisLabels("records a user, k", "noise multiplier σ", "log", "log"),
            [],
            f"What it costs {at_epsilon}.",
        )
        figures = [figure for figure in (against_epsilon, against_k, noise_against_k) if figure is not None]
        return [*figures, *self._selection_figure(slug)]

    def _curves(
        self,
        name: str,
        title: str,
        series: Sequence[Series],
        labels: AxisLabels,
        levels: Sequence[Level],
        caption: str,
    ) -> Figure | None:
        """Return a figure of the series that have points; ``None`` if none has. Arguments: :func:`curves_figure`."""
        kept = [one for one in series if one.x]
        if not kept:
            return None
        return Figure(name, title + self.words, curves_figure(name, kept, labels, levels), caption)

    def _selection_figure(self, slug: str) -> list[Figure]:
        """Return the figure of perplexity by selection, or nothing; ``slug`` ends its name."""
        if not self.selection_k:
            return []
        series = []
        for method in ("group", "user"):
            points = [
                (place, self.perplexity(method, self.selection_k, self.selection_epsilon, selection))
                for place, selection in enumerate(self.selections)
            ]
            series.append(Series.through(NAMES[method], points))
        kept = [one for one in series if one.x]
        if not kept:
            return []
        places = [selection.replace("_", " ") for selection in self.selections]
        labels = AxisLabels("selection of a user's records", "held-out perplexity")
        caption = f"k = {self.selection_k}, ε = {self.selection_epsilon} for a user."
        name = f"selection{slug}"
        return [Figure(name, "perplexity by selection", places_figure(name, places, kept, labels), caption)]

    def numbers(self) -> list[dict[str, Any]]:
        """Return the axis values, perplexity and noise of every complete cell, for JSON."""
        rows = []
        own = [cell.values for cell in self.results.planned if self.values.items() <= cell.values.items()]
        for items in dict.fromkeys(tuple(values.items()) for values in own):  # each once: seeds share their values
            values = dict(items)
            estimate = self.results.estimate(_PERPLEXITY, **values)
            if estimate is not None:
                noise = self.results.estimate(noise_multiplier, **values)
                multiplier = None if noise is None else noise.mean
                rows.append({**values, "perplexity": estimate.to_json(), "noise_multiplier": multiplier})
        return rows


def _other_values(results: Results) -> list[dict[str, str]]:
    """Return every combination of the axes other than method, k, epsilon and selection; one empty without others."""
    known = ("method", "k", "epsilon", "selection")
    distinct: set[tuple[tuple[str, str], ...]] = set()
    for cell in results.planned:
        others = [(axis, value) for axis, value in cell.values.items() if axis not in known]
        distinct.add(tuple(others))
    return [dict(values) for values in sorted(distinct)]


def _notes(results: Results) -> list[str]:
    return [
        "The papers' claims are judged by direction; their tables of perplexities are for other models and data, and "
        "are not repeated here.",
        "Sampling probability and steps are the same for all methods, so a step has the same number of records in "
        "expectation, and methods differ in noise and in how gradients are clipped.",
        "ε and δ are for adding or removing one user with all records. Group Privacy converts ε and δ of a record; "
        "mixture accounting is exact for the same training.",
        "A selection may use the user's own records and the public base model, and nothing of other users: then adding "
        "a user changes nobody else's records, and it costs no ε. Ranking a user's records by the base model's "
        "perplexity is allowed for that reason; by the tuned model's, or by frequency over all users, it is not.",
        "The best k is chosen on the same held-out users that perplexity is reported on, for every method alike; this "
        "choice is not covered by ε.",
        f"Seeds ({len(results.recipe.seeds)}) fix split, sample and noise, so differences are paired, and the runs "
        "themselves are not private.",
        *results.recipe.settings.get("notes", []),
    ]
