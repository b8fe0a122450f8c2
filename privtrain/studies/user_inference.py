"""User inference: whether a user's data were trained on, and what lowers the success of such an attack.

Every measure is of the headline attack of ``attacks analyse``: the mean over the attacker's documents of a user of
log p_tuned - log p_base per token. The documents were never trained on. Measures read ``report/attacks.json`` of a
finished cell. The axis ``method`` of the grid names the ways of training, by ``NAMES``; ``cap-N`` is a cap of N records
a user. Its further values, by ``settings.canaries`` of the recipe, plant users whose documents share a substring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from privtrain.studies.figures import AxisLabels, Level, Series, curves_figure, places_figure, roc_figure
from privtrain.studies.findings import Claim, Figure, Findings, Statement, Table, judge_direction, judge_no_effect
from privtrain.studies.results import CellResult, Estimate, Results

TITLE = "User inference: is a user's data in the training set?"
PAPER = (
    "Kandpal, Pillutla, Oprea, Kairouz, Choquette-Choo and Xu 2023, User Inference Attacks on LLMs, arXiv 2310.09266"
)

PERPLEXITY = "eval/held_out_perplexity"

#: Where the paper claims no effect on the AUROC: an effect within this counts as none.
MARGIN = 0.05
#: Where the paper claims an effect: a smaller one counts as none. Half of the least difference that the paper reports.
LEAST = 0.02

NAMES = {
    "plain": "no mitigation",
    "dedup": "within-user deduplication",
    "early": "early stopping",
    "clip-example": "example clipping, no noise",
    "clip-batch": "batch clipping, no noise",
    "dp-example": "example-level DP-SGD",
    "dp-user": "user-level DP-SGD",
}

#: The paper's AUROC of its largest data sets, GPT-Neo 125M.
PAPER_AUROC = "Enron 88 %, CC News 66 %, ArXiv 57 %, Reddit 56 %"


def auroc(result: CellResult) -> float:
    """Return the AUROC of the headline."""
    facts = result.json("report/attacks.json")
    return facts["results"][facts["headline"]]["auroc"]


def auroc_variance(result: CellResult) -> float:
    """Return what the finite number of users adds to the variance of one run's AUROC (DeLong)."""
    facts = result.json("report/attacks.json")
    return facts["results"][facts["headline"]]["delong"]["variance"]


def above_chance(result: CellResult) -> float:
    """Return AUROC less one half."""
    return auroc(result) - 0.5


def tpr(target_fpr: float) -> Callable[[CellResult], float]:
    """Return the measure of the true positive rate over users at a false positive rate of at most ``target_fpr``."""

    def measure(result: CellResult) -> float:
        """Return a cell's true positive rate at ``target_fpr``."""
        facts = result.json("report/attacks.json")
        rows = facts["results"][facts["headline"]]["tpr_at_fpr"]
        return next(row["tpr"] for row in rows if row["target_fpr"] == target_fpr)

    return measure


def last_less_first(curve: str) -> Callable[[CellResult], float]:
    """Return the measure of how much the AUROC grows along one of the attack report's curves, of ``_CURVES``."""

    def measure(result: CellResult) -> float:
        """Return the AUROC at the curve's last point less that at its first."""
        points = _points(result, curve)
        return points[-1]["auroc"] - points[0]["auroc"]

    return measure


def more_documents_gain(place: int) -> Callable[[CellResult], float]:
    """Return the measure of what more documents of the attacker gain over one.

    Args:
        place: index of the point on the curve ``by_num_documents``, which says how many documents.
    """

    def measure(result: CellResult) -> float:
        """Return the AUROC with these documents less that with one, over the same users."""
        point = _points(result, "by_num_documents")[place]
        return point["auroc"] - point["auroc_with_one"]

    return measure


def canary_auroc(result: CellResult) -> float:
    """Return AUROC over users whose documents share a planted substring."""
    (row,) = result.json("report/attacks.json")["panels"]["canaries"]["rows"]
    return row["auroc"]


