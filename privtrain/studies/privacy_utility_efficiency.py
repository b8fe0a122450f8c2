"""Privacy, utility and efficiency of full fine-tuning, LoRA, and both under user-level DP.

* Privacy: what tuning gained on *sensitive* tokens of training records beyond what it gained on those of held-out users
  (a difference in differences against the base, so that having learned the domain is not counted), exposure of planted
  canaries, membership of records and of users.
* Utility: loss on *other* tokens of held-out users.
* Efficiency: floating-point operations of a token, seconds, peak memory: counted and measured by the training job.

Measures read a finished cell: ``report/attacks.json`` of its attack job, or a metric of training. ``tuned`` is the
model after training, ``base`` the one before; ``train`` are training records, ``test`` those of held-out users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from privtrain.studies.figures import AxisLabels, Level, Series, curves_figure, places_figure
from privtrain.studies.findings import Claim, Figure, Findings, Statement, Table, judge_direction
from privtrain.studies.results import CellResult, Estimate, Results, minus

TITLE = "Privacy, utility and efficiency of fine-tuning"
PAPER = "Das et al. 2025, Privacy, Utility and Efficiency of Fine-Tuning LLMs, arXiv 2502.13313"

FLOPS, SECONDS, MEMORY = "perf/flops_per_token", "perf/step_seconds", "perf/peak_memory_bytes"


def _facts(result: CellResult) -> Any:
    """Return the report of the cell's attack job."""
    return result.json("report/attacks.json")


def nll(tokens: str, split: str, model: str) -> Callable[[CellResult], float]:
    """Return the measure of a loss in nats per token.

    Args:
        tokens: ``sensitive`` or ``other``.
        split: ``train`` or ``test``.
        model: ``tuned`` or ``base``.
    """

    def measure(result: CellResult) -> float:
        """Return that loss of a cell."""
        for row in _facts(result)["sensitive"]["cells"]:  # one for each combination of the three
            if (row["tokens"], row["split"], row["model"]) == (tokens, split, model):
                return row["nll"]
        raise KeyError(f"no loss of {tokens} tokens, {split}, {model} model")

    return measure


def fall(result: CellResult) -> float:
    """Return how far tuning lowered the loss on sensitive training tokens: by memorising, or by learning the domain."""
    return nll("sensitive", "train", "base")(result) - nll("sensitive", "train", "tuned")(result)


def leak(result: CellResult) -> float:
    """Return gain on sensitive tokens of training records less that on held-out ones, nats a token."""
    return _facts(result)["sensitive"]["difference_in_differences"]["sensitive"]["value"]


def excess(result: CellResult) -> float:
    """Return the leak on sensitive tokens less that on other tokens: what the paper says is overlooked."""
    return _facts(result)["sensitive"]["difference_in_differences"]["excess_on_sensitive"]["value"]


def user_auroc(result: CellResult) -> float:
    """Return the AUROC of user inference: of the attack that the report calls its headline."""
    facts = _facts(result)
    return facts["results"][facts["headline"]]["auroc"]


def record_auroc(result: CellResult) -> float:
    """Return the AUROC of membership of records by the ratio of likelihoods, tuned over base."""
    return _facts(result)["results"]["ratio_records"]["auroc"]


def exposure(result: CellResult) -> float:
    """Return the mean exposure of planted secrets above that of untrained ones, in bits.

    Of the secrets that stand in the most records (the highest tier).
    """
    row = max(_facts(result)["panels"]["canaries"]["rows"], key=lambda each: each["tier"])
    return row["exposure"] - row["exposure_expected"]


def seconds(result: CellResult) -> float:
    """Return the seconds of all steps."""
    return sum(value for _, value in result.series(SECONDS))


#: Name → (title with unit, measure or metric, factor for printing, digits for printing).
MEASURES: Mapping[str, tuple[str, str | Callable[[CellResult], float], float, int]] = {
    "leak": ("leak on sensitive tokens, nats", leak, 1.0, 3),
    "exposure": ("exposure above chance, bits", exposure, 1.0, 2),
    "records": ("membership AUROC of records", record_auroc, 1.0, 3),
    "users": ("user-inference AUROC", user_auroc, 1.0, 3),
    "utility": ("test loss, other tokens, nats", nll("other", "test", "tuned"), 1.0, 3),
    "flops": ("MFLOP a token", FLOPS, 1e-6, 3),
    "seconds": ("seconds of all steps", seconds, 1.0, 1),
    "memory": ("peak memory, MiB", MEMORY, 2.0**-20, 0),
}