def find(results: Results) -> Findings:
    """Judge the paper's claims by what is complete."""
    return Findings(
        claims=_claims(results),
        tables=[_mitigations(results), *_dependences(results)],
        figures=_figures(results),
        notes=[
            "Example-level and user-level DP do not train on equally many record gradients (see the recipe), so their "
            "difference is of two recipes as they stand; read it beside perplexity.",
            "AUROC is over users, with the base model as reference; a half is guessing. Users are held in by fair "
            "coins, so nothing but training tells the sides apart.",
            "Mitigations share the split with the run that they are compared with, seed by seed. Those without noise "
            "are not private; as seeds are fixed, the runs with noise are not either. Their (ε, δ) is in the table.",
            f'"No effect" is judged with a margin of {MARGIN} in AUROC, for the whole interval of the difference.',
            f"A claim of a difference is contradicted where the whole interval lies below {LEAST} in AUROC.",
            *results.recipe.settings.get("notes", []),
        ],
        numbers=_numbers(results),
    )


def _numbers(results: Results) -> dict[str, Any]:
    """Return method → AUROC of every complete way of training, for machines."""
    by_method = {}
    for method in results.values_of("method"):
        estimate = results.estimate(auroc, method=method)
        if estimate is not None:
            by_method[method] = {"auroc": estimate.to_json()}
    return by_method


class _Methods(NamedTuple):
    """Which methods of the grid are what, by the recipe's ``settings``.

    Attributes:
        plain: the method without mitigation.
        caps: the methods with a cap on a user's records.
        canaries: method → tokens that all documents of a planted user share.
    """

    plain: str
    caps: list[str]
    canaries: dict[str, int]

    @classmethod
    def of(cls, results: Results) -> _Methods:
        """Return the methods of a recipe."""
        settings: Mapping[str, Any] = results.recipe.settings
        return cls(settings["baseline"], list(settings["caps"]), dict(settings["canaries"]))


def _claims(results: Results) -> list[Claim]:
    """Judge every claim of the paper by what is complete."""
    plain, caps, canaries = _Methods.of(results)

    def less(method: str, than: str = plain) -> Estimate | None:
        """Return by how much a method's AUROC is below another's."""
        return results.difference(auroc, {"method": than}, {"method": method})

    def grows(curve: str) -> Estimate | None:
        """Return how much the AUROC without mitigation grows along a curve of the attack report."""
        growth = last_less_first(curve)
        growths = [growth(result) for result in results.where(method=plain) if len(_points(result, curve)) > 1]
        return Estimate(tuple(growths)) if growths else None

    def more_documents() -> Estimate | None:
        """Return what the most documents that every seed has gain over one document."""
        lengths = [len(_points(result, "by_num_documents")) for result in results.where(method=plain)]
        last_place = min(lengths, default=0) - 1
        # The curve's first point is one document, with which more are compared.
        return results.estimate(more_documents_gain(last_place), method=plain) if last_place > 0 else None

    def users_variance(method: str) -> float | None:
        """Return what the finite number of users adds to the variance of a method's AUROC."""
        variance = results.estimate(auroc_variance, method=method)
        return None if variance is None else variance.mean

    shortest, longest = min(canaries, key=canaries.__getitem__), max(canaries, key=canaries.__getitem__)
    lengths = f"{canaries[longest]} tokens, not {canaries[shortest]}"
    # (claim, measured difference in AUROC, users' part of its variance). ``expected`` is the paper's difference in
    # AUROC; of several data sets the least.
    directed = [
        (
            Statement(
                "a user's part in training can be inferred from fresh documents",
                "AUROC of GPT-Neo 125M",
                PAPER_AUROC,
                expected=0.06,
            ),
            results.estimate(above_chance, method=plain),
            users_variance(plain),
        ),
        (
            Statement(
                "more documents of the attacker help",
                "attacker's knowledge",
                "CC News: 62 % with one, 68 % with fifty",
                expected=0.06,
            ),
            more_documents(),
            None,
        ),
        (
            Statement(
                "users with a larger share of the training data are at greater risk",
                "Proposition 1",
                "Reddit: 55.8 % with six months of data, 60.1 % with four",
                expected=0.043,
            ),
            grows("by_share"),
            None,
        ),
        (
            Statement(
                "users whose text is distinct (outliers) are at greater risk",
                "Proposition 1",
                "grows with the divergence from the others",
            ),
            grows("by_distinctness"),
            None,
        ),
        (
            Statement(
                f"users are at greater risk if their documents share {lengths}",
                "canary users",
                "CC News: 63 to 69 % at five tokens",
                expected=0.06,
            ),
            results.difference(canary_auroc, {"method": longest}, {"method": shortest}),
            None,
        ),
        (
            Statement(
                f"a cap on a user's records lowers it ({_name(caps[0])})",
                "per-user cap",
                "CC News canaries: 77 % at 100 documents to near chance at 5",
            ),
            less(caps[0]),
            None,
        ),
        (
            Statement("within-user deduplication lowers it", "Table 4", "CC News: 65.7 % to 59.1 %", expected=0.066),
            less("dedup"),
            None,
        ),
        (
            Statement(
                "early stopping does not remove it",
                "early stopping",
                "CC News: 95 % of the AUROC after 5 % of training",
                expected=0.12,
            ),
            results.estimate(above_chance, method="early"),
            users_variance("early"),
        ),
        (
            Statement(
                "example-level DP lowers it", "example-level DP", "Enron: 88 % to 66.7 % at ε = 8", expected=0.213
            ),
            less("dp-example"),
            None,
        ),
        (
            Statement(
                "example-level DP does not remove it", "example-level DP", "Enron: 66.7 % at ε = 8", expected=0.167
            ),
            results.estimate(above_chance, method="dp-example"),
            users_variance("dp-example"),
        ),
        (
            Statement(
                "user-level DP, ε for a user, leaves less of it than example-level DP of the same ε for a record",
                "future work",
                "not run in the paper",
            ),
            less("dp-user", "dp-example"),
            None,
        ),
    ]
    claims = [
        judge_direction(statement, difference, least=LEAST, users_variance=variance)
        for statement, difference, variance in directed
    ]
    for method in ("clip-example", "clip-batch"):
        statement = Statement(f"{NAMES[method]}, has no effect", "gradient clipping", "no effect")
        claims.append(judge_no_effect(statement, less(method), margin=MARGIN))
    return claims


def _mitigations(results: Results) -> Table:
    """Return a table with a row for each complete way of training: AUROC, perplexity, guarantee."""
    canaries = _Methods.of(results).canaries
    rows = []
    for method in results.values_of("method"):
        estimate = results.estimate(auroc, method=method)
        if estimate is None or method in canaries:  # runs with planted users are a table of their own
            continue
        others = [results.estimate(measure, method=method) for measure in (tpr(0.01), tpr(0.1), PERPLEXITY)]
        texts = [other.text() if other else "" for other in others]
        rows.append([_name(method), estimate.text(), *texts, _guarantee(results, method)])
    columns = ("training", "AUROC", "TPR at FPR 1 %", "TPR at FPR 10 %", "held-out perplexity", "guarantee")
    note = f"Means over seeds with 95 % t-intervals. The paper without mitigation: {PAPER_AUROC}."
    return Table("What lowers user inference", columns, rows, note)


def _guarantee(results: Results, method: str) -> str:
    """Return a method's ε and δ in words, by the privacy statement of its first cell.

    They are those of the same training with a secret seed; a study fixes its seeds, which protects nobody.
    """
    statement = results.where(method=method)[0].json("privacy.json")
    if statement["epsilon"] is None:
        return "none"
    return f"({statement['epsilon']:.3g}, {statement['delta']:g}) for one {statement['unit']}, were its seed secret"


#: Curve of the attack report, over which AUROC is given → what its points are.
_CURVES = {
    "by_num_documents": "documents of the attacker",
    "by_share": "quarter of users by share of the training text",
    "by_distinctness": "quarter of users by distinctness",
}


def _dependences(results: Results) -> list[Table]:
    """Return tables of what raises the AUROC without mitigation, and of planted users; only those with rows."""
    tables = [_curves_table(results), _planted_table(results)]
    return [table for table in tables if table.rows]


def _curves_table(results: Results) -> Table:
    """Return a table with a row for each point of the attack report's curves, without mitigation."""
    plain = _Methods.of(results).plain
    rows = []
    for curve, title in _CURVES.items():
        for place, points in enumerate(_by_place(results, plain, curve)):
            # A point says its number of documents. On the other curves the points are quarters, 1 to 4.
            value = points[0].get("num_documents", place + 1)
            estimate = Estimate(tuple(point["auroc"] for point in points))
            rows.append([title, str(value), estimate.text()])
    return Table("What raises it, without mitigation", ("what", "value", "AUROC"), rows)


def _planted_table(results: Results) -> Table:
    """Return a table of the AUROC over planted users, with a row for each length of their shared substring."""
    rows = []
    for method, length in _Methods.of(results).canaries.items():
        estimate = results.estimate(canary_auroc, method=method)
        if estimate is not None:
            rows.append([str(length), estimate.text()])
    return Table("Planted users", ("tokens shared by all documents of a user", "AUROC"), rows)