def find(results: Results) -> Findings:
    """Judge the paper's claims by what is complete, for each model of the grid."""
    models: list[dict[str, str]] = [{}]
    if "model" in results.recipe.axes:
        models = [{"model": model} for model in results.values_of("model")]
    views = [_View(results, values) for values in models]
    return Findings(
        claims=[claim for view in views for claim in view.claims()],
        tables=[table for view in views for table in (view.costs(), view.losses())],
        figures=[figure for view in views for figure in view.figures()],
        notes=[
            "ε and δ of the DP rows are for one user, whose records are clipped jointly; the paper gives none for its "
            "own. Seeds are fixed, so that differences are paired, and the runs as such are not private.",
            "A token is sensitive if any of its characters lies in a slot that the generator filled from the "
            "customer's profile. Leak: gain in log-likelihood by tuning, train less test.",
            "A loss on sensitive tokens that falls on train and test alike is no leak: the base has not seen text of "
            "this kind, and DP lets it learn what a name or a street looks like. Leak and exposure tell the two apart.",
            "Operations are counted by torch on a planted microbatch in the job's own route, clipping included, also "
            "where nothing is clipped in the end: plain training would not compute norms of users.",
            *results.recipe.settings.get("notes", []),
        ],
        numbers={view.name: view.numbers() for view in views},
    )