def _by_place(results: Results, method: str, curve: str) -> list[list[dict[str, Any]]]:
    """Return the points of a curve by their place on it, each a list over the seeds whose curve reaches so far."""
    by_seed = [_points(result, curve) for result in results.where(method=method)]
    longest = max(map(len, by_seed), default=0)
    return [[points[place] for points in by_seed if place < len(points)] for place in range(longest)]


_CHANCE = Level("guessing", 0.5)


def _figures(results: Results) -> list[Figure]:
    """Return the figures for which enough is complete."""
    canaries = _Methods.of(results).canaries
    complete = [method for method in results.values_of("method") if results.where(method=method)]
    methods = [method for method in complete if method not in canaries]
    figures = [_auroc_figure(results, methods), _roc_curves(results, methods)] if methods else []
    more = (_documents_figure(results), _canaries_figure(results))
    return [*figures, *(figure for figure in more if figure is not None)]


def _auroc_figure(results: Results, methods: Sequence[str]) -> Figure:
    """Draw the AUROC of each way of training."""
    estimates = [results.estimate(auroc, method=method) for method in methods]
    series = [Series.through("AUROC", enumerate(estimates))]
    labels = AxisLabels("", "AUROC over users")
    svg = places_figure("mitigations", [_name(method) for method in methods], series, labels, [_CHANCE])
    return Figure("mitigations", "AUROC by mitigation", svg, "Means over seeds with 95 % t-intervals.")


def _roc_curves(results: Results, methods: Sequence[str]) -> Figure:
    """Draw the ROC curves, of the first seed, of some ways of training."""
    plain = _Methods.of(results).plain
    curves = []
    for method in (plain, "cap-1", "dp-example", "dp-user"):
        if method in methods:
            false_rates, true_rates = _roc(results.where(method=method)[0])
            curves.append((_name(method), false_rates, true_rates))
    return Figure("roc", "ROC on log axes", roc_figure("roc", curves, _num_held_out(results)), "Of the first seed.")


def _documents_figure(results: Results) -> Figure | None:
    """Draw AUROC against the attacker's number of documents, without mitigation; ``None`` for fewer than two points."""
    plain = _Methods.of(results).plain
    by_place = _by_place(results, plain, "by_num_documents")
    if len(by_place) < 2:
        return None
    x = [float(points[0]["num_documents"]) for points in by_place]
    y = [Estimate(tuple(point["auroc"] for point in points)) for points in by_place]
    series = [Series(_name(plain), x, y)]
    labels = AxisLabels("documents of the attacker", "AUROC over users", "log")
    svg = curves_figure("documents", series, labels, [_CHANCE])
    return Figure("documents", "AUROC against documents", svg, "Users with at least so many documents.")


def _canaries_figure(results: Results) -> Figure | None:
    """Draw AUROC over planted users against the length of their shared substring; ``None`` with fewer than two."""
    canaries = _Methods.of(results).canaries
    points = [(float(length), results.estimate(canary_auroc, method=method)) for method, length in canaries.items()]
    planted = Series.through("planted users", points)
    if len(planted.x) < 2:
        return None
    labels = AxisLabels("tokens shared by a user's documents", "AUROC over planted users", "log")
    svg = curves_figure("canaries", [planted], labels, [_CHANCE])
    return Figure("canaries", "AUROC against the shared substring", svg, "Users with a planted substring.")


def _roc(result: CellResult) -> tuple[list[float], list[float]]:
    """Return false and true positive rates at the corners of a cell's ROC curve."""
    facts = result.json("report/attacks.json")
    corners = facts["results"][facts["headline"]]["roc"]["corners"]
    return corners["fpr"], corners["tpr"]


def _num_held_out(results: Results) -> int:
    """Return the number of held-out users, the same in every cell."""
    return results.cells[0].json("report/attacks.json")["counts"]["held_out"]["num_units"]


def _points(result: CellResult, curve: str) -> list[dict[str, Any]]:
    """Return the points of one of the attack report's curves, such as ``{"num_documents": 4, "auroc": 0.6, …}``."""
    return result.json("report/attacks.json")["user_inference"][curve]


def _name(method: str) -> str:
    """Return a method's name for people."""
    if method.startswith("cap-"):
        return f"at most {method.removeprefix('cap-')} records a user"
    return NAMES.get(method, method)