class _View:
    """The cells of one model, with what is compared between training methods.

    Args:
        results: everything that is complete.
        values: ``model`` → its name; empty if the grid has one model.

    Attributes:
        name: the model's name, as a key; "here" if the grid has one model.
        words: names the model at the end of a claim or title.
        plain: training methods without DP: full fine-tuning, then LoRAs.
        private: methods under user-level DP: full fine-tuning first, a LoRA last.
    """

    def __init__(self, results: Results, values: Mapping[str, str]) -> None:
        self.results, self.values = results, dict(values)
        self.name = values.get("model", "here")
        self.words = f" ({self.name})" if values else ""
        self.plain: list[str] = results.recipe.settings["plain"]
        self.private: list[str] = results.recipe.settings["private"]

    def estimate(self, measure: str | Callable[[CellResult], float], method: str) -> Estimate | None:
        """Return the mean of a measure over a method's seeds; ``None`` if no seed is complete."""
        return self.results.estimate(measure, method=method, **self.values)

    def less(self, measure: str | Callable[[CellResult], float], first: str, second: str) -> Estimate | None:
        """Return a measure of the first method minus that of the second, paired by seed."""
        sides = ({**self.values, "method": method} for method in (first, second))
        return self.results.difference(measure, *sides)

    def claims(self) -> list[Claim]:
        """Judge the paper's claims, and some of ours about rows that the paper lacks."""
        full, *loras = self.plain
        dp_full, dp_lora = self.private[0], self.private[-1]
        lora = dp_lora.removeprefix("dp-")
        assert lora in loras, (lora, loras)
        # (claim, citation, the paper's result, difference that is positive if the claim holds)
        directed = [
            ("full fine-tuning leaks sensitive tokens of its training records", "finding", "poor privacy",
             self.estimate(leak, full)),
            ("a sensitive token is remembered more than another one", "definition of privacy",
             "measures over all tokens mislead", self.estimate(excess, full)),
            (f"{lora} leaks less than full fine-tuning", "finding", "LoRA almost like DP", self.less(leak, full, lora)),
            (f"{lora} leaks more than {dp_full}", "ours: is LoRA really like DP?", "almost DP-level privacy",
             self.less(leak, lora, dp_full)),
            (f"{dp_full} leaks less than full fine-tuning", "finding", "private", self.less(leak, full, dp_full)),
            (f"{dp_full} stays near the base: its loss on sensitive training tokens falls by less than half of "
             "what full fine-tuning's falls by", "DP rows of the tables", "near the base's",
             self._nearness(full, dp_full)),
            (f"{dp_lora} leaks less than {lora}", "a row that the paper lacks", "not run",
             self.less(leak, lora, dp_lora)),
            (f"{dp_full} costs utility", "finding", "DP costs utility",
             self.less(nll("other", "test", "tuned"), dp_full, full)),
            (f"{lora} needs fewer operations than full fine-tuning", "efficiency", "LoRA cheap",
             self.less(FLOPS, full, lora)),
        ]  # fmt: skip
        return [
            judge_direction(Statement(claim + self.words, citation, paper), difference)
            for claim, citation, paper, difference in directed
        ]

    def _nearness(self, method: str, private: str) -> Estimate | None:
        """Return half of ``method``'s fall in loss on sensitive training tokens, less the whole fall of ``private``.

        Positive if the loss of ``private`` falls by less than half as much, so that it stays near the base model's.
        """
        return minus(self.estimate(lambda result: fall(result) / 2, method), self.estimate(fall, private))

    def costs(self) -> Table:
        """Return a table with a row for each training method: its (ε, δ), and every one of ``MEASURES``."""
        rows = []
        for method in self._methods():
            row = [method, self._guarantee(method)]
            for _, measure, factor, digits in MEASURES.values():
                estimate = self.estimate(measure, method)
                row.append(estimate.text(digits, factor) if estimate else "")
            rows.append(row)
        columns = ("training", "(ε, δ)", *(title for title, *_ in MEASURES.values()))
        return Table(f"Privacy, utility, efficiency{self.words}", columns, rows, "95 % t-intervals over seeds.")

    def losses(self) -> Table:
        """Return the table of losses: {sensitive, other} × {train, test} × {base, tuned}."""
        kinds = [(tokens, split) for tokens in ("sensitive", "other") for split in ("train", "test")]
        methods = self._methods()
        rows = []
        if methods:  # the base model is the same for all of them
            rows.append(["base model", *self._loss_texts(kinds, "base", methods[0])])
        rows += [[method, *self._loss_texts(kinds, "tuned", method)] for method in methods]
        columns = ("model", *(f"{tokens}, {split}" for tokens, split in kinds))
        return Table(f"Loss in nats per token{self.words}", columns, rows)

    def _loss_texts(self, kinds: Sequence[tuple[str, str]], model: str, method: str) -> list[str]:
        """Return the losses of a model after a method's training, by (tokens, split); empty where not complete."""
        estimates = [self.estimate(nll(tokens, split, model), method) for tokens, split in kinds]
        return ["" if estimate is None else estimate.text() for estimate in estimates]

    def figures(self) -> list[Figure]:
        """Return two figures: loss of sensitive tokens on train and test by method, and leak against operations."""
        methods = self._methods()
        if not methods:
            return []
        figures = [self._losses_figure(methods), self._trade_figure(methods)]
        return [figure for figure in figures if figure is not None]

    def _slug(self) -> str:
        """Return the end of a figure's name, which tells the models' figures apart."""
        return "".join(f"-{value.replace('.', '-')}" for value in self.values.values())

    def _losses_figure(self, methods: Sequence[str]) -> Figure:
        """Draw the loss of sensitive tokens on train and test, by training method."""
        series = []
        for split in ("train", "test"):
            losses = [self.estimate(nll("sensitive", split, "tuned"), method) for method in methods]
            series.append(Series.through(f"sensitive tokens, {split}", enumerate(losses)))
        base = self.estimate(nll("sensitive", "test", "base"), methods[0])
        levels = [] if base is None else [Level("base model, test", base.mean)]
        name = f"losses{self._slug()}"
        svg = places_figure(name, methods, series, AxisLabels("", "loss, nats per token"), levels)
        return Figure(name, f"loss of sensitive tokens{self.words}", svg, "Train below test: memorised.")

    def _trade_figure(self, methods: Sequence[str]) -> Figure | None:
        """Draw leak against operations, a point a training method; ``None`` if no method has both."""
        points = []
        for method in methods:
            cost, value = self.estimate(FLOPS, method), self.estimate(leak, method)
            if cost is not None and value is not None:
                points.append(Series(method, [cost.mean * 1e-6], [value]))
        if not points:
            return None
        name = f"trade{self._slug()}"
        svg = curves_figure(name, points, AxisLabels("MFLOP a token", "leak on sensitive tokens, nats"))
        return Figure(name, f"privacy against cost{self.words}", svg, "Lower and left is better.")

    def numbers(self) -> dict[str, Any]:
        """Return everything in the tables, for machines."""
        by_method: dict[str, Any] = {}
        for method in self._methods():
            estimates = {key: self.estimate(measure, method) for key, (_, measure, _, _) in MEASURES.items()}
            by_method[method] = {key: one.to_json() for key, one in estimates.items() if one is not None}
        return by_method

    def _methods(self) -> list[str]:
        """Return the training methods with a complete cell, in the order of the grid."""
        return [m for m in self.results.values_of("method") if self.results.where(method=m, **self.values)]

    def _guarantee(self, method: str) -> str:
        """Return a method's ε and δ in words, by the privacy statement of its first cell."""
        statement = self.results.where(method=method, **self.values)[0].json("privacy.json")
        if statement["epsilon"] is None:
            return "none"
        return f"({statement['epsilon']:.3g}, {statement['delta']:g}) for a user"
